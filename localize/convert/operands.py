"""Values as operands of nodes: tensors and recorded integers become the nodes that made them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from localize import nest
from localize.convert.attributes import Attributes
from localize.convert.channels import Channels
from localize.convert.draft import Draft
from localize.convert.numbers import Numbers
from localize.convert.sizes import RecordedInt

_PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class Operands:
    """Finds the node of every tensor: the one that made it, or one that reads it from where the model keeps it."""

    def __init__(self, draft: Draft, attributes: Attributes, channels: Channels, numbers: Numbers) -> None:
        self._draft, self._attributes, self._channels, self._numbers = draft, attributes, channels, numbers
        self.opened: dict[int, tuple[Any, fx.Node]] = {}  # objects that were opened for a call, and where they are made

    def of(self, value: Any) -> Any:
        """``value`` as an argument of a node.

        Raises:
            Obstacle: a graph cannot hold it, or nobody knows where a tensor comes from.
        """
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, RecordedInt):
            return value.graph_node if value.sink is self._numbers else value.plain
        if isinstance(value, torch.device):
            return self._numbers.device_node(value) or value
        if isinstance(value, _PLAIN):
            return float(value) if isinstance(value, float) else value  # NumPy's floats are floats, and no literals
        if isinstance(value, slice):
            return slice(*(self.of(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            items = [self.of(item) for item in value]
            if hasattr(value, "_fields"):  # a named tuple may check what it is made of: make it at run time
                return self._draft.create("call_function", type(value), tuple(items))
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, range):
            return list(value)
        if nest.is_openable(value):
            return self._open(value)
        raise self._draft.obstacle(f"an argument is a {type(value).__name__}, which a graph cannot hold")

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor, or the one that reads it: an attribute of the model, or of a leaf."""
        for find in (self._draft.maker, self._attributes.find, self._channels.find):
            node = find(tensor)
            if node is not None:
                return node
        raise self._draft.obstacle(
            f"a tensor {tuple(tensor.shape)} was made by an operation that the recorder cannot see (NumPy, a compiled "
            "or scripted function) or came from another module by a side channel"
        )

    def _open(self, value: Any) -> fx.Node:
        """An object that holds tensors is made again at run time, from the tensors in it."""
        leaves, spec = nest.flatten(value)
        node = self._draft.create("call_function", nest.Rebuild(spec), tuple(map(self.of, leaves)))
        self.opened[id(value)] = (value, node)
        return node
