"""``localize schedule``: who does what when, how long it takes, and how fast a model's parts will train."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import typer

from localize.cli import flags
from localize.cli import schedule_flags as sf
from localize.cli.building import Recipe, the_model
from localize.cli.inspect import look
from localize.cli.loading import is_artefact, open_artefact, part_count
from localize.cli.method_options import choose_method
from localize.cli.output import Output
from localize.errors import ConfigError, problem_list
from localize.heads.base import Method
from localize.heads.registry import get_method
from localize.runtime.costs import Cost, Costs, costs_of_plan, samples_of
from localize.runtime.gantt import draw
from localize.runtime.jobs import Order
from localize.runtime.placement import assign_planned
from localize.runtime.predict import Prediction, predict
from localize.runtime.simulate import ranks_problems
from localize.runtime.timeline import Unit
from localize.spec import Plan

_PIPELINE = 4  # micro-batches of the pipelines that --compare shows, where --microbatches does not say
_WINDOW = 2  # messages under way, as in the distributed runtime
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_MANY, _MANY_PARTS = 50_000, 100  # of batches in parts and of parts: more take seconds
_COSTS = ("forward", "loss", "backward", "update", "relay", "feedback", "transfer")
_PLAN = ("flops", "bandwidth", "batch_size")
_CONVERSION = ("balance", "cuts", "task", "memory_budget", "input_shape", "data", "tied")
_LEGEND = "F forward, L head and loss, B backward, b gradients passed on only, U update, · idle"


def schedule(
    context: typer.Context,
    model: sf.OptionalModel = None,
    method: flags.Method = "scpl",
    parts: flags.Parts = "4",
    batches: sf.Batches = 8,
    microbatches: sf.Microbatches = 1,
    ranks: sf.Ranks = None,
    order: sf.Order = "stage",
    forward: sf.Forward = None,
    loss: sf.Loss = None,
    backward: sf.Backward = None,
    update: sf.Update = None,
    relay: sf.Relay = None,
    feedback: sf.Feedback = None,
    transfer: sf.Transfer = None,
    window: sf.Window = None,
    flops: sf.Flops = None,
    bandwidth: sf.Bandwidth = None,
    batch_size: sf.BatchSize = None,
    compare: sf.Compare = False,
    plot: sf.Plot = None,
    trace: sf.Trace = None,
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
    """Shows who does what when, one device a part (or R for all). With MODEL, predicts how fast its parts will train.

    Without MODEL, costs are in time steps: one number, or one a part with commas. MODEL may be an artefact
    folder: it knows its method and parts.

    \b
    localize schedule --method nwise --reach 2 --parts 4 --batches 8
    localize schedule --method scpl --parts 4 --ranks 2
    localize schedule --method scpl --parts 4 --microbatches 3 --backward 3,3,2,1 --compare --plot scpl.svg
    localize schedule model.py --method scpl --parts 4 --flops 10T --bandwidth 12.5G --compare
    """
    out = Output.of(as_json, quiet)
    given = _given(context)
    case = _case(context, given)
    options: dict[str, Any] = {"parts": case.parts, "batches": batches, "unit": case.unit, "ranks": case.ranges(ranks)}
    options["window"] = window if window is not None or case.plan is None else _WINDOW
    if case.parts * batches > _MANY or case.parts > _MANY_PARTS:
        out.note(f"Simulating {case.parts} parts …")
    found = [predict(case.method, case.costs, microbatches=microbatches, order=cast(Order, order), **options)]
    if compare:
        options["ranks"] = found[0].timeline.ranks or None
        pieces = microbatches if microbatches > 1 else _PIPELINE
        beside: list[tuple[int, Order]] = [(1, "stage"), (pieces, "stage"), (pieces, "1f1b")]
        found += [predict(get_method("bp"), case.bp_costs, microbatches=m, order=o, **options) for m, o in beside]
    try:
        if plot is not None:
            draw([each.timeline for each in found], plot)
        if trace is not None:
            found[0].timeline.to_trace(trace)
    except OSError as error:
        raise ConfigError(f"A file cannot be written: {error}.") from error
    _show(out, case, found)
    for written in (plot, trace):
        if written is not None:
            out.note(f"Wrote {written}")


@dataclass(frozen=True)
class _Case:
    """What to simulate; ``samples`` of a batch, where a plan says so."""

    method: Method
    parts: int
    costs: Costs
    bp_costs: Costs  # of the same parts without heads
    plan: Plan | None = None
    samples: int | None = None

    @property
    def unit(self) -> Unit:
        return "steps" if self.plan is None else "s"

    def ranges(self, ranks: int | None) -> int | tuple[range, ...] | None:
        """The parts of each rank, where a plan says what training makes of so many ranks; else their number.

        Raises:
            ConfigError: no number of ranks for these parts.
        """
        if ranks is None or self.plan is None:
            return ranks
        if problems := ranks_problems(ranks, self.parts):
            raise ConfigError(problem_list("The parts cannot be given to ranks", problems))
        return assign_planned(self.plan, ranks)

    def rate(self, found: Prediction) -> float | None:
        """Samples a second."""
        return self.samples / found.step if self.samples and found.step else None


def _given(context: typer.Context) -> set[str]:
    """The options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _case(context: typer.Context, given: set[str]) -> _Case:
    recipe = Recipe.of(context)
    recipe = replace(recipe, tokens=[token for token in recipe.tokens if token is not None])
    params = context.params
    if artefacts := [token for token in recipe.tokens if is_artefact(token)]:
        flags_given = [*recipe.given, *(token for token in recipe.tokens if token.startswith("--"))]
        if flags_given:
            raise ConfigError(
                f"{artefacts[0]} is converted already; {', '.join(flags_given)} would need the model itself: "
                "`localize schedule MODEL`."
            )
        local = open_artefact(the_model(recipe.tokens))
        return _planned(local.method, local.plan, params, given)
    method, models = choose_method(recipe.method, recipe.tokens, recipe.option)
    if models:
        the_model(models)
        return _planned(method, look(recipe)[0], params, given)
    _refuse([name for name in (*_PLAN, *_CONVERSION) if name in given], "they are about a MODEL, and none is given")
    costs = Costs(**{name: _numbers(name, params[name]) for name in _COSTS if params[name] is not None})
    count = part_count(recipe.parts)
    if count == "auto":
        raise ConfigError("parts='auto' takes a MODEL, and --memory-budget; without one, give a number of parts.")
    return _Case(method, count, costs, costs)


def _planned(method: Method, plan: Plan, params: dict[str, Any], given: set[str]) -> _Case:
    """The case of a plan on devices and links of the speed given."""
    _refuse([name for name in _COSTS if name in given], "the costs of MODEL's parts come from its plan")
    speeds = None if params["flops"] is None else [_rate("flops", text) for text in params["flops"].split(",")]
    bandwidth = None if params["bandwidth"] is None else _rate("bandwidth", params["bandwidth"])
    rates: dict[str, Any] = {
        "flops": speeds[0] if speeds is not None and len(speeds) == 1 else speeds,
        "bandwidth": bandwidth,
        "samples": params["batch_size"],
        "feedback": method.feedback == "loss",
        "head_first": method.encodes_target,
    }
    costs, bare = costs_of_plan(plan, **rates), costs_of_plan(plan, heads=False, **rates)
    return _Case(method, len(plan.parts), costs, bare, plan, params["batch_size"] or samples_of(plan))


def _refuse(names: Sequence[str], reason: str) -> None:
    if names:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ConfigError(f"{listed} cannot be used here: {reason}.")


def _numbers(name: str, text: str) -> Cost:
    """``"1"``, ``"1/3"`` or one a part, ``"1,2.5,1"``, exactly.

    Raises:
        ConfigError: not numbers.
    """
    try:
        values = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--{name} is {text!r}; it takes a number such as 1, 0.5 or 1/3, or one a part with commas."
        ) from None
    return values[0] if len(values) == 1 else values


def _rate(name: str, text: str) -> float:
    """``"12.5G"`` a second; units are powers of 1000.

    Raises:
        ConfigError: not a rate.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)([kmgtp]?)", text.strip().lower())
    value = 0.0 if match is None else float(match[1]) * _UNITS[match[2]]
    if not 0 < value < math.inf:
        what = "FLOP/s, such as 10T" if name == "flops" else "bytes a second, such as 12.5G (a link of 100 Gbit/s)"
        raise ConfigError(f"--{name} is {text!r}; it takes {what}.")
    return value


def _show(out: Output, case: _Case, found: Sequence[Prediction]) -> None:
    first = found[0]
    out.text(f"{first.timeline.title}\n{first.timeline.text()}\n")
    width = first.timeline.column()
    out.note(_LEGEND if case.plan is not None or width in (0, 1) else f"{_LEGEND}; a column is {width:.3g} time steps")
    slowest = "slowest rank" if first.timeline.ranks else "slowest part"
    columns = ["schedule", "time steps", "a batch", slowest, "its work", "idle %"]
    rows = [_row(case, each) for each in found]
    if case.plan is not None:
        columns = ["schedule", "samples/s", "ms a batch", slowest, "its work, ms", "idle %"]
    out.table(columns, rows)
    listed = [
        {
            "title": each.timeline.title,
            "steps": each.timeline.steps,
            "idle_share": each.timeline.idle_share,
            **each.to_dict(),
            "samples_per_s": case.rate(each),
        }
        for each in found
    ]
    payload = {
        "method": case.method.name,
        "options": case.method.options(),
        "parts": case.parts,
        **({"ranks": [list(numbers) for numbers in first.timeline.ranks]} if first.timeline.ranks else {}),
        "unit": case.unit,
        "samples": case.samples,
        "costs": {name: _floats(cost) for name, cost in vars(case.costs).items()},
        **listed[0],
        "compared": listed[1:],
        "intervals": first.timeline.to_dict()["intervals"],
    }
    out.result(payload, brief=f"{case.rate(first):.1f}" if case.plan is not None else f"{first.timeline.steps:g}")


def _row(case: _Case, found: Prediction) -> tuple[str | float | None, ...]:
    timeline, scale = found.timeline, 1 if case.plan is None else 1e3
    amounts = [timeline.steps if case.plan is None else case.rate(found), found.step * scale]
    work = found.slowest_work * scale
    idle = 100 * timeline.idle_share
    return timeline.title, *map(_short, amounts), found.slowest, _short(work), _short(idle)


def _short(number: float | None) -> float | None:
    """An integer where it is one, for a table."""
    return int(number) if number is not None and number == int(number) else number


def _floats(cost: Cost | None) -> float | list[float] | None:
    """A cost for JSON, which knows no fractions."""
    if cost is None:
        return None
    return [float(value) for value in cost] if isinstance(cost, Sequence) else float(cost)
