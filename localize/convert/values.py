"""Values that leave the graph for Python, and the guards on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from localize.errors import TraceError


def is_guardable(value: Any) -> bool:
    """Whether a value is one that comes again: a flag, a count, a name, or a nest of them. A float hardly does."""
    if isinstance(value, tuple | list):
        return all(is_guardable(item) for item in value)
    return value is None or isinstance(value, bool | int | str | torch.dtype)


@fx.node.has_side_effect
def check_value(reader: str, expected: Any, where: str, *args: Any, **kwargs: Any) -> None:
    """Guard node: the method ``reader`` of a tensor must give what it gave when the program was recorded.

    Raises:
        TraceError: it does not.
    """
    found = getattr(Tensor, reader)(*args, **kwargs)
    if found != expected:
        raise TraceError(
            f"The captured program took a decision at {where} on a value that was {expected} at capture and is "
            f"{found} now. Re-convert with an example of this kind; or put these lines into an nn.Module of their own, "
            "which is then kept whole and decides anew at every call."
        )


@fx.node.has_side_effect
def check_result(found: Any, expected: Any, where: str) -> None:
    """Guard node: what a module returns beside tensors must be what it returned when the program was recorded.

    Raises:
        TraceError: it is not.
    """
    if type(found) is not type(expected) or not (found == expected or (found != found and expected != expected)):
        raise TraceError(
            f"The module called at {where} returned {expected!r} at capture and returns {found!r} now, which the "
            "captured program cannot follow. Return tensors, or make the module around it a part of its own."
        )
