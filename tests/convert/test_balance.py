"""The partition equals brute force on every instance hypothesis can think of.

What is guaranteed, and tested to the last bit: of all partitions whose maximum is at most ``1 + slack`` times the
lowest possible one, the chosen one has the fewest bytes across, and of those with as few bytes the lowest maximum.
"""

from __future__ import annotations

import math
import time
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localize.convert.balance import (
    SLACK,
    CostTable,
    best_partition,
    fewest_parts,
    lowest_maximum,
    most_parts,
)


class Instance:
    """A cost for every part and a size for every candidate."""

    def __init__(self, costs: dict[tuple[int, int], float], crossing: list[int]) -> None:
        self.costs, self.crossing, self.candidates = costs, crossing, len(crossing)
        self.table = CostTable.of(self.candidates, lambda a, b: costs[a, b])

    def maximum(self, cuts: tuple[int, ...]) -> float:
        return max(self.costs[pair] for pair in pairwise((0, *cuts, self.candidates + 1)))

    def bytes(self, cuts: tuple[int, ...]) -> int:
        return sum(self.crossing[c - 1] for c in cuts)

    def all_cuts(self, parts: int) -> list[tuple[int, ...]]:
        cuts = combinations(range(1, self.candidates + 1), parts - 1)
        return [c for c in cuts if self.maximum(c) < math.inf]

    def __repr__(self) -> str:
        return f"{self.costs} {self.crossing}"


def pairs(candidates: int) -> list[tuple[int, int]]:
    return list(combinations(range(candidates + 2), 2))


@st.composite
def any_costs(draw: st.DrawFn) -> Instance:
    """Costs that follow no rule, a few parts forbidden; small numbers make many ties."""
    candidates = draw(st.integers(0, 6))
    values = st.one_of(st.integers(0, 4), st.just(math.inf))
    costs = {pair: draw(values) for pair in pairs(candidates)}
    return Instance(costs, draw(st.lists(st.integers(0, 3), min_size=candidates, max_size=candidates)))


@st.composite
def with_heads(draw: st.DrawFn) -> Instance:
    """Additive parts with a head on the upper cut: what balancing by FLOPs looks like."""
    candidates = draw(st.integers(0, 7))
    numbers = st.lists(st.floats(0, 100), min_size=candidates + 1, max_size=candidates + 1)
    nodes, heads = draw(numbers), draw(numbers)
    costs = {(a, b): sum(nodes[a:b]) + heads[b - 1] for a, b in pairs(candidates)}
    return Instance(costs, draw(st.lists(st.integers(0, 3), min_size=candidates, max_size=candidates)))


@given(st.one_of(any_costs(), with_heads()), st.integers(1, 5), st.sampled_from([0, SLACK, 0.3]))
@settings(deadline=None, max_examples=400)
def test_equals_brute_force(instance: Instance, parts: int, slack: float) -> None:
    found = best_partition(instance.table, parts, instance.crossing, slack)
    possible = instance.all_cuts(parts)
    if not possible:
        assert found is None
        return
    assert found is not None
    limit = min(map(instance.maximum, possible)) * (1 + slack)
    near = [cuts for cuts in possible if instance.maximum(cuts) <= limit]
    best = min(near, key=lambda cuts: (instance.bytes(cuts), instance.maximum(cuts)))
    assert tuple(found) in near
    assert instance.bytes(tuple(found)) == instance.bytes(best)
    assert instance.maximum(tuple(found)) == instance.maximum(best)
    assert found == sorted(found)
    assert len(found) == parts - 1


@given(st.one_of(any_costs(), with_heads()), st.integers(1, 5))
@settings(deadline=None)
def test_the_default_is_within_a_hundredth_of_the_lowest_maximum(instance: Instance, parts: int) -> None:
    assert SLACK == 0.01
    found = best_partition(instance.table, parts, instance.crossing)
    if found is not None:
        assert instance.maximum(tuple(found)) <= 1.01 * min(map(instance.maximum, instance.all_cuts(parts)))


@given(any_costs(), st.integers(0, 4))
@settings(deadline=None)
def test_numbers_of_parts_equal_brute_force(instance: Instance, budget: int) -> None:
    counts = range(1, instance.candidates + 2)
    possible = [k for k in counts if instance.all_cuts(k)]
    assert most_parts(instance.table) == max(possible, default=0)
    fitting = [k for k in counts if any(instance.maximum(c) <= budget for c in instance.all_cuts(k))]
    assert fewest_parts(instance.table, budget) == (fitting[0] if fitting else None)
    maxima = [instance.maximum(c) for k in counts for c in instance.all_cuts(k)]
    assert lowest_maximum(instance.table) == min(maxima, default=math.inf)


def additive(nodes: list[float], heads: list[float] | None = None) -> CostTable:
    """Parts that cost what their nodes do, and the head on their upper end."""
    above = heads or [0.0] * len(nodes)
    return CostTable.of(len(nodes) - 1, lambda a, b: sum(nodes[a:b]) + above[b - 1])


def test_one_part_has_no_cuts() -> None:
    assert best_partition(additive([1, 1, 1, 1]), 1, [1, 1, 1]) == []


def test_bytes_decide_between_equals() -> None:
    # Costs 4 | 1 1 1 1: the first part is the maximum whatever the rest does, so the cheapest crossing wins.
    assert best_partition(additive([4, 1, 1, 1, 1]), 3, [9, 5, 7, 1]) == [1, 4]


def test_a_hundredth_of_the_balance_is_given_for_fewer_bytes() -> None:
    # At the second place the parts cost 100 and 100, at the third 101 and 99, at the first 98 and 102.
    nodes = [98.0, 2.0, 1.0, 99.0]
    assert best_partition(additive(nodes), 2, [1, 2, 1], slack=0) == [2]
    assert best_partition(additive(nodes), 2, [1, 2, 1]) == [3]
    assert best_partition(additive(nodes), 2, [1, 2, 2]) == [2]
    assert best_partition(additive(nodes), 2, [1, 2, 2], slack=0.02) == [1]


def test_a_head_moves_the_cut() -> None:
    even = best_partition(additive([1, 1, 1, 1]), 2, [0, 0, 0])
    moved = best_partition(additive([1, 1, 1, 1], [0, 3, 0, 0]), 2, [0, 0, 0])
    assert even == [2]
    assert moved in ([1], [3])


@pytest.mark.parametrize("slack", [0, SLACK])
def test_large_instances_are_quick(slack: float) -> None:
    candidates, parts = 1500, 16
    draw = torch.Generator().manual_seed(0)
    sums = torch.rand(candidates + 2, generator=draw, dtype=torch.float64).cumsum(0)
    crossing = torch.randint(1, 5, (candidates,), generator=draw).tolist()
    start = time.process_time()
    found = best_partition(CostTable(sums[:, None] - sums), parts, crossing, slack)
    assert found is not None
    assert time.process_time() - start < 4  # 0.3 when nothing else runs
