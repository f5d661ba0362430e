"""Models with awkward habits, one each, by theme."""

from __future__ import annotations

from tests.awkward import caches, calls, inplace, recurrent, regions, sizes, state, values
from tests.awkward.base import TABLE, Awkward

__all__ = ["TABLE", "Awkward", "caches", "calls", "inplace", "recurrent", "regions", "sizes", "state", "values"]
