"""``localize inspect``: what a conversion would find out and do, without doing it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from localize.cli import flags
from localize.cli.building import Recipe, order, the_model
from localize.cli.inspection import (
    about_capture,
    about_crossing,
    about_cuts,
    about_limit,
    about_model,
    obstacles,
)
from localize.cli.loading import is_artefact, open_artefact
from localize.cli.output import Output
from localize.cli.report import show
from localize.convert.arguments import check_arguments, example_of, task_of
from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.ties import untied
from localize.planfile import describe_inputs, example_from
from localize.spec import Plan

_NOT_FOR_CONVERT = ("model", "everything", "as_json", "quiet")


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
    everything: Annotated[bool, typer.Option("--all", help="Every legal cut and every note, in full.")] = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Shows what a conversion of MODEL would do: how it was captured, where it can be cut, which cuts are chosen,
    what crosses them and what each part costs. Writes nothing.

    \b
    localize inspect model.py --parts 4
    localize inspect torchvision:resnet50 --balance activations --parts 4
    localize inspect model.py --all --json
    """
    out = Output.of(as_json, quiet)
    recipe = Recipe.of(context)
    artefact = is_artefact(model)
    found = _look_into(the_model(recipe.tokens)) if artefact else look(recipe)
    plan, planner = found.plan, found.planner
    blocked = obstacles(planner)
    report = {
        "model": about_model(planner, plan, found.spec, found.inputs_from),
        "capture": about_capture(planner, plan.notes),
        "legal_cuts": len(planner.every_cut[True]),
        "cut_points": about_cuts(planner, plan, blocked, everything),
        "plan": plan.to_dict(),
        "crossing": about_crossing(planner, plan),
        "limit": about_limit(planner, plan, blocked),
        "next": f"localize train {shlex.quote(model)} --data DATA" if artefact else _conversion(context, recipe),
    }
    show(out, plan, report, everything)
    out.result(report, brief="\n".join(plan.cuts))


class Look(NamedTuple):
    """What was found out about one model."""

    plan: Plan
    planner: Planner
    spec: str  # the MODEL
    inputs_from: str  # where the example inputs come from


def look(recipe: Recipe) -> Look:
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
        plan = replace(layout.plan, tied=wanted["tied"], notes=copies + notes + layout.plan.notes)
        return Look(plan, planner, ordered.spec, _origin(recipe, notes))


def _look_into(folder: str) -> Look:
    """What there is to say of an artefact: its own plan, over a capture of its model."""
    local = open_artefact(folder)
    example = example_from(describe_inputs(local), local.to_standard())
    traced = trace(local.to_standard(), example.args, example.kwargs)
    planner = Planner(traced, local.method, local.plan.balance, local.task)
    return Look(local.plan, planner, folder, "the artefact's plan.json")


def _origin(recipe: Recipe, notes: Sequence[str]) -> str:
    """Where the example inputs come from; ``notes`` say how they were inferred, if they were."""
    if notes:
        return f"inferred from {notes[0].partition(' inferred from ')[2]}"
    if recipe.input_shape is not None:
        return f"--input-shape {recipe.input_shape}"
    return f"--data {recipe.data}" if recipe.data is not None else "example_inputs in the model's file"


def _conversion(context: typer.Context, recipe: Recipe) -> str:
    """The command that converts what was inspected."""
    words = [*recipe.tokens]
    for parameter in context.command.params:
        name, source = str(parameter.name), context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE" or name in _NOT_FOR_CONVERT:
            continue
        value = context.params[name]
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [parameter.opts[0], *([] if value is True else [str(each)])]
    common = context.parent.params.get("imports") if context.parent is not None else None
    for file in common or ():
        words += ["--import", str(file)]
    return f"localize convert {shlex.join(words)}"
