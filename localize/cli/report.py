"""What ``localize inspect`` found out, for people to read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from localize.cli.output import Bytes, Flops, Output, Quantity, Share
from localize.spec import Plan

_ROWS, _LISTED = 24, 6  # of the table of cuts, and of a list of names
_ALIKE = 3  # names that are worth a star
_WORTH_SAYING = 1.01  # imbalance that one stretch of the model forces
_TOLD = ("kept whole: ", "decides on values at ", "sets ", "train and eval mode ", "example inputs ")  # elsewhere


def show(out: Output, plan: Plan, report: Mapping[str, Any], everything: bool) -> None:
    """Prints the whole report; lists are shortened unless ``everything``."""
    model = report["model"]
    listed = 10**6 if everything else _LISTED
    out.facts(f"{model['class']} ({model['spec']})", _model_facts(model, report["capture"], listed))
    out.facts("\nCapture", _capture_facts(report["capture"], listed))
    _show_cuts(out, report, everything)
    _show_parts(out, plan)
    if report["limit"] is not None and report["limit"]["imbalance_at_least"] > _WORTH_SAYING:
        out.facts("Limit", _limit_facts(report["limit"], plan))
        out.text("")
    _show_crossing(out, report["crossing"], listed)
    out.text(f"Next: {report['next']}")


def _model_facts(model: Mapping[str, Any], capture: Mapping[str, Any], listed: int) -> Iterator[tuple[str, str]]:
    frozen, unused = model["frozen_parameters"], model["unused_parameters"]
    buffers = f", buffers {Bytes(model['buffer_bytes'])}" if model["buffer_bytes"] else ""
    yield (
        "parameters",
        f"{Quantity(model['parameters'])}, {Bytes(model['parameter_bytes'])}{buffers}"
        f"{f', {Quantity(frozen)} of them frozen' if frozen else ''}",
    )
    if unused:
        yield "unused", f"{gathered(unused, listed)}: no call reads them, nothing trains them"
    for tied in model["shared_parameters"]:
        names = " = ".join(tied["names"][:listed]) + (" = …" if len(tied["names"]) > listed else "")
        kept = f"stays in one part, which rules out {tied['cuts_blocked']} of the legal cuts"
        free = "no cut parts its readers"
        yield "tied", f"{names} ({Bytes(tied['bytes'])}): {kept if tied['cuts_blocked'] else free}"
    inputs = [f"{i['name']} {'×'.join(map(str, i['sizes']))} {_dtype(i['dtype'])}" for i in model["inputs"]]
    yield "example", f"{', '.join(inputs)}; {model['inputs_from']}"
    classes = f", {model['num_classes']} classes" if model["num_classes"] else ""
    yield "task", f"{model['task'].replace('_', ' ')}{classes}"
    yield "forward", f"{Flops(model['flops'])} for the example batch"
    two = capture["graphs"] == 2
    yield "train, eval", "two graphs: they do different things" if two else "one graph"


def _capture_facts(capture: Mapping[str, Any], listed: int) -> Iterator[tuple[str, str]]:
    yield "recorded", f"{capture['calls']} calls"
    for whole in capture["kept_whole"]:
        share = f", {Share(whole['flops_share'])} of the FLOPs" if whole["flops_share"] else ""
        yield "kept whole", f"{whole['class']}{share}: {gathered(whole['modules'], listed)}. Why: {whole['reason']}"
    guards = [f"{guard['decision']} ({guard['where']})" for guard in capture["guards"]]
    for guard in guards[:listed]:
        yield "checked", guard
    if len(guards) > listed:
        yield "checked", f"and {len(guards) - listed} more decisions; --all lists them"
    settings = sorted({setting["name"] for setting in capture["settings"]})
    if settings:
        yield "settings", f"{gathered(settings, listed)}: read by the forward; changing one later is an error"
    if capture["not_set"]:
        yield "not set", f"{gathered(capture['not_set'], listed)}: the forward sets these, parts do not"
    for note in capture["notes"]:
        if not note.startswith(_TOLD):
            yield "note", note


def _limit_facts(limit: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, str]]:
    start = f"after {limit['after']}" if limit["after"] else "the start"
    end = f"after {limit['to']}" if limit["to"] else "the end"
    fewer = int(1 / limit["share"]) if limit["share"] else 0
    yield (
        "imbalance",
        f"at least {limit['imbalance_at_least']:.3f} with {len(plan.parts)} parts: no usable cut lies between {start} "
        f"and {end}, where {Share(limit['share'])} of the model's {plan.balance} is, most of it in {limit['heaviest']}"
        f"{f'; it is no limit to {fewer} parts or fewer' if fewer > 1 else ''}",
    )


def gathered(names: Sequence[str], listed: int) -> str:
    """Names on one line, three or more that differ only in numbers as one: ``layer.*.attention (12)``."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    texts: list[str] = []
    for found in alike.values():
        texts += found if len(found) < _ALIKE else [f"{_pattern(found)} ({len(found)})"]
    more = len(texts) - listed
    return ", ".join(texts[:listed]) + (f" and {more} more" if more > 0 else "")


def _pattern(names: Sequence[str]) -> str:
    """What names have in common, a star for every number in which they differ."""
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(pieces[0] if len(set(pieces)) == 1 else "*" for pieces in columns)


def _show_cuts(out: Output, report: Mapping[str, Any], everything: bool) -> None:
    points, legal = report["cut_points"], report["legal_cuts"]
    shown = points if everything else _thinned(points)
    some = f"{len(shown)} of {len(points)} candidates" if len(shown) < len(points) else _count(len(points), "candidate")
    which = f"all {legal} legal places" if everything else f"{some}; --all shows all {_count(legal, 'legal place')}"
    out.text(f"\nWhere it can be cut: {which} (--cuts takes these names)")
    reasons = list(dict.fromkeys(point["obstacle"] for point in shown if point["obstacle"]))
    columns = ["", "cut after", "inside", "head reads", "layout", "tensors", "across", "FLOPs below"]
    rows = [
        (
            "✂" if point["chosen"] else f"({reasons.index(point['obstacle']) + 1})" if point["obstacle"] else "",
            point["name"],
            "" if f"{point['inside']}.".startswith(f"{point['name']}.") else point["inside"],
            point["shape"],
            point["layout"],
            len(point["crossing"]),
            Bytes(point["crossing_bytes"]),
            Share(point["below"]),
        )
        for point in shown
    ]
    out.table(columns, rows)
    for number, reason in enumerate(reasons, 1):
        out.text(f"({number}) not usable: {reason}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _thinned(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The chosen places, and of every few others the one that the fewest tensors cross; about ``_ROWS`` of them."""
    if len(points) <= _ROWS:
        return list(points)
    chosen = {i for i, point in enumerate(points) if point["chosen"]}
    others = [i for i in range(len(points)) if i not in chosen]
    groups = max(_ROWS - len(chosen), 1)
    edges = [len(others) * k // groups for k in range(groups + 1)]
    leanest = {
        min(others[a:b], key=lambda i: (len(points[i]["crossing"]), points[i]["crossing_bytes"]))
        for a, b in pairwise(edges)
        if a < b
    }
    return [points[i] for i in sorted(chosen | leanest)]


def _show_parts(out: Output, plan: Plan) -> None:
    costs = [part.total.of(plan.balance) for part in plan.parts]
    mean = sum(costs) / len(costs) or 1.0
    out.text(
        f"\n{len(plan.parts)} parts for {plan.method} by {plan.balance}, heads included: imbalance "
        f"{plan.imbalance:.3f} (largest part over the mean; 1 is even)"
    )
    columns = ["part", "from", "to", "FLOPs", "params", "saved", "head\nFLOPs", "head\nparams", "head\nsaved"]
    extra = {"time": ["ms"], "memory": ["memory"]}.get(plan.balance, [])
    rows = []
    for part, cost in zip(plan.parts, costs, strict=True):
        numbers: list[Any] = []
        for piece in (part.part, part.head):
            numbers += [Quantity(piece.flops), Bytes(piece.param_bytes), Bytes(piece.saved_bytes)]
        numbers += [Bytes(cost) if plan.balance == "memory" else cost for _ in extra]
        rows.append((part.number, part.first, part.last, *numbers, cost / mean))
    out.table([*columns, *extra, "of mean"], rows)


def _show_crossing(out: Output, crossing: Sequence[Mapping[str, Any]], listed: int) -> None:
    if not crossing:
        return
    out.text("What crosses, for the example batch (✂ what the head reads)")
    rows: list[tuple[Any, ...]] = []
    for boundary in crossing:
        k, tensors = boundary["boundary"], boundary["tensors"]
        kept = sorted(tensors, key=lambda tensor: (not tensor["primary"], -tensor["bytes"]))[:listed]
        place: tuple[Any, ...] = (f"{k} → {k + 1}", boundary["after"], Bytes(boundary["bytes"]))
        for tensor in [tensor for tensor in tensors if tensor in kept]:
            mark, kind = "✂" if tensor["primary"] else "", _dtype(tensor["dtype"])
            size = Bytes(tensor["bytes"])
            rows.append((*place, mark, _made(tensor), tensor["shape"], kind, tensor["layout"], size))
            place = ("", "", "")
        if len(tensors) > len(kept):
            rest = Bytes(boundary["bytes"] - sum(tensor["bytes"] for tensor in kept))
            rows.append((*place, "", f"and {len(tensors) - len(kept)} more", "", "", "", rest))
    out.table(["parts", "cut after", "in all", "", "tensor", "shape", "dtype", "layout", "bytes"], rows)


def _made(tensor: Mapping[str, Any]) -> str:
    """The module that a tensor comes from, and its own name where that says more."""
    name, module = str(tensor["name"]), str(tensor["made_in"])
    called = re.fullmatch(rf"_?{re.escape(module.replace('.', '_'))}(_\d+)?", name)
    return module if module and called else f"{name} in {module}" if module else name


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
