"""Rows of the coverage benchmark as a markdown table, and their summary."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
OURS = {  # column: its heading
    "Mparams": "M params",
    "captured": "captured",
    "train": "train equal",
    "eval": "eval equal",
    "batch": "other batch",
    "split": "split in {parts}",
    "step": "one step with every method",
    "seconds": "seconds",
}
RIVALS = {
    "export": "torch.export",
    "export right": "right",
    "export batch": "other batch",
    "pipeline": "pipeline",
    "pipeline right": "right",
    "pipeline batch": "other batch",
}
LOPSIDED = 1.5  # largest part over the mean part, in FLOPs: worth a word
EQUALITIES = ("train", "eval", "batch")


def heading(parts: int, rivals: bool) -> list[str]:
    """The first two lines of the table."""
    columns = {**OURS, **(RIVALS if rivals else {})}
    names = ["model", *(text.format(parts=parts) for text in columns.values())]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def line(row: Row, rivals: bool) -> str:
    """One row of the table."""
    cells = [_cell(row, column) for column in OURS]
    if row.get("failure"):
        cells[_first_empty(cells)] = f"**{row['failure']}**"
    if rivals:
        theirs = [_cell(row, column) for column in RIVALS]
        if row.get("rivals failure") and "" in theirs:
            theirs[theirs.index("")] = str(row["rivals failure"])
        cells += theirs
    return f"| {row['model']} | {' | '.join(cells)} |"


def _first_empty(cells: Sequence[str]) -> int:
    return cells.index("") if "" in cells else len(cells) - 1


def _cell(row: Row, column: str) -> str:
    value = row.get(column, "")
    if column == "step":
        return _steps(value) if value else ""
    if column == "split" and value.startswith("yes") and row.get("imbalance", 1) > LOPSIDED:
        return f"yes, lopsided ({row['imbalance']:.1f})"
    if isinstance(value, float):
        return f"{value:.3g}" if column == "Mparams" and value < 1 else f"{value:.1f}"
    return f"**{value}**" if str(value).startswith("WRONG") else str(value)


def _steps(found: dict[str, str]) -> str:
    """``ok``, and what stands out: methods that declare that they cannot, fewer parts, failures."""
    if "" in found:
        return found[""]
    rest = [f"{method}: {_shortened(text)}" for method, text in found.items() if text != "yes"]
    failures = any(_step_failed(text) for text in found.values())
    text = "; ".join(rest)
    return (f"**{text}**" if failures else f"ok; {text}") if rest else "ok"


def _shortened(text: str) -> str:
    """Of what a method declares: why it cannot, without where it was tried and what to take instead."""
    reason = re.search(r"\): (it [^.]*)", text)
    return reason[1] if text.startswith("declared") and reason else text


def _step_failed(text: str) -> bool:
    return not text.startswith(("yes", "declared", "refused, rightly"))


def right(row: Row) -> bool:
    """Captured and equal in all that was compared and trained, or refused where refusing is right."""
    if row.get("failure") or wrong(row):
        return False
    if str(row.get("captured", "")).startswith("refused, rightly"):
        return True
    values = [str(row.get(column, "")) for column in EQUALITIES]
    fine = all(value in ("yes", "–") or value.startswith("refused, rightly") for value in values)
    return row.get("captured") == "yes" and fine and not str(row.get("seconds", "")).startswith("WRONG")


def trained(row: Row) -> bool:
    """Every method made a step, or says of itself that it cannot on this model."""
    found = row.get("step") or {}
    return bool(found) and "" not in found and not any(map(_step_failed, found.values()))


def wrong(row: Row) -> bool:
    """Something was silently wrong."""
    values = [*row.values(), *(row.get("step") or {}).values()]
    ours = [v for k, v in row.items() if k not in RIVALS] + values[len(row) :]
    return any(isinstance(value, str) and value.startswith("WRONG") for value in ours)


def summary(rows: Sequence[Row], parts: int, rivals: bool) -> list[str]:
    """Totals, in words."""
    total = len(rows)
    refused = sum(str(row.get("captured", "")).startswith("refused, rightly") for row in rows)
    split = sum(str(row.get("split")).startswith("yes") for row in rows)
    tasks = [row for row in rows if row.get("step") and "" not in row["step"]]
    lines = [
        f"{sum(map(right, rows))} of {total} right{f' ({refused} of them refused, rightly)' if refused else ''}, "
        f"{sum(map(wrong, rows))} WRONG, {split} split in {parts}."
    ]
    if tasks:
        lines.append(f"{sum(map(trained, tasks))} of {len(tasks)} that were tried made a step with every method.")
    times = [row["seconds"] for row in rows if isinstance(row.get("seconds"), float)]
    if times:
        lines.append(f"Verified conversion: median {statistics.median(times):.2f} s, longest {max(times):.1f} s.")
    uneven = [row["imbalance"] for row in rows if str(row.get("split")).startswith("yes") and "imbalance" in row]
    if uneven:
        above = sum(ratio > LOPSIDED for ratio in uneven)
        lines.append(
            f"Largest part over mean part, FLOPs: median {statistics.median(uneven):.2f}, {above} above {LOPSIDED}, "
            f"of {len(uneven)} measured."
        )
    if rivals:
        lines += [_rival_summary(rows, name) for name in ("export", "pipeline")]
    return lines


def _rival_summary(rows: Sequence[Row], name: str) -> str:
    captured = sum(row.get(name) == "yes" for row in rows)
    fine = [row for row in rows if row.get(f"{name} right") == "yes"]
    batch = sum(row.get(f"{name} batch") in ("yes", "dynamic") for row in fine)
    wrong = sum("WRONG" in str(row.get(f"{name} right", "")) for row in rows)
    return (
        f"{'torch.export' if name == 'export' else 'pipeline'}: {captured} of {len(rows)} captured, "
        f"{len(fine)} right, {wrong} WRONG, {batch} right on another batch size too."
    )
