"""Everything that training changes, beside the weights themselves; to and from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from localize.errors import CheckpointError, problem_list
from localize.model import LocalModel
from localize.runtime.history import Row
from localize.runtime.metrics import Tally
from localize.runtime.snapshot import Snapshot, restore, tensors_of
from localize.spec import plain
from localize.weights import fingerprint

Group = dict[str, Any]
_log = logging.getLogger(__name__)


def parameter_names(local: LocalModel) -> dict[int, str]:
    """Original names by ``id`` of the parameter: as in ``weights.safetensors``, whatever the parts."""
    modules: list[tuple[str, nn.Module]] = [("", local.to_standard())]
    modules += [(f"appended.{i}.", module) for i, module in enumerate(local.appended, 1)]
    modules += [(f"heads.{i}.", head) for i, head in enumerate(local.heads, 1) if head is not None]
    # Copies of tied parameters are in no module but their part.
    modules += [(f"parts.{i}.", part) for i, part in enumerate(local.parts, 1)]
    names: dict[int, str] = {}
    for prefix, module in modules:
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), prefix + name)
    return names


@dataclass
class TrainingState:
    """One run: counters, optimizers and what belongs to them. ``epoch`` and ``batch`` are those completed."""

    local: LocalModel
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler | None]  # one an optimizer
    scalers: Sequence[torch.amp.GradScaler | None]  # one an optimizer; some may be the same
    tally: Tally
    seed: int
    microbatches: int = 1  # into how many pieces a batch is cut
    step: int = 0
    epoch: int = 0
    batch: int = 0
    history: list[Row] = field(default_factory=list)
    replicas: int = 1  # how many batches a step takes
    numbers: Collection[int] | None = None  # the parts that this process has; None: all
    held: Collection[str] | None = None  # the tensors that this process has, by name; None: all
    owned: Collection[str] | None = None  # those that it writes to a checkpoint; None: all

    def about(self) -> dict[str, Any]:
        """What says whose state this is, and how far training has come."""
        method = self.local.method
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.seed,
            "data_parallel": self.replicas,
            "microbatches": self.microbatches,
            "model": fingerprint(self.local.to_standard()),
            "method": {"name": method.name, "options": plain(method.options())},
            "cuts": list(self.local.plan.cuts),
        }

    def snapshot(self) -> Snapshot:
        """The state as a checkpoint holds it; tensors are the live ones."""
        tensors, trainer = self.describe()
        weights, layouts = tensors_of(self.local, self.owned)
        return Snapshot(self.about(), weights, tensors, {**trainer, "buffers": layouts})

    def describe(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer tensors by ``<parameter name>/<entry>``, and everything else."""
        names = parameter_names(self.local)
        tensors: dict[str, Tensor] = {}
        values: dict[str, dict[str, Any]] = {}
        described = []
        for optimizer, scheduler, scaler in zip(self.optimizers, self.schedulers, self.scalers, strict=True):
            for parameter, entries in optimizer.state.items():
                name = names[id(parameter)]
                tensors |= {f"{name}/{key}": v for key, v in entries.items() if isinstance(v, Tensor)}
                rest = {key: v for key, v in entries.items() if not isinstance(v, Tensor)}
                if rest:
                    values[name] = rest
            described.append(
                {
                    "class": type(optimizer).__qualname__,
                    "groups": [_named(group, names) for group in optimizer.param_groups],
                    "scheduler": scheduler.state_dict() if scheduler is not None else None,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                }
            )
        rest = {"values": values, "tally": self.tally.state(), "history": self.history}
        return tensors, {"optimizers": described, **rest}

    # ---------------------------------------------------------------- back

    def restore(self, snapshot: Snapshot, where: str, reports: bool = True) -> None:
        """Puts model, optimizers and counters where they were; parts may be cut otherwise than they were then.

        Buffers take the shapes that they had, and may come or go; parameters must have the same.

        ``reports``: whether this process logs what changes on the way.

        Raises:
            CheckpointError: the checkpoint is of another model, method, optimizer or seed; nothing was changed.
        """
        try:
            self._check(snapshot.about, where)
            loads = self._optimizer_states(snapshot, where)
            self._put_weights(snapshot, where)
            for optimizer, state in zip(self.optimizers, loads, strict=True):
                optimizer.load_state_dict(state)
            self._restore_companions(snapshot)
            self.tally.load(snapshot.trainer["tally"], self.numbers)
            self.history = list(snapshot.trainer["history"])
            self.step, self.epoch, self.batch = (snapshot.about[name] for name in ("step", "epoch", "batch"))
        except KeyError as error:
            raise CheckpointError(f"The checkpoint in {where} lacks the entry {error}.") from error
        then = snapshot.about.get("microbatches", self.microbatches)
        if then != self.microbatches and reports:
            _log.warning(
                "The run in %s was made with microbatches=%d until the end of epoch %d, and here it is %d: batch "
                "norm's statistics and dropout's masks are those of other pieces from here on.",
                where, then, self.epoch, self.microbatches,
            )  # fmt: skip

    def _check(self, about: dict[str, Any], where: str) -> None:
        own = self.about()
        problems = []
        if about["model"]["sha256"] != own["model"]["sha256"]:
            problems.append(
                f"it is of {about['model']['class']} with {about['model']['parameters']} parameters, and the model "
                f"here is {own['model']['class']} with {own['model']['parameters']}, or has other shapes"
            )
        if about["method"] != own["method"]:
            problems.append(
                f"its method is {_method(about['method'])}, and here it is {_method(own['method'])}"
            )
        if about["seed"] != own["seed"]:
            problems.append(
                f"its seed is {about['seed']}, and here it is {own['seed']}: the order of data differs"
            )
        # At the end of an epoch these may change; a checkpoint of an earlier version may not tell.
        for name, differ in (
            ("data_parallel", "steps take other batches"),
            ("microbatches", "batch norm and dropout see other pieces"),
        ):
            then, now = about.get(name, own[name]), own[name]
            if about["batch"] and then != now:
                problems.append(
                    f"it was made after step {about['batch']} of epoch {about['epoch'] + 1} with {name}={then}, and "
                    f"here it is {now}, so that {differ}; go on with {then} to the end of an epoch"
                )
        if problems:
            raise CheckpointError(problem_list(f"The checkpoint in {where} is of another run", problems))

    def _put_weights(self, snapshot: Snapshot, where: str) -> None:
        then, now = snapshot.about["cuts"], list(self.local.plan.cuts)
        try:
            told, device = snapshot.trainer["buffers"], self.tally.loss.device
            restore(self.local, snapshot.weights, told, where, self.held, device)
        except CheckpointError as error:
            if then == now:
                raise
            raise CheckpointError(
                f"{error}\nThe model was cut after {', '.join(then) or 'nothing'} then, and here it is cut after "
                f"{', '.join(now) or 'nothing'}: heads with weights fit their own cuts only. Convert with cuts={then}."
            ) from error

    def _optimizer_states(self, snapshot: Snapshot, where: str) -> list[dict[str, Any]]:
        names = parameter_names(self.local)
        entries: dict[str, dict[str, Any]] = {k: dict(v) for k, v in snapshot.trainer["values"].items()}
        for key, tensor in snapshot.optimizer.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = tensor
        states, problems = [], []
        for optimizer in self.optimizers:
            groups: list[Group] = []
            state: dict[int, Any] = {}
            position = 0
            for group in optimizer.param_groups:
                own = [names[id(p)] for p in group["params"]]
                kind, saved = _group_of(own[0], snapshot.trainer["optimizers"])
                if kind is None or kind != type(optimizer).__qualname__:
                    found = f"by {kind}" if kind else "by nothing"
                    problems.append(
                        f"{own[0]} was trained {found}, and here it is by {type(optimizer).__qualname__}"
                    )
                positions = range(position, position + len(own))
                groups.append({**saved, "params": list(positions)})
                state |= {i: entries[name] for i, name in zip(positions, own, strict=True) if name in entries}
                position += len(own)
            states.append({"state": state, "param_groups": groups})
        if problems:
            raise CheckpointError(
                problem_list(f"The checkpoint in {where} has other optimizers", problems[:8])
            )
        return states

    def _restore_companions(self, snapshot: Snapshot) -> None:
        """Schedules and loss scales: from the optimizer that had the same first parameter."""
        names = parameter_names(self.local)
        restored: set[int] = set()
        for optimizer, scheduler, scaler in zip(self.optimizers, self.schedulers, self.scalers, strict=True):
            first = names[id(optimizer.param_groups[0]["params"][0])]
            saved = next(o for o in snapshot.trainer["optimizers"] if _holds(o, first))
            if scheduler is not None and saved["scheduler"] is not None:
                scheduler.load_state_dict(saved["scheduler"])
            if scaler is not None and saved["scaler"] and id(scaler) not in restored:
                restored.add(id(scaler))
                scaler.load_state_dict(saved["scaler"])


def _named(group: Group, names: dict[int, str]) -> Group:
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {**own, "params": [names[id(p)] for p in group["params"]]}


def _holds(optimizer: dict[str, Any], name: str) -> bool:
    return any(name in group["params"] for group in optimizer["groups"])


def _group_of(name: str, optimizers: Sequence[dict[str, Any]]) -> tuple[str | None, Group]:
    """Class and group of the saved optimizer that had the parameter ``name``."""
    for optimizer in optimizers:
        for group in optimizer["groups"]:
            if name in group["params"]:
                return optimizer["class"], group
    return None, {}


def _method(method: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in method["options"].items())
    return f"{method['name']}({options})"
