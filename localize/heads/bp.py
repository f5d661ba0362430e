"""End-to-end back-propagation: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localize.heads.base import Head, HeadSite, Method, TaskHead


@dataclass(frozen=True)
class BP(Method):
    """One loss, the task's, on the last part; it trains all parts.

    The transparency test of the whole toolkit: parts trained by ``bp`` equal the uncut model bit for bit.
    """

    name: ClassVar[str] = "bp"
    summary: ClassVar[str] = "end-to-end back-propagation through all parts (the baseline)"
    source: ClassVar[str] = "Rumelhart, Hinton & Williams 1986"
    reach = None
    heads_below: ClassVar[bool] = False

    def trains(self, number: int, parts: int) -> range:
        return range(1, parts + 1) if number == parts else range(0)

    def build_head(self, site: HeadSite) -> Head | None:
        return TaskHead(site) if site.is_last else None
