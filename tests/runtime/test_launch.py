"""``localize train --nproc-per-node``: the command starts its own ranks, and one of them speaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localize import PlacementError
from localize.runtime.launch import launch
from localize.runtime.placement import assign

ROOT = Path(__file__).parent.parent.parent


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``localize train`` for one epoch of digits."""
    command = [sys.executable, "-m", "localize", "train", *arguments, "--epochs", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def train_example(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The example model in three parts, into ``folder``."""
    model = str(ROOT / "examples" / "model.py")
    return train(model, "--method", "al", "--parts", "3", "--output", str(folder), *flags, cwd=folder.parent)


def test_the_command_starts_its_own_ranks(tmp_path: Path) -> None:
    results: list[dict[str, Any]] = []
    for name, flags in (("one", ()), ("two", ("--nproc-per-node", "2"))):
        done = train_example(tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    one, two = results
    assert two["evaluation"] == one["evaluation"]
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("one", "two")]
    assert plans[0] == plans[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "what was converted for ranks is gone"


RANDOM = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.rand(64), persistent=False)
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.b.load_state_dict(nn.Linear(32, 32).state_dict())
        self.order = torch.randperm(32)

    def forward(self, x):
        h = torch.relu(self.a(x.flatten(1) * self.w))[:, self.order]
        return self.c(torch.relu(self.b(h))[:, self.order])

def build_model():
    return Net()
"""


def test_what_the_model_draws_and_no_file_has_is_the_same_everywhere(tmp_path: Path) -> None:
    """Ranks build the model from its source: each drew numbers of its own, unlike the process that converted it."""
    (tmp_path / "net.py").write_text(RANDOM)
    for name, flags in (("one", ()), ("two", ("--nproc-per-node", "2"))):
        folder = tmp_path / name
        folder.mkdir()
        done = train("../net.py", "--output", ".", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_processes_may_be_replicas(tmp_path: Path) -> None:
    done = train_example(tmp_path / "four", "--parts", "2", "--nproc-per-node", "4", "--data-parallel", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["history"]
    assert row["step"] == 11  # 23 batches of digits: two a step, one left out
    assert (tmp_path / "four" / "weights.safetensors").exists()


def test_it_ends_quietly_when_it_is_told_to(tmp_path: Path) -> None:
    started = [tmp_path / f"started-{rank}" for rank in range(2)]  # torch leaves ranks alone whose start it interrupts
    script = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, 'started-' + os.environ['RANK']).touch(); "
    script += "time.sleep(60)"
    (tmp_path / "sleeper.py").write_text(script, encoding="utf-8")
    program = "import sys; from localize.runtime.launch import launch; sys.exit(launch(['sleeper'], 2))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environment)
    while not all(path.exists() for path in started):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said


def test_an_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    done = train_example(tmp_path / "none", "--nproc-per-node", "4")
    assert done.returncode == 2
    assert done.stderr == "error: There are 4 ranks for 3 parts; start 3 processes, or convert with parts=4.\n"
    assert done.stdout == ""


def test_no_process_is_too_few() -> None:
    with pytest.raises(PlacementError, match="0 processes cannot train anything"):
        launch(["localize"], 0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.data())
def test_parts_go_to_ranks_so_that_the_busiest_has_least(costs: list[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(costs)))
    found = assign(costs, ranks)
    assert len(found) == ranks
    assert all(found)
    assert [n for numbers in found for n in numbers] == list(range(1, len(costs) + 1))
    best = min(
        max(sum(costs[start:end]) for start, end in pairwise((0, *cuts, len(costs))))
        for cuts in combinations(range(1, len(costs)), ranks - 1)
    )
    assert max(sum(costs[n - 1] for n in numbers) for numbers in found) == best


def test_more_ranks_than_parts_are_refused() -> None:
    with pytest.raises(PlacementError, match="There are 3 ranks for 2 parts"):
        assign([1.0, 1.0], 3)
