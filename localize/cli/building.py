"""One way from a command's flags to a converted model, for convert, inspect and train."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer
from torch import nn

from localize import LocalModel, to_local
from localize.cli.loading import byte_size, cut_names, example_inputs, open_model, part_count
from localize.cli.method_options import choose_method
from localize.data import Data, load_data
from localize.errors import ConfigError
from localize.source import FORMS

CONVERSION_FLAGS = ("method", "parts", "balance", "cuts", "task", "option", "memory_budget")


@dataclass(frozen=True)
class Recipe:
    """How to convert a model: the flags of `convert`, checked where they are used."""

    tokens: Sequence[str]  # MODEL, and the flags that the command left to the method
    given: Collection[str]  # which of CONVERSION_FLAGS stand on the command line, with their dashes
    method: str
    option: Sequence[str]
    parts: str
    memory_budget: str | None
    balance: str
    cuts: str | None
    task: str | None
    data: str | None
    data_dir: Path
    download: bool
    seed: int
    tied: str = "colocate"
    input_shape: str | None = None
    verify: bool = True

    @classmethod
    def of(cls, context: typer.Context) -> Recipe:
        """The flags of a command that has (at least) those without a default here."""
        params = context.params
        flags = {f.name: params[f.name] for f in fields(cls) if f.name in params}
        # The context holds what was typed: paths are text there.
        flags |= {"option": params["option"] or (), "data_dir": Path(params["data_dir"])}
        return cls(tokens=[params["model"], *context.args], given=_given(context), **flags)

    def load_data(self) -> Data | None:
        """The data set given, if any."""
        return None if self.data is None else load_data(self.data, self.data_dir, self.download)


def _given(context: typer.Context) -> list[str]:
    sources = {name: context.get_parameter_source(name) for name in CONVERSION_FLAGS}
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


@dataclass(frozen=True)
class Order:
    """What a recipe comes to: the arguments of ``to_local``."""

    spec: str  # the MODEL
    name: str  # a short one
    model: nn.Module
    example: Any
    options: dict[str, Any]


def order(recipe: Recipe, data: Data | None = None) -> Order:
    """Opens the model and reads the flags; ``data`` is the recipe's data set, where it is loaded already.

    Raises:
        LocalizeError: whatever is wrong with the flags or the model.
    """
    options: dict[str, Any] = {
        "parts": part_count(recipe.parts),
        "memory_budget_bytes": byte_size(recipe.memory_budget),
        "cuts": cut_names(recipe.cuts),
        "balance": recipe.balance,
        "tied": recipe.tied,
        "verify": recipe.verify,
    }
    _check_cuts(recipe, options["parts"], options["cuts"])
    options["method"], arguments = choose_method(recipe.method, recipe.tokens, recipe.option)
    spec = the_model(arguments)
    source = open_model(spec, recipe.seed)
    if data is None:
        data = recipe.load_data()
    options["task"] = data.task if recipe.task is None and data is not None else recipe.task
    return Order(spec, source.name, source.model, example_inputs(source, recipe.input_shape, data), options)


def build(recipe: Recipe, data: Data | None = None) -> tuple[LocalModel, str]:
    """The converted model and a short name for it; ``data`` as for ``order``.

    Raises:
        LocalizeError: whatever is wrong with the flags, the model or the method.
    """
    ordered = order(recipe, data)
    local = to_local(ordered.model, ordered.example, **ordered.options)
    local.source = ordered.spec
    return local, ordered.name


def _check_cuts(recipe: Recipe, parts: int | str, cuts: Sequence[str] | None) -> None:
    """Raises ``ConfigError`` where --parts and --cuts, both given, disagree."""
    if cuts is not None and "--parts" in recipe.given and parts != len(cuts) + 1:
        raise ConfigError(
            f"--cuts {recipe.cuts} makes {len(cuts) + 1} parts and --parts says {parts}; leave one of them out."
        )


def the_model(arguments: Sequence[str]) -> str:
    """The one MODEL among the arguments."""
    if len(arguments) != 1:
        raise ConfigError(
            f"One MODEL is needed, got {len(arguments)}{': ' + ', '.join(arguments) if arguments else ''}; "
            f"it is {FORMS}."
        )
    return arguments[0]
