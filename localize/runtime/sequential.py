"""One process runs all stages, one after another; activations are released as it goes.

The stages are generators that ask to send and to receive. The lowest stage that can go on always goes on, so
that a part finishes (and frees what it holds) before the next one starts, as far as the method lets it:

    reach 1     1: F B U │ 2: F B U │ 3: F B U         F forward, B backward, U update
    two-wise    1: F │ 2: F b │ 1: B U │ 3: F b │ 2: B U │ 3: B U

Of several micro-batches, the lowest stage gets the next one when no stage can go on, so that the first one is soon
beyond the highest. With a reach of 1 it has all at once: a part then holds the activations of all, but one part alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch

from localize.errors import LocalizeError
from localize.model import LocalModel
from localize.part import Part
from localize.runtime.messages import Action, Begin, Message, Receive, Send, Side, Upward
from localize.runtime.stage import Stage, StageReport, Updater
from localize.runtime.step import Scope, anywhere, stage_step
from localize.spec import StepResult


class Outside(Protocol):
    """The neighbours of a process's lowest and highest stage, in other processes."""

    def send(self, to: Side, message: Message) -> None: ...

    def receive(self, source: Side) -> Message: ...


class Watch(Protocol):
    """Who wants to know what stages do, and when; see ``recording.py``."""

    def begins(self, stage: Stage, begin: Begin) -> None: ...

    def waits(self, stage: Stage, side: Side) -> None: ...


class _Runner:
    """A stage's generator, its two inboxes and what it waits for."""

    def __init__(self, stage: Stage, updater: Updater, scope: Scope, microbatches: int) -> None:
        self.stage = stage
        self.steps = stage_step(stage, updater, scope, microbatches)
        self.inbox: dict[Side, deque[Message]] = {side: deque() for side in Side}
        self.wish: Action | None = next(self.steps)
        self.report: StageReport | None = None

    @property
    def can_go_on(self) -> bool:
        if self.report is not None:
            return False
        return not isinstance(self.wish, Receive) or bool(self.inbox[self.wish.source])

    def go_on(self) -> None:
        """Takes one step; a message that the stage wanted to send has been delivered."""
        message = self.inbox[self.wish.source].popleft() if isinstance(self.wish, Receive) else None
        self.wish = None  # what was sent is to go when the stage lets it go
        try:
            self.wish = self.steps.send(message)
        except StopIteration as end:
            self.wish, self.report = None, end.value


def run_batch(
    stages: Sequence[Stage],
    arrived: Iterable[Upward],
    updater: Updater,
    scope: Scope = anywhere,
    outside: Outside | None = None,
    watch: Watch | None = None,
    microbatches: int = 1,
) -> list[StageReport]:
    """One batch through all stages: losses, local backward passes and (by ``updater``) updates.

    Args:
        stages: consecutive ones, lowest first; the others may be run elsewhere.
        arrived: what is here for the lowest stage already: the batch, or its micro-batches; where others read the data,
            the first one only, and the others are received.
        updater: see ``update.py``.
        scope: what forward passes run in.
        outside: the neighbours elsewhere; asked when no stage here can go on.
        watch: is told what happens.
        microbatches: how many the batch comes in.

    Raises:
        LocalizeError: stages wait for messages that nobody sends.
    """
    runners = [_Runner(stage, updater, scope, microbatches) for stage in stages]
    pieces = iter(arrived)
    # With a longer reach the activations of all pieces are kept anyway: one by one, the first is soon far up.
    if stages[0].method.reach_in(stages[0].parts) == 1:
        runners[0].inbox[Side.BELOW].extend(pieces)
    _run(runners, pieces, outside, watch)
    reports = [runner.report for runner in runners if runner.report is not None]
    if len(reports) < len(runners):
        waiting = [i for i, runner in enumerate(runners, 1) if runner.report is None]
        raise LocalizeError(f"Parts {waiting} wait for messages that nobody sends; the method's routing is at fault.")
    return reports


def _run(
    runners: Sequence[_Runner], pieces: Iterator[Upward], outside: Outside | None, watch: Watch | None
) -> None:
    while True:
        position = next((i for i, runner in enumerate(runners) if runner.can_go_on), None)
        if position is None and (piece := next(pieces, None)) is not None:
            runners[0].inbox[Side.BELOW].append(piece)
            del piece
            continue
        if position is None:
            end = _waiting_outside(runners) if outside is not None else None
            if end is None:
                break
            runner, side = end
            if watch is not None:
                watch.waits(runner.stage, side)
            runner.inbox[side].append(cast(Outside, outside).receive(side))
            continue
        wish = runners[position].wish
        if isinstance(wish, Send):  # first of all: what comes next may be a long backward pass
            if 0 <= position + wish.to.value < len(runners):
                neighbour = runners[position + wish.to.value]
                neighbour.inbox[Side(-wish.to.value)].append(wish.message)
            elif outside is not None:
                outside.send(wish.to, wish.message)
        elif isinstance(wish, Begin) and watch is not None:
            watch.begins(runners[position].stage, wish)
        del wish
        runners[position].go_on()


def _waiting_outside(runners: Sequence[_Runner]) -> tuple[_Runner, Side] | None:
    """The stage at an end that waits for a neighbour beyond it, and for which."""
    for runner, side in ((runners[0], Side.BELOW), (runners[-1], Side.ABOVE)):
        if isinstance(runner.wish, Receive) and runner.wish.source is side:
            return runner, side
    return None


def stages_of(local: LocalModel) -> list[Stage]:
    """The model's parts and heads as stages, on the device they are on."""
    total = len(local.parts)
    pairs = zip(local.parts, local.heads, strict=True)
    return [
        Stage(cast(Part, part), head, local.method, local.task, number, total)
        for number, (part, head) in enumerate(pairs, 1)
    ]


def step_result(reports: Sequence[StageReport]) -> StepResult:
    """What all stages reported, as one result; a part without a loss of its own counts 0."""
    losses = tuple(torch.zeros(()) if report.loss is None else report.loss for report in reports)
    return StepResult(losses, reports[-1].logits)
