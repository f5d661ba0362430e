"""``localize evaluate``: loss and accuracy of every exit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from localize import Trainer
from localize.cli import flags
from localize.cli.exits import show_exits
from localize.cli.loading import check_takes, open_artefact
from localize.cli.output import Output
from localize.data import load_data


def evaluate(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="An artefact folder.", show_default=False)],
    data: flags.DataSpec = "digits",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples at a time.")] = 256,
    device: flags.Device = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Evaluates the artefact in FOLDER on the validation half of a data set, exit by exit.

    \b
    localize evaluate model-al-4 --data digits
    """
    out = Output.of(as_json, quiet)
    local = open_artefact(folder)
    chosen = load_data(data, data_dir, download)
    check_takes(local, data, chosen)
    _, loader = chosen.loaders(batch_size)
    trainer = Trainer(local, optimizer=torch.optim.SGD, device=device)  # never stepped
    scores = trainer.evaluate(loader)
    brief = show_exits(out, local, scores)
    out.result({"folder": folder, "data": data, "evaluation": scores}, brief=brief)
