"""The best places to cut: min-max partition of a line into contiguous parts. No models, no graphs.

Candidates for a cut are counted from 1; 0 is the start of the line and ``candidates + 1`` its end::

    0 ───── 1 ───── 2 ───── 3 ───── 4          costs(1, 3): the part between candidates 1 and 3,
    start   └──── part ─────┘     end                       with the head that sits on candidate 3

The lowest possible maximum is found exactly. Of all partitions whose maximum is within ``SLACK`` of it, the one
chosen lets the least cross its cuts: costs are estimates, and a hundredth of one buys nothing, while a cut in the
middle of a block sends twice what one at its end does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SLACK = 0.01  # how far above the lowest possible maximum, relative to it, fewer bytes across may take a plan


class CostTable:
    """The cost of the part between any two candidates; infinite where there may be no such part.

    Args:
        table: ``(candidates + 2, candidates + 2)`` numbers; ``table[b, a]`` is the cost of the part from a to b.
            Those with ``a >= b`` do not count.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table.double().masked_fill(torch.ones_like(table, dtype=torch.bool).triu(), math.inf)

    @classmethod
    def of(cls, candidates: int, cost: Callable[[int, int], float]) -> CostTable:
        """The costs that a function of the two candidates gives."""
        edges = range(candidates + 2)
        rows = [[cost(a, b) if a < b else math.inf for a in edges] for b in edges]
        return cls(torch.tensor(rows, dtype=torch.float64, device="cpu"))

    @property
    def candidates(self) -> int:
        """How many places to cut there are."""
        return len(self.table) - 2

    def __call__(self, a: int, b: int) -> float:
        return self.table[b, a].item()

    def where(self, other: CostTable, budget: float) -> CostTable:
        """These costs; infinite where ``other`` is above ``budget``."""
        return CostTable(self.table.masked_fill(other.table > budget, math.inf))


def best_partition(
    costs: CostTable, parts: int, crossing: Sequence[float], slack: float = SLACK
) -> list[int] | None:
    """The cuts, among those with almost the lowest maximum, that least crosses.

    Of all partitions whose most expensive part costs at most ``1 + slack`` times what it has to: the lowest sum of
    ``crossing`` and, among equals, the lowest maximum. Exact for any costs, additive or not, in time O(parts ·
    candidates²).

    Args:
        costs: of the part between two candidates, its head included; not negative.
        parts: how many parts are wanted.
        crossing: the bytes that cross at candidates 1, 2, …, in this order (or what else is to be low).
        slack: how much of the balance less crossing may cost; 0 for none.

    Returns:
        The ``parts - 1`` chosen candidates (counted from 1), ascending; None where no partition is allowed.
    """
    lowest = _lowest_maximum(costs, parts)
    if lowest == math.inf:
        return None
    # Second pass. Prefixes of a path with the least sum have the least sum themselves, and among those the lowest
    # maximum: (sum, maximum) pairs may be compared step by step, which (maximum, sum) pairs may not.
    table = costs.table.masked_fill(costs.table > lowest * (1 + slack), math.inf)
    forbidden = table.isinf()
    weight = torch.tensor([0.0, *crossing, 0.0], dtype=torch.float64, device="cpu")
    total, highest = _start(costs), _start(costs)
    came_from: list[list[int]] = []
    sums, maxima = torch.empty_like(table), torch.empty_like(table)
    for _ in range(parts):
        least = sums.copy_(total.expand_as(sums)).masked_fill_(forbidden, math.inf).amin(1)
        torch.maximum(highest, table, out=maxima).masked_fill_(sums > least[:, None], math.inf)
        highest, origin = maxima.min(1)
        total = least + weight
        came_from.append(origin.tolist())
    cuts, place = [], costs.candidates + 1
    for step in reversed(came_from[1:]):
        place = step[place]
        cuts.append(place)
    return cuts[::-1]


def most_parts(costs: CostTable) -> int:
    """The largest number of parts that is allowed; 0 where not even the whole is."""
    count = -_start(costs)  # -inf: not reached
    for b in range(1, len(count)):
        count[b] = count[:b].masked_fill(costs.table[b, :b].isinf(), -math.inf).max() + 1
    return max(int(count[-1]), 0) if count[-1].isfinite() else 0


def fewest_parts(costs: CostTable, budget: float) -> int | None:
    """The smallest number of parts of which none costs more than ``budget``; None where there is none."""
    count = _start(costs)
    for b in range(1, len(count)):
        count[b] = count[:b].masked_fill(costs.table[b, :b] > budget, math.inf).min() + 1
    return int(count[-1]) if count[-1].isfinite() else None


def lowest_maximum(costs: CostTable) -> float:
    """The cost of the most expensive part when any number of parts may be used."""
    best = _start(costs)
    for b in range(1, len(best)):
        best[b] = torch.maximum(best[:b], costs.table[b, :b]).min()
    return best[-1].item()


def _lowest_maximum(costs: CostTable, parts: int) -> float:
    """The smallest possible cost of the most expensive of ``parts`` parts: the first pass."""
    best, work = _start(costs), torch.empty_like(costs.table)
    for _ in range(parts):
        best = torch.maximum(best, costs.table, out=work).amin(1)
    return best[-1].item()


def _start(costs: CostTable) -> Tensor:
    """By candidate, what has been spent before the first part: nothing at the start of the line."""
    spent = torch.full((len(costs.table),), math.inf, dtype=torch.float64, device="cpu")
    spent[0] = 0.0
    return spent
