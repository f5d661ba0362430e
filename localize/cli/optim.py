"""Optimizers and schedules by name, as the factories that ``Trainer`` takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from localize.errors import ConfigError, did_you_mean
from localize.model import OptimizerFactory
from localize.runtime.options import SchedulerFactory

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
_COSINE_FLOOR = 0.01  # of the first rate: 1e-3 → 1e-5, as SCPL's paper has it
SCHEDULERS = ("constant", "linear", "cosine")


def optimizer_factory(
    name: str, rate: float, weight_decay: float | None = None, momentum: float | None = None
) -> OptimizerFactory:
    """``adam``, ``adamw``, ``sgd`` (Nesterov where there is momentum) or ``rmsprop``.

    Raises:
        ConfigError: an unknown optimizer, or a number out of range.
    """
    if name not in _OPTIMIZERS:
        raise ConfigError(
            f"Unknown optimizer {name!r}.{did_you_mean(name, _OPTIMIZERS)} Optimizers: {', '.join(_OPTIMIZERS)}."
        )
    options: dict[str, Any] = {"lr": rate}
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    if momentum is not None:
        if name not in ("sgd", "rmsprop"):
            raise ConfigError(f"--momentum is for sgd and rmsprop; {name} has none.")
        options["momentum"] = momentum
        if name == "sgd" and momentum > 0:
            options["nesterov"] = True
    for option, value in options.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{option} is {value}; it must be a number of at least 0.")
    return partial(_OPTIMIZERS[name], **options)


def scheduler_factory(name: str, epochs: int) -> SchedulerFactory | None:
    """``constant`` (None), ``linear`` to 0 or ``cosine`` to a hundredth, over ``epochs`` steps of one epoch.

    Raises:
        ConfigError: an unknown schedule.
    """
    if name == "constant":
        return None
    if name == "linear":
        return partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=max(1, epochs))
    if name == "cosine":
        return partial(_cosine, epochs=max(1, epochs))
    raise ConfigError(
        f"Unknown scheduler {name!r}.{did_you_mean(name, SCHEDULERS)} Schedulers: {', '.join(SCHEDULERS)}."
    )


def _cosine(optimizer: Optimizer, epochs: int) -> lr_scheduler.LRScheduler:
    floor = min(group["lr"] for group in optimizer.param_groups) * _COSINE_FLOOR
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=floor)
