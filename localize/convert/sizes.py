"""Integers that know where they came from, so that a capture stays right at other batch sizes and lengths.

During recording ``x.shape[i]`` is a ``RecordedInt``. Its arithmetic emits nodes; its comparisons and conversions,
which steer Python and cannot be part of a graph, emit guards: nodes that raise where the outcome differs.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, fx

from localize.errors import TraceError

ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


class SizeSink(Protocol):
    """Where nodes for integers go: the recorder. A closed one makes its integers ordinary again."""

    @property
    def is_open(self) -> bool: ...

    def emit_size(self, function: Callable[..., Any], *args: Any) -> fx.Node: ...

    def emit_guard(self, value: RecordedInt, comparison: str, other: int, outcome: bool) -> None: ...


class RecordedInt(int):
    """An integer with the node that computes it. The node is made on first use: most sizes are never used.

    CPython hides a few readers of an int subclass: a float on the left (``0.5 * n``), list indices and slices.
    They get the plain number without a guard; the check at a second batch size finds what goes wrong by that.
    """

    sink: SizeSink
    _node: fx.Node | Callable[[], fx.Node]

    def __new__(cls, value: int, sink: SizeSink, node: fx.Node | Callable[[], fx.Node]) -> RecordedInt:
        self = super().__new__(cls, value)
        self.sink, self._node = sink, node
        return self

    @property
    def node(self) -> fx.Node:
        if not isinstance(self._node, fx.Node):
            self._node = self._node()
        return self._node

    @property
    def plain(self) -> int:
        """The ordinary integer, without a guard."""
        return int.__int__(self)

    def pin(self) -> int:
        """The ordinary integer, with a guard that the captured program only runs where it is the same."""
        if self.sink.is_open:
            self.sink.emit_guard(self, "eq", self.plain, True)
        return self.plain

    def __neg__(self) -> int:
        if not self.sink.is_open:
            return -self.plain
        return RecordedInt(-self.plain, self.sink, self.sink.emit_size(operator.neg, self))

    def __abs__(self) -> int:
        return -self if self < 0 else self

    def __bool__(self) -> bool:
        return self != 0

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __truediv__(self, other: int) -> float:
        return pinned(self) / pinned(other)  # type: ignore[no-any-return]

    def __rtruediv__(self, other: int) -> float:
        return pinned(other) / pinned(self)  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return float(self.pin())

    def __int__(self) -> int:
        return self.pin()

    def __index__(self) -> int:
        return self.pin()

    def __pos__(self) -> int:
        return self

    __trunc__ = __floor__ = __ceil__ = __pos__

    def __round__(self, digits: Any = None) -> int:
        return self if digits is None else round(self.pin(), digits)

    def __hash__(self) -> int:
        if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "einops":
            raise TypeError(
                "symbolic sizes cannot be hashed"
            )  # which tells einops not to take them from its cache
        return hash(self.plain)

    def __copy__(self) -> int:
        return self.plain

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return self.plain

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.plain,)


def pinned(value: Any) -> Any:
    """``value``, as an ordinary integer with a guard where it is a recorded one."""
    return value.pin() if isinstance(value, RecordedInt) else value


def plain(value: Any) -> Any:
    """``value`` with every recorded integer inside tuples, lists, dicts and slices made ordinary."""
    if isinstance(value, RecordedInt):
        return value.plain
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([plain(item) for item in value])
    if kind is dict:
        return {key: plain(item) for key, item in value.items()}
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, tuple) and any(isinstance(item, RecordedInt) for item in value):
        return tuple(plain(item) for item in value)  # torch.Size
    return value


def _arithmetic(name: str, reflected: bool) -> Callable[[RecordedInt, Any], Any]:
    compute = getattr(int, f"__{'r' if reflected else ''}{name}__")
    function = getattr(operator, f"{name}_" if name in ("and", "or") else name)

    def method(self: RecordedInt, other: Any) -> Any:
        value = compute(self.plain, other)
        if not self.sink.is_open:
            return value
        if value is NotImplemented:  # other decides what happens next; only tensors take the node along
            if not isinstance(other, Tensor):
                self.pin()
            return value
        if not isinstance(value, int):
            return pinned(other) and self.pin() and value
        args = (other, self) if reflected else (self, other)
        return RecordedInt(value, self.sink, self.sink.emit_size(function, *args))

    return method


def _comparison(name: str) -> Callable[[RecordedInt, Any], Any]:
    compute = getattr(int, f"__{name}__")

    def method(self: RecordedInt, other: Any) -> Any:
        outcome = compute(self.plain, other)
        if self.sink.is_open:
            if isinstance(other, int):
                self.sink.emit_guard(self, name, other, outcome)
            elif isinstance(other, float):
                self.pin()
        return outcome

    return method


for _name in ARITHMETIC:
    setattr(RecordedInt, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(RecordedInt, f"__r{_name}__", _arithmetic(_name, reflected=True))
for _name in COMPARISONS:
    setattr(RecordedInt, f"__{_name}__", _comparison(_name))


@fx.node.has_side_effect
def check_size(value: int, comparison: str, other: int, outcome: bool, where: str) -> None:
    """Guard node: a decision that the recorded program took on a size must come out the same.

    Raises:
        TraceError: it does not.
    """
    if getattr(operator, comparison)(value, other) is not outcome:
        raise TraceError(
            f"The captured program was specialised at {where}: {value} {_SIGNS[comparison]} {other} was {outcome} for "
            f"sizes at capture and is {not outcome} now. Re-convert with inputs of this shape."
        )


@fx.node.has_side_effect
def check_count(values: Any, count: int, where: str) -> None:
    """Guard node: an operation must split into as many tensors as it did when it was recorded.

    Raises:
        TraceError: it does not.
    """
    if len(values) != count:
        raise TraceError(
            f"The captured program was specialised at {where}: {count} tensors at capture, {len(values)} now. "
            "Re-convert with inputs of this shape."
        )


_SIGNS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_range, _len = builtins.range, builtins.len


class _RangeType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _range)


class _PinningRange(metaclass=_RangeType):
    """``range`` reads an int subclass without asking it, so that a loop would be unrolled without a guard."""

    def __new__(cls, *args: Any) -> Any:
        return _range(*[pinned(arg) for arg in args])


def _sized_len(value: Any) -> int:
    """``len`` makes an ordinary integer of whatever ``Tensor.__len__`` gives; ``size`` keeps the provenance."""
    return value.size(0) if isinstance(value, Tensor) and value.dim() else _len(value)


@contextmanager
def sized_builtins() -> Iterator[None]:
    """While it lasts, ``range`` and ``len`` respect recorded integers. For all others they are as always."""
    builtins.range = _PinningRange  # type: ignore[misc]
    builtins.len = _sized_len
    try:
        yield
    finally:
        builtins.range, builtins.len = _range, _len  # type: ignore[misc]
