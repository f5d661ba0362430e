"""Context managers, checkpoints, autograd functions and hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.awkward.base import C, D, Layers, block, root


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(D, D), nn.Linear(D, D)


@root()
class NoGradAtRoot(Layers):
    """A region without gradients, and one inside with them again."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        with torch.no_grad():
            scale = self.b(x).abs().mean(1, keepdim=True)
            with torch.enable_grad():
                y = self.b(x)
            shifted = y - y.mean()
        return self.last(torch.relu(self.c(y)) * scale + shifted)


@block()
class NoGradDecorated(Inner):
    """A method under ``@torch.no_grad()``, and ``set_grad_enabled`` by the training flag."""

    @torch.no_grad()
    def statistics(self, x: Tensor) -> Tensor:
        return self.other(x).std(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            y = self.other(x)
        return self.linear(x) * self.statistics(x) + y


@root()
class GradOnlyInTraining(Layers):
    """``set_grad_enabled(self.training)`` around the lower layers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            x = torch.relu(self.a(x))
        with torch.set_grad_enabled(not self.training):
            y = torch.relu(self.b(x))
        return self.last(self.c(x) + y)


@block()
class InferenceRegion(Inner):
    """``inference_mode`` inside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = self.other(x).abs().mean()
        return self.linear(x) * scale.clone()


@root()
class AutocastAtRoot(Layers):
    """Lower precision inside a region of the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.relu(self.b(x))
            with torch.autocast("cpu", enabled=False):
                x = self.c(x.float())
        return self.last(torch.relu(x))


@block()
class AutocastInBlock(Inner):
    """Lower precision inside a block."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return self.other(y.float())


@block()
class CheckpointReentrant(Inner):
    """Activation checkpointing, the old way."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=True)  # type: ignore[no-any-return]

    def inside(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.linear(x)))


@block()
class CheckpointNonReentrant(CheckpointReentrant):
    """Activation checkpointing, the new way, in train mode only."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return checkpoint(self.inside, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.inside(x)


@root()
class CheckpointAtRoot(nn.Module):
    """Layers of the root are checkpointed one by one, and a sequence in segments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])
        self.tail = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.BatchNorm1d(D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.relu(layer(y)), x, use_reentrant=False)
        return self.last(checkpoint_sequential(self.tail, 2, x, use_reentrant=False))


@root(random=True)
class CheckpointWithDropout(nn.Module):
    """The recomputation must draw the same random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)
        self.drops = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.Dropout(0.4)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.drops[0], x, use_reentrant=False)
        return self.last(torch.relu(checkpoint(self.drops[1], x, use_reentrant=True)))
