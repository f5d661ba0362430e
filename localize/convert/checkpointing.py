"""Activation checkpointing that a model does by itself: kept, module by module."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import torch.utils.checkpoint
from torch import nn

_TORCH = torch.utils.checkpoint.__file__
_ENTERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "module_calls.py")


class Checkpointed:
    """Calls a module without keeping its activations: they are computed again for the backward pass.

    Whichever way the model did that, here it is the one without re-entering autograd, which works with local losses.
    """

    __name__ = __qualname__ = "checkpointed"
    __module__ = __name__

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpointed)

    def __hash__(self) -> int:
        return hash(Checkpointed)


def is_checkpointed(module: nn.Module) -> bool:
    """Whether the module is being called by ``torch.utils.checkpoint``, and does not see to that in its own call."""
    if type(module).__call__ is not nn.Module.__call__:
        return False
    frame: FrameType | None = sys._getframe(2)  # past ``ModuleCalls.call``
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename == _TORCH and frame.f_code.co_name in ("checkpoint", "_checkpoint_impl"):
            return True
        if filename == _ENTERS and frame.f_code.co_name == "_enter":
            return False
        frame = frame.f_back
    return False
