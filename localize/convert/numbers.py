"""The nodes of a graph that are not tensors: sizes, arithmetic on them, guards, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from localize.convert.obstacle import user_location
from localize.convert.sizes import RecordedInt, check_size, recorded


class Origin(IntEnum):
    """What a value depends on; the highest of what it was made from."""

    CONSTANT = 0
    SIZE = 1  # on the inputs' shapes only
    DATA = 2  # on inputs, parameters, buffers or random numbers


class Writer(Protocol):
    """What this needs of the graph's writer."""

    graph: fx.Graph
    is_open: bool
    origins: dict[fx.Node, Origin]

    def maker(self, tensor: Tensor) -> fx.Node | None: ...

    def create(self, op: str, target: Any, args: tuple[Any, ...] = ...) -> fx.Node: ...

    def argument(self, value: Any) -> Any: ...

    def check_decision(self, reason: str) -> None: ...


class Numbers:
    """The sink of recorded integers. Nodes are made on first use, right behind the tensor they belong to."""

    def __init__(self, writer: Writer) -> None:
        self.last_placeholder: fx.Node | None = None
        self._writer = writer
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._devices: dict[int, tuple[torch.device, Callable[[], fx.Node]]] = {}
        self._guards: set[tuple[Any, ...]] = set()

    @property
    def is_open(self) -> bool:
        return self._writer.is_open

    def clear(self) -> None:
        """Lets go of everything that was recorded."""
        self._sizes.clear()
        self._devices.clear()

    def size(self, tensor: Tensor, method: str, value: int, *args: Any) -> int:
        """An integer that ``tensor.method(*args)`` gives. Parameters and constants never change theirs."""
        source = self._writer.maker(tensor)
        if source is None:
            return value
        key = (source, method, *args)
        if key not in self._sizes:
            self._sizes[key] = recorded(
                value, self, lambda: self._behind(source, "call_method", method, args)
            )
        return self._sizes[key]

    def sizes(self, tensor: Tensor, method: str, values: Iterable[int]) -> Any:
        """A ``torch.Size`` or tuple, entry by entry."""
        return type(values)([self.size(tensor, method, v, i) for i, v in enumerate(values)])  # type: ignore[call-arg]

    def device(self, tensor: Tensor, value: torch.device) -> torch.device:
        """``value``, known from now on as the tensor's device: parts may run on others than the example did."""
        source = self._writer.maker(tensor)
        if source is not None:
            node: list[fx.Node] = []

            def make() -> fx.Node:
                if not node:
                    node.append(self._behind(source, "call_function", getattr, ("device",)))
                return node[0]

            self._devices[id(value)] = (value, make)
        return value

    def device_node(self, device: torch.device) -> fx.Node | None:
        """The node of a device object that was read from a tensor; equal ones from elsewhere are constants."""
        return self._devices[id(device)][1]() if id(device) in self._devices else None

    def _behind(self, source: fx.Node, op: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """Right behind the tensor, which need not stay alive for it then."""
        place = self.last_placeholder if source.op == "placeholder" else source
        with self._writer.graph.inserting_after(place):
            node = self._writer.create(op, target, (source, *args))
        # How many values fit a condition is as good as a value.
        self._writer.origins[node] = Origin.DATA if source.meta.get("dynamic") else Origin.SIZE
        node.meta.update(scope=source.meta["scope"], number=True)
        return node

    def emit_size(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Integer arithmetic."""
        node = self._writer.create(
            "call_function", function, tuple(self._writer.argument(arg) for arg in args)
        )
        node.meta["number"] = True
        return node

    def _origin(self, value: Any) -> Origin:
        return self._writer.origins[value] if isinstance(value, fx.Node) else Origin.CONSTANT

    def emit_guard(self, value: RecordedInt, comparison: str, other: int, outcome: bool) -> None:
        """A check at run time that a decision on a size comes out as it did now."""
        left, right = self._writer.argument(value), self._writer.argument(other)
        key = (left, comparison, right)
        if left is right or key in self._guards:
            return
        self._guards.add(key)
        if Origin.DATA in (self._origin(left), self._origin(right)):
            self._writer.check_decision("Python depends on how many values fit a condition")
        self._writer.create(
            "call_function", check_size, (left, comparison, right, bool(outcome), user_location())
        )
