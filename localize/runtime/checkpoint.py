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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from localize.errors import CheckpointError
from localize.runtime.snapshot import OPTIMIZER, TRAINER, WEIGHTS, Keep, Snapshot, missing, read
from localize.weights import apart

FORMAT = 2
STATE = "state.json"
LATEST = "latest"
TOKEN = ".ranks-"  # a file that tells whether all ranks have the same folder
_PREFIX, _PARTIAL = "step-", ".partial"
_log = logging.getLogger(__name__)


# -------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Share:
    """What one process writes of a checkpoint; see ``Saver``.

    Attributes:
        number: of the checkpoint, where several processes write one: the same for all of them, and for no other.
        shard: tells the files of this process from those of others.
        last: called when this share is written; says whether all the others are, too.
    """

    number: int = 1
    shard: str = ""
    last: Callable[[], bool] = lambda: True


WHOLE = Share()


def clean(folder: Path) -> None:
    """Removes what a process that was killed had begun to write."""
    for leftover in folder.glob(f".{_PREFIX}*{_PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    for token in folder.glob(f"{TOKEN}*"):
        with suppress(OSError):
            token.unlink()


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


def partial_of(folder: Path, step: int, share: Share) -> Path:
    """Where a checkpoint is written until all shares are there; no checkpoint yet."""
    return folder / f".{_PREFIX}{step:08d}.{share.number}{_PARTIAL}"


def write(partial: Path, snapshot: Snapshot, packed: bytes, share: Share) -> None:
    """Writes a share of a checkpoint, or nothing; ``packed`` is what ``pack`` made of ``snapshot.trainer``.

    Raises:
        OSError, SafetensorError: it cannot be written; see ``writing``.
    """
    weights, optimizer, trainer = (partial / _shard(file, share) for file in (WEIGHTS, OPTIMIZER, TRAINER))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for path, tensors in ((weights, snapshot.weights), (optimizer, snapshot.optimizer)):
            save_file(apart(tensors), path)
            _flush(path)
        trainer.write_bytes(packed)
        _flush(trainer)
    except BaseException:
        with suppress(OSError):
            for path in (weights, optimizer, trainer):
                path.unlink(missing_ok=True)
            if share == WHOLE:  # else others may be about to write into it
                partial.rmdir()
        raise


def commit(folder: Path, partial: Path, about: dict[str, Any]) -> Path:
    """Makes a folder with all shares the latest checkpoint; the one before it is kept, older ones are removed.

    ``about`` goes into ``state.json``; its ``step`` names the folder, which is returned.

    Raises:
        CheckpointError: a share is missing, or the name of the latest checkpoint cannot be read.
        OSError: the folder cannot be written or renamed; see ``writing``.
    """
    previous = _pointed_at(folder)
    try:
        if lacking := missing(path.name for path in partial.iterdir()):
            raise CheckpointError(
                f"The checkpoint of step {about['step']} in {folder} lacks {', '.join(lacking)}: not all ranks wrote "
                "into this folder. The last one is intact; checkpoint_dir must be on a disk that all ranks share."
            )
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        state = {"format": FORMAT, **about, "file_bytes": sizes}
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _flush(partial / STATE)
        _flush(partial)
        name = _free_name(folder, about["step"])
        os.replace(partial, folder / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _point(folder, name)
    for old in _complete(folder):
        if old not in (name, previous):
            shutil.rmtree(folder / old, ignore_errors=True)
    _log.debug("wrote the checkpoint %s", folder / name)
    return folder / name


def _shard(file: str, share: Share) -> str:
    stem, _, suffix = file.partition(".")
    return f"{stem}{share.shard}.{suffix}"


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
    snapshot has the shape only (float32, on the meta device).

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
    if lacking := missing(about["file_bytes"]):
        raise _damaged(path, f"it lacks {', '.join(lacking)}, which other ranks wrote elsewhere", complete)
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
    if version < FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, of a development version before 0.1; this one reads {FORMAT}. Train anew."
        )
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
