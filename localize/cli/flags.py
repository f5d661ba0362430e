"""The flags that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

METHOD_FLAGS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of commands that take a method's options as flags (``--temperature 0.1``)."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py, file.py:name, package.module:name, 'torchvision:resnet18?num_classes=10', timm:…, "
        "transformers:…; for inspect and train also an artefact folder.",
        show_default=False,
    ),
]
Method = Annotated[
    str, typer.Option("--method", "-m", help="The local-learning rule; `localize methods` lists them.")
]
Parts = Annotated[
    str,
    typer.Option(
        "--parts", "-k", metavar="N", help="How many parts, or auto: as few as --memory-budget allows."
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        help="For --parts auto: what one part may take at the example's batch size, as 8GB or 500MB.",
        metavar="SIZE",
    ),
]
Balance = Annotated[
    str, typer.Option(help="What to balance: flops, memory, activations, params or time.", metavar="COST")
]
Cuts = Annotated[
    str | None,
    typer.Option(help="Where to cut instead: names after which to cut, with commas.", metavar="NAMES"),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="classification, causal_lm, segmentation or regression; inferred from the output if left out."
    ),
]
Tied = Annotated[str, typer.Option(help="Tied weights: colocate (in one part) or untie (copies).")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-O", help="An option of the method, also as a flag of its own.", metavar="NAME=VALUE"
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        help="Shape of one input without the batch: 1x8x8, or 64:int64 for token ids.", metavar="SHAPE"
    ),
]
DataSpec = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        metavar="DATA",
        help="digits, mnist, fashion-mnist, cifar10, imagefolder:DIR, csv:FILE, text:FILE or file.py:name.",
    ),
]
ExampleData = Annotated[
    str | None,
    typer.Option("--data", "-d", metavar="DATA", help="Take the example inputs from this data set."),
]
DataDir = Annotated[Path, typer.Option(help="Where mnist, fashion-mnist and cifar10 lie.", metavar="DIR")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a missing data set.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps …", metavar="DEVICE")]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="The artefact folder to write.", metavar="FOLDER")
]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that holds something else.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the essential: a path, an accuracy.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, data order and training steps.")]
