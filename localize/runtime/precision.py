"""Which precision forward passes run in, and how losses are scaled so that float16 gradients do not vanish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from localize.errors import ConfigError
from localize.heads.base import one_of
from localize.runtime.stage import Stage

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Autocast = Callable[[], AbstractContextManager[object]]


def check_precision(name: str) -> str | None:
    """The problem with a precision's name; None where there is none."""
    return one_of("precision", name, tuple(PRECISIONS))


def autocast_for(name: str, device: torch.device) -> Autocast:
    """Makes the context of forward passes; weights, gradients and optimizer state stay as they are (float32).

    Raises:
        ConfigError: an unknown precision, or one that the device does not have.
    """
    problem = check_precision(name)
    if problem:
        raise ConfigError(problem)
    dtype = PRECISIONS[name]
    if dtype is None:
        return nullcontext
    autocast = partial(torch.autocast, device.type, dtype=dtype)
    try:
        autocast()
    except RuntimeError as error:
        raise ConfigError(f"precision={name!r} does not work on {device}: {error}. Use 'fp32'.") from error
    return autocast


def install(name: str, stages: Sequence[Stage], device: torch.device) -> dict[int, torch.amp.GradScaler]:
    """Sets precision and loss scale of all stages; returns the scalers by part, none unless float16.

    Where a loss trains its own part only, each part has a scaler of its own: an overflow in one part costs the
    others nothing. Where losses reach several parts, gradients of several losses meet, so all share one scale.
    """
    autocast = autocast_for(name, device)
    for stage in stages:
        stage.autocast, stage.scale = autocast, None
    if PRECISIONS[name] is not torch.float16:
        return {}
    together = stages[0].method.reach_in(len(stages)) > 1
    shared = torch.amp.GradScaler(device.type)
    scalers = {s.number: shared if together else torch.amp.GradScaler(device.type) for s in stages}
    for stage in stages:
        stage.scale = scalers[stage.number].scale
    return scalers
