"""Python on values: what the program does next depends on what is in a tensor."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, T, block, generator, root

VALUE = "on a value that was|specialised"
READS = f"Python depends on a tensor's values|{VALUE}"


class Inner(nn.Module):
    """A block with a layer of its own, so that it would be entered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


@block()
class ItemInBlock(Inner):
    """``.item()`` scales."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / (1.0 + x.abs().max().item())


@block()
class BranchOnSum(Inner):
    """``if x.sum() > 0``."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return -self.linear(x) * 2


@block()
class ListOfValues(Inner):
    """``.tolist()`` chooses rows, ``float(t)`` and ``int(t)`` scale."""

    def forward(self, x: Tensor) -> Tensor:
        best = x.argmax(1).tolist()
        y = torch.stack([row * (1 + column) for row, column in zip(self.linear(x), best, strict=True)])
        return y * float(x.std()) + int(x.argmax())


@block()
class CountedByValues(Inner):
    """A loop that runs until a norm is small."""

    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 2:
            x = self.linear(x) * 0.5
        return x


@block()
class EarlyReturn(Inner):
    """A block that gives up when it is sure."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.sigmoid(x).mean() > 0.52:
            return x
        return self.linear(x)


@block()
class MaskedRows(Inner):
    """Boolean masks and ``nonzero`` make as many rows as the values ask for."""

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0] > 0).nonzero().squeeze(1)
        y = x.clone()
        y[rows] = self.linear(x[rows])
        y[x < 0] = 0.1
        return y * (1 + x[x > 0].mean())


@block()
class PythonMax(Inner):
    """``max(a, b)`` and ``sorted`` of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        first, *_ = sorted([y[:, 0].sum(), y[:, 1].sum()])
        return y * max(y.mean(), x.mean()) + first


@block()
class NumpyDetour(Inner):
    """Through NumPy and back."""

    def forward(self, x: Tensor) -> Tensor:
        weights = numpy.exp(-numpy.abs(x.detach().numpy())).mean(0)
        return self.linear(x) * torch.from_numpy(weights)


@block()
class CheckedValues(Inner):
    """Asserts, NaN checks and a text of a tensor that nobody needs."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise ValueError(f"NaN in {x.mean():.3f}")
        assert (x.abs() < 1e6).all(), "too large"
        self.__dict__.setdefault("texts", [f"{x.mean():.1f} {x.sum().item()}"])
        return self.linear(x)


@root(guarded=VALUE)
class BranchAtRoot(Layers):
    """``if x.sum() > 0`` in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.b(x).sum() > 0:
            x = x + self.b(x)
        return self.last(torch.relu(self.c(x)))


@root(guarded=VALUE)
class NanCheckAtRoot(Layers):
    """``if torch.isnan(x).any(): raise`` in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if torch.isnan(x).any():
            raise ValueError("NaN")
        return self.last(torch.relu(self.b(x)))


@root(guarded=VALUE, refused=READS)
class ItemAtRoot(Layers):
    """``.item()`` in the model's own forward, into the computation."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.last(torch.relu(self.b(x / (1.0 + x.detach().abs().max().item()))))


@root(guarded=VALUE, refused=READS)
class ListAtRoot(Layers):
    """``.tolist()`` in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.relu(self.a(x)).sum(1).argsort().tolist()
        return self.last(torch.relu(self.b(x[order])))


@root(guarded=VALUE)
class EarlyExitAtRoot(Layers):
    """Returns from the middle of the model when it is sure."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if not self.training and self.last(x).softmax(1).amax(1).mean() > 0.45:
            return self.last(x)
        return self.last(torch.relu(self.c(torch.relu(self.b(x)))))


@root(guarded=VALUE)
class ValuesInLoopAtRoot(Layers):
    """A data-dependent number of rounds in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x, rounds = self.a(x), 0
        while x.abs().mean() > 0.3 and rounds < 4:
            x, rounds = torch.tanh(self.b(x)) * 0.7, rounds + 1
        return self.last(x)


@root()
class MaskAtRoot(Layers):
    """Rows by a boolean mask in the model's own forward: the number of rows follows from values."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        keep = x.mean(1) > 0.1
        chosen = self.b(x[keep])
        x = torch.zeros_like(x).masked_scatter(keep[:, None], chosen) + torch.where(keep[:, None], 0.0, x)
        return self.last(x) * (1 + chosen.shape[0])


@root(guarded=VALUE)
class CountOfMaskAtRoot(Layers):
    """Python reads how many rows a mask took."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        chosen = x[x.mean(1) > 0.25]
        if chosen.shape[0] == 0:
            return self.last(x)
        return self.last(torch.relu(self.b(x))) / chosen.shape[0] + halved(chosen.size(0))


def halved(count: int) -> float:
    """A helper that knows nothing of tensors."""
    return 0.5 * count


def padded(batch: int, seed: int, length: int = T) -> dict[str, Tensor]:
    """(N, T, D) with lengths (N)."""
    x = torch.randn(batch, length, D, generator=generator(seed))
    lengths = torch.randint(2, length, (batch,), generator=generator(seed))
    return {"x": x, "lengths": lengths}


@root(padded, guarded=VALUE, refused=READS)
class LongestAtRoot(Layers):
    """The longest length, as a Python number, cuts the sequence in the model's own forward."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        x = torch.relu(self.a(x[:, :longest]))
        mask = torch.arange(longest)[None] < lengths[:, None]
        return self.last(torch.relu(self.b(x * mask[..., None])).sum(1) / lengths[:, None])


@root(guarded=VALUE, refused=READS)
class NumpyAtRoot(Layers):
    """Through NumPy and back in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        weights = torch.from_numpy(numpy.exp(-numpy.abs(x.detach().numpy())).mean(0))
        return self.last(torch.relu(self.b(x * weights)))


@root(guarded=VALUE, refused=READS)
class ChosenByValue(nn.Module):
    """A value says which module runs next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.experts[int(x.sum() * 10) % 3](x)))


@root(guarded=VALUE, refused=READS)
class TextAtRoot(Layers):
    """A tensor's value goes into a text, and the text decides."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if f"{x.mean():.4f}".endswith(("1", "2", "3", "4", "5")):
            x = x * 2
        return self.last(torch.relu(self.b(x)))
