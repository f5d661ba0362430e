"""How a torch function that was seen is written as a node of a graph."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

_BINARY = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
)
_OTHERS = ("getitem", "setitem", "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert")


def _operator(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(operator, f"{name}_" if name in ("and", "or") else name)
    return found


OPERATORS = {
    f"__{name}__": _operator(name) for name in (*_BINARY, *_OTHERS, *(f"i{name}" for name in _BINARY))
}
REFLECTED = {f"__r{name}__": _operator(name) for name in _BINARY}

VALUE_READERS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "equal",
        "allclose",
        "is_nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__array__",
        "__contains__",
        "__dlpack__",
        "__format__",
    ]
)
"""Functions that turn a tensor's values into Python's: what the program does next may depend on them."""

SPLITTERS = frozenset(
    ["split", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split", "unsafe_chunk"]
)
"""Functions that give as many tensors as the sizes ask for."""

SIZED_BY_VALUES = frozenset(
    ["nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount"]
)
"""Functions whose results are as large as many values fit."""

GRADIENTS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
"""What computes gradients inside a forward: its own graph, which nodes would not build."""

RANDOM = frozenset(
    [
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "bernoulli",
        "normal",
        "multinomial",
        "poisson",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "rrelu",
        "gumbel_softmax",
        "bernoulli_",
        "normal_",
        "uniform_",
        "random_",
        "exponential_",
        "geometric_",
        "cauchy_",
        "log_normal_",
    ]
)
"""Functions whose values differ from call to call, whatever their arguments."""

OWN_STATE = frozenset(("batch_norm", "instance_norm", "native_batch_norm"))
"""Functions that update the running statistics they are handed."""

_IN_PLACE = re.compile(r"(?<!_)_$")  # add_, but not __add__


def in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that a function writes into, judging by its name and options."""
    if kwargs.get("out") is not None:
        yield from tensors_of(kwargs["out"])
    by_name = bool(_IN_PLACE.search(name)) or name == "__setitem__" or name in _AUGMENTED
    if args and isinstance(args[0], Tensor) and (by_name or kwargs.get("inplace") is True):
        yield args[0]


_AUGMENTED = frozenset(f"__i{name}__" for name in _BINARY)


def graph_call(function: Any, name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """(op, target, args) of the node for a call of ``function``; ``args`` are graph values."""
    if name in OPERATORS:
        return "call_function", OPERATORS[name], args
    if name in REFLECTED and len(args) == 2:
        return "call_function", REFLECTED[name], args[::-1]
    if args and isinstance(args[0], fx.Node) and getattr(Tensor, name, None) == function:
        return "call_method", name, args
    return "call_function", importable(function), args


class Named:
    """A callable that generated source refers to by a name of its own, since no import finds it."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = re.sub(r"\W", "_", name)
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@cache
def importable(function: Any) -> Callable[..., Any]:
    """``function`` itself where generated source can name it, else a ``Named`` one."""
    try:
        first, *path = fx.node._get_qualified_name(function).split(".")
        found: Any = torch if first == "torch" else None
        for name in path:
            found = getattr(found, name)
    except (AttributeError, RuntimeError):
        found = None
    if found is function or (found is not None and found == function):
        return function  # type: ignore[no-any-return]
    return Named(function, getattr(function, "__name__", type(function).__name__))


@cache
def autograd_function(kind: type[torch.autograd.Function]) -> Named:
    """The node target for ``kind.apply``."""

    return Named(_Apply(kind), kind.__name__)


class _Apply:
    """``kind.apply``, looked up at each call: it is patched while recording."""

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind.apply(*args, **kwargs)


@cache
def signature_with_flag(function: Any) -> inspect.Signature | None:
    """The signature of a Python function that has a ``training`` parameter."""
    if not isinstance(function, FunctionType):
        return None
    try:
        signature = inspect.signature(function)
    except ValueError:  # Tensor.__pow__ and others wrap a built-in that has none
        return None
    return signature if "training" in signature.parameters else None


def sized_by_values(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the size of what a function gives depends on its arguments' values."""
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        return any(isinstance(value, Tensor) for value in (*args[1:], kwargs.get("repeats")))
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        return any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in index)
    return name in SIZED_BY_VALUES


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
