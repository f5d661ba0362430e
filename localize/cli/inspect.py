"""``localize inspect``: where a model may be cut, where it would be cut, and what the parts cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from localize import LocalModel
from localize.artifact import describe_inputs, example_from
from localize.cli import flags
from localize.cli.building import Recipe, build, the_model
from localize.cli.loading import is_artefact, open_artefact
from localize.cli.output import Output
from localize.convert.plan import Planner
from localize.convert.record import trace


def inspect(
    context: typer.Context,
    model: flags.Model,
    method: flags.Method = "scpl",
    parts: flags.Parts = "2",
    memory_budget: flags.MemoryBudget = None,
    balance: flags.Balance = "flops",
    cuts: flags.Cuts = None,
    task: flags.Task = None,
    input_shape: flags.InputShape = None,
    data: flags.ExampleData = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    option: flags.MethodOptions = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Shows the places where MODEL can be cut, which are chosen, and what each part costs. Writes nothing.

    \b
    localize inspect model.py --parts 4
    localize inspect torchvision:resnet50 --balance activations --parts 4
    """
    out = Output.of(as_json, quiet)
    tokens = [model, *context.args]
    if is_artefact(model):
        local = open_artefact(the_model(tokens))
    else:
        local, _ = build(
            Recipe(
                tokens=tokens,
                method=method,
                options=option or (),
                parts=parts,
                memory_budget=memory_budget,
                balance=balance,
                cuts=cuts,
                task=task,
                input_shape=input_shape,
                data=data,
                data_dir=data_dir,
                download=download,
            )
        )
    points = cut_points(local)
    _show(out, local, points)
    out.result({"plan": local.plan.to_dict(), "cut_points": points}, brief="\n".join(local.plan.cuts))


def cut_points(local: LocalModel) -> list[dict[str, Any]]:
    """All places where the model can be cut, bottom first; ``below`` is the share of forward FLOPs below it."""
    example = example_from(describe_inputs(local), local.to_standard())
    traced = trace(local.to_standard(), example.args, example.kwargs)
    planner = Planner(traced, local.method, local.plan.balance, local.task)
    nodes = [node.name for node in traced.graph(True).nodes]
    profile = planner.profiles[True]
    total = profile.cost(nodes).flops or 1.0
    return [
        {
            "name": point.name,
            "aliases": point.aliases,
            "chosen": point.name in local.plan.cuts,
            "shape": str(point.spec),
            "layout": point.spec.layout,
            "crossing": point.crossing,
            "crossing_bytes": point.crossing_bytes,
            "below": profile.cost(nodes[: point.position]).flops / total,
        }
        for point in planner.every_cut[True]
    ]


def _show(out: Output, local: LocalModel, points: Sequence[dict[str, Any]]) -> None:
    out.text(str(local.plan))
    rows = [
        (
            "✂" if point["chosen"] else "",
            point["name"],
            point["shape"],
            len(point["crossing"]),
            point["crossing_bytes"] / 1e6,
            f"{100 * point['below']:.0f} %",
        )
        for point in points
    ]
    out.text("\nWhere it can be cut (--cuts takes these names):")
    out.table(["", "cut after", "hidden state", "tensors", "MB across", "FLOPs below"], rows)
