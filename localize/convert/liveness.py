"""Which values cross each gap of a graph's order, and where the graph may be cut at all.

A gap at position p lies between ``nodes[:p]`` and ``nodes[p:]``::

    x ── conv ──┬── relu ── conv ── add ── …        at the gap after relu two values cross: conv's (the
                └────────────────────┘              skip) and relu's

Only plain tensors cross. Sizes and other small numbers are worked out again above the gap, from a tensor
that crosses too; parameters are read again by whoever needs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from torch import fx

from localize.convert.traced import Profile

# The skip around a strided bottleneck is 16 times its inside; a gate's map is 1000 times the gate.
_GATE_RATIO = 64


@dataclass(frozen=True)
class Gap:
    """A legal place to cut, before it has a name."""

    position: int
    primary: str
    crossing: tuple[str, ...]
    crossing_bytes: int


def legal_gaps(graph: fx.Graph, profile: Profile) -> list[Gap]:
    """All legal gaps, lowest first: right after every node that works on tensors, where

    - all that crosses is one plain tensor a name,
    - nothing that crosses is changed in place above,
    - nobody above reads from a node below past the graph,
    - a floating-point tensor that depends on a parameter below and has a batch axis crosses, and
    - there are parameters on both sides.
    """
    nodes = list(graph.nodes)
    readers = [i for i, n in enumerate(nodes) if profile.nodes[n.name].params]
    if len(readers) < 2:
        return []
    depends_on = dependencies(nodes, profile)
    last_change = _last_changes(nodes)
    linked = _linked(nodes)
    gaps = []
    for position, live in _live_values(nodes, profile):
        if not readers[0] < position <= readers[-1] or linked[position]:
            continue
        if not all(_may_cross(n, profile, last_change, position) for n in live):
            continue
        primary = _primary(nodes[position - 1], live, profile, depends_on)
        if primary is not None:
            nbytes = sum(profile.nodes[n.name].specs[0].nbytes for n in live)
            gaps.append(Gap(position, primary.name, tuple(n.name for n in live), nbytes))
    return gaps


def is_work(node: fx.Node, profile: Profile) -> bool:
    """Whether a node makes or changes tensors: no input, no parameter, no number."""
    return node.op.startswith("call_") and bool(profile.nodes[node.name].specs or node.meta.get("mutates"))


def is_number(node: fx.Node, profile: Profile) -> bool:
    """Whether a node's value is a size, a flag or the like, which a part may work out a second time."""
    if profile.nodes[node.name].specs or not node.op.startswith("call_"):
        return False
    return node.op != "call_module" or not node.all_input_nodes  # a module without inputs tells a flag


def is_check(node: fx.Node, profile: Profile) -> bool:
    """Whether a node only checks numbers (a guard of the capture): nobody uses it and it takes no tensors."""
    return (
        is_number(node, profile)
        and not node.users
        and bool(node.all_input_nodes)
        and all(is_number(source, profile) for source in node.all_input_nodes)
    )


def settle_checks(graph: fx.Graph, profile: Profile) -> None:
    """Moves every check to where its numbers are known, so that it keeps no tensor alive for its sake."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in [n for n in graph.nodes if is_check(n, profile)]:
        latest = max(node.all_input_nodes, key=lambda n: order[n])
        latest.append(node)


def last_uses(nodes: list[fx.Node], profile: Profile) -> dict[fx.Node, int]:
    """Index of the last node that needs each value. A number is needed through the tensors it comes from."""
    last = dict.fromkeys(nodes, -1)
    for i, node in reversed(list(enumerate(nodes))):
        use = max(last[node], i) if is_number(node, profile) else i
        for source in node.all_input_nodes:
            last[source] = max(last[source], use)
    return last


def _live_values(nodes: list[fx.Node], profile: Profile) -> Iterator[tuple[int, list[fx.Node]]]:
    """(position, values that cross, oldest first) of every gap right after a node that works on tensors."""
    last = last_uses(nodes, profile)
    live: dict[fx.Node, None] = {}
    ending: dict[int, list[fx.Node]] = {}
    for i, node in enumerate(nodes):
        for dead in ending.pop(i, ()):
            del live[dead]
        if node.op != "get_attr" and not is_number(node, profile) and last[node] > i:
            live[node] = None
            ending.setdefault(last[node], []).append(node)
        if is_work(node, profile):
            yield i + 1, list(live)


def _may_cross(node: fx.Node, profile: Profile, last_change: dict[int, int], position: int) -> bool:
    if not profile.nodes[node.name].is_tensor:
        return False
    return all(last_change.get(key, -1) < position for key in node.meta.get("storages", ()))


def _last_changes(nodes: list[fx.Node]) -> dict[int, int]:
    """Index of the last node that writes into each storage."""
    return {key: i for i, node in enumerate(nodes) for key in node.meta.get("mutates", ())}


def _linked(nodes: list[fx.Node]) -> list[int]:
    """By position: how many links run over the gap."""
    order = {node: i for i, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        for source in node.meta.get("links", ()):
            if source in order:
                changes[order[source] + 1] += 1
                changes[i + 1] -= 1
    return list(accumulate(changes))


def dependencies(nodes: list[fx.Node], profile: Profile) -> dict[str, int]:
    """Which readers of parameters each value depends on: bit i stands for the i-th node that reads any.

    A value also depends on whatever was written into its storage in place.
    """
    masks: dict[fx.Node, int] = {}
    written: dict[int, int] = {}
    readers = 0
    for node in nodes:
        mask = 0
        for source in node.all_input_nodes:
            mask |= masks[source]
            for key in source.meta.get("storages", ()):
                mask |= written.get(key, 0)
        if profile.nodes[node.name].params:
            mask |= 1 << readers
            readers += 1
        masks[node] = mask
        for key in node.meta.get("mutates", ()):
            written[key] = written.get(key, 0) | mask
    for node in nodes:
        for key in node.meta.get("storages", ()):
            masks[node] |= written.get(key, 0)
    return {node.name: mask for node, mask in masks.items()}


def _primary(
    before: fx.Node, live: list[fx.Node], profile: Profile, depends_on: dict[str, int]
) -> fx.Node | None:
    """The value a head reads: that of the node before the gap, else the youngest fitting one that crosses.

    Fitting are floating-point tensors with a batch axis that depend on a parameter. None where the choice is
    a mere gate (the inside of a squeeze-and-excitation): too little of the hidden state to learn from.
    """
    spec = {n: profile.nodes[n.name].specs[0] for n in live}
    fitting = [
        n
        for n in live
        if depends_on[n.name] and spec[n].dtype.is_floating_point and spec[n].batch_axis is not None
    ]
    if not fitting:
        return None
    chosen = before if before in fitting else fitting[-1]
    largest = max(math.prod(spec[n].shape) for n in fitting)
    return chosen if math.prod(spec[chosen].shape) * _GATE_RATIO >= largest else None
