"""What a ``Trainer`` was asked to do, checked once and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from localize.errors import ConfigError, problem_list
from localize.heads.base import one_of, positive
from localize.model import OptimizerFactory
from localize.runtime import checkpoint, recording
from localize.runtime.batches import SplitBatch
from localize.runtime.precision import check_precision
from localize.runtime.stage import StageReport
from localize.runtime.update import OnNonfinite

SchedulerFactory = Callable[[Optimizer], LRScheduler]
StepCallback = Callable[[int, list[StageReport]], object]
Gather = Literal["first", "all", "none"]

EXECUTORS = ("sequential", "distributed")


@dataclass(frozen=True)
class Options:
    """See ``Trainer``.

    Raises:
        ConfigError: values that make no sense, all at once.
    """

    optimizer: OptimizerFactory
    head_optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    precision: str
    executor: str
    seed: int
    checkpoint_dir: Path | None
    log_dir: Path | None
    clip_grad_norm: float | None
    on_nonfinite: OnNonfinite
    compile: bool
    split_batch: SplitBatch
    checkpoint_every: int | None
    progress: bool | None
    on_step: StepCallback | None
    gather: Gather = "first"
    trace: Path | None = None
    data_parallel: int = 1
    async_checkpoint: bool | None = None
    microbatches: int = 1

    def __post_init__(self) -> None:
        problems = [
            _factory("optimizer", self.optimizer, "partial(torch.optim.Adam, lr=1e-3)"),
            _factory("head_optimizer", self.head_optimizer, "partial(torch.optim.Adam, lr=1e-4)"),
            _factory("scheduler", self.scheduler, "partial(CosineAnnealingLR, T_max=epochs)"),
            check_precision(self.precision),
            one_of("executor", self.executor, EXECUTORS),
            one_of("gather", self.gather, get_args(Gather)),
            _whole("seed", self.seed, 0),
            _whole("data_parallel", self.data_parallel, 1),
            _whole("microbatches", self.microbatches, 1),
            one_of("on_nonfinite", self.on_nonfinite, get_args(OnNonfinite)),
        ]
        if self.trace is not None:
            problems.append(recording.problem(self.trace))
        if self.checkpoint_every is not None:
            problems.append(_whole("checkpoint_every", self.checkpoint_every, 1))
            if self.checkpoint_dir is None:
                problems.append("checkpoint_every needs checkpoint_dir, the folder to write to.")
        if self.async_checkpoint not in (None, True, False):
            problems.append(f"async_checkpoint={self.async_checkpoint!r} is not True, False or None.")
        elif self.async_checkpoint and self.checkpoint_dir is None:
            problems.append("async_checkpoint needs checkpoint_dir, the folder to write to.")
        if self.data_parallel != 1 and self.executor == "sequential":
            problems.append("data_parallel takes several processes: executor='distributed' (--nproc-per-node).")
        if self.clip_grad_norm is not None:
            problems.append(positive("clip_grad_norm", self.clip_grad_norm))
        found = [problem for problem in problems if problem]
        if found:
            raise ConfigError(problem_list("These options of Trainer make no sense", found))

    def saves_beside(self, device: torch.device) -> bool:
        """Whether a thread writes checkpoints while training on ``device`` goes on."""
        return device.type != "cpu" if self.async_checkpoint is None else self.async_checkpoint

    def check_fit(self, epochs: int, resume: bool) -> None:
        """Checks what ``fit`` is given.

        Raises:
            ConfigError: the arguments make no sense, or a new run would overwrite an older run's checkpoints.
        """
        folder = self.checkpoint_dir
        problems = [_whole("epochs", epochs, 1)]
        if resume and folder is None:
            problems.append("resume=True needs checkpoint_dir, the folder that holds the checkpoints.")
        if not resume and folder is not None and checkpoint.any_in(folder):
            problems.append(
                f"{folder} holds the checkpoints of an earlier run: pass resume=True to go on with it, or another "
                "checkpoint_dir to begin anew."
            )
        found = [problem for problem in problems if problem]
        if found:
            raise ConfigError(problem_list("Trainer.fit cannot start", found))


def _factory(name: str, value: object, example: str) -> str | None:
    if value is None and name != "optimizer":
        return None
    if callable(value) and not isinstance(value, Optimizer | LRScheduler):
        return None
    return f"{name} must be a callable that makes one, such as {example}; got a {type(value).__name__}."


def _whole(name: str, value: object, least: int) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return None
    return f"{name}={value!r} is not an integer of at least {least}."
