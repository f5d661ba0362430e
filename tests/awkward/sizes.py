"""Python on sizes: arithmetic, branches, loops, look-ups."""

from __future__ import annotations

import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import D, Layers, block, root, sequences

SPECIALISED = "specialised"


@root()
class HalfOfSize(Layers):
    """A float on the left of a size."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x / (0.5 * x.shape[0])))
        return self.last(x - x.sum(0) / (1.0 + x.size(0)))


@root(guarded=SPECIALISED)
class ListIndexBySize(Layers):
    """A Python list is indexed by the batch size: the same entry for 3 and 4, another for 5."""

    scales = (1.0, 1.0, 1.0, 0.5, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.scales[x.shape[0]]
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED)
class ListSliceBySize(nn.Module):
    """How many layers run depends on a slice by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 4)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in list(self.layers)[: (x.shape[0] + 1) // 2]:
            x = torch.relu(layer(x))
        return self.last(x)


@block(sequences)
class ShapeNumel(nn.Module):
    """``x.shape.numel()`` and ``x[0].numel()``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * (y.sum() / y.shape.numel()) + y.shape[1:].numel() / y[0].numel()


@block(sequences)
class RootOfWidth(nn.Module):
    """``math.sqrt(x.size(-1))``, ``n ** -0.5``, ``int(n / 2)``: of a width that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) / math.sqrt(x.size(-1)) * x.shape[-1] ** -0.5
        half = int(x.shape[-1] / 2)
        return torch.cat([y[..., half:], y[..., :half]], -1) * round(0.26 * x.shape[-1])


@root(guarded=SPECIALISED, refused=SPECIALISED)
class RootOfBatch(Layers):
    """``math.sqrt`` of the batch size."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) / math.sqrt(x.size(0))
        return self.last(torch.relu(self.b(x)))


@block(sequences)
class SizeTuples(nn.Module):
    """``torch.Size`` is sliced, added, unpacked, multiplied and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        *lead, width = x.shape
        y = self.linear(x.reshape(x.shape[:1] + (-1,) + x.shape[2:]))
        y = y.view(*lead, 2, width // 2).transpose(1, 2).reshape(lead[0], 2, math.prod(y.shape[1:]) // 2)
        y = y.view(x.shape[:-2] + torch.Size([lead[-1], width]))
        batch, rest = y.shape[0], y.shape[1:]
        y = y.reshape((batch, functools.reduce(operator.mul, rest))).reshape(batch, *rest)
        if x.shape == y.shape and x.size() == y.size():
            y = y + F.interpolate(y[..., ::2], size=x.shape[-1:])
        return self.linear(y).new_zeros(y.size()) + y


@root(guarded=SPECIALISED, refused=SPECIALISED)
class LoopOverBatch(Layers):
    """One sample after another, in a Python loop."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.last(torch.stack([torch.relu(self.b(x[i])) for i in range(x.shape[0])]))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class RowsOfBatch(Layers):
    """``for row in x``."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.last(torch.stack([torch.relu(self.b(row)) for row in x]))


@root(sequences)
class LoopOverTime(Layers):
    """One step after another."""

    def forward(self, x: Tensor) -> Tensor:
        x, state, seen = self.a(x), x.new_zeros(x.shape[0], D), []
        for t in range(x.shape[1]):
            state = torch.tanh(self.b(x[:, t]) + self.c(state))
            seen += [state]
        return self.last(torch.stack(seen, 1).mean(1))


@root(guarded=SPECIALISED)
class SizeInText(Layers):
    """The batch size goes into an f-string, which is a key: found for 5 only."""

    scales = {"n5": 3.0}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.scales.get(f"n{x.shape[0]}", 1.0)
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED)
class SizeAsKey(Layers):
    """The batch size is a key of a dict: found for 5 only."""

    scales = {5: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * self.scales.get(x.shape[0], 1.0)
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED)
class SizeInSet(Layers):
    """The batch size is looked for in a set."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * (3.0 if x.shape[0] in {5, 50} else 1.0)
        return self.last(torch.relu(self.b(x)))


@root(sequences)
class SizeInLruCache(Layers):
    """Positions come from an ``lru_cache`` on the length; a factor from one on the batch size."""

    @staticmethod
    @functools.lru_cache
    def positions(length: int) -> Tensor:
        return torch.linspace(0, 1, length)[:, None]

    @staticmethod
    @functools.lru_cache
    def factor(batch: int) -> float:
        return 1.0 + batch // 5

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) + self.positions(x.shape[1])
        return self.last(torch.relu(self.b(x)).mean(1) * self.factor(x.shape[0]))


@root(sequences)
class NewTensorsOfSizes(Layers):
    """``new_zeros``, ``arange``, ``full``, ``expand``, ``torch.tensor`` of sizes, on the device of the input."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = self.a(torch.cat([x.new_ones(n, 1, D), x], 1))
        place = torch.arange(x.shape[1], device=x.device, dtype=x.dtype) / t
        x = x + place[None, :, None].expand(x.size(0), -1, D)
        x = self.b(x) + torch.full((n, 1, 1), n, device=x.device) * torch.eye(D, device=x.device)[:1]
        return self.last(torch.relu(x.reshape(-1, D).view(n, -1, D).mean(1)) / torch.tensor(n, device=x.device))


@root(refused=SPECIALISED, guarded=SPECIALISED)
class SizesInData(Layers):
    """Batch sizes become the data of new tensors."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * x.new_tensor([float(x.shape[0]), 1.0]).sum()
        return self.last(torch.relu(self.b(x)) / torch.tensor([x.shape[0], 1]).sum())


@block()
class TypeAndDevice(nn.Module):
    """``x.dtype`` and ``x.device`` are read and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype) * torch.finfo(x.dtype).eps
        kind = x.dtype
        x = self.linear(x.double().to(torch.float32) if x.dtype == torch.float32 else x)
        if x.device.type == "cuda":
            x = x.contiguous()
        return (x.float() + mask).to(dtype=kind).type_as(mask).to(mask)


@block(sequences)
class PadToMultiple(nn.Module):
    """Padding to a multiple of four, then folding into windows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        padded = F.pad(x, (0, 0, 0, -t % 4))
        windows = padded.view(n, padded.shape[1] // 4, 4, d)
        return self.linear(windows).mean(2, keepdim=True).expand(-1, -1, 4, -1).reshape(n, -1, d)[:, :t]


@root(guarded=SPECIALISED)
class BranchOnBatch(Layers):
    """A branch that goes the other way above a batch of four."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if x.shape[0] > 4:
            x = x * 2
        return self.last(torch.relu(self.b(x)))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class BatchInClamps(Layers):
    """``max``, ``min`` and ``while`` on the batch size."""

    def forward(self, x: Tensor) -> Tensor:
        n, chunks = x.shape[0], 1
        while chunks * 4 < n:
            chunks += 1
        x = torch.relu(self.a(x)) * chunks / max(n, 4)
        return self.last(torch.relu(self.b(x)) * min(n, 64))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class SizeInMath(Layers):
    """Readers of integers written in C: ``math.gcd``, ``bit_length``, ``[1.0] * n``, ``'%d' % n``."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.relu(self.a(x)) * (math.gcd(n, 5) + n.bit_length())
        weights = torch.tensor([1.0] * n)[:, None]
        return self.last(torch.relu(self.b(x * weights)) * len("%d" % (2 * n)))


@root(guarded=SPECIALISED)
class FactorOfBatch(Layers):
    """``math.gcd`` alone: 1 for a batch of 3 and 4, 5 for one of 5."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) * math.gcd(x.shape[0], 5))))


@root(guarded=SPECIALISED, refused=SPECIALISED)
class ListTimesSize(Layers):
    """``[w] * n`` makes the weights of the samples."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * x.new_tensor([0.5] * x.shape[0]).unsqueeze(1)
        return self.last(torch.relu(self.b(x)))


@root()
class NegativeSlices(Layers):
    """Tensors are sliced by sizes and their negatives, and strided by hand."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = torch.cat([self.a(x), self.b(x)])
        x = torch.relu(x[-n:] + x[:n] + x.narrow(0, n // 2, n))
        x = x.as_strided((n, D), x.stride()) + torch.as_strided(x, x.size(), (D, 1))
        return self.last(x[: x.shape[0]])
