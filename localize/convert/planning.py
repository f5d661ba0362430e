"""From a profile and cut points to chosen cuts: what every possible part costs, and which parts may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from localize.convert.balance import best_partition, fewest_parts, lowest_maximum, most_parts
from localize.convert.liveness import dependencies
from localize.convert.traced import Profile, TracedModel
from localize.errors import CutError, problem_list
from localize.spec import Cost, CutPoint

HeadCost = Callable[[CutPoint | None], Cost]
"""Cost of the head on a cut point; of the last part's head for None."""


def plan_cuts(
    traced: TracedModel,
    profile: Profile,
    cut_points: Sequence[CutPoint],
    parts: int,
    balance: str,
    head_cost: HeadCost,
    optimizer_states: int = 2,
    training: bool = True,
) -> tuple[list[int], list[Cost], list[Cost]]:
    """The best cuts (indices into ``cut_points``) and the costs of the parts and of their heads, bottom first.

    Raises:
        CutError: the model cannot be cut into so many parts.
    """
    table = PartTable(traced, profile, cut_points, balance, head_cost, optimizer_states, training)
    crossing = [point.crossing_bytes for point in cut_points]
    cuts = best_partition(len(cut_points), parts, table.cost, crossing)
    if cuts is None:
        possible = most_parts(len(cut_points), table.cost)
        raise CutError(
            f"The model cannot be cut into {parts} parts: at most {possible} "
            f"{'is' if possible == 1 else 'are'} possible ({len(cut_points)} cut points, between layers with "
            f"parameters). Use parts={min(parts, possible)} or fewer, or a finer model."
        )
    chosen = [i - 1 for i in cuts]
    return chosen, *part_costs(traced, profile, [cut_points[i] for i in chosen], head_cost, training)


def part_costs(
    traced: TracedModel,
    profile: Profile,
    chosen: Sequence[CutPoint],
    head_cost: HeadCost,
    training: bool = True,
) -> tuple[list[Cost], list[Cost]]:
    """The costs of the parts between chosen cut points, and of their heads, bottom first."""
    names = [node.name for node in traced.graph(training).nodes]
    edges = [0, *(point.position for point in chosen), len(names)]
    return [profile.cost(names[a:b]) for a, b in pairwise(edges)], [head_cost(p) for p in (*chosen, None)]


def parts_for_budget(
    traced: TracedModel,
    profile: Profile,
    cut_points: Sequence[CutPoint],
    budget_bytes: float,
    head_cost: HeadCost,
    balance: str = "memory",
    optimizer_states: int = 2,
    training: bool = True,
) -> int:
    """The smallest number of parts of which each fits ``budget_bytes``, its head included.

    Raises:
        CutError: no number of parts does; the message says how low one can get.
    """
    table = PartTable(traced, profile, cut_points, balance, head_cost, optimizer_states, training)
    parts = fewest_parts(len(cut_points), table.cost, budget_bytes)
    if parts is None:
        lowest = lowest_maximum(len(cut_points), table.cost)
        least = fewest_parts(len(cut_points), table.cost, lowest)
        raise CutError(
            f"No number of parts fits memory_budget_bytes={budget_bytes:,.0f}: the largest part needs at "
            f"least {lowest:,.0f} bytes (with parts={least}). Raise the budget, lower the batch size, or use "
            "a method with smaller heads."
        )
    return parts


@dataclass
class PartTable:
    """The balanced quantity of every possible part, without adding it up anew for each.

    Between two neighbouring candidates lies a *segment*. A part's cost is the sum over its segments, less
    what two of them share (a tied parameter, a storage saved twice), plus its head.
    """

    traced: TracedModel
    profile: Profile
    cut_points: Sequence[CutPoint]
    balance: str
    head_cost: HeadCost
    optimizer_states: int = 2
    training: bool = True
    _rows: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        names = [node.name for node in self.traced.graph(self.training).nodes]
        edges = [0, *(point.position for point in self.cut_points), len(names)]
        segments = [names[a:b] for a, b in pairwise(edges)]
        sums = [0.0]
        for segment in segments:
            sums.append(sums[-1] + self._value(self.profile.cost(segment)))
        heads = [0.0, *(self._value(self.head_cost(point)) for point in (*self.cut_points, None))]
        overlaps = self._overlaps(segments)
        self._rows = []
        for a in range(len(sums)):
            saving = [0.0] * (len(sums) + 1)
            for earlier, later, value in overlaps:
                if earlier >= a:
                    saving[later + 1] += value
            row, shared = [math.inf] * len(sums), 0.0
            for b in range(a + 1, len(sums)):
                shared += saving[b]
                row[b] = sums[b] - sums[a] - shared + heads[b]
            self._rows.append(row)
        self._forbid_untrained()

    def cost(self, a: int, b: int) -> float:
        """The balanced quantity of the part from candidate a to candidate b, infinite where it may not be."""
        return self._rows[a][b]

    def _value(self, cost: Cost) -> float:
        if self.balance == "time" and cost.time_ms is None and not cost.flops:
            return 0.0  # inputs and heads nobody measured
        return cost.of(self.balance, self.optimizer_states)

    def _overlaps(self, segments: Sequence[Sequence[str]]) -> list[tuple[int, int, float]]:
        """(segment, next segment with the same parameter or storage, what a part with both saves)."""
        seen: dict[str | int, int] = {}
        found: list[tuple[int, int, float]] = []
        if self.balance in ("flops", "time"):
            return found
        for i, segment in enumerate(segments):
            items: dict[str | int, Cost] = {}
            for name in segment:
                node = self.profile.nodes[name]
                items.update((path, Cost(param_bytes=nbytes)) for path, nbytes in node.params)
                items.update((key, Cost(saved_bytes=nbytes)) for key, nbytes in node.saved)
            for item, cost in items.items():
                if item in seen:
                    found.append((seen[item], i, self._value(cost)))
                seen[item] = i
        return found

    def _forbid_untrained(self) -> None:
        """A part may not hold parameters that its head cannot reach, unless nothing later in the model can.

        At a cut between two branches the head reads one branch and would leave the other untrained.
        """
        nodes = list(self.traced.graph(self.training).nodes)
        depends_on = dependencies(nodes, self.profile)
        readers = [i for i, node in enumerate(nodes) if self.profile.nodes[node.name].params]
        if not readers:
            return
        trainable = depends_on[nodes[readers[-1]].name]
        below = [
            sum(1 << k for k, i in enumerate(readers) if i < point.position) for point in self.cut_points
        ]
        for b, point in enumerate(self.cut_points, 1):
            missed = below[b - 1] & trainable & ~depends_on[point.primary]
            for a in range(b):
                if missed & ~(below[a - 1] if a else 0):
                    self._rows[a][b] = math.inf


@dataclass(frozen=True)
class TiedParameter:
    """A parameter that several nodes read, and where in the graph: at ``first``, …, ``last``."""

    name: str
    first: int
    last: int

    def is_cut_by(self, point: CutPoint) -> bool:
        return self.first < point.position <= self.last


def tied_parameters(traced: TracedModel, profile: Profile, training: bool = True) -> list[TiedParameter]:
    """All parameters that more than one node reads."""
    spans: dict[str, list[int]] = {}
    for i, node in enumerate(traced.graph(training).nodes):
        for name, _ in profile.nodes[node.name].params:
            spans.setdefault(name, []).append(i)
    return [TiedParameter(name, found[0], found[-1]) for name, found in spans.items() if len(found) > 1]


def respect_ties(
    traced: TracedModel,
    profiles: dict[bool, Profile],
    cuts: dict[bool, list[CutPoint]],
    parts: int | None = None,
) -> dict[bool, list[CutPoint]]:
    """The cut points, of both modes, that keep all readers of every tied parameter in one part.

    Raises:
        CutError: so few remain that ``parts`` parts are impossible; the message names the parameters.
    """
    ties = {mode: tied_parameters(traced, profiles[mode], mode) for mode in cuts}
    broken = {p.name: tie.name for mode in cuts for p in cuts[mode] for tie in ties[mode] if tie.is_cut_by(p)}
    kept = {mode: [p for p in cuts[mode] if p.name not in broken] for mode in cuts}
    if parts is not None and len(kept[True]) + 1 < parts <= len(cuts[True]) + 1:
        listed = ", ".join(sorted(set(broken.values())))
        raise CutError(
            f"{parts} parts are impossible while all readers of a shared parameter stay in one part: "
            f"{len(kept[True])} of {len(cuts[True])} cut points remain (shared: {listed}). Use "
            f"parts={len(kept[True]) + 1} or fewer, or tied='untie' to give each part a copy of its own."
        )
    return kept


def check_ties(
    traced: TracedModel, profile: Profile, chosen: Sequence[CutPoint], training: bool = True
) -> None:
    """Raises ``CutError`` where cuts that a person chose part the readers of a tied parameter; lists all."""
    ties = tied_parameters(traced, profile, training)
    problems = [
        f"the cut after {point.name!r} would part the readers of {tie.name!r}."
        for point in chosen
        for tie in ties
        if tie.is_cut_by(point)
    ]
    if problems:
        raise CutError(
            f"{problem_list('Shared parameters', problems)}\nMove the cut, or use tied='untie' to give each "
            "part a copy of its own."
        )
