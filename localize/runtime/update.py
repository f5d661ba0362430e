"""What happens to gradients once they are complete: an optimizer step, or being handed to the caller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localize.errors import ConfigError, LocalizeError
from localize.runtime.stage import Half, Stage

OnNonfinite = Literal["raise", "skip"]
_HALVES: tuple[Half, Half] = ("part", "head")


class Collector:
    """Takes gradients out of ``.grad`` and keeps them, by parameter; leaves earlier gradients as they were."""

    def __init__(self) -> None:
        self.grads: dict[nn.Parameter, Tensor] = {}
        self._earlier: dict[nn.Parameter, Tensor] = {}

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        for half in _HALVES:
            for parameter in stage.parameters(half):
                if parameter.grad is not None:
                    self._earlier[parameter], parameter.grad = parameter.grad, None

    def ready(self, stage: Stage, half: Half) -> None:
        for parameter in stage.parameters(half):
            if parameter.grad is not None:
                self.grads[parameter], parameter.grad = parameter.grad, None

    def restore(self) -> None:
        """Puts back the gradients that were there before."""
        for parameter, grad in self._earlier.items():
            parameter.grad = grad


class OptimizerSteps:
    """Steps each optimizer as soon as the gradients of all its parameters are complete.

    Args:
        stages: all stages that the optimizers may belong to.
        optimizers: any grouping of the parts' and heads' parameters.
        clip_grad_norm: largest norm of the gradients of one optimizer's parameters (part and head, as a rule).
        on_nonfinite: ``raise`` stops at a loss that is not finite, before any update of that part; ``skip``
            leaves out the update of parameters whose gradients are not finite.
        keep_grads: leave gradients in ``.grad`` after the update.
        scalers: per optimizer, for float16; optimizers may share one. Gradients that overflowed are not an error
            then: the update is left out and ``finish`` lowers the scale.

    Raises:
        ConfigError: an optimizer holds parameters of neither part nor head.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        optimizers: Sequence[Optimizer],
        *,
        clip_grad_norm: float | None = None,
        on_nonfinite: OnNonfinite | None = None,
        keep_grads: bool = True,
        scalers: Sequence[torch.amp.GradScaler | None] | None = None,
    ) -> None:
        self.optimizers = list(optimizers)
        self.clip_grad_norm, self.on_nonfinite, self.keep_grads = clip_grad_norm, on_nonfinite, keep_grads
        self.scalers = list(scalers) if scalers is not None else [None] * len(self.optimizers)
        self.grad_norms: dict[int, float] = {}  # by optimizer, of the current step
        self.skipped: list[int] = []  # numbers of the parts whose update was left out in the current step
        self._needs = members(stages, self.optimizers)
        self._missing: list[set[tuple[int, Half]]] = []
        self._scaled: list[torch.amp.GradScaler] = []  # those that unscaled gradients in the current step
        self.start()

    def start(self) -> None:
        """Before each batch."""
        self._missing = [set(needs) for needs in self._needs]
        self.grad_norms, self.skipped, self._scaled = {}, [], []

    def finish(self) -> None:
        """After each batch: adapts the loss scales of float16, each once, whatever number of optimizers share it."""
        for scaler in self._scaled:
            scaler.update()

    def release(self) -> None:
        """Drops all gradients, at the end of training."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        if loss is not None and self.on_nonfinite == "raise" and not math.isfinite(float(loss)):
            raise LocalizeError(
                f"The loss of part {stage.number} of {stage.parts} is {float(loss)}; no update of this part was made. "
                "Lower the learning rate, clip gradients (clip_grad_norm=1.0), or pass on_nonfinite='skip'."
            )
        for half in _HALVES:
            for parameter in stage.parameters(half):
                parameter.grad = None

    def ready(self, stage: Stage, half: Half) -> None:
        for index, missing in enumerate(self._missing):
            if (stage.number, half) in missing:
                missing.discard((stage.number, half))
                if not missing:
                    self._step(index, stage)

    def _step(self, index: int, stage: Stage) -> None:
        optimizer, scaler = self.optimizers[index], self.scalers[index]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            scaler = None  # a scaler refuses an optimizer that nothing was scaled for
        if scaler is not None:
            scaler.unscale_(optimizer)
            if not any(scaler is other for other in self._scaled):
                self._scaled.append(scaler)
        apply = True
        if parameters and (
            self.clip_grad_norm is not None or self.on_nonfinite == "skip" or scaler is not None
        ):
            limit = math.inf if self.clip_grad_norm is None else self.clip_grad_norm
            norm = float(nn.utils.clip_grad_norm_(parameters, limit))
            self.grad_norms[index] = norm
            apply = math.isfinite(norm)
            if not apply and self.on_nonfinite == "raise" and scaler is None:
                raise LocalizeError(
                    f"The gradient norm of part {stage.number} of {stage.parts} is {norm}; its update was not made. "
                    "Lower the learning rate or pass on_nonfinite='skip'."
                )
        if scaler is not None:
            scaler.step(optimizer)
        elif apply:
            optimizer.step()
        if not apply:
            self.skipped.append(stage.number)
        if not self.keep_grads:
            optimizer.zero_grad(set_to_none=True)


def members(stages: Sequence[Stage], optimizers: Sequence[Optimizer]) -> list[set[tuple[int, Half]]]:
    """By optimizer: the halves of the stages that its parameters belong to.

    Raises:
        ConfigError: an optimizer holds parameters of neither part nor head.
    """
    owner: dict[int, tuple[int, Half]] = {}
    for stage in stages:
        for half in _HALVES:
            module: nn.Module | None = stage.part if half == "part" else stage.head
            for parameter in module.parameters() if module is not None else []:
                owner[id(parameter)] = (stage.number, half)
    needs: list[set[tuple[int, Half]]] = []
    for index, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        unknown = [tuple(p.shape) for p in parameters if id(p) not in owner]
        if unknown:
            raise ConfigError(
                f"Optimizer {index} of {len(optimizers)} holds {len(unknown)} parameters of neither part nor head "
                f"(shapes {unknown[:3]}); make the optimizers with local.optimizers(factory)."
            )
        needs.append({owner[id(p)] for p in parameters})
    return needs
