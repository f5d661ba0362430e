"""What happens to gradients once they are complete: an optimizer step, or being handed to the caller."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localize.errors import ConfigError, LocalizeError
from localize.runtime.stage import Half, Stage

OnNonfinite = Literal["raise", "skip"]
_HALVES: tuple[Half, Half] = ("part", "head")
_WARNED: WeakSet[nn.Module] = WeakSet()  # parts whose lack of an optimizer was told of: once, not once a step
_log = logging.getLogger(__name__)


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
            leaves out the update of parameters whose gradients are not finite. Both read one number a part and
            step, before the update, which on a GPU waits for that part; None reads nothing.
        keep_grads: leave gradients in ``.grad`` after the update.
        spare: parameters that optimizers may hold too, and no part uses.
        scalers: per optimizer, for float16; optimizers may share one. Gradients that overflowed are not an error
            then: the update is left out and ``finish`` lowers the scale.

    Raises:
        ConfigError: an optimizer holds parameters of neither part nor head.

    Attributes:
        average: what is done with gradients of parameters before their update, where there are several replicas.
    """

    average: Callable[[Iterable[nn.Parameter]], None] | None = None

    def __init__(
        self,
        stages: Sequence[Stage],
        optimizers: Sequence[Optimizer],
        *,
        clip_grad_norm: float | None = None,
        on_nonfinite: OnNonfinite | None = None,
        keep_grads: bool = True,
        spare: Iterable[nn.Parameter] = (),
        scalers: Sequence[torch.amp.GradScaler | None] | None = None,
    ) -> None:
        self.optimizers = list(optimizers)
        self.clip_grad_norm, self.on_nonfinite, self.keep_grads = clip_grad_norm, on_nonfinite, keep_grads
        self.scalers = list(scalers) if scalers is not None else [None] * len(self.optimizers)
        self.skipped: list[int] = []  # numbers of the parts whose update was left out in the current step
        self._needs = members(stages, self.optimizers, spare)
        self._missing: list[set[tuple[int, Half]]] = []
        self._scaled: list[torch.amp.GradScaler] = []  # those that unscaled gradients in the current step
        self.start()

    def start(self) -> None:
        """Before each batch."""
        self._missing = [set(needs) for needs in self._needs]
        self.skipped, self._scaled = [], []

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
        if self.average is not None:
            self.average(stage.parameters(half))
        for index, missing in enumerate(self._missing):
            if (stage.number, half) in missing:
                missing.discard((stage.number, half))
                if not missing:
                    self._step(index, stage)

    def _step(self, index: int, stage: Stage) -> None:
        norm = self._measured(index)
        applied = self._applied(index, stage, norm)
        if not applied:
            self.skipped.append(stage.number)
        if not self.keep_grads:
            self.optimizers[index].zero_grad(set_to_none=True)

    def _measured(self, index: int) -> float | None:
        """Unscales and clips an optimizer's gradients; their norm before, None where nobody asks for it."""
        optimizer, scaler = self.optimizers[index], self.scalers[index]
        gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return None
        if scaler is not None:
            scaler.unscale_(optimizer)
            if not any(scaler is other for other in self._scaled):
                self._scaled.append(scaler)
        elif self.clip_grad_norm is None and self.on_nonfinite != "skip":
            return None
        limit = math.inf if self.clip_grad_norm is None else self.clip_grad_norm
        return float(nn.utils.clip_grad_norm_(gradients, limit))

    def _applied(self, index: int, stage: Stage, norm: float | None) -> bool:
        """Updates an optimizer's parameters unless their gradients, of this norm, are not finite."""
        optimizer, scaler = self.optimizers[index], self.scalers[index]
        finite = norm is None or math.isfinite(norm)
        if scaler is not None and norm is not None:  # a scaler refuses an optimizer that nothing was scaled for
            scaler.step(optimizer)
        elif finite:
            optimizer.step()
        elif self.on_nonfinite == "raise":
            raise LocalizeError(
                f"The gradient norm of part {stage.number} of {stage.parts} is {norm}; its update was not made. "
                "Lower the learning rate or pass on_nonfinite='skip'."
            )
        return finite


def members(
    stages: Sequence[Stage], optimizers: Sequence[Optimizer], spare: Iterable[nn.Parameter] = ()
) -> list[set[tuple[int, Half]]]:
    """By optimizer: the halves of the stages that its parameters belong to.

    What no optimizer holds is not trained: a warning names it, once.

    Raises:
        ConfigError: an optimizer holds parameters of neither part nor head.
    """
    owner: dict[int, tuple[int, Half]] = {}
    for stage in stages:
        for half in _HALVES:
            module: nn.Module | None = stage.part if half == "part" else stage.head
            for parameter in module.parameters() if module is not None else []:
                owner[id(parameter)] = (stage.number, half)
    known = {*owner, *map(id, spare)}
    needs: list[set[tuple[int, Half]]] = []
    held: set[int] = set()
    for index, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        unknown = [tuple(p.shape) for p in parameters if id(p) not in known]
        if unknown:
            raise ConfigError(
                f"Optimizer {index} of {len(optimizers)} holds {len(unknown)} parameters of neither part nor head "
                f"(shapes {unknown[:3]}); make the optimizers with local.optimizers(factory)."
            )
        needs.append({owner[id(p)] for p in parameters if id(p) in owner})
        held.update(map(id, parameters))
    _warn_of_untrained(stages, held)
    return needs


def _warn_of_untrained(stages: Sequence[Stage], held: set[int]) -> None:
    untrained = {
        f"{half} {stage.number}": stage.part
        for stage in stages
        for half in _HALVES
        if not held.issuperset(map(id, stage.parameters(half)))
    }
    if not _WARNED.issuperset(untrained.values()):
        _WARNED.update(untrained.values())
        _log.warning(
            "No optimizer holds all trainable parameters of %s; those left out are not trained. Set "
            "requires_grad=False where that is meant, or make the optimizers with local.optimizers(factory).",
            ", ".join(untrained),
        )
