"""One way from a command's flags to a converted model, for convert, inspect and train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from localize import LocalModel, to_local
from localize.cli.loading import byte_size, cut_names, example_inputs, open_model, part_count
from localize.cli.method_options import choose_method
from localize.data import load_data
from localize.errors import ConfigError
from localize.source import FORMS
from localize.spec import Balance
from localize.task import TaskKind


@dataclass(frozen=True)
class Recipe:
    """How to convert a model: the flags of `convert`, checked where they are used."""

    tokens: Sequence[str]  # MODEL, and the flags that the command left to the method
    method: str
    options: Sequence[str] = ()
    parts: str = "2"
    memory_budget: str | None = None
    balance: str = "flops"
    cuts: str | None = None
    tied: str = "colocate"
    task: str | None = None
    input_shape: str | None = None
    data: str | None = None
    data_dir: Path = Path("data")
    download: bool = False
    seed: int = 0
    verify: bool = True


def build(recipe: Recipe) -> tuple[LocalModel, str]:
    """The converted model and a short name for it.

    Raises:
        LocalizeError: whatever is wrong with the flags, the model or the method.
    """
    parts, budget = part_count(recipe.parts), byte_size(recipe.memory_budget)
    method, arguments = choose_method(recipe.method, recipe.tokens, recipe.options)
    spec = the_model(arguments)
    source = open_model(spec, recipe.seed)
    task = recipe.task
    if task is None and recipe.data is not None:
        task = load_data(recipe.data, recipe.data_dir, recipe.download).task
    local = to_local(
        source.model,
        example_inputs(source, recipe.input_shape, recipe.data, recipe.data_dir, recipe.download),
        method=method,
        parts=parts,
        balance=cast(Balance, recipe.balance),
        cuts=cut_names(recipe.cuts),
        task=cast(TaskKind | None, task),
        tied=cast(Literal["colocate", "untie"], recipe.tied),
        verify=recipe.verify,
        memory_budget_bytes=budget,
    )
    local.source = spec
    return local, source.name


def the_model(arguments: Sequence[str]) -> str:
    """The one MODEL among the arguments."""
    if len(arguments) != 1:
        raise ConfigError(
            f"One MODEL is needed, got {len(arguments)}{': ' + ', '.join(arguments) if arguments else ''}; "
            f"it is {FORMS}."
        )
    return arguments[0]
