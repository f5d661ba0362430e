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
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from localize.convert.messages import is_message
from localize.convert.obstacle import user_frame
from localize.errors import TraceError

ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
_METHODS = frozenset(name for name in dir(int) if not name.startswith("_"))  # bit_length and the like
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


class SizeSink(Protocol):
    """Where nodes for integers go: the recorder. A closed one makes its integers ordinary again."""

    @property
    def is_open(self) -> bool: ...

    def emit_size(self, function: Callable[..., Any], *args: Any) -> fx.Node: ...

    def emit_guard(self, value: RecordedInt, comparison: str, other: int, outcome: bool) -> None: ...


class RecordedInt(torch.SymInt):
    """An integer with the node that computes it. The node is made on first use: most sizes are never used.

    To torch's functions it is a symbolic integer, which they hand to the recorder as it is. To Python it looks like
    an ``int`` but is none, so that whatever wants a plain number (a list's index, a float on the left, ``range``,
    ``hash``, text) has to ask for it, and so leaves a guard.
    """

    sink: SizeSink

    def __init__(self, value: int, sink: SizeSink, node: fx.Node | Callable[[], fx.Node]) -> None:
        self.plain = value
        """The ordinary integer, without a guard."""
        self.sink, self._node = sink, node

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what isinstance(n, int) asks for
        return int

    @property
    def graph_node(self) -> fx.Node:
        """The node that computes it, made now if it has to be."""
        if not isinstance(self._node, fx.Node):
            self._node = self._node()
        return self._node

    def pin(self) -> int:
        """The ordinary integer, with a guard that the captured program only runs where it is the same."""
        if self.sink.is_open:
            self.sink.emit_guard(self, "eq", self.plain, True)
        return self.plain

    def __neg__(self) -> Any:
        if not self.sink.is_open:
            return -self.plain
        return recorded(-self.plain, self.sink, self.sink.emit_size(operator.neg, self))

    def __abs__(self) -> Any:
        return -self if self < 0 else self.__pos__()

    def __invert__(self) -> Any:
        return -self - 1

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __truediv__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, Tensor) else self.pin() / pinned(other)

    def __rtruediv__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, Tensor) else pinned(other) / self.pin()

    def __pos__(self) -> Any:
        return self

    __trunc__ = __floor__ = __ceil__ = __pos__

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None else round(self.pin(), digits)

    def __int__(self) -> int:
        return self.pin()

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.pin())

    def __complex__(self) -> complex:
        return complex(self.pin())

    def __hash__(self) -> int:
        if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "einops":
            raise TypeError(
                "symbolic sizes cannot be hashed"
            )  # which tells einops not to take them from its cache
        return hash(self.pin())

    def __repr__(self) -> str:
        return repr(self._told())

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self._told(), spec)

    def _told(self) -> int:
        """The number for a text: a message may say what it likes, any other text may steer the program."""
        return self.plain if is_message(user_frame()) else self.pin()

    def __getattr__(self, name: str) -> Any:
        if name not in _METHODS:
            raise AttributeError(f"an int has no attribute {name!r}")
        return getattr(self.pin(), name)

    def __copy__(self) -> int:
        return self.plain

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return self.plain

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.plain,)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def recorded(value: int, sink: SizeSink, node: fx.Node | Callable[[], fx.Node]) -> int:
    """A recorded integer, as the ``int`` that it passes for."""
    return cast(int, RecordedInt(value, sink, node))


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
    function = getattr(operator, f"{name}_" if name in ("and", "or") else name)

    def method(self: RecordedInt, other: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented  # its own arithmetic takes the integer along
        right = other.plain if isinstance(other, RecordedInt) else other
        if not isinstance(right, int):  # a float, a list that is repeated
            return function(right, self.pin()) if reflected else function(self.pin(), right)
        value = function(right, self.plain) if reflected else function(self.plain, right)
        if not self.sink.is_open:
            return value
        if not isinstance(value, int):  # a negative power
            self.pin(), pinned(other)
            return value
        args = (other, self) if reflected else (self, other)
        return recorded(value, self.sink, self.sink.emit_size(function, *args))

    return method


def _comparison(name: str) -> Callable[[RecordedInt, Any], Any]:
    function = getattr(operator, name)

    def method(self: RecordedInt, other: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented
        if not isinstance(other, int):
            return function(self.pin(), other) if isinstance(other, float) else NotImplemented
        outcome = function(self.plain, other.plain if isinstance(other, RecordedInt) else other)
        if self.sink.is_open:
            self.sink.emit_guard(self, name, other, outcome)
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
_len = builtins.len


def _sized_len(value: Any) -> int:
    """``len`` makes an ordinary integer of whatever ``Tensor.__len__`` gives; ``size`` keeps the provenance."""
    return value.size(0) if isinstance(value, Tensor) and value.dim() else _len(value)


@contextmanager
def sized_builtins() -> Iterator[None]:
    """While it lasts, the length of a tensor is a recorded integer. For all others ``len`` is as always."""
    builtins.len = _sized_len
    try:
        yield
    finally:
        builtins.len = _len
