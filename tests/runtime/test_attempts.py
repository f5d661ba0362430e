"""Traces of runs whose processes are killed and started anew."""

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

from localize.runtime import attempts
from localize.runtime.recording import Recorder, write

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_EVERY_S", 0.0)


def attempt(monkeypatch: pytest.MonkeyPatch, file: Path, number: int, rank: int = 0, restarts: int = 3) -> Recorder:
    """The recorder of a process that torchrun started for this attempt (from 1)."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number - 1))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setenv("RANK", str(rank))
    return Recorder(CPU, file)


def record(recorder: Recorder, part: int, batches: range) -> None:
    for batch in batches:
        recorder.batch = batch
        recorder.begin(part, "forward")
        recorder.begin(part, "backward")
        recorder.end()


def processes(file: Path) -> dict[str, dict[int, list[int]]]:
    """Of each process of a trace: the batches that each part went forward with, in order of time."""
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    found: dict[str, dict[int, list[int]]] = {name: {} for name in names.values()}
    for event in sorted((e for e in events if e["ph"] == "X" and e["cat"] == "forward"), key=lambda e: e["ts"]):
        found[names[event["pid"]]].setdefault(event["tid"], []).append(event["args"]["batch"])
    return found


def test_what_was_killed_is_in_the_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for rank in (0, 1):
        record(attempt(monkeypatch, file, 1, rank), rank + 1, range(1, 6 - rank))
    record(attempt(monkeypatch, file, 2, 0), 1, range(4, 7))  # its neighbour recorded nothing
    everyone = []
    for rank in (0, 1):
        last = attempt(monkeypatch, file, 3, rank)
        record(last, rank + 1, range(4, 9))
        everyone.append(last.plain())
    assert len([each for each in tmp_path.iterdir() if each.name.startswith(".run.json.attempt-")]) == 5
    write(file, json.loads(json.dumps(everyone)), "net")
    assert processes(file) == {
        "net, attempt 1": {1: [1, 2, 3, 4, 5], 2: [1, 2, 3, 4]},
        "net, attempt 2": {1: [4, 5, 6]},
        "net, attempt 3": {1: [4, 5, 6, 7, 8], 2: [4, 5, 6, 7, 8]},
    }
    assert list(tmp_path.iterdir()) == [file]


def test_a_torn_line_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    record(attempt(monkeypatch, file, 1), 1, range(1, 4))
    (side,) = tmp_path.iterdir()
    side.write_bytes(side.read_bytes()[:-9])
    rows = attempt(monkeypatch, file, 2).plain()
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        (batch, kind, 1) for batch in (1, 2, 3) for kind in ("forward", "backward")
    ][:-1]


def test_only_what_is_new_is_added_and_not_too_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attempts, "_EVERY_S", 10.0)
    kept = attempts.Attempts(tmp_path / "run.json")
    assert kept.number == 1
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    kept = attempts.Attempts(tmp_path / "run.json")
    rows: list[list[Any]] = [[1], [2]]
    for now, most in ((100.0, [1, 2]), (109.0, [1, 2]), (111.0, [1, 2, 4, 5])):
        kept.keep(rows, now)
        (side,) = tmp_path.iterdir()
        assert [json.loads(line)[0] for line in side.read_text().splitlines()] == most
        rows += [[len(rows) + 2]]


def test_nothing_is_put_down_where_nobody_starts_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for recorder in (Recorder(CPU, file), attempt(monkeypatch, file, 1, restarts=0)):
        record(recorder, 1, range(1, 3))
        assert list(tmp_path.iterdir()) == []
        write(file, [recorder.plain()], "net")
        assert list(processes(file)) == ["net"]
        file.unlink()


def test_a_first_attempt_begins_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a run that never came to its end left is no attempt of this one; other traces' files are not touched."""
    for name in ("[r].json", "r.json"):
        record(attempt(monkeypatch, tmp_path / name, 1), 1, range(1, 3))
        record(attempt(monkeypatch, tmp_path / name, 2), 1, range(1, 3))
    file = tmp_path / "[r].json"
    record(attempt(monkeypatch, file, 1), 1, range(1, 2))
    rows = attempt(monkeypatch, file, 2).plain()
    assert {(row[1], row[-1]) for row in rows} == {(1, 1)}
    assert sorted(each.name for each in tmp_path.glob(".r*")) == [
        ".r.json.attempt-1.rank-0",
        ".r.json.attempt-2.rank-0",
    ]


def test_an_attempt_that_had_nothing_left_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed after the last step: the trace is what was recorded before."""
    file = tmp_path / "run.json"
    record(attempt(monkeypatch, file, 1), 1, range(1, 3))
    write(file, [attempt(monkeypatch, file, 2).plain()], "net")
    assert processes(file) == {"net": {1: [1, 2]}}


def test_a_folder_that_takes_no_files_costs_no_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    recorder = attempt(monkeypatch, tmp_path / "file" / "run.json", 1)
    with caplog.at_level(logging.WARNING):
        record(recorder, 1, range(1, 9))
    assert caplog.text.count("The trace will lack this attempt") == 1
    assert len(recorder.plain()) == 16


def test_a_picture_has_a_panel_an_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "run.svg"
    record(attempt(monkeypatch, file, 1), 1, range(1, 3))
    last = attempt(monkeypatch, file, 2)
    record(last, 1, range(2, 4))
    write(file, [last.plain()], "net")
    text = file.read_text()
    assert "net, attempt 1: " in text
    assert "net, attempt 2: " in text
    assert list(tmp_path.iterdir()) == [file]


SCRIPT = """
import os, signal, sys
from functools import partial
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from localize import Trainer, to_local
from localize.runtime import attempts

attempts._EVERY_S = 0.0
torch.manual_seed(0)
local = to_local(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4), method="early_exit",
                 cuts=["1"], verify=False)
loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,))), batch_size=2)

def on_step(step, reports):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Trainer(local, optimizer=partial(torch.optim.SGD, lr=0.1), executor="distributed", checkpoint_dir="ck",
        checkpoint_every=3, progress=False, trace="run.json", on_step=on_step).fit(loader)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_and_started_anew(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(SCRIPT, encoding="utf-8")
    program = "import sys; from localize.runtime.launch import launch; sys.exit(launch(['killed'], 2, 1))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    first, second = processes(tmp_path / "run.json").values()
    assert first[2] == [1, 2, 3, 4, 5]
    assert first[1][:4] == [1, 2, 3, 4]  # it had sent the fifth
    assert second == {part: list(range(4, 11)) for part in (1, 2)}
    assert sorted(each.name for each in tmp_path.iterdir() if "run.json" in each.name) == ["run.json"]
