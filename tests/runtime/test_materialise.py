"""Models that begin on the meta device: the values come where they are wanted, the same on any number of ranks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize import PlacementError, to_local
from localize.hollow import replace_by
from localize.runtime.materialise import materialise
from localize.weights import named_tensors, weights_of
from tests.runtime import helpers
from tests.runtime.cases_materialise import WIDTH, Plain, saved
from tests.runtime.several import ROOT, Several

CASES = "tests.runtime.cases_materialise:"


# ------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(
    ("model", "method", "ranks"),
    [("Tower", "early_exit", 2), ("Plain", "al", 3), ("Plain", "bp", 2), ("Tower", "lct", 3), ("Sequence", "scpl", 2)],
)
def test_ranks_that_read_their_own_weights_are_one_process(
    several: Several, tmp_path: Path, model: str, method: str, ranks: int
) -> None:
    """And one with weights read as a whole: weights, buffers, optimizer state, history, scores before and after."""
    parts = 2 if model == "Sequence" else 3
    saved(tmp_path / "artefact", model, method, parts)
    where: dict[str, Any] = {"model": model, "method": method, "parts": parts, "folder": str(tmp_path)}
    found = several.results(f"{CASES}same_as_sequential", ranks, origin="file", **where)
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize(
    ("model", "method", "ranks"),
    [("Plain", "scpl", 2), ("Plain", "nwise", 3), ("Plain", "al", 2), ("Sequence", "lct", 2)],
)
def test_ranks_that_draw_their_own_weights_are_one_process(
    several: Several, tmp_path: Path, model: str, method: str, ranks: int
) -> None:
    parts = 2 if model == "Sequence" else 4
    where: dict[str, Any] = {"model": model, "method": method, "parts": parts, "folder": str(tmp_path)}
    found = several.results(f"{CASES}same_as_sequential", ranks, origin="seed", gather="all", **where)
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("origin", ["file", "seed"])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1), (1, 3)])
def test_checkpoints_are_read_into_what_has_no_memory_yet(
    several: Several, tmp_path: Path, origin: str, before: int, after: int
) -> None:
    results = []
    for name, steps in (("whole", (1, 1)), ("changed", (before, after))):
        folder = tmp_path / name
        if origin == "file":
            saved(folder / "artefact", "Plain", "lct", 4)
        for ranks in steps:
            found = several.results(f"{CASES}resumed", ranks, origin=origin, folder=str(folder), several=ranks > 1)
        results.append(found[0])
    assert results[0] == results[1]


def test_every_layer_draws_numbers_of_its_own() -> None:
    with torch.device("meta"):
        model = Plain()
    materialise(to_local(model, torch.randn(4, WIDTH), method="early_exit", parts=3), seed=5)
    assert model.upper.weight is model.lower.weight
    values = [model.first.weight, model.bare.middle.weight, model.lower.weight, model.attention.in_proj_weight]
    bound = WIDTH**-0.5
    assert all(0.5 * bound < v.abs().max() <= max(bound, (6 / (4 * WIDTH)) ** 0.5) for v in values)
    assert len({float(v.detach().flatten()[0]) for v in values}) == len(values)
    assert torch.equal(model.norm.running_var, torch.ones(WIDTH))
    assert torch.equal(model.attention.out_proj.bias, torch.zeros(WIDTH))  # which the layer above it sets
    assert model.bare.scale.min() > 0.5
    assert model.bare.scale.max() < 1.5


def test_the_seed_decides_and_the_caller_s_random_numbers_do_not() -> None:
    def made(seed: int, state: int) -> dict[str, Tensor]:
        torch.manual_seed(state)
        with torch.device("meta"):
            model = Plain()
        local = to_local(model, torch.randn(4, WIDTH), method="al", parts=3)
        at = torch.get_rng_state()
        helpers.trainer(local, seed=seed)
        assert torch.equal(torch.get_rng_state(), at)
        return helpers.tensors(local)

    helpers.assert_same(made(1, 0), made(1, 7))
    one, other = made(1, 0), made(2, 0)
    assert not torch.equal(one["first.weight"], other["first.weight"])
    head = next(name for name in one if name.startswith("heads.2.") and name.endswith("weight"))
    assert not torch.equal(one[head], other[head])


def test_values_that_are_there_stay() -> None:
    with torch.device("meta"):
        model = Plain()
    local = to_local(model, torch.randn(4, WIDTH), method="early_exit", parts=2)
    kept = [model.first.weight, model.first.bias, model.attention.out_proj.bias]
    for tensor in kept:
        replace_by(tensor, torch.full(tensor.shape, 7.0))
    materialise(local, 0)
    assert all(torch.equal(tensor, torch.full_like(tensor, 7.0)) for tensor in kept)
    assert not any(tensor.is_meta for tensor in model.parameters())


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("gather", ["first", "all", "none"])
@pytest.mark.parametrize("origin", ["file", "seed"])
def test_a_rank_has_its_own_tensors_and_never_any_other(
    several: Several, tmp_path: Path, origin: str, gather: str
) -> None:
    saved(tmp_path / "artefact", "Plain", "al", 4)
    for rank, each in enumerate(several.results(f"{CASES}held", 3, origin=origin, gather=gather, folder=str(tmp_path))):
        assert [name for name in each["at first"] if "running" not in name and "num_batches" not in name] == []
        assert sorted(each["during"]) == sorted(each["own"])
        whole = gather == "all" or (gather == "first" and rank == 0)
        assert sorted(each["after"]) == sorted(each["all"] if whole else each["own"])
        if whole:
            assert "alone" not in each and "save" not in each
        else:
            assert "are on other ranks, which trained them" in each["alone"]
            assert each["save"].startswith("CheckpointError")
            assert "gather='all'" in each["save"]


@pytest.mark.parametrize("origin", ["file", "seed"])
def test_the_start_takes_the_memory_of_the_own_part(several: Several, tmp_path: Path, origin: str) -> None:
    saved(tmp_path / "artefact", "Tower", "early_exit", 3)
    for each in several.results(f"{CASES}start", 3, origin=origin, parts=3, folder=str(tmp_path)):
        assert each["own"] < 0.4 * each["whole"]
        assert each["own"] <= each["peak"] <= 1.1 * each["own"]


def test_a_whole_model_takes_more(several: Several, tmp_path: Path) -> None:
    """The counter counts."""
    saved(tmp_path / "artefact", "Tower", "early_exit", 3)
    for each in several.results(f"{CASES}start", 3, origin="real", parts=3, folder=str(tmp_path)):
        assert each["peak"] >= each["whole"]


# ------------------------------------------------------------------ what cannot be done


class Tables(nn.Module):
    """What no ``reset_parameters`` sets: a table, a parameter, a buffer in the file, one in a layer that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Shifted(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("table", torch.arange(WIDTH).float(), persistent=False)
        self.register_buffer("kept", torch.ones(WIDTH))
        self.plain = torch.ones(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.kept * torch.relu(self.first(x) * self.scale + self.table) + self.plain)


class Shifted(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Reading(nn.Linear):
    """Looks at values, and so cannot be tried without memory."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 2.0)
        nn.init.constant_(self.bias, float(self.weight.max()))


class Failing(nn.Linear):
    def reset_parameters(self, gain: float) -> None: ...


UNSET = ["scale", "table", "kept", "first.shift", "parts.2.constant_0"]


def test_what_nothing_sets_is_named_all_at_once() -> None:
    with torch.device("meta"):
        model = Tables()
    local = to_local(model, torch.randn(4, WIDTH), method="early_exit", parts=2)
    with pytest.raises(PlacementError, match="cannot be given values") as caught:
        helpers.trainer(local)
    for name in UNSET:
        assert f"- {name}: no reset_parameters() writes to it" in str(caught.value)
    assert str(caught.value).count("no reset_parameters() writes") == len(UNSET)
    assert "localize convert" in str(caught.value)
    assert all(tensor.is_meta for tensor in local.parameters())


@pytest.mark.parametrize("kind", [Reading, Failing])
def test_an_initialiser_that_fails_is_named(kind: type[nn.Linear]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    model[0].__class__ = kind
    local = to_local(model, torch.randn(4, WIDTH), method="early_exit", parts=2)
    if kind is Failing:
        with pytest.raises(PlacementError, match=r"reset_parameters\(\) of 0: TypeError: .*'gain'"):
            helpers.trainer(local)
        assert all(tensor.is_meta for tensor in local.parameters())
    else:
        helpers.trainer(local)
        assert torch.equal(model[0].bias, torch.full((WIDTH,), 2.0))


def test_ranks_all_say_what_is_missing(several: Several) -> None:
    for answer in several.run(f"{CASES}unset", 2):
        assert answer["result"].startswith("PlacementError: Tensors on the meta device cannot be given values: scale")


def test_an_initialisation_of_the_model_s_own_that_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Sequential):
        def _init_weights(self, module: nn.Module) -> None: ...

    with torch.device("meta"):
        model = Own(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    local = to_local(model, torch.randn(4, WIDTH), method="early_exit", parts=2)
    with caplog.at_level(logging.WARNING):
        materialise(local, 0)
    assert "the model's own _init_weights is not called" in caplog.text


# ------------------------------------------------------------------ the command

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("table", torch.arange(32).float().cos(), persistent=False)
        {more}

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x.flatten(1)))) + self.table
        return self.c(torch.relu(self.b(x)))

def build_model():
    return Net()
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "localize", *arguments], capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [("pass", "was built without memory"),
     pytest.param("self.register_buffer('noise', torch.rand(3), persistent=False)",
                  "memory first: its code draws random numbers", marks=pytest.mark.slow)],
)  # fmt: skip
def test_an_artefact_is_trained_by_ranks_that_read_what_they_need(tmp_path: Path, more: str, said: str) -> None:
    (tmp_path / "net.py").write_text(MODEL.format(more=more))
    flags = ["--epochs", "1", "--json", "--data", "digits"]
    done = command(tmp_path, "convert", "net.py", "--method", "al", "--parts", "2", "--data", "digits", "-o", "art")
    assert done.returncode == 0, done.stderr
    results = []
    for name, processes in (("one", []), ("two", ["--nproc-per-node", "2"])):
        done = command(tmp_path, "--debug", "train", "art", *flags, "--output", name, *processes)
        assert done.returncode == 0, done.stderr
        assert (said in done.stderr) is bool(processes)
        results.append(json.loads(done.stdout))
    assert results[0]["evaluation"] == results[1]["evaluation"]
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(localize.load(tmp_path / "two").parts) == 2
    assert named_tensors(localize.load(tmp_path / "two")).keys() == weights_of(localize.load(tmp_path / "one")).keys()
