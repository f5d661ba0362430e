"""The folder a converted model is kept in.

    plan.json             the plan, readable; the cuts may be edited by hand
    weights.safetensors   original parameter names, and ``heads.K.…``
    part_K.py             generated, for reading

Nothing in it is unpickled or executed: loading takes the model's code from where ``plan.json`` says it came from.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from localize.errors import CheckpointError, LocalizeError
from localize.hollow import HollowBuild, empty_out, unwatched, without_values
from localize.model import LocalModel
from localize.own_methods import describe_method, known_method
from localize.part import Part
from localize.planfile import FORMAT, PLAN, PlanFile, describe_inputs, example_from, read_plan
from localize.random_state import RandomState
from localize.source import load_source
from localize.stored import WEIGHTS, digest, opened, postpone, read_shapes, read_weights
from localize.weights import (
    apart,
    check_fits,
    fill,
    fingerprint,
    freeze,
    frozen,
    named_tensors,
    put_weights,
    sharing,
    weights_of,
)

_log = logging.getLogger(__name__)


# -------------------------------------------------------------------- writing


def save(local: LocalModel, folder: Path) -> None:
    """Writes the artefact; a folder that is there already is replaced only when the new one is complete.

    Raises:
        CheckpointError: ``folder`` exists and is not an artefact, or weights are on the meta device.
    """
    without = [name for name, tensor in named_tensors(local).items() if tensor.is_meta]
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise CheckpointError(
            f"{', '.join(without[:3])}{more} have no values in this process, so the model cannot be saved here. "
            "After training on several ranks, the first one has them all (gather='first'), or each (gather='all')."
        )
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / PLAN).exists())):
        raise CheckpointError(f"{folder} exists and is no artefact of localize; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / folder.name
        fresh.mkdir()
        save_file(apart(weights_of(local)), fresh / WEIGHTS)
        for number, part in enumerate(local.parts, 1):
            (fresh / _part_file(number)).write_text(_part_text(number, cast(Part, part)))
        (fresh / PLAN).write_text(_plan_text(local, fresh))
        _replace(fresh, folder)
    _log.debug("wrote the artefact %s: %d parts by %s", folder, len(local.parts), local.method.name)


def _part_file(number: int) -> str:
    return f"part_{number}.py"


def _part_text(number: int, part: Part) -> str:
    return f'"""Part {number}, generated for reading."""\n{part.source_code}\n'


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
        "weights_sha256": digest(folder / WEIGHTS),
    }


# -------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Recipe:
    """How to make the model that an artefact's weights belong to; see ``localize.load``."""

    folder: Path
    plan: PlanFile
    to_local: Callable[..., LocalModel]
    loss: Callable[[Tensor, Tensor], Tensor] | None
    appended: Sequence[nn.Module]

    def build(self) -> nn.Module:
        """The model, from its source."""
        if self.plan.source is None:
            raise CheckpointError(f"{self.folder / PLAN} names no source; pass the model: load(folder, model=...).")
        return load_source(self.plan.source, near=self.folder)

    def convert(self, model: nn.Module) -> LocalModel:
        """``model`` in local-learning form, with the weights it has."""
        plan, folder = self.plan, self.folder
        found = fingerprint(model)
        if found["sha256"] != plan.fingerprint:
            raise CheckpointError(
                f"{folder} holds {plan.model.get('class')} with {plan.model.get('parameters')} parameters; the model "
                f"given is {found['class']} with {found['parameters']}, or has other shapes. Pass the one it was made "
                "from."
            )
        if plan.custom_loss and self.loss is None:
            raise CheckpointError(
                f"{folder} was converted with a loss of its own, which is code and not saved; pass it: "
                "load(folder, model, loss=...)."
            )
        if len(self.appended) != plan.appended:
            raise CheckpointError(
                f"{folder} has {plan.appended} appended parts and {len(self.appended)} modules were given for them; "
                "pass them in order: load(folder, model, appended=[module, ...])."
            )
        local = self.to_local(
            model,
            example_from(plan.inputs, model),
            method=known_method(plan.method, plan.options, plan.method_file, near=folder),
            cuts=plan.cuts,
            parts=1,
            balance=plan.balance,
            tied=plan.tied,
            task=plan.task,
            loss=self.loss,
            verify=False,
        )
        for module in self.appended:
            local.append_part(module, freeze_below=False)
        freeze(local, plan.frozen, str(folder))
        local.source = plan.source
        if plan.edited:
            _log.warning("%s: the cuts were edited, so the heads start anew; the model keeps its weights", folder)
        return local

    def unbuilt(self) -> LocalModel | None:
        """The model and its heads without memory, from its source; None where that might not be quite the same.

        Tensors that no file has (tables that are made anew each time) have their memory, and their values. After an
        attempt in vain random generators are as before: the next build is to draw what a first one would.
        """
        generators = RandomState()
        try:
            with warnings.catch_warnings(), HollowBuild() as build:
                warnings.filterwarnings("ignore", "for .* copying from a non-meta parameter")  # by its own code
                model = self.build()
            problem = build.doubts(model)
            if problem is None:
                saved = list({id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
                if sharing(saved):
                    raise LocalizeError("its buffers share memory")
                with unwatched(model):
                    for tensor in saved:
                        empty_out(tensor)
                with without_values(model.buffers(), model), torch.device("meta"):
                    local = self.convert(model)
                if all(map(self._is_written, range(1, len(local.parts) + 1), local.parts)):
                    return local
                problem = "it is captured in another way than it was"
        except Exception as error:  # whatever its code, or a head's, does without values; the other way has them
            problem = str(error)
        _log.debug("%s: the model is built with all its memory first: %s", self.folder, problem)
        generators.restore()
        return None

    def _is_written(self, number: int, part: nn.Module) -> bool:
        """Whether a part is the one that the artefact was written from."""
        file = self.folder / _part_file(number)
        return file.is_file() and file.read_text() == _part_text(number, cast(Part, part))


def load(
    folder: Path,
    model: nn.Module | None,
    to_local: Callable[..., LocalModel],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    appended: Sequence[nn.Module] = (),
    device: torch.device | str | None = None,
) -> LocalModel:
    """See ``localize.load``; ``to_local`` is handed in because this file lies below it."""
    _log.debug("reading the artefact %s", folder)
    plan = read_plan(folder)
    recipe = _Recipe(folder, plan, to_local, loss, appended)
    if device is not None and torch.device(device).type == "meta":
        return _load_later(recipe, model)
    tensors = read_weights(folder, plan.weights_sha256)
    local = recipe.convert(recipe.build() if model is None else model)
    if plan.edited:
        tensors = {n: t for n, t in weights_of(local).items() if n.startswith("heads.")} | {
            n: t for n, t in tensors.items() if not n.startswith("heads.")
        }
    put_weights(local, tensors, str(folder))
    return local if device is None else local.to(device)


def _load_later(recipe: _Recipe, model: nn.Module | None) -> LocalModel:
    """What the file holds is put on the meta device, and the file's place noted; but for buffers that share memory."""
    folder, edited = recipe.folder, recipe.plan.edited
    shapes = read_shapes(folder, recipe.plan.weights_sha256)
    local = recipe.unbuilt() if model is None and not edited else None
    if local is not None:
        _log.debug("%s: the model was built without memory", folder)
    else:
        local = recipe.convert(recipe.build() if model is None else model)
    tensors = named_tensors(local)
    if edited:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("heads.")}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("heads.")}
    check_fits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, str(folder))
    together = {id(tensor) for tensor in sharing(list(tensors.values()))}
    with unwatched(local.to_standard(), local), opened(folder / WEIGHTS) as file:
        for name, tensor in tensors.items():
            if id(tensor) in together:  # each would be given memory of its own
                fill(tensor, file.get_tensor(name))
            else:
                empty_out(tensor)
    postpone(local, folder / WEIGHTS)
    return local
