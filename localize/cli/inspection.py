"""What ``localize inspect`` finds out about a captured model, as plain data under stable keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx, nn

from localize.convert.checkpointing import Checkpointed
from localize.convert.cuts import module_path
from localize.convert.leaves import is_library
from localize.convert.plan import Planner
from localize.convert.profile import cost_of, frozen_parameters
from localize.convert.settings import CheckSettings
from localize.convert.sizes import check_count, check_size
from localize.convert.ties import tied_parameters
from localize.convert.traced import TracedModel
from localize.convert.values import check_result, check_value
from localize.errors import MethodError
from localize.spec import Plan, TensorSpec

_GUARDS: dict[Any, str] = {check_size: "size", check_count: "count", check_value: "value", check_result: "result"}
_SIGNS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_WHOLE, _SETS, _UNSET = "kept whole: ", "sets ", ": parts do not"


# ---------------------------------------------------------------- the model


def about_model(planner: Planner, plan: Plan, spec: str, inputs_from: str) -> dict[str, Any]:
    """Sizes in elements and bytes, FLOPs of one forward of the example batch, and what parameters are shared."""
    root = planner.traced.root
    parameters, buffers = list(root.parameters()), list(root.buffers())
    read = {path for p in planner.profiles.values() for node in p.nodes.values() for path, _ in node.params}
    profile = planner.profiles[True]
    return {
        "class": type(root).__name__,
        "spec": spec,
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad),
        "unused_parameters": [name for name, _ in root.named_parameters() if name not in read],
        "buffer_bytes": sum(b.numel() * b.element_size() for b in buffers),
        "flops": profile.cost(list(profile.nodes)).flops,
        "task": planner.task.kind,
        "num_classes": planner.task.num_classes,
        "inputs": [
            {"name": name, "dtype": inputs.dtype, "bytes": inputs.nbytes, "sizes": inputs.shape, "shape": str(inputs)}
            for name, inputs in zip(planner.traced.signature.names, plan.inputs, strict=True)
        ],
        "inputs_from": inputs_from,
        "tied": plan.tied,
        "shared_parameters": _shared(planner),
    }


def _shared(planner: Planner) -> list[dict[str, Any]]:
    """Parameters with several names, or several readers that a legal cut would part."""
    traced = planner.traced
    names: dict[int, list[str]] = {}
    for name, parameter in traced.root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    sizes = {id(p): p.numel() * p.element_size() for p in traced.root.parameters()}
    ties = {tie.name: tie for tie in tied_parameters(traced, planner.profiles[True])}
    nodes = list(traced.train_graph.nodes)
    found = []
    for key, known in names.items():
        tie = ties.get(known[0])
        blocked = sum(tie.is_cut_by(p) for p in planner.every_cut[True]) if tie is not None else 0
        if len(known) > 1 or blocked:
            readers = [] if tie is None else [module_path(traced, nodes[i]) for i in (tie.first, tie.last)]
            found.append({"names": known, "bytes": sizes[key], "read_in": readers, "cuts_blocked": blocked})
    return found


# ---------------------------------------------------------------- the capture


def about_capture(planner: Planner, notes: Sequence[str]) -> dict[str, Any]:
    """What stayed whole and why, what is checked at every call, what parts do not set, and all notes as they are."""
    traced = planner.traced
    checks = [c for c in traced.extras.values() if isinstance(c, CheckSettings)]
    entries = {(path, name): value for c in checks for _, path, name, value in c.__dict__["entries"]}
    settings = [(path, name, value) for (path, name), value in entries.items() if name != "training"]  # modes are told
    not_set = [n.removeprefix(_SETS).partition(_UNSET)[0] for n in notes if n.startswith(_SETS) and _UNSET in n]
    return {
        "graphs": 1 if traced.modes_agree else 2,
        "calls": sum(node.op.startswith("call_") for node in traced.train_graph.nodes),
        "kept_whole": _kept_whole(planner, _reasons(notes)),
        "guards": list(_guards(traced)),
        "settings": [{"module": path, "name": name, "value": value} for path, name, value in settings],
        "not_set": [name for names in not_set for name in names.split(", ")],
        "notes": list(notes),
    }


def _reasons(notes: Sequence[str]) -> dict[str, str]:
    """Module path → why the capture could not enter it, read from its notes: ``kept whole: a, b (reason)``."""
    reasons: dict[str, str] = {}
    for note in notes:
        if note.startswith(_WHOLE):
            paths, _, reason = note.removeprefix(_WHOLE).partition(" (")
            reasons.update(dict.fromkeys(paths.split(", "), reason.removesuffix(")")))
    return reasons


def _kept_whole(planner: Planner, reasons: dict[str, str]) -> list[dict[str, Any]]:
    """Modules that are one call though there is something inside, by class and reason."""
    traced, profile = planner.traced, planner.profiles[True]
    total = profile.cost(list(profile.nodes)).flops or 1.0
    found: dict[tuple[str, str], dict[str, float]] = {}  # (class, reason) → path → FLOPs
    for mode in (True, False):
        for node in traced.graph(mode).nodes:
            path, reason = _whole(traced, node, reasons)
            if path and reason:
                kind = type(traced.resolve(path)).__name__
                flops = found.setdefault((kind, reason), {})
                flops[path] = flops.get(path, 0.0) + (profile.nodes[node.name].flops if mode else 0.0)
        if traced.modes_agree:
            break
    return [
        {"class": kind, "reason": reason, "modules": list(flops), "flops_share": sum(flops.values()) / total}
        for (kind, reason), flops in found.items()
    ]


def _whole(traced: TracedModel, node: fx.Node, reasons: dict[str, str]) -> tuple[str, str]:
    """The path of the module that a node calls as a whole, and why; empty where it does not."""
    function = getattr(node.target, "function", node.target)
    if isinstance(function, Checkpointed):
        return str(node.all_input_nodes[0].target), "checkpointed: what it saves is computed again"
    if node.op != "call_module" or node.target in traced.extras:
        return "", ""
    path = str(node.target)
    return path, reasons.get(path) or _why_a_leaf(traced.resolve(path))


def _why_a_leaf(module: nn.Module) -> str:
    """Why a module with something inside is one call; empty for plain layers."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if not module._modules and not isinstance(module, nn.RNNBase):
        return ""
    if is_library(module):
        return "torch.nn's own layer"
    return "hooks on its gradients" if module._backward_hooks or module._backward_pre_hooks else "called as it is"


def _guards(traced: TracedModel) -> Iterator[dict[str, str]]:
    """The decisions of the user's Python that are checked at every call, each once."""
    seen: set[tuple[str, str]] = set()
    for graph in (traced.train_graph, traced.eval_graph):
        for node in graph.nodes:
            kind = _GUARDS.get(getattr(node.target, "function", node.target))
            if kind is None:
                continue
            text, where = _decision(kind, node.args)
            if (text, where) not in seen:
                seen.add((text, where))
                yield {"kind": kind, "where": where, "decision": text}


def _decision(kind: str, args: tuple[Any, ...]) -> tuple[str, str]:
    if kind == "size":
        _, comparison, other, outcome, where = args
        right = "another size" if isinstance(other, fx.Node) else other
        return f"a size {_SIGNS[comparison if outcome else _OPPOSITE[comparison]]} {right}", where
    if kind == "count":
        return f"an operation gives {args[1]} tensors", args[2]
    return (f"a tensor's {args[0]} gives {args[1]}" if kind == "value" else f"a module returns {args[1]}"), args[2]


# ---------------------------------------------------------------- the cuts


def about_cuts(planner: Planner, plan: Plan, blocked: dict[str, str], every: bool) -> list[dict[str, Any]]:
    """Places where the model can be cut, lowest first.

    Args:
        planner: of the captured model.
        plan: its cuts are marked as chosen.
        blocked: what ``obstacles`` gives.
        every: all legal places; otherwise those that a plan chooses among, and the chosen ones.

    Returns:
        Dicts; ``inside`` is the module that the last call below belongs to, ``below`` the share of forward FLOPs
        below the cut, ``obstacle`` why this method or a tied parameter forbids it (None where nothing does).
    """
    candidates = {point.name for point in planner.cut_points[True]}
    nodes = list(planner.traced.train_graph.nodes)
    spent = list(accumulate((planner.profiles[True].nodes[node.name].flops for node in nodes), initial=0.0))
    return [
        {
            "name": point.name,
            "aliases": point.aliases,
            "inside": module_path(planner.traced, nodes[point.position - 1]),
            "chosen": point.name in plan.cuts,
            "candidate": point.name in candidates,
            "obstacle": blocked.get(point.name),
            "shape": str(point.spec),
            "dtype": point.spec.dtype,
            "layout": point.spec.layout,
            "primary": point.primary,
            "crossing": point.crossing,
            "crossing_bytes": point.crossing_bytes,
            "below": spent[point.position] / (spent[-1] or 1.0),
        }
        for point in planner.every_cut[True]
        if every or point.name in candidates or point.name in plan.cuts
    ]


def obstacles(planner: Planner) -> dict[str, str]:
    """By name, why a legal place is no choice for this method on this model."""
    found: dict[str, str] = {}
    for mode in (True, False):
        ties = tied_parameters(planner.traced, planner.profiles[mode], mode)
        for point in planner.every_cut[mode]:
            for tie in ties:
                if tie.is_cut_by(point):
                    found.setdefault(point.name, f"parts the readers of {tie.name}")
    for point in planner.every_cut[True]:
        try:
            planner.head_cost(point)
        except MethodError as error:
            found.setdefault(point.name, str(error))
    return found


def about_crossing(planner: Planner, plan: Plan) -> list[dict[str, Any]]:
    """What crosses each boundary, tensor by tensor; bytes are those of the example batch."""
    nodes = {node.name: node for node in planner.traced.train_graph.nodes}
    found = []
    for boundary in plan.boundaries:
        tensors = []
        for name in boundary.crossing:
            known = planner.profiles[True].nodes.get(name)
            spec: TensorSpec = known.specs[0] if known is not None else boundary.spec
            made_in = module_path(planner.traced, nodes[name]) if name in nodes else ""
            tensors.append(
                {"name": name, "made_in": made_in, "primary": name == boundary.primary, "shape": str(spec)}
                | {"sizes": spec.shape, "dtype": spec.dtype, "layout": spec.layout, "bytes": spec.nbytes}
            )
        found.append(
            {"boundary": boundary.number, "after": boundary.name, "bytes": boundary.crossing_bytes, "tensors": tensors}
        )
    return found


# ---------------------------------------------------------------- the limit


def about_limit(planner: Planner, plan: Plan, blocked: dict[str, str]) -> dict[str, Any] | None:
    """The most expensive stretch of the model that no usable cut divides, and the imbalance it forces on this plan.

    Its cost over the mean part's (heads included) is a lower bound on max/mean. None for a single part.
    """
    mean = sum(part.total.of(plan.balance) for part in plan.parts) / len(plan.parts)
    if len(plan.parts) == 1 or not mean:
        return None
    profile, frozen = planner.profiles[True], frozen_parameters(planner.traced)
    nodes = list(planner.traced.train_graph.nodes)

    def value(stretch: Sequence[fx.Node]) -> float:
        names = [n.name for n in stretch if plan.balance != "time" or profile.nodes[n.name].forward_ms is not None]
        return cost_of(profile, names, frozen).of(plan.balance) if names else 0.0

    usable = [p for p in planner.every_cut[True] if p.name in plan.cuts or p.name not in blocked]
    edges = [(0, None), *((p.position, p.name) for p in usable), (len(nodes), None)]
    stretches = [(nodes[a:b], after, to) for (a, after), (b, to) in pairwise(edges)]
    stretch, after, to = max(stretches, key=lambda found: value(found[0]))
    heaviest = max(stretch, key=lambda node: value([node]))
    cost = value(stretch)
    return {
        "after": after,
        "to": to,
        "heaviest": module_path(planner.traced, heaviest) or heaviest.name,
        "share": cost / (value(nodes) or 1.0),
        "imbalance_at_least": max(1.0, cost / mean),
    }
