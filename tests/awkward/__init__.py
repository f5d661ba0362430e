"""Models with awkward habits, one each, by theme."""

from __future__ import annotations

from tests.awkward import inplace, sizes, values
from tests.awkward.base import TABLE, Awkward

__all__ = ["TABLE", "Awkward", "inplace", "sizes", "values"]
