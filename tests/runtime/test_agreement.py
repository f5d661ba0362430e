"""Ranks that were not given the same say so before they start, and name what differs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from localize.runtime.agreement import settings
from tests.runtime.several import Several

CASES = "tests.runtime.cases_agreement:"


@pytest.mark.parametrize(
    ("what", "on", "said"),
    [
        ("trace", 0, "trace is given on rank 0 and not given on rank 1"),
        ("trace", 1, "trace is not given on rank 0 and given on rank 1"),
        ("checkpoint_dir", 0, "checkpoint_dir is given on rank 0 and not given on rank 1"),
        ("checkpoint_dir", 1, "checkpoint_dir is not given on rank 0 and given on rank 1"),
        ("clip_grad_norm", 1, "clip_grad_norm is None on rank 0 and 0.5 on rank 1"),
        ("on_nonfinite", 1, "on_nonfinite is 'raise' on rank 0 and 'skip' on rank 1"),
        ("optimizer", 1, "optimizer is Adam(lr=0.01) on rank 0 and Adam(lr=0.02) on rank 1"),
        ("optimizer class", 0, "optimizer is SGD() on rank 0 and Adam(lr=0.01) on rank 1"),
        ("head_optimizer", 1, "head_optimizer is not given on rank 0 and given on rank 1"),
        ("scheduler", 1, "StepLR(gamma=0.5, step_size=1) on rank 0 and StepLR(gamma=0.5, step_size=2) on rank 1"),
        ("no scheduler", 1, "scheduler is given on rank 0 and not given on rank 1"),
    ],
)
def test_what_one_rank_alone_was_given(several: Several, tmp_path: Path, what: str, on: int, said: str) -> None:
    for answer in several.results(f"{CASES}one_has", 2, timeout=30.0, what=what, on=on, folder=str(tmp_path)):
        assert answer is not None
        assert answer["kind"] == "PlacementError"
        assert said in answer["text"]
    assert list(tmp_path.iterdir()) == []


def test_what_may_differ(several: Several, tmp_path: Path) -> None:
    """Paths that only the first rank writes to, and factories that nobody can compare."""
    assert several.results(f"{CASES}may_differ", 2, folder=str(tmp_path)) == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "trace-0.json"]


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (torch.optim.SGD, "SGD()"),
        (partial(torch.optim.Adam, betas=(0.9, 0.99), lr=1e-3), "Adam(betas=(0.9, 0.99), lr=0.001)"),
        (partial(torch.optim.Adam, lr=torch.tensor(1.0)), None),
        (lambda parameters: torch.optim.SGD(parameters), None),
        (partial(lambda parameters, lr: torch.optim.SGD(parameters, lr), lr=1.0), None),
    ],
    ids=["class", "partial", "object", "lambda", "partial of lambda"],
)
def test_settings_hold_no_addresses(factory: Any, said: str | None) -> None:
    assert settings(factory) == said


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_a_rank_is_refused_and_named(several: Several, tmp_path: Path, resume: bool) -> None:
    """Each rank wrote its own files into its own folder, and nobody could go on from any of these."""
    for answer in several.results(f"{CASES}folders", 2, base=str(tmp_path), own=True, resume=resume):
        assert answer is not None
        assert answer["kind"] == "PlacementError"
        assert f"rank 0 has {tmp_path / '0'}" in answer["text"]
        assert f"rank 1 ({tmp_path / '1'})" in answer["text"]
        assert "the same folder" in answer["text"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_is_left_of_the_comparison(several: Several, tmp_path: Path) -> None:
    assert several.results(f"{CASES}folders", 2, base=str(tmp_path), own=False) == [None, None]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["latest", "step-00000007"]


def test_a_folder_that_cannot_be_written_is_told_at_once(several: Several, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    first, second = several.results(f"{CASES}unwritable", 2, base=str(tmp_path))
    assert first["kind"] == "CheckpointError"
    assert f"checkpoint_dir={str(tmp_path / 'link')!r} cannot be written to" in first["text"]
    assert second["kind"] == "Stopped"
    assert "cannot be written to" in second["text"]


def test_other_micro_batches_are_told_once(several: Several, tmp_path: Path) -> None:
    first, second = several.results(f"{CASES}other_microbatches", 2, folder=str(tmp_path))
    assert [text for text in first if "microbatches" in text] == [
        f"The run in {tmp_path} was made with microbatches=2 until the end of epoch 1, and here it is 1: batch norm's "
        "statistics and dropout's masks are those of other pieces from here on."
    ]
    assert not [text for text in second if "microbatches" in text]
