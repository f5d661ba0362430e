"""Modules that give their buffers other tensors in the forward pass, as moving averages are often written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead
from tests import zoo

WIDTH = 10


class Average(nn.Module):
    """Takes the moving average of what it is given away.

    If ``opaque``, what it does depends on values: a capture does not look into it.
    """

    def __init__(self, opaque: bool = True) -> None:
        super().__init__()
        self.opaque = opaque
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("total", torch.tensor(0))  # becomes a float
        self.register_buffer("last", torch.zeros(1))  # grows
        self.register_buffer("unsaved", torch.zeros(WIDTH), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean * 0.9 + 0.1 * h.detach().mean(0)
            self.total = self.total + h.detach().mean()
            self.last = h.detach()[0]
            self.unsaved = self.unsaved + 0.1 * h.detach().mean(0)
        if self.opaque and float(self.mean.sum()) == 123:
            h = -h
        return h - self.mean + 0.01 * self.total + 0.01 * self.last.sum()


class Averages(nn.Module):
    """An average in every part of two to four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.averages = nn.ModuleList([Average() for _ in range(4)])
        self.head = nn.Linear(WIDTH, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for layer, average in zip(self.layers, self.averages, strict=True):
            h = torch.tanh(average(layer(h)))
        return self.head(h)


AVERAGES = zoo.Case("averages", Averages, (6,), parts=4)


class Chained(Method):
    """An exit takes the averages of the heads below as well as its own: a rank evaluates with those of others."""

    name = "chained"
    predicts = "exits"

    def build_head(self, site: HeadSite) -> Head:
        if site.is_last:
            return TaskHead(site)
        return ExitHead(site, nn.Sequential(Average(opaque=False), nn.Linear(WIDTH, zoo.CLASSES)))

    def predictor(self, heads: Sequence[Head | None]) -> nn.Module | None:
        nets = [cast(nn.Sequential, head.net) for head in heads if isinstance(head, ExitHead)]
        return nn.Sequential(*[net[0] for net in nets], nets[-1][1]) if len(nets) == len(heads) else None
