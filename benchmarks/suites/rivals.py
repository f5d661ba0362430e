"""The same questions to what PyTorch has: ``torch.export`` and ``torch.distributed.pipelining.pipeline``.

Both capture one mode only, and the result cannot be switched: each is captured twice, in train and in eval mode, and
counts as right if both give the model's outputs, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from benchmarks.suites import Case
from benchmarks.suites.checks import NOT_ASKED, Build, Report, converted, failed
from benchmarks.suites.compare import observe, other_batch, same
from localize.signature import Call

Capture = Callable[[Case], nn.Module]


def check_rivals(build: Build, parts: int, report: Report) -> None:
    """Fills ``export``, ``export right``, ``export batch`` and the same three of ``pipeline``.

    ``export batch`` names what was needed: ``yes`` without further ado, ``dynamic`` where the batch axis had to be
    declared (``Dim.AUTO``).
    """
    fixed = _ask(build, _exported, report, "export")
    if fixed:
        report("export batch", fixed if fixed == "yes" else _dynamic_batch(build))
    names = cut_names(build, parts)
    works = _ask(build, lambda case: _piped(case, names), report, "pipeline")
    if works:
        report("pipeline batch", works)


def _ask(build: Build, capture: Capture, report: Report, column: str) -> str:
    """Reports whether ``capture`` works and is right; returns the verdict on another batch size, if it works."""
    verdicts, batch = [], []
    for training in (True, False):
        case, twin = build(), build()
        case.model.train(training), twin.model.train(training)
        try:
            module = capture(case)
        except Exception as error:
            report(column, f"{'train' if training else 'eval'}: {failed(error)}")
            return ""
        verdicts.append(_compare(twin, module, case.inputs))
        batch.append(_compare(twin, module, other_batch(case.inputs)))
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
    return same(_output(expected), _output(found))


def _output(observed: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in observed.items() if key.startswith("output")}


def _exported(case: Case) -> nn.Module:
    call = Call.of(case.inputs)
    return export(case.model, call.args, call.kwargs, strict=False).module()


def _exported_dynamic(case: Case) -> nn.Module:
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
        case, twin = build(), build()
        case.model.train(training), twin.model.train(training)
        try:
            module = _exported_dynamic(case)
        except Exception as error:
            return failed(error)
        verdict = _compare(twin, module, other_batch(case.inputs))
        if verdict not in ("yes", NOT_ASKED):
            return verdict
    return "dynamic"


def _piped(case: Case, names: list[str]) -> nn.Module:
    call = Call.of(case.inputs)
    spec = dict.fromkeys(names, SplitPoint.END)
    pipe = pipeline(case.model, call.args, call.kwargs, split_spec=spec)
    if pipe.num_stages != len(names) + 1:
        raise RuntimeError(f"{pipe.num_stages} stages instead of {len(names) + 1}")
    return pipe.split_gm


def cut_names(build: Build, parts: int) -> list[str]:
    """After which modules to cut for ``pipeline``, which has no planner: where localize does, if those are modules,
    else evenly along the blocks of the model's longest list, else along its children."""
    case = build()
    modules = dict(case.model.named_modules())
    try:
        names = list(converted(case, parts, "bp")[0].plan.cuts)
    except Exception:
        names = []
    if names and all(name in modules for name in names):
        return names
    lists = [(name, m) for name, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
    path, longest = max(lists, key=lambda item: len(item[1]), default=("", case.model))
    if len(longest) < parts if isinstance(longest, nn.ModuleList | nn.Sequential) else True:
        path, longest = "", case.model
    blocks = [f"{path}.{child}" if path else child for child, _ in longest.named_children()]
    step = len(blocks) / parts
    return list(dict.fromkeys(blocks[max(0, int(step * k) - 1)] for k in range(1, parts)))
