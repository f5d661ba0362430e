"""A schedule is what the real stages do: every send, receive and pass, in order, for every method."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any

import pytest
import torch
from torch import nn

from localize import ConfigError, LocalModel, get_method, list_methods, to_local
from localize.heads.base import Method
from localize.heads.nwise import NWise
from localize.runtime import micro, sequential, step
from localize.runtime.messages import Action, Feedback, Message, Receive, Relay, Send, Side, Upward
from localize.runtime.schedule import Job, schedule
from localize.runtime.stage import Half, Stage, StageReport
from localize.runtime.step import Scope


class _Log(nn.Module):
    """Records what stages do, in order, by rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranges: Sequence[range]) -> None:
        super().__init__()
        self.rank_of = {number: rank for rank, numbers in enumerate(ranges) for number in numbers}
        self.done: dict[int, list[tuple[Any, ...]]] = {}
        names = {"forward": "forward", "attend": "head", "learn_head": "head", "learn_from_feedback": "feedback"}
        for name, kind in names.items():
            monkeypatch.setattr(step, name, self._noting(getattr(step, name), name, kind))
        pull = step.pull

        def noting_pull(owner: Stage, work: Any, grads: Any, own: Any, flow: Any) -> Any:
            self.note(owner, "backward", flow.losses, flow.trains)
            return pull(owner, work, grads, own, flow)

        monkeypatch.setattr(step, "pull", noting_pull)
        original = step.stage_step

        def recorded(
            owner: Stage, updater: Any, scope: Scope, microbatches: int
        ) -> Generator[Action, Message | None, StageReport]:
            steps, message = original(owner, updater, scope, microbatches), None
            while True:
                try:
                    action = steps.send(message)
                except StopIteration as end:
                    report: StageReport = end.value
                    return report
                if isinstance(action, Send):
                    self.note(owner, "send", action.to, content(action.message))
                message = yield action
                if isinstance(action, Receive):
                    assert message is not None
                    self.note(owner, "receive", action.source, content(message))

        monkeypatch.setattr(sequential, "stage_step", recorded)

    def note(self, owner: Stage, *what: Any) -> None:
        self.done.setdefault(self.rank_of[owner.number], []).append((owner.number, *what))

    def _noting(self, function: Any, name: str, kind: str) -> Any:
        def wrapped(owner: Stage, *arguments: Any) -> Any:
            # Where the part above waits for a head's forward pass, that one counts with the part's.
            counts = "learn_head" if owner.encodes_target else "attend"
            if kind != "head" or (owner.head is not None and name == counts):
                self.note(owner, kind)
            return function(owner, *arguments)

        return wrapped

    # The updater of a stage.
    def begin(self, owner: Stage, loss: torch.Tensor | None) -> None: ...

    def ready(self, owner: Stage, half: Half) -> None:
        if half == "part":
            self.note(owner, "update")


def content(message: Message) -> str:
    return {Relay: "gradients", Feedback: "feedback"}.get(type(message), "activations")


def as_logged(job: Job) -> tuple[Any, ...]:
    if job.kind in ("send", "receive"):
        return job.part, job.kind, job.side, job.content
    if job.kind == "backward":
        return job.part, "backward", job.losses, job.trains
    return job.part, "feedback" if job.kind == "head" and not job.trains else job.kind


@dataclass(frozen=True)
class Crossing(NWise):
    """No paper's: below the last part, gradients of two flows join before they are sent down."""

    def trains(self, number: int, parts: int) -> range:
        return range(1, 2) if number == parts else range(1, number + 1)


METHODS = [get_method(name) for name in list_methods()]
METHODS += [Crossing()]
METHODS += [NWise(reach=n, gradient=g) for n in (1, 3, 4, 9) for g in ("furthest", "sum")]  # type: ignore[arg-type]


ALONE = {parts: tuple(range(n, n + 1) for n in range(1, parts + 1)) for parts in (1, 2, 4)}
SHARED = [
    (range(1, 5),),
    (range(1, 3), range(3, 5)),
    (range(1, 2), range(2, 5)),
    (range(1, 4), range(4, 5)),
    (range(1, 2), range(2, 4), range(4, 5)),
]


def converted(method: Method, parts: int) -> LocalModel:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    return to_local(model, torch.randn(4, 6), method=method, parts=parts, verify=False)


def pieces_of(local: LocalModel, microbatches: int) -> list[Upward]:
    stream = dict(zip(local.signature.names, [torch.randn(6, 6)], strict=True))
    return list(micro.split(local, Upward(stream, torch.tensor([0, 1, 2, 0, 1, 2])), microbatches))


def as_planned(method: Method, microbatches: int, ranges: Sequence[range]) -> dict[int, list[tuple[Any, ...]]]:
    planned = schedule(method, parts=ranges[-1][-1], batches=1, microbatches=microbatches, ranges=ranges)
    expected = {rank: [as_logged(job) for job in jobs] for rank, jobs in enumerate(planned.jobs)}
    for position in [i for i, what in enumerate(expected[0]) if what == (1, "forward")][::-1]:
        expected[0].insert(position, (1, "receive", Side.BELOW, "activations"))  # the data, which no part sends
    return expected


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_schedule_is_what_stages_do(
    monkeypatch: pytest.MonkeyPatch, method: Method, parts: int, microbatches: int
) -> None:
    local = converted(method, parts)
    log = _Log(monkeypatch, ALONE[parts])
    pieces = pieces_of(local, microbatches)
    sequential.run_batch(sequential.stages_of(local), pieces, log, microbatches=microbatches)
    assert log.done == as_planned(local.method, microbatches, ALONE[parts])


class _Neighbours:
    """The other ranks, each in a thread."""

    def __init__(self, ranks: int) -> None:
        self.queues = {(rank, side): Queue[Message]() for rank in range(ranks) for side in Side}

    def of(self, rank: int) -> _Outside:
        return _Outside(self, rank)


@dataclass
class _Outside:
    neighbours: _Neighbours
    rank: int

    def send(self, to: Side, message: Message) -> None:
        self.neighbours.queues[self.rank + to.value, Side(-to.value)].put(message)

    def receive(self, source: Side) -> Message:
        return self.neighbours.queues[self.rank, source].get(timeout=60)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("ranges", SHARED, ids=str)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_schedule_of_a_rank_with_several_parts_is_what_it_does(
    monkeypatch: pytest.MonkeyPatch, method: Method, ranges: tuple[range, ...], microbatches: int
) -> None:
    """``run_batch`` on each rank, given what ``DistributedRun`` gives it: all pieces on the first one, else one."""
    local = converted(method, 4)
    log, neighbours, stages = _Log(monkeypatch, ranges), _Neighbours(len(ranges)), sequential.stages_of(local)

    def work(rank: int) -> None:
        outside = neighbours.of(rank)
        arrived = [outside.receive(Side.BELOW)] if rank else pieces_of(local, microbatches)
        own = stages[ranges[rank][0] - 1 : ranges[rank][-1]]
        sequential.run_batch(own, arrived, log, outside=outside, microbatches=microbatches)  # type: ignore[arg-type]

    with ThreadPoolExecutor(len(ranges)) as threads:
        for done in [threads.submit(work, rank) for rank in range(len(ranges))]:
            done.result()
    assert log.done == as_planned(local.method, microbatches, ranges)


@pytest.mark.parametrize("order", ["1f1b", "hogwild"])
@pytest.mark.parametrize("method", ["bp", "joint"])
def test_parts_of_a_rank_are_one_stage_of_a_pipeline(order: Any, method: str) -> None:
    """Four parts on two ranks do what two parts do, each thing once a part."""
    m = 3 if order == "1f1b" else 1
    ranges = (range(1, 3), range(3, 5))
    shape: dict[str, Any] = {"batches": 4, "microbatches": m, "order": order}
    two = schedule(get_method(method), parts=2, **shape)
    four = schedule(get_method(method), parts=4, ranges=ranges, **shape)
    for own, jobs, numbers in zip(two.jobs, four.jobs, ranges, strict=True):
        for kind, up in (("forward", True), ("backward", False)):
            once = [(job.batch, job.micro) for job in own if job.kind == kind]
            order_within = numbers if up else numbers[::-1]
            done = [(job.part, job.batch, job.micro) for job in jobs if job.kind == kind]
            assert done == [(part, *piece) for piece in once for part in order_within]
        passes = [job.kind for job in jobs if job.kind in ("forward", "backward")]
        assert passes == [job.kind for job in own if job.kind in ("forward", "backward") for _ in numbers]
        assert sorted((j.batch, j.part) for j in jobs if j.kind == "update") == [
            (batch, part) for batch in range(1, 5) for part in numbers
        ]


@pytest.mark.parametrize(
    "ranges", [(range(1, 3),), (range(2, 4),), (range(1, 2), range(3, 4)), (range(1, 4), range(4, 4))], ids=str
)
def test_ranks_that_do_not_have_all_parts(ranges: tuple[range, ...]) -> None:
    with pytest.raises(ConfigError, match="they have the parts 1 to 3 in this order, at least one each"):
        schedule(get_method("scpl"), parts=3, batches=1, ranges=ranges)


def test_rounds_are_the_jobs_batch_by_batch() -> None:
    planned = schedule(get_method("bp"), parts=3, batches=5, order="hogwild")
    assert [[job.batch for job in jobs if job.kind == "backward"] for jobs in planned.jobs] == [[1, 2, 3, 4, 5]] * 3
    assert [[job.batch for job in jobs if job.kind == "forward"] for jobs in planned.jobs] == [[1, 2, 3, 4, 5]] * 3
    few = schedule(get_method("bp"), parts=4, batches=2, order="hogwild")
    assert [job.kind for job in few.jobs[0] if job.side is None] == ["forward"] * 2 + ["backward", "update"] * 2
