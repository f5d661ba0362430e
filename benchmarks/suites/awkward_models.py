"""Modules with one awkward habit each. They live with the tests: ``tests/awkward``; run from the repository's root."""

from __future__ import annotations

from benchmarks.suites import Case
from tests.awkward import TABLE


def names() -> list[str]:
    return list(TABLE)


def build(name: str) -> Case:
    return TABLE[name].case()
