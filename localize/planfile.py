"""``plan.json``: what it says, read and checked, and the example inputs as data."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from localize.errors import CheckpointError, TaskError
from localize.model import LocalModel
from localize.signature import Call
from localize.task import Task

FORMAT = 1
PLAN = "plan.json"


def describe_inputs(local: LocalModel) -> dict[str, Any]:
    """Shapes and types of the example inputs and how they are passed: enough to capture the model again."""
    signature = local.signature
    return {
        "structure": pytree.treespec_dumps(signature.spec),
        "constants": {str(i): value for i, value in signature.constants.items()},
        "tensors": [
            {"name": name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch."), "values": values}
            for name, spec, values in zip(signature.names, local.plan.inputs, local.plan.indices, strict=True)
        ],
    }


def example_from(description: dict[str, Any], model: nn.Module) -> Call:
    """A call with inputs of the described shapes: what ``describe_inputs`` came from, without the values."""
    try:
        return _example_call(description, inspect.signature(model.forward))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        raise CheckpointError(
            f"{PLAN} describes its example inputs in a way that cannot be read ({error!r}); convert the model again."
        ) from error


def _example_call(description: dict[str, Any], forward: inspect.Signature) -> Call:
    leaves: list[Any] = []
    tensors = iter(description["tensors"])
    spec = pytree.treespec_loads(description["structure"])
    for position in range(spec.num_leaves):
        if str(position) in description["constants"]:
            leaves.append(description["constants"][str(position)])
            continue
        entry = next(tensors)
        dtype = getattr(torch, entry["dtype"])
        if entry["values"] is not None:
            leaves.append(torch.tensor(entry["values"], dtype=dtype).reshape(entry["shape"]))
        else:
            generator = torch.Generator().manual_seed(0)
            leaves.append(torch.rand(entry["shape"], generator=generator).to(dtype))
    return Call.with_arguments(forward, pytree.tree_unflatten(leaves, spec))


@dataclass(frozen=True)
class PlanFile:
    """What ``plan.json`` says, checked."""

    source: str | None
    model: dict[str, Any]
    fingerprint: str
    method: str
    method_file: str | None
    options: dict[str, Any]
    task: Task
    cuts: tuple[str, ...]
    edited: bool  # the cuts were changed by hand
    custom_loss: bool
    appended: int
    frozen: tuple[str, ...]
    inputs: dict[str, Any]
    balance: str
    tied: str
    weights_sha256: str


def read_plan(folder: Path) -> PlanFile:
    """Reads and checks ``plan.json``.

    Raises:
        CheckpointError: it is missing, no JSON, lacks an entry or is of a newer version.
    """
    path = folder / PLAN
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no artefact: it has no {PLAN}. `localize convert` makes one.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Convert the model again.") from error
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path} names no format version; it was not written by localize.")
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, this version reads up to {FORMAT}; upgrade localize-torch."
        )
    kind, classes = _entry(path, content, "task.kind", str), _entry(path, content, "task.num_classes", int, None)
    cuts = _entry(path, content, "cuts", list)
    if not all(isinstance(cut, str) for cut in cuts):
        raise CheckpointError(f"{path}: the entry 'cuts' is {cuts!r}; it must be a list of names.")
    try:
        task = Task(kind, classes)
    except TaskError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return PlanFile(
        source=_entry(path, content, "source", str, None),
        model=_entry(path, content, "model", dict),
        fingerprint=_entry(path, content, "model.sha256", str),
        method=_entry(path, content, "method.name", str),
        method_file=content["method"].get("file"),
        options=_entry(path, content, "method.options", dict),
        task=task,
        cuts=tuple(cuts),
        edited=cuts != _entry(path, content, "plan.cuts", list),
        custom_loss=_entry(path, content, "task.custom_loss", bool),
        appended=_entry(path, content, "appended", int),
        frozen=tuple(_entry(path, content, "frozen", list)),
        inputs=_entry(path, content, "inputs", dict),
        balance=_entry(path, content, "plan.balance", str),
        tied=_entry(path, content, "plan.tied", str),
        weights_sha256=_entry(path, content, "weights_sha256", str),
    )


def _entry(path: Path, content: dict[str, Any], key: str, *kinds: type | None) -> Any:
    """The entry under a dotted key, which must be of one of ``kinds`` (None: may be null)."""
    value: Any = content
    for step in key.split("."):
        if not isinstance(value, dict) or step not in value:
            raise CheckpointError(f"{path} lacks the entry {key!r}; convert the model again.")
        value = value[step]
    if not any(value is None if kind is None else isinstance(value, kind) for kind in kinds):
        wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise CheckpointError(f"{path}: the entry {key!r} is {value!r}, not a {wanted}; convert the model again.")
    return value
