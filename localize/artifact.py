"""The folder a converted model is kept in.

    plan.json             the plan, readable; the cuts may be edited by hand
    weights.safetensors   original parameter names, and ``heads.K.…``
    part_K.py             generated, for reading

Nothing in it is unpickled or executed: loading takes the model's code from where ``plan.json`` says it came from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localize.errors import CheckpointError
from localize.model import LocalModel
from localize.own_methods import describe_method, known_method
from localize.part import Part
from localize.planfile import FORMAT, PLAN, describe_inputs, example_from, read_plan
from localize.source import load_source
from localize.weights import fingerprint, freeze, frozen, named_tensors, put_weights, weights_of

_log = logging.getLogger(__name__)
WEIGHTS = "weights.safetensors"


# -------------------------------------------------------------------- writing


def save(local: LocalModel, folder: Path) -> None:
    """Writes the artefact; a folder that is there already is replaced only when the new one is complete.

    Raises:
        CheckpointError: ``folder`` exists and is not an artefact.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / PLAN).exists())):
        raise CheckpointError(f"{folder} exists and is no artefact of localize; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / folder.name
        fresh.mkdir()
        save_file({n: t.contiguous().cpu() for n, t in weights_of(local).items()}, fresh / WEIGHTS)
        for number, part in enumerate(local.parts, 1):
            source = cast(Part, part).source_code
            (fresh / f"part_{number}.py").write_text(f'"""Part {number}, generated for reading."""\n{source}\n')
        (fresh / PLAN).write_text(_plan_text(local, fresh))
        _replace(fresh, folder)
    _log.debug("wrote the artefact %s: %d parts by %s", folder, len(local.parts), local.method.name)


def _replace(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent)) / folder.name
    os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old.parent, ignore_errors=True)


def _plan_text(local: LocalModel, folder: Path) -> str:
    content = _plan_file(local, folder)
    for name, value in content["inputs"]["constants"].items():
        if not isinstance(value, int | float | str | bool | None):
            raise CheckpointError(
                f"Input {name} of the example is {value!r}, which plan.json cannot hold; convert with an example "
                "that leaves it out, or set it in the model."
            )
    return json.dumps(content, indent=2) + "\n"


def _plan_file(local: LocalModel, folder: Path) -> dict[str, Any]:
    task = local.task
    return {
        "format": FORMAT,
        "source": local.source,
        "model": fingerprint(local.to_standard()),
        "method": describe_method(local.method),
        "task": {"kind": task.kind, "num_classes": task.num_classes, "custom_loss": task.loss_fn is not None},
        "cuts": list(local.plan.cuts),
        "appended": len(local.appended),
        "frozen": [name for name, tensor in named_tensors(local).items() if frozen(tensor)],
        "inputs": describe_inputs(local),
        "plan": local.plan.to_dict(),
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }


# -------------------------------------------------------------------- reading


def read_weights(folder: Path, sha256: str) -> dict[str, Tensor]:
    """Reads ``weights.safetensors``, whose digest must be ``sha256``.

    Raises:
        CheckpointError: it is missing, truncated or changed.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {WEIGHTS}; save the model again.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); restore it from a copy.") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise CheckpointError(f"{path} is damaged: its digest is not the one in {PLAN}; restore it from a copy.")
    return tensors


def load(
    folder: Path,
    model: nn.Module | None,
    to_local: Callable[..., LocalModel],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    appended: Sequence[nn.Module] = (),
) -> LocalModel:
    """See ``localize.load``; ``to_local`` is handed in because this file lies below it."""
    _log.debug("reading the artefact %s", folder)
    plan = read_plan(folder)
    tensors = read_weights(folder, plan.weights_sha256)
    if model is None:
        if plan.source is None:
            raise CheckpointError(f"{folder / PLAN} names no source; pass the model: load(folder, model=...).")
        model = load_source(plan.source, near=folder)
    found = fingerprint(model)
    if found["sha256"] != plan.fingerprint:
        raise CheckpointError(
            f"{folder} holds {plan.model.get('class')} with {plan.model.get('parameters')} parameters; the model "
            f"given is {found['class']} with {found['parameters']}, or has other shapes. Pass the one it was made from."
        )
    if plan.custom_loss and loss is None:
        raise CheckpointError(
            f"{folder} was converted with a loss of its own, which is code and not saved; pass it: "
            "load(folder, model, loss=...)."
        )
    if len(appended) != plan.appended:
        raise CheckpointError(
            f"{folder} has {plan.appended} appended parts and {len(appended)} modules were given for them; "
            "pass them in order: load(folder, model, appended=[module, ...])."
        )
    local = to_local(
        model,
        example_from(plan.inputs, model),
        method=known_method(plan.method, plan.options, plan.method_file, near=folder),
        cuts=plan.cuts,
        parts=1,
        balance=plan.balance,
        tied=plan.tied,
        task=plan.task,
        loss=loss,
        verify=False,
    )
    for module in appended:
        local.append_part(module, freeze_below=False)
    freeze(local, plan.frozen, str(folder))
    local.source = plan.source
    if plan.edited:
        _log.warning("%s: the cuts were edited, so the heads start anew; the model keeps its weights", folder)
        tensors = {n: t for n, t in weights_of(local).items() if n.startswith("heads.")} | {
            n: t for n, t in tensors.items() if not n.startswith("heads.")
        }
    put_weights(local, tensors, str(folder))
    return local
