"""The same questions to what PyTorch has: ``torch.export`` and ``torch.distributed.pipelining.pipeline``.

Both capture one mode only, and the result cannot be switched: each is captured twice, in train and in eval mode, and
counts as right if both give the model's outputs, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from benchmarks.suites import Case
from benchmarks.suites.checks import NOT_ASKED, Build, Report, converted, failed
from benchmarks.suites.compare import observe, other_batch, same
from localize import LocalizeError
from localize.signature import Call

Capture = Callable[[Build, bool], nn.Module]  # the case's model in train (True) or eval mode


def check_rivals(build: Build, parts: int, report: Report) -> None:
    """Fills ``export``, ``export right``, ``export batch`` and the same three of ``pipeline``.

    ``export batch`` names what was needed: ``yes`` without further ado, ``dynamic`` where the batch axis had to be
    declared (``Dim.AUTO``). ``pipeline batch`` has no such option: it exports without.
    """
    fixed = _ask(build, _exported, report, "export")
    if fixed:
        report("export batch", fixed if fixed == "yes" else _dynamic_batch(build))
    places = cut_places(build, parts)
    works = _ask(build, lambda make, training: _piped(make, training, places), report, "pipeline")
    if works:
        report("pipeline batch", works)


def _ask(build: Build, capture: Capture, report: Report, column: str) -> str:
    """Reports whether ``capture`` works and is right; returns the verdict on another batch size, if it works."""
    verdicts, batch = [], []
    for training in (True, False):
        twin = _in_mode(build, training)
        try:
            module = capture(build, training)
        except Exception as error:
            report(column, f"{'train' if training else 'eval'}: {failed(error)}")
            return ""
        verdicts.append(_compare(twin, module, twin.inputs))
        batch.append(_compare(twin, module, other_batch(twin.inputs)))
    report(column, "yes")
    pairs = zip(("train", "eval"), verdicts, strict=True)
    report(f"{column} right", "; ".join(f"{mode}: {v}" for mode, v in pairs if v not in ("yes", NOT_ASKED)) or "yes")
    return next((v for v in batch if v not in ("yes", NOT_ASKED)), "yes")


def _compare(twin: Case, module: nn.Module, inputs: Any) -> str:
    """Outputs alone: names of parameters and buffers are others in the captured module."""
    try:
        expected = observe(twin.model, twin.model, inputs, gradients=False)
    except Exception:
        return NOT_ASKED
    try:
        found = observe(module, module, inputs, gradients=False)
    except Exception as error:
        return failed(error)
    return same(_tensors(expected), _tensors(found))


def _tensors(observed: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the output in order: a rival may lay them out in other containers."""
    found = [v for k, v in observed.items() if k.startswith("output") and isinstance(v, Tensor)]
    return {f"output {number}": tensor for number, tensor in enumerate(found)}


def _in_mode(build: Build, training: bool) -> Case:
    case = build()
    case.model.train(training)
    return case


def _exported(build: Build, training: bool) -> nn.Module:
    case = _in_mode(build, training)
    call = Call.of(case.inputs)
    return export(case.model, call.args, call.kwargs, strict=False).module()


def _exported_dynamic(build: Build, training: bool) -> nn.Module:
    case = _in_mode(build, training)
    call = Call.of(case.inputs)
    bound = inspect.signature(case.model.forward).bind(*call.args, **call.kwargs).arguments
    leaves = [leaf for leaf in pytree.tree_leaves(bound) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = leaves[0].shape[0]

    def axes(leaf: Any) -> dict[int, Any] | None:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else None

    shapes = pytree.tree_map(axes, dict(bound))
    return export(case.model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False).module()


def _dynamic_batch(build: Build) -> str:
    for training in (True, False):
        try:
            module = _exported_dynamic(build, training)
        except Exception as error:
            return failed(error)
        twin = _in_mode(build, training)
        verdict = _compare(twin, module, other_batch(twin.inputs))
        if verdict not in ("yes", NOT_ASKED):
            return verdict
    return "dynamic"


def _piped(build: Build, training: bool, places: list[list[str]]) -> nn.Module:
    """The pipeline at the first of ``places`` where it can be made."""
    for last, names in enumerate(places, 1 - len(places)):
        case = _in_mode(build, training)
        call = Call.of(case.inputs)
        try:
            pipe = pipeline(case.model, call.args, call.kwargs, split_spec=dict.fromkeys(names, SplitPoint.END))
            if pipe.num_stages != len(names) + 1:
                raise RuntimeError(f"{pipe.num_stages} stages instead of {len(names) + 1}")
            return pipe
        except Exception:
            if last == 0:
                raise
    raise RuntimeError("no modules to cut after")


def cut_places(build: Build, parts: int) -> list[list[str]]:
    """After which modules ``pipeline``, which has no planner, is asked to cut: where localize does, if modules end
    there; else evenly along the model's longest list of blocks; else along its children."""
    model = build().model
    modules = dict(model.named_modules())
    places: list[list[str]] = []
    with suppress(LocalizeError):
        places.append([name for name in converted(build(), parts, "bp")[0].plan.cuts if name in modules])
    lists = [(name, m) for name, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
    for path, blocks in (max(lists, key=lambda item: len(item[1]), default=("", model)), ("", model)):
        children = [f"{path}.{child}" if path else child for child, _ in blocks.named_children()]
        if len(children) >= parts:
            places.append([children[len(children) * k // parts - 1] for k in range(1, parts)])
    return [names for names in places if len(names) == parts - 1]
