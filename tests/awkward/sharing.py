"""Weights with several names or uses, and weights that are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.awkward.base import C, D, Layers, block, root, tokens


class Untied(nn.Module):
    """Tokens (N, T) in, logits (N, 11) out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.last = nn.Embedding(11, D), nn.Linear(D, D), nn.Linear(D, 11, bias=False)
        self.more = nn.Sequential(nn.Linear(D, D), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.more(torch.relu(self.middle(self.embed(x)))).mean(1))[:, :C]


@root(tokens, refused="[Tt]ied|share")
class TiedEmbedding(Untied):
    """The decoder's weight is the embedding's: all layers between belong to one part, and nothing is left to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = self.embed.weight


@root(tokens)
class TiedBelow(nn.Module):
    """Embedding and projection are tied, and ordinary layers follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(11, D), nn.Linear(D, 11, bias=False)
        self.project.weight = self.embed.weight
        self.a, self.b, self.last = nn.Linear(11, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(torch.relu(self.embed(x))).softmax(-1)
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))).mean(1))


@root()
class BlockCalledTwice(nn.Module):
    """One block runs three times, as in ALBERT; layers above it differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.shared = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU())
        self.above = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.shared(x)
        return self.last(self.above(x))


@root()
class TwoNames(nn.Module):
    """One module under two names, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.alias = nn.Linear(D, D)
        self.others = nn.ModuleList([self.first, nn.Linear(D, D), nn.Linear(D, D)])
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.alias(torch.relu(self.first(x))))
        for layer in self.others:
            x = torch.relu(layer(x))
        return self.last(x)


@root()
class WeightBorrowed(Layers):
    """``F.linear`` with another layer's weight, transposed."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.relu(self.a(x)), self.a.weight.t(), self.a.bias)
        x = torch.relu(self.c(torch.relu(self.b(x))))
        return self.last(x) + F.linear(x, self.last.weight * 0.5)


@block()
class WeightNorms(nn.Module):
    """Weight norm, old and new."""

    def __init__(self) -> None:
        super().__init__()
        self.old = torch.nn.utils.weight_norm(nn.Linear(D, D))
        self.new = parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.new(torch.relu(self.old(x)))


@block()
class SpectralNorms(nn.Module):
    """Spectral norm, old and new: power iterations in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.old = torch.nn.utils.spectral_norm(nn.Linear(D, D))
        self.new = parametrizations.spectral_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.new(torch.relu(self.old(x)))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


@root()
class Parametrised(Layers):
    """A parametrized weight is used by its module and by hand, inside and outside of ``parametrize.cached``."""

    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.b, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) @ self.b.weight
        with parametrize.cached():
            x = torch.relu(self.b(x)) + self.b.weight[0]
        return self.last(torch.relu(self.c(x)))


@block()
class StandardisedConv(nn.Module):
    """A subclass of a torch module with a forward of its own."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean(1, keepdim=True)
            return F.linear(x, weight / (weight.std(1, keepdim=True) + 1e-5), self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = self.Linear(D, D), self.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@root()
class ParameterContainers(nn.Module):
    """ParameterList, ParameterDict, and parameters that are changed in shape on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(D, D) * 0.3 for _ in range(4)])
        self.scales = nn.ParameterDict({"in": torch.ones(D), "out": torch.full((1,), 0.5)})
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scales["in"]
        for i, weight in enumerate(self.weights):
            x = torch.relu(x @ weight + weight[i % 2])
        return self.last(x * self.scales["out"].expand(D))


@root()
class GeneratedWeights(nn.Module):
    """One network makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.maker = nn.Parameter(torch.randn(3)), nn.Linear(3, D * D)
        self.first, self.between, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(self.code).view(D, D)
        x = torch.relu(F.linear(torch.relu(self.first(x)), weight))
        return self.last(torch.relu(F.linear(self.between(x), weight.t())))


class Scaled(nn.Parameter):
    """A parameter of a kind of its own."""


@root()
class ParameterSubclass(Layers):
    """A parameter whose class is the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = Scaled(torch.full((D,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) * self.gain)) + self.gain)


class Marked(Tensor):
    """A tensor of a kind of its own, which survives operations."""


@root(refused="Marked")
class TensorSubclass(Layers):
    """Hidden tensors of a class of the user's."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)).as_subclass(Marked)
        y = self.b(x)
        return self.last((torch.relu(y) * (2.0 if isinstance(y, Marked) else 1.0)).as_subclass(Tensor))
