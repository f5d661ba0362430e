"""Tensors as bytes one after another, and targets as trees of plain values: how what travels is laid out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localize.errors import WireError

_ALIGN = (
    256  # as a device's allocator does, at least: products of matrices may be computed otherwise for less
)


@dataclass(frozen=True)
class Packed:
    """A tensor as a header describes it. ``strides`` is None where the bytes are in row-major order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the payload; what an axis of stride 0 repeats is sent once."""
        return math.prod(held(self.shape, self.strides)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {self.shape}"


def describe(name: str, tensor: Tensor, where: str) -> Packed:
    """What a header says of a tensor; ``where`` is for messages.

    Raises:
        WireError: it is sparse, quantized or on the meta device, and so cannot travel.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise WireError(
            f"{where}: {name} is a {tensor.layout} tensor on {tensor.device}, which cannot travel."
        )
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    if tensor.is_contiguous() or not tensor.numel() or _overlaps(shape, strides):
        return Packed(name, tensor.dtype, shape)
    return Packed(name, tensor.dtype, shape, strides)


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements share memory otherwise than by an axis of stride 0; such a layout is not kept."""
    reached = 0
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1 and s):
        if stride <= reached:
            return True
        reached += stride * (size - 1)
    return False


def offsets(packed: Iterable[Packed]) -> tuple[list[int], int]:
    """Where each tensor lies among the bytes, and where the last one ends."""
    found, end = [], 0
    for spec in packed:
        found.append(end)
        end += -(-spec.nbytes // _ALIGN) * _ALIGN
    return found, end


def room(payload: Tensor, spec: Packed, offset: int) -> Tensor:
    """The part of the payload that holds a tensor, as that tensor in row-major order."""
    return payload[offset : offset + spec.nbytes].view(spec.dtype).view(held(spec.shape, spec.strides))


def fill(payload: Tensor, packed: Sequence[Packed], tensors: Sequence[Tensor]) -> None:
    """Copies tensors to where they belong in the payload; on a device, its current stream does so."""
    for spec, tensor, offset in zip(packed, tensors, offsets(packed)[0], strict=True):
        if tensor.numel():
            room(payload, spec, offset).copy_(once(tensor.detach(), spec.strides))


def held(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of what is sent: axes of stride 0, which repeat one element, have size 1."""
    return shape if strides is None else tuple(1 if not s else n for n, s in zip(shape, strides, strict=True))


def once(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """The tensor without what axes of stride 0 repeat."""
    for axis, stride in enumerate(strides or ()):
        if not stride:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


# ------------------------------------------------------------------- targets


def plant(target: Any, leaves: list[tuple[str, Tensor]], where: str) -> Any:
    """A target as JSON; its tensors go to ``leaves`` in order.

    Raises:
        WireError: it holds something else than tensors, numbers, text, None, tuples, lists and mappings.
    """
    match target:
        case Tensor():
            leaves.append((f"target {len(leaves) + 1}", target))
            return {"tensor": len(leaves)}
        case None | bool() | int() | float() | str():
            return {"value": target}
        case list() | tuple() if type(target) in (list, tuple):
            return {type(target).__name__: [plant(item, leaves, where) for item in target]}
        case Mapping():
            return {"dict": [[key, plant(value, leaves, where)] for key, value in target.items()]}
    raise WireError(
        f"{where}: a target holds a {type(target).__name__}, which cannot travel; pass split_batch= and make targets "
        "of tensors, numbers and text in tuples, lists and dicts."
    )


def count(tree: Any) -> int:
    """How many tensors a planted target has."""
    if tree is None:
        return 0
    ((kind, content),) = tree.items()
    if kind in ("list", "tuple"):
        return sum(map(count, content))
    return sum(count(value) for _, value in content) if kind == "dict" else int(kind == "tensor")


def harvest(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """The target that ``plant`` made ``tree`` of, with the tensors of ``leaves`` in order; mappings become dicts."""
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return next(leaves)
        case "list" | "tuple":
            items = [harvest(item, leaves) for item in content]
            return items if kind == "list" else tuple(items)
        case "dict":
            return {key: harvest(value, leaves) for key, value in content}
    return content
