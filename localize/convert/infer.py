"""Example inputs for a model that came without any: what the model says of itself, else a search.

    declared    what Lightning, timm, torchvision and transformers models tell, checked by one run
    search      the usual sizes for the first layers, a bounded number of them

Runs are on fake tensors: nothing is computed and nothing of the model changes. Only a model whose control flow
depends on values is run for real, and only a few times.

What the search finds must keep the samples apart: some output grows with the batch, and layers that know where
the batch is (``batch_first``) find it there. It cannot know which image size a model that takes any is meant for,
nor what an index means; so the choice is always reported.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from localize.convert.declared import declared
from localize.convert.first_layer import BATCH, Guess, guesses, unique
from localize.convert.restore import preserved
from localize.errors import ConfigError
from localize.part import kind_of
from localize.signature import Call, tensors_of

_TRIES = 120  # runs of a search, at most
_REAL_TRIES = 4  # of them on real tensors
_OTHER_BATCH = 3
_KINDS = 8  # guesses to combine where the forward takes several tensors
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class Inferred:
    """Example inputs and where they come from, for the report."""

    inputs: Any
    note: str


def infer_example(model: nn.Module) -> Inferred:
    """Example inputs for ``model``, a batch of 2 where the model names no other.

    Raises:
        ConfigError: nothing fits; the message says what to pass.
    """
    trial, refused = _Trial(model), []
    for found in declared(model):
        inputs = found.inputs if found.certain else _as_wanted(model, found.inputs)
        problem = None if found.certain else trial.problem(inputs)
        if problem is None:
            return Inferred(inputs, f"example inputs {_shapes(inputs)} inferred from {found.origin}")
        refused.append(f"{_shapes(inputs)} from {found.origin}: {problem}")
    if not refused:
        searched = _search(model, trial, refused)
        if searched is not None:
            return searched
    raise _nothing_fits(model, refused)


def _as_wanted(model: nn.Module, inputs: Any) -> Any:
    """Tensors on the model's device, those of floating point in its precision."""
    device, dtype = kind_of(model)
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), inputs
    )


def _nothing_fits(model: nn.Module, refused: Sequence[str]) -> ConfigError:
    tried = f" Tried {len(refused)}; first {refused[0]}." if refused else ""
    wanted = ", ".join(_required(model)) or "one tensor"
    return ConfigError(
        f"Cannot guess what {type(model).__name__} takes.{tried} Pass example_inputs=: a tensor, a tuple of positional "
        f"or a dict of keyword arguments for the model's forward (it needs {wanted}), with a batch of 2 or more "
        "(command line: --input-shape 3x32x32)."
    )


def _shapes(inputs: Any) -> str:
    """The shapes of a call's tensors, for reading."""
    call = Call.of(inputs)
    named = [*((None, a) for a in call.args), *call.kwargs.items()]
    texts = [(name, " and ".join(str(tuple(t.shape)) for t in tensors_of(value))) for name, value in named]
    return ", ".join(f"{name} {text}" if name else text for name, text in texts if text)


# ---------------------------------------------------------------- the search


def _search(model: nn.Module, trial: _Trial, refused: list[str]) -> Inferred | None:
    """The first guess that fits; one that a layer reads with another batch axis only where nothing else does."""
    device, dtype = kind_of(model)
    doubtful: Inferred | None = None
    for chosen in islice(_combinations(model), _TRIES):
        blank, larger = (
            _call(model, tuple(guess.blank(batch, device, dtype) for guess in chosen))
            for batch in (BATCH, _OTHER_BATCH)
        )
        problem = trial.problem(blank, larger)
        if problem is not None:
            refused.append(f"{_shapes(blank)}: {problem}")
            continue
        layers = " and ".join(dict.fromkeys(guess.layer for guess in chosen))
        note = f"example inputs {_shapes(blank)} inferred from {layers}"
        if chosen[0].batch_axis:
            note += f", the batch on axis {chosen[0].batch_axis}"
        inputs = _call(model, tuple(guess.tensor(device, dtype, i) for i, guess in enumerate(chosen)))
        if trial.doubt is None:
            return Inferred(inputs, note)
        doubtful = doubtful or Inferred(inputs, f"{note}; {trial.doubt}")
    return doubtful


def _combinations(model: nn.Module) -> Iterator[tuple[Guess, ...]]:
    """A guess for every tensor that the forward needs: all the same, then mixed. Single indices (N) come first
    where it needs several, and last where it needs one."""
    count = max(1, len(_required(model)))
    found = guesses(model, _TRIES)
    if count == 1:
        yield from ((guess,) for guess in found)
        return
    found.sort(key=lambda guess: len(guess.shape) != 1)
    yield from ((guess,) * count for guess in found[: _TRIES // 2])
    kinds = list(unique(_one_a_layer(found)))[:_KINDS]
    for mixed in product(kinds, repeat=count):
        if len({guess.key for guess in mixed}) > 1 and len({guess.batch_axis for guess in mixed}) == 1:
            yield mixed


def _one_a_layer(found: Sequence[Guess]) -> Iterator[Guess]:
    """Guesses of different ranks for different layers: one of each."""
    seen = set()
    for guess in found:
        kind = (guess.layer, len(guess.shape), guess.batch_axis)
        if kind not in seen:
            seen.add(kind)
            yield guess


def _required(model: nn.Module) -> list[str]:
    """Names of the forward's arguments without a default."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in plain]


def _call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Inputs as ``to_local`` takes them."""
    parameters = inspect.signature(model.forward).parameters
    names = _required(model)
    if any(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names):
        return dict(zip(names, inputs, strict=True))
    return inputs if len(inputs) > 1 else inputs[0]


# ---------------------------------------------------------------- runs


@dataclass
class _Trial:
    """Runs of a model on guesses. ``doubt`` is what the last one that fitted leaves open."""

    model: nn.Module
    doubt: str | None = None
    _real_left: int = field(default=_REAL_TRIES)

    def problem(self, inputs: Any, larger: Any = None) -> str | None:
        """Why the model's forward does not take ``inputs``; None where it does.

        Args:
            inputs: as ``to_local`` takes them.
            larger: the same with another batch size; where given, some output has to grow with the batch.
        """
        self.doubt = None
        try:
            here, seen = self._run(inputs)
            if not _floating(here):
                return "no output is a floating-point tensor with anything in it"
            if larger is None:
                return None
            there, seen_there = self._run(larger)
        except Exception as error:  # a wrong guess fails in any way
            text = " ".join(str(error).split())
            return f"{type(error).__name__}: {text[:160]}"
        pairs = list(zip(_floating(here), _floating(there), strict=False))
        if not any(_batch_axis(one, other) is not None for one, other in pairs):
            return f"the output {here[0]} does not grow with the batch"
        self.doubt = _misread(seen, seen_there)
        return None

    def _run(self, inputs: Any) -> tuple[list[tuple[int, ...]], list[_Seen]]:
        """Shapes of the output, non-floating tensors left out, and what layers that know the batch axis were given."""
        try:
            # The snapshot first: it is of the real tensors.
            with (
                preserved(self.model, training=False),
                _silent("torch._subclasses.fake_tensor"),
                FakeTensorMode(allow_non_fake_inputs=True) as mode,
            ):
                return self._forward(pytree.tree_map_only(Tensor, mode.from_tensor, inputs))
        except _NEEDS_VALUES:
            if not self._real_left:
                raise
            self._real_left -= 1
            with preserved(self.model, training=False):
                return self._forward(_as_wanted(self.model, inputs))

    def _forward(self, inputs: Any) -> tuple[list[tuple[int, ...]], list[_Seen]]:
        call = Call.of(inputs)
        with torch.no_grad(), _watching() as seen:
            output = self.model(*call.args, **call.kwargs)
        return [tuple(t.shape) for t in tensors_of(output) if t.is_floating_point()], seen


def _floating(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if 0 not in shape]


def _batch_axis(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """The axis whose size is the batch's in both runs."""
    sizes = list(zip(one, other, strict=False))
    wanted = (BATCH, _OTHER_BATCH)
    return sizes.index(wanted) if len(one) == len(other) and wanted in sizes else None


_Seen = tuple[str, int, tuple[int, ...]]
"""A layer that knows where the batch is: its kind, the axis, and the shape that it was given."""


@contextmanager
def _watching() -> Iterator[list[_Seen]]:
    """While it lasts, notes what layers with ``batch_first`` are given; the model has no hooks from it."""
    seen: list[_Seen] = []

    def note(module: nn.Module, args: Any) -> None:
        attention = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
        knows = isinstance(attention, nn.RNNBase | nn.MultiheadAttention)
        if knows and args and isinstance(args[0], Tensor):
            seen.append((type(module).__name__, 0 if attention.batch_first else 1, tuple(args[0].shape)))

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _misread(here: Sequence[_Seen], there: Sequence[_Seen]) -> str | None:
    """What is wrong where a layer takes the batch for its time axis."""
    for (kind, expected, one), (_, _, other) in zip(here, there, strict=False):
        axis = _batch_axis(one, other)
        if axis is not None and (axis != expected or len(one) < 3):
            return f"a layer ({kind}) reads the batch of them, on axis {axis} of {one}, as time: check batch_first"
    return None


@contextmanager
def _silent(logger_name: str) -> Iterator[None]:
    """Keeps a library from logging the failures that a search is made of."""
    logger = logging.getLogger(logger_name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
