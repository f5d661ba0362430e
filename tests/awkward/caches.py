"""Caches, and tensors that go from one module to another without being passed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, block, root, sequences

REMEMBERED: dict[str, Tensor] = {}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


@block(sequences, scratch=("block1.mask", "block2.mask"))
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
