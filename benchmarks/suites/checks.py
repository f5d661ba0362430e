"""What the coverage benchmark asks of one model: is its converted form the model, and does every method train it?

Nothing here trusts ``to_local``'s own verification: the model is built twice, one of the two is converted with
``verify=False``, and both then go through the same calls in step, so that whatever state they keep is compared too.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suites import Case
from benchmarks.suites.compare import finite, observe, other_batch, same
from localize import LocalizeError, LocalModel, get_method, list_methods, to_local
from localize.convert.ties import untied
from localize.errors import CutError, MethodError, TaskError
from localize.signature import Call

Report = Callable[[str, Any], None]  # takes a column and its value as soon as it is known
Build = Callable[[], Case]
NOT_ASKED = "–"
_RATE = 1e-4
_LONGEST = 400  # characters of a message


def check(build: Build, parts: int, report: Report) -> None:
    """Fills the row of one model, column by column, but for ``step``.

    Args:
        build: makes the case; called several times, and the same weights each time.
        parts: how many to split into, where the model can be split into so many.
        report: takes the values of ``Mparams``, ``captured``, ``split``, ``imbalance`` (a number), ``train``,
            ``eval``, ``batch`` and ``seconds`` (a number). A text starts with ``yes``, ``close``, ``WRONG``,
            ``refused``, ``error`` or ``–``.
    """
    case, twin = build(), build()
    report("Mparams", sum(p.numel() for p in case.model.parameters()) / 1e6)
    try:
        local, number = converted(case, parts, "bp")
    except LocalizeError as error:
        report("captured", "yes" if isinstance(error, CutError) else _refusal(case, error))
        report("split", f"no: {brief(error)}" if isinstance(error, CutError) else NOT_ASKED)
        return
    except Exception as error:
        report("captured", failed(error))
        return
    report("captured", "yes")
    untying = local.plan.tied == "untie"
    report("split", ("yes" if number == parts else f"{number} parts") + (", untied" if untying else ""))
    with untied(twin.model, untying):
        pass
    report("imbalance", local.plan.imbalance)
    equal = _check_equality(case, twin, build, local, report)
    del local, twin
    if equal:
        report("seconds", seconds_of_conversion(build(), number))


def converted(case: Case, parts: int, method: str, verify: bool = False) -> tuple[LocalModel, int]:
    """The case's model in ``parts`` parts, or in as many as it has room for, and their number.

    Where tied parameters leave no room for ``parts``, they are untied.

    Raises:
        CutError: it cannot even be split in two.
    """
    task, tied = case.task, "colocate"
    numbers = list(range(parts, 1, -1))
    while numbers:
        number = numbers.pop(0)
        try:
            arguments: dict[str, Any] = {"parts": number, "loss": case.loss, "verify": verify, "tied": tied}
            try:
                return to_local(case.model, case.inputs, method=get_method(method), task=task, **arguments), number
            except TaskError:
                if task is not None or case.target is not None:
                    raise
                task = "regression"  # the output fits no task, and none is needed to compare it
                return to_local(case.model, case.inputs, method=get_method(method), task=task, **arguments), number
        except CutError as error:
            if tied == "colocate" and "tied='untie'" in str(error):
                tied, numbers = "untie", [number, *numbers]
            elif not numbers:
                raise
    raise AssertionError("unreachable")


def _check_equality(case: Case, twin: Case, build: Build, local: nn.Module, report: Report) -> bool:
    """Compares both in train mode, in eval mode and on another batch size; whether all was right."""
    larger = other_batch(case.inputs)
    if not local.training:
        local.train(), twin.model.train()
    train = Pair(case, twin, local).compare(case.inputs)
    if train.startswith(("WRONG", "close")):
        train += _reproducible(build)
    report("train", train)
    local.eval(), twin.model.eval()
    result = Pair(case, twin, local).compare(case.inputs)
    report("eval", result)
    others = [Pair(case, twin, local).compare(larger, gradients=False)]
    local.train(), twin.model.train()
    others.append(Pair(case, twin, local).compare(larger, gradients=False))
    worst = next((o for o in others if o not in ("yes", NOT_ASKED)), "")
    report("batch", worst or ("yes" if "yes" in others else NOT_ASKED))
    return not worst and train == result == "yes"


class Pair:
    """A converted model and its twin that was never touched, in the same state."""

    def __init__(self, case: Case, twin: Case, local: nn.Module) -> None:
        self.case, self.twin, self.local = case, twin, local

    def compare(self, inputs: Any, gradients: bool = True) -> str:
        """Calls both under the same seed. ``–``: the model itself does not take these inputs."""
        try:
            expected = observe(self.twin.model, self.twin.model, inputs, gradients)
        except Exception:
            return NOT_ASKED
        try:
            found = observe(self.local, self.case.model, inputs, gradients)
        except LocalizeError as error:
            return _refusal(self.case, error)
        except Exception as error:
            return failed(error)
        verdict = same(expected, found)
        return verdict if verdict != "yes" or finite(expected) else "yes, but the output is not finite"


def _reproducible(build: Build) -> str:
    """Where two runs of the model itself differ, no conversion can equal it."""
    first, second = build(), build()
    verdict = same(*(observe(c.model.train(), c.model, c.inputs) for c in (first, second)))
    return "" if verdict == "yes" else " (two runs of the model itself differ, too)"


def task_case(case: Case) -> Case | None:
    """The case with something to train on: its own target, else random numbers in the shape of its output."""
    if case.target is not None or case.loss is not None:
        return case
    call = Call.of(case.inputs)
    with torch.no_grad():
        output = case.model(*call.args, **call.kwargs)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    return Case(case.model, case.inputs, torch.randn_like(output), "regression", refused=case.refused)


def check_steps(build: Build, parts: int, report: Report, methods: Sequence[str] | None = None) -> None:
    """Fills ``step``: by method ``yes``, ``declared: …`` where the method says that it cannot, else the failure.

    Args:
        build: makes the case.
        parts: how many to split into, or as many as it has room for.
        report: takes the column.
        methods: the names of those to try; all, where omitted.
    """
    case = task_case(build())
    if case is None:
        report("step", {"": "no task"})
        return
    found = {}
    for name in list_methods() if methods is None else methods:
        try:
            found[name] = step(case, name, parts)
        except MethodError as error:
            found[name] = f"declared: {brief(error)}"
        except LocalizeError as error:
            found[name] = _refusal(case, error)
        except Exception as error:
            found[name] = failed(error)
        case.model.zero_grad(set_to_none=True)
        gc.collect()
        report("step", found)


def step(case: Case, method: str, parts: int) -> str:
    """Converts for ``method`` and trains one step. No loss may reach a part out of its reach, every part must learn."""
    local, number = converted(case, parts, method)
    local.train()
    problem = _out_of_reach(local, local.losses(case.inputs, case.target))
    if problem:
        return f"WRONG: {problem}"
    optimizers = local.optimizers(lambda parameters: torch.optim.SGD(parameters, lr=_RATE))
    result = local.train_step(case.inputs, case.target, optimizers)
    if not all(bool(torch.isfinite(loss).all()) for loss in result.losses):
        return f"WRONG: losses {[float(loss) for loss in result.losses]}"
    for index, part in enumerate(local.parts, 1):
        weights = [p for p in part.parameters() if p.requires_grad]
        if weights and all(p.grad is None for p in weights):
            return f"WRONG: part {index} has no gradient"
    return "yes" if number == parts else f"yes, in {number} parts"


def _out_of_reach(local: LocalModel, losses: list[Tensor]) -> str:
    total = len(local.parts)
    for number, loss in enumerate(losses, 1):
        reach = local.method.trains(number, total)
        for other, part in enumerate(local.parts, 1):
            weights = [p for p in part.parameters() if p.requires_grad]
            if other in reach or not weights or not loss.requires_grad:
                continue
            grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
            if any(grad is not None for grad in grads):
                return f"loss {number} reaches part {other}"
    return ""


def seconds_of_conversion(case: Case, parts: int) -> float | str:
    """Seconds of one conversion that verifies itself."""
    start = time.perf_counter()
    try:
        converted(case, parts, "bp", verify=True)
    except LocalizeError as error:
        return f"WRONG: verify says {brief(error)}"
    return time.perf_counter() - start


def _refusal(case: Case, error: LocalizeError) -> str:
    if case.refused is not None and re.search(case.refused, str(error)):
        return f"refused, rightly: {brief(error)}"
    return f"refused: {type(error).__name__}: {brief(error)}"


def failed(error: Exception) -> str:
    """An exception that is no refusal, with the place in the project where it came from."""
    trail, where = error.__traceback__, ""
    while trail is not None:
        code = trail.tb_frame.f_code
        if "/localize/" in code.co_filename:
            where = f" ({code.co_filename.rpartition('/localize/')[2]}:{trail.tb_lineno})"
        trail = trail.tb_next
    return f"error: {type(error).__name__}: {brief(error)}{where}"


def brief(error: BaseException) -> str:
    """The beginning of a message, on one line: of a list of problems its title and the first of them."""
    lines = [line.strip(" -") for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.replace("|", "/")[:_LONGEST]
