"""How long a schedule takes: the jobs of ``schedule``, with costs, on as many devices as there are parts.

A part does its jobs in their order, one at a time; a message starts on its way when it is sent, and those of one
boundary and direction cross one after another, beside all computing. In unit costs (forward = backward = 1, b
batches, a parts) that gives the laws of the interlocking paper's Figure 2 (Gomez, Key et al. 2022):

    end to end 2ab      n-wise 2bn + a − n      Hogwild 2(b + a − 1)

Times are exact for costs that are integers or fractions: a micro-batch costs a ``Fraction`` of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

from localize.errors import ConfigError, problem_list
from localize.heads.base import Method, positive
from localize.heads.registry import resolve_method
from localize.runtime.costs import Cost, Costs, Time
from localize.runtime.messages import Side
from localize.runtime.schedule import Job, Order, Schedule, schedule, schedule_problems
from localize.runtime.timeline import Interval, Kind, Timeline, Unit


def simulate(
    method: str | Method | type[Method],
    *,
    parts: int,
    batches: int,
    forward: Cost = 1,
    loss: Cost = 0,
    backward: Cost = 1,
    update: Cost = 0,
    microbatches: int = 1,
    relay: Cost | None = None,
    feedback: Cost = 0,
    transfer: Cost = 0,
    window: int | None = None,
    order: Order = "stage",
    unit: Unit = "steps",
) -> Timeline:
    """Runs a schedule on paper: one device a part, b batches.

    Costs are those of a whole batch, in any unit of time, one number or one a part.

    Args:
        method: a name, an instance with options, or a class.
        parts: a, how many parts.
        batches: b, how many batches.
        forward: the part's forward pass. The activations leave right after it.
        loss: the head and its loss, forward and backward, while the activations travel; parts without a loss have
            none of it. AL's heads make the next part's target, so they leave after the head's
            forward pass: count that in ``forward``, and only its backward pass here.
        backward: one backward pass through the part that trains it.
        update: the optimizer's step.
        microbatches: m; each costs 1/m of a batch. See ``schedule`` for the order.
        relay: a backward pass that only passes gradients on; None: as ``backward``.
        feedback: the head's second backward pass, where it learns from feedback.
        transfer: the way across a boundary, for a batch's activations or their gradients: one number or one a
            boundary (a − 1 of them). Feedback, a number a sample, is free.
        window: how many messages of a boundary and direction may be under way or wait to be taken: a part that
            wants to send one more waits. None: any number.
        order: ``stage``, ``1f1b`` or ``hogwild``.
        unit: what the costs are in: time steps or seconds (``s``).

    Raises:
        ConfigError: costs, numbers or an order that make no sense, all at once.
        MethodError: no such method.
    """
    chosen = resolve_method(method)
    costs = Costs(forward, loss, backward, update, relay, feedback, transfer)
    problems = schedule_problems(chosen, parts, batches, microbatches, order)
    if not positive("parts", parts, whole=True):
        problems += costs.problems(parts)
    if window is not None:
        problems += [problem for problem in [positive("window", window, whole=True)] if problem]
    if problems:
        raise ConfigError(problem_list("This simulation makes no sense", problems))
    planned = schedule(chosen, parts=parts, batches=batches, microbatches=microbatches, order=order)
    return run(planned, costs, window, unit)


def run(planned: Schedule, costs: Costs, window: int | None = None, unit: Unit = "steps") -> Timeline:
    """The timeline of a schedule.

    Raises:
        ConfigError: parts wait for each other forever, since the window is too small for this order.
    """
    links = _Links(planned.parts, costs, planned.microbatches, window)
    devices = [_Device(jobs, costs, planned.microbatches, links) for jobs in planned.jobs]
    while any(device.go_on() for device in devices):
        pass
    stuck = [device.job for device in devices if device.job is not None]
    if stuck:
        where = "; ".join(f"part {job.part}, batch {job.batch}: {_purpose(job)}" for job in stuck)
        raise ConfigError(f"With window={window} these parts wait for each other forever: {where}. Take a larger one.")
    return Timeline(tuple(done for device in devices for done in device.intervals), unit, planned.title)


@dataclass
class _Link:
    """One boundary in one direction: messages in the order they are sent."""

    arrivals: list[Time] = field(default_factory=list)
    taken: list[Time] = field(default_factory=list)
    free: Time = 0

    def send(self, now: Time, duration: Time) -> None:
        self.free = max(now, self.free) + duration
        self.arrivals.append(self.free)


class _Links:
    """All boundaries."""

    def __init__(self, parts: int, costs: Costs, microbatches: int, window: int | None) -> None:
        self.costs, self.microbatches, self.window = costs, microbatches, window
        self.links = {(low, up): _Link() for low in range(1, parts) for up in (True, False)}

    def of(self, job: Job) -> _Link:
        """The link that a ``send`` or ``receive`` uses."""
        assert job.side is not None
        upward = (job.kind == "send") == (job.side is Side.ABOVE)
        return self.links[min(job.part, job.part + job.side.value), upward]

    def duration(self, job: Job) -> Time:
        """How long what ``job`` sends is on its way."""
        assert job.side is not None
        if job.content == "feedback":
            return 0
        lower = min(job.part, job.part + job.side.value)
        return self.costs.of("transfer", lower - 1, self.microbatches if job.micro else 1)

    def ready(self, job: Job) -> Time | None:
        """When ``job``, a ``send`` or ``receive``, may happen at the earliest; None: not known yet."""
        link = self.of(job)
        if job.kind == "receive":
            return _at(link.arrivals, len(link.taken))
        waiting = len(link.arrivals) - (self.window or math.inf)
        return _at(link.taken, int(waiting)) if waiting >= 0 else 0


class _Device:
    """A part at work."""

    def __init__(self, jobs: Sequence[Job], costs: Costs, microbatches: int, links: _Links) -> None:
        self.jobs, self.costs, self.microbatches, self.links = jobs, costs, microbatches, links
        self.position = 0
        self.now: Time = 0
        self.intervals: list[Interval] = []

    @property
    def job(self) -> Job | None:
        """The next one."""
        return self.jobs[self.position] if self.position < len(self.jobs) else None

    def go_on(self) -> bool:
        """Does as many jobs as it can; whether there were any."""
        before = self.position
        while (job := self.job) is not None and self._do(job):
            self.position += 1
        return self.position > before

    def _do(self, job: Job) -> bool:
        if job.side is None:
            self._spend(job, cast(Kind, job.kind), self.now + self._cost(job))
            return True
        ready = self.links.ready(job)
        if ready is None:
            return False
        self._spend(job, "wait", max(self.now, ready))
        link = self.links.of(job)
        if job.kind == "receive":
            link.taken.append(self.now)
        else:
            link.send(self.now, self.links.duration(job))
        return True

    def _cost(self, job: Job) -> Time:
        name = {"head": "loss"}.get(job.kind, job.kind)
        if not job.trains:
            name = "feedback" if job.kind == "head" else "relay"
        return self.costs.of(name, job.part - 1, self.microbatches if job.micro else 1)

    def _spend(self, job: Job, kind: Kind, end: Time) -> None:
        if end > self.now:
            why = _purpose(job) if kind == "wait" else ""
            trains = job.trains or kind == "wait"
            done = Interval(
                job.part, job.batch, kind, _number(self.now), _number(end), job.micro, job.losses, trains, why
            )
            self.intervals.append(done)
        self.now = end


def _purpose(job: Job) -> str:
    """What a wait is for: ``gradients from above``, ``room to send activations above``."""
    side = "above" if job.side is Side.ABOVE else "below"
    return f"{job.content} from {side}" if job.kind == "receive" else f"room to send {job.content} {side}"


def _number(time: Time) -> float:
    """A plain number: an integer where it is one exactly."""
    exact = isinstance(time, int) or (isinstance(time, Fraction) and time.denominator == 1)
    return int(time) if exact else float(time)


def _at(times: Sequence[Time], index: int) -> Time | None:
    return times[index] if index < len(times) else None
