"""Any Python value as a flat list of leaves, and back.

Tuples, lists, dicts and registered containers are torch's pytree's business. Objects that it does not know and that
hold tensors (dataclasses, caches, outputs of one's own) are opened by their attributes; on the way back they are
made anew, without calling ``__init__``.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CLOSED = (
    Tensor, nn.Module, torch.SymInt, torch.Generator, torch.device, torch.dtype, int, float, complex, str, bytes,
    type, type(None), FunctionType, BuiltinFunctionType, MethodType, ModuleType,
)  # fmt: skip


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of ``value`` and its structure."""
    return pytree.tree_flatten(_opened(value, ()))


def unflatten(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The inverse of ``flatten``."""
    return pytree.tree_unflatten(list(leaves), spec)


def flatten_with_path(value: Any) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
    """(path, leaf) of every leaf, and the structure."""
    paths, spec = pytree.tree_flatten_with_path(_opened(value, ()))
    return list(paths), spec


def leaves_of(value: Any) -> list[Any]:
    """The leaves of ``value``, in order."""
    return flatten(value)[0]


def leaf(value: Any, index: int, *_: Any) -> Any:
    """One leaf of ``value``; further arguments only say what has to come first."""
    return leaves_of(value)[index]


def is_openable(value: Any) -> bool:
    """Whether ``value`` is an object that pytree takes for a leaf and that holds tensors."""
    return isinstance(_opened_leaf(value, ()), _Opened)


class Rebuild:
    """Makes a value of one structure from its leaves."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self.__name__ = self.__qualname__ = "rebuild"
        self.__module__ = __name__

    def __call__(self, *leaves: Any) -> Any:
        return unflatten(leaves, self.spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rebuild) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec.num_leaves)


@dataclass(frozen=True)
class _Shape:
    """What is left of an object without its tensors: attributes and items that hold some, and all others."""

    kind: type
    names: tuple[str, ...]  # of all attributes, in order
    attributes: tuple[str, ...]  # those that hold tensors
    keys: tuple[Any, ...]  # of a dict; indices of a list or tuple
    fixed: dict[str, Any]
    fixed_items: dict[Any, Any]
    order: tuple[Any, ...]  # of all keys

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Shape):
            return NotImplemented
        mine = (self.kind, self.names, self.attributes, self.keys, self.order)
        theirs = (other.kind, other.names, other.attributes, other.keys, other.order)
        return mine == theirs and all(
            _alike(value, there[name])
            for here, there in ((self.fixed, other.fixed), (self.fixed_items, other.fixed_items))
            for name, value in here.items()
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.attributes))


@dataclass(frozen=True)
class _Opened:
    """Stands for an object while it is flattened."""

    shape: _Shape
    values: list[Any]


def _opened(value: Any, above: tuple[int, ...]) -> Any:
    """``value`` with every unknown object that holds tensors opened; ``above``: the objects it is inside of."""
    leaves, spec = pytree.tree_flatten(value, is_leaf=_is_size)
    opened = [_opened_leaf(item, above) for item in leaves]
    if all(new is old for new, old in zip(opened, leaves, strict=True)):
        return value
    return pytree.tree_unflatten(opened, spec)


def _opened_leaf(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, _CLOSED) or id(value) in above:
        return value
    above = (*above, id(value))
    held, inside = _attributes(value), _items(value)
    attributes = {name: _opened(item, above) for name, item in held.items()}
    items = {key: _opened(item, above) for key, item in inside.items()}
    moving = tuple(name for name, item in attributes.items() if _moves(item))
    keys = tuple(key for key, item in items.items() if _moves(item) or _is_size(value))
    if not moving and not keys and not _is_size(value) and not (len(above) > 1 and held and not inside):
        return value  # inside of another object, one without tensors (an empty layer of a cache) is no leaf either
    fixed = {name: item for name, item in held.items() if name not in moving}
    fixed_items = {key: item for key, item in inside.items() if key not in keys}
    shape = _Shape(type(value), tuple(attributes), moving, keys, fixed, fixed_items, tuple(items))
    return _Opened(shape, [*(attributes[name] for name in moving), *(items[key] for key in keys)])


def _is_size(value: Any) -> bool:
    """``torch.Size``: pytree knows it, and gives a tuple back."""
    return isinstance(value, torch.Size)


def _attributes(value: Any) -> dict[str, Any]:
    found = getattr(value, "__dict__", None)
    attributes: dict[str, Any] = dict(found) if type(found) is dict else {}
    if is_dataclass(value):  # with slots, perhaps
        names = [field.name for field in dataclass_fields(value) if field.name not in attributes]
        attributes |= {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, defaultdict):
        attributes["default_factory"] = value.default_factory
    return attributes


def _items(value: Any) -> dict[Any, Any]:
    """Of subclasses of dict, list and tuple, which pytree takes for leaves."""
    if isinstance(value, dict):
        return dict(value.items())
    return dict(enumerate(value)) if isinstance(value, list | tuple) else {}


def _moves(value: Any) -> bool:
    return any(isinstance(item, Tensor | torch.SymInt) for item in pytree.tree_leaves(value))


def _closed(values: Sequence[Any], shape: _Shape) -> Any:
    """The object again."""
    found = shape.fixed_items | dict(zip(shape.keys, values[len(shape.attributes) :], strict=True))
    items = {key: found[key] for key in shape.order}
    if shape.kind is torch.Size:  # a tuple where others than integers stand in for the sizes
        sizes = tuple(items.values())
        return torch.Size(sizes) if all(isinstance(size, int | torch.SymInt) for size in sizes) else sizes
    if issubclass(shape.kind, tuple):
        made: Any = tuple.__new__(shape.kind, list(items.values()))
    else:
        made = shape.kind.__new__(shape.kind)
    if issubclass(shape.kind, dict):
        plain = OrderedDict if issubclass(shape.kind, OrderedDict) else dict
        for key, item in items.items():
            plain.__setitem__(made, key, item)
    elif issubclass(shape.kind, list):
        list.extend(made, items.values())
    fixed = {name: item.copy() if type(item) in (list, dict, set) else item for name, item in shape.fixed.items()}
    attributes = fixed | dict(zip(shape.attributes, values, strict=False))
    for name in shape.names:
        object.__setattr__(made, name, attributes[name])
    return made


def _alike(one: Any, two: Any) -> bool:
    try:
        return one is two or bool(one == two)
    except (RuntimeError, ValueError):  # arrays have no one truth
        return False


def _keyed(opened: _Opened) -> tuple[list[tuple[Any, Any]], _Shape]:
    names = [pytree.GetAttrKey(name) for name in opened.shape.attributes]
    keys: list[Any] = [pytree.MappingKey(key) for key in opened.shape.keys]
    return list(zip([*names, *keys], opened.values, strict=True)), opened.shape


pytree.register_pytree_node(
    _Opened,
    lambda opened: (opened.values, opened.shape),
    lambda values, shape: _closed(list(values), shape),
    flatten_with_keys_fn=_keyed,
    serialized_type_name="localize.nest._Opened",
)
