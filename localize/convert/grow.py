"""Dynamic layer accumulation: a new part with a new head on top of a trained model (AL, section 2.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from localize.convert.graft import graft
from localize.convert.restore import preserved
from localize.errors import ConfigError, CutError
from localize.heads.base import Head, TaskHead
from localize.model import LocalModel
from localize.part import Part, Program, Route, kind_of
from localize.spec import Boundary, Cost, PartCost, TensorSpec

_HIDDEN = "appended"


def append_part(local: LocalModel, module: nn.Module, freeze_below: bool) -> None:
    """See ``LocalModel.append_part``.

    Raises:
        CutError: the top part gives no hidden state: the model's classifier could not be told from the rest.
        ConfigError: ``module`` does not take the top part's hidden state, or does not give a tensor.
        MethodError: the method cannot build a head on it.
    """
    total = len(local.parts)
    top = cast(Part, local.parts[-1])
    spec = local.plan.representation
    if spec is None or (top.route.hidden is None and not local.appended):
        raise CutError(
            f"Nothing can be put on top of {local.plan.model}: its last part has no hidden state below a classifier "
            "of its own. Convert with fewer parts, or with cuts=[...] that leave it more than the classifier."
        )
    made = _output_spec(module, spec, local)
    part = _part_of(module, total + 1, top.route.hidden_name)
    opened = _opened(top)
    heads = _new_heads(local, opened, part, spec, made)

    if freeze_below:
        for frozen in [*local.parts, *(head for head in local.heads if head is not None)]:
            frozen.requires_grad_(False)
    top.__dict__["_routes"] = opened.__dict__["_routes"]
    local.parts.append(part.train(local.training))
    for number, head in heads.items():
        local.grafts[str(number)] = head.train(local.training)
    local.appended.append(module)
    _extend_plan(local, part, spec, made, top.route.primary or "")


def _part_of(module: nn.Module, number: int, takes: str) -> Part:
    name = f"{_HIDDEN}_{number}"
    program = Program(_CallMember(name), f"# the appended module\n{module}", (name,))
    route = Route((takes,), (), (), None, program, hidden_name=name)
    return Part(number, {True: route, False: route}, {name: module})


def _opened(top: Part) -> Part:
    """The old top part, giving its representation instead of the model's output; its head stays as it is."""
    routes = {}
    for mode, route in top.__dict__["_routes"].items():
        name = route.hidden_name
        program = route.hidden or route.whole  # an appended part is nothing but its module
        # The program returns the bare value; a part that gives values returns a tuple of them.
        whole = replace(program, run=_InTuple(program.run))
        routes[mode] = replace(route, gives=(name,), primary=name, whole=whole, hidden=None)
    opened = Part(0, routes, {})
    return opened


@dataclass(frozen=True)
class _CallMember:
    """Calls the part's one module."""

    name: str

    def __call__(self, part: Part, hidden: Tensor) -> Any:
        return part.get_submodule(self.name)(hidden)


@dataclass(frozen=True)
class _InTuple:
    """The result of another program, as a tuple of one."""

    run: Callable[..., Any]

    def __call__(self, part: Part, *values: Any) -> Any:
        return (self.run(part, *values),)


def _output_spec(module: nn.Module, spec: TensorSpec, local: LocalModel) -> TensorSpec:
    hidden = torch.zeros(spec.shape, dtype=spec.dtype, device=kind_of(local)[0])
    with preserved(module, training=False), torch.no_grad():
        try:
            output = module(hidden)
        except Exception as error:
            raise ConfigError(
                f"The appended module does not take the top part's hidden state {spec} ({spec.layout}): {error}"
            ) from error
    if not isinstance(output, Tensor):
        raise ConfigError(f"The appended module must return one tensor, not {type(output).__name__}.")
    return TensorSpec.of(output, spec.batch_axis)


def _new_heads(
    local: LocalModel, opened: Part, part: Part, spec: TensorSpec, made: TensorSpec
) -> dict[int, Head]:
    """The new part's head; and one for the part that was the last, where its old one read the model's logits."""
    total = len(local.parts) + 1
    hidden = [spec] * (total - 1) + [made]
    parts = [*(cast(Part, p) for p in local.parts[:-1]), opened, part]
    built = graft(local.method, parts, hidden, made, local.task, *kind_of(local))
    heads = {total: built[-1]}
    if isinstance(local.heads[-1], TaskHead):
        heads[total - 1] = built[-2]
    predicts = local.method.predicts != "path"
    if predicts and local.task.num_classes not in (None, made.channels):
        raise ConfigError(
            f"The appended module is the last part now and must give {local.task.num_classes} logits for method "
            f"{local.method.name!r}, but it gives {made}."
        )
    return {number: head for number, head in heads.items() if head is not None}


def _extend_plan(local: LocalModel, part: Part, spec: TensorSpec, made: TensorSpec, primary: str) -> None:
    plan, number = local.plan, len(local.parts)
    weights = sum(p.numel() * p.element_size() for p in part.parameters())
    name = f"{_HIDDEN}_{number}"
    cost = PartCost(number, name, name, Cost(param_bytes=weights), Cost())
    boundary = Boundary(number - 1, plan.parts[-1].last, primary, (primary,), spec, spec.nbytes)
    local.plan = replace(
        plan, parts=(*plan.parts, cost), boundaries=(*plan.boundaries, boundary), representation=made
    )
