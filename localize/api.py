"""``to_local``, the front door:

    model ─trace→ TracedModel ─profile→ costs ─cuts→ CutPoints ─balance→ Plan ─split→ Parts ─graft→ LocalModel
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from localize import artifact
from localize.convert.arguments import check_arguments, example_of, hidden_specs, kind_of, task_of
from localize.convert.graft import graft
from localize.convert.grow import append_part
from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.split import split
from localize.convert.verify import verify as verify_parts
from localize.convert.whole import whole_part, whole_plan
from localize.heads.base import Method, Target
from localize.heads.registry import resolve_method
from localize.model import LocalModel
from localize.part import Call
from localize.runtime.losses import isolated_losses
from localize.runtime.sequential import run_batch, stages_of, step_result
from localize.runtime.update import OptimizerSteps
from localize.signature import CallSignature, as_call
from localize.spec import Balance, StepResult
from localize.task import Task, TaskKind


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

    Args:
        model: any ``nn.Module``; its forward, hooks and class are not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model's forward,
            with the batch axis first; inferred where omitted, if possible.
        method: a name from ``list_methods()``, or an instance with options: ``SCPL(temperature=0.2)``.
        parts: how many, or ``"auto"``: as few as fit ``memory_budget_bytes`` each.
        balance: what the parts are balanced by, heads included: ``flops``, ``memory`` (parameters, gradients, Adam's
            state and saved activations), ``activations`` (saved activations alone), ``params`` or ``time`` (measured).
        cuts: names of the modules after which to cut, instead of ``parts``.
        task: what the model is trained for; inferred from its output where omitted.
        loss: replaces the task's loss: ``loss(logits, target) -> scalar``.
        tied: what to do about tied parameters: keep them in one part, or copy them.
        verify: compare the parts with the model on the example and on a second batch size.
        memory_budget_bytes: for ``parts="auto"``: what one part with its head may take, in bytes.

    Raises:
        TraceError: the model cannot be captured, or the parts are not the model.
        CutError: it cannot be cut as asked.
        MethodError: unknown method, or one that does not fit the model or the task.
        TaskError: the model's output fits no task.
        ConfigError: an argument makes no sense, or no example inputs were found.
    """
    rule = resolve_method(method)
    check_arguments(balance, tied, parts, cuts)
    wanted = task_of(task, loss)
    inputs, note = example_of(model, example_inputs)
    args, kwargs = as_call(inputs)
    if parts == 1 and not cuts and not rule.splits_classifier:
        return _uncut(model, args, kwargs, rule, balance, wanted, loss)

    traced = trace(model, args, kwargs)
    planner = Planner(traced, rule, balance, wanted, loss)
    layout = planner.choose(parts, cuts, memory_budget_bytes)
    pieces = split(traced, layout.cuts)
    if verify:
        verify_parts(model, pieces, traced.signature, traced.example)
    hidden = hidden_specs(rule, layout.plan, planner.logits)
    heads = graft(rule, pieces, hidden, planner.logits, planner.task, *kind_of(model))
    plan = replace(layout.plan, notes=(*([note] if note else []), *layout.plan.notes))
    return LocalModel(
        model, pieces, heads, method=rule, task=planner.task, plan=plan, signature=traced.signature, toolkit=_TOOLKIT
    )


def _uncut(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    method: Method,
    balance: str,
    task: Task | None,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> LocalModel:
    """One part: the model as it is, not captured."""
    signature, leaves = CallSignature.of(model, args, kwargs)
    plan, task, logits = whole_plan(model, method, balance, leaves, (args, kwargs), task, loss)
    pieces = [whole_part(model, signature)]
    heads = graft(method, pieces, [logits], logits, task, *kind_of(model))
    return LocalModel(
        model, pieces, heads, method=method, task=task, plan=plan, signature=signature, toolkit=_TOOLKIT
    )


def load(
    folder: str | Path, model: nn.Module | None = None, *, appended: Sequence[nn.Module] = ()
) -> LocalModel:
    """A model that ``LocalModel.save`` wrote, with its weights.

    Args:
        folder: the artefact folder.
        model: the model to put the weights into; omitted, it is made from the source that ``plan.json`` names.
        appended: the modules of ``append_part``, in order, where the saved model has any.

    Raises:
        CheckpointError: the folder is missing, truncated, of another model or of a newer version.
        ConfigError: ``model`` was omitted and the source cannot be found.
    """
    return artifact.load(Path(folder), model, to_local, appended)


class _Toolkit:
    """Lends a ``LocalModel`` what lies above it: the runtime, the grafting, the artefact's files."""

    def losses(self, local: LocalModel, call: Call, target: Target) -> list[Tensor]:
        local.task.check_target(target)
        return isolated_losses(stages_of(local), local.signature.stream(call.args, call.kwargs), target)

    def train_step(
        self, local: LocalModel, call: Call, target: Target, optimizers: Sequence[Optimizer], keep_grads: bool
    ) -> StepResult:
        local.task.check_target(target)
        stages = stages_of(local)
        updater = OptimizerSteps(stages, optimizers, keep_grads=keep_grads)
        reports = run_batch(stages, local.signature.stream(call.args, call.kwargs), target, updater)
        return step_result(reports)

    def append_part(self, local: LocalModel, module: nn.Module, freeze_below: bool) -> None:
        append_part(local, module, freeze_below)

    def save(self, local: LocalModel, folder: Path) -> None:
        artifact.save(local, folder)


_TOOLKIT = _Toolkit()
