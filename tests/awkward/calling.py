"""Ways to call a function or a module, and to index a tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from tests.awkward.base import C, D, Layers, T, block, generator, root, sequences


@root()
class CallStyles(Layers):
    """Unbound methods, keywords for everything, operators as functions, reflected operators, ``torch.ops``."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.Tensor.relu(self.a.__call__(x))
        x = torch.add(input=x, other=self.b(input=x), alpha=2)
        x = operator.add(operator.matmul(x, self.c.weight), 1).__rsub__(2)
        x = 1 - x / 2 + (2 - x) * 3 ** x.clamp(max=1) + (x > 0) - (~(x > 1)).float() + 7 // (x.detach().abs() + 1) % 3
        x = torch.ops.aten.add.Tensor(torch.ops.aten.tanh(x), x, alpha=0.5)
        x = torch._C._nn.gelu(x) + getattr(torch, "sig" + "moid")(x)
        x.__iadd__(1)
        return self.last.forward(x)


class Doubled(nn.Module):
    """Its ``__call__`` is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def __call__(self, x: Tensor, times: int = 2) -> Tensor:
        return super().__call__(x) * times

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@root()
class OverriddenCall(nn.Module):
    """Modules with a ``__call__`` of their own, and ones whose ``forward`` is called directly, hooks left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(D, D), Doubled(), Doubled(), nn.Linear(D, C)
        self.two.register_forward_hook(lambda module, args, output: output * 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.two.forward(torch.relu(self.one(torch.relu(self.first(x)), times=3)))))


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, D), nn.Linear(D, D)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.into(x))
        return x, x.mean(1, keepdim=True)

    def decode(self, x: Tensor, level: Tensor) -> Tensor:
        return self.out(x) - level


@root()
class OtherMethods(nn.Module):
    """Blocks without a ``forward``: the root calls ``encode`` and ``decode``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(D, D), Coder(), Coder(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x, low = self.one.encode(self.first(x))
        y, high = self.two.encode(x)
        return self.last(self.one.decode(self.two.decode(y, high), low))


class Applying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor], norm: nn.Module, **options: Any) -> Tensor:
        return norm(act(self.linear(x))) * options["scale"]


@root()
class FunctionsAsArguments(nn.Module):
    """Functions, lambdas and modules are arguments of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(D, D), Applying(), Applying(), nn.Linear(D, C)
        self.norms = nn.ModuleList([nn.BatchNorm1d(D), nn.LayerNorm(D)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x), torch.relu, self.norms[0], scale=2)
        return self.last(self.two(x, act=lambda t: t * 0.5 + x, norm=self.norms[1], scale=x.std()))


class Folded(nn.Module):
    """No module inside, so that it would be a leaf, but it is given a module."""

    def forward(self, x: Tensor, layers: list[nn.Module]) -> Tensor:
        for layer in layers:
            x = torch.relu(layer(x))
        return x


@root()
class ModulesForLeaf(Layers):
    """A block without modules of its own is handed those of the root in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = Folded()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fold(x, [self.a, self.b, self.c]))


@block(sequences)
class IndexStyles(nn.Module):
    """Ellipsis, None, steps, negative and tensor indices, boolean lists, ``take``, tuples of slices."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        rows = torch.arange(x.shape[0] - 1, -1, -1)
        y = y[rows] + y[..., None, :].squeeze(-2) + y[:, :, [*range(1, D), 0]] + y[:, -1:] * y[:, ::2][:, :1]
        y = y[(slice(None), slice(0, None), [True] * D)] + y[:, torch.tensor(0)][:, None]
        return y + y.take(torch.tensor([0, 5])).sum() + y[rows[:1], :, rows[0]].mean() + y[:, :0].sum()


@custom_op("awkward::cube", mutates_args=())
def cube(x: Tensor, factor: float) -> Tensor:
    return x**3 * factor


@cube.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def _cube_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * 3 * ctx.saved_tensors[0] ** 2 * ctx.factor, None


cube.register_autograd(_cube_backward, setup_context=_keep)


@root()
class CustomOperator(Layers):
    """An operator of the user's own, with its backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(cube(self.b(cube(self.a(x), 0.5)), factor=0.1))


def time_first(batch: int, seed: int, length: int = T) -> Tensor:
    """(T, N, D)."""
    return torch.randn(length, batch, D, generator=generator(seed))


@root(time_first)
class BatchSecond(nn.Module):
    """The batch is the second axis of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(D, D), nn.GRU(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x))[0][-1])
