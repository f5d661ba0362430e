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


@root()
class NegativeSlices(Layers):
    """Tensors are sliced by sizes and their negatives, and strided by hand."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = torch.cat([self.a(x), self.b(x)])
        x = torch.relu(x[-n:] + x[:n] + x.narrow(0, n // 2, n))
        x = x.as_strided((n, D), x.stride()) + torch.as_strided(x, x.size(), (D, 1))
        return self.last(x[: x.shape[0]])
