"""Which models can be converted, model by model, each in a fresh process with a time limit.

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
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # to find the suites, however this file is started

from benchmarks.suites import table  # noqa: E402
from benchmarks.suites.children import run_child  # noqa: E402

SUITES = ("torchvision", "timm", "transformers", "awkward")
RIVALS_TIMEOUT_S = 60.0
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all where omitted")
    parser.add_argument("--models", default="", help="only names in which this expression is found")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a model")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="what one model's process may take")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=False,
                        help=f"also torch.export and pipeline, {RIVALS_TIMEOUT_S:g} s a model")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write all rows, in full, to this file")
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    return options


def main() -> int:
    options = arguments()
    pages, good = [], True
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for suite in options.suites or SUITES:
        names = importlib.import_module(f"benchmarks.suites.{suite}_models").names()
        names = [name for name in names if re.search(options.models, name)]
        rows = known.setdefault(suite, {})
        lines = [*table.heading(options.parts, options.rivals)]
        print(f"{suite}\n\n" + "\n".join(lines), flush=True)
        for name in names:
            rows[name] = completed(rows.get(name, {}), suite, name, options)
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


def completed(row: Row, suite: str, name: str, options: argparse.Namespace) -> Row:
    """The row with what is still missing of it."""
    if not row:
        row = {"model": name, **child("check", suite, name, options, options.timeout)}
    if options.rivals and "export" not in row:
        theirs = child("rivals", suite, name, options, min(RIVALS_TIMEOUT_S, options.timeout))
        if "failure" in theirs:
            theirs["rivals failure"] = theirs.pop("failure")
        row = row | theirs
    return row


def child(kind: str, suite: str, name: str, options: argparse.Namespace, timeout_s: float) -> Row:
    """What one process finds out about one model."""
    script = str(ROOT / "benchmarks" / "suites" / "child.py")
    command = [sys.executable, script, kind, suite, name, str(options.parts), str(options.memory_gb)]
    return run_child(command, timeout_s)


if __name__ == "__main__":
    sys.exit(main())
