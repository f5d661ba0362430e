"""Tensors that were there before the recording began, and are neither parameters nor buffers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from inspect import getattr_static
from types import FrameType
from typing import Any

from torch import Tensor, nn


class Constants:
    """Tells a tensor that the model keeps somewhere from one that was made behind the recorder's back."""

    def __init__(self, modules: Iterable[nn.Module], attributes: Iterable[dict[str, Any]]) -> None:
        """``attributes`` are those of the modules before the recording: what a forward leaves there is no constant."""
        self._places = [*attributes, *(vars(kind) for module in modules for kind in type(module).__mro__)]
        forwards = (getattr(getattr_static(module, "forward", None), "__globals__", {}) for module in modules)
        self._places += {id(variables): variables for variables in forwards}.values()
        self._known: dict[int, Tensor] | None = None

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a plain attribute of a module or class, or a global or closure variable in use."""
        if tensor.grad_fn is not None:
            return False
        if self._known is None:
            self._known = {id(t): t for place in self._places for t in _tensors(place.values())}
        if id(tensor) in self._known:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if any(value is tensor for value in _outer_variables(frame)):
                return True
            frame = frame.f_back
        return False

    def holds_module(self, module: nn.Module) -> bool:
        """Whether ``module`` is, or is inside of, what a module or class keeps in a plain attribute, list or dict."""
        kept = (item for place in self._places for value in list(place.values()) for item in _one_level(value))
        return any(module in top.modules() for top in kept if isinstance(top, nn.Module))


def _one_level(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    else:
        yield value


def _outer_variables(frame: FrameType) -> Iterator[Tensor]:
    """Tensors that a function on the stack sees without having made them."""
    yield from _tensors(frame.f_globals.values())
    free = frame.f_code.co_freevars
    if free:
        variables = frame.f_locals
        yield from _tensors(variables[name] for name in free if name in variables)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among values, and one level down in lists, tuples and dicts."""
    for value in list(values):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))
        elif isinstance(value, dict):
            yield from (item for item in value.values() if isinstance(item, Tensor))
