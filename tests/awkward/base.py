"""The table of awkward models, and what their files share.

Each class of this package has one habit, of Python or of PyTorch, that makes a capture go wrong. ``@block`` classes
are put between ordinary layers; ``@root`` classes are models of their own, since the habit is worse at the root.

Shape legend: ``N`` batch, ``D`` features, ``T`` steps or tokens, ``C`` classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.suites import Case

D, T, C = 8, 7, 4
BATCH, OTHER_BATCH = 3, 5
Inputs = Callable[..., Any]  # (batch, seed[, length]) -> inputs as `to_local` takes them
Kind = TypeVar("Kind", bound=type[nn.Module])


@dataclass(frozen=True)
class Awkward:
    """A model with its inputs at any batch size and of any values.

    ``refused``: the pattern of the error that must be raised at conversion; with ``guarded``, at the latest when it
    runs. ``guarded``: the pattern of the error that may be raised when it runs on other inputs than the example.
    ``loss``: of the whole output, where that is not logits (N, C). ``random``: its train mode draws random numbers.
    ``scratch``: attributes that nobody reads but the model's own forward, so that the parts need not set them.
    ``adjust``: what a training script does to the model before its n-th call.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    refused: str | None = None
    guarded: str | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    random: bool = False
    scratch: tuple[str, ...] = ()
    adjust: Callable[[Any, int], None] | None = None
    module: str = ""  # the file it is in

    def model(self) -> nn.Module:
        """The model with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def case(self) -> Case:
        """For the coverage benchmark."""
        model, target = self.model(), None
        if self.loss is None:
            target = torch.randint(0, C, (BATCH,), generator=torch.Generator().manual_seed(5))
        return Case(model, self.inputs(BATCH, 0), target, loss=self.loss, refused=self.refused)


TABLE: dict[str, Awkward] = {}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 17)


def vectors(batch: int, seed: int) -> Tensor:
    """(N, D)."""
    return torch.randn(batch, D, generator=generator(seed))


def sequences(batch: int, seed: int, length: int = T) -> Tensor:
    """(N, T, D)."""
    return torch.randn(batch, length, D, generator=generator(seed))


def images(batch: int, seed: int) -> Tensor:
    """(N, 2, 6, 6)."""
    return torch.randn(batch, 2, 6, 6, generator=generator(seed))


def tokens(batch: int, seed: int, length: int = T) -> Tensor:
    """(N, T) of 0..10."""
    return torch.randint(0, 11, (batch, length), generator=generator(seed))


class Around(nn.Module):
    """Ordinary layers below, between and above two awkward blocks."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.block1 = nn.Linear(D, D), kind()
        self.between, self.block2 = nn.Linear(D, D), kind()
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(torch.tanh(self.first(x)))
        x = self.last(torch.relu(self.block2(torch.tanh(self.between(x)))))
        return x.mean(1) if x.dim() == 3 else x


def _enter(kind: type[nn.Module], make: Callable[[], nn.Module], inputs: Inputs, options: dict[str, Any]) -> None:
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    assert name not in TABLE, name
    TABLE[name] = Awkward(name, make, inputs, module=kind.__module__, **options)


def block(inputs: Inputs = vectors, **options: Any) -> Callable[[Kind], Kind]:
    """Enters a class of blocks (..., D) -> (..., D), between ordinary layers."""

    def enter(kind: Kind) -> Kind:
        _enter(kind, lambda: Around(kind), inputs, options)
        return kind

    return enter


def root(inputs: Inputs = vectors, **options: Any) -> Callable[[Kind], Kind]:
    """Enters a class of models."""

    def enter(kind: Kind) -> Kind:
        _enter(kind, kind, inputs, options)
        return kind

    return enter


class Layers(nn.Module):
    """Four plain layers, for models whose forward is the awkward thing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.last = nn.Linear(D, C)


def everything(output: Any, target: Any = None) -> Tensor:
    """A loss of any output: all its floating-point tensors."""
    found = [t for t in floats_of(output) if t.requires_grad]
    return sum((t.square().mean() for t in found), torch.zeros(()))


def floats_of(value: Any) -> list[Tensor]:
    """Floating-point (and complex) tensors in nested tuples, lists, dicts and objects, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, Sequence) and hasattr(value, "__dict__"):
        value = list(vars(value).values())
    return [t for item in value for t in floats_of(item)] if isinstance(value, list | tuple) else []
