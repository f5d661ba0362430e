"""Tensors that a call writes into, told by autograd's count of in-place changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from localize.convert.functions import tensors_of

Versions = list[tuple[Tensor, int]]


def versions(value: Any) -> Versions:
    """Tensors with their count of in-place changes; -1 where nobody counts."""
    return [(t, -1 if t.is_inference() else t._version) for t in tensors_of(value)]


def changed(before: Versions) -> list[Tensor]:
    """Those that were written into since."""
    return [t for t, version in before if version >= 0 and t._version != version]
