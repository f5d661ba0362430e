"""What every possible part costs, and which parts there may be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.convert.planning import PartTable, check_ties, parts_for_budget, plan_cuts, respect_ties
from localize.errors import CutError
from localize.spec import BALANCES, Cost, CutPoint
from tests import zoo
from tests.convert.found import Found, chain, no_head


@pytest.mark.parametrize("balance", [b for b in BALANCES if b != "time"])
@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_the_table_of_parts_is_exact(case: zoo.Case, balance: str) -> None:
    found = Found(case.build(), case.inputs())
    table = PartTable(found.traced, found.profiles[True], found.best, balance, no_head)
    names = [node.name for node in found.traced.train_graph.nodes]
    edges = [0, *(p.position for p in found.best), len(names)]
    for a in range(len(edges)):
        for b in range(a + 1, len(edges)):
            if table.cost(a, b) < float("inf"):
                expected = found.profiles[True].cost(names[edges[a] : edges[b]]).of(balance)
                assert table.cost(a, b) == pytest.approx(expected)


def test_a_plan_counts_heads() -> None:
    found = chain(*(nn.Linear(4, 4) for _ in range(4)))

    def head(point: CutPoint | None) -> Cost:
        return Cost(flops=1000.0 if point is not None and point.name == "1" else 1.0)

    chosen, parts, heads = plan_cuts(found.traced, found.profiles[True], found.best, 2, "flops", head)
    assert found.best[chosen[0]].name in ("0", "2")
    assert [h.flops for h in heads] == [1.0, 1.0]
    assert sum(p.flops for p in parts) == 4 * 2 * 2 * 16


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
    train = found.profiles[True]
    index = {point.name: i + 1 for i, point in enumerate(found.best)}
    table = PartTable(found.traced, train, found.best, "flops", no_head)
    assert table.cost(0, index["right.0"]) == float("inf")
    assert table.cost(index["left.0"], index["right.0"]) == float("inf")
    assert table.cost(index["left"], index["right.0"]) < float("inf")
    chosen, _, _ = plan_cuts(found.traced, train, found.best, 2, "flops", no_head)
    assert found.best[chosen[0]].name in ("left.0", "left", "add")


def test_too_many_parts() -> None:
    found = chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(CutError, match=r"into 9 parts: at most 3 are possible .*parts=3"):
        plan_cuts(found.traced, found.profiles[True], found.best, 9, "flops", no_head)


def test_parts_for_a_budget() -> None:
    found = chain(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    train, layer = found.profiles[True], 4 * 4 * 4
    arguments = (found.traced, train, found.best)
    assert parts_for_budget(*arguments, 4 * layer, no_head, balance="params") == 1
    assert parts_for_budget(*arguments, 3 * layer, no_head, balance="params") == 2
    assert parts_for_budget(*arguments, layer, no_head, balance="params") == 4
    with pytest.raises(CutError, match=r"at least 64 bytes \(with parts=4\)"):
        parts_for_budget(*arguments, layer - 1, no_head, balance="params")


# ------------------------------------------------------------------------------------------ tied parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.embed = nn.Embedding(7, 4), nn.Linear(4, 4, bias=False)
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.embed(self.first(x)))
        return self.last(F.linear(h, self.embed.weight))


@pytest.fixture(name="tied")
def _tied() -> Found:
    return Found(Tied(), torch.zeros(2, 3, dtype=torch.int64))


def test_readers_of_a_tied_parameter_stay_together(tied: Found) -> None:
    kept = respect_ties(tied.traced, tied.profiles, tied.cuts)
    assert tied.names(tied.best) == ["first", "embed", "middle", "linear"]
    assert tied.names(kept[True]) == tied.names(kept[False]) == ["first", "linear"]


def test_too_many_parts_for_tied_parameters(tied: Found) -> None:
    with pytest.raises(CutError, match=r"4 parts are impossible .*2 of 4 cut points.*embed.weight.*parts=3"):
        respect_ties(tied.traced, tied.profiles, tied.cuts, parts=4)


def test_chosen_cuts_may_not_part_tied_parameters(tied: Found) -> None:
    check_ties(tied.traced, tied.profiles[True], [tied.at("first")])
    with pytest.raises(CutError, match=r"'middle'.*'embed.weight'"):
        check_ties(tied.traced, tied.profiles[True], [tied.at("first"), tied.at("middle")])
