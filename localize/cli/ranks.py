"""``localize train --nproc-per-node``: does once what all ranks would do alike, and starts them."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from localize import LocalModel
from localize.cli.building import Recipe, build
from localize.cli.loading import default_folder, is_artefact, open_artefact, writable_folder
from localize.cli.output import Output
from localize.runtime.launch import launch

_CONVERTED = "LOCALIZE_CONVERTED"  # tells the ranks where the model is that was converted for them


def train_on_ranks(
    recipe: Recipe, out: Output, output: Path | None, force: bool, processes: int, max_restarts: int
) -> int:
    """Runs this very command on so many ranks; returns its exit status.

    A MODEL is converted here and handed on as an artefact, so that each rank gives memory to its own parts only. It
    lies beside the folder that the trained one goes to, as long as the ranks run.

    Raises:
        LocalizeError: whatever is wrong with the data, the model or the flags of its conversion.
    """
    data = recipe.load_data()  # so that the ranks do not all fetch it
    command = ["localize", *sys.argv[1:]]
    if any(map(is_artefact, recipe.tokens)):
        return launch(command, processes, max_restarts)
    local, name = build(recipe, data)
    out.note(str(local.plan))
    folder = output or default_folder(name, local)
    writable_folder(folder, force)
    beside = folder.parent if folder.parent.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".localize-", dir=beside) as temporary:
        converted = Path(temporary).absolute() / folder.name
        local.save(converted)
        del local
        os.environ[_CONVERTED] = str(converted)
        try:
            return launch(command, processes, max_restarts)
        finally:
            del os.environ[_CONVERTED]


def converted_for_ranks() -> tuple[LocalModel, Path] | None:
    """On a rank: the model, without memory, and the folder it goes to by default; None for one who converts it."""
    folder = os.environ.get(_CONVERTED)
    return None if folder is None else (open_artefact(folder, "meta"), Path(Path(folder).name))
