"""What the stages of this process did and when, measured: the intervals of a ``Timeline``.

One thing at a time happens in a process, so each beginning is an end. ``forward`` and ``backward`` are the part's,
``head`` the head's forward and backward pass, ``update`` the optimizer's step, ``wait`` what a rank waits for its
neighbours.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localize.runtime import gantt
from localize.runtime.attempts import Attempts, forget
from localize.runtime.messages import Begin, Side
from localize.runtime.stage import Half, Stage, Updater
from localize.runtime.timeline import Interval, Kind, Timeline, write_trace

_log = logging.getLogger(__name__)
_MOST = 20_000  # intervals of a process; further ones are left out


class Recorder:
    """Collects intervals. Times are those of the wall clock, so that several machines have a common one.

    On a GPU every beginning and end waits for what was started before: a trace shows what was computed and costs speed.
    Processes that may be killed and started anew put down what they record while they train: see ``attempts.py``.
    """

    def __init__(self, device: torch.device, trace: Path | None = None) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._attempts = None if trace is None else Attempts(trace)
        self.batch = 0  # from 1
        self._intervals: list[tuple[int, int, Kind, float, float, str, int | None]] = []
        self._open: tuple[int, Kind, int | None, float, str] | None = None
        self._offset = time.time() - time.perf_counter()

    def begin(self, part: int, kind: Kind, waits_for: str = "", micro: int | None = None) -> None:
        """From now on, part ``part`` does this, unless that is what it does already."""
        if self._open is not None and self._open[:3] == (part, kind, micro):
            return
        now = self._close()
        self._open = (part, kind, micro, now, waits_for)

    def end(self) -> None:
        """From now on, nothing is done."""
        now = self._close()
        if self._attempts is not None:
            self._attempts.keep(self._intervals, now)

    def _close(self) -> float:
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        now = time.perf_counter() + self._offset
        if self._open is not None and len(self._intervals) < _MOST:
            part, kind, micro, start, waits_for = self._open
            self._intervals.append((part, self.batch, kind, start, now, waits_for, micro))
        self._open = None
        return now

    # ---------------------------------------------------------------- what the executor tells

    def begins(self, stage: Stage, begin: Begin) -> None:
        """A stage tells what it does next."""
        self.begin(stage.number, begin.work, micro=begin.micro)

    def waits(self, stage: Stage, side: Side) -> None:
        """A stage waits for a neighbour in another process."""
        self.begin(stage.number, "wait", f"part {stage.number + side.value}")

    # ---------------------------------------------------------------- results

    def plain(self) -> list[list[Any]]:
        """All intervals as plain data, with the number of the attempt: those of earlier ones, too."""
        if self._attempts is None:
            return [[*each, 1] for each in self._intervals]
        earlier = [[*each, number] for number, each in self._attempts.earlier()]
        return earlier + [[*each, self._attempts.number] for each in self._intervals]


class Watched:
    """An updater that tells a recorder what it does."""

    def __init__(self, updater: Updater, recorder: Recorder) -> None:
        self._updater, self._recorder = updater, recorder

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        self._updater.begin(stage, loss)

    def ready(self, stage: Stage, half: Half) -> None:
        self._recorder.begin(stage.number, "update")
        self._updater.ready(stage, half)
        self._recorder.end()


def problem(path: Path) -> str | None:
    """Why nothing could be written there, for one who has not trained yet; None where nothing is known."""
    if path.suffix.lower() == ".json":
        return None
    if path.suffix.lower() not in gantt.SUFFIXES:
        return f"trace={str(path)!r}: a trace is a .json file, a picture one of {', '.join(gantt.SUFFIXES)}."
    if importlib.util.find_spec("matplotlib") is None:
        return f"trace={str(path)!r}: a picture needs matplotlib: pip install 'localize-torch[plot]', or take .json."
    return None


def write(path: Path, everyone: Sequence[Sequence[Sequence[Any]]], title: str) -> None:
    """Writes what all ranks recorded: a Chrome trace (``.json``), or a picture (any other suffix).

    Each attempt is a process of the trace, or a panel of the picture; what was done twice is in both. A finished run
    that goes on records nothing, and leaves the file as it is. A file that cannot be written is told in the log: the
    model is trained by now.

    Raises:
        ConfigError: a picture needs matplotlib.
    """
    attempts: dict[int, list[Interval]] = {}
    for part, batch, kind, start, end, waits_for, micro, attempt in chain.from_iterable(everyone):
        interval = Interval(part, batch, kind, start, end, micro, waits_for=waits_for)
        attempts.setdefault(attempt, []).append(interval)
    if not attempts:
        return
    several = max(attempts) > 1
    timelines = [
        Timeline(tuple(intervals), "s", f"{title}, attempt {number}" if several else title)
        for number, intervals in sorted(attempts.items())
    ]
    try:
        if path.suffix.lower() == ".json":
            write_trace(timelines, path)
        else:
            gantt.draw(timelines, path)
        forget(path)
    except OSError as error:
        _log.warning("The trace cannot be written to %s: %s", path, error)
