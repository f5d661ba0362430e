"""From what a command is given to what the API takes: models, artefacts, example inputs, folders."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from localize import LocalModel, load
from localize.data import Data
from localize.errors import ConfigError, MethodError
from localize.hollow import lacks_values, without_values
from localize.planfile import PLAN
from localize.signature import to_device
from localize.source import Source, read_source

_EXAMPLE_BATCH = 2


def is_artefact(spec: str) -> bool:
    """Whether a MODEL is an artefact folder."""
    return (Path(spec) / PLAN).is_file()


def open_artefact(folder: str, device: str | None = None) -> LocalModel:
    """The converted model in an artefact folder; ``device`` as for ``localize.load``.

    Raises:
        ConfigError: the folder is no artefact.
        CheckpointError: it is truncated, of another model or of a newer version.
    """
    if not is_artefact(folder):
        raise ConfigError(
            f"{folder!r} is no artefact folder (it has no {PLAN}); `localize convert MODEL -o {folder}` "
            "writes one."
        )
    try:
        return load(folder, device=device)
    except MethodError as error:
        raise MethodError(f"{error} A method of your own is known after `--import FILE`.") from error


def check_takes(local: LocalModel, name: str, data: Data) -> None:
    """Raises ``ConfigError`` where the model cannot take what a data set gives, before anything is trained."""
    inputs = data.example(_EXAMPLE_BATCH)
    hollow = any(parameter.is_meta for parameter in local.parameters())
    try:
        if hollow:
            with without_values(local.buffers(), local.to_standard(), local), torch.device("meta"):
                local.predict(to_device(inputs, torch.device("meta")))
        else:
            local.predict(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if hollow and lacks_values(error):
            return
        shapes = ", ".join(
            f"{tuple(t.shape)} {t.dtype}" for t in tree_leaves(inputs) if isinstance(t, Tensor)
        )
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"The model cannot take the inputs of {name!r} ({shapes}): {type(error).__name__}: {reason}"
        ) from error


def open_model(spec: str, seed: int) -> Source:
    """The model of a MODEL spec, its weights drawn under ``seed``."""
    if is_artefact(spec):
        raise ConfigError(f"{spec!r} is an artefact, converted already; convert the model it came from.")
    torch.manual_seed(seed)
    return read_source(spec)


def example_inputs(source: Source, input_shape: str | None, data: Data | None) -> Any:
    """Example inputs in order of precedence: the shape given, the data set given, the model's file; else None."""
    if input_shape is not None:
        return shaped(input_shape)
    if data is not None:
        return data.example(_EXAMPLE_BATCH)
    return source.example_inputs


def shaped(text: str) -> Tensor:
    """An example of two samples: ``1x8x8`` of standard normal numbers, ``64:int64`` of zeros.

    Raises:
        ConfigError: not a shape, or not a dtype of torch.
    """
    sizes, _, kind = text.lower().partition(":")
    dtype = getattr(torch, kind or "float32", None)
    parts = sizes.replace("×", "x").replace(",", "x").split("x")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts) or not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"input shape {text!r}: write the sizes of one sample without the batch, as 3x224x224, and a dtype "
            "after a colon where it is not float32, as 64:int64."
        )
    shape = (_EXAMPLE_BATCH, *(int(p) for p in parts))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def part_count(text: str) -> int | Literal["auto"]:
    """``"4"`` or ``"auto"``.

    Raises:
        ConfigError: neither, or less than 1.
    """
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--parts is {text!r}; it takes a number of at least 1, or auto.")
    return int(text)


def byte_size(text: str | None) -> int | None:
    """``"8GB"`` as bytes; units are powers of 1000, or of 1024 with an i (``GiB``).

    Raises:
        ConfigError: not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        raise ConfigError(f"--memory-budget is {text!r}; it takes a size such as 8GB, 500MB or 16GiB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))


def cut_names(cuts: str | None) -> list[str] | None:
    """``"layer1, layer2"`` as a list."""
    return None if cuts is None else [name.strip() for name in cuts.split(",") if name.strip()]


def default_folder(name: str, local: LocalModel) -> Path:
    """``<name>-<method>-<parts>`` in the working directory."""
    return Path(f"{name.replace('/', '_')}-{local.method.name}-{len(local.parts)}")


def writable_folder(folder: Path, force: bool) -> bool:
    """Whether an artefact is there already, which the new one replaces.

    Raises:
        ConfigError: the folder holds something that is no artefact (and ``force`` is not given), or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; --output takes a folder.")
    if is_artefact(str(folder)):
        return True
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ConfigError(
            f"{str(folder)!r} is not empty and holds no artefact; choose another folder with --output, or write "
            "into it with --force."
        )
    return False


def save_into(local: LocalModel, folder: Path) -> None:
    """Saves the artefact; what else lies in a folder that is no artefact stays where it is."""
    if is_artefact(str(folder)) or not folder.is_dir():
        local.save(folder)
        return
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "artefact"
        local.save(fresh)
        for file in fresh.iterdir():
            os.replace(file, folder / file.name)
