"""The best places to cut: exact min-max partition of a line into contiguous parts. No torch, no graphs.

Candidates for a cut are counted from 1; 0 is the start of the line and ``candidates + 1`` its end::

    0 ───── 1 ───── 2 ───── 3 ───── 4          cost(1, 3): the part between candidates 1 and 3,
    start   └──── part ─────┘     end                      with the head that sits on candidate 3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

CostOf = Callable[[int, int], float]
"""Cost of the part between two candidates; ``math.inf`` where there may be no such part."""


def best_partition(
    candidates: int, parts: int, cost: CostOf, crossing_bytes: Sequence[float]
) -> list[int] | None:
    """The cuts whose most expensive part is cheapest and, among those, with the fewest bytes across.

    Exact for any cost, additive or not: O(parts · candidates²).

    Args:
        candidates: how many places there are.
        parts: how many parts are wanted.
        cost: of the part between two candidates, its head included.
        crossing_bytes: of candidates 1, 2, …, in this order.

    Returns:
        The ``parts - 1`` chosen candidates (counted from 1), ascending; None where no partition is allowed.
    """
    table = cost_table(candidates, cost)
    end = candidates + 1
    lowest = _lowest_maximum(table, parts)
    if lowest == math.inf:
        return None
    # Second pass: among all partitions that stay at or below that maximum, the fewest bytes. One pass over
    # (maximum, bytes) pairs would be wrong: a larger maximum below costs nothing if a part above is larger.
    weight = [0.0, *crossing_bytes, 0.0]
    least = [0.0] + [math.inf] * end
    came_from: list[list[int]] = []
    for _ in range(parts):
        following, origin = [math.inf] * (end + 1), [0] * (end + 1)
        for b in range(1, end + 1):
            column = table[b]
            for a in range(b):
                if column[a] <= lowest and least[a] + weight[b] < following[b]:
                    following[b], origin[b] = least[a] + weight[b], a
        least = following
        came_from.append(origin)
    cuts, place = [], end
    for origin in reversed(came_from[1:]):
        place = origin[place]
        cuts.append(place)
    return cuts[::-1]


def cost_table(candidates: int, cost: CostOf) -> list[list[float]]:
    """``table[b][a]`` is the cost of the part from a to b, for all a < b."""
    return [[cost(a, b) for a in range(b)] for b in range(candidates + 2)]


def most_parts(candidates: int, cost: CostOf) -> int:
    """The largest number of parts that is allowed; 0 where not even the whole is."""
    count = [0] + [-1] * (candidates + 1)
    for b, column in enumerate(cost_table(candidates, cost)):
        for a, value in enumerate(column):
            if value < math.inf and count[a] >= 0:
                count[b] = max(count[b], count[a] + 1)
    return max(count[-1], 0)


def fewest_parts(candidates: int, cost: CostOf, budget: float) -> int | None:
    """The smallest number of parts of which none costs more than ``budget``; None where there is none."""
    count = [0.0] + [math.inf] * (candidates + 1)
    for b, column in enumerate(cost_table(candidates, cost)):
        for a, value in enumerate(column):
            if value <= budget:
                count[b] = min(count[b], count[a] + 1)
    return int(count[-1]) if count[-1] < math.inf else None


def lowest_maximum(candidates: int, cost: CostOf) -> float:
    """The cost of the most expensive part when any number of parts may be used."""
    best = [0.0] + [math.inf] * (candidates + 1)
    for b, column in enumerate(cost_table(candidates, cost)):
        if b:
            best[b] = min(map(max, best, column))
    return best[-1]


def _lowest_maximum(table: list[list[float]], parts: int) -> float:
    """The smallest possible cost of the most expensive of ``parts`` parts: the first pass."""
    best = [-math.inf] + [math.inf] * (len(table) - 1)
    for _ in range(parts):
        best = [math.inf] + [min(map(max, best, column)) for column in table[1:]]
    return best[-1]
