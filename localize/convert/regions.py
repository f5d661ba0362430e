"""Autocast regions inside a forward: each call recorded in one runs in the same region again.

A region counts even where it changes nothing at capture: ``torch.autocast("cuda", enabled=False)`` around a
rotary embedding matters once the parts run under bf16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from localize.signature import tensors_of

Region = tuple[str, bool, torch.dtype]
"""Device type, whether autocasting is on, and to what."""

HERE = "here"
"""The device type of whatever tensors come, in place of the one that the example was on."""


class InAutocast:
    """A callable that runs ``function`` in autocast regions, outermost first.

    A weight that is used twice in one region is cast twice, once a call; torch would cast it once.
    """

    def __init__(self, function: Callable[..., Any], regions: tuple[Region, ...]) -> None:
        self.function, self.regions = function, regions
        name = getattr(function, "__name__", type(function).__name__)
        self.__name__ = self.__qualname__ = re.sub(r"\W", "_", name)
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = next((t.device.type for t in tensors_of((args, kwargs))), "cpu")
        with ExitStack() as stack:
            for device, enabled, dtype in self.regions:
                stack.enter_context(torch.autocast(here if device == HERE else device, dtype, enabled))
            return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, InAutocast)
            and (self.function, self.regions) == (other.function, other.regions)
        )

    def __hash__(self) -> int:
        return hash((self.__name__, self.regions))


class Method:
    """``tensor.name(...)`` as a function."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, self.__name__)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self.__name__ == other.__name__

    def __hash__(self) -> int:
        return hash(self.__name__)


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module."""
    return module(*args, **kwargs)


class Regions:
    """The regions that the recorded code is in right now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device.type
        self._open: list[Region] = []
        self._ambient = _state()

    @property
    def here(self) -> tuple[Region, ...]:
        """The innermost region of every device type."""
        return tuple({region[0]: region for region in self._open}.values())

    def account_for_state(self) -> bool:
        """Whether autocasting is as these regions say; it may also be switched by a call of torch's own."""
        named = [(self._device if d == HERE else d, on and dtype) for d, on, dtype in self.here]
        return self._ambient | {d: state for d, state in named if d in self._ambient} == _state()

    @contextmanager
    def noticed(self, listens: Callable[[], bool]) -> Iterator[None]:
        """While it lasts, every autocast context that opens while ``listens()`` is noticed."""
        kind = torch.amp.autocast_mode.autocast
        enter, leave = kind.__enter__, kind.__exit__

        def noticed_enter(context: Any) -> Any:
            result = enter(context)  # type: ignore[no-untyped-call, unused-ignore]
            if listens():
                device = HERE if context.device == self._device else context.device
                self._open.append((device, bool(context._enabled), context.fast_dtype))
                context.__dict__["_noticed"] = context.__dict__.get("_noticed", 0) + 1
            return result

        def noticed_leave(context: Any, *details: Any) -> Any:
            if context.__dict__.get("_noticed"):
                context.__dict__["_noticed"] -= 1
                self._open.pop()
            return leave(context, *details)

        kind.__enter__, kind.__exit__ = noticed_enter, noticed_leave  # type: ignore[method-assign]
        try:
            yield
        finally:
            kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


def _state() -> dict[str, Any]:
    return {
        kind: torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")
    }
