"""Processes that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.several import Several


@pytest.fixture(scope="session")
def several() -> Iterator[Several]:
    processes = Several()
    yield processes
    processes.close()
