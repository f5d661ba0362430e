"""Buffers that grow, come and go, share a tensor, are views or in no ``state_dict``: on several ranks and resumed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from localize import CheckpointError, LocalModel, to_local
from localize.runtime import checkpoint
from localize.runtime.nonfinite import Buffers
from localize.runtime.sequential import stages_of
from tests.runtime import helpers
from tests.runtime.cases_buffers import data, differences, inputs, made
from tests.runtime.odd import KINDS, Grows
from tests.runtime.several import Several

CASES = "tests.runtime.cases_buffers:"
METHODS = [("early_exit", "first"), ("bp", "all"), ("chained", "all")]
RANKS = [(1, 1, 4), (2, 2, 3), (2, 1, 4), (1, 2, 3), (3, 2, 5)]  # before, after, steps between checkpoints


def is_one(several: Several, folder: Path, kind: str, method: str, gather: str, ranks: int, bad: int | None) -> None:
    options = {"kind": kind, "method": method, "gather": gather, "folder": str(folder), "bad": bad}
    assert several.results(f"{CASES}trained", ranks, **options) == [[]] * ranks


def goes_on(several: Several, folder: Path, kind: str, before: int, after: int, every: int) -> None:
    def run(ranks: int, name: str, stop: int | None = None) -> Any:
        executor = "sequential" if ranks == 1 else "distributed"
        options = {"kind": kind, "method": "early_exit", "executor": executor, "folder": str(folder / name)}
        return several.results(f"{CASES}runs", ranks, **options, every=every, stop=stop)[0]

    assert run(before, "interrupted", stop=11) is None
    assert differences(run(after, "interrupted"), run(1, "whole")) == []


# ------------------------------------------------------------------ several ranks


@pytest.mark.parametrize(("kind", "number"), [(kind, i + j) for i, kind in enumerate(KINDS) for j in (0, 2)])
def test_many_processes_are_one(several: Several, tmp_path: Path, kind: str, number: int) -> None:
    """Values, shapes, strides and what is in the same memory; what the model computes, in both modes; checkpoints."""
    is_one(several, tmp_path, kind, *METHODS[number % 3], ranks=2 + number % 2, bad=None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_batch_leaves_no_trace(several: Several, tmp_path: Path, kind: str) -> None:
    is_one(several, tmp_path, kind, "early_exit", "all", ranks=2, bad=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("method", "gather"), METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_processes_are_one_all_over(
    several: Several, tmp_path: Path, kind: str, method: str, gather: str, ranks: int
) -> None:
    is_one(several, tmp_path, kind, method, gather, ranks, bad=None)


@pytest.mark.parametrize("kind", ["module", "tensor"])
def test_a_buffer_that_several_ranks_change_is_refused(several: Several, kind: str) -> None:
    """Each rank once had one of its own, and the result was another one than that of one process."""
    for each in several.results(f"{CASES}written_elsewhere", 2, kind=kind):
        assert each["kind"] in ("PlacementError", "Stopped")
        assert "changes the buffer" in each["text"]
        assert "executor='sequential'" in each["text"]


# ------------------------------------------------------------------ resumed


@pytest.mark.parametrize(("kind", "number"), [(kind, 2 * i + j) for i, kind in enumerate(KINDS) for j in (0, 1)])
def test_they_are_resumed(several: Several, tmp_path: Path, kind: str, number: int) -> None:
    """From the last checkpoint before step 12, on another number of ranks."""
    goes_on(several, tmp_path, kind, *RANKS[number % 5])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "every"), RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_resumed_all_over(
    several: Several, tmp_path: Path, kind: str, before: int, after: int, every: int
) -> None:
    goes_on(several, tmp_path, kind, before, after, every)


def grown(folder: Path) -> None:
    helpers.trainer(made("grows", "early_exit"), folder, progress=False).fit(data())


def resumed(local: LocalModel, folder: Path) -> None:
    helpers.trainer(local, folder, progress=False).fit(data(), epochs=1, resume=True)


def test_parameters_keep_their_shapes(tmp_path: Path) -> None:
    grown(tmp_path)
    local = made("grows", "early_exit")
    odd = next(module for module in local.to_standard().modules() if isinstance(module, Grows))
    head = local.heads[0]
    assert head is not None
    name, weight = next(iter(head.named_parameters()))
    owner: Any = head.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(weight.detach()[:1].clone()))
    with pytest.raises(CheckpointError, match=rf"heads.1.{name} has shape .*, the model.s is \(1") as caught:
        resumed(local, tmp_path)
    assert "seen" not in str(caught.value)
    assert odd.seen.shape == (0,)  # nothing was changed


def test_a_buffer_that_is_not_there_is_missed(tmp_path: Path) -> None:
    grown(tmp_path)
    local = made("grows", "early_exit")
    for module in local.to_standard().modules():
        if isinstance(module, Grows):
            module.register_buffer("more", torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"odd\.0\.more is missing"):
        resumed(local, tmp_path)


def test_a_model_that_was_cast_keeps_its_dtypes(tmp_path: Path) -> None:
    helpers.trainer(helpers.converted(), tmp_path, progress=False).fit(helpers.loader())
    local = helpers.converted().double()
    helpers.trainer(local, tmp_path, progress=False).fit(helpers.loader(), epochs=1, resume=True)
    kinds = {buffer.dtype for buffer in local.buffers()}
    assert kinds == {torch.float64, torch.int64}  # running statistics, and how many batches there were


def test_a_checkpoint_of_an_earlier_format_is_refused(tmp_path: Path) -> None:
    helpers.trainer(helpers.converted(), tmp_path, progress=False).fit(helpers.loader())
    (path,) = (path for path in tmp_path.iterdir() if path.is_dir())
    state = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps(state | {"format": checkpoint.FORMAT - 1}))
    with pytest.raises(CheckpointError, match="has format 1, of a development version"):
        helpers.trainer(helpers.converted(), tmp_path, progress=False).fit(helpers.loader(), epochs=1, resume=True)


# ------------------------------------------------------------------ put back


class Keeps(nn.Module):
    """Has a buffer; what a forward pass would do to it, tests do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.register_buffer("kept", torch.zeros(3, 4))
        self.register_buffer("late", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + (0.0 if float(self.kept.detach().sum()) != 123.0 else 1.0)


def _exchange(keeps: Keeps, kept: torch.Tensor) -> None:
    keeps.kept.data = torch.ones(4, 3).t()


def _replace(keeps: Keeps, kept: torch.Tensor) -> None:
    keeps.kept, keeps.late = torch.ones(7), torch.ones(1)


def _lose(keeps: Keeps, kept: torch.Tensor) -> None:
    kept.as_strided((1,), (1,), kept.storage_offset()).add_(5.0)
    keeps.kept = None  # type: ignore[assignment]


def _register(keeps: Keeps, kept: torch.Tensor) -> None:
    kept.data.as_strided((1,), (1,), kept.storage_offset()).add_(5.0)
    keeps.register_buffer("more", torch.ones(2))


@pytest.mark.parametrize("change", [_exchange, _replace, _lose, _register])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).reshape(3, 4),
        lambda: torch.arange(12.0).reshape(4, 3).t(),
        lambda: torch.arange(4.0).expand(3, 4),
        lambda: torch.ones(2)[1].expand(3, 4),
        lambda: torch.arange(9.0).as_strided((3, 4), (2, 1)),
    ],
    ids=["plain", "turned", "rows", "one number", "overlapping"],
)
def test_a_buffer_is_put_back_as_it_was(make: Any, change: Any) -> None:
    keeps = Keeps()
    local = to_local(nn.Sequential(nn.Linear(6, 6), keeps), inputs(8), method="early_exit", parts=2, verify=False)
    kept = keeps.kept = make()
    memory, values = kept.untyped_storage().data_ptr(), kept.clone()
    before, stage = Buffers(), stages_of(local)[1]
    before.remember(stage)
    partial(change, keeps, kept)()
    before.put_back(2)
    assert keeps.kept is kept
    assert (kept.stride(), kept.untyped_storage().data_ptr()) == (make().stride(), memory)
    assert torch.equal(kept, values)
    assert dict(keeps._buffers) == {"kept": kept, "late": None}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_buffers_of_a_scripted_module_are_put_back() -> None:
    """Its table of buffers is no dict."""
    norm = torch.jit.script(nn.BatchNorm1d(6))
    local = to_local(
        nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 5)), inputs(8), method="early_exit", parts=1, verify=False
    )
    kept, before, stage = norm.running_mean, Buffers(), stages_of(local)[0]
    before.remember(stage)
    norm(inputs(8))
    assert kept.any()
    before.put_back(1)
    assert norm.running_mean is kept
    assert not kept.any()
