"""What one rank does with its parts, in which order.

A schedule is a list of jobs a rank; a rank does one job at a time, in that order. ``stage`` is the order of
``step.stage_step``, one batch after another. Part 2 of 4, two-wise (F forward, L loss and head, b a backward pass
that only passes gradients on, B one that trains, U update):

    receive from 1, F, send to 3, L, b of L2, send to 1, receive from 3, B of L3, U

Parts of one rank take turns, as ``sequential.run_batch`` has them do: the lowest that can go on does.

With micro-batches every F, b and B is done once a micro-batch, first all forwards, then the backwards in reverse
(GPipe, Huang et al. 2019; the SCPL paper's Figure 13); L and U stay one a batch, since a contrastive loss needs the
whole batch. ``1f1b`` (Narayanan et al. 2019, flushed a batch) and ``hogwild`` (the same, never flushed: stale
gradients) are orders for methods with one loss for all parts:

    part 1   F F F B F B B B U        three parts, four micro-batches
    part 2   F F B F B F B B U
    part 3   F B F B F B F B U

There, the parts of one rank are one stage: all go forward, or all backward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from localize.heads.base import Method
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
class Round:
    """Jobs that are done ``times`` times in a row, each time for the batch after the one before."""

    jobs: tuple[Job, ...]
    times: int = 1

    def __iter__(self) -> Iterator[Job]:
        """All of them, each with its batch."""
        for later in range(self.times):
            for job in self.jobs:
                yield replace(job, batch=job.batch + later) if later else job


def has_loss(method: Method, number: int, parts: int) -> bool:
    """Whether part ``number`` has a loss of its own."""
    return number == parts or method.heads_below


@dataclass(frozen=True)
class Place:
    """What decides a part's jobs."""

    number: int
    parts: int
    flows: tuple[Flow, ...]
    loss: bool
    feedback: bool
    encodes: bool  # the part above waits for the head's forward pass; it counts with the part's
    microbatches: int

    @classmethod
    def of(cls, method: Method, number: int, parts: int, microbatches: int) -> Place:
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


def rounds_of(places: Sequence[Place], above: int, batches: int, order: Order) -> Iterator[Round]:
    """What one rank does, below so many others."""
    if order == "stage":
        yield Round(tuple(_taking_turns(places)), batches)
    elif order == "1f1b":
        updates = (place.job(1, "update") for place in places)
        yield Round((*_alternating(places, above), *updates), batches)
    else:
        ahead = min(above, batches)
        yield Round(tuple(_all_forward(places, 1, None)), ahead)
        both = (*_all_forward(places, 1 + ahead, None), *_all_backward(places, 1, None, update=True))
        yield Round(both, batches - ahead)
        yield Round(tuple(_all_backward(places, batches - ahead + 1, None, update=True)), ahead)


def _taking_turns(places: Sequence[Place]) -> Iterator[Job]:
    """Batch 1 through consecutive parts, as ``sequential.run_batch`` does it.

    The lowest part that can go on does one thing. Where none can, part 1 takes the next micro-batch (all at once where
    no gradient comes from above), or the rank waits for a neighbour.
    """
    todo = {place.number: deque(_one_batch(place, 1)) for place in places}
    arrived: Counter[tuple[int, Side | None]] = Counter()
    ends = ((places[0].number, Side.BELOW), (places[-1].number, Side.ABOVE))
    one_by_one = any(flow.from_above for place in places for flow in place.flows)

    def can_go_on(number: int, job: Job) -> bool:
        if job.kind == "receive":
            return arrived[number, job.side] > 0
        return not (one_by_one and number == 1 and job.kind == "forward")

    while any(todo.values()):
        able = next((n for n, jobs in todo.items() if jobs and can_go_on(n, jobs[0])), None)
        if able is None and 1 in todo and todo[1] and todo[1][0].kind == "forward":
            able = 1
        number = next(n for n, side in ends if todo[n] and todo[n][0].side is side) if able is None else able
        job = todo[number].popleft()
        if job.kind == "send" and job.side is not None:
            arrived[number + job.side.value, Side(-job.side.value)] += 1
        elif job.kind == "receive" and able is not None:
            arrived[number, job.side] -= 1
        yield job
        while todo[number] and todo[number][0].kind == "update":  # no other part goes on in between
            yield todo[number].popleft()


def _one_batch(place: Place, batch: int) -> Iterator[Job]:
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


def _alternating(places: Sequence[Place], above: int) -> Iterator[Job]:
    """One forward, one backward, after as many forwards as there are ranks above; a loss a piece."""
    micros = places[0].micros
    ahead = min(above, len(micros))
    for micro in micros[:ahead]:
        yield from _all_forward(places, 1, micro)
    for position, micro in enumerate(micros):
        if position + ahead < len(micros):
            yield from _all_forward(places, 1, micros[position + ahead])
        yield from _all_backward(places, 1, micro)


def _all_forward(places: Sequence[Place], batch: int, micro: int | None) -> Iterator[Job]:
    for place in places:
        yield from _forward(place, batch, micro)


def _all_backward(places: Sequence[Place], batch: int, micro: int | None, update: bool = False) -> Iterator[Job]:
    for place in reversed(places):
        if place.loss:
            yield place.job(batch, "head", micro)
        for flow in place.flows:
            yield from _backward(place, flow, batch, micro)
        if update:
            yield place.job(batch, "update")


def _forward(place: Place, batch: int, micro: int | None) -> Iterator[Job]:
    if place.number > 1:
        yield place.message(batch, "receive", Side.BELOW, "activations", micro)
    yield place.job(batch, "forward", micro)
    if not place.is_last and not place.encodes:
        yield place.message(batch, "send", Side.ABOVE, "activations", micro)


def _backward(place: Place, flow: Flow, batch: int, micro: int | None) -> Iterator[Job]:
    if flow.from_above:
        yield place.message(batch, "receive", Side.ABOVE, "gradients", micro)
    yield replace(place.job(batch, "backward", micro), losses=flow.losses, trains=flow.trains)
    if flow.down is not None and flow is last_towards(place.flows, flow.down):
        yield place.message(batch, "send", Side.BELOW, "gradients", micro)
