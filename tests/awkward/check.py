"""Compares a converted model with an untouched twin of the model, bit for bit, without the library's own check."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import LocalModel, to_local
from localize.errors import CutError, TraceError
from localize.signature import Call
from tests.awkward.base import BATCH, OTHER_BATCH, Awkward, C, floats_of


@dataclass(frozen=True)
class Outcome:
    """How a conversion went: ``right``, ``guarded`` (right until a guard raised), ``refused`` or ``wrong``."""

    kind: str
    text: str = ""
    guards: tuple[str, ...] = ()


class Wrong(Exception):
    """The converted model did something else than the model."""


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


def _compared(entry: Awkward, twin: nn.Module, local: LocalModel) -> Outcome:
    """Runs the converted model beside its twin: twice in train mode, in eval mode, on other sizes and on other
    values, in train mode again."""
    guards: list[str] = []
    try:
        _compare_state("conversion", twin, local.to_standard(), ())
        for title, training, batch, seed, sign in _STEPS:
            call = Call.of(_signed(entry.inputs(batch, seed), sign))
            guard = _step(title, twin, local, call, training, entry.scratch)
            guards += [guard] if guard else []
        if not entry.random:
            guard = _training_step(entry, twin, local)
            guards += [guard] if guard else []
    except Wrong as error:
        return Outcome("wrong", str(error))
    return Outcome("guarded", guards[0], tuple(guards)) if guards else Outcome("right")


def _converted(entry: Awkward, model: nn.Module, verify: bool) -> LocalModel | Outcome:
    _seed(0)
    try:
        return to_local(
            model, entry.inputs(BATCH, 0), method="bp", parts=2, verify=verify, loss=entry.loss
        )
    except (TraceError, CutError) as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("wrong", f"conversion: {type(error).__name__}: {error}")


_STEPS = (  # title, train mode, batch, seed of the values, their sign
    ("train", True, BATCH, 0, 1),
    ("train, second call", True, BATCH, 0, 1),
    ("eval", False, BATCH, 0, 1),
    ("other batch size", True, OTHER_BATCH, 0, 1),
    ("eval, other batch size", False, OTHER_BATCH, 1, 1),
    ("other values", True, BATCH, 1, 1),
    ("negated values", True, BATCH, 0, -1),
    ("other values in eval", False, BATCH, 2, 1),
    ("train after eval", True, BATCH, 0, 1),
)


def _signed(inputs: Any, sign: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs * sign if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: _signed(value, sign) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        items = [_signed(value, sign) for value in inputs]
        return type(inputs)(*items) if hasattr(inputs, "_fields") else type(inputs)(items)
    return inputs


def _step(
    title: str, twin: nn.Module, local: LocalModel, call: Call, training: bool, scratch: Sequence[str]
) -> str | None:
    """One call of both. Returns the text of the guard that stopped the converted model, which ends the step."""
    expected = _run(twin, call, training, len(title))
    try:
        found = _run(local, call, training, len(title))
    except TraceError as error:
        _follow(local.to_standard(), twin)
        return f"{title}: {error}"
    except Exception as error:
        raise Wrong(f"{title}: raises {type(error).__name__}: {error}") from error
    _compare(f"{title}: output", expected[0], found[0])
    _compare_gradients(title, twin, local.to_standard())
    _compare_state(title, twin, local.to_standard(), scratch)
    _compare(f"{title}: inputs afterwards", expected[1], found[1])
    return None


def _run(model: nn.Module, call: Call, training: bool, seed: int) -> tuple[Any, Any]:
    """The output, and the inputs after the call. Parameters have gradients of a random weighting of the output."""
    model.train(training)
    model.zero_grad()
    _seed(seed)
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    output = model(*args, **kwargs)
    found = [torch.view_as_real(t) if t.is_complex() else t for t in floats_of(output) if t.requires_grad]
    weights = torch.Generator().manual_seed(9)
    if found:
        sum((t * torch.randn(t.shape, generator=weights)).sum() for t in found).backward()
    return output, (args, kwargs)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _training_step(entry: Awkward, twin: nn.Module, local: LocalModel) -> str | None:
    """The losses of the parts leave the gradients of the model's own loss."""
    title, model = "losses", local.to_standard()
    call = Call.of(entry.inputs(BATCH, 0))
    target = torch.randint(0, C, (BATCH,), generator=torch.Generator().manual_seed(5))
    for each in (twin, local):
        each.train()
        each.zero_grad()
    _seed(3)
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    logits = local.task.logits(twin(*args, **kwargs))
    expected = F.cross_entropy(logits, target) if entry.loss is None else entry.loss(logits, target)
    expected.backward()
    _seed(3)
    try:
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
        found = sum(local.losses(Call(args, kwargs), target), torch.zeros(()))
        found.backward()
    except TraceError as error:
        return f"{title}: {error}"
    except Exception as error:
        raise Wrong(f"{title}: raises {type(error).__name__}: {error}") from error
    _compare(f"{title}: value", expected.detach(), found.detach())
    _compare_gradients(title, twin, model)
    _compare_state(title, twin, model, entry.scratch)
    return None


def _follow(model: nn.Module, twin: nn.Module) -> None:
    """A guard stopped the model half way: its state becomes that of the twin, which ran to the end."""
    with torch.no_grad():
        for mine, theirs in zip(_registered(model), _registered(twin), strict=True):
            mine.copy_(theirs)


def _registered(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _compare(what: str, expected: Any, found: Any) -> None:
    if type(expected) is not type(found):
        raise Wrong(f"{what} is a {type(found).__name__} instead of a {type(expected).__name__}")
    if isinstance(expected, Tensor):
        _compare_tensors(what, expected, found)
    elif isinstance(expected, dict):
        if list(expected) != list(found):
            raise Wrong(f"{what} has the keys {list(found)} instead of {list(expected)}")
        for key in expected:
            _compare(f"{what}[{key!r}]", expected[key], found[key])
    elif isinstance(expected, list | tuple):
        if len(expected) != len(found):
            raise Wrong(f"{what} has {len(found)} entries instead of {len(expected)}")
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            _compare(f"{what}[{i}]", one, other)
    elif isinstance(expected, bool | int | float | str | torch.dtype | torch.device | None):
        if expected != found and expected == expected:
            raise Wrong(f"{what} is {found!r} instead of {expected!r}")
    elif not isinstance(expected, nn.Module) and not callable(expected) and hasattr(expected, "__dict__"):
        _compare(what, vars(expected), vars(found))


def _compare_tensors(what: str, expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype or expected.layout != found.layout:
        raise Wrong(
            f"{what} is {found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        )
    if expected.requires_grad != found.requires_grad:
        raise Wrong(f"{what}: requires_grad is {found.requires_grad} instead of {expected.requires_grad}")
    if expected.layout != torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    same = (expected == found) | ((expected != expected) & (found != found))
    if not bool(same.all()):
        raise Wrong(f"{what} is another: {found.flatten()[:3].tolist()} instead of {expected.flatten()[:3].tolist()}")


def _compare_gradients(title: str, twin: nn.Module, model: nn.Module) -> None:
    for (name, one), (_, other) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        if (one.grad is None) != (other.grad is None):
            raise Wrong(f"{title}: gradient of {name} is {'missing' if other.grad is None else 'too much'}")
        if one.grad is not None:
            _compare(f"{title}: gradient of {name}", one.grad, other.grad)


_NOTHING = "no such attribute"
_UNTOLD = re.compile("^_(?!buffers$|parameters$)")  # nn.Module's own tables, and what users call private


def _compare_state(title: str, twin: nn.Module, model: nn.Module, scratch: Sequence[str]) -> None:
    """Parameters, buffers and plain attributes of all modules, but for those in ``scratch``."""
    theirs, mine = dict(twin.named_modules()), dict(model.named_modules())
    if list(theirs) != list(mine):
        raise Wrong(f"{title}: the modules are {list(mine)} instead of {list(theirs)}")
    for path, module in theirs.items():
        where = f"{title}: state of {path or 'the root'}"
        prefix = f"{path}." if path else ""
        for name in vars(module).keys() | vars(mine[path]).keys():
            if not _UNTOLD.match(name) and prefix + name not in scratch:
                one, other = vars(module).get(name, _NOTHING), vars(mine[path]).get(name, _NOTHING)
                _compare(f"{where}: {name}", one, other)
