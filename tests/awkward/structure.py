"""Modules that are built, found, wrapped or called in unusual ways, and graphs with many edges."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, block, images, root, sequences


@root()
class ChosenByName(nn.Module):
    """``nn.ModuleDict`` by strings, and ``getattr`` with an f-string."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"stage_{i}": nn.Linear(D, D) for i in range(3)})
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "tanh": nn.Tanh()})
        self.last, self.plan = nn.Linear(D, C), [("stage_0", "relu"), ("stage_2", "tanh"), ("stage_1", "relu")]
        self.add_module("branch1", nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in self.plan:
            x = self.acts[act](self.layers[layer](x))
        return self.last(getattr(self, f"branch{1}")(x))


@root()
class MadeInForward(Layers):
    """Modules are made in the forward: an activation, a norm without weights, a Sequential of the model's layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Sequential(self.a, nn.GELU(), self.b)(x)
        x = nn.LayerNorm(x.shape[-1], elementwise_affine=False)(x)
        return self.last(nn.ReLU(inplace=True)(self.c(x)))


class BuiltLate(nn.Module):
    """Its layer is made at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.layer = nn.Linear(x.shape[-1], D)
        return self.layer(x)


@root(refused="layer|parameter")
class LazilyBuilt(nn.Module):
    """A block that has no parameters before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), BuiltLate(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.block(torch.relu(self.first(x)))))


@root(refused="no shape yet")
class LazyLayers(nn.Module):
    """torch's lazy layers, never run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LazyLinear(D), nn.LazyLinear(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Forwarding(nn.Module):
    """What it does not have is looked for in the module it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@root()
class WrappedModules(nn.Module):
    """``__getattr__`` that looks inside, a ``forward`` that is a property, and one that is set on the instance."""

    class ByProperty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        @property
        def forward(self) -> Callable[[Tensor], Tensor]:
            return self.loud if self.training else self.quiet

        def loud(self, x: Tensor) -> Tensor:
            return self.linear(x) * 2

        def quiet(self, x: Tensor) -> Tensor:
            return self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.wrapped, self.property = Forwarding(Layers()), self.ByProperty()
        self.patched, self.last = nn.Linear(D, D), nn.Linear(D, C)
        original = self.patched.forward
        self.patched.forward = lambda x: original(x) * 0.5 + x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wrapped.a(x)) + self.wrapped.inner.b(x)
        return self.last(torch.relu(self.patched(self.property(x))))


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, *args, **kwargs) * 2

    return wrapper


@root()
class DecoratedForward(Layers):
    """A decorated ``forward``, ``functools.partial`` and lambdas as layers, a method bound from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.a, functools.partial(F.leaky_relu, negative_slope=0.2), lambda x: x * 2, self.b]
        self.extra = types.MethodType(lambda self, x: torch.relu(self.c(x)), self)

    @doubled
    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.last(self.extra(x))


@root()
class PatchedRoot(Layers):
    """The model's own ``forward`` is replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = functools.partial(self.replacement, factor=0.5)  # type: ignore[method-assign]

    def replacement(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) * factor)))


class Residual(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:
            y = layer(y)
        return x + y


@root()
class NestedSequentials(nn.Module):
    """Sequentials within Sequentials, sliced and iterated; ``self.layers[1:](x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(D, D), Residual(nn.Linear(D, D), Residual(nn.Tanh(), nn.Linear(D, D))), nn.Linear(D, D)
        )
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers[1:](torch.relu(self.layers[0](x))))


@root()
class PassedThrough(nn.Module):
    """Blocks that return their input unchanged, Identity, and an empty Sequential."""

    class Maybe(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.linear, self.on = nn.Linear(D, D), on

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if self.on else x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([self.Maybe(i % 2 == 0) for i in range(4)])
        self.same, self.empty = nn.Identity(), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.empty(self.first(x)))
        skip = self.same(x)
        for layer in self.layers:
            x = layer(x)
        x += skip
        return self.last(self.empty(x))


@root(images)
class SmallUNet(nn.Module):
    """Down and up again with skips, sizes taken from the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2 if i == 0 else 4, 4, 3, padding=1) for i in range(3)])
        self.up = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1) for _ in range(2)])
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for layer in self.down:
            x = torch.relu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = skips.pop()
        for layer in self.up:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.relu(layer(torch.cat([x, skip], 1)))
        return self.last(self.norm(x).flatten(2).mean(-1))


@root()
class DenselyConnected(nn.Module):
    """Each layer reads all earlier ones; the list is given as one argument."""

    class Dense(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(inputs * D), nn.Linear(inputs * D, D)

        def forward(self, features: list[Tensor] | Tensor) -> Tensor:
            joined = torch.cat([features] if isinstance(features, Tensor) else features, 1)
            return torch.relu(self.linear(self.norm(joined)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Dense(i + 1) for i in range(4)])
        self.last = nn.Linear(5 * D, C)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.last(torch.cat(features, -1))


@block(sequences)
class ManyEdges(nn.Module):
    """``split`` with sections, ``chunk``, ``stack``, tuples in and out, starred arguments, walrus, generators."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.pair = nn.Bilinear(D, D, D)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.split([2, 2, 4], -1)
        left, right = c.chunk(2, dim=-1)
        mixed = [mixer(t) for mixer, t in zip(self.mixers, (a, b, left), strict=True)]
        y = torch.cat((*mixed, right), -1)
        if (z := torch.stack([y, x]).amax(0)) is not None:
            y = self.pair(*(y, z))
        low, place = torch.topk(y, 2, dim=1)
        return y + sum(t for t in low.unbind(1)).unsqueeze(1) + torch.take_along_dim(y, place, 1).mean(1, keepdim=True)
