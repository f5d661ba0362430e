"""What goes into a forward and comes out of it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, everything, generator, root, vectors


def pairs(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two of (N, D)."""
    both = torch.randn(2, batch, D, generator=generator(seed))
    return both[0], both[1]


def named(batch: int, seed: int) -> dict[str, Any]:
    first, second = pairs(batch, seed)
    return {"batch": {"image": first, "extra": [second, {"deep": second * 2}]}}


@root(named)
class NestedInput(Layers):
    """One argument: a dictionary with a list with a dictionary."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = torch.relu(self.a(batch["image"]))
        return self.last(torch.relu(self.b(x + batch["extra"][0])) + batch["extra"][1].get("deep"))


@root(lambda n, s: ([*pairs(n, s)],))
class ListInput(Layers):
    """One argument: a list of tensors."""

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return self.last(sum(torch.relu(layer(t)) for layer, t in zip((self.a, self.b), tensors, strict=True)))


@root(pairs)
class TupleInput(Layers):
    """Several positional tensors, gathered by ``*args``, with ``**kwargs`` unused."""

    def forward(self, *tensors: Tensor, **others: Any) -> Tensor:
        x = torch.stack([self.a(t) for t in tensors]).sum(0)
        return self.last(torch.relu(self.b(x) * others.get("scale", 1.0)))


@root(lambda n, s: {"x": pairs(n, s)[0], "skip": pairs(n, s)[1], "scale": 2.0, "mode": "loud"})
class KeywordInput(Layers):
    """Keyword-only arguments, some of them plain Python values, passed on as ``**kwargs``."""

    def inner(self, *, skip: Tensor, scale: float, mode: str) -> Tensor:
        return torch.relu(self.b(skip)) * (scale if mode == "loud" else 1.0)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, **rest: Any) -> Tensor:
        x = torch.relu(self.a(x)) + self.inner(**rest)
        return self.last(self.c(x) if mask is None else self.c(x) * mask)


DEFAULT = torch.linspace(-1, 1, D)


@root()
class DefaultTensor(Layers):
    """A tensor is the default of an argument; another stays None; a third is not used."""

    def forward(self, x: Tensor, shift: Tensor = DEFAULT, mask: Tensor | None = None, unused: Any = None) -> Tensor:
        x = torch.relu(self.a(x) + shift)
        return self.last(torch.relu(self.b(x if mask is None else x * mask)))


@root(pairs)
class UnusedInput(Layers):
    """The second input is not used, nor are some parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.gain = nn.Linear(D, D), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))))


@root()
class DictOutput(Layers):
    """A nested dictionary comes out, with tensors, numbers and None."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = torch.relu(self.a(x))
        y = torch.relu(self.b(x))
        return {"logits": self.last(y), "features": [x, (y,)], "count": 3, "name": "net", "aux": None}


@dataclass
class Result:
    logits: Tensor
    features: list[Tensor]
    aux: Tensor | None = None


@root()
class DataclassOutput(Layers):
    """A dataclass that pytree does not know comes out."""

    def forward(self, x: Tensor) -> Result:
        x = torch.relu(self.a(x))
        return Result(self.last(torch.relu(self.b(x))), [x])


class Pair(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


@root()
class NamedTupleOutput(Layers):
    """A named tuple comes out, from a block and from the root."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Pair:
            x = self.linear(x)
            return Pair(torch.relu(x), (x, x))

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Pair:
        middle = self.block(self.a(x))
        return Pair(logits=self.last(self.b(middle.logits)), hidden=middle.hidden[:1])


class Output(OrderedDict[str, Any]):
    """Like the outputs of transformers: keys are attributes too, and None is left out."""

    def __init__(self, **values: Any) -> None:
        super().__init__({key: value for key, value in values.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


@root()
class OrderedOutput(Layers):
    """An OrderedDict of its own kind comes out of blocks and of the root."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor, return_dict: bool = True) -> Any:
            out = Output(hidden=torch.relu(self.linear(x)), scores=x.softmax(-1), extra=None)
            return out if return_dict else out.to_tuple()

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = self.Block(), self.Block()

    def forward(self, x: Tensor) -> Output:
        first = self.one(self.a(x))
        second = self.two(first.hidden, return_dict=False)
        return Output(logits=self.last(second[0]), loss=None, scores=(first["scores"], second[1]))


@root()
class ListOutput(Layers):
    """A list of logits of several heads, made in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(D, C) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = torch.relu(self.a(x)), []
        for head in self.heads:
            x = torch.relu(self.b(x))
            found.append(head(x))
        return found[::-1]


@root(loss=everything)
class ScalarOutput(Layers):
    """The model returns its own loss: a tensor without axes, and a tuple of sizes."""

    def forward(self, x: Tensor) -> tuple[Tensor, int, torch.Size]:
        x = self.last(torch.relu(self.b(torch.relu(self.a(x)))))
        return x.logsumexp(1).mean(), x.shape[0] + 1, x.shape


@root(refused="values", guarded="value")
class PythonFloatOutput(Layers):
    """A Python number that follows from values is returned beside the logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        x = torch.relu(self.a(x))
        return self.last(torch.relu(self.b(x))), x.mean().item()


class Measured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, float, bool]:
        y = self.linear(x)
        return y, float(y.abs().mean()), bool(y.sum() > 0)


@root(refused="returned .* at capture", guarded="returned .* at capture")
class FloatFromBlock(Layers):
    """A block returns a Python float and a bool that follow from values; the root computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Measured()

    def forward(self, x: Tensor) -> Tensor:
        x, size, positive = self.block(torch.relu(self.a(x)))
        return self.last(torch.relu(self.b(x / size)) * (2 if positive else 1))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        y = self.linear(x)
        return y, x.shape[0], int((y > 0).sum().item())


@root(refused="specialised", guarded="specialised")
class IntFromBlock(Layers):
    """A block returns a size and a count that follows from values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Counted()

    def forward(self, x: Tensor) -> Tensor:
        x, batch, positive = self.block(torch.relu(self.a(x)))
        return self.last(torch.relu(self.b(x)) / batch * (1.0 * positive))


@root()
class InputReturned(Layers):
    """An input is returned as it is, beside a part of a parameter and a constant."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.last(torch.relu(self.b(torch.relu(self.a(x)))))
        return y, x, self.last.weight[0], DEFAULT


@root()
class SameTensorTwice(Layers):
    """The same tensor comes out twice, and through Identity."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.same(torch.relu(self.a(self.same(x))))
        y = self.same(self.last(torch.relu(self.b(x))))
        return {"logits": y, "again": y, "hidden": self.same(x)}


@root(lambda n, s: {"batch": Output(x=vectors(n, s), y=vectors(n, s + 1))})
class MappingInput(Layers):
    """A mapping of its own kind goes in."""

    def forward(self, batch: Any) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(batch.x)) + batch["y"])))


@root(lambda n, s: {"pair": Pair(vectors(n, s), (vectors(n, s + 1),))})
class NamedTupleInput(Layers):
    """A named tuple with a nested tuple goes in."""

    def forward(self, pair: Pair) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(pair.logits)) + pair.hidden[0])))
