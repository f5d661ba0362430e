"""Tied parameters and where they leave to cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import load, to_local
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


class LanguageModel(nn.Module):
    """The last layer reads the embedding's weight under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(11, 8), nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.body:
            h = h + torch.tanh(layer(h))
        return self.head(h)


IDS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))


def test_colocated_by_default_and_untying_is_advised() -> None:
    with pytest.raises(CutError, match=r"embed\.weight.*tied='untie'"):
        to_local(LanguageModel(), IDS, method="early_exit", parts=3, task="causal_lm")


def test_untied_copies_are_the_models_own() -> None:
    """Model and parts go on being one: nothing diverges, because there is no second set of weights anywhere."""
    model = LanguageModel()
    before = model(IDS)
    local = to_local(model, IDS, method="early_exit", parts=3, task="causal_lm", tied="untie")
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model(IDS), before)
    assert any("untied: head.weight was embed.weight" in note for note in local.plan.notes)
    optimizers = local.optimizers(lambda p: torch.optim.SGD(p, 0.1))
    for _ in range(3):
        local.train_step(IDS, IDS, optimizers)
    assert not torch.equal(model.head.weight, model.embed.weight)  # trained apart, which the note says
    assert torch.equal(local.to_standard()(IDS), local(IDS))
    parameters = {id(p) for p in model.parameters()}
    assert {id(p) for part in local.parts for p in part.parameters()} == parameters


def test_untied_models_are_saved_and_loaded(tmp_path: Path) -> None:
    local = to_local(LanguageModel(), IDS, method="early_exit", parts=3, task="causal_lm", tied="untie")
    local.train_step(IDS, IDS, local.optimizers(lambda p: torch.optim.SGD(p, 0.1)))
    local.save(tmp_path / "saved")
    again = load(tmp_path / "saved", LanguageModel())
    assert torch.equal(again(IDS), local(IDS))
    assert again.to_standard().head.weight is not again.to_standard().embed.weight


def test_a_conversion_that_fails_leaves_the_ties() -> None:
    model = LanguageModel()
    with pytest.raises(CutError):
        to_local(model, IDS, method="early_exit", parts=40, task="causal_lm", tied="untie")
    assert model.head.weight is model.embed.weight


def test_a_module_used_twice_stays_in_one_part() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(6, 6), shared, nn.ReLU(), shared, nn.Linear(6, 3))
    local = to_local(model, torch.randn(4, 6), method="bp", parts=2, tied="untie")
    assert model[1] is model[3]
    assert sum("3.weight" in n or "1.weight" in n for part in local.parts for n, _ in part.named_parameters()) == 1
