"""What is different between two runs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from localize.signature import leaves_of

GRADIENT_TOLERANCE = 1e-4  # of the largest entry: gradients that meet may be added up in another order


def outputs_differ(expected: Any, found: Any, tolerance: float = 0.0) -> str | None:
    """Where two outputs differ; None where they are equal: bit for bit, unless there is a ``tolerance``."""
    if type(expected) is not type(found):
        return f"the output is a {type(found).__name__} instead of a {type(expected).__name__}"
    left, right = leaves_of(expected), leaves_of(found)
    if len(left) != len(right):
        return f"the output has {len(right)} entries instead of {len(left)}"
    for position, (one, other) in enumerate(zip(left, right, strict=True)):
        difference = _entry_differs(one, other, tolerance)
        if difference:
            return f"output {position} {difference}"
    return None


def tensors_differ(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], kind: str) -> str | None:
    """Where named tensors differ, bit for bit."""
    for name, tensor in expected.items():
        if name not in found or not equal(tensor, found[name]):
            return f"{kind} {name!r} is another one afterwards"
    return None


def gradients_differ(expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None]) -> str | None:
    """Where gradients differ by more than rounding."""
    for name, one in expected.items():
        other = found[name]
        if (one is None) is not (other is None):
            return f"parameter {name!r} has {'a' if one is None else 'no'} gradient"
        if one is not None and other is not None and not close(one, other, GRADIENT_TOLERANCE):
            return f"the gradient of parameter {name!r} differs by up to {_distance(one, other):.3g}"
    return None


def equal(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.is_sparse or other.is_sparse:
        one, other = one.to_dense(), other.to_dense()
    same = one == other
    return bool((same | (one.isnan() & other.isnan())).all()) if one.is_floating_point() else bool(same.all())


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Equal up to ``tolerance`` times the largest entry."""
    if equal(one, other):
        return True
    if not one.is_floating_point() or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return _distance(one, other) <= tolerance * max(float(one.detach().to_dense().abs().nan_to_num().max()), 1e-6)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach().to_dense() - other.detach().to_dense()).abs().max())


def _entry_differs(one: Any, other: Any, tolerance: float) -> str | None:
    if not isinstance(one, Tensor):
        same = one is other or bool(one == other) or (one != one and other != other)
        return None if same else f"is {other!r} instead of {one!r}"
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        there = f"{tuple(other.shape)} {other.dtype}" if isinstance(other, Tensor) else repr(other)
        return f"is {there} instead of {tuple(one.shape)} {one.dtype}"
    if equal(one, other) or (tolerance and close(one, other, tolerance)):
        return None
    if one.dtype.is_floating_point:
        return f"differs by up to {_distance(one, other):.3g}"
    return f"differs in {int((one != other).sum())} of {one.numel()} entries"
