"""Every awkward model is converted right, or refused with a clear error. None may be silently wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.suites import awkward_models
from tests.awkward import TABLE, Awkward
from tests.awkward.check import Outcome, examine
from tests.awkward.open import OPEN, OPEN_UNVERIFIED, OPEN_VERIFIED


def _cases() -> Iterator[Any]:
    for name, entry in TABLE.items():
        for verify, title in ((False, "unverified"), (True, "verified")):
            reason = OPEN.get(name) or (OPEN_UNVERIFIED.get(name) if not verify else OPEN_VERIFIED.get(name))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            yield pytest.param(entry, verify, id=f"{name}-{title}", marks=marks)


@pytest.fixture(autouse=True)
def _nothing_stays_patched() -> Iterator[None]:
    before = (nn.Module.__call__, vars(torch.autograd.Function)["apply"], range, len, torch.is_grad_enabled())
    yield
    assert (nn.Module.__call__, vars(torch.autograd.Function)["apply"], range, len, torch.is_grad_enabled()) == before
    assert torch.overrides._get_current_function_mode() is None
    assert len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()) == 0


@pytest.mark.parametrize(("entry", "verify"), list(_cases()))
def test_right_or_refused(entry: Awkward, verify: bool) -> None:
    outcome = examine(entry)[verify]
    problem = _problem(entry, outcome)
    assert problem is None, f"{outcome.kind}, {problem}: {outcome.text}"


def _problem(entry: Awkward, outcome: Outcome) -> str | None:
    """What is not as the table says it must be."""
    if outcome.kind == "refused":
        if entry.refused is None:
            return "but it should be right"
        return None if re.search(entry.refused, outcome.text) else f"but not for {entry.refused!r}"
    if outcome.kind == "guarded":
        if entry.guarded is None:
            return "but no guard should be needed"
        unlike = [text for text in outcome.guards if not re.search(entry.guarded, text)]
        return f"but not for {entry.guarded!r}: {unlike[0]}" if unlike else None
    if outcome.kind == "right":
        return "but the table says it is refused" if entry.refused is not None else None
    return "silently or by accident"


def test_the_table_is_what_the_benchmark_takes() -> None:
    names = awkward_models.names()
    assert len(names) >= 100
    case = awkward_models.build("half_of_size")
    assert case.target is not None
    assert sum(p.numel() for p in case.model.parameters()) > 0
