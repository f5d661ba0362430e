"""Who does what, in which order: schedules as plain data, derived from the method as the stages derive theirs.

A schedule is a list of jobs a part; a part does one job at a time, in that order. ``stage`` is the order of
``step.stage_step``, one batch after another. Part 2 of 4, two-wise (F forward, L loss and head, b a backward pass
that only passes gradients on, B one that trains, U update):

    receive from 1, F, send to 3, L, b of L2, send to 1, receive from 3, B of L3, U

With micro-batches every F, b and B is done once a micro-batch, first all forwards, then the backwards in reverse
(GPipe, Huang et al. 2019; the SCPL paper's Figure 13); L and U stay one a batch, since a contrastive loss needs the
whole batch. ``1f1b`` (Narayanan et al. 2019, flushed a batch) and ``hogwild`` (the same, never flushed: stale
gradients) are orders for methods with one loss for all parts:

    part 1   F F F B F B B B U        three parts, four micro-batches
    part 2   F F B F B F B B U
    part 3   F B F B F B F B U
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from localize.errors import ConfigError, problem_list
from localize.heads.base import Method, one_of, positive
from localize.runtime.messages import Side
from localize.runtime.routing import Flow, flows
from localize.runtime.step import last_towards

Order = Literal["stage", "1f1b", "hogwild"]
Work = Literal["forward", "head", "backward", "update"]
Content = Literal["activations", "gradients", "feedback"]


@dataclass(frozen=True)
class Job:
    """One thing that one part does: compute, send or receive.

    Args:
        part: from 1.
        batch: from 1.
        kind: what it does.
        micro: the micro-batch, from 1; None for what is done once a batch.
        side: of ``send`` and ``receive``: the neighbour.
        content: of ``send`` and ``receive``: what travels. Messages arrive in the order they were sent in.
        losses: of ``backward``: the parts whose losses' gradients go through the part together.
        trains: of ``backward``: whether it trains the part or only passes gradients on. Of ``head``: False for the
            pass that learns from feedback.
    """

    part: int
    batch: int
    kind: Work | Literal["send", "receive"]
    micro: int | None = None
    side: Side | None = None
    content: Content | None = None
    losses: tuple[int, ...] = ()
    trains: bool = True


@dataclass(frozen=True)
class Schedule:
    """All jobs, by part, each part's in its order; ``method`` is the method's name, for reading."""

    method: str
    order: Order
    batches: int
    microbatches: int
    jobs: tuple[tuple[Job, ...], ...]

    @property
    def parts(self) -> int:
        return len(self.jobs)

    @property
    def title(self) -> str:
        """For reading: ``bp, 4 parts, 8 batches of 4 micro-batches, 1f1b``."""
        title = f"{self.method}, {_counted(self.parts, 'part')}, {_counted(self.batches, 'batch')}"
        title += f" of {self.microbatches} micro-batches" if self.microbatches > 1 else ""
        return title if self.order == "stage" else f"{title}, {self.order}"


def schedule(
    method: Method, *, parts: int, batches: int, microbatches: int = 1, order: Order = "stage"
) -> Schedule:
    """Who does what, for so many batches.

    Raises:
        ConfigError: numbers that make no sense, or an order that the method cannot take; all problems at once.
    """
    problems = schedule_problems(method, parts, batches, microbatches, order)
    if problems:
        raise ConfigError(problem_list("This schedule makes no sense", problems))
    places = [_Place.of(method, number, parts, microbatches) for number in range(1, parts + 1)]
    jobs = tuple(tuple(_part_jobs(place, batches, order)) for place in places)
    reach = method.reach_in(parts)
    name = f"{method.name}, reach {reach}" if 1 < reach < parts else method.name
    return Schedule(name, order, batches, microbatches, jobs)


def schedule_problems(method: Method, parts: int, batches: int, microbatches: int, order: Order) -> list[str]:
    """What is wrong with the arguments of ``schedule``."""
    checks = [
        positive("parts", parts, whole=True),
        positive("batches", batches, whole=True),
        positive("microbatches", microbatches, whole=True),
        one_of("order", order, get_args(Order)),
    ]
    found = [problem for problem in checks if problem]
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


def has_loss(method: Method, number: int, parts: int) -> bool:
    """Whether part ``number`` has a loss of its own."""
    return number == parts or method.heads_below


@dataclass(frozen=True)
class _Place:
    """What decides a part's jobs."""

    number: int
    parts: int
    flows: tuple[Flow, ...]
    loss: bool
    feedback: bool
    encodes: bool  # the part above waits for the head's forward pass; it counts with the part's
    microbatches: int

    @classmethod
    def of(cls, method: Method, number: int, parts: int, microbatches: int) -> _Place:
        own = tuple(flows(method, number, parts))
        loss, feedback = has_loss(method, number, parts), method.feedback == "loss"
        return cls(number, parts, own, loss, feedback, loss and method.encodes_target, microbatches)

    @property
    def is_last(self) -> bool:
        return self.number == self.parts

    @property
    def micros(self) -> tuple[int | None, ...]:
        return (None,) if self.microbatches == 1 else tuple(range(1, self.microbatches + 1))

    def job(self, batch: int, kind: Work, micro: int | None = None) -> Job:
        return Job(self.number, batch, kind, micro)

    def message(
        self, batch: int, kind: Literal["send", "receive"], side: Side, content: Content, micro: int | None = None
    ) -> Job:
        return Job(self.number, batch, kind, micro, side, content)


def _part_jobs(place: _Place, batches: int, order: Order) -> Iterator[Job]:
    if order == "hogwild":
        yield from _alternating(place, [(batch, None) for batch in range(1, batches + 1)], update_each=True)
        return
    for batch in range(1, batches + 1):
        if order == "1f1b":
            yield from _alternating(place, [(batch, micro) for micro in place.micros], update_each=False)
            yield place.job(batch, "update")
        else:
            yield from _one_batch(place, batch)


def _one_batch(place: _Place, batch: int) -> Iterator[Job]:
    """What ``stage_step`` does, in its order."""
    for micro in place.micros:
        yield from _forward(place, batch, micro)
    for micro in place.micros if place.encodes and not place.is_last else ():
        yield place.message(batch, "send", Side.ABOVE, "activations", micro)
    if place.loss:
        yield place.job(batch, "head")
    if place.feedback and place.number > 1:
        yield place.message(batch, "send", Side.BELOW, "feedback")
    for flow in place.flows:
        for micro in reversed(place.micros):
            yield from _backward(place, flow, batch, micro)
    yield place.job(batch, "update")
    if place.feedback and not place.is_last:
        yield place.message(batch, "receive", Side.ABOVE, "feedback")
        yield replace(place.job(batch, "head"), trains=False)


def _alternating(
    place: _Place, pieces: list[tuple[int, int | None]], update_each: bool
) -> Iterator[Job]:
    """One forward, one backward, after as many forwards as there are parts above; a loss a piece."""
    ahead = min(place.parts - place.number, len(pieces))
    for batch, micro in pieces[:ahead]:
        yield from _forward(place, batch, micro)
    for position, (batch, micro) in enumerate(pieces):
        if position + ahead < len(pieces):
            yield from _forward(place, *pieces[position + ahead])
        if place.loss:
            yield place.job(batch, "head", micro)
        for flow in place.flows:
            yield from _backward(place, flow, batch, micro)
        if update_each:
            yield place.job(batch, "update")


def _forward(place: _Place, batch: int, micro: int | None) -> Iterator[Job]:
    if place.number > 1:
        yield place.message(batch, "receive", Side.BELOW, "activations", micro)
    yield place.job(batch, "forward", micro)
    if not place.is_last and not place.encodes:
        yield place.message(batch, "send", Side.ABOVE, "activations", micro)


def _backward(place: _Place, flow: Flow, batch: int, micro: int | None) -> Iterator[Job]:
    if flow.from_above:
        yield place.message(batch, "receive", Side.ABOVE, "gradients", micro)
    yield replace(place.job(batch, "backward", micro), losses=flow.losses, trains=flow.trains)
    if flow.down is not None and flow is last_towards(place.flows, flow.down):
        yield place.message(batch, "send", Side.BELOW, "gradients", micro)


def _counted(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural}"
