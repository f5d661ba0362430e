"""Isolated losses for training loops that are not ours: one ``sum(losses).backward()`` does it.

The gradients are those of the very stage function that ``train_step`` runs, so both agree bit for bit, and
memory is released part by part here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localize.heads.base import Target
from localize.part import Stream, kind_of
from localize.runtime.messages import Upward
from localize.runtime.routing import last_loss
from localize.runtime.sequential import run_batch
from localize.runtime.stage import Half, Stage
from localize.runtime.update import Collector


class _Routed(torch.autograd.Function):
    """A loss's value whose backward hands out gradients that are known already, times the incoming one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * scale.to(grad.dtype) for grad in ctx.grads)


class _QuietCollector(Collector):
    """Keeps the hooks on parameters out of the parts' own backward passes.

    They act on the gradients that the returned scalars hand out: once, and on what the caller makes of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks: dict[nn.Parameter, list[tuple[dict[int, Any], dict[int, Any]]]] = {}

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        super().begin(stage, loss)
        for parameter in (*stage.parameters("part"), *stage.parameters("head")):
            tables = [getattr(parameter, name) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
            self._hooks.setdefault(parameter, [(table, dict(table)) for table in tables if table])
            for table, _ in self._hooks[parameter]:
                table.clear()  # in place: autograd holds the very table

    def ready(self, stage: Stage, half: Half) -> None:
        super().ready(stage, half)
        for parameter in stage.parameters(half):
            self._loud(parameter)

    def restore(self) -> None:
        super().restore()
        for parameter in list(self._hooks):
            self._loud(parameter)

    def _loud(self, parameter: nn.Parameter) -> None:
        for table, hooks in self._hooks.pop(parameter, ()):
            table.update(hooks)


def isolated_losses(stages: Sequence[Stage], stream: Stream, target: Target) -> list[Tensor]:
    """One scalar a part. Its backward reaches the part's head and the parts for which it is the farthest loss."""
    collector = _QuietCollector()
    try:
        reports = run_batch(stages, [Upward(stream, target)], collector)
    finally:
        collector.restore()
    owned: dict[int, list[nn.Parameter]] = {stage.number: stage.parameters("head") for stage in stages}
    for stage in stages:
        farthest = last_loss(stage.method, stage.number, stage.parts)
        if farthest is not None:
            owned[farthest] = owned[farthest] + stage.parameters("part")
    result = []
    for stage, report in zip(stages, reports, strict=True):
        known = [p for p in owned[stage.number] if p in collector.grads]
        value = torch.zeros((), device=kind_of(stage.part)[0]) if report.loss is None else report.loss
        if known:
            result.append(_Routed.apply(value, [collector.grads[p] for p in known], *known))
        else:
            result.append(value.requires_grad_() if torch.is_grad_enabled() else value)
    return result
