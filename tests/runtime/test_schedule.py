"""A schedule is what the real stages do: every send, receive and pass, in order, for every method."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from localize import get_method, list_methods, to_local
from localize.heads.base import Method
from localize.heads.nwise import NWise
from localize.runtime import micro, sequential, step
from localize.runtime.messages import Action, Feedback, Message, Receive, Relay, Send, Side, Upward
from localize.runtime.schedule import Job, schedule
from localize.runtime.stage import Half, Stage, StageReport
from localize.runtime.step import Scope


class _Log(nn.Module):
    """Records what stages do, in order, by part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
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
        self.done.setdefault(owner.number, []).append(what)

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
        return job.kind, job.side, job.content
    if job.kind == "backward":
        return "backward", job.losses, job.trains
    return ("feedback" if job.kind == "head" and not job.trains else job.kind,)


@dataclass(frozen=True)
class Crossing(NWise):
    """No paper's: below the last part, gradients of two flows join before they are sent down."""

    def trains(self, number: int, parts: int) -> range:
        return range(1, 2) if number == parts else range(1, number + 1)


METHODS = [get_method(name) for name in list_methods()]
METHODS += [Crossing()]
METHODS += [NWise(reach=n, gradient=g) for n in (1, 3, 4, 9) for g in ("furthest", "sum")]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_schedule_is_what_stages_do(
    monkeypatch: pytest.MonkeyPatch, method: Method, parts: int, microbatches: int
) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())]
    local = to_local(
        nn.Sequential(*layers, nn.Linear(6, 3)), torch.randn(4, 6), method=method, parts=parts, verify=False
    )
    log = _Log(monkeypatch)
    batch = Upward(_stream(local, torch.randn(6, 6)), torch.tensor([0, 1, 2, 0, 1, 2]))
    pieces = micro.split(local, batch, microbatches)
    sequential.run_batch(sequential.stages_of(local), pieces, log, microbatches=microbatches)
    planned = schedule(local.method, parts=parts, batches=1, microbatches=microbatches)
    expected = {number: [as_logged(job) for job in jobs] for number, jobs in enumerate(planned.jobs, 1)}
    for position in [i for i, what in enumerate(expected[1]) if what == ("forward",)][::-1]:
        expected[1].insert(position, ("receive", Side.BELOW, "activations"))  # the data, which no part sends
    assert log.done == expected


def _stream(local: Any, inputs: torch.Tensor) -> Any:
    return dict(zip(local.signature.names, [inputs], strict=True))
