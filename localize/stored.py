"""The file that an artefact's weights are in: read as a whole, or tensor by tensor, later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from localize.errors import CheckpointError
from localize.model import LocalModel
from localize.planfile import PLAN
from localize.weights import Shape

WEIGHTS = "weights.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; takes no memory to speak of."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(folder: Path, sha256: str) -> dict[str, Tensor]:
    """Reads ``weights.safetensors``, whose digest must be ``sha256``.

    Raises:
        CheckpointError: it is missing, truncated or changed.
    """
    with _told(folder / WEIGHTS):
        tensors = load_file(folder / WEIGHTS)
    _check_digest(folder / WEIGHTS, sha256)
    return tensors


def read_shapes(folder: Path, sha256: str) -> dict[str, Shape]:
    """The shapes of what is in ``weights.safetensors``, by name; like ``read_weights``, without the memory.

    Raises:
        CheckpointError: it is missing, truncated or changed.
    """
    with opened(folder / WEIGHTS) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _check_digest(folder / WEIGHTS, sha256)
    return shapes


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file as safetensors gives it: ``keys()``, ``get_tensor(name)`` and so on.

    Raises:
        CheckpointError: it is missing or truncated.
    """
    with _told(path), safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {WEIGHTS}; save the model again.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); restore it from a copy.") from error


def _check_digest(path: Path, sha256: str) -> None:
    if digest(path) != sha256:
        raise CheckpointError(f"{path} is damaged: its digest is not the one in {PLAN}; restore it from a copy.")


# -------------------------------------------------------------------- weights that have not been read yet


def postpone(local: LocalModel, path: Path) -> None:
    """Notes where the values are of those of the model's tensors that are on the meta device."""
    local.__dict__["_weights_file"] = path.resolve()


def postponed(local: LocalModel) -> Path | None:
    """Where these values are; None where nobody has said."""
    path: Path | None = local.__dict__.get("_weights_file")
    return path
