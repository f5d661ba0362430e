"""The flags of `localize train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Epochs = Annotated[int, typer.Option("--epochs", "-e", help="How often to go through the training data.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Samples a training step.")]
Optimizer = Annotated[str, typer.Option(help="adam, adamw, sgd or rmsprop; one for each part.")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate.")]
HeadRate = Annotated[
    float | None, typer.Option("--head-lr", help="Gives the heads an optimizer of their own, with this rate.")
]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay.")]
Momentum = Annotated[float | None, typer.Option(help="Momentum of sgd (Nesterov) and rmsprop.")]
Scheduler = Annotated[str, typer.Option(help="constant, linear or cosine, a step an epoch.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")]
ClipGradNorm = Annotated[float | None, typer.Option(help="Clip each part's gradient to this norm.")]
OnNonfinite = Annotated[str, typer.Option(help="When a loss is not finite: raise or skip.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile parts and heads (torch.compile).")]
Workers = Annotated[int, typer.Option(help="Processes that load data.")]
CheckpointDir = Annotated[
    Path | None, typer.Option(help="Where to write a checkpoint every epoch.", metavar="DIR")
]
AsyncCheckpoint = Annotated[
    bool | None,
    typer.Option(
        "--async-checkpoint/--no-async-checkpoint",
        help="Write checkpoints from a copy while training goes on; by default not on CPUs.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --checkpoint-dir.")]
Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc-per-node", metavar="K", help="Train in K processes, a part or several each (as under torchrun)."
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(help="How often to start all processes anew, from the last checkpoint, when one dies.", metavar="N"),
]
Microbatches = Annotated[
    int,
    typer.Option(
        help="Cut batches into M pieces, so that parts work at the same time where losses reach far (GPipe).",
        metavar="M",
    ),
]
DataParallel = Annotated[
    int,
    typer.Option(
        help="How many of the processes have the same parts, each with batches of its own (K is a multiple of D).",
        metavar="D",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        help="What each part did and when: a Chrome trace (.json, for ui.perfetto.dev) or a picture (.png, .svg). "
        "With --max-restarts: of all attempts.",
        metavar="FILE",
    ),
]
LogDir = Annotated[
    Path | None, typer.Option(help="Where to write the history as CSV and JSONL.", metavar="DIR")
]
