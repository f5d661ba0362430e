"""``to_local``, the front door:

    model ─trace→ TracedModel ─profile→ costs ─cuts→ CutPoints ─balance→ Plan ─split→ Parts ─graft→ LocalModel
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localize import artifact
from localize.convert.arguments import check_arguments, example_of, hidden_specs, task_of
from localize.convert.graft import graft
from localize.convert.grow import append_part
from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.split import split
from localize.convert.ties import untied
from localize.convert.verify import verify as verify_parts
from localize.convert.whole import whole_part, whole_plan
from localize.errors import ConfigError
from localize.heads.base import Method, Target
from localize.heads.registry import resolve_method
from localize.model import LocalModel
from localize.part import kind_of
from localize.runtime.losses import isolated_losses
from localize.runtime.messages import Upward
from localize.runtime.sequential import run_batch, stages_of, step_result
from localize.runtime.update import OptimizerSteps
from localize.signature import Call, CallSignature
from localize.spec import Balance, StepResult
from localize.task import Task, TaskKind

_log = logging.getLogger(__name__)


def to_local(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    method: str | Method = "scpl",
    parts: int | Literal["auto"] = 2,
    balance: Balance = "flops",
    cuts: Sequence[str] | None = None,
    task: Task | TaskKind | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    tied: Literal["colocate", "untie"] = "colocate",
    verify: bool = True,
    memory_budget_bytes: int | None = None,
) -> LocalModel:
    """Puts a model into local-learning form. Its parameters are shared: training the result trains ``model``.

    Hooks on the model's own layers run with the parts. Those on containers whose forward was captured ran once, at
    capture: what they do to values is part of the graph, and other effects do not come again.

    Args:
        model: any ``nn.Module``; its forward, hooks and class are not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model's forward,
            with the batch axis first, or second where the first is time; inferred where omitted, if possible.
        method: a name from ``list_methods()``, or an instance with options: ``SCPL(temperature=0.2)``.
        parts: how many, or ``"auto"``: as few as fit ``memory_budget_bytes`` each.
        balance: what the parts are balanced by, heads included: ``flops``, ``memory`` (parameters, gradients, Adam's
            state and saved activations), ``activations`` (saved activations alone), ``params`` or ``time`` (measured).
        cuts: names of the modules after which to cut, instead of ``parts``, which is then ignored.
        task: what the model is trained for; inferred from its output where omitted.
        loss: replaces the task's loss: ``loss(logits, target) -> scalar``. Of an output of several tensors it is given
            the logits, or the first one.
        tied: what to do about tied parameters: ``colocate`` keeps all that read one in one part. ``untie`` gives
            every further name a copy of its own, in ``model`` too: they start equal and are trained apart.
        verify: compare the parts with the model on the example and on a second batch size.
        memory_budget_bytes: for ``parts="auto"``: what one part with its head may take: bytes of ``memory`` as
            balance counts it, at the example's batch size.

    Raises:
        TraceError: the model cannot be captured, or the parts are not the model.
        CutError: it cannot be cut as asked.
        MethodError: unknown method, or one that does not fit the model or the task.
        TaskError: the model's output fits no task.
        ConfigError: an argument makes no sense, or no example inputs were found.
    """
    rule = resolve_method(method)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"to_local takes an nn.Module, not {model!r}; pass an instance: to_local(Model(), ...).")
    check_arguments(balance, tied, parts, cuts, memory_budget_bytes)
    wanted = task_of(task, loss)
    with untied(model, tied == "untie") as copies:
        call, notes = example_of(model, example_inputs)
        if parts == 1 and not cuts and not rule.splits_classifier:
            # One part is the model as it is: no capture is needed.
            signature, leaves = CallSignature.of(model, call.args, call.kwargs)
            plan, found, logits = whole_plan(model, rule, balance, leaves, call, wanted, loss, notes)
            pieces, hidden = [whole_part(model, signature)], [logits]
        else:
            traced = trace(model, call.args, call.kwargs)
            planner = Planner(traced, rule, balance, wanted, loss)
            layout = planner.choose(parts, cuts, memory_budget_bytes)
            pieces, signature = split(traced, layout.cuts), traced.signature
            remarks = notes + layout.plan.notes
            if verify and traced.ran:
                axis, exact = layout.plan.batch_axis, not traced.rerouted
                remarks += verify_parts(model, pieces, signature, traced.example, axis, exact)
            plan, found, logits = replace(layout.plan, notes=remarks), planner.task, planner.logits
            hidden = hidden_specs(rule, plan, logits)
        heads = graft(rule, pieces, hidden, logits, found, *kind_of(model))
    plan = replace(plan, tied=tied, notes=copies + plan.notes)
    for remark in plan.notes:
        _log.info("%s: %s", plan.model, remark)
    _log.debug("%s: %d parts by %s, cut after %s", plan.model, len(pieces), plan.balance, list(plan.cuts))
    return LocalModel(
        model, pieces, heads, method=rule, task=found, plan=plan, signature=signature, toolkit=_TOOLKIT
    )


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    appended: Sequence[nn.Module] = (),
    device: torch.device | str | None = None,
) -> LocalModel:
    """A model that ``LocalModel.save`` wrote, with its weights.

    Args:
        folder: the artefact folder.
        model: the model to put the weights into; omitted, it is made from the source that ``plan.json`` names.
        loss: the loss it was converted with, where that was the user's own: code is not saved.
        appended: the modules of ``append_part``, in order, where the saved model has any.
        device: where the model is put. ``"meta"``: no weights are read now; ``Trainer`` reads, tensor by tensor, those
            that its process needs. Without ``model``, the model is also built without memory, unless that could give
            another model than a normal build (then it is built with memory first). Tensors that are in no file, such
            as tables, are computed.

    Raises:
        CheckpointError: the folder is missing, truncated, of another model or of a newer version.
        ConfigError: ``model`` was omitted and the source cannot be found.
    """
    return artifact.load(Path(folder), model, to_local, loss, appended, device)


class _Toolkit:
    """Lends a ``LocalModel`` what lies above it: the runtime, the grafting, the artefact's files."""

    def losses(self, local: LocalModel, call: Call, target: Target) -> list[Tensor]:
        stream = local.signature.stream(call.args, call.kwargs)
        local.check_target(target, stream.values())
        return isolated_losses(stages_of(local), stream, target)

    def train_step(
        self, local: LocalModel, call: Call, target: Target, optimizers: Sequence[Optimizer], keep_grads: bool
    ) -> StepResult:
        if not torch.is_grad_enabled():
            raise ConfigError("train_step needs gradients, and they are switched off here (torch.no_grad()).")
        stream = local.signature.stream(call.args, call.kwargs)
        local.check_target(target, stream.values())
        stages = stages_of(local)
        spare = local.to_standard().parameters()  # parameters that the model has and does not use
        updater = OptimizerSteps(stages, optimizers, keep_grads=keep_grads, spare=spare)
        return step_result(run_batch(stages, [Upward(stream, target)], updater))

    def append_part(self, local: LocalModel, module: nn.Module, freeze_below: bool) -> None:
        append_part(local, module, freeze_below)

    def save(self, local: LocalModel, folder: Path) -> None:
        artifact.save(local, folder)


_TOOLKIT = _Toolkit()
