"""``localize train``: trains a model or an artefact, part by part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer

from localize import LocalModel, Trainer
from localize.cli import flags
from localize.cli import training_flags as tf
from localize.cli.building import Recipe, build, the_model
from localize.cli.exits import show_exits
from localize.cli.launching import converted_for_ranks, train_on_ranks
from localize.cli.loading import (
    check_takes,
    default_folder,
    is_artefact,
    open_artefact,
    save_into,
    writable_folder,
)
from localize.cli.optim import optimizer_factory, scheduler_factory
from localize.cli.output import Output
from localize.data import Data, Loaders, load_data
from localize.errors import ConfigError, LocalizeError
from localize.runtime.allocator import keep_freed_memory
from localize.runtime.causes import Stopped
from localize.runtime.ranks import launched

EXPECTED = 2  # exit status of an error that was told


def train(
    context: typer.Context,
    model: flags.Model,
    data: flags.DataSpec = "digits",
    method: flags.Method = "scpl",
    parts: flags.Parts = "2",
    memory_budget: flags.MemoryBudget = None,
    balance: flags.Balance = "flops",
    cuts: flags.Cuts = None,
    task: flags.Task = None,
    option: flags.MethodOptions = None,
    epochs: tf.Epochs = 5,
    batch_size: tf.BatchSize = 64,
    optimizer: tf.Optimizer = "adam",
    rate: tf.Rate = 1e-3,
    head_rate: tf.HeadRate = None,
    weight_decay: tf.WeightDecay = None,
    momentum: tf.Momentum = None,
    scheduler: tf.Scheduler = "constant",
    precision: tf.Precision = "fp32",
    clip_grad_norm: tf.ClipGradNorm = None,
    on_nonfinite: tf.OnNonfinite = "raise",
    compile: tf.Compile = False,
    device: flags.Device = None,
    seed: flags.Seed = 0,
    workers: tf.Workers = 0,
    checkpoint_dir: tf.CheckpointDir = None,
    async_checkpoint: tf.AsyncCheckpoint = None,
    resume: tf.Resume = False,
    log_dir: tf.LogDir = None,
    trace: tf.Trace = None,
    nproc_per_node: tf.Processes = None,
    max_restarts: tf.MaxRestarts = 0,
    data_parallel: tf.DataParallel = 1,
    microbatches: tf.Microbatches = 1,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    output: flags.OutputFolder = None,
    force: flags.Force = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Trains MODEL with a local-learning rule and writes the artefact folder.

    MODEL may be an artefact folder: it knows its method and parts, and the trained weights go back into it
    unless --output says otherwise. The method's own options are flags too (`localize methods NAME`).

    \b
    localize train model.py --data digits --method al --parts 4 --epochs 5
    localize train model-al-4 --data digits --scheduler cosine --lr 2e-3
    localize train model.py --data fashion-mnist --checkpoint-dir runs/a --resume
    localize train model.py --data digits --parts 2 --nproc-per-node 2
    localize train model.py --data digits --parts 2 --nproc-per-node 4 --data-parallel 2
    """
    if nproc_per_node is not None and not launched():
        out = Output.of(as_json, quiet)
        raise typer.Exit(train_on_ranks(Recipe.of(context), out, output, force, nproc_per_node, max_restarts))
    keep_freed_memory()
    out = Output.of(as_json, quiet or not _first())
    with _told_once():
        if resume and checkpoint_dir is None:
            raise ConfigError(
                "--resume needs --checkpoint-dir, the folder that holds the checkpoint to go on from."
            )
        if epochs < 1:
            raise ConfigError(f"--epochs is {epochs}; it must be at least 1.")
        settings: dict[str, Any] = {
            "optimizer": optimizer_factory(optimizer, rate, weight_decay, momentum),
            "head_optimizer": None if head_rate is None else optimizer_factory("adam", head_rate),
            "scheduler": scheduler_factory(scheduler, epochs),
            "device": device,
            "precision": precision,
            "seed": seed,
            "checkpoint_dir": checkpoint_dir,
            "async_checkpoint": async_checkpoint,
            "log_dir": log_dir,
            "trace": trace,
            "clip_grad_norm": clip_grad_norm,
            "on_nonfinite": on_nonfinite,
            "compile": compile,
            "data_parallel": data_parallel,
            "microbatches": microbatches,
            "progress": None if out.mode == "table" else False,
            "executor": "distributed" if launched() else "sequential",
        }
        if output is not None:
            writable_folder(output, force)
        chosen = load_data(data, data_dir, download)
        local, folder = _open(Recipe.of(context), chosen, out)
        folder = output or folder
        writable_folder(folder, force)
        check_takes(local, data, chosen)
        trainer = Trainer(local, **settings)
    _run(out, trainer, local, chosen.loaders(batch_size, seed, workers), epochs, resume, folder)


def _first() -> bool:
    """Whether this process speaks: the only one, or the first of several."""
    return not launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def _told_once() -> Iterator[None]:
    """Around what goes wrong on all processes alike: the first one says so."""
    try:
        yield
    except LocalizeError as error:
        if _first():
            raise
        raise typer.Exit(EXPECTED) from error


def _open(recipe: Recipe, data: Data, out: Output) -> tuple[LocalModel, Path]:
    """The model to train and the folder for it: an artefact as it is, anything else converted first."""
    artefacts = [token for token in recipe.tokens if is_artefact(token)]
    torch.manual_seed(recipe.seed)  # for what an artefact's model draws and no file has, as before its conversion
    if not artefacts:
        if (ready := converted_for_ranks()) is not None:
            return ready
        local, name = build(recipe, data)
        out.note(str(local.plan))
        return local, default_folder(name, local)
    given = [*recipe.given, *(token for token in recipe.tokens if token.startswith("--"))]
    if given:
        raise ConfigError(
            f"{artefacts[0]} is converted already; {', '.join(given)} would need the model itself: "
            "`localize train MODEL` or `localize convert MODEL`."
        )
    folder = the_model(recipe.tokens)
    # A process of several reads the weights of its own parts only, when training starts.
    return open_artefact(folder, "meta" if launched() else None), Path(folder)


def _run(
    out: Output,
    trainer: Trainer,
    local: LocalModel,
    loaders: Loaders,
    epochs: int,
    resume: bool,
    folder: Path,
) -> None:
    train_loader, val_loader = loaders
    start = time.perf_counter()
    try:
        trainer.fit(train_loader, val_loader, epochs=epochs, resume=resume)
        out.note(f"{epochs} epochs with {local.method.name} in {time.perf_counter() - start:.1f} s")
        scores = trainer.evaluate(val_loader)
    except Stopped as stopped:
        if stopped.tells:
            raise
        raise typer.Exit(EXPECTED) from stopped  # the rank that failed has said why
    if not _first():
        return
    save_into(local, folder)
    brief = show_exits(out, local, scores)
    out.note(f"Wrote {folder}/")
    out.result({"folder": folder, "history": trainer.history, "evaluation": scores}, brief=brief)
