"""A traced model with its profiles and cut points, for the tests of cuts and planning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localize.convert.cuts import find_cuts
from localize.convert.partition import HeadCost, PartTable
from localize.convert.profile import profile_modes
from localize.convert.record import trace
from localize.convert.traced import Profile, TracedModel
from localize.spec import Cost, CutPoint


class Found:
    """A traced model with its cut points: the best ones, and all legal ones."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        self.traced: TracedModel = trace(model, inputs, {})
        self.profiles: dict[bool, Profile] = profile_modes(self.traced)
        self.cuts = find_cuts(self.traced, self.profiles)
        self.best: list[CutPoint] = self.cuts[True]
        self.all: list[CutPoint] = find_cuts(self.traced, self.profiles, thin=False)[True]

    def names(self, points: Sequence[CutPoint]) -> list[str]:
        return [point.name for point in points]

    def table(self, balance: str, head_cost: HeadCost) -> PartTable:
        """Every part between two of the best cut points."""
        return PartTable(self.traced, self.profiles[True], self.best, balance, head_cost)

    def at(self, name: str) -> CutPoint:
        return next(point for point in self.all if name in (point.name, *point.aliases))


def no_head(_: CutPoint | None, first: bool) -> Cost:
    return Cost()


def chain(*layers: nn.Module) -> Found:
    return Found(nn.Sequential(*layers), torch.randn(2, 4))
