"""One row an epoch, in memory and as files that a spreadsheet or a script can read while training goes on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from localize.errors import ConfigError
from localize.runtime.files import written
from localize.spec import plain

Row = dict[str, Any]
JSONL, CSV = "history.jsonl", "history.csv"


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Writes all rows to ``history.jsonl`` and ``history.csv``, each file replaced in one go.

    Whole files, not appended lines: a resumed run then has no row twice, whatever the interrupted one had written.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        for name, text in ((JSONL, "".join(json.dumps(plain(row)) + "\n" for row in rows)), (CSV, _table(rows))):
            written(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The history cannot be written to {folder}: {error}. Pass another log_dir."
        ) from error


def flat(row: Row) -> dict[str, Any]:
    """A row without nesting: ``train_loss.1``, ``val_accuracy.4``; parts and exits counted from 1."""
    result: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            result |= {f"{name}.{key}": entry for key, entry in value.items()}
        elif isinstance(value, list):
            result |= {f"{name}.{i}": entry for i, entry in enumerate(value, 1)}
        else:
            result[name] = value
    return result


def _table(rows: Sequence[Row]) -> str:
    lines = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
