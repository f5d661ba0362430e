"""Which models can be converted, model by model, each in a process of its own with a time limit.

    python benchmarks/coverage.py [torchvision|timm|transformers|awkward] [--models REGEX] [--parts 4]
        [--timeout 300] [--rivals] [--markdown FILE] [--json FILE]

Without a suite, all four. What the columns mean is told in docs/coverage.md. Rows are written as they come; those
that a --json file has already are taken from there. The exit status is 1 where any model is not right.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find the suites, however this file is started

from benchmarks.suites import table
from benchmarks.suites.checks import Build, check, check_steps
from benchmarks.suites.children import run_child
from benchmarks.suites.rivals import check_rivals

SUITES = ("torchvision", "timm", "transformers", "awkward")
RIVALS_TIMEOUT_S = 60.0
Row = dict[str, Any]


def arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all where omitted")
    parser.add_argument("--models", default="", help="only names in which this expression is found")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a model")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="what one model's process may take")
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True,
                        help="train a step with every method, which takes most of the time")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=False,
                        help=f"also torch.export and pipeline, {RIVALS_TIMEOUT_S:g} s a model")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write all rows, in full, to this file")
    options = parser.parse_args(command)
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    return options


def main(command: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status."""
    options = arguments(command)
    pages, good = [], True
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for suite in options.suites or SUITES:
        module = importlib.import_module(f"benchmarks.suites.{suite}_models")
        names = [name for name in module.names() if re.search(options.models, name)]
        rows = known.setdefault(suite, {})
        lines = [*table.heading(options.parts, options.rivals)]
        print(f"{suite}\n\n" + "\n".join(lines), flush=True)
        for name in names:
            rows[name] = completed(rows.get(name, {}), partial(module.build, name), name, options)
            lines.append(table.line(rows[name], options.rivals))
            print(lines[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps(known, indent=1))
        found = [rows[name] for name in names]
        totals = table.summary(found, options.parts, options.rivals)
        print("\n" + "\n".join(totals) + "\n", flush=True)
        pages.append("\n".join([f"## {suite}", "", *(f"{text}\n" for text in totals), *lines]))
        good = good and all(map(table.right, found))
    if options.markdown:
        options.markdown.write_text("\n\n".join(pages) + "\n")
    return 0 if good else 1


def completed(row: Row, build: Build, name: str, options: argparse.Namespace) -> Row:
    """The row with what is still missing of it."""
    if not row:
        ours = partial(check, build, options.parts)
        row = {"model": name, **run_child(ours, options.timeout, options.memory_gb)}
    if options.steps and "step" not in row and row.get("split", "–")[0] not in "–n":
        steps = partial(check_steps, build, options.parts)
        theirs = run_child(steps, options.timeout, options.memory_gb)
        if "failure" in theirs:
            theirs["step"] = theirs.get("step", {}) | {"the process": theirs.pop("failure")}
        row = row | theirs
    if options.rivals and not row.keys() & {"export", "rivals failure"}:
        rivals = partial(check_rivals, build, options.parts)
        theirs = run_child(rivals, min(RIVALS_TIMEOUT_S, options.timeout), options.memory_gb)
        if "failure" in theirs:
            theirs["rivals failure"] = theirs.pop("failure")
        row = row | theirs
    return row


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a model's process ends with this one
    sys.exit(main())
