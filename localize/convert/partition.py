"""The best of all ways to cut a model: what every possible part costs, and which parts may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from localize.convert.balance import CostOf, best_partition, fewest_parts, lowest_maximum, most_parts
from localize.convert.liveness import dependencies
from localize.convert.traced import Profile, TracedModel
from localize.errors import CutError
from localize.spec import Cost, CutPoint

HeadCost = Callable[[CutPoint | None, bool], Cost]
"""Cost of the head on a cut point, on the last part for None; and whether the part below it is the first."""


def best_cuts(cut_points: Sequence[CutPoint], parts: int, cost: CostOf) -> list[int]:
    """The indices of the best cuts, ascending.

    Raises:
        CutError: the model cannot be cut into so many parts.
    """
    cuts = best_partition(len(cut_points), parts, cost, [point.crossing_bytes for point in cut_points])
    if cuts is None:
        possible = most_parts(len(cut_points), cost)
        raise CutError(
            f"The model cannot be cut into {parts} parts: at most {possible} "
            f"{'is' if possible == 1 else 'are'} possible ({len(cut_points)} cut points, between layers with "
            f"parameters). Use parts={min(parts, possible)} or fewer, or a finer model."
        )
    return [i - 1 for i in cuts]


def parts_for_budget(memory: PartTable, budget_bytes: float) -> int:
    """The smallest number of parts of which each fits ``budget_bytes``, its head included.

    Raises:
        CutError: no number of parts does; the message says how low one can get.
    """
    candidates = len(memory.cut_points)
    parts = fewest_parts(candidates, memory.cost, budget_bytes)
    if parts is None:
        lowest = lowest_maximum(candidates, memory.cost)
        least = fewest_parts(candidates, memory.cost, lowest)
        raise CutError(
            f"No number of parts fits memory_budget_bytes={budget_bytes:,.0f}: the largest part needs at "
            f"least {lowest:,.0f} bytes (with parts={least}). Raise the budget, lower the batch size, or use "
            "a method with smaller heads."
        )
    return parts


def cuts_for_budget(memory: PartTable, balanced: PartTable, budget_bytes: float) -> list[int]:
    """The best cuts, for ``balanced``, into as few parts as fit ``budget_bytes`` each.

    Raises:
        CutError: no number of parts fits.
    """

    def cost(a: int, b: int) -> float:
        return balanced.cost(a, b) if memory.cost(a, b) <= budget_bytes else math.inf

    return best_cuts(balanced.cut_points, parts_for_budget(memory, budget_bytes), cost)


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
    _rows: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        names = [node.name for node in self.traced.train_graph.nodes]
        edges = [0, *(point.position for point in self.cut_points), len(names)]
        segments = [names[a:b] for a, b in pairwise(edges)]
        sums = [0.0]
        for segment in segments:
            sums.append(sums[-1] + self._value(self.profile.cost(segment)))
        heads = {
            first: [0.0, *(self._value(self.head_cost(point, first)) for point in (*self.cut_points, None))]
            for first in (True, False)
        }
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
                row[b] = sums[b] - sums[a] - shared + heads[a == 0][b]
            self._rows.append(row)
        self._forbid_untrained()

    def cost(self, a: int, b: int) -> float:
        """The balanced quantity of the part from candidate a to candidate b, infinite where it may not be."""
        return self._rows[a][b]

    def _value(self, cost: Cost) -> float:
        if self.balance == "time" and cost.time_ms is None and not cost.flops:
            return 0.0  # stretches without nodes, parts without heads
        return cost.of(self.balance)

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
        nodes = list(self.traced.train_graph.nodes)
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
