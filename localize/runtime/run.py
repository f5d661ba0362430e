"""One run of ``Trainer.fit``: epochs, steps, and what is put down after them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from localize.errors import CheckpointError, ConfigError, LocalizeError
from localize.model import LocalModel
from localize.runtime import batches, checkpoint, history, metrics, precision, seeding
from localize.runtime.nonfinite import Buffers, check_weights
from localize.runtime.options import Options
from localize.runtime.progress import ProgressBar
from localize.runtime.sequential import stages_of
from localize.runtime.stage import Stage, StageReport
from localize.runtime.state import TrainingState
from localize.runtime.update import OptimizerSteps, members
from localize.signature import Call, tensors_of, to_device


class Run:
    """Stages, what updates them, and the state that a checkpoint holds."""

    def __init__(self, local: LocalModel, options: Options, device: torch.device) -> None:
        self.local, self.options, self.device = local, options, device
        self.execute = options.executor_function()
        self.stages = stages_of(local)
        scalers = precision.install(options.precision, self.stages, device)
        for stage in self.stages:
            stage.measure = local.task.hits
        optimizers = local.optimizers(options.optimizer, options.head_optimizer)
        if not optimizers:
            raise ConfigError(
                "The model has no parameter that requires a gradient; there is nothing to train."
            )
        owners = members(self.stages, optimizers)
        by_optimizer = [scalers.get(min(owner)[0]) for owner in owners]
        self.updater = OptimizerSteps(
            self.stages,
            optimizers,
            clip_grad_norm=options.clip_grad_norm,
            on_nonfinite=options.on_nonfinite,
            # Freed and taken again each step, they cost a tenth of the time where an allocator gives memory back to
            # the system (CPU); a caching one keeps it, and gradients then take the room of the largest part only.
            keep_grads=device.type == "cpu",
            scalers=by_optimizer,
        )
        schedulers: list[LRScheduler | None] = [
            options.scheduler(optimizer) if options.scheduler else None for optimizer in optimizers
        ]
        self.state = TrainingState(
            local, optimizers, schedulers, by_optimizer, metrics.Tally(len(self.stages), device), options.seed
        )
        self.buffers = Buffers() if options.on_nonfinite == "skip" else None
        self.generators = seeding.generators(device)
        if options.checkpoint_dir is not None:
            checkpoint.pack(self.state.describe()[1])  # better now than after the first epoch

    def resume(self) -> None:
        """Goes back to the latest checkpoint, if there is one."""
        folder = self.options.checkpoint_dir
        assert folder is not None
        snapshot = checkpoint.load(folder)
        if snapshot is not None:
            self.state.restore(snapshot, str(folder))

    # ---------------------------------------------------------------- one epoch

    def train_epoch(self, train: Iterable[Any], bar: ProgressBar) -> None:
        """The batches of one epoch that are still to be done."""
        state, done = self.state, self.state.batch
        bar.start_epoch(state.epoch + 1, batches.length(train), done)
        seeding.aim(train, self.options.seed, state.epoch)
        spent, started = state.tally.seconds, time.perf_counter()
        number = 0
        for number, (inputs, target) in enumerate(self._located(train), 1):
            if number <= done:
                continue
            reports = self.step(inputs, target)
            state.tally.seconds = spent + time.perf_counter() - started
            every = self.options.checkpoint_every
            if every is not None and state.step % every == 0:
                self.save()
            bar.advance([report.loss for report in reports])
            if self.options.on_step is not None:
                self.options.on_step(state.step, reports)
        if number < done:
            raise CheckpointError(
                f"The checkpoint was made after batch {done} of epoch {state.epoch + 1}, and the loader has {number} "
                "batches only; pass the loader that the run began with."
            )

    def _located(self, train: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """The batches; errors in getting one say which."""
        pairs = batches.pairs(train, self.options.split_batch)
        number = 0
        while True:
            number += 1
            with self._place(number):
                pair = next(pairs, None)
            if pair is None:
                return
            yield pair

    def step(self, inputs: Any, target: Any) -> list[StageReport]:
        state, updater = self.state, self.updater
        with (
            self._place(state.batch + 1),
            seeding.Seeded(self.generators, seeding.derive(self.options.seed, 0, state.step)),
        ):
            self.local.task.check_target(target, tensors_of(inputs), self.local.plan.batch_axis)
            inputs, target = to_device(inputs, self.device), to_device(target, self.device)
            call = Call.of(inputs)
            stream = self.local.signature.stream(call.args, call.kwargs)
            size = batches.batch_size(inputs, target)
            del inputs, call
            updater.start()
            reports = self.execute(self.stages, stream, target, updater, self._around)
            updater.finish()
        if self.buffers is not None:
            for number in updater.skipped:
                self.buffers.put_back(number)
            self.buffers.forget()
        state.tally.add(reports, size, updater.skipped)
        state.step += 1
        state.batch += 1
        return reports

    @contextmanager
    def _around(self, stage: Stage) -> Iterator[None]:
        """Around a stage's forward pass: random numbers of its own, and a name for what goes wrong."""
        if self.buffers is not None:
            self.buffers.remember(stage)
        seed = seeding.derive(self.options.seed, stage.number, self.state.step)
        try:
            with seeding.Seeded(self.generators, seed):
                yield
        except Exception as error:
            error.add_note(f"This happened in the forward pass of part {stage.number} of {stage.parts}.")
            raise

    @contextmanager
    def _place(self, batch: int) -> Iterator[None]:
        where = f"epoch {self.state.epoch + 1}, batch {batch} (step {self.state.step + 1})"
        try:
            yield
        except LocalizeError as error:
            error.args = (f"{where[0].upper()}{where[1:]}: {error}",)
            raise
        except Exception as error:
            error.add_note(f"This happened in {where} of Trainer.fit.")
            raise

    def end_epoch(self, scores: dict[str, Any] | None, bar: ProgressBar, last: bool) -> None:
        """The epoch's row, the schedules' step, a checkpoint and the log."""
        state, options = self.state, self.options
        row = self._row(scores)
        total = sum(loss for loss in row["train_loss"] if loss is not None)
        for scheduler in state.schedulers:
            if scheduler is not None:
                _advance(scheduler, scores["loss"] if scores else total)
        state.history.append(row)
        state.epoch, state.batch = state.epoch + 1, 0
        state.tally = metrics.Tally(len(self.stages), self.device)
        if options.checkpoint_dir is not None and (options.checkpoint_every is None or last):
            self.save()
        if options.log_dir is not None:
            history.write(options.log_dir, state.history)
        bar.end_epoch(_summary(row))

    def save(self) -> None:
        """Writes a checkpoint."""
        assert self.options.checkpoint_dir is not None
        check_weights(self.stages, self.state.step)
        checkpoint.save(self.options.checkpoint_dir, self.state.snapshot())

    def _row(self, scores: dict[str, Any] | None) -> history.Row:
        state, tally = self.state, self.state.tally
        exits = scores["exits"] if scores else {}
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_loss": tally.losses(),
            "train_accuracy": tally.accuracies(),
            "val_loss": {n: score["loss"] for n, score in exits.items()},
            "val_accuracy": {n: s["accuracy"] for n, s in exits.items() if s["accuracy"] is not None},
            "lr": [float(group["lr"]) for optimizer in state.optimizers for group in optimizer.param_groups],
            "skipped": list(tally.skipped),
            "seconds": tally.seconds,
            "samples_per_second": tally.samples / tally.seconds if tally.seconds else 0.0,
        }


def _advance(scheduler: LRScheduler, loss: float) -> None:
    with warnings.catch_warnings():
        # An epoch may hold no update: all were skipped, or a resumed one was interrupted after its last batch.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()


def _summary(row: history.Row) -> str:
    losses = "loss " + " ".join("–" if loss is None else f"{loss:.3f}" for loss in row["train_loss"])
    accuracies = row["val_accuracy"] or row["train_accuracy"]
    if not accuracies:
        return losses
    kind = "val" if row["val_accuracy"] else "train"
    return f"{losses}  {kind} accuracy {' '.join(f'{value:.3f}' for value in accuracies.values())}"
