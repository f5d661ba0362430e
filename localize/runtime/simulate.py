"""How long a schedule takes: the jobs of ``schedule``, with costs, on as many devices as there are ranks.

A rank does its jobs in their order, one at a time; a message to another rank starts on its way when it is sent, and
those of one boundary and direction cross one after another, beside all computing. In unit costs (forward = backward
= 1, b batches, a parts, a rank each) that gives the laws of the interlocking paper's Figure 2 (Gomez, Key et al. 2022):

    end to end 2ab      n-wise 2bn + a − n      Hogwild 2(b + a − 1)

Times are exact for costs that are integers or fractions: a micro-batch costs a ``Fraction`` of its batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import cast

from localize.errors import ConfigError, problem_list
from localize.heads.base import Method, positive
from localize.heads.registry import resolve_method
from localize.runtime.costs import Cost, Costs, Time
from localize.runtime.jobs import Job, Order, Round
from localize.runtime.messages import Side
from localize.runtime.placement import assign
from localize.runtime.schedule import Schedule, schedule, schedule_problems
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
    ranks: int | Sequence[range] | None = None,
) -> Timeline:
    """Runs a schedule on paper: one device a part (or for several), b batches.

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
        ranks: how many devices: each has consecutive parts, so that the busiest has least to do, and does one thing
            at a time, in the order of the distributed runtime; transfers within a device are free. Or the parts of
            each, numbers from 1. None: one a part.

    Raises:
        ConfigError: costs, numbers or an order that make no sense, all at once.
        MethodError: no such method.
    """
    chosen = resolve_method(method)
    costs = Costs(forward, loss, backward, update, relay, feedback, transfer)
    ranges = None if ranks is None or isinstance(ranks, int) else ranks
    problems = schedule_problems(chosen, parts, batches, microbatches, order, ranges)
    if not positive("parts", parts, whole=True):
        problems += costs.problems(parts)
        problems += ranks_problems(ranks, parts) if isinstance(ranks, int) else []
    if window is not None:
        problems += [problem for problem in [positive("window", window, whole=True)] if problem]
    if problems:
        raise ConfigError(problem_list("This simulation makes no sense", problems))
    if isinstance(ranks, int):
        ranges = shared(chosen, costs, parts, ranks)
    planned = schedule(
        chosen, parts=parts, batches=batches, microbatches=microbatches, order=order, ranges=ranges
    )
    return run(planned, costs, window, unit)


def ranks_problems(ranks: int, parts: int) -> list[str]:
    """What is wrong with a number of ranks."""
    problem = positive("ranks", ranks, whole=True)
    if problem is None and ranks > parts:
        problem = f"ranks={ranks} is more than the {parts} parts; a rank has at least one."
    return [problem] if problem else []


def shared(method: Method, costs: Costs, parts: int, ranks: int) -> tuple[range, ...]:
    """The parts of each rank: consecutive ones, so that the busiest has least to do; see ``placement.assign``."""
    todo = work(schedule(method, parts=parts, batches=1), costs)
    return assign(cast(list[float], [todo[number] for number in range(1, parts + 1)]), ranks)


def work(planned: Schedule, costs: Costs) -> dict[int, Time]:
    """What each part has to do in a whole schedule."""
    prices, found = _Prices(planned, costs), dict.fromkeys(range(1, planned.parts + 1), cast(Time, 0))
    for each in [each for rounds in planned.rounds for each in rounds]:
        for job in each.jobs:
            found[job.part] += each.times * prices.of(job) if job.side is None else 0
    return {part: Fraction(time, prices.scale) if isinstance(time, int) else time for part, time in found.items()}


def run(planned: Schedule, costs: Costs, window: int | None = None, unit: Unit = "steps") -> Timeline:
    """The timeline of a schedule.

    Raises:
        ConfigError: parts wait for each other forever, since the window is too small for this order.
    """
    intervals: list[Interval] = []
    _ends(planned, costs, window, intervals)
    return Timeline(tuple(intervals), unit, planned.title, planned.ranges if planned.shared else ())


def ends(planned: Schedule, costs: Costs, window: int | None = None) -> list[float]:
    """When all ranks are through with each round of a schedule, without its timeline. Errors: as ``run``."""
    return _ends(planned, costs, window, None)


def _ends(planned: Schedule, costs: Costs, window: int | None, intervals: list[Interval] | None) -> list[float]:
    prices, edges = _Prices(planned, costs), _Edges(planned, window)
    ranks = [_Rank(rounds, prices, edges, intervals) for rounds in planned.rounds]
    edges.awake.extend(ranks)
    while edges.awake:
        edges.awake.popleft().go_on()
    stuck = [rank.job for rank in ranks if rank.job is not None]
    if stuck:
        where = "; ".join(f"part {job.part}, batch {job.batch}: {_purpose(job)}" for job in stuck)
        raise ConfigError(f"With window={window} these parts wait for each other forever: {where}. Take a larger one.")
    return [prices.number(max(times)) for times in zip(*(rank.ends for rank in ranks), strict=True)]


class _Prices:
    """What each job costs: in whole numbers of ``1 / scale``, where all costs are integers or fractions."""

    def __init__(self, planned: Schedule, costs: Costs) -> None:
        self._costs, self._pieces = costs, planned.microbatches
        self._found: dict[tuple[str, int, bool], Time] = {}
        self.scale = 1
        for each in (each for rounds in planned.rounds for each in rounds):
            for job in each.jobs:
                self.of(job)
        found = self._found.values()
        if all(isinstance(price, int | Fraction) for price in found):
            self.scale = math.lcm(*(price.denominator for price in found if isinstance(price, int | Fraction)))
            self._found = {key: int(price * self.scale) for key, price in self._found.items()}

    def of(self, job: Job) -> Time:
        """What a job takes; of one that sends: how long the message is on its way."""
        if job.side is None:
            name = {"head": "loss"}.get(job.kind, job.kind)
            if not job.trains:
                name = "feedback" if job.kind == "head" else "relay"
            position = job.part - 1
        elif job.content == "feedback" or job.kind == "receive":
            return 0
        else:
            name, position = "transfer", min(job.part, job.part + job.side.value) - 1
        key = (name, position, job.micro is not None)
        if key not in self._found:
            self._found[key] = self._costs.of(name, position, self._pieces if job.micro else 1)
        return self._found[key]

    def number(self, time: Time) -> float:
        """A plain number: an integer where it is one exactly."""
        if isinstance(time, int):
            whole, rest = divmod(time, self.scale)
            return time / self.scale if rest else whole
        return int(time) if isinstance(time, Fraction) and time.denominator == 1 else float(time)


class _Edge:
    """One boundary in one direction: messages in the order they are sent."""

    def __init__(self, window: int | None) -> None:
        self.window, self.waiting = window, 0
        self.arrivals: deque[Time] = deque()  # of what was not received yet
        self.received: deque[Time] = deque()  # when, of what made room that nobody has used yet
        self.free: Time = 0
        self.asleep: _Rank | None = None

    def ready(self, sends: bool) -> Time | None:
        """When the next message can be sent, or received, at the earliest; None: not known yet."""
        if not sends:
            return self.arrivals[0] if self.arrivals else None
        if self.window is None or self.waiting < self.window:
            return 0
        return self.received[0] if self.received else None

    def send(self, now: Time, duration: Time) -> None:
        if self.window is not None:
            if self.waiting < self.window:
                self.waiting += 1
            else:
                self.received.popleft()
        self.free = max(now, self.free) + duration
        self.arrivals.append(self.free)

    def receive(self, now: Time) -> None:
        self.arrivals.popleft()
        if self.window is not None:
            self.received.append(now)


class _Edges:
    """All boundaries between ranks, and the ranks that can go on."""

    def __init__(self, planned: Schedule, window: int | None) -> None:
        ends = [numbers[-1] for numbers in planned.ranges[:-1]]
        self._edges = {(low, up): _Edge(window) for low in ends for up in (True, False)}
        self.awake: deque[_Rank] = deque()

    def of(self, job: Job) -> _Edge | None:
        """What a ``send`` or ``receive`` uses; None where it stays within a rank."""
        assert job.side is not None
        upward = (job.kind == "send") == (job.side is Side.ABOVE)
        return self._edges.get((min(job.part, job.part + job.side.value), upward))


class _Rank:
    """A rank at work.

    Attributes:
        job: what it waits to do; None: nothing any more.
        now: how far it is.
        ends: when it was through with each round.
    """

    def __init__(
        self, rounds: Sequence[Round], prices: _Prices, edges: _Edges, intervals: list[Interval] | None
    ) -> None:
        self.prices, self.edges, self.intervals = prices, edges, intervals
        self.job: Job | None = None
        self.now: Time = 0
        self.ends: list[Time] = []
        self._work = self._through(rounds)

    def go_on(self) -> None:
        """Does as many jobs as it can."""
        next(self._work, None)

    def _through(self, rounds: Sequence[Round]) -> Iterator[None]:
        """All jobs; gives up control where another rank has to do something first."""
        for each in rounds:
            jobs = [(job, None if job.side is None else self.edges.of(job)) for job in each.jobs]
            steps = [(job, edge, self.prices.of(job)) for job, edge in jobs if edge is not None or job.side is None]
            for later in range(each.times):
                for job, edge, price in steps:
                    if edge is None:
                        self._spend(job, later, cast(Kind, job.kind), self.now + price)
                        continue
                    sends = job.kind == "send"
                    while (ready := edge.ready(sends)) is None:
                        self.job, edge.asleep = replace(job, batch=job.batch + later), self
                        yield
                    self._spend(job, later, "wait", ready)
                    if sends:
                        edge.send(self.now, price)
                    else:
                        edge.receive(self.now)
                    if edge.asleep is not None:
                        self.edges.awake.append(edge.asleep)
                        edge.asleep = None
            self.ends.append(self.now)
        self.job = None

    def _spend(self, job: Job, later: int, kind: Kind, end: Time) -> None:
        if end <= self.now:
            return
        if self.intervals is not None:
            why, trains = (_purpose(job), True) if kind == "wait" else ("", job.trains)
            span, batch = (self.prices.number(self.now), self.prices.number(end)), job.batch + later
            self.intervals.append(Interval(job.part, batch, kind, *span, job.micro, job.losses, trains, why))
        self.now = end


def _purpose(job: Job) -> str:
    """What a wait is for: ``gradients from above``, ``room to send activations above``."""
    side = "above" if job.side is Side.ABOVE else "below"
    return f"{job.content} from {side}" if job.kind == "receive" else f"room to send {job.content} {side}"
