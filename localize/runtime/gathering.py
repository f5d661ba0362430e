"""Rows of all replicas of a part, for losses that compare samples across them.

    z_r      (N_r, …) the rows of replica r            z    (ΣN_r, …) those of all, on every replica
    L_r(z)   the loss of replica r                     θ    the weights, which all replicas share

Gradients are averaged afterwards, so weights follow (1/D) Σ_r g_r ∂z_r/∂θ, with g_r what the backward pass hands to
replica r. It should be the gradient of the mean loss, (1/D) Σ_s L_s(z): so g_r = Σ_s ∂L_s/∂z_r, the sum of what all
replicas have for these rows, without another factor. Where all have the same loss L, of the whole batch, that is
D ∂L/∂z_r, and the mean is ∂L/∂θ: what one process computes with the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from localize.errors import MethodError, WireError
from localize.heads.base import Head
from localize.runtime.replicas import Replicas


class Gathering:
    """Implements ``heads.base.AcrossReplicas``."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """See ``heads.base.AcrossReplicas``.

        Raises:
            MethodError: the tensors have different numbers of rows.
            WireError: replicas gather rows of different sizes; or one of them failed.
        """
        lengths = {len(each) for each in rows}
        if len(lengths) != 1:
            raise MethodError(f"Gathered tensors need as many rows each, got {[tuple(each.shape) for each in rows]}.")
        row_bytes = [each.element_size() * math.prod(each.shape[1:]) for each in rows]
        sizes = self._sizes(lengths.pop(), row_bytes)
        return tuple(_Gathered.apply(each, self.replicas, sizes) for each in rows)

    def _sizes(self, length: int, row_bytes: list[int]) -> list[int]:
        """How many rows each replica has."""
        found = [each.tolist() for each in self.replicas.each(torch.tensor([length, *row_bytes]))]
        for index, (_, *others) in enumerate(found, 1):
            if others != row_bytes:
                raise WireError(
                    f"Replica {index} gathers rows of {others} bytes, and replica {self.replicas.index + 1} rows of "
                    f"{row_bytes} bytes; samples of all batches need one shape and dtype."
                )
        return [length for length, *_ in found]


@contextmanager
def gathering(heads: Iterable[Head | None], replicas: Replicas | None) -> Iterator[None]:
    """Lets heads gather rows of all replicas, as long as it lasts; alone, they have nobody to gather from."""
    shared = [head for head in heads if head is not None] if replicas is not None else []
    for head in shared:
        assert replicas is not None
        head.replicas = Gathering(replicas)
    try:
        yield
    finally:
        for head in shared:
            head.replicas = None


class _Gathered(torch.autograd.Function):
    """Forward: the rows of all replicas. Backward: the sum of all replicas' gradients of this one's rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, replicas: Replicas, sizes: list[int]) -> Tensor:
        ctx.replicas, ctx.sizes = replicas, sizes
        padded = torch.zeros((max(sizes), *own.shape[1:]), dtype=own.dtype)
        padded[: len(own)] = own.detach()
        everyone = replicas.each(padded)
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)]).to(own.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = torch.empty(grad.shape, dtype=grad.dtype).copy_(grad)
        ctx.replicas.add(total)
        return total.split(ctx.sizes)[ctx.replicas.index].to(grad.device), None, None
