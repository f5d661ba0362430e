"""Who does what, in which order: schedules as plain data, derived from the method as the stages derive theirs.

A schedule is a list of jobs a rank; ``jobs.py`` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import get_args

from localize.errors import ConfigError, problem_list
from localize.heads.base import Method, one_of, positive
from localize.runtime.jobs import Job, Order, Place, Round, rounds_of
from localize.runtime.routing import flows


@dataclass(frozen=True)
class Schedule:
    """All jobs, by rank, each rank's in its order, as rounds.

    ``method`` is the method's name, for reading; ``ranges`` are the parts of each rank.
    """

    method: str
    order: Order
    batches: int
    microbatches: int
    ranges: tuple[range, ...]
    rounds: tuple[tuple[Round, ...], ...]

    @cached_property
    def jobs(self) -> tuple[tuple[Job, ...], ...]:
        """Job by job, which takes memory for each one."""
        return tuple(tuple(chain.from_iterable(rounds)) for rounds in self.rounds)

    @property
    def parts(self) -> int:
        return self.ranges[-1][-1]

    @property
    def shared(self) -> bool:
        """Whether there are ranks with several parts."""
        return len(self.ranges) < self.parts

    @property
    def title(self) -> str:
        """For reading: ``bp, 4 parts on 2 ranks, 8 batches of 4 micro-batches, 1f1b``."""
        title = f"{self.method}, {_counted(self.parts, 'part')}"
        title += f" on {_counted(len(self.ranges), 'rank')}" if self.shared else ""
        title += f", {_counted(self.batches, 'batch')}"
        title += f" of {self.microbatches} micro-batches" if self.microbatches > 1 else ""
        return title if self.order == "stage" else f"{title}, {self.order}"


def schedule(
    method: Method,
    *,
    parts: int,
    batches: int,
    microbatches: int = 1,
    order: Order = "stage",
    ranges: Sequence[range] | None = None,
) -> Schedule:
    """Who does what, for so many batches.

    ``ranges`` are the parts of each rank, consecutive numbers from 1; None: one a rank.

    Raises:
        ConfigError: numbers that make no sense, or an order that the method cannot take; all problems at once.
    """
    problems = schedule_problems(method, parts, batches, microbatches, order, ranges)
    if problems:
        raise ConfigError(problem_list("This schedule makes no sense", problems))
    ranges = tuple(range(number, number + 1) for number in range(1, parts + 1)) if ranges is None else tuple(ranges)
    places = [Place.of(method, number, parts, microbatches) for number in range(1, parts + 1)]
    work = [
        tuple(rounds_of(places[numbers[0] - 1 : numbers[-1]], len(ranges) - rank, batches, order))
        for rank, numbers in enumerate(ranges, 1)
    ]
    reach = method.reach_in(parts)
    name = f"{method.name}, reach {reach}" if 1 < reach < parts else method.name
    return Schedule(name, order, batches, microbatches, ranges, tuple(work))


def schedule_problems(
    method: Method,
    parts: int,
    batches: int,
    microbatches: int,
    order: Order,
    ranges: Sequence[range] | None = None,
) -> list[str]:
    """What is wrong with the arguments of ``schedule``."""
    checks = [
        positive("parts", parts, whole=True),
        positive("batches", batches, whole=True),
        positive("microbatches", microbatches, whole=True),
        one_of("order", order, get_args(Order)),
    ]
    found = [problem for problem in checks if problem]
    if not found and ranges is not None and not (all(ranges) and [*chain(*ranges)] == [*range(1, parts + 1)]):
        listed = ", ".join(str(list(numbers)) for numbers in ranges)
        found.append(f"ranks with parts {listed}: they have the parts 1 to {parts} in this order, at least one each.")
    if found or order == "stage":
        return found
    if any(len(flows(method, number, parts)) != 1 for number in range(1, parts + 1)) or method.reach_in(parts) < parts:
        found.append(
            f"order={order!r} is for methods with one backward pass a part, from the top (bp, joint); "
            f"{method.name} with {parts} parts learns otherwise. Use order='stage'."
        )
    if order == "hogwild" and microbatches > 1:
        found.append(f"order='hogwild' updates after every batch; microbatches={microbatches} must be 1.")
    return found


def _counted(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural}"
