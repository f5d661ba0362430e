"""``localize convert``: from a model to a plan and an artefact folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localize.cli import flags
from localize.cli.building import Recipe, build
from localize.cli.loading import default_folder, save_into, writable_folder
from localize.cli.output import Output


def convert(
    context: typer.Context,
    model: flags.Model,
    method: flags.Method = "scpl",
    parts: flags.Parts = "2",
    memory_budget: flags.MemoryBudget = None,
    balance: flags.Balance = "flops",
    cuts: flags.Cuts = None,
    task: flags.Task = None,
    input_shape: flags.InputShape = None,
    data: flags.ExampleData = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    option: flags.MethodOptions = None,
    tied: flags.Tied = "colocate",
    verify: Annotated[bool, typer.Option(help="Check that the parts compute what the model does.")] = True,
    seed: flags.Seed = 0,
    output: flags.OutputFolder = None,
    force: flags.Force = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Cuts MODEL into parts with local heads, prints the parts and writes an artefact folder.

    The method's own options are flags too (`localize methods NAME` lists them).

    \b
    localize convert model.py --method al --parts 4
    localize convert 'torchvision:resnet18?num_classes=10' --parts 3 --input-shape 3x32x32
    localize convert net.py:build_net --cuts layer1,layer3 --data cifar10 -o converted
    """
    out = Output.of(as_json, quiet)
    if output is not None:
        writable_folder(output, force)
    local, name = build(Recipe.of(context))
    folder = output or default_folder(name, local)
    replaces = writable_folder(folder, force)
    save_into(local, folder)
    out.text(str(local.plan))
    out.note(
        f"{'Replaced' if replaces else 'Wrote'} {folder}/; train it: localize train {folder} --data DATA"
    )
    out.result({"folder": folder, "plan": local.plan.to_dict(), "exits": local.exits}, brief=str(folder))
