"""``Trainer``: epochs over a ``LocalModel``, on one device or several, that can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from localize.model import LocalModel, OptimizerFactory
from localize.runtime import batches, history, seeding
from localize.runtime.options import Gather, Options, SchedulerFactory, StepCallback
from localize.runtime.progress import ProgressBar
from localize.runtime.team import Alone, Crew, Team
from localize.runtime.update import OnNonfinite

CREWS: dict[str, type[Alone] | type[Team]] = {"sequential": Alone, "distributed": Team}


class Trainer:
    """Trains a model in local-learning form, part by part.

    Args:
        local: the model; training it trains ``local.to_standard()``.
        optimizer: makes an optimizer from parameters: ``functools.partial(torch.optim.Adam, lr=1e-3)``. Called once
            a part, and once a head where the method trains heads apart.
        head_optimizer: the same for heads, which then get optimizers of their own.
        scheduler: makes a learning-rate schedule from an optimizer; stepped once an epoch.
        device: moves the model there; None leaves it where it is. ``cuda`` with ``distributed``: the GPU with the
            process's local rank, modulo their number. Tensors on the meta device get values first: here with one
            process, at ``fit`` (or ``evaluate``) with several.
        precision: ``fp32``, ``bf16`` or ``fp16``: autocast of forward passes, with loss scaling for ``fp16``.
        executor: ``sequential``: one process runs all parts. ``distributed``: under ``torchrun``, each process runs
            some of them (one, where there are as many as parts); every process makes the same calls. The first one
            reads data and shows progress; history and scores are the same on all.
        seed: of data order, augmentation and dropout, and of weights on the meta device that no artefact holds
            (``reset_parameters()``, layer by layer). Training is a function of it: nothing that the caller draws at
            random before, between or after batches changes the result.
        checkpoint_dir: where training state is written, so that ``fit(..., resume=True)`` can go on.
        log_dir: where ``history.jsonl`` and ``history.csv`` are kept up to date.
        clip_grad_norm: largest norm of the gradients of one optimizer's parameters.
        on_nonfinite: ``raise`` stops at a loss that is not finite and names the part; ``skip`` leaves out the
            update of a part whose gradients are not finite, puts its buffers back and counts it in the history.
        compile: runs parts and heads through ``torch.compile`` (from the first batch on, and for good). The
            representation below a classifier that a method splits off is not compiled.
        split_batch: batch → (inputs, target), for loaders that yield something else.
        checkpoint_every: steps between checkpoints; None: one after each epoch. One is written at the end anyway.
        progress: a bar on stderr; None: only where that is a terminal.
        on_step: called after every step with its number (from 1) and what each part reports; parts of other
            processes report nothing here. It may raise.
        gather: which processes have all weights after ``fit``, and so can save the model: the ``first``, ``all`` or
            ``none``. In the others, weights of parts that they do not run are on the meta device.
        trace: file for what every part did and when, written after ``fit``: a Chrome trace (``.json``, for
            ui.perfetto.dev) or a picture (``.png``, ``.svg``; needs matplotlib). The first 20000 intervals a process.
            Where torchrun started processes anew: of all attempts; the last second before a kill is missing.
        data_parallel: how many processes have the same parts, with ``distributed``: so many replicas take a batch
            of the loader each for one step, and update with the mean of their gradients. A rest of batches too few
            for all of them is left out. Batch norm's statistics stay those of each replica; the first one's are kept.
        async_checkpoint: whether a thread writes checkpoints while training goes on. They are copied first: that takes
            as much host memory as weights, buffers and optimizer state (of a process: its own) until they are on the
            disk. One at a time; the next one waits for it, and so does the end of ``fit``. What goes wrong is raised
            at the next step. None: only where ``device`` is no CPU, and so a copy is needed anyway.
        microbatches: into how many pieces a batch is cut for the passes through the parts (GPipe, Huang et al. 2019),
            so that a part starts on its first piece while the one below computes the next. Heads see the whole batch,
            and gradients are those of the whole batch; only layers whose samples meet (batch norm) and random ones
            (dropout) see pieces. For methods whose losses reach far it is what lets parts work at the same time.

    Attributes:
        history: a row an epoch: ``epoch`` (from 1), ``step``, ``train_loss`` (one a part; None where a part has
            none), ``train_accuracy``, ``val_loss``, ``val_accuracy`` (by exit), ``lr`` (one a parameter group),
            ``skipped`` (updates left out, by part), ``seconds`` of training and ``samples_per_second``.

    Raises:
        ConfigError: options that make no sense, all of them at once.
        PlacementError: the executor cannot run here, or nothing sets the values of tensors on the meta device (with
            several processes, ``fit`` and ``evaluate`` say the latter).
        CheckpointError: the file of the weights, which were not read yet, is gone or another one by now (likewise).
    """

    def __init__(
        self,
        local: LocalModel,
        *,
        optimizer: OptimizerFactory,
        head_optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        executor: str = "sequential",
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        log_dir: str | Path | None = None,
        clip_grad_norm: float | None = None,
        on_nonfinite: OnNonfinite = "raise",
        compile: bool = False,
        split_batch: batches.SplitBatch | None = None,
        checkpoint_every: int | None = None,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
        gather: Gather = "first",
        trace: str | Path | None = None,
        data_parallel: int = 1,
        async_checkpoint: bool | None = None,
        microbatches: int = 1,
    ) -> None:
        self.options = Options(
            optimizer=optimizer,
            head_optimizer=head_optimizer,
            scheduler=scheduler,
            precision=precision,
            executor=executor,
            seed=seed,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
            log_dir=None if log_dir is None else Path(log_dir),
            clip_grad_norm=clip_grad_norm,
            on_nonfinite=on_nonfinite,
            compile=compile,
            split_batch=split_batch or batches.split_batch,
            checkpoint_every=checkpoint_every,
            progress=progress,
            on_step=on_step,
            gather=gather,
            trace=None if trace is None else Path(trace),
            data_parallel=data_parallel,
            async_checkpoint=async_checkpoint,
            microbatches=microbatches,
        )
        self.local = local
        self.history: list[history.Row] = []
        self._crew_type: type[Alone] | type[Team] = CREWS[executor]
        self.device = self._crew_type.place(local, self.options, device)
        if compile:
            for module in [*local.parts, *(head for head in local.heads if head is not None)]:
                module.compile()

    def evaluate(self, loader: Iterable[Any]) -> dict[str, Any]:
        """Loss and accuracy of every exit, in eval mode and the trainer's precision.

        Returns:
            ``{"loss", "accuracy", "samples", "exits": {1: {"loss", "accuracy"}, …, K: …}}``; the outer two are the
            last exit's. ``accuracy`` is None for regression.

        Raises:
            ConfigError: the loader is empty, or its batches have an unknown form.
            TaskError: a target does not fit the task.
            PlacementError, CheckpointError, WireError: with several processes, as ``fit``.
        """
        with self._crew() as crew:
            return crew.evaluate(loader)

    def _crew(self) -> Crew:
        return self._crew_type(self.local, self.options, self.device)

    def fit(
        self, train: Iterable[Any], val: Iterable[Any] | None = None, epochs: int = 1, resume: bool = False
    ) -> list[history.Row]:
        """Trains until ``epochs`` epochs are done; returns ``history``.

        Without ``resume`` this is a new run, from the weights the model has now. With it, the run in
        ``checkpoint_dir`` goes on, from the middle of an epoch if need be, and ends bit for bit where it would have
        ended without the interruption; where there is no checkpoint yet, a new run starts. ``epochs`` counts from
        the beginning of the run, so that a finished run returns at once.

        With several processes, those with the first part (one a replica) read ``train``, and the first of all reads
        ``val``; the others may pass anything. Started anew by torchrun after a failure (``--max-restarts``), a run with
        a ``checkpoint_dir`` goes on from there.

        ``train`` must yield batches anew each time it is iterated, in an order that depends on torch's, Python's or
        NumPy's random numbers, or on ``set_epoch``; a resumed epoch iterates over the batches already done.

        Raises:
            ConfigError: an argument or ``LOCALIZE_TRANSPORT`` makes no sense, or the loader is empty.
            TaskError: a target does not fit the task.
            CheckpointError: the checkpoint is damaged or of another run, or cannot be written (one that a thread
                writes: told at the next step, the next checkpoint or the end). Or the file of weights that were not
                read yet is gone or another one by now.
            PlacementError: the ranks do not train the same, an earlier run of these processes failed, or tensors have
                no values.
            WireError: a message is not what was expected. ``Stopped``, a kind of it: another rank failed, and why.
            LocalizeError: a loss is not finite; the message names part, epoch and batch.
        """
        with self._crew() as crew:
            resume = resume or crew.goes_on
            self.options.check_fit(epochs, resume)
            epochs, resume, validates = crew.agreed([epochs, resume, val is not None])
            self.local.train()
            run = crew.run(resume)
            self.history = run.state.history
            with ProgressBar(epochs, self.options.progress if crew.first else False) as bar:
                while run.state.epoch < epochs:
                    with seeding.ambient(run.generators, self.options.seed, run.state.epoch):
                        run.train_epoch(train, bar)
                        scores = crew.evaluate(val or ()) if validates else None
                    run.end_epoch(scores, bar, last=run.state.epoch + 1 >= epochs)
            run.updater.release()
            crew.finish()
            run.write_trace()
        return self.history
