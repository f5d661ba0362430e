"""What the commands say, and the only place that prints: data to stdout, notes and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from localize.spec import plain

Mode = Literal["table", "json", "quiet"]
_WIDE = 160  # columns of a table that no terminal limits


@dataclass(frozen=True)
class Output:
    """One command's output: tables for people, one JSON document for machines, or only the essential."""

    mode: Mode = "table"

    @classmethod
    def of(cls, as_json: bool, quiet: bool = False) -> Output:
        """JSON wins over quiet."""
        return cls("json" if as_json else "quiet" if quiet else "table")

    def result(self, payload: Mapping[str, Any], brief: str | None = None) -> None:
        """The command's result for machines; ``brief`` is what ``--quiet`` leaves of it."""
        if self.mode == "json":
            print(json.dumps(plain(payload), indent=2, allow_nan=False))
        elif self.mode == "quiet" and brief is not None:
            print(brief)

    def text(self, text: str) -> None:
        """Lines for people."""
        if self.mode == "table":
            print(text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
        """A table for people; columns that hold numbers are aligned to the right."""
        if self.mode != "table":
            return
        body = [list(row) for row in rows]
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
        for i, column in enumerate(columns):
            numeric = bool(body) and all(isinstance(row[i], int | float | None) for row in body)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in body:
            table.add_row(*(_cell(value) for value in row))
        _console(sys.stdout).print(table, markup=False)

    def note(self, text: str) -> None:
        """Progress and advice, on stderr."""
        if self.mode == "table":
            print(text, file=sys.stderr)


def error(message: str) -> None:
    """An expected error, on stderr."""
    print(f"error: {message}", file=sys.stderr)


def warning(message: str) -> None:
    """Something the user should know, whatever the mode, on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else _WIDE, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
