"""Tensors that go from one module to another without being passed."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, root, sequences

REMEMBERED: dict[str, Tensor] = {}


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


@root(scratch=("keeper.scores",))
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


@root(scratch=("keeper.scores",))
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


@root(scratch=("writer.box", "taker.box"))
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



@root(scratch=("blocks.0.scores", "blocks.1.scores", "blocks.2.scores"))
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
        return self.last(x.mean(1))
