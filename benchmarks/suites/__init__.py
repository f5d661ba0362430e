"""Collections of models that the coverage benchmark and the tests take their cases from.

A suite is a module of this package with two functions: ``names()`` lists what it holds, ``build(name)`` makes one
case, seeded, with freshly initialised weights and no download.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model with a call that it takes, and how it would be trained."""

    model: nn.Module
    inputs: Any  # as `to_local` takes example inputs: a tensor, a tuple, or a dict of keyword arguments
    target: Any = None  # None: the model's own output has no task; train it on `loss`
    task: str | None = None  # a task's name; None: inferred
    loss: Callable[[Any, Any], Tensor] | None = None  # (output, target) -> mean loss; None: the task's
    refused: str | None = None  # a pattern that the TraceError's text matches, where refusing is right
