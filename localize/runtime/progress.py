"""A progress bar on stderr: epoch, one loss a part, time left. Silent where nobody watches.

The one place besides ``cli/output.py`` that writes to a stream: a script that uses ``Trainer`` wants to see how far
it is, too. What is data (stdout) it leaves alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

_REFRESH_S = 0.2  # reading a loss waits for the device, so not after every batch


class ProgressBar:
    """The bar of one ``fit``.

    Args:
        epochs: how many there will be.
        show: False for silence, True for a bar in any case, None for a bar where stderr is a terminal.
        console: where to draw.
    """

    def __init__(self, epochs: int, show: bool | None = None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._epochs = epochs
        self._shown = self._console.is_terminal if show is None else show
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> Self:
        if self._shown:
            columns = (
                TextColumn("epoch {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
            )
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def start_epoch(self, number: int, batches: int | None, done: int = 0) -> None:
        """A new line for epoch ``number`` (from 1), ``done`` batches of which lie behind."""
        if self._bar is not None:
            name = f"{number}/{self._epochs}"
            self._task = self._bar.add_task(name, total=batches, completed=done, losses="")

    def advance(self, losses: Sequence[Tensor | float | None]) -> None:
        """One batch more; ``losses`` are read now and then only."""
        if self._bar is None or self._task is None:
            return
        self._bar.advance(self._task)
        now = time.monotonic()
        if now - self._drawn_at >= _REFRESH_S:
            self._drawn_at = now
            text = "loss " + " ".join("–" if loss is None else f"{float(loss):.3f}" for loss in losses)
            self._bar.update(self._task, losses=text, refresh=True)

    def end_epoch(self, summary: str) -> None:
        """The epoch's line stays, with ``summary`` in place of the losses."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, losses=summary, refresh=True)
