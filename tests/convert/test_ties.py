"""Tied parameters and where they leave to cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.convert.ties import check_ties, respect_ties
from localize.errors import CutError
from tests.convert.found import Found


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
