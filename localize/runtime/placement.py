"""Which rank has which parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localize.errors import PlacementError
from localize.model import LocalModel
from localize.spec import Plan


@dataclass(frozen=True)
class Placement:
    """The parts of every rank: consecutive numbers from 1, at least one each.

    With several replicas of all parts, ``rank`` is counted within this process's replica; they follow one another.
    """

    rank: int
    ranges: tuple[range, ...]
    replica: int = 0
    replicas: int = 1

    @property
    def numbers(self) -> range:
        """The parts of this rank."""
        return self.ranges[self.rank]

    @property
    def names(self) -> list[str]:
        """Every rank's parts in words, of all replicas."""
        total = self.ranges[-1][-1]
        names = [
            f"part {r[0]} of {total}" if len(r) == 1 else f"parts {r[0]}–{r[-1]} of {total}" for r in self.ranges
        ]
        if self.replicas == 1:
            return names
        return [f"{n}, replica {i} of {self.replicas}" for i in range(1, self.replicas + 1) for n in names]

    def global_rank(self, rank: int, replica: int | None = None) -> int:
        """The number, among all processes, of a rank of this (or another) replica."""
        return (self.replica if replica is None else replica) * len(self.ranges) + rank

    def rank_of(self, number: int) -> int:
        """The rank that has a part."""
        return next(rank for rank, numbers in enumerate(self.ranges) if number in numbers)


def assign(costs: Sequence[float], ranks: int) -> tuple[range, ...]:
    """Consecutive parts to ranks so that the largest sum of costs is as small as possible.

    Raises:
        PlacementError: more ranks than parts.
    """
    parts = len(costs)
    if ranks > parts:
        raise PlacementError(
            f"There are {ranks} ranks for {parts} parts; start {parts} processes, or convert with parts={ranks}."
        )
    # best[n]: the smallest largest sum for the first n parts on the ranks so far, and where the last rank begins
    none: tuple[float, list[int]] = (float("inf"), [])
    best = [(0.0, none[1])] + [none] * parts
    sums = [[sum(costs[m:n]) for m in range(n)] for n in range(parts + 1)]
    for _ in range(ranks):
        best = [none] + [
            min((max(best[m][0], sums[n][m]), [*best[m][1], n]) for m in range(n)) for n in range(1, parts + 1)
        ]
    ends = best[parts][1]
    return tuple(range(start + 1, end + 1) for start, end in zip([0, *ends[:-1]], ends, strict=True))


def assign_planned(plan: Plan, ranks: int) -> tuple[range, ...]:
    """A plan's parts to ranks, by the cost that they were balanced by. Errors: see ``assign``."""
    return assign([max(part.total.of(plan.balance), 1e-9) for part in plan.parts], ranks)


def placement_of(local: LocalModel, rank: int, ranks: int, replicas: int = 1) -> Placement:
    """Parts to ranks by the cost that the model was balanced by; ``rank`` and ``ranks`` count all processes.

    Raises:
        PlacementError: more ranks than parts, or a number of ranks that is no multiple of ``replicas``.
    """
    count, each = len(local.parts), ranks // replicas
    if ranks % replicas or (replicas > 1 and each > count):
        possible = ", ".join(str(n * replicas) for n in range(1, count + 1))
        raise PlacementError(
            f"There are {ranks} ranks for {replicas} replicas of {count} parts; start {possible} processes."
        )
    ranges = assign_planned(local.plan, each) if len(local.plan.parts) == count else assign([1.0] * count, each)
    return Placement(rank % each, ranges, rank // each, replicas)
