"""What every possible part costs, and which parts there may be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from localize.convert.partition import best_cuts, cuts_for_budget, parts_for_budget
from localize.errors import CutError
from localize.spec import BALANCES, Cost, CutPoint
from tests import zoo
from tests.convert.found import Found, chain, no_head


@pytest.mark.parametrize("balance", [b for b in BALANCES if b != "time"])
@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_the_table_of_parts_is_exact(case: zoo.Case, balance: str) -> None:
    found = Found(case.build(), case.inputs())
    table = found.table(balance, no_head)
    names = [node.name for node in found.traced.train_graph.nodes]
    edges = [0, *(p.position for p in found.best), len(names)]
    for a in range(len(edges)):
        for b in range(a + 1, len(edges)):
            if table.cost(a, b) < float("inf"):
                expected = found.profiles[True].cost(names[edges[a] : edges[b]]).of(balance)
                assert table.cost(a, b) == pytest.approx(expected)


def test_a_plan_counts_heads() -> None:
    found = chain(*(nn.Linear(4, 4) for _ in range(4)))

    def head(point: CutPoint | None, first: bool) -> Cost:
        return Cost(flops=1000.0 if point is not None and point.name == "1" else 1.0)

    chosen = best_cuts(found.best, 2, found.table("flops", head).cost)
    assert found.best[chosen[0]].name in ("0", "2")


def test_the_first_part_may_have_another_head() -> None:
    found = chain(*(nn.Linear(4, 4, bias=False) for _ in range(3)))

    def head(point: CutPoint | None, first: bool) -> Cost:
        return Cost(flops=1000.0 * first)

    layer = 2 * 2 * 16
    table = found.table("flops", head)
    assert table.cost(0, 1) == layer + 1000
    assert table.cost(1, 3) == 2 * layer
    assert table.cost(0, 3) == 3 * layer + 1000


def test_every_parameter_learns_from_some_head() -> None:
    """Two branches that meet late: a head on the second would leave the first untrained."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.right = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.top = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            left = self.left(x)
            return self.top(left + self.right(x))

    found = Found(Towers(), torch.randn(2, 4))
    index = {point.name: i + 1 for i, point in enumerate(found.best)}
    table = found.table("flops", no_head)
    assert table.cost(0, index["right.0"]) == float("inf")
    assert table.cost(index["left.0"], index["right.0"]) == float("inf")
    assert table.cost(index["left"], index["right.0"]) < float("inf")
    chosen = best_cuts(found.best, 2, table.cost)
    assert found.best[chosen[0]].name in ("left.0", "left", "add")


def test_too_many_parts() -> None:
    found = chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(CutError, match=r"into 9 parts: at most 3 are possible .*parts=3"):
        best_cuts(found.best, 9, found.table("flops", no_head).cost)


def test_parts_for_a_budget() -> None:
    found = chain(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    table, layer = found.table("params", no_head), 4 * 4 * 4
    assert parts_for_budget(table, 4 * layer) == 1
    assert parts_for_budget(table, 3 * layer) == 2
    assert parts_for_budget(table, layer) == 4
    with pytest.raises(CutError, match=r"at least 64 bytes \(with parts=4\)"):
        parts_for_budget(table, layer - 1)


def test_balanced_cuts_keep_to_the_budget() -> None:
    """Small layers with many FLOPs, then one large weight: balanced by FLOPs, a part once broke the budget."""
    found = chain(nn.Linear(4, 40), nn.Linear(40, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    memory = found.table("memory", no_head)
    for balance in ("flops", "activations", "params"):
        for budget in (memory.cost(0, len(found.best) + 1) / share for share in (1, 1.2, 1.5, 1.9)):
            cuts = cuts_for_budget(memory, found.table(balance, no_head), budget)
            edges = [0, *(i + 1 for i in cuts), len(found.best) + 1]
            assert max(memory.cost(a, b) for a, b in pairwise(edges)) <= budget
