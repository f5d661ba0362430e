"""The table of exits: what each sub-model costs and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localize import LocalModel
from localize.cli.output import Output


def show_exits(out: Output, local: LocalModel, scores: Mapping[str, Any]) -> str:
    """Prints the exits' scores; returns the last exit's accuracy (its loss for regression) for ``--quiet``."""
    rows = [
        (
            f"{exit.number}/{len(local.parts)}",
            exit.parameters,
            None if exit.flops is None else exit.flops / 1e6,
            scores["exits"][exit.number]["loss"],
            scores["exits"][exit.number]["accuracy"],
        )
        for exit in local.exits
        if exit.number in scores["exits"]
    ]
    out.table(["exit", "parameters", "MFLOPs a sample", "loss", "accuracy"], rows)
    last = scores["loss"] if scores["accuracy"] is None else scores["accuracy"]
    return f"{last:.4f}" if last is not None else "nan"
