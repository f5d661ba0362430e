"""A part with its head on a device, and what it takes from and gives to whoever runs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from localize.heads.base import Head, Method, Target
from localize.part import Part
from localize.runtime.routing import Flow, flows
from localize.task import Task

Half = Literal["part", "head"]


class Updater(Protocol):
    """What happens to gradients once they are complete."""

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        """Before the stage's first backward pass; ``loss`` is detached."""

    def ready(self, stage: Stage, half: Half) -> None:
        """The gradients of the stage's part, or of its head, are complete in ``.grad``."""


@dataclass
class Stage:
    """A part with its head, on a device.

    ``autocast`` makes the context that forward passes run in; ``scale`` multiplies a loss before its backward
    (float16); ``measure`` says of a head's logits and target what the report should keep.
    """

    part: Part
    head: Head | None
    method: Method
    task: Task
    number: int
    parts: int
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    scale: Callable[[Tensor], Tensor] | None = None
    measure: Callable[[Tensor, Target], Tensor] | None = None
    flows: list[Flow] = field(init=False)
    _weights: dict[Half, list[nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        self.flows = flows(self.method, self.number, self.parts)
        heads = [] if self.head is None else list(self.head.parameters())
        self._weights = {"part": list(self.part.parameters()), "head": heads}

    @property
    def is_last(self) -> bool:
        return self.number == self.parts

    @property
    def relays_down(self) -> bool:
        """Whether gradients of the values from below are wanted there."""
        return any(flow.down is not None for flow in self.flows)

    @property
    def encodes_target(self) -> bool:
        """Whether the part above needs what the head makes."""
        return self.head is not None and self.method.encodes_target

    @property
    def keeps_classifier(self) -> bool:
        """Whether the part stops below the model's own classifier, which the head runs."""
        return self.method.splits_classifier and self.part.route.hidden is not None

    @property
    def learns_from_feedback(self) -> bool:
        return self.method.feedback == "loss" and not self.is_last and self.head is not None

    def parameters(self, half: Half) -> list[nn.Parameter]:
        """Trainable parameters of the part or of the head."""
        return [p for p in self._weights[half] if p.requires_grad]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as its backward pass wants it."""
        return loss if self.scale is None else self.scale(loss)


@dataclass(frozen=True)
class StageReport:
    """What a stage did, detached: its local loss, if any; the last part's logits; what ``Stage.measure`` gave."""

    loss: Tensor | None
    logits: Tensor | None
    measured: Tensor | None = None
