"""Reductions of a hidden state: a map to a smaller one, anything to a vector a sample.

All sizes are taken from a ``TensorSpec``, the batch size never: they work on any batch, and on other image sizes
and token counts than the example's.

Shape legend: ``N`` batch, ``C`` channels or classes, ``H W`` space, ``T`` tokens, ``D`` features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.spec import TensorSpec

MAX_FEATURES = 8192  # a flattened map larger than this would make the head larger than the model
MAP_AXES = (1, 2, 3)  # of space, at most
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

TokenPool = Literal["auto", "mean", "first", "last"]
TOKEN_POOLS = ("auto", "mean", "first", "last")
"""How tokens (N, T, D) become a vector (N, D): their ``mean``, the ``first`` (a class token) or the ``last``;
``auto`` is the final state of a recurrent layer that made them, of both directions, and else the mean."""


def is_map(spec: TensorSpec) -> bool:
    """Whether the hidden state is a map with 1 to 3 axes of space."""
    return spec.layout in ("map", "map_last") and len(spec.features) - 1 in MAP_AXES


def space(spec: TensorSpec) -> tuple[int, ...]:
    """Sizes of a map's axes of space."""
    return spec.features[1:] if spec.layout == "map" else spec.features[:-1]


def as_map(hidden: Tensor, spec: TensorSpec) -> Tensor:
    """A map of either layout as (N, C, *space); anything else with its batch axis in front."""
    if spec.batch_axis:
        hidden = hidden.movedim(spec.batch_axis, 0)
    return hidden.movedim(-1, 1) if spec.layout == "map_last" else hidden


class AsMap(nn.Module):
    """``as_map`` as a module."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, hidden: Tensor) -> Tensor:
        return as_map(hidden, self.spec)


def pool_sizes(channels: int, sizes: Sequence[int], max_features: int | None) -> tuple[int, ...]:
    """The space a map is pooled to: the largest ``s`` with ``channels · Π min(s, size) <= max_features``.

    The map's own sizes where it fits already or ``max_features`` is None; at least 1 an axis.
    """
    if max_features is None:
        return tuple(sizes)
    best = tuple(1 for _ in sizes)
    for s in range(2, max(sizes, default=1) + 1):
        candidate = tuple(min(s, size) for size in sizes)
        if channels * math.prod(candidate) > max_features:
            break
        best = candidate
    return best


def averaging(old: int, new: int) -> Tensor:
    """The (old, new) matrix of adaptive average pooling: window j is ⌊j·old/new⌋ to ⌈(j+1)·old/new⌉."""
    weights = torch.zeros(old, new)
    for j in range(new):
        start, stop = j * old // new, -(-(j + 1) * old // new)
        weights[start:stop, j] = 1 / (stop - start)
    return weights


class AverageTo(nn.Module):
    """Adaptive average pooling (N, C, *old) → (N, C, *new).

    An axis at a time: blocks by ``mean`` where the sizes divide, else by a matrix. Unlike PyTorch's adaptive
    pooling this keeps nothing for the backward pass, and is deterministic on GPUs. Maps of another size than
    ``old`` take PyTorch's.
    """

    def __init__(self, old: Sequence[int], new: Sequence[int]) -> None:
        super().__init__()
        self.old, self.new = tuple(old), tuple(new)
        for axis, (o, n) in enumerate(zip(old, new, strict=True)):
            self.register_buffer(f"weights_{axis}", averaging(o, n) if o % n else None, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        if tuple(hidden.shape[2:]) != self.old:
            pooled: Tensor = _ADAPTIVE[len(self.new)](hidden, self.new)  # type: ignore[arg-type]
            return pooled
        for axis in reversed(range(len(self.old))):
            if self.old[axis] == self.new[axis]:
                continue
            weights: Tensor | None = getattr(self, f"weights_{axis}")
            if weights is None:
                hidden = hidden.unflatten(axis + 2, (self.new[axis], -1)).mean(axis + 3)
            else:
                rows = hidden.movedim(axis + 2, -1)  # as a matrix: a batched product would expand the weights
                flat = rows.reshape(-1, self.old[axis]) @ weights
                hidden = flat.unflatten(0, rows.shape[:-1]).movedim(-1, axis + 2)
        return hidden

    def extra_repr(self) -> str:
        return f"{self.old} -> {self.new}"


class PoolTo(AverageTo):
    """Averages a map (N, C, *sizes) to the largest size with at most ``max_features`` values a sample."""

    def __init__(self, channels: int, sizes: Sequence[int], max_features: int | None = MAX_FEATURES) -> None:
        super().__init__(sizes, pool_sizes(channels, sizes, max_features))
        self.out_features = channels * math.prod(self.new)


class GlobalMean(nn.Module):
    """(N, C, *space) → (N, C)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(tuple(range(2, hidden.dim()))) if hidden.dim() > 2 else hidden


def pool_tokens(hidden: Tensor, spec: TensorSpec, how: TokenPool) -> Tensor:
    """Tokens (N, T, D) → (N, D); ``spec`` says whether a recurrent layer made them."""
    if how == "auto" and spec.final == "both":
        half = hidden.shape[2] // 2
        return torch.cat([hidden[:, -1, :half], hidden[:, 0, half:]], 1)
    if how == "first":
        return hidden[:, 0]
    return hidden[:, -1] if how == "last" or (how == "auto" and spec.final == "last") else hidden.mean(1)


class PooledVector(nn.Module):
    """Any hidden state → (N, ``out_features``).

    A vector as it is; tokens as ``TOKEN_POOLS`` says; a map pooled to at most ``max_features`` values and
    flattened; anything else flattened, and averaged to ``max_features`` values if it has more.
    ``max_features=None`` never pools a map; 1 gives the global average.
    """

    def __init__(
        self, spec: TensorSpec, max_features: int | None = MAX_FEATURES, token_pool: TokenPool = "auto"
    ) -> None:
        super().__init__()
        self.spec, self.token_pool = spec, token_pool
        self.pool: PoolTo | None = None
        count = math.prod(spec.features)
        if spec.layout == "tokens" or spec.layout == "vector":
            self.out_features = spec.channels
        elif is_map(spec):
            self.pool = PoolTo(spec.channels, space(spec), max_features)
            self.out_features = self.pool.out_features
        else:
            self.out_features = min(count, max(max_features or count, MAX_FEATURES))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = as_map(hidden, self.spec)
        if self.pool is not None:
            hidden = self.pool(hidden)
        if self.spec.layout == "tokens":
            return pool_tokens(hidden, self.spec, self.token_pool)
        hidden = hidden.flatten(1)
        if hidden.shape[1] == self.out_features:
            return hidden
        return F.adaptive_avg_pool1d(hidden.unsqueeze(1), self.out_features).squeeze(1)

    def extra_repr(self) -> str:
        return f"{self.spec} -> {self.out_features}"
