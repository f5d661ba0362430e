"""Writes the generated pages of this folder: ``methods.md`` and ``commands.md``."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from localize import list_methods
from localize.cli.app import main
from localize.cli.method_options import option_rows
from localize.heads.registry import method_class

DOCS = Path(__file__).parent
COMMANDS = ("convert", "inspect", "train", "evaluate", "schedule", "methods")
GENERATED = "<!-- Written by `make docs`; edit the docstrings instead. -->\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(v).replace("|", "\\|") for v in line) + " |" for line in lines)


def methods_page() -> str:
    """The registry as a table, and each method's options."""
    classes = [method_class(name) for name in list_methods()]
    rows = [(f"[{c.name}](#{c.name})", c.summary, c.feedback or "none", c.source) for c in classes]
    page = [GENERATED, "# Methods\n", table(("name", "summary", "feedback", "source"), rows)]
    for cls in classes:
        page.append(f"\n## {cls.name}\n\n{cls.summary[:1].upper()}{cls.summary[1:]}.")
        options = option_rows(cls)
        if options:
            cells = [(f"`{flag}`", f"`{kind}`", f"`{default}`".lower()) for flag, kind, default in options]
            page.append("\n" + table(("option", "type", "default"), cells))
    return "\n".join(page) + "\n"


def commands_page() -> str:
    """The help of every command, as wide as on a terminal of 80 columns."""
    page = [GENERATED, "# Commands"]
    for command in COMMANDS:
        with mock.patch.dict(os.environ, COLUMNS="80"), contextlib.redirect_stdout(io.StringIO()) as text:
            main([command, "--help"])
        page.append(f"\n## {command}\n\n```text\n{text.getvalue().strip()}\n```")
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    (DOCS / "methods.md").write_text(methods_page())
    (DOCS / "commands.md").write_text(commands_page())
