"""Readers of sizes that Python does not ask: look-ups, texts, functions written in C."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from tests.awkward.base import D, Layers, block, root, sequences

SPECIALISED = "specialised"


@root()
class HalfOfSize(Layers):
    """A float on the left of a size."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x / (0.5 * x.shape[0])))
        return self.last(x - x.sum(0) / (1.0 + x.size(0)))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class ListIndexBySize(Layers):
    """A Python list is indexed by the batch size: the same entry for 3 and 4, another for 5."""

    scales = (1.0, 1.0, 1.0, 0.5, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.scales[x.shape[0]]
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class ListSliceBySize(nn.Module):
    """How many layers run depends on a slice by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 4)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in list(self.layers)[: (x.shape[0] + 1) // 2]:
            x = torch.relu(layer(x))
        return self.last(x)


@block(sequences)
class ShapeNumel(nn.Module):
    """``x.shape.numel()`` and ``x[0].numel()``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * (y.sum() / y.shape.numel()) + y.shape[1:].numel() / y[0].numel()


@root(guarded=SPECIALISED, refused=SPECIALISED)
class SizeInText(Layers):
    """The batch size goes into an f-string, which is a key: found for 5 only."""

    scales: ClassVar = {"n5": 3.0}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.scales.get(f"n{x.shape[0]}", 1.0)
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class SizeAsKey(Layers):
    """The batch size is a key of a dict: found for 5 only."""

    scales: ClassVar = {5: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.scales.get(x.shape[0], 1.0)
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class SizeInSet(Layers):
    """The batch size is looked for in a set."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * (3.0 if x.shape[0] in {5, 50} else 1.0)
        return self.last(torch.relu(self.b(x)))


@root(sequences)
class SizeInLruCache(Layers):
    """Positions come from an ``lru_cache`` on the length; a factor from one on the batch size."""

    @staticmethod
    @functools.lru_cache
    def positions(length: int) -> Tensor:
        return torch.linspace(0, 1, length)[:, None]

    @staticmethod
    @functools.lru_cache
    def factor(batch: int) -> float:
        return 1.0 + batch // 5

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) + self.positions(x.shape[1])
        return self.last(torch.relu(self.b(x)).mean(1) * self.factor(x.shape[0]))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class SizeInMath(Layers):
    """Readers of integers written in C: ``math.gcd``, ``bit_length``, ``[1.0] * n``, ``'%d' % n``."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.relu(self.a(x)) * (math.gcd(n, 5) + n.bit_length())
        weights = torch.tensor([1.0] * n)[:, None]
        return self.last(torch.relu(self.b(x * weights)) * len("%d" % (2 * n)))  # noqa: UP031


@root(guarded=SPECIALISED, refused=SPECIALISED)
class FactorOfBatch(Layers):
    """``math.gcd`` alone: 1 for a batch of 3 and 4, 5 for one of 5."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) * math.gcd(x.shape[0], 5))))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class ListTimesSize(Layers):
    """``[w] * n`` makes the weights of the samples."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * x.new_tensor([0.5] * x.shape[0]).unsqueeze(1)
        return self.last(torch.relu(self.b(x)))
