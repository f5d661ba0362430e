"""What the surroundings do: scripts that adjust the model between calls, threads, global settings, exceptions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.awkward.base import C, D, Layers, block, root, sequences

CHANGED = "changed|was .* at capture|specialised|mode while its part is not"


def warm_up(model: Any, number: int) -> None:
    model.strength = 0.1 * number


@root(adjust=warm_up, guarded=CHANGED)
class ScheduledAttribute(Layers):
    """The training script raises ``model.strength`` from call to call, as domain adversaries and annealers need."""

    strength = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)) * (1 + self.strength))))


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.temperature, self.on = nn.Linear(D, D), 1.0, True

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) / self.temperature).softmax(-1) if self.on else x


def cool_down(model: Any, number: int) -> None:
    model.block.temperature = 1.0 / (1 + number)
    model.block.on = number % 3 != 2


@root(adjust=cool_down, guarded=CHANGED)
class ScheduledInBlock(nn.Module):
    """The training script changes a number and a switch of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), Tempered(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.first(x))))


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * (2 if self.training else 1)


def freeze_block(model: Any, number: int) -> None:
    model.block.eval()
    model.first.requires_grad_(number % 2 == 0)


@root(adjust=freeze_block, guarded=CHANGED)
class PartlyFrozen(nn.Module):
    """The training script puts one block into eval mode, and freezes a layer's weights now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), Doubling(), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.first(x))))


@root(guarded="grad", refused="grad")
class GradModeAsked(Layers):
    """``torch.is_grad_enabled()`` and ``x.requires_grad`` decide."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if torch.is_grad_enabled():
            x = x * 2
        x = torch.relu(self.b(x))
        return self.last(x if x.requires_grad else -x)


@root(refused="thread|recorder cannot see")
class Threads(Layers):
    """Branches run in threads."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(lambda layer: layer(x), (self.b, self.c))
        return self.last(torch.relu(one + two))


@root()
class Futures(Layers):
    """Branches run by ``torch.jit.fork``."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        future = torch.jit.fork(self.b, x)
        return self.last(torch.relu(self.c(x) + torch.jit.wait(future)))


@block()
class CaughtErrors(nn.Module):
    """An exception is caught, and another way taken."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.linear = nn.Linear(D - 1, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.narrow(x)
        except RuntimeError:
            with contextlib.suppress(Exception):
                x = x + self.narrow.weight.view(3, 3)
            return self.linear(x)


@root(sequences)
class GlobalSettings(nn.Module):
    """``sdpa_kernel``, ``torch.device`` and a default type are set for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with sdpa_kernel(SDPBackend.MATH):
            x = x + F.scaled_dot_product_attention(x, x, x)
        with torch.device("cpu"):
            scale = torch.ones(D) * 0.5
        return self.last((self.between(x) * scale).mean(1))


@root(refused="Linear|copy|module")
class CopiedInForward(Layers):
    """A layer is copied in the forward; the copy's weights are used, and its gradients lost."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.last(torch.relu(self.b(x)) + copy.deepcopy(self.b)(x))


@root()
class ParallelOnOneDevice(nn.Module):
    """``nn.DataParallel`` without a device hands the call through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.wrapped = nn.DataParallel(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)), device_ids=[])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wrapped(torch.relu(self.first(x))))


@root()
class Generated(Layers):
    """Layers come from a generator; hidden states are yielded and gathered lazily."""

    def states(self, x: Tensor) -> Iterator[Tensor]:
        for layer in map(self.get_submodule, "abc"):
            x = torch.relu(layer(x))
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(sum(self.states(x), start=torch.zeros(D)))


@root()
class RetainedGradient(Layers):
    """Hidden tensors keep their gradients for someone who looks later."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if x.requires_grad:
            x.retain_grad()
        return self.last(torch.relu(self.b(x)))


@block()
class AdaptsInForward(nn.Module):
    """A step of gradient descent inside the forward, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rate = nn.Linear(D, D), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.linear.named_parameters())
        with torch.enable_grad():
            error = (torch.func.functional_call(self.linear, weights, (x,)) - x).square().mean()
            grads = torch.autograd.grad(error, list(weights.values()), create_graph=True)
        faster = {name: w - self.rate * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        return torch.func.functional_call(self.linear, faster, (x,))


@root(refused="hook")
class SavedOnCpu(Layers):
    """Saved tensors are packed by hooks while a region runs."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
            x = torch.relu(self.b(x))
        with torch.autograd.graph.save_on_cpu():
            x = self.c(x)
        return self.last(torch.relu(x))


@root()
class AnotherTypeInside(Layers):
    """A part of the model computes in double precision, with tables of the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.c.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) + torch.linspace(0, 1, D)
        return self.last(torch.relu(self.c(x.double()).to(self.last.weight.dtype)))


@root(refused="weights of 'b'")
class WeightReplaced(Layers):
    """A parameter is bound to a new one in the forward, with the same values."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if not isinstance(self.b.weight, nn.Parameter):
            raise TypeError
        self.b.bias = nn.Parameter(self.b.bias.detach().clone())
        return self.last(torch.relu(self.b(x)))
