"""Train and eval mode, dropout, and chance."""

from __future__ import annotations

import random

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, block, root


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


@block(random=True)
class DropoutAlways(Inner):
    """``F.dropout`` without a flag: it drops in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.3)


@root(random=True)
class DropoutFromAttribute(Layers):
    """The rate is an attribute; the flag is given by position, and by another module's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.25

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.a(x)), self.rate, self.training)
        x = F.dropout(torch.relu(self.b(x)), p=self.rate if self.training else 0.0)
        return self.last(F.alpha_dropout(x, self.rate, self.a.training))


@root()
class TrainingBranches(Layers):
    """``if self.training`` in the root, ``not self.training`` and module flags in expressions."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * (1 + self.training)
        x = self.b(x) if self.training else self.c(x)
        return self.last(torch.relu(x)) if not self.a.training else self.last(torch.tanh(x))


@root()
class AuxiliaryHead(Layers):
    """Another type of output in train mode."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        x = torch.relu(self.a(x))
        if self.training:
            return self.last(torch.relu(self.b(x))), {"aux": self.c(x).mean(1)}
        return self.last(torch.relu(self.b(x)))


@root()
class FrozenLayers(nn.Module):
    """Some layers stay in eval mode: ``train`` is overridden; others have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, C)
        self.norm, self.between, self.other = nn.BatchNorm1d(D), nn.Linear(D, D), nn.BatchNorm1d(D)
        self.train()

    def train(self, mode: bool = True) -> FrozenLayers:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.other(torch.relu(self.between(self.norm(self.first(x))))))


@root(random=True)
class DropPath(nn.Module):
    """Stochastic depth by ``torch.rand``, in blocks."""

    class Path(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x + self.linear(x)
            keep = torch.rand(x.shape[0], 1, device=x.device, dtype=x.dtype) < 0.7
            return x + self.linear(x) * keep / 0.7

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.paths = nn.ModuleList([self.Path() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for path in self.paths:
            x = path(x)
        return self.last(x + torch.randn_like(x) * 0.1 * self.training)


class Skipping(nn.Module):
    def __init__(self, draw: str) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(D, D), draw

    def forward(self, x: Tensor) -> Tensor:
        if self.training and {"python": random.random, "numpy": numpy.random.rand}[self.draw]() < 0.5:
            return x
        return x + self.linear(x)


@root(random=True)
class SkippedByChance(nn.Module):
    """Blocks that are left out by Python's and NumPy's dice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(D, D), Skipping("python"), Skipping("numpy")
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(torch.relu(self.one(self.first(x)))))


@root(random=True, refused="random")
class SkippedByChanceAtRoot(nn.Module):
    """Layer drop: the root throws the dice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.training and random.random() < 0.5:
                continue
            x = torch.relu(layer(x))
        return self.last(x)


@root(random=True, refused="random|value", guarded="value")
class SkippedByTorchAtRoot(SkippedByChanceAtRoot):
    """Layer drop by ``torch.rand(()) < p`` in the root."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if not self.training or torch.rand([]) > 0.5:
                x = torch.relu(layer(x))
        return self.last(x)


@root(random=True, refused="[Gg]enerator")
class OwnGenerator(Layers):
    """A generator of the model's own, which moves at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) + 0.1 * torch.randn(D, generator=self.noise)
        return self.last(torch.relu(self.b(x)))


@block(random=True)
class ForkedGenerator(Inner):
    """Noise that is the same at every call: ``fork_rng`` and ``manual_seed``."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            noise = torch.randn(D)
        return self.linear(x + noise)


@root(random=True)
class SampledLatent(Layers):
    """A sample of a distribution object, as in a variational autoencoder."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        latent = torch.distributions.Normal(self.b(x), F.softplus(self.c(x)) + 0.1, validate_args=False)
        return self.last(latent.rsample() if self.training else latent.mean)


@root(random=True)
class GumbelChoice(Layers):
    """Gumbel softmax, multinomial and Bernoulli draws."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        hard = F.gumbel_softmax(self.b(x), hard=True)
        row = torch.multinomial(x.detach().sigmoid(), 1)
        return self.last(self.c(x * hard) + x.gather(1, row) * torch.bernoulli(x.detach().sigmoid()))
