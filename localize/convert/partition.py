"""The best of all ways to cut a model: what every possible part costs, and which parts may be."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from localize.convert.balance import CostTable, best_partition, fewest_parts, lowest_maximum, most_parts
from localize.convert.liveness import dependencies
from localize.convert.profile import cost_of, frozen_parameters, parameter_cost
from localize.convert.traced import Profile, TracedModel
from localize.errors import CutError
from localize.spec import Cost, CutPoint

HeadCost = Callable[[CutPoint | None, bool], Cost]
"""Cost of the head on a cut point, on the last part for None; and whether the part below it is the first."""


def best_cuts(cut_points: Sequence[CutPoint], parts: int, costs: CostTable) -> list[int]:
    """The indices of the best cuts, ascending.

    Raises:
        CutError: the model cannot be cut into so many parts.
    """
    cuts = best_partition(costs, parts, [point.crossing_bytes for point in cut_points])
    if cuts is None:
        possible = most_parts(costs)
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
    parts = fewest_parts(memory.cost, budget_bytes)
    if parts is None:
        lowest = lowest_maximum(memory.cost)
        least = fewest_parts(memory.cost, lowest)
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
    costs = balanced.cost.where(memory.cost, budget_bytes)
    return best_cuts(balanced.cut_points, parts_for_budget(memory, budget_bytes), costs)


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
    heads_below: bool = True  # parts below the last have heads, which must reach all that they train
    cost: CostTable = field(init=False)  # of the part from candidate a to candidate b: ``cost(a, b)``

    def __post_init__(self) -> None:
        nodes = [node.name for node in self.traced.train_graph.nodes]
        segments = [nodes[a:b] for a, b in pairwise([0, *self._positions, len(nodes)])]
        frozen = frozen_parameters(self.traced)
        values = [self._value(cost_of(self.profile, segment, frozen)) for segment in segments]
        sums = torch.tensor([0.0, *values], dtype=torch.float64, device="cpu").cumsum(0)
        table = sums[:, None] - sums - self._shared(segments, frozen)
        for first, parts in ((True, table[:, :1]), (False, table[:, 1:])):
            heads = [0.0, *(self._value(self.head_cost(point, first)) for point in (*self.cut_points, None))]
            parts += torch.tensor(heads, dtype=torch.float64, device="cpu")[:, None]
        if self.heads_below:
            self._forbid_untrained(table)
        self.cost = CostTable(table)

    @property
    def _positions(self) -> list[int]:
        return [point.position for point in self.cut_points]

    def _value(self, cost: Cost) -> float:
        if self.balance == "time" and cost.forward_ms is None and not cost.flops:
            return 0.0  # stretches without nodes, parts without heads
        return cost.of(self.balance)

    def _shared(self, segments: Sequence[Sequence[str]], frozen: Set[str]) -> Tensor:
        """``[b, a]``: what the segments of the part from a to b count more than once."""
        found = torch.zeros(len(segments) + 1, len(segments) + 1, dtype=torch.float64, device="cpu")
        if self.balance in ("flops", "time"):
            return found
        seen: dict[str | int, int] = {}  # parameter or storage → the last segment with it
        for i, segment in enumerate(segments):
            items: dict[str | int, Cost] = {}
            for name in segment:
                node = self.profile.nodes[name]
                items.update((path, parameter_cost(path, nbytes, frozen)) for path, nbytes in node.params)
                items.update((key, Cost(saved_bytes=nbytes)) for key, nbytes in node.saved)
            for item in items.keys() & seen.keys():
                found[i + 1, seen[item]] += self._value(items[item])
            seen.update(dict.fromkeys(items, i))
        return found.cumsum(0).flip(1).cumsum(1).flip(1)  # of all pairs of segments from a on and below b

    def _forbid_untrained(self, table: Tensor) -> None:
        """A part may not hold parameters that its head cannot reach, unless nothing later in the model can.

        At a cut between two branches the head reads one branch and would leave the other untrained.
        """
        nodes = list(self.traced.train_graph.nodes)
        depends_on = dependencies(nodes, self.profile)
        readers = [i for i, node in enumerate(nodes) if self.profile.nodes[node.name].params]
        if not readers:
            return
        trainable = depends_on[nodes[readers[-1]].name]
        below = [bisect_left(readers, position) for position in (0, *self._positions)]
        for b, point in enumerate(self.cut_points, 1):
            missed = trainable & ~depends_on[point.primary] & ((1 << below[b]) - 1)
            # Parts from a on miss some of them where the highest is not below a.
            table[b, : bisect_left(below, missed.bit_length())] = math.inf
