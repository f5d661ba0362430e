"""A graph under construction: which node made which tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from localize.convert.context import Context
from localize.convert.numbers import Origin
from localize.convert.obstacle import Obstacle, Remedy, user_location


class Draft:
    """Nodes and the tensors that they made.

    A value of the recording is named by its ``id``: every tensor that was seen stays alive, so that no other takes
    its place. Each node knows its scope, its storages and what it depends on.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.graph = fx.Graph()
        self.scopes = [""]  # paths of the modules whose forward runs, outermost first
        self.origins: dict[fx.Node, Origin] = {}
        self.is_open = True
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []

    @property
    def scope(self) -> str:
        return self.scopes[-1]

    def create(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A node whose arguments are graph values already (see ``operands.py``)."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        self.describe(node, max((self.origins[n] for n in node.all_input_nodes), default=Origin.CONSTANT))
        return node

    def describe(self, node: fx.Node, origin: Origin) -> None:
        """Gives a new node what every node has."""
        node.meta.update(scope=self.scope, storages=frozenset(), mutates=frozenset())
        self.origins[node] = origin

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        """``node`` made ``tensor``."""
        node.meta["storages"] |= self.context.storages.of(tensor)
        node.meta["learns"] = tensor.requires_grad
        self._nodes[id(tensor)] = node
        self.keep(tensor)
        self.context.audit.made(tensor)

    def keep(self, tensor: Tensor) -> None:
        """Keeps a tensor alive until the graph is closed."""
        self._alive.append(tensor)

    def maker(self, tensor: Tensor) -> fx.Node | None:
        """The node that made a tensor; None for parameters and constants."""
        return self._nodes.get(id(tensor))

    def mark_mutated(self, node: fx.Node, tensors: Iterable[Tensor]) -> None:
        """``node`` writes into ``tensors``: what they hold depends on its arguments from now on."""
        for tensor in tensors:
            node.meta["mutates"] |= self.context.storages.of(tensor)
            holder = self.maker(tensor)
            if holder is not None:
                self.origins[holder] = max(self.origins[holder], self.origins[node])

    def obstacle(self, reason: str, remedy: Remedy = Remedy.WHOLE) -> Obstacle:
        """What to raise where the module whose forward runs cannot be recorded."""
        return Obstacle(reason, self.scope, user_location(), remedy)

    def check_decision(self, reason: str) -> None:
        """Raises where a decision on values must not be guarded, but be kept in one piece."""
        if not self.context.policy.guards(self.scope):
            raise self.obstacle(reason, Remedy.GUARD)

    def close(self) -> None:
        """Lets go of all tensors; recorded integers that survive are ordinary from now on."""
        self.is_open = False
        self._nodes.clear()
        self._alive.clear()
