"""Builds an fx graph from values that exist: it knows which node made which tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize import nest
from localize.convert.audit import Audit, LeafCall, find_left, has_left
from localize.convert.checkpointing import Checkpointed
from localize.convert.constants import Constants
from localize.convert.modes import Extras
from localize.convert.naming import registered_names
from localize.convert.numbers import Numbers, Origin
from localize.convert.obstacle import Obstacle, Remedy, user_location
from localize.convert.regions import InAutocast, Method, Regions, call
from localize.convert.sizes import RecordedInt, recorded
from localize.convert.values import check_result
from localize.part import kind_of

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


_FIXED = (bool, float, complex, str)  # beside tensors, a module may return these: they must not change


class GraphWriter:
    """A graph under construction. Every tensor it has seen stays alive, so that ``id`` names it for good."""

    def __init__(
        self,
        root: nn.Module,
        extras: Extras,
        constants: Constants,
        audit: Audit,
        storage_numbers: Iterator[int],
        guards: Callable[[str], bool],
        rebound: Set[str] = frozenset(),
    ) -> None:
        """``guards``: whether a module's decisions are checked; ``rebound``: buffers that get new values."""
        self.graph = fx.Graph()
        self.extras = extras
        self.scopes = [""]  # paths of the modules whose forward runs, outermost first
        self.origins: dict[fx.Node, Origin] = {}
        self.is_open = True
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self._registered = registered_names(root)
        self._constants = constants
        self._attributes: dict[str, fx.Node] = {}
        self._storage_numbers = storage_numbers
        self._storages: dict[int, int] = {}
        self._leaf_calls: list[tuple[fx.Node, nn.Module]] = []
        self._read: list[Tensor] = []  # parameters, buffers and constants that the graph reads
        self._objects: dict[int, tuple[Any, fx.Node]] = {}  # arguments that were opened, and where they are made
        self.numbers = Numbers(self)
        self.audit = audit
        self._guards, self.rebound = guards, rebound
        self.regions = Regions(kind_of(root)[0])

    @property
    def scope(self) -> str:
        return self.scopes[-1]

    # -- nodes

    def placeholder(self, name: str, tensor: Tensor) -> None:
        """An input of the graph."""
        node = self.graph.placeholder(name)
        self._describe(node, Origin.DATA)
        self._remember(tensor, node)
        self.numbers.last_placeholder = node

    def create(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A node whose arguments are graph values already (see ``argument``)."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        self._describe(node, max((self.origins[n] for n in node.all_input_nodes), default=Origin.CONSTANT))
        return node

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

    def call_leaf(
        self,
        target: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        checkpointed: bool = False,
    ) -> fx.Node:
        """The node of a module that is called as it is; ``checkpointed``: its activations are not kept."""
        if checkpointed:
            node = self.call("call_function", Checkpointed(), (self.create("get_attr", target), *args), kwargs)
        else:
            node = self.call("call_module", target, args, kwargs)
        self.origins[node] = Origin.DATA
        self._leaf_calls.append((node, module))
        return node

    def _describe(self, node: fx.Node, origin: Origin) -> None:
        node.meta.update(scope=self.scope, storages=frozenset(), mutates=frozenset())
        self.origins[node] = origin

    def attribute(self, target: str, tensor: Tensor, origin: Origin) -> fx.Node:
        """The ``get_attr`` node of a tensor, one for each target."""
        if target not in self._attributes:
            self._attributes[target] = node = self.create("get_attr", target)
            self.origins[node] = origin
            node.meta["storages"] = self.storage(tensor)
            self._alive.append(tensor)
            self._read.append(tensor)
            if target in self.rebound:  # autograd may still need the old value when the new one is copied over it
                self._attributes[target] = node = self.create("call_method", "clone", (node,))
                node.meta["storages"] = frozenset((next(self._storage_numbers),))
        return self._attributes[target]

    def has_read(self, tensor: Tensor) -> bool:
        """Whether the graph reads a tensor that is neither input nor result."""
        return any(tensor is held for held in self._read)

    def rebind(self, target: str, buffer: Tensor, value: Tensor) -> bool:
        """Copies ``value`` into a buffer as soon as it is known; False where it is no value of the graph."""
        node = self._nodes.get(id(value))
        if node is None or value.shape != buffer.shape or value.dtype != buffer.dtype:
            return False
        old = self._attributes.get(target)
        order = {known: i for i, known in enumerate(self.graph.nodes)}
        last = max((n for n in (node, old) if n is not None), key=lambda n: order[n])
        with self.graph.inserting_after(last):
            place = self.create("get_attr", target)
        with self.graph.inserting_after(place):
            copy = self.create("call_function", set_buffer, (place, node))
        copy.meta.update(scope=node.meta["scope"], mutates=self.storage(buffer))
        place.meta["storages"] = self.storage(buffer)
        if old is not None:
            copy.meta["links"] = frozenset((old,))
        return True

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
        self.is_open = False
        self._leaf_calls.clear()
        self._nodes.clear()
        self._alive.clear()
        self.numbers.clear()

    # -- values → arguments

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node: tensors and recorded integers become the nodes that made them."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, RecordedInt):
            return value.graph_node if value.sink is self.numbers else value.plain
        if isinstance(value, torch.device):
            return self.numbers.device_node(value) or value
        if isinstance(value, _PLAIN):
            return float(value) if isinstance(value, float) else value  # NumPy's floats are floats, and no literals
        if isinstance(value, slice):
            return slice(*(self.argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            items = [self.argument(item) for item in value]
            if hasattr(value, "_fields"):  # a named tuple may check what it is made of: make it at run time
                return self.create("call_function", type(value), tuple(items))
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, range):
            return list(value)
        if nest.is_openable(value):
            leaves, spec = nest.flatten(value)
            node = self.create("call_function", nest.Rebuild(spec), tuple(map(self.argument, leaves)))
            self._objects[id(value)] = (value, node)
            return node
        raise self.obstacle(f"an argument is a {type(value).__name__}, which a graph cannot hold")

    def maker(self, tensor: Tensor) -> fx.Node | None:
        """The node that made a tensor; None for parameters and constants."""
        return self._nodes.get(id(tensor))

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor, or the attribute that holds it."""
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        name = self._registered.get(id(tensor))
        if name is not None:
            return self.attribute(name, tensor, Origin.DATA)
        if self._constants.holds(tensor):
            return self.attribute(self.extras.constant(tensor), tensor, Origin.CONSTANT)
        node = self._left_on_leaf(tensor)
        if node is not None:
            return node
        raise self.obstacle(
            f"a tensor {tuple(tensor.shape)} was made by an operation that the recorder cannot see (NumPy, a compiled "
            "or scripted function) or came from another module by a side channel"
        )

    def _left_on_leaf(self, tensor: Tensor) -> fx.Node | None:
        """The node that reads a tensor which a leaf left on one of its attributes, made right behind the leaf's."""
        for leaf, module in reversed(self._leaf_calls):
            place = find_left(tensor, module)
            if place is None:
                continue
            with self.graph.inserting_after(leaf):
                node = self.create("call_module", self.extras.read(*place), (leaf,))
            node.meta.update(scope=leaf.meta["scope"], links=frozenset((leaf,)))
            self.origins[node] = Origin.DATA
            self._remember(tensor, node)
            return node
        return None

    def link(self, node: fx.Node, call: LeafCall) -> None:
        """Ties a leaf's call to the calls that left what it reads past its arguments."""
        for tensor in call.foreign:
            left_by = next((n for n, module in reversed(self._leaf_calls) if has_left(tensor, module)), None)
            if left_by is None:
                raise self.obstacle(
                    f"a module reads a tensor {tuple(tensor.shape)} past its arguments, which was left for it outside"
                )
            if left_by is not node:
                node.meta["links"] = node.meta.get("links", frozenset()) | {left_by}

    def knows_module(self, module: nn.Module) -> bool:
        """Whether a module that is not registered was kept somewhere before the recording began."""
        return self._constants.holds_module(module)

    def obstacle(self, reason: str, remedy: Remedy = Remedy.WHOLE) -> Obstacle:
        """What to raise where the module whose forward runs cannot be recorded."""
        return Obstacle(reason, self.scope, user_location(), remedy)

    def check_decision(self, reason: str) -> None:
        """Raises where a decision on values must not be guarded, but be kept in one piece."""
        if not self._guards(self.scope):
            raise self.obstacle(reason, Remedy.GUARD)

    # -- results → nodes

    def bind(self, value: Any, node: fx.Node, in_place: bool = False) -> Any:
        """Remembers that ``node`` made ``value``; nested values get nodes that take them out.

        Returns ``value``, in which a tensor that was known before is replaced by an alias of its own: whether
        a layer hands its input through must not decide which node later code refers to. Integers that a
        module returns become recorded ones.
        """
        if isinstance(value, Tensor):
            return self._bind_tensor(value, node, in_place)
        if type(value) is int:
            return recorded(value, self.numbers, node)
        if type(value) in _FIXED:
            self.create("call_function", check_result, (node, value, user_location()))
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

    def rebind_objects(self, node: fx.Node) -> None:
        """``node`` was handed objects, a cache for instance: the tensors it left in them are read behind it."""
        for value, made in self._objects.values():
            for i, item in enumerate(nest.leaves_of(value)):
                if isinstance(item, Tensor) and id(item) not in self._nodes and id(item) not in self._registered:
                    child = self.create("call_function", nest.leaf, (made, i, node))
                    child.meta.update(links=frozenset((node,)))
                    self.origins[child] = Origin.DATA
                    self._remember(item, child)
        self._objects.clear()

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
        child = self.create("call_function", take, (node, key))
        child.meta.update(entry=True, dynamic=node.meta.get("dynamic", False))
        item = self.bind(item, child, in_place)
        node.meta["storages"] |= child.meta["storages"]
        return item

    def _bind_tensor(self, tensor: Tensor, node: fx.Node, in_place: bool) -> Tensor:
        known = id(tensor) in self._nodes or id(tensor) in self._registered
        if known and not in_place and tensor.layout is torch.strided:
            tensor = tensor.view_as(tensor)
        node.meta["storages"] |= self.storage(tensor)
        if not torch.is_grad_enabled() and (tensor.is_floating_point() or tensor.is_complex()):
            storages = node.meta["storages"]  # recorded under no_grad: the same values without their history
            node = self.create("call_method", "detach", (node,))
            node.meta["storages"] = storages
        self._remember(tensor, node)
        return tensor

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["storages"] |= self.storage(tensor)
        node.meta["learns"] = tensor.requires_grad
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        self.audit.made(tensor)

    def storage(self, tensor: Tensor) -> frozenset[int]:
        """The number of a tensor's storage; empty for layouts that have none."""
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return frozenset()
        if key not in self._storages:
            self._storages[key] = next(self._storage_numbers)
        return frozenset((self._storages[key],))

    def mark_mutated(self, node: fx.Node, tensors: Iterable[Tensor]) -> None:
        """``node`` writes into ``tensors``: what they hold depends on its arguments from now on."""
        for tensor in tensors:
            node.meta["mutates"] |= self.storage(tensor)
            holder = self._nodes.get(id(tensor))
            if holder is not None:
                self.origins[holder] = max(self.origins[holder], self.origins[node])


@fx.node.has_side_effect
def set_buffer(buffer: Tensor, value: Tensor) -> None:
    """``self.buffer = value`` in a forward: the buffer object stays, and takes the value."""
    with torch.no_grad():
        buffer.copy_(value.detach())


def _matters(value: Any) -> bool:
    """Whether a result holds tensors or integers, whose provenance counts."""
    if isinstance(value, Tensor) or type(value) is int or type(value) in _FIXED:
        return True
    if isinstance(value, tuple | list):
        return any(_matters(item) for item in value)
    if isinstance(value, dict):
        return any(_matters(item) for item in value.values())
    return nest.is_openable(value)


def _is_pure(node: fx.Node) -> bool:
    return node.op == "get_attr" or bool(node.meta.get("number") or node.meta.get("entry"))
