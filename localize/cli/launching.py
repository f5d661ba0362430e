"""``localize train --nproc-per-node``: does once what all ranks would do alike, and starts them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from localize import LocalModel
from localize.cli.building import Recipe, build
from localize.cli.loading import default_folder, is_artefact, open_artefact, writable_folder
from localize.cli.output import Output
from localize.errors import ConfigError
from localize.runtime.launch import launch

_CONVERTED = "LOCALIZE_CONVERTED"  # where ranks find the model that was converted for them


def train_on_ranks(
    recipe: Recipe, out: Output, output: Path | None, force: bool, processes: int, max_restarts: int
) -> int:
    """Runs this very command on so many ranks; returns its exit status.

    A MODEL is converted here and handed on as an artefact, so that each rank gives memory to its own parts only.

    Raises:
        LocalizeError: whatever is wrong with the data, the model or the flags of its conversion.
    """
    if output is not None:
        writable_folder(output, force)
    command = ["localize", *sys.argv[1:]]
    if any(map(is_artefact, recipe.tokens)):
        recipe.load_data()  # so that the ranks do not all fetch it
        return launch(command, processes, max_restarts)
    with _converted(recipe, out, output):
        return launch(command, processes, max_restarts)


@contextmanager
def _converted(recipe: Recipe, out: Output, output: Path | None) -> Iterator[None]:
    """While it lasts, the converted model lies beside the folder that the trained one goes to."""
    local, name = build(recipe, recipe.load_data())
    out.note(str(local.plan))
    default = default_folder(name, local)
    place = next(parent for parent in (output or default).resolve().parents if parent.is_dir())
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=".localize-", dir=place))
            folder = Path(temporary) / default.name
            local.save(folder)
        except OSError as error:
            raise ConfigError(f"The converted model cannot be handed on to the ranks: {error}.") from error
        del local
        os.environ[_CONVERTED] = str(folder)
        stack.callback(os.environ.pop, _CONVERTED)
        yield


def converted_for_ranks() -> tuple[LocalModel, Path] | None:
    """On a rank: the model, without memory, and the folder it goes to by default. None: this process converts it."""
    place = os.environ.get(_CONVERTED)
    if place is None:
        return None
    return open_artefact(place, "meta"), Path(Path(place).name)
