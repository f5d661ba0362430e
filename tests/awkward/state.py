"""Models that change themselves while they run: buffers, counters, running averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, block, root

STATE = "sets|attribute|state"


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("average", torch.zeros(D))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


@block()
class BufferUpdated(Inner):
    """Buffers are updated in place, in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
            self.steps += 1
        return y - self.average


@block()
class BufferRebound(Inner):
    """Buffers are bound to new tensors."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.average = self.average * 0.9 + y.detach().mean(0) * 0.1
            self.steps = self.steps + 1
        return (y - self.average) / (1 + self.steps)


class WithBuffer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(D))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


@root()
class BufferUpdatedAtRoot(WithBuffer):
    """Buffers of the root are updated in place, read before and after."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) - self.average
        if self.training:
            with torch.no_grad():
                self.average.lerp_(x.mean(0), 0.1)
            self.steps += 1
        x = torch.relu(self.b(x)) + self.average
        return self.last(x) / self.steps.clamp(min=1)


@root()
class BufferReboundAtRoot(WithBuffer):
    """Buffers of the root are bound to new tensors."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            self.average = self.average * 0.9 + x.detach().mean(0) * 0.1
            self.steps = self.steps + 1
        return self.last(torch.relu(self.b(x - self.average)) / (1 + self.steps))


@root()
class BufferCopiedAtRoot(WithBuffer):
    """``buffer.copy_`` and ``buffer[i] = …``: a ring of what was seen last."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ring", torch.zeros(4, D))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        read = self.ring.mean(0)
        if self.training:
            self.ring[self.steps % 4] = x.detach().mean(0)
            self.steps += 1
            self.average.copy_(self.ring.sum(0))
        return self.last(torch.relu(self.b(x + read)))


@block()
class CountsInPython(nn.Module):
    """A Python counter that anneals a factor, in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(D, D), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) / self.calls


@root(refused=STATE)
class CountsInPythonAtRoot(Layers):
    """A Python counter of the root that anneals a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) / self.calls)))


@root(refused=STATE)
class LateSwitchAtRoot(Layers):
    """A warm-up: after two calls in train mode the root does something else. One or two runs do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        x = torch.relu(self.a(x))
        if self.calls > 2:
            x = x * 3
        return self.last(torch.relu(self.b(x)))


@root(refused=STATE)
class RootRemembersLoss(Layers):
    """The root leaves a tensor on itself for the training loop: ``model.penalty``."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        self.penalty = x.square().mean()
        return self.last(torch.relu(self.b(x)))


@root()
class BlockRemembersScores(nn.Module):
    """A block leaves its scores on itself, for whoever wants to see them after the call."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.scores: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.scores = self.linear(x).softmax(-1)
            return self.scores * x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), self.Block(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.first(x))))


@block()
class RunningStatistics(nn.Module):
    """Batch normalisation by hand and by function, with buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("var", torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.linear(x), self.mean, self.var, self.weight, self.bias, self.training, 0.2, 1e-3)
        if self.training:
            var, mean = torch.var_mean(x.detach(), 0)
            self.var.data.copy_(0.9 * self.var + 0.1 * var)
            self.mean.data = 0.9 * self.mean + 0.1 * mean
        return x


@root()
class MovingTeacher(nn.Module):
    """A second network follows the first: the weights of one are written from those of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(D, D), nn.Linear(D, D).requires_grad_(False)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)

    @torch.no_grad()
    def follow(self) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.mul_(0.9).add_(theirs, alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.training:
            self.follow()
        return self.last(torch.relu(self.student(x)) + self.teacher(x))


@root()
class VectorQuantiser(nn.Module):
    """A codebook that moves towards what it is compared with, as in VQ-VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.register_buffer("codes", torch.randn(5, D))
        self.register_buffer("counts", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        which = torch.cdist(x, self.codes).argmin(1)
        nearest = F.embedding(which, self.codes)
        if self.training:
            chosen = F.one_hot(which, 5).type_as(x)
            self.counts.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.codes.data.lerp_(chosen.t() @ x.detach() / self.counts[:, None], 0.1)
        return self.last(torch.relu(self.between(x + (nearest - x).detach())))
