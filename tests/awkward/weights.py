"""Python reads the model's own weights and buffers, which training changes."""

from __future__ import annotations

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, block, root

CHANGES = "value|specialised|changes"


@root(refused=CHANGES, guarded=CHANGES)
class ParameterItem(Layers):
    """``.item()`` of a parameter, into the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.alpha + self.alpha.item()
        return self.last(torch.relu(self.b(x)) * float(self.last.weight.norm()))


@root(guarded=CHANGES)
class ParameterDecides(Layers):
    """``if self.alpha > 0.6`` of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.alpha
        return self.last(torch.relu(self.b(x)) if self.alpha > 0.6 else -x)


@root(guarded=CHANGES)
class BufferDecides(Layers):
    """A warm-up by a counter in a buffer: ``if self.steps < 3``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        x = torch.relu(self.a(x))
        if self.steps < 3:
            x = x * 2
        return self.last(torch.relu(self.b(x)))


@root(refused=CHANGES, guarded=CHANGES)
class BufferItem(Layers):
    """A rate that follows from a counter in a buffer: ``0.9 ** int(self.steps)``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        x = torch.relu(self.a(x)) * 0.9 ** int(self.steps)
        return self.last(torch.relu(self.b(x)))


class ActNorm(nn.Module):
    """Its weights are set from the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.linear = nn.Linear(D, D)
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training and not self.ready:
            self.scale.data.copy_(1 / (x.detach().std(0) + 1e-3))
            self.shift.data.copy_(-x.detach().mean(0))
            self.ready.fill_(True)
        return (x + self.shift) * self.scale


@root()
class SetByFirstBatch(nn.Module):
    """Blocks whose weights are set from the first batch, as in flows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(D, D), ActNorm(), ActNorm(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(torch.relu(self.one(self.first(x)))))


@root(guarded=CHANGES, refused=CHANGES)
class RootSetByFirstBatch(Layers):
    """The same at the root, with a Python flag."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(D))
        self.register_buffer("ready", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.ready.item() == 0:
            self.scale.copy_(1 / (x.detach().std(0) + 1))
            self.ready.fill_(1)
        return self.last(torch.relu(self.b(x * self.scale)))


@block()
class WeightsInPython(nn.Module):
    """The norm of a weight becomes a Python number, in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.linear.weight.norm().item()
        return self.linear(x) / max(norm, 1.0)


@root(refused=CHANGES, guarded=CHANGES)
class NormsInTensor(Layers):
    """``torch.tensor([float(p.norm()) for p in self.parameters()])``."""

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.tensor([float(p.detach().norm()) for p in self.parameters()])
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))) * norms.mean())


@root()
class PrunedByMask(Layers):
    """Masks from the weights' own size, and torch's pruning, which computes the weight before each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.prune.l1_unstructured(self.b, "weight", 0.4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.c.weight * (self.c.weight.abs() > self.c.weight.abs().median())
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) @ weight)))
