"""Training state on disk: a folder a checkpoint, complete or not there at all.

    checkpoint_dir/
      step-00000120/
        state.json              format, counters, which model; for reading, too
        weights.safetensors     original parameter names, and ``heads.K.…``
        optimizer.safetensors   ``<parameter name>/<entry>``: Adam's moments and the like
        trainer.pt              hyperparameters, schedules, scales, history; read with ``weights_only=True``
      step-00000180/
      latest                    the name of the newest

Several ranks write ``weights-2-of-4.safetensors`` and so on, each what it owns. Whoever reads a checkpoint reads all
of these, so that it does not matter how many ranks wrote it.

Each folder is written under another name, flushed to the disk and renamed; then ``latest`` is replaced. Whatever
happens in between, ``latest`` names a complete checkpoint. Nothing in it is unpickled freely.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from localize.errors import CheckpointError
from localize.runtime.snapshot import OPTIMIZER, TRAINER, WEIGHTS, Keep, Snapshot, read

FORMAT = 1
STATE = "state.json"
LATEST = "latest"
_PREFIX, _PARTIAL = "step-", ".partial"
_log = logging.getLogger(__name__)


# -------------------------------------------------------------------- writing


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Writes a checkpoint and makes it the latest; the one before it is kept, older ones are removed.

    Raises:
        CheckpointError: it cannot be written; what was there before is as it was.
    """
    packed = pack(snapshot.trainer)
    step = snapshot.about["step"]
    partial = folder / f".{_free_name(folder, step)}{_PARTIAL}"
    try:
        with writing(folder, step):
            clean(folder)
            partial.mkdir(parents=True)
            write(partial, snapshot, packed)
            return commit(folder, partial, snapshot.about)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clean(folder: Path) -> None:
    """Removes what a process that was killed had begun to write."""
    for leftover in folder.glob(f".{_PREFIX}*{_PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)


def partial_of(folder: Path, step: int, number: int) -> Path:
    """Where several ranks write checkpoint ``number`` (from 1) of a run, until all have done so."""
    return folder / f".{_PREFIX}{step:08d}.{number}{_PARTIAL}"


@contextmanager
def writing(folder: Path, step: int) -> Iterator[None]:
    """Says what is wrong where a checkpoint cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {folder}: {error}. "
            "The last one is intact; make room or choose another checkpoint_dir."
        ) from error


def write(partial: Path, snapshot: Snapshot, packed: bytes, shard: str = "") -> None:
    """Writes the tensors and the rest of a snapshot into a folder that is no checkpoint yet.

    ``packed`` is what ``pack`` made; ``shard`` tells the files of one rank from those of others.
    """
    for file, tensors in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.optimizer)):
        path = partial / _shard(file, shard)
        save_file({key: _alone(tensor) for key, tensor in tensors.items()}, path)
        _flush(path)
    path = partial / _shard(TRAINER, shard)
    path.write_bytes(packed)
    _flush(path)


def commit(folder: Path, partial: Path, about: dict[str, Any]) -> Path:
    """Makes a folder with all files written the latest checkpoint, and removes old ones."""
    previous = _pointed_at(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    state = {"format": FORMAT, **about, "file_bytes": sizes}
    (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    _flush(partial / STATE)
    _flush(partial)
    name = _free_name(folder, about["step"])
    os.replace(partial, folder / name)
    _point(folder, name)
    for old in _complete(folder):
        if old not in (name, previous):
            shutil.rmtree(folder / old, ignore_errors=True)
    _log.debug("wrote the checkpoint %s", folder / name)
    return folder / name


def _shard(file: str, shard: str) -> str:
    stem, _, suffix = file.partition(".")
    return f"{stem}{shard}.{suffix}"


def pack(trainer: dict[str, Any]) -> bytes:
    """The contents of ``trainer.pt``, known to be readable without running anyone's code.

    Raises:
        CheckpointError: a scheduler or an optimizer keeps objects that could only be unpickled freely.
    """
    buffer = io.BytesIO()
    try:
        torch.save(trainer, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            "The state of an optimizer or scheduler holds objects that a checkpoint does not store, since reading "
            f"them would run code: {reason}. Keep such objects out of state_dict(), or train without checkpoint_dir."
        ) from error
    return buffer.getvalue()


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in memory of its own: safetensors refuses views into shared memory."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _point(folder: Path, name: str) -> None:
    partial = folder / f".{LATEST}{_PARTIAL}"
    partial.write_text(name + "\n", encoding="utf-8")
    _flush(partial)
    _flush(folder)  # the folder's new name must be on disk before anything points at it
    os.replace(partial, folder / LATEST)
    _flush(folder)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_name(folder: Path, step: int) -> str:
    """``step-NNNNNNNN``; numbered where the step has one already, since that one may be the latest until we end."""
    name, count = f"{_PREFIX}{step:08d}", 1
    while (folder / name).exists():
        count += 1
        name = f"{_PREFIX}{step:08d}-{count}"
    return name


# -------------------------------------------------------------------- reading


def any_in(folder: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return _pointed_at(folder) is not None or bool(_complete(folder))


def load(folder: Path, keep: Keep | None = None) -> Snapshot | None:
    """The latest checkpoint; None where there is none yet.

    ``keep`` says which tensors are wanted, by name of the parameter or buffer that they belong to; of others the
    snapshot has shape and dtype only (on the meta device).

    Raises:
        CheckpointError: it is missing, damaged or of a newer version.
    """
    name = _pointed_at(folder)
    complete = _complete(folder)
    if name is None:
        if not complete:
            return None
        name = complete[-1]  # killed between the renaming and the very first `latest`
    path = folder / name
    if not path.is_dir():
        there = (
            f"there are {', '.join(complete)}; write one of these names into it"
            if complete
            else "none is there"
        )
        raise CheckpointError(f"{folder / LATEST} names {name!r}, which does not exist: {there}.")
    about = _read_state(path, complete)
    _log.debug("reading the checkpoint %s", path)
    for file, size in about["file_bytes"].items():
        found = (path / file).stat().st_size if (path / file).is_file() else 0
        if found != size:
            raise _damaged(path, f"{file} has {found} bytes instead of {size}", complete)
    try:
        return read(path, about, keep)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise _damaged(path, str(error).splitlines()[0], complete) from error


def _read_state(path: Path, complete: list[str]) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{STATE}: {error}", complete) from error
    version = about.get("format") if isinstance(about, dict) else None
    if not isinstance(version, int):
        raise _damaged(path, f"{STATE} names no format version", complete)
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}; this version reads up to {FORMAT}. Upgrade localize-torch."
        )
    if not isinstance(about.get("file_bytes"), dict):
        raise _damaged(path, f"{STATE} lacks 'file_bytes'", complete)
    return about


def _damaged(path: Path, reason: str, complete: list[str]) -> CheckpointError:
    others = [name for name in complete if name != path.name]
    advice = (
        f"To go on from an earlier one, write {others[-1]!r} into {path.parent / LATEST}."
        if others
        else "There is no other one in this folder."
    )
    return CheckpointError(f"The checkpoint {path} is truncated or damaged: {reason}. {advice}")


def _pointed_at(folder: Path) -> str | None:
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / LATEST} cannot be read: {error}.") from error


def _complete(folder: Path) -> list[str]:
    """The names of the checkpoints in a folder, oldest first."""
    return sorted(path.name for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
