"""The coverage benchmark's command, and its processes: what goes wrong in one is a row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import coverage
from benchmarks.suites import table
from benchmarks.suites.children import Record, Work, run_child
from tests.test_coverage import build


def hangs(record: Record) -> None:
    record("captured", "yes")
    time.sleep(60)


def crashes(record: Record) -> None:
    record("captured", "yes")
    os.kill(os.getpid(), signal.SIGKILL)


def runs_out_of_memory(record: Record) -> None:
    record("captured", "yes")
    bytearray(2**40)


@pytest.mark.parametrize(
    ("work", "failure"),
    [
        (hangs, "no end after 0.5 s"),
        (crashes, "killed by SIGKILL"),
        (runs_out_of_memory, "exit status 1: MemoryError"),
    ],
)
def test_what_goes_wrong_in_a_process_becomes_a_row(work: Work, failure: str) -> None:
    row = run_child(work, timeout_s=0.5 if work is hangs else 30)
    assert row == {"captured": "yes", "failure": failure}
    assert not table.right(row)
    assert f"**{failure}**" in table.line({"model": "m", **row}, rivals=False)


def test_a_process_that_ends_well_gives_its_row() -> None:
    assert run_child(lambda record: record("seconds", 1.5), timeout_s=30) == {"seconds": 1.5}


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def starts_another(record: Record) -> None:
        pid.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)

    run_child(starts_another, timeout_s=2)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_record_that_broke_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    record("captured", "yes")
    with (tmp_path / "record").open("a") as stream:
        stream.write('{"train": "y')
    assert record.read() == {"captured": "yes"}


@pytest.mark.slow
def test_the_command_writes_a_table_and_its_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = ModuleType("benchmarks.suites.awkward_models")
    suite.names, suite.build = lambda: ["first", "second", "left out"], lambda name: build()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, suite.__name__, suite)
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    command = ["awkward", "--models", "first|second", "--parts", "3", "--markdown", str(page), "--json", str(rows)]
    assert coverage.main(command) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 right, 0 WRONG, 2 split in 3." in printed
    assert "2 of 2 that were tried made a step" in printed
    assert "| second | 0.000" in page.read_text()
    found = json.loads(rows.read_text())
    assert set(found["awkward"]) == {"first", "second"}
    found["awkward"]["first"]["eval"] = "WRONG: output differs"
    rows.write_text(json.dumps(found))
    assert coverage.main(command) == 1, "rows in the file are taken from there"
    assert "1 of 2 right, 1 WRONG" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        coverage.main(["nosuch"])
