"""One part that is the whole model: no capture is needed, and any model will do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize.convert.batch_axis import batch_axes
from localize.convert.flops import FlopCounter
from localize.convert.restore import preserved
from localize.heads.base import Method
from localize.part import Part, Program, Route, set_own_mode
from localize.signature import Call, CallSignature
from localize.spec import Cost, PartCost, Plan, TensorSpec, indices_of
from localize.task import Task, infer_task


def whole_part(model: nn.Module, signature: CallSignature) -> Part:
    """The model as the only part: its forward runs as it is."""
    program = Program(_CallModel(signature), f"# the whole model, called as it is\n{model}")
    route = Route(signature.names, (), (), None, program)
    members: dict[str, nn.Module | Tensor] = dict(model.named_children())
    members |= dict(model.named_parameters(recurse=False)) | dict(model.named_buffers(recurse=False))
    part = Part(1, {True: route, False: route}, members)
    part.__dict__["_whole"] = model
    set_own_mode(part, model.training)
    return part


@dataclass(frozen=True)
class _CallModel:
    """Calls the model that the part is."""

    signature: CallSignature

    def __call__(self, part: Part, *leaves: Tensor) -> Any:
        args, kwargs = self.signature.unbind(leaves)
        return part.__dict__["_whole"](*args, **kwargs)


def dry_output(model: nn.Module, call: Call) -> tuple[Any, float]:
    """The model's output in eval mode and the FLOPs it took; nothing of the model changes."""
    with preserved(model, training=False), torch.no_grad(), FlopCounter() as counter:
        output = model(*call.args, **call.kwargs)
    return output, counter.flops


def whole_plan(
    model: nn.Module,
    method: Method,
    balance: str,
    leaves: list[Tensor],
    call: Call,
    task: Task | None,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    notes: tuple[str, ...],
) -> tuple[Plan, Task, TensorSpec]:
    """The plan of an uncut model, its task, and the shape of its logits."""
    output, flops = dry_output(model, call)
    task = task.completed(output) if task is not None else infer_task(output, loss)
    logits = task.logits(output)
    axis = _batch_axis(leaves, logits)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    names = [name for name, _ in model.named_children()] or [type(model).__name__]
    plan = Plan(
        model=type(model).__name__,
        method=method.name,
        balance=balance,
        cuts=(),
        boundaries=(),
        parts=(PartCost(1, names[0], names[-1], Cost(flops, size), Cost()),),
        inputs=tuple(TensorSpec.of(t, own) for t, own in zip(leaves, batch_axes(leaves, axis), strict=True)),
        indices=tuple(indices_of(t) for t in leaves),
        notes=notes,
    )
    return plan, task, TensorSpec.of(logits)


def _batch_axis(leaves: list[Tensor], logits: Tensor) -> int:
    """The axis of the inputs that is the batch: the first, unless the logits have the second's size instead."""
    first, samples = leaves[0].shape, logits.shape[0] if logits.dim() else 0
    return 1 if len(first) > 1 and first[0] != samples == first[1] else 0
