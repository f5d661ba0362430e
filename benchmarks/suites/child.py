"""The process of one model: ``python child.py check|rivals SUITE NAME PARTS GIGABYTES RECORD``."""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # benchmarks.suites

from benchmarks.suites.checks import check
from benchmarks.suites.children import Record, limit_memory
from benchmarks.suites.rivals import check_rivals


def main() -> None:
    kind, suite, name, parts, gigabytes, record = sys.argv[1:]
    warnings.filterwarnings("ignore")
    limit_memory(float(gigabytes))
    build = partial(importlib.import_module(f"benchmarks.suites.{suite}_models").build, name)
    {"check": check, "rivals": check_rivals}[kind](build, int(parts), Record(Path(record)))


if __name__ == "__main__":
    main()
