"""The partition is exact: it equals brute force on every instance hypothesis can think of."""

from __future__ import annotations

import math
import random
import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localize.convert.balance import best_partition, fewest_parts, lowest_maximum, most_parts


class Instance:
    """A cost for every part and a size for every candidate."""

    def __init__(self, costs: dict[tuple[int, int], float], crossing: list[int]) -> None:
        self.costs, self.crossing, self.candidates = costs, crossing, len(crossing)

    def cost(self, a: int, b: int) -> float:
        return self.costs[a, b]

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


@given(st.one_of(any_costs(), with_heads()), st.integers(1, 5))
@settings(deadline=None, max_examples=400)
def test_equals_brute_force(instance: Instance, parts: int) -> None:
    found = best_partition(instance.candidates, parts, instance.cost, instance.crossing)
    possible = instance.all_cuts(parts)
    if not possible:
        assert found is None
        return
    assert found is not None
    best = min(possible, key=lambda cuts: (instance.maximum(cuts), instance.bytes(cuts)))
    assert instance.maximum(tuple(found)) == instance.maximum(best)
    assert instance.bytes(tuple(found)) == instance.bytes(best)
    assert found == sorted(found)
    assert len(found) == parts - 1


@given(any_costs(), st.integers(0, 4))
@settings(deadline=None)
def test_numbers_of_parts_equal_brute_force(instance: Instance, budget: int) -> None:
    counts = range(1, instance.candidates + 2)
    possible = [k for k in counts if instance.all_cuts(k)]
    assert most_parts(instance.candidates, instance.cost) == max(possible, default=0)
    fitting = [k for k in counts if any(instance.maximum(c) <= budget for c in instance.all_cuts(k))]
    assert fewest_parts(instance.candidates, instance.cost, budget) == (fitting[0] if fitting else None)
    maxima = [instance.maximum(c) for k in counts for c in instance.all_cuts(k)]
    assert lowest_maximum(instance.candidates, instance.cost) == min(maxima, default=math.inf)


def test_one_part_has_no_cuts() -> None:
    assert best_partition(3, 1, lambda a, b: b - a, [1, 1, 1]) == []


def test_bytes_decide_between_equals() -> None:
    # Costs 4 | 1 1 1 1: the first part is the maximum whatever the rest does, so the cheapest crossing wins.
    nodes = [4, 1, 1, 1, 1]
    assert best_partition(4, 3, lambda a, b: sum(nodes[a:b]), [9, 5, 7, 1]) == [1, 4]


def test_a_head_moves_the_cut() -> None:
    nodes, heads = [1, 1, 1, 1], [0, 3, 0, 0]
    even = best_partition(3, 2, lambda a, b: sum(nodes[a:b]), [0, 0, 0])
    moved = best_partition(3, 2, lambda a, b: sum(nodes[a:b]) + heads[b - 1], [0, 0, 0])
    assert even == [2]
    assert moved in ([1], [3])


@pytest.mark.parametrize(("candidates", "parts"), [(400, 8)])
def test_large_instances_are_quick(candidates: int, parts: int) -> None:
    draw = random.Random(0)
    sums = [0.0]
    for _ in range(candidates + 1):
        sums.append(sums[-1] + draw.random())
    start = time.process_time()
    found = best_partition(candidates, parts, lambda a, b: sums[b] - sums[a], [1] * candidates)
    assert found is not None
    assert time.process_time() - start < 2
