"""Side channels: tensors that a leaf leaves on itself, and that others take from there past every argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from localize.convert.audit import LeafCall, tensors_in
from localize.convert.draft import Draft
from localize.convert.numbers import Origin
from localize.convert.storages import storage_of


class Channels:
    """The calls of leaves so far, and who takes what from whom."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._calls: list[tuple[fx.Node, nn.Module]] = []

    def add(self, node: fx.Node, module: nn.Module) -> None:
        """``node`` calls the leaf ``module``."""
        self._calls.append((node, module))

    def find(self, tensor: Tensor) -> fx.Node | None:
        """The node that reads a tensor which a leaf left on one of its attributes, made right behind the leaf's."""
        for leaf, module in reversed(self._calls):
            place = _place_of(tensor, module)
            if place is None:
                continue
            with self._draft.graph.inserting_after(leaf):
                node = self._draft.create("call_module", self._draft.context.extras.read(*place), (leaf,))
            node.meta.update(scope=leaf.meta["scope"], links=frozenset((leaf,)))
            self._draft.origins[node] = Origin.DATA
            self._draft.remember(tensor, node)
            return node
        return None

    def link(self, node: fx.Node, call: LeafCall) -> None:
        """Ties a leaf's call to the calls that left what it reads past its arguments.

        Raises:
            Obstacle: it was no leaf that left it.
        """
        for tensor in call.foreign:
            left_by = next((n for n, module in reversed(self._calls) if _has_left(tensor, module)), None)
            if left_by is None:
                raise self._draft.obstacle(
                    f"a module reads a tensor {tuple(tensor.shape)} past its arguments, which was left for it outside"
                )
            if left_by is not node:
                node.meta["links"] = node.meta.get("links", frozenset()) | {left_by}

    def clear(self) -> None:
        """Lets go of all modules."""
        self._calls.clear()


def _place_of(tensor: Tensor, leaf: nn.Module) -> tuple[nn.Module, str, Any] | None:
    """Where ``leaf`` left ``tensor``: (a module inside, its attribute, the key if that is a dict)."""
    return next((place for place, held in _left(leaf) if held is tensor), None)


def _has_left(tensor: Tensor, leaf: nn.Module) -> bool:
    """Whether ``leaf`` left ``tensor`` or a view of it somewhere inside."""
    storage = storage_of(tensor)
    found = (storage_of(held) for _, held in _left(leaf, deep=True))
    return any(other is not None and other._cdata == storage._cdata for other in found)


def _left(leaf: nn.Module, deep: bool = False) -> Iterator[tuple[tuple[nn.Module, str, Any], Tensor]]:
    """(place, tensor) of plain attributes and buffers, and of dicts; ``deep``: also of lists and other objects."""
    for module in leaf.modules():
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, Tensor):
                yield (module, name, None), value
            elif name in ("_parameters", "_buffers", "_modules"):
                continue
            elif type(value) is dict:
                yield from (((module, name, key), item) for key, item in value.items() if isinstance(item, Tensor))
            elif deep and not isinstance(value, nn.Module):
                yield from (((module, name, None), item) for item in _inside(value))


def _inside(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {})
    return tensors_in(dict(items) if isinstance(items, dict) else list(items))
