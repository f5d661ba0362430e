"""Whether the graphs of train and eval mode do the same, so that one serves both."""

from __future__ import annotations

from typing import Any

from torch import fx


def same_graph(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether two graphs do the same: op, target and arguments node by node."""
    if len(first.nodes) != len(second.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if a.op != b.op or (a.target != b.target and a.target is not b.target):
            return False
        args, kwargs = fx.map_arg((a.args, a.kwargs), lambda node: twin[node])
        if not _same((args, kwargs), (b.args, b.kwargs)):
            return False
        twin[a] = b
    return True


def _same(first: Any, second: Any) -> bool:
    """Equality that tells 1 from True and 1.0, which choose different overloads, and takes NaN as equal to itself."""
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(item, second[key]) for key, item in first.items())
    if isinstance(first, slice) and isinstance(second, slice):
        return _same((first.start, first.stop, first.step), (second.start, second.stop, second.step))
    return first is second or (
        type(first) is type(second) and bool(first == second or (first != first and second != second))
    )


def merge_aliases(graph: fx.Graph, other: fx.Graph) -> None:
    """Adds what aliases and mutates what in the other mode: a cut must be legal in both."""
    twin = dict(zip(other.nodes, graph.nodes, strict=True))
    for theirs, mine in twin.items():
        for key in ("storages", "mutates"):
            mine.meta[key] = mine.meta[key] | theirs.meta[key]
        links = frozenset(twin[node] for node in theirs.meta.get("links", ()) if node in twin)
        if links:
            mine.meta["links"] = mine.meta.get("links", frozenset()) | links
