"""Tables (csv) and text by the character.

Shape legend: ``N`` batch, ``D`` features, ``T`` tokens.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from localize.data.base import VALIDATION_SHARE, Data, TensorData, split_indices
from localize.errors import ConfigError, did_you_mean, problem_list

_SHOWN_PROBLEMS = 5


def read_csv(path: Path, target: str | None = None, task: str | None = None) -> Data:
    """A csv file of numbers, with the target in column ``target`` (a name or a number from 1; else the last).

    Features are standardised with the training rows. A target of whole numbers or words means classes, of
    decimal numbers a regression; ``task`` overrides.
    """
    header, rows = _rows(path)
    column = _column(header, target, path)
    features = [[v for i, v in enumerate(row) if i != column] for row in rows]
    problems = [
        f"line {number}: {value!r} is no number"
        for number, row in enumerate(features, 2 if header else 1)
        for value in row
        if not _is_number(value)
    ]
    if problems:
        more = [f"and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise ConfigError(problem_list(f"csv: {path.name}", problems[:_SHOWN_PROBLEMS] + more))
    inputs = torch.tensor([[float(v) for v in row] for row in features])
    targets, classes = _targets([row[column] for row in rows], task)
    train, val = (torch.tensor(part) for part in split_indices(len(rows)))
    std, mean = torch.std_mean(inputs[train], dim=0)
    inputs = (inputs - mean) / std.clamp_min(1e-8)
    return Data(
        path.stem,
        TensorData(inputs[train], targets[train]),
        TensorData(inputs[val], targets[val]),
        classes,
        "regression" if classes is None else "classification",
    )


def _rows(path: Path) -> tuple[list[str] | None, list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[v.strip() for v in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"csv: cannot read {str(path)!r}: {error}") from error
    if not rows or len(rows[0]) < 2:
        raise ConfigError(f"csv: {path.name} needs at least two columns: features and a target.")
    ragged = [str(n) for n, row in enumerate(rows, 1) if len(row) != len(rows[0])]
    if ragged:
        raise ConfigError(
            f"csv: {path.name}: rows {', '.join(ragged[:_SHOWN_PROBLEMS])} do not have the {len(rows[0])} "
            "columns of the first one."
        )
    if any(_is_number(v) for v in rows[0]):
        return None, rows
    return rows[0], rows[1:]


def _column(header: list[str] | None, target: str | None, path: Path) -> int:
    if target is None:
        return -1 if header is None else len(header) - 1
    if header is not None and target in header:
        return header.index(target)
    if str(target).isdigit() and int(target) >= 1 and (header is None or int(target) <= len(header)):
        return int(target) - 1
    known = header or []
    raise ConfigError(
        f"csv: {path.name} has no column {target!r}.{did_you_mean(str(target), known)} "
        f"Columns: {', '.join(known) or 'unnamed; give a number from 1'}."
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _targets(values: list[str], task: str | None) -> tuple[Tensor, int | None]:
    """Targets as (N) class numbers with the number of classes, or as (N, 1) numbers with None."""
    numeric = all(_is_number(v) for v in values)
    whole = numeric and all(float(v).is_integer() for v in values)
    if task == "regression" or (task is None and numeric and not whole):
        if not numeric:
            raise ConfigError("csv: regression needs numbers in the target column.")
        return torch.tensor([[float(v)] for v in values]), None
    names = sorted(set(values), key=(lambda v: float(v)) if numeric else None)
    index = {name: i for i, name in enumerate(names)}
    return torch.tensor([index[v] for v in values]), len(names)


def read_text(path: Path, length: int = 64) -> Data:
    """Text by the character: inputs (N, T) and targets (N, T) one character ahead; the last fifth validates.

    The vocabulary is the sorted set of the file's characters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text: cannot read {str(path)!r}: {error}") from error
    needed = VALIDATION_SHARE * (length + 1)
    if length < 1 or len(text) < needed:
        raise ConfigError(
            f"text: {path.name} has {len(text)} characters; with sequences of {length} at least {needed} are "
            "needed. Shorten them: `text:FILE?length=16`."
        )
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([vocabulary[c] for c in text])
    count = (len(codes) - 1) // length
    inputs = codes[: count * length].view(count, length)
    targets = codes[1 : count * length + 1].view(count, length)
    cut = count - max(1, count // VALIDATION_SHARE)
    return Data(
        path.stem,
        TensorData(inputs[:cut], targets[:cut]),
        TensorData(inputs[cut:], targets[cut:]),
        len(vocabulary),
        "causal_lm",
        note=f"{len(vocabulary)} characters, {count} sequences of {length}",
    )
