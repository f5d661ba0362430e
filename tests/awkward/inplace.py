"""Writing into tensors that others see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.awkward.base import C, D, Layers, block, root, sequences


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


@block()
class ReluInPlace(Inner):
    """``relu_``, ``F.relu(inplace=True)`` and a module with ``inplace``, on a tensor that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        z = y + 0
        z.relu_()
        return self.act(F.relu(self.linear(z), inplace=True) + z) + x


@block()
class SetItem(Inner):
    """``y[:, 0] = …``, ``y[mask] = …``, ``y[..., 1] += …``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + 0
        y[:, 0] = x[:, 1]
        y[..., 1] += x[..., 2]
        y[:, 2:4] *= 0.5
        y[y > 1] = 1.0
        return y


@block()
class OutArguments(Inner):
    """``out=`` and ``copy_`` into buffers made on the way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        target = torch.empty_like(y).requires_grad_(False)
        torch.add(y.detach(), 1.0, out=target)
        other = torch.zeros_like(y)
        other[:, :4].copy_(y[:, 4:])
        return y + other + target


@block()
class IndexWrites(Inner):
    """``index_add_``, ``scatter_``, ``masked_fill_``, ``index_copy_``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        rows = torch.arange(x.shape[0]).flip(0)
        total = torch.zeros_like(y).index_add_(0, rows, y)
        total.scatter_add_(1, y.argsort(1), y)
        return total.masked_fill_(x > 0.5, 0.25).index_copy_(0, rows[:1], y[:1])


@root()
class InputWritten(Layers):
    """The input itself is changed, and read later."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x * 1))
        x.mul_(0.5)
        x[:, 0] = 1.0
        return self.last(torch.relu(self.b(y)) + self.c(x))


@root(sequences)
class ViewWrittenAcrossBlocks(nn.Module):
    """Blocks write into slices of one tensor, which is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        store = torch.zeros(x.shape[0], 4, D, device=x.device)
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            store[:, i] = x.mean(1)
        return self.last(store.sum(1))


@root()
class AddedInPlace(Layers):
    """``x += y`` where ``x`` is a skip that was handed on before."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        skip = x
        y = self.b(torch.relu(x))
        x += y
        z = self.c(torch.relu(x))
        z += skip
        return self.last(z)


@root()
class ViewWrittenLater(Layers):
    """A view is taken early and written after other layers ran."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * 1
        half = y[:, : D // 2]
        z = torch.relu(self.b(x))
        half.add_(z[:, : D // 2])
        z = torch.relu(self.c(z))
        return self.last(z + y)


@block()
class DataAndDetach(Inner):
    """``x.data``, ``detach``, ``detach_``, ``requires_grad_``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        straight_through = (y.sign() - y).detach() + y
        scale = y.data.abs().mean()
        leaf = x.detach().requires_grad_()
        return straight_through * scale + (leaf * 2).detach_()


@block()
class DataWritten(Inner):
    """``y.data`` is written: autograd does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.data.clamp_(-0.5, 0.5)
        y.data[:, 0] = 0.25
        return torch.tanh(y) + y


@root(refused="the attribute 'data' of a tensor is set")
class DataAssigned(Layers):
    """``y.data = …`` at the root."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.data = y.data.clamp(-0.5, 0.5)
        return self.last(torch.relu(self.b(torch.tanh(y))))


@root(refused="changed in place under no_grad")
class WeightsClamped(Layers):
    """The forward itself clips a weight, as WGAN critics do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.clamp_(-0.1, 0.1)
        self.c.weight.data.mul_(0.9)
        return self.last(torch.relu(self.c(torch.relu(self.b(self.a(x))))))


@root()
class WrittenThroughFunction(Layers):
    """A helper writes into what it was given and returns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)) + 0
        _standardise(y)
        z = self.b(y)
        _standardise(z)
        return self.last(z + y)


def _standardise(values: Tensor) -> None:
    values -= values.mean(1, keepdim=True)
    values /= values.detach().std(1, keepdim=True) + 1e-3


@root(sequences)
class SharedByViews(Layers):
    """Rows are written through views; columns, which share the storage, are read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * 1
        left, right = x[..., : D // 2], x[..., D // 2 :].flip(-1)
        y = torch.relu(self.b(x * 1))
        x.select(1, 0).mul_(2)
        x.narrow(1, 1, 2).add_(y[:, 1:3])
        return self.last(torch.cat([left, right], -1).mean(1) + self.c(y).mean(1))


@root()
class ReturnedInput(Layers):
    """Returns its input, changed, beside the logits: what the caller holds is the same tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x * 1))
        x.neg_()
        return self.last(torch.relu(self.b(y))), x
