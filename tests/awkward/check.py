"""Runs a converted model beside an untouched twin of the model, without the library's own check."""

from __future__ import annotations

import copy
import functools
import inspect
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from localize import LocalModel, to_local
from localize.errors import CutError, TraceError
from localize.signature import Call
from tests.awkward.base import BATCH, OTHER_BATCH, Awkward, C, T, floats_of
from tests.awkward.compare import Wrong, compare, gradients, state


@dataclass(frozen=True)
class Outcome:
    """How a conversion went: ``right``, ``guarded`` (right until a guard raised), ``refused`` or ``wrong``."""

    kind: str
    text: str = ""
    guards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One call. ``optional``: the model itself may not take it, and a guard is always welcome."""

    title: str
    training: bool
    batch: int = BATCH
    seed: int = 0
    sign: int = 1
    length: int = T
    grad: bool = True
    inputs_need_grad: bool = False
    double: bool = False
    update: bool = False  # of all parameters, before the call
    optional: bool = False


STEPS = (
    Step("train", True),
    Step("train, second call", True),
    Step("eval", False),
    Step("other batch size", True, batch=OTHER_BATCH),
    Step("eval, other batch size, no gradients", False, batch=OTHER_BATCH, seed=1, grad=False),
    Step("other values, train after eval", True, seed=1),
    Step("negated values", True, sign=-1),
    Step("after an update", True, update=True),
    Step("other values in eval", False, seed=2),
    Step("gradients of the inputs", True, inputs_need_grad=True, optional=True),
    Step("another length", True, length=T + 2, optional=True),
    Step("float64", True, double=True, optional=True),
)


@functools.cache
def examine(entry: Awkward) -> tuple[Outcome, Outcome]:
    """How the conversion goes without ``verify``, and with it.

    Verifying changes nothing about the parts: a second conversion is needed only where it refuses the first.
    """
    twin, model = entry.model(), entry.model()
    local = _converted(entry, model, verify=True)
    if isinstance(local, LocalModel):
        outcome = _compared(entry, twin, local)
        return outcome, outcome
    model = entry.model()
    unverified = _converted(entry, model, verify=False)
    if isinstance(unverified, Outcome):
        return unverified, local
    return _compared(entry, twin, unverified), local


def _converted(entry: Awkward, model: nn.Module, verify: bool) -> LocalModel | Outcome:
    _seed(0)
    try:
        return to_local(model, entry.inputs(BATCH, 0), method="bp", parts=2, verify=verify, loss=entry.loss)
    except (TraceError, CutError) as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("wrong", f"conversion: {type(error).__name__}: {error}")


def _compared(entry: Awkward, twin: nn.Module, local: LocalModel) -> Outcome:
    guards: list[str] = []
    try:
        state("conversion", twin, local.to_standard(), ())
        guards += [] if entry.random else _training_step(entry, twin, local)
        for number, step in enumerate(STEPS):
            guards += _take(step, number, entry, twin, local)
    except Wrong as error:
        return Outcome("wrong", str(error))
    return Outcome("guarded", guards[0], tuple(guards)) if guards else Outcome("right")


def _take(step: Step, number: int, entry: Awkward, twin: nn.Module, local: LocalModel) -> list[str]:
    """One call of both. The texts of guards that stopped the converted model."""
    title, model = step.title, local.to_standard()
    inputs = _inputs(step, entry)
    if inputs is None:
        return []
    if step.double:
        local.double()
        twin.double()
    for each in (twin, local):
        each.train(step.training)
    if step.update:
        with torch.no_grad():
            for parameter in [*twin.parameters(), *model.parameters()]:
                parameter.mul_(0.8)
    if entry.adjust is not None:
        entry.adjust(twin, number)
        entry.adjust(model, number)
    try:
        expected = _run(twin, inputs, step)
    except Exception as error:
        if not step.optional:
            raise AssertionError(f"{entry.name} itself fails: {title}") from error
        _follow(model, twin)
        return []
    try:
        found = _run(local, inputs, step)
    except TraceError as error:
        _follow(model, twin)
        return [] if step.optional else [f"{title}: {error}"]
    except Exception as error:
        raise Wrong(f"{title}: raises {type(error).__name__}: {error}") from error
    compare(f"{title}: output", expected[0], found[0])
    compare(f"{title}: inputs afterwards", expected[1], found[1])
    compare(f"{title}: gradients of the inputs", expected[2], found[2])
    gradients(title, twin, model)
    state(title, twin, model, entry.scratch)
    return []


def _inputs(step: Step, entry: Awkward) -> Any:
    """The inputs of a step; None where the model has no such thing."""
    if step.length == T:
        inputs = entry.inputs(step.batch, step.seed)
    elif len(inspect.signature(entry.inputs).parameters) == 3:
        inputs = entry.inputs(step.batch, step.seed, step.length)
    else:
        return None
    return _mapped(inputs, lambda t: (t.double() if step.double else t) * step.sign if t.is_floating_point() else t)


def _mapped(value: Any, change: Any) -> Any:
    """``value`` with all tensors in tuples, lists and mappings changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        result = copy.copy(value)
        result.update({key: _mapped(item, change) for key, item in value.items()})
        return result
    if isinstance(value, list | tuple):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _run(model: nn.Module, inputs: Any, step: Step) -> tuple[Any, Any, list[Tensor | None]]:
    """The output, the inputs after the call, and their gradients. Parameters, too, have gradients of a random
    weighting of the output."""
    model.zero_grad()
    _seed(len(step.title))
    call = Call.of(_mapped(inputs, lambda t: t.clone().requires_grad_(step.inputs_need_grad and t.is_floating_point())))
    with torch.set_grad_enabled(step.grad):
        output = model(*call.args, **call.kwargs)
    found = [torch.view_as_real(t) if t.is_complex() else t for t in floats_of(output) if t.requires_grad]
    weights = torch.Generator().manual_seed(9)
    if found:
        sum((t * torch.randn(t.shape, generator=weights)).sum() for t in found).backward()
    leaves = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    return output, [leaf.detach() for leaf in leaves], [leaf.grad if leaf.is_leaf else None for leaf in leaves]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _training_step(entry: Awkward, twin: nn.Module, local: LocalModel) -> list[str]:
    """The losses of the parts leave the gradients of the model's own loss."""
    title, model = "losses", local.to_standard()
    inputs = entry.inputs(BATCH, 0)
    target = torch.randint(0, C, (BATCH,), generator=torch.Generator().manual_seed(5))
    for each in (twin, local):
        each.train()
        each.zero_grad()
    _seed(3)
    call = Call.of(_mapped(inputs, torch.clone))
    logits = local.task.logits(twin(*call.args, **call.kwargs))
    expected = F.cross_entropy(logits, target) if entry.loss is None else entry.loss(logits, target)
    expected.backward()
    _seed(3)
    try:
        call = Call.of(_mapped(inputs, torch.clone))
        found = sum(local.losses(call, target), torch.zeros(()))
        found.backward()
    except TraceError as error:
        return [f"{title}: {error}"]
    except Exception as error:
        raise Wrong(f"{title}: raises {type(error).__name__}: {error}") from error
    compare(f"{title}: value", expected.detach(), found.detach())
    gradients(title, twin, model)
    state(title, twin, model, entry.scratch)
    return []


def _follow(model: nn.Module, twin: nn.Module) -> None:
    """A guard stopped the model half way: its state becomes that of the twin, which ran to the end."""
    with torch.no_grad():
        for mine, theirs in zip(_registered(model), _registered(twin), strict=True):
            mine.copy_(theirs)


def _registered(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
