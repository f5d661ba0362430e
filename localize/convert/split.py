"""Cuts a traced model into parts: each a straight-line program over the user's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from localize.convert.code import Code
from localize.convert.traced import TracedModel
from localize.errors import CutError
from localize.part import Part, Program, Route, set_own_mode
from localize.spec import CutPoint


@dataclass(frozen=True)
class Cuts:
    """The chosen cut points of one mode's graph, bottom first, and the one below the model's own classifier.

    ``logits`` is the position of the logits among the leaves of the model's output.
    """

    points: tuple[CutPoint, ...]
    classifier: CutPoint | None = None
    logits: int = 0


def split(traced: TracedModel, cuts: dict[bool, Cuts]) -> list[Part]:
    """The parts of ``traced``, bottom first. ``cuts`` is given by mode (True for train).

    Raises:
        CutError: a part needs a value that does not cross the boundary below it.
    """
    routes = {mode: _routes(traced, mode, cuts[mode]) for mode in (True, False)}
    parts = []
    for number in range(1, len(cuts[True].points) + 2):
        by_mode = {mode: routes[mode][number - 1] for mode in routes}
        members: dict[str, nn.Module | Tensor] = {}
        constants: dict[str, Tensor] = {}
        for path in sorted({path for route in by_mode.values() for path in route.whole.members}):
            value = traced.resolve(path)
            if path in traced.extras and isinstance(value, Tensor):
                constants[path] = value
            else:
                members[path] = value
        part = Part(number, by_mode, members, constants)
        set_own_mode(part, traced.root.training)
        parts.append(part)
    return parts


def _routes(traced: TracedModel, mode: bool, cuts: Cuts) -> list[Route]:
    """The routes of all parts in one mode."""
    slicer = Slicer(traced, mode)
    edges = [0, *(point.position for point in cuts.points), len(slicer.nodes)]
    crossings = [*(point.crossing for point in cuts.points), ()]
    routes = []
    for number, ((start, stop), crossing) in enumerate(zip(pairwise(edges), crossings, strict=True), 1):
        body = slicer.nodes[start:stop]
        if number < len(crossings):
            point = cuts.points[number - 1]
            made = {node.name for node in body}
            gives = tuple(name for name in crossing if name in made)
            whole, takes = slicer.program(number, body, [slicer.by_name[name] for name in gives])
            passes = tuple(name for name in crossing if name not in made)
            route = Route(takes, gives, passes, point.primary, whole)
        else:
            route = _last_route(slicer, number, start, cuts)
        fixed = {name for name in (*route.takes, *route.passes) if not slicer.by_name[name].meta.get("learns", True)}
        routes.append(replace(route, constant=frozenset(fixed)))
    return routes


def _last_route(slicer: Slicer, number: int, start: int, cuts: Cuts) -> Route:
    """The last part returns the model's output; below a classifier of its own it can stop halfway."""
    restore = slicer.traced.outputs[slicer.mode].restore
    whole, takes = slicer.program(number, slicer.nodes[start:], slicer.leaves, then=restore)
    below = cuts.classifier
    if below is None or below.position <= start:
        return Route(takes, (), (), None, whole)
    representation = slicer.by_name[below.primary]
    hidden, _ = slicer.program(number, slicer.nodes[start : below.position], [representation], takes, then=_only)
    needed = slicer.between(representation, slicer.leaves[cuts.logits])
    if needed is None:  # the logits need more than the representation
        return Route(takes, (), (), None, whole)
    classifier, _ = slicer.program(number, needed, [slicer.leaves[cuts.logits]], (below.primary,), then=_only)
    return Route(takes, (), (), None, whole, hidden, classifier, below.primary)


def _only(leaves: Sequence[Any]) -> Any:
    return leaves[0]


@dataclass
class Slicer:
    """Cuts programs out of one mode's graph."""

    traced: TracedModel
    mode: bool
    nodes: list[fx.Node] = field(init=False)
    by_name: dict[str, fx.Node] = field(init=False)
    leaves: list[Any] = field(init=False)  # what the graph returns: nodes, or constants

    def __post_init__(self) -> None:
        graph = self.traced.graph(self.mode)
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.by_name = {node.name: node for node in self.nodes}
        output = next(node for node in graph.nodes if node.op == "output")
        self.leaves = list(output.args[0])

    def between(self, source: fx.Node, result: fx.Node) -> list[fx.Node] | None:
        """The nodes that make ``result`` from ``source``, in order; None if they need any other tensor."""
        needed: set[fx.Node] = set()
        todo = [result]
        while todo:
            node = todo.pop()
            if node is source or node in needed:
                continue
            if node.op == "placeholder":
                return None
            needed.add(node)
            todo.extend(node.all_input_nodes)
        upward = [node for node in self.nodes if node in needed]
        if any(self.nodes.index(node) < self.nodes.index(source) for node in upward if _is_work(node)):
            return None
        return upward

    def program(
        self,
        number: int,
        body: Iterable[fx.Node],
        results: Sequence[Any],
        takes: Sequence[str] | None = None,
        then: Callable[[Sequence[Any]], Any] | None = None,
    ) -> tuple[Program, tuple[str, ...]]:
        """A program of ``body`` that returns ``results``, and the names of the values it takes from below.

        ``takes`` fixes these instead; ``then`` is applied to the flat results.
        """
        body = [node for node in body if node.op not in ("placeholder", "get_attr")]
        if takes is None:
            takes = self._needs(body, results)
        copy = _Copy(fx.Graph(), set(body), number)
        for name in takes:
            copy.made[self.by_name[name]] = copy.graph.placeholder(name)
        for node in body:
            copy.of(node)
        copy.graph.output(tuple(fx.node.map_arg(leaf, copy.of) for leaf in results))
        members = {str(n.target) for n in copy.graph.nodes if n.op in ("call_module", "get_attr")}
        code = Code.of(copy.graph, f"part {number}", then)
        return Program(code, code.source, tuple(sorted(members))), tuple(takes)

    def _needs(self, body: Sequence[fx.Node], results: Sequence[Any]) -> tuple[str, ...]:
        """The tensors from below, in graph order. Ints and flags are not taken but computed again."""
        inside, needed, todo = set(body), set(), list(body)
        fx.node.map_arg(list(results), todo.append)
        seen = set(todo)
        while todo:
            node = todo.pop()
            inputs = [node] if node not in inside else node.all_input_nodes
            for value in inputs:
                if value in inside or value.op == "get_attr":
                    continue
                if value.op == "placeholder" or not is_recomputable(value):
                    needed.add(value)
                elif value not in seen or value is node:
                    todo.extend(v for v in value.all_input_nodes if v not in seen)
                    seen.update(value.all_input_nodes)
        return tuple(node.name for node in self.nodes if node in needed)


@dataclass
class _Copy:
    """A graph under construction, with what has been copied into it."""

    graph: fx.Graph
    body: set[fx.Node]
    number: int
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            if node not in self.body and node.op != "get_attr" and not is_recomputable(node):
                raise CutError(
                    f"Part {self.number} needs the value {node.name!r} from below, which does not cross its boundary; "
                    "cut elsewhere (cuts=[...])."
                )
            for value in node.all_input_nodes:
                self.of(value)
            self.made[node] = self.graph.node_copy(node, self.of)
        return self.made[node]


def is_recomputable(node: fx.Node) -> bool:
    """Whether a node is no tensor but an int, a flag or a guard, which a part above computes for itself."""
    return not node.meta.get("storages") and node.op != "placeholder"


def _is_work(node: fx.Node) -> bool:
    return node.op != "get_attr" and not is_recomputable(node)
