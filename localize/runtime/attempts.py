"""What a process had recorded before it was started anew (``--max-restarts``): files beside the trace.

    run.json                        written at the end, by the first process; then the others go
    .run.json.attempt-1.rank-0      while training: an interval a line, added to once a second
    .run.json.attempt-1.rank-1

A process that is killed leaves its file, and the process that takes its place reads it. The last line may be torn.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from localize.runtime.ranks import attempt

_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class Attempts:
    """The files of this process's attempts; there are none where nobody would start it anew.

    Attributes:
        number: of this attempt, from 1.
    """

    def __init__(self, trace: Path) -> None:
        self.number = attempt() + 1
        self._trace, self._rank = trace, os.environ.get("RANK") or "0"
        self._written = 0
        self._due = 0.0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0 else math.inf
        if self.number == 1:
            for left in _files(trace, self._rank):  # by a run that never came to its end
                with suppress(OSError):
                    left.unlink()

    def keep(self, rows: Sequence[Sequence[Any]], now: float) -> None:
        """Adds what is new to the file, unless that was done less than a second ago; ``now`` in seconds."""
        if now < self._due:
            return
        self._due = now + _EVERY_S
        lines = "".join(f"{json.dumps(row)}\n" for row in rows[self._written :])
        try:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            with self._file(self.number).open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            self._due = math.inf
            _log.warning("The trace will lack this attempt if there is another one: %s", error)
        self._written = len(rows)

    def earlier(self) -> Iterator[tuple[int, list[Any]]]:
        """The rows of all attempts before this one, each with its number."""
        for number in range(1, self.number):
            try:
                lines = self._file(number).read_text(encoding="utf-8", errors="replace").splitlines()
            except FileNotFoundError:  # it had not recorded anything
                continue
            except OSError as error:
                _log.warning("The trace will lack attempt %d: %s", number, error)
                continue
            for line in lines:
                with suppress(ValueError):
                    yield number, json.loads(line)

    def _file(self, number: int) -> Path:
        return self._trace.with_name(f".{self._trace.name}.attempt-{number}.rank-{self._rank}")


def forget(trace: Path) -> None:
    """Removes the files of all attempts and processes."""
    for file in _files(trace, "*"):
        with suppress(OSError):
            file.unlink()


def _files(trace: Path, rank: str) -> list[Path]:
    return sorted(trace.parent.glob(f".{glob.escape(trace.name)}.attempt-*.rank-{rank}"))
