"""Modules with buffers that a forward pass does odd things to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead
from tests import zoo

WIDTH = 10


class Odd(nn.Module):
    """Subtracts what ``keeps`` says of its buffers; ``learn`` changes them, in training.

    If ``opaque``, what it does depends on values.
    """

    opaque = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
            with torch.no_grad():
                self.learn(h)
        if self.opaque and float(h.detach().sum()) == 123.0:
            h = -h
        return h - 0.1 * self.keeps(h)

    def begin(self, shared: Tensor) -> None:
        """After the conversion, which takes no elements that are one in memory, and makes each head for itself."""

    def learn(self, h: Tensor) -> None:
        raise NotImplementedError

    def keeps(self, h: Tensor) -> Tensor | float:
        raise NotImplementedError


class Grows(Odd):
    """A running list, and a number that becomes one of another type."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("total", torch.tensor(0))

    def learn(self, h: Tensor) -> None:
        self.seen = torch.cat([self.seen, h.mean()[None]])
        self.total = self.total + h.mean().double()

    def keeps(self, h: Tensor) -> Tensor | float:
        return (self.seen.sum() + self.total).to(h.dtype)


class Comes(Odd):
    """Buffers that are there after odd steps, after even ones, and from the first step on."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("odd", None)
        self.register_buffer("even", torch.ones(WIDTH))
        self.register_buffer("ever", None)

    def learn(self, h: Tensor) -> None:
        mean = h.mean(0)
        self.odd, self.even = (mean, None) if self.even is not None else (None, mean)
        self.ever = mean if self.ever is None else self.ever * 0.9 + 0.1 * mean

    def keeps(self, h: Tensor) -> Tensor | float:
        kept = [b for b in (self.odd, self.even, self.ever) if b is not None]
        return sum(kept[1:], kept[0])


class Shares(Odd):
    """Buffers that are one tensor, of all modules too, until the second step; ``table`` is for good."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        for name in ("one", "other", "table"):
            self.register_buffer(name, shared)

    def begin(self, shared: Tensor) -> None:
        self.one = self.other = self.table = shared

    def learn(self, h: Tensor) -> None:
        if h.is_meta or int(self.steps) > 1:
            self.one = self.one * 0.9 + 0.1 * h.mean(0)
            self.other = self.other * 0.5 - 0.1 * h.mean(0)

    def keeps(self, h: Tensor) -> Tensor | float:
        return cast(Tensor, self.one * self.table + self.other)


class Joins(Odd):
    """Buffers that become one tensor, which is then written to."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(WIDTH))
        self.register_buffer("other", torch.ones(WIDTH))

    def learn(self, h: Tensor) -> None:
        if h.is_meta or int(self.steps) == 1:
            self.one = self.other = h.mean(0)
        self.one.mul_(0.9).add_(h.mean(0), alpha=0.1)

    def keeps(self, h: Tensor) -> Tensor | float:
        return cast(Tensor, self.one + self.other)


class Strides(Odd):
    """Buffers that are views: one number for all, a transposed matrix, and a new one each time."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("all", torch.ones(WIDTH))
        self.register_buffer("turned", torch.arange(40.0).reshape(4, WIDTH).t() / 40)
        self.register_buffer("last", torch.zeros(WIDTH, 4))

    def begin(self, shared: Tensor) -> None:
        self.all = torch.ones(1).expand(WIDTH)

    def learn(self, h: Tensor) -> None:
        self.all = (self.all[:1] * 0.9 + 0.1 * h.mean()).expand(WIDTH)
        self.last = torch.stack([h.mean(0)] * 4).t()

    def keeps(self, h: Tensor) -> Tensor | float:
        return h @ self.last @ self.turned.t() + self.all


class Views(Odd):
    """A buffer and another one that shows its memory; it is written to."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("some", torch.zeros(1))
        self.register_buffer("wide", torch.zeros(WIDTH))
        self.register_buffer("whole", torch.zeros(2, WIDTH))
        self.register_buffer("row", torch.zeros(WIDTH))

    def begin(self, shared: Tensor) -> None:
        self.wide, self.row = self.some.expand(WIDTH), self.whole[1]

    def learn(self, h: Tensor) -> None:
        self.some.mul_(0.9).add_(h.mean(), alpha=0.1)
        self.whole.mul_(0.9).add_(h.mean(0), alpha=0.1)

    def keeps(self, h: Tensor) -> Tensor | float:
        return cast(Tensor, self.wide + self.row)


class Gaps(Odd):
    """A column and a row of a matrix that is no buffer: neither has all of the other's memory."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("column", torch.zeros(4))
        self.register_buffer("row", torch.zeros(WIDTH))

    def begin(self, shared: Tensor) -> None:
        matrix = torch.zeros(4, WIDTH)
        self.column, self.row = matrix[:, 0], matrix[1]

    def learn(self, h: Tensor) -> None:
        self.column.add_(h.mean())
        self.row.mul_(0.9).add_(h.mean(0), alpha=0.1)

    def keeps(self, h: Tensor) -> Tensor | float:
        return cast(Tensor, self.row + self.column.sum())


class Unsaved(Odd):
    """Buffers that no ``state_dict`` has: another tensor each time, one that is written to, one that comes."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("written", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("comes", None, persistent=False)

    def begin(self, shared: Tensor) -> None:
        self.written = self.written * 1j  # heads are made in the dtype of the model

    def learn(self, h: Tensor) -> None:
        self.mean = self.mean * 0.9 + 0.1 * h.mean(0)
        self.written.add_(h.mean(0))
        self.comes = h[0].clone()

    def keeps(self, h: Tensor) -> Tensor | float:
        return self.mean + self.written.real + (0.0 if self.comes is None else self.comes)


KINDS: dict[str, Callable[[Tensor], Odd]] = {
    "grows": Grows, "comes": Comes, "shares": Shares, "joins": Joins, "strides": Strides, "views": Views,
    "gaps": Gaps, "unsaved": Unsaved,
}  # fmt: skip


class Net(nn.Module):
    """Something odd in every part of two to four."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        shared = torch.linspace(-1, 1, WIDTH)
        self.stem = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.odd = nn.ModuleList([KINDS[kind](shared) for _ in range(4)])
        self.head = nn.Linear(WIDTH, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for layer, odd in zip(self.layers, self.odd, strict=True):
            h = torch.tanh(odd(layer(h)))
        return cast(Tensor, self.head(h))


class Chained(Method):
    """An exit takes the odd modules of the heads below as well as its own: a rank evaluates with those of others."""

    name = "chained"
    predicts = "exits"

    def __init__(self, kind: str) -> None:
        self.__dict__["kind"] = kind

    def build_head(self, site: HeadSite) -> Head:
        if site.is_last:
            return TaskHead(site)
        odd = KINDS[self.__dict__["kind"]](torch.zeros(WIDTH))
        odd.opaque = False
        return ExitHead(site, nn.Sequential(odd, nn.Linear(WIDTH, zoo.CLASSES)))

    def predictor(self, heads: Sequence[Head | None]) -> nn.Module | None:
        nets = [cast(nn.Sequential, head.net) for head in heads if isinstance(head, ExitHead)]
        return nn.Sequential(*[net[0] for net in nets], nets[-1][1]) if len(nets) == len(heads) else None


class Writes(Odd):
    """Writes to a buffer that it was given."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("one", shared)

    def learn(self, h: Tensor) -> None:
        self.one.mul_(0.9).add_(h.mean(0), alpha=0.1)

    def keeps(self, h: Tensor) -> Tensor | float:
        return cast(Tensor, self.one)


class Twice(nn.Module):
    """A module that counts, and is called by the first and the last part."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, zoo.CLASSES)])
        self.odd = Writes(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return cast(Tensor, last(self.odd(torch.tanh(second(self.odd(torch.tanh(first(x))))))))
