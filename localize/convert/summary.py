"""The plan for people to read: which cuts were chosen, and what the parts between them cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import fx

from localize.convert.cuts import module_path
from localize.convert.profile import cost_of, frozen_parameters
from localize.convert.split import Cuts
from localize.convert.traced import Profile, TracedModel
from localize.heads.base import Method
from localize.spec import Boundary, Cost, PartCost, Plan, TensorSpec, indices_of

LOPSIDED = 1.5  # largest part over the mean part: worth a note

ExactHead = Callable[[TensorSpec, int, int], Cost]
"""Cost of the head that part ``number`` of ``parts`` gets on a hidden state."""


def summary(
    traced: TracedModel,
    profile: Profile,
    cuts: Cuts,
    method: Method,
    balance: str,
    logits: TensorSpec,
    head_cost: ExactHead,
) -> Plan:
    """The plan of train mode's graph."""
    nodes, frozen = list(traced.train_graph.nodes), frozen_parameters(traced)
    edges = [0, *(point.position for point in cuts.points), len(nodes)]
    stretches = [nodes[a:b] for a, b in pairwise(edges)]
    below = cuts.classifier
    representation = below.spec if below is not None and below.position > edges[-2] else None
    last = representation if representation is not None and method.splits_classifier else logits
    hidden = [*(point.spec for point in cuts.points), last]
    plan = Plan(
        model=type(traced.root).__name__,
        method=method.name,
        balance=balance,
        cuts=tuple(point.name for point in cuts.points),
        boundaries=tuple(
            Boundary(k, p.name, p.primary, p.crossing, p.spec, p.crossing_bytes)
            for k, p in enumerate(cuts.points, 1)
        ),
        parts=tuple(
            PartCost(
                k,
                *_ends(traced, stretch),
                cost_of(profile, [node.name for node in stretch], frozen),
                head_cost(spec, k, len(hidden)),
            )
            for k, (stretch, spec) in enumerate(zip(stretches, hidden, strict=True), 1)
        ),
        inputs=tuple(
            TensorSpec.of(t, profile.nodes[name].specs[0].batch_axis)
            for t, name in zip(traced.example, traced.signature.names, strict=True)
        ),
        indices=tuple(indices_of(t) for t in traced.example),
        representation=representation,
        notes=tuple(traced.notes),
    )
    return replace(plan, notes=(*plan.notes, *_remarks(plan)))


def _remarks(plan: Plan) -> list[str]:
    """What a person should know before training with this plan."""
    if plan.imbalance <= LOPSIDED:
        return []
    costs = [(part.total.of(plan.balance), part.head.of(plan.balance), part.number) for part in plan.parts]
    largest, head, number = max(costs)
    heavy = head > largest / 2
    why = f"its head alone is {head / largest:.0%} of it" if heavy else "localize inspect says what limits it"
    return [f"lopsided: part {number} has {plan.imbalance:.1f} times the mean {plan.balance}; {why}"]


def _ends(traced: TracedModel, nodes: Sequence[fx.Node]) -> tuple[str, str]:
    """The first and the last module (or node) of a stretch of the graph."""
    work = [n for n in nodes if n.op.startswith("call_") and n.meta.get("storages")]
    if not work:
        return "", ""
    named = [module_path(traced, n) or n.name for n in (work[0], work[-1])]
    return named[0], named[1]
