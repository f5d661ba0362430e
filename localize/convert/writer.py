"""Writes a recording down as an fx graph: how calls of torch and of modules become nodes.

The work is done by its parts: ``draft.py`` (nodes and the tensors they made), ``operands.py`` (values on their way into
a node), ``results.py`` (values on their way out), ``numbers.py`` (sizes), ``attributes.py`` (tensors of the model),
``channels.py`` (tensors that leaves leave on themselves).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.convert.attributes import Attributes
from localize.convert.audit import LeafCall
from localize.convert.channels import Channels
from localize.convert.checkpointing import Checkpointed
from localize.convert.context import Context
from localize.convert.draft import Draft
from localize.convert.numbers import Numbers, Origin
from localize.convert.operands import Operands
from localize.convert.regions import InAutocast, Method, Regions, call
from localize.convert.results import Results
from localize.part import kind_of


class GraphWriter(Draft):
    """The graph of one recording."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.regions = Regions(kind_of(context.root)[0])
        self.numbers = Numbers(self)
        self.attributes = Attributes(self)
        self.channels = Channels(self)
        self._operands = Operands(self, self.attributes, self.channels, self.numbers)
        self._results = Results(self, self.attributes, self._operands, self.numbers)

    def placeholder(self, name: str, tensor: Tensor) -> None:
        """An input of the graph."""
        node = self.graph.placeholder(name)
        self.describe(node, Origin.DATA)
        self.remember(tensor, node)
        self.numbers.last_placeholder = node

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node: tensors and recorded integers become the nodes that made them."""
        return self._operands.of(value)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor, or the attribute that holds it."""
        return self._operands.node_of(tensor)

    def call(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A node that computes something: in an autocast region, it does so in the same region again."""
        regions = self.regions.here
        if not regions:
            return self.create(op, target, args, kwargs)
        if op == "call_method":
            target = Method(target)
        elif op == "call_module":
            args, target = (self.create("get_attr", target), *args), call
        return self.create("call_function", InAutocast(target, regions), args, kwargs)

    def call_leaf(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any], checkpointed: bool) -> fx.Node:
        """The node of a module that is called as it is; ``checkpointed``: its activations are not kept."""
        if checkpointed:
            node = self.call("call_function", Checkpointed(), (self.create("get_attr", target), *args), kwargs)
        else:
            node = self.call("call_module", target, args, kwargs)
        self.origins[node] = Origin.DATA
        return node

    def bind(self, value: Any, node: fx.Node) -> Any:
        """Remembers that ``node`` made ``value``; returns what Python goes on with (see ``Results.bind``)."""
        return self._results.bind(value, node)

    def bind_call(self, value: Any, node: fx.Node, changed: list[Tensor]) -> Any:
        """The same for a call, which wrote into ``changed``.

        Raises:
            Obstacle: it ran under conditions that would not hold when the graph runs.
        """
        if not self.regions.account_for_state():
            raise self.obstacle("autocast is switched inside the forward, and not by torch.autocast")
        if changed and not torch.is_grad_enabled() and any(t.requires_grad for t in changed):
            raise self.obstacle("a tensor that needs a gradient is changed in place under no_grad")
        value = self._results.bind(value, node, in_place=bool(changed))
        self.mark_mutated(node, changed)
        return value

    def bind_leaf(self, value: Any, node: fx.Node, module: nn.Module, watch: LeafCall, changed: list[Tensor]) -> Any:
        """The same for a leaf, which may have read and left tensors past its arguments and results."""
        self.channels.add(node, module)
        self.channels.link(node, watch)
        value = self.bind_call(value, node, changed)
        self._results.bind_opened(node)
        return value

    def finish(self, leaves: Iterable[Any]) -> fx.Graph:
        """Ends the graph and removes what nobody needs: sizes, entries of tuples, attributes."""
        self.create("output", "output", (tuple(self.argument(leaf) for leaf in leaves),))
        self.close()
        for node in reversed(self.graph.nodes):
            if not node.users and _is_pure(node):
                self.graph.erase_node(node)
        return self.graph

    def close(self) -> None:
        """Lets go of all tensors; recorded integers that survive are ordinary from now on."""
        super().close()
        self.channels.clear()
        self.numbers.clear()


def _is_pure(node: fx.Node) -> bool:
    return node.op == "get_attr" or bool(node.meta.get("number") or node.meta.get("entry"))
