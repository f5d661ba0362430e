"""What calls give: nested values get nodes that take them out of what the call's node makes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from localize import nest
from localize.convert.attributes import Attributes
from localize.convert.draft import Draft
from localize.convert.numbers import Numbers, Origin
from localize.convert.obstacle import user_location
from localize.convert.operands import Operands
from localize.convert.sizes import recorded
from localize.convert.values import check_result

_FIXED = (bool, float, complex, str)  # beside tensors, a module may return these: they must not change


class Results:
    """Remembers which node made which part of a result."""

    def __init__(self, draft: Draft, attributes: Attributes, operands: Operands, numbers: Numbers) -> None:
        self._draft, self._attributes, self._operands, self._numbers = draft, attributes, operands, numbers

    def bind(self, value: Any, node: fx.Node, in_place: bool = False) -> Any:
        """Remembers that ``node`` made ``value``; nested values get nodes that take them out.

        Returns ``value``, in which a tensor that was known before is replaced by an alias of its own: whether
        a layer hands its input through must not decide which node later code refers to. Integers that a
        module returns become recorded ones.
        """
        if isinstance(value, Tensor):
            return self._bind_tensor(value, node, in_place)
        if type(value) is int:
            return recorded(value, self._numbers, node)
        if type(value) in _FIXED:
            self._draft.create("call_function", check_result, (node, value, user_location()))
            return value
        if not _matters(value):
            return value
        if isinstance(value, tuple | list):
            return self._bind_sequence(value, node, in_place)
        if isinstance(value, dict):
            for key, item in value.items():
                if _matters(item):
                    value[key] = self._bind_child(item, node, operator.getitem, key, in_place)
        else:  # an object, whose tensors it keeps: their nodes are taken from it
            for i, item in enumerate(nest.leaves_of(value)):
                if _matters(item):
                    self._bind_child(item, node, nest.leaf, i, in_place=True)
        return value

    def bind_opened(self, node: fx.Node) -> None:
        """``node`` was handed objects, a cache for instance: the tensors it left in them are read behind it."""
        for value, made in self._operands.opened.values():
            for i, item in enumerate(nest.leaves_of(value)):
                if isinstance(item, Tensor) and not self._is_known(item):
                    child = self._draft.create("call_function", nest.leaf, (made, i, node))
                    child.meta.update(links=frozenset((node,)))
                    self._draft.origins[child] = Origin.DATA
                    self._draft.remember(item, child)
        self._operands.opened.clear()

    def _bind_sequence(self, value: Any, node: fx.Node, in_place: bool) -> Any:
        items = [
            self._bind_child(item, node, operator.getitem, i, in_place) if _matters(item) else item
            for i, item in enumerate(value)
        ]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _bind_child(
        self, item: Any, node: fx.Node, take: Callable[..., Any], key: Any, in_place: bool
    ) -> Any:
        child = self._draft.create("call_function", take, (node, key))
        child.meta.update(entry=True, dynamic=node.meta.get("dynamic", False))
        item = self.bind(item, child, in_place)
        node.meta["storages"] |= child.meta["storages"]
        return item

    def _bind_tensor(self, tensor: Tensor, node: fx.Node, in_place: bool) -> Tensor:
        if self._is_known(tensor) and not in_place and tensor.layout is torch.strided:
            tensor = tensor.view_as(tensor)
        node.meta["storages"] |= self._draft.context.storages.of(tensor)
        if not torch.is_grad_enabled() and (tensor.is_floating_point() or tensor.is_complex()):
            storages = node.meta["storages"]  # recorded under no_grad: the same values without their history
            node = self._draft.create("call_method", "detach", (node,))
            node.meta["storages"] = storages
        self._draft.remember(tensor, node)
        return tensor

    def _is_known(self, tensor: Tensor) -> bool:
        return self._draft.maker(tensor) is not None or self._attributes.holds(tensor)


def _matters(value: Any) -> bool:
    """Whether a result holds tensors or integers, whose provenance counts."""
    if isinstance(value, Tensor) or type(value) is int or type(value) in _FIXED:
        return True
    if isinstance(value, tuple | list):
        return any(_matters(item) for item in value)
    if isinstance(value, dict):
        return any(_matters(item) for item in value.values())
    return nest.is_openable(value)
