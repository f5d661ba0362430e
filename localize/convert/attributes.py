"""The tensors that a model keeps, as a graph's ``get_attr`` nodes: parameters, buffers, constants."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from localize.convert.draft import Draft
from localize.convert.naming import registered_names
from localize.convert.numbers import Origin


class Attributes:
    """One node for each tensor that the graph reads from the model."""

    def __init__(self, draft: Draft) -> None:
        self._draft, self._context = draft, draft.context
        self._registered = registered_names(draft.context.root)
        self._nodes: dict[str, fx.Node] = {}
        self._read: list[Tensor] = []

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer."""
        return id(tensor) in self._registered

    def find(self, tensor: Tensor) -> fx.Node | None:
        """The node of a parameter, a buffer or a constant; None for any other tensor."""
        name = self._registered.get(id(tensor))
        # A table that a first call puts in a buffer's place, with another shape, is gone when the session is over.
        if name is not None and tensor.shape == self._context.shapes.get(name):
            return self._node(name, tensor, Origin.DATA)
        if name is not None or self._context.constants.holds(tensor):
            return self._node(self._context.extras.constant(tensor), tensor, Origin.CONSTANT)
        return None

    def _node(self, target: str, tensor: Tensor, origin: Origin) -> fx.Node:
        if target not in self._nodes:
            self._nodes[target] = node = self._draft.create("get_attr", target)
            self._draft.origins[node] = origin
            node.meta["storages"] = self._context.storages.of(tensor)
            self._draft.keep(tensor)
            self._read.append(tensor)
            if self.is_rebound(target):  # autograd may still need the old value when the new one is copied over it
                self._nodes[target] = node = self._draft.create("call_method", "clone", (node,))
                node.meta["storages"] = self._context.storages.new()
        return self._nodes[target]

    def has_read(self, tensor: Tensor) -> bool:
        """Whether the graph reads a tensor that is neither input nor result."""
        return any(tensor is held for held in self._read)

    def is_rebound(self, target: str) -> bool:
        """Whether a buffer is known to get a new value by assignment (``self.buffer = value``)."""
        return target in self._context.remedies.rebound

    def rebind(self, target: str, buffer: Tensor, value: Tensor) -> bool:
        """Copies ``value`` into a buffer as soon as it is known; False where it is no value of the graph."""
        graph, storage = self._draft.graph, self._context.storages.of
        node = self._draft.maker(value)
        if node is None or value.shape != buffer.shape or value.dtype != buffer.dtype:
            return False
        old = self._nodes.get(target)
        order = {known: i for i, known in enumerate(graph.nodes)}
        last = max((n for n in (node, old) if n is not None), key=lambda n: order[n])
        with graph.inserting_after(last):
            place = self._draft.create("get_attr", target)
        with graph.inserting_after(place):
            copy = self._draft.create("call_function", set_buffer, (place, node))
        copy.meta.update(scope=node.meta["scope"], mutates=storage(buffer))
        place.meta["storages"] = storage(buffer)
        if old is not None:
            copy.meta["links"] = frozenset((old,))
        return True


@fx.node.has_side_effect
def set_buffer(buffer: Tensor, value: Tensor) -> None:
    """``self.buffer = value`` in a forward: the buffer object stays, and takes the value."""
    with torch.no_grad():
        buffer.copy_(value.detach())
