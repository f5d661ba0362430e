"""Models with awkward habits, one each, by theme."""

from __future__ import annotations

from tests.awkward import (  # noqa: F401
    attention,
    caches,
    calling,
    calls,
    channels,
    experts,
    functional,
    hooks,
    inplace,
    modes,
    numbers,
    outside,
    recurrent,
    regions,
    sharing,
    sizes,
    state,
    structure,
    values,
    weights,
)
from tests.awkward.base import TABLE, Awkward

__all__ = ["TABLE", "Awkward"]
