"""``localize inspect``: where a model may be cut, where it would be cut, and what the parts cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from localize import LocalModel
from localize.cli import flags
from localize.cli.building import Recipe, order, the_model
from localize.cli.loading import is_artefact, open_artefact
from localize.cli.output import Output
from localize.convert.arguments import check_arguments, example_of, task_of
from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.ties import untied
from localize.planfile import describe_inputs, example_from
from localize.spec import Plan


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
    tied: flags.Tied = "colocate",
    seed: flags.Seed = 0,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Shows the places where MODEL can be cut, which are chosen, and what each part costs. Writes nothing.

    \b
    localize inspect model.py --parts 4
    localize inspect torchvision:resnet50 --balance activations --parts 4
    """
    out = Output.of(as_json, quiet)
    recipe = Recipe.of(context)
    if is_artefact(model):
        local = open_artefact(the_model(recipe.tokens))
        plan, planner = local.plan, _planner_of(local)
    else:
        plan, planner = look(recipe)
    points = cut_points(planner, plan)
    _show(out, plan, points)
    out.result({"plan": plan.to_dict(), "cut_points": points}, brief="\n".join(plan.cuts))


def look(recipe: Recipe) -> tuple[Plan, Planner]:
    """What a conversion would find out before it builds anything.

    Raises:
        LocalizeError: whatever is wrong with the flags, the model or the method.
    """
    ordered = order(recipe)
    model, wanted = ordered.model, ordered.options
    choice = {name: wanted[name] for name in ("parts", "cuts", "memory_budget_bytes")}
    check_arguments(wanted["balance"], wanted["tied"], **choice)
    with untied(model, wanted["tied"] == "untie") as copies:
        call, notes = example_of(model, ordered.example)
        traced = trace(model, call.args, call.kwargs)
        planner = Planner(traced, wanted["method"], wanted["balance"], task_of(wanted["task"], None))
        layout = planner.choose(**choice)
        for point in layout.cuts[True].points:
            planner.head_cost(point)  # a cut by hand where the method can have no head is an error here, too
        return replace(layout.plan, notes=copies + notes + layout.plan.notes), planner


def _planner_of(local: LocalModel) -> Planner:
    example = example_from(describe_inputs(local), local.to_standard())
    traced = trace(local.to_standard(), example.args, example.kwargs)
    return Planner(traced, local.method, local.plan.balance, local.task)


def cut_points(planner: Planner, plan: Plan) -> list[dict[str, Any]]:
    """All places where the model can be cut, bottom first; ``below`` is the share of forward FLOPs below it."""
    nodes = [node.name for node in planner.traced.graph(True).nodes]
    profile = planner.profiles[True]
    total = profile.cost(nodes).flops or 1.0
    return [
        {
            "name": point.name,
            "aliases": point.aliases,
            "chosen": point.name in plan.cuts,
            "shape": str(point.spec),
            "layout": point.spec.layout,
            "crossing": point.crossing,
            "crossing_bytes": point.crossing_bytes,
            "below": profile.cost(nodes[: point.position]).flops / total,
        }
        for point in planner.every_cut[True]
    ]


def _show(out: Output, plan: Plan, points: Sequence[dict[str, Any]]) -> None:
    out.text(str(plan))
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
