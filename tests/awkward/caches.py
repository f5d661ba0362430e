"""Caches, and tensors that go from one module to another without being passed."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, T, Layers, block, root, sequences

REMEMBERED: dict[str, Tensor] = {}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


@block(sequences)
class MaskCache(Inner):
    """A causal mask is made at the first call and kept; remade when the length changes."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.mask is None or self.mask.shape[0] != length:
            self.mask = torch.ones(length, length).tril().bool()
        scores = (self.linear(x) @ x.transpose(1, 2)).masked_fill(~self.mask, float("-inf"))
        return scores.softmax(-1) @ x


@root(sequences, scratch=("mask",))
class MaskCacheAtRoot(Layers):
    """The same in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = torch.ones(x.shape[1], x.shape[1]).tril()
        return self.last(torch.relu(self.b(self.mask @ x)).mean(1))


@root(sequences)
class RotaryCache(nn.Module):
    """Rotary tables that grow with the length, kept by a submodule and read by all layers."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rates", torch.rand(D // 2), persistent=False)
            self.longest, self.table = 0, torch.empty(0)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if x.shape[1] > self.longest:
                self.longest = x.shape[1]
                angles = torch.arange(self.longest)[:, None] * self.rates
                self.table = torch.cat([angles, angles], -1)
            table = self.table[: x.shape[1]]
            return table.cos(), table.sin()

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.rotary = nn.Linear(D, D), nn.Linear(D, C), self.Rotary()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        cos, sin = self.rotary(x)
        for layer in self.layers:
            y = layer(x)
            x = y * cos + torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1) * sin
        return self.last(x.mean(1))


@root(scratch=("features",))
class FeatureList(Layers):
    """The root collects features in a list on itself and joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.join = nn.Linear(3 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
            self.features.append(x)
        return self.last(self.join(torch.cat(self.features, 1)))


@root()
class HookedFeatures(Layers):
    """Forward hooks collect what the head reads, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}
        for name in ("a", "b"):
            self.get_submodule(name).register_forward_hook(self.keep(name))

    def keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.found[name] = output

        return hook

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.last(x + self.found["a"] * self.found["b"])


class Keeper(nn.Module):
    """Keeps its last scores as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.scores = y.softmax(-1)
        return torch.relu(y)


@root()
class ReadFromSubmodule(nn.Module):
    """The root reads what a block left on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.keeper, self.last = nn.Linear(D, D), Keeper(), nn.Linear(D, C)
        self.between = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.keeper(self.first(x)))
        return self.last(x * self.keeper.scores)


class Reader(nn.Module):
    """Reads what another module left on itself."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(D, D), [keeper]

    def forward(self, x: Tensor) -> Tensor:
        scores = self.source[0].scores
        return self.linear(x) if scores is None else self.linear(x) * scores


@root()
class ReadByNeighbour(nn.Module):
    """A block reads what another block left on itself; it holds the other in a list, unregistered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.keeper, self.last = nn.Linear(D, D), Keeper(), nn.Linear(D, C)
        self.between, self.reader = nn.Linear(D, D), Reader(self.keeper)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.reader(torch.relu(self.between(self.keeper(self.first(x))))))


class LateReader(Reader):
    """Reads the mean of what the other left at the call before."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.source[0].scores
        return self.linear(x) if scores is None else self.linear(x) * scores.detach().mean(0)


@root()
class ReadOneCallLater(nn.Module):
    """A block reads what another one left at the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.keeper, self.last = nn.Linear(D, D), Keeper(), nn.Linear(D, C)
        self.reader = LateReader(self.keeper)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.keeper(self.reader(torch.relu(self.first(x)))))


class Writer(nn.Module):
    def __init__(self, box: Any) -> None:
        super().__init__()
        self.linear, self.box = nn.Linear(D, D), box

    def forward(self, x: Tensor) -> Tensor:
        self.box.value = self.linear(x)
        return torch.relu(x)


class Taker(nn.Module):
    def __init__(self, box: Any) -> None:
        super().__init__()
        self.linear, self.box = nn.Linear(D, D), box

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.box.value


@root()
class SharedObject(nn.Module):
    """Two blocks share a plain Python object, through which a tensor goes."""

    def __init__(self) -> None:
        super().__init__()
        box = types.SimpleNamespace(value=None)
        self.first, self.between, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)
        self.writer, self.taker = Writer(box), Taker(box)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.taker(torch.relu(self.between(self.writer(self.first(x))))))


@root()
class ThroughGlobal(Layers):
    """A tensor goes through a global dictionary, within one call."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        REMEMBERED["skip"] = x
        x = torch.relu(self.c(torch.relu(self.b(x))))
        return self.last(x + REMEMBERED.pop("skip"))



@root()
class PenaltiesCollected(nn.Module):
    """Blocks leave a penalty on themselves; the root adds them to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.blocks = nn.ModuleList([Keeper() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for each in self.blocks:
            x = each(x)
        return self.last(x) + sum(each.scores.square().mean() for each in self.blocks)


@root(scratch=("tables",))
class DictCache(Layers):
    """A dictionary on the root remembers tables by width and length."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[Any, Tensor] = {}

    def table(self, width: int, device: torch.device) -> Tensor:
        if (width, device) not in self.tables:
            self.tables[width, device] = torch.linspace(0, 1, width, device=device)
        return self.tables[width, device]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) + self.table(x.shape[1], x.device)
        return self.last(torch.relu(self.b(x)) + self.table(x.shape[1], x.device))


@root(sequences)
class KeyValueCache(nn.Module):
    """Keys of earlier layers are kept in an object that is made in the forward and handed on."""

    class Store:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

        def update(self, key: Tensor) -> Tensor:
            self.keys.append(key)
            return torch.cat(self.keys, 1)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, store: Any) -> Tensor:
            keys = store.update(self.key(x))
            return F.scaled_dot_product_attention(self.query(x), keys, keys)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([self.Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        store, x = self.Store(), self.first(x)
        for layer in self.layers:
            x = layer(x, store)
        assert store.keys[0].shape[1] == T
        return self.last(x.mean(1))
