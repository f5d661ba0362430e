"""The arguments of ``to_local``, checked and completed before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from localize.convert.infer import infer_example
from localize.errors import ConfigError, did_you_mean, problem_list
from localize.heads.base import Method
from localize.part import kind_of
from localize.signature import Call, to_device
from localize.spec import BALANCES, Plan, TensorSpec
from localize.task import Task, TaskKind

_TIED = ("colocate", "untie")


def check_arguments(
    balance: str,
    tied: str,
    parts: int | str,
    cuts: Sequence[str] | None,
    memory_budget_bytes: int | None,
) -> None:
    """Raises one ``ConfigError`` that lists all arguments out of range."""
    problems = []
    if balance not in BALANCES:
        problems.append(
            f"unknown balance {balance!r}.{did_you_mean(balance, BALANCES)} One of {', '.join(BALANCES)}."
        )
    if tied not in _TIED:
        problems.append(f"unknown tied={tied!r}.{did_you_mean(tied, _TIED)} One of {', '.join(_TIED)}.")
    if parts != "auto" and (not isinstance(parts, int) or isinstance(parts, bool) or parts < 1):
        problems.append(f"parts must be a number from 1, or 'auto' with memory_budget_bytes=; got {parts!r}.")
    if memory_budget_bytes is not None and (parts != "auto" or cuts is not None):
        given = f"parts={parts!r}" if cuts is None else "cuts"
        problems.append(
            f"memory_budget_bytes={memory_budget_bytes} decides how many parts there are, which {given} does already: "
            "pass parts='auto' with it, or leave it out."
        )
    if isinstance(cuts, str):
        problems.append(f"cuts must be a list of module names, not the string {cuts!r}: cuts=[{cuts!r}].")
    if problems:
        raise ConfigError(problem_list("Bad arguments", problems))


def task_of(task: Task | TaskKind | None, loss: Callable[[Tensor, Tensor], Tensor] | None) -> Task | None:
    """The task as an object, with the loss put in; None to be inferred.

    Raises:
        TaskError: an unknown kind.
    """
    if task is None:
        return None
    whole = task if isinstance(task, Task) else Task(task)
    return replace(whole, loss_fn=loss) if loss is not None else whole


def example_of(model: nn.Module, example_inputs: Any) -> tuple[Call, tuple[str, ...]]:
    """The example as a call, on the model's device, and notes where it had to be inferred."""
    notes: tuple[str, ...] = ()
    if example_inputs is None:
        inferred = infer_example(model)
        example_inputs, notes = inferred.inputs, (inferred.note,)
    device, _ = kind_of(model)
    call = Call.of(example_inputs)
    return Call(to_device(call.args, device), to_device(call.kwargs, device)), notes


def hidden_specs(method: Method, plan: Plan, logits: TensorSpec) -> list[TensorSpec]:
    """What the head of every part reads."""
    keeps = method.splits_classifier and plan.representation is not None
    last = plan.representation if keeps and plan.representation is not None else logits
    return [*(boundary.spec for boundary in plan.boundaries), last]
