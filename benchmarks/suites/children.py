"""Runs a check in a process of its own: what crashes, hangs or runs out of memory there ends there."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Work = Callable[["Record"], None]
_PROCESSES = multiprocessing.get_context("fork")  # imports took place once, which is most of a small model's time


class Record:
    """A row being written: one line a column, so that what is known survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, column: str, value: Any) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps({column: value}) + "\n")

    def read(self) -> Row:
        """What was written so far."""
        row: Row = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                row.update(json.loads(line))
            except json.JSONDecodeError:  # the last line of a process that was killed while it wrote
                break
        return row


def run_child(work: Work, timeout_s: float, gigabytes: float = 16.0) -> Row:
    """The row that ``work`` writes in a process of its own.

    A row that was not finished has the entry ``failure``: the reason. What was found before it is kept.

    Args:
        work: is given the record to report to.
        timeout_s: after so many seconds the process and all that it started are killed.
        gigabytes: of memory; asking for more raises ``MemoryError`` there, rather than bringing the machine down.
    """
    with tempfile.TemporaryDirectory() as folder:
        record, log = Record(Path(folder, "record")), Path(folder, "log")
        process = _PROCESSES.Process(target=_inside, args=(work, record, log, gigabytes))
        process.start()
        try:
            process.join(timeout_s)
            failure = _ending(process, log, timeout_s)
        finally:
            _end(process)
        row = record.read()
    if failure:
        row["failure"] = failure
    return row


def _inside(work: Work, record: Record, log: Path, gigabytes: float) -> None:
    os.setsid()  # a group of its own, with all that it starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        work(record)
    except BaseException as error:
        os.write(2, "".join(traceback.format_exception(error)).encode())
        os._exit(1)
    os._exit(0)  # nothing of the parent's is cleaned up here


def _ending(process: BaseProcess, log: Path, timeout_s: float) -> str:
    """What went wrong, or the empty text."""
    if process.exitcode is None:
        return f"no end after {timeout_s:g} s"
    if process.exitcode == 0:
        return ""
    if process.exitcode < 0:
        return f"killed by {signal.Signals(-process.exitcode).name}"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return f"exit status {process.exitcode}: {lines[-1][:200].replace('|', '/') if lines else 'no message'}"


def _end(process: BaseProcess) -> None:
    """Kills the process, where it still runs, with all that it started."""
    if process.exitcode is None and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not come as far as to have a group of its own
            process.kill()
        process.join()
