"""Runs a check in a process of its own: what crashes, hangs or runs out of memory there ends there."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def run_child(command: Sequence[str], timeout_s: float) -> Row:
    """Runs ``command`` with the path of a record file added, and returns the row that it wrote there.

    A row that was not finished has the entry ``failure``: the reason. What was found before it is kept.

    Args:
        command: a program that calls ``report_to`` on its last argument.
        timeout_s: after so many seconds the process and all that it started are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder, "record"), Path(folder, "log")
        with log.open("wb") as stream:
            process = subprocess.Popen([*command, str(record)], stdout=stream, stderr=stream, start_new_session=True)
            try:
                status = process.wait(timeout_s)
                failure = "" if status == 0 else _ending(status, log)
            except subprocess.TimeoutExpired:
                failure = f"no end after {timeout_s:g} s"
            finally:
                _end(process)
        row = _read(record)
    if failure:
        row["failure"] = failure
    return row


def _ending(status: int, log: Path) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit status {status}: {lines[-1][:200].replace('|', '/') if lines else 'no message'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process, where it still runs, with all that it started: they are a group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(record: Path) -> Row:
    row: Row = {}
    for line in record.read_text().splitlines() if record.exists() else []:
        try:
            row.update(json.loads(line))
        except json.JSONDecodeError:  # the last line of a process that was killed while it wrote
            break
    return row


class Record:
    """A row being written: one line a column, so that what is known survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, column: str, value: Any) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps({column: value}) + "\n")


def limit_memory(gigabytes: float) -> None:
    """More than this raises ``MemoryError`` in the process, rather than bringing the machine down."""
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
