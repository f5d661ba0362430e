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
_PREFIXES = ("", "k", "M", "G", "T", "P")  # powers of 1000
_THOUSAND = 999.5  # what three digits round to 1000


class Quantity(float):
    """A number that a table shows with three digits, a prefix and its unit: ``8.19 kB``. JSON shows the number."""

    unit = ""

    def __str__(self) -> str:
        value, prefixes = float(self), list(_PREFIXES)
        while abs(value) >= _THOUSAND and len(prefixes) > 1:
            value, prefixes = value / 1000, prefixes[1:]
        return f"{value:.3g} {prefixes[0]}{self.unit}".rstrip()


class Bytes(Quantity):
    """Bytes."""

    unit = "B"


class Flops(Quantity):
    """Floating-point operations."""

    unit = "FLOPs"


class Share(float):
    """A share of a whole, shown in percent."""

    def __str__(self) -> str:
        return f"{100 * self:.0f} %"


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
            table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
        for row in body:
            table.add_row(*(_cell(value) for value in row))
        _console(sys.stdout).print(table, markup=False)

    def facts(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """A title, and below it what is said under each label, wrapped to the width of the terminal."""
        if self.mode != "table":
            return
        grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        grid.add_column()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row("", label, text)
        console = _console(sys.stdout)
        console.print(title, markup=False)
        console.print(grid, markup=False)

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
    if isinstance(value, Quantity | Share):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
