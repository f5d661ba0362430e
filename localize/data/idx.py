"""The IDX format of MNIST and its relatives, plain or gzipped, as a tensor."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from localize.errors import ConfigError

_UNSIGNED_BYTE = 8


def read_idx(path: Path) -> Tensor:
    """Reads one file of unsigned bytes.

    Raises:
        ConfigError: the file is not IDX, or is truncated.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); fetch the file again.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise ConfigError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4]!r}).")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start]) if len(raw) >= start else ()
    if not shape or len(raw) != start + math.prod(shape):
        raise ConfigError(
            f"{path}: {len(raw)} bytes do not hold the {'×'.join(map(str, shape)) or '?'} values its header "
            "announces; the file is truncated, fetch it again."
        )
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(shape)


def find_idx(name: str, folders: list[Path]) -> Path | None:
    """The first ``name`` or ``name.gz`` in ``folders``."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None
