"""One run of ``Trainer.fit``: epochs, steps, and what is put down after them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from localize.errors import CheckpointError, ConfigError, LocalizeError
from localize.model import LocalModel
from localize.runtime import batches, checkpoint, history, metrics, micro, precision, seeding
from localize.runtime.messages import Upward
from localize.runtime.nonfinite import Buffers, check_weights
from localize.runtime.options import Options
from localize.runtime.progress import ProgressBar
from localize.runtime.recording import Recorder, Watched, write
from localize.runtime.saver import Saver
from localize.runtime.sequential import Outside, run_batch, stages_of
from localize.runtime.stage import Stage, StageReport
from localize.runtime.state import TrainingState
from localize.runtime.step import HEAD
from localize.runtime.update import OptimizerSteps, members
from localize.signature import Call, tensors_of, to_device


class Run:
    """Stages, what updates them, and the state that a checkpoint holds."""

    reports = True  # whether this process writes the log

    def __init__(self, local: LocalModel, options: Options, device: torch.device) -> None:
        self.local, self.options, self.device = local, options, device
        micro.check(local, options.microbatches)
        self.stages = self._stages()
        scalers = precision.install(options.precision, self.stages, device)
        for stage in self.stages:
            stage.measure = local.task.hits
        if not any(parameter.requires_grad for parameter in local.parameters()):
            raise ConfigError(
                "The model has no parameter that requires a gradient; there is nothing to train."
            )
        optimizers = self._optimizers()
        owners = members(self.stages, optimizers)
        by_optimizer = [scalers.get(min(owner)[0]) for owner in owners]
        self.updater = OptimizerSteps(
            self.stages,
            optimizers,
            clip_grad_norm=options.clip_grad_norm,
            on_nonfinite=options.on_nonfinite,
            # Freed and taken again each step, they cost time where an allocator gives memory back to the system (CPU);
            # a caching one keeps it, and gradients then take the room of the largest part only.
            keep_grads=device.type == "cpu",
            scalers=by_optimizer,
        )
        schedulers: list[LRScheduler | None] = [
            options.scheduler(optimizer) if options.scheduler else None for optimizer in optimizers
        ]
        tally, seed, pieces = metrics.Tally(len(local.parts), device), options.seed, options.microbatches
        self.state = TrainingState(local, optimizers, schedulers, by_optimizer, tally, seed, pieces)
        self.buffers = Buffers() if options.on_nonfinite == "skip" else None
        self.generators = seeding.generators(device)
        self.recorder = Recorder(device, options.trace) if options.trace is not None else None
        self.saver = Saver(options.saves_beside(device))
        if options.checkpoint_dir is not None:
            checkpoint.pack(self.state.describe()[1])  # better now than after the first epoch

    def _stages(self) -> list[Stage]:
        """The stages of this process, lowest first."""
        return stages_of(self.local)

    def _optimizers(self) -> list[Optimizer]:
        return self.local.optimizers(self.options.optimizer, self.options.head_optimizer)

    def resume(self) -> None:
        """Goes back to the latest checkpoint, if there is one."""
        folder = self.options.checkpoint_dir
        assert folder is not None
        held = self.state.held
        # What belongs to a parameter is wanted where the parameter is.
        snapshot = checkpoint.load(folder, None if held is None else held.__contains__)
        if snapshot is not None:
            self.state.restore(snapshot, str(folder), self.reports)

    # ---------------------------------------------------------------- one epoch

    def train_epoch(self, train: Iterable[Any], bar: ProgressBar) -> None:
        """The batches of one epoch that are still to be done."""
        state = self.state
        spent, started = state.tally.seconds, time.perf_counter()
        bar.start_epoch(state.epoch + 1, self._length(train), state.batch)
        for reports in self._steps(train):
            state.tally.seconds = spent + time.perf_counter() - started
            self.saver.check()
            every = self.options.checkpoint_every
            if every is not None and state.step % every == 0:
                self.save()
            bar.advance(self._losses(reports))
            if self.options.on_step is not None:
                self.options.on_step(state.step, reports)

    def _length(self, train: Iterable[Any]) -> int | None:
        """Steps of an epoch, where known."""
        return batches.length(train)

    @property
    def _draw(self) -> tuple[int, int]:
        """The batch that random numbers are for, by step and replica: no two batches of a run have the same."""
        return self.state.step, 0

    def _losses(self, reports: Sequence[StageReport]) -> Sequence[Tensor | float | None]:
        """What the progress bar shows, part by part."""
        return [report.loss for report in reports]

    def _steps(self, train: Iterable[Any]) -> Iterator[list[StageReport]]:
        """Takes the epoch's steps from where it stands; yields after each."""
        state, done = self.state, self.state.batch
        seeding.aim(train, self.options.seed, state.epoch)
        number = 0
        for number, (inputs, target) in enumerate(self._located(train), 1):
            if number > done:
                yield self.step(inputs, target)
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
        """One batch, as the loader gives it."""
        with self._step_place():
            self.local.check_target(target, tensors_of(inputs))
            inputs, target = to_device(inputs, self.device), to_device(target, self.device)
            call = Call.of(inputs)
            stream = self.local.signature.stream(call.args, call.kwargs)
            size = batches.batch_size(inputs, target)
            del inputs, call
            pieces = micro.split(self.local, Upward(stream, target), self.options.microbatches)
            return self.carry_out(pieces, size, len(pieces))

    @contextmanager
    def _step_place(self) -> Iterator[None]:
        """Around a whole step: random numbers of its own, and a name for what goes wrong."""
        seed = seeding.derive(self.options.seed, 0, *self._draw)
        with self._place(self.state.batch + 1), seeding.Seeded(self.generators, seed):
            yield

    def carry_out(self, arrived: Iterable[Upward], size: int, microbatches: int) -> list[StageReport]:
        """One batch of ``size`` samples through the stages; one report a part.

        ``arrived`` are those of its micro-batches that are here.
        """
        state, updater = self.state, self.updater
        updater.start()
        reports = self._execute(arrived, microbatches)
        updater.finish()
        if self.buffers is not None:
            for number in updater.skipped:
                self.buffers.put_back(number)
            self.buffers.forget()
        state.tally.add(reports, size, updater.skipped)
        state.step += 1
        state.batch += 1
        return reports

    def _execute(self, arrived: Iterable[Upward], microbatches: int) -> list[StageReport]:
        return self._run_batch(arrived, microbatches)

    def _run_batch(
        self, arrived: Iterable[Upward], microbatches: int, outside: Outside | None = None
    ) -> list[StageReport]:
        if self.recorder is None:
            return run_batch(self.stages, arrived, self.updater, self._around, outside, microbatches=microbatches)
        self.recorder.batch = self.state.step + 1
        updater = Watched(self.updater, self.recorder)
        reports = run_batch(self.stages, arrived, updater, self._around, outside, self.recorder, microbatches)
        self.recorder.end()
        return reports

    @contextmanager
    def _around(self, stage: Stage, number: int) -> Iterator[None]:
        """Around a forward pass: random numbers of its own, and a name for what goes wrong."""
        if self.buffers is not None and number == 0:
            self.buffers.remember(stage)
        seed = seeding.derive(self.options.seed, stage.number, *self._draw, number)
        try:
            with seeding.Seeded(self.generators, seed):
                yield
        except Exception as error:
            of = f"part {stage.number} of {stage.parts}"
            error.add_note(f"This happened in the forward pass of {f'the head of {of}' if number == HEAD else of}.")
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
        state.tally = metrics.Tally(len(self.local.parts), self.device)
        if options.checkpoint_dir is not None and (options.checkpoint_every is None or last):
            self.save()
        if options.log_dir is not None and self.reports:
            history.write(options.log_dir, state.history)
        bar.end_epoch(_summary(row))

    def save(self) -> None:
        """Writes a checkpoint, or has it written."""
        assert self.options.checkpoint_dir is not None
        check_weights(self.stages, self.state.step)
        self.saver.save(self.options.checkpoint_dir, self.state.snapshot())

    def write_trace(self) -> None:
        """What was recorded, of all processes, into a file, where it was asked for."""
        if self.recorder is None or self.options.trace is None:
            return
        everyone = self._recorded(self.recorder.plain())
        if self.reports:
            title = f"{self.local.plan.model}, {self.local.method.name}, measured"
            write(self.options.trace, everyone, title)

    def _recorded(self, own: list[list[Any]]) -> list[list[list[Any]]]:
        return [own]

    def _row(self, scores: dict[str, Any] | None) -> history.Row:
        state, tally, rates = self.state, self._tally(), self._rates()
        exits = scores["exits"] if scores else {}
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_loss": tally.losses(),
            "train_accuracy": tally.accuracies(),
            "val_loss": {n: score["loss"] for n, score in exits.items()},
            "val_accuracy": {n: s["accuracy"] for n, s in exits.items() if s["accuracy"] is not None},
            "lr": rates,
            "skipped": list(tally.skipped),
            "seconds": tally.seconds,
            "samples_per_second": tally.samples / tally.seconds if tally.seconds else 0.0,
        }

    def _tally(self) -> metrics.Tally:
        """Of all parts."""
        return self.state.tally

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for optimizer in self.state.optimizers for group in optimizer.param_groups]


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
