"""Micro-batches: the same gradients as whole batches, the same bits on any number of ranks, an earlier start."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import Trainer, to_local
from localize.errors import ConfigError
from localize.runtime import micro
from localize.runtime.messages import Message, Side, Upward
from localize.runtime.sequential import run_batch, stages_of
from localize.runtime.stage import Half, Stage
from tests import zoo
from tests.runtime.cases import METHODS, made
from tests.runtime.several import Several

CASES = "tests.runtime.cases:"


def trained(model: str, method: str, microbatches: int) -> dict[str, Tensor]:
    case = zoo.BY_NAME[model]
    torch.manual_seed(0)
    net = zoo.build(case).double().eval()  # no dropout, and batch norm as in eval: samples do not meet
    inputs = case.inputs(22)
    inputs = inputs if case.tokens else inputs.double()
    local = to_local(net, inputs[:4], method=METHODS[method], parts=3, verify=False).eval()
    trainer = Trainer(
        local, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), progress=False, microbatches=microbatches
    )
    local.train = lambda mode=True: local  # type: ignore[method-assign]
    trainer.fit([(inputs[:10], case.targets(22)[:10]), (inputs[10:], case.targets(22)[10:])], epochs=3)
    return dict(local.state_dict())


@pytest.mark.parametrize("model", ["mlp", "long_skip", "residual"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_updates_are_those_of_whole_batches(model: str, method: str) -> None:
    """Six steps of momentum SGD in float64, batches of 10 and 12 in 4 pieces: of 3, 3, 2, 2 and of 3, 3, 3, 3."""
    whole, pieces = trained(model, method, 1), trained(model, method, 4)
    assert whole.keys() == pieces.keys()
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("method", "ranks"), [(m, (2, 3, 4)[i % 3]) for i, m in enumerate(sorted(METHODS))])
def test_many_processes_are_one(several: Several, tmp_path: Path, method: str, ranks: int) -> None:
    """Bit for bit with batch norm, dropout, skips and a ragged last batch, whose 4 samples go in 2 pieces."""
    found = several.results(
        f"{CASES}same_as_sequential", ranks, model="mixed", method=method, parts=4, folder=str(tmp_path),
        epochs=2, microbatches=2,
    )  # fmt: skip
    assert all(other == found[0] for other in found)


class _Log:
    """Neighbours outside and updater at once, in one list."""

    def __init__(self, arriving: list[Upward]) -> None:
        self.events: list[str] = []
        self.arriving = arriving

    def send(self, to: Side, message: Message) -> None:
        self.events.append(f"send {to.name}")

    def receive(self, source: Side) -> Message:
        self.events.append(f"receive {source.name}")
        return self.arriving.pop(0)

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        self.events.append("backward")

    def ready(self, stage: Stage, half: Half) -> None:
        self.events.append(f"update {half}")


def test_pieces_leave_as_they_come_and_the_head_sees_the_whole_batch() -> None:
    local, loader = made("mixed", "early_exit", 3)
    local.train()
    inputs, targets = next(iter(loader))
    first, *others = micro.split(local, Upward(local.signature.stream((inputs,), {}), targets), 2)
    stages = stages_of(local)
    passed = _Log([])
    run_batch(stages[:1], [first, *others], passed, outside=_Sink(passed, sent := []), microbatches=2)
    assert passed.events == ["send ABOVE", "send ABOVE", "backward", "update part", "update head"]
    assert [message.target is None for message in sent] == [False, True]

    seen: list[tuple[int, ...]] = []
    head = local.heads[1]
    assert head is not None
    handle = head.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    log = _Log(sent[1:])
    run_batch(stages[1:2], sent[:1], log, outside=log, microbatches=2)
    handle.remove()
    assert log.events == [
        "send ABOVE", "receive BELOW", "send ABOVE", "backward", "update part", "update head"
    ]  # fmt: skip
    assert [shape[0] for shape in seen] == [len(targets)]


class _Sink:
    def __init__(self, log: _Log, sent: list[Any]) -> None:
        self.log, self.sent = log, sent

    def send(self, to: Side, message: Message) -> None:
        self.log.send(to, message)
        self.sent.append(message)

    def receive(self, source: Side) -> Message:
        raise AssertionError("nothing is to come")


@pytest.mark.parametrize(("samples", "count", "sizes"), [(10, 4, [3, 3, 2, 2]), (4, 3, [2, 1, 1]), (2, 5, [1, 1])])
def test_sizes(samples: int, count: int, sizes: list[int]) -> None:
    local, _ = made("mixed", "bp", 2)
    batch = Upward({"x": torch.arange(samples * 6.0).view(samples, 6)}, "the target")
    pieces = micro.split(local, batch, count)
    assert [len(piece.stream["x"]) for piece in pieces] == sizes
    assert torch.equal(torch.cat([piece.stream["x"] for piece in pieces]), batch.stream["x"])
    assert [piece.target for piece in pieces] == ["the target"] + [None] * (len(sizes) - 1)


def test_a_trace_shows_every_micro_batch_where_it_was(tmp_path: Path) -> None:
    """In one process the parts take turns: the work of one was once put down to the other."""
    local, _ = made("mixed", "bp", 2)
    file = tmp_path / "trace.json"
    trainer = Trainer(
        local, optimizer=partial(torch.optim.SGD, lr=0.1), microbatches=3, progress=False, trace=file
    )  # fmt: skip
    trainer.fit([(torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2]))])
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    events.sort(key=lambda event: event["ts"])
    done = [(event["tid"], event["cat"], event["args"]["micro"]) for event in events]
    forward = [(part, "forward", micro) for micro in (1, 2, 3) for part in (1, 2)]
    backward = [(part, "backward", micro) for micro in (3, 2, 1) for part in (2, 1)]
    assert [each for each in done if each[1] == "forward"] == forward
    assert [each for each in done if each[1] == "backward"] == backward
    assert [each for each in done if each[1] == "head"] == [(2, "head", None)]


def test_what_cannot_be_cut_is_told() -> None:
    with pytest.raises(ConfigError, match="microbatches=0 is not an integer of at least 1"):
        Trainer(made("mixed", "bp", 2)[0], optimizer=torch.optim.SGD, microbatches=0)

    class Pooled(nn.Module):  # nothing is left of the batch axis
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x).mean(0)))

    local = to_local(Pooled(), torch.randn(4, 6), method="bp", parts=2, task="regression", verify=False)
    trainer = Trainer(local, optimizer=partial(torch.optim.SGD, lr=0.1), microbatches=2, progress=False)
    with pytest.raises(ConfigError, match=r"the hidden state of head 2, .* does not keep samples apart"):
        trainer.fit([(torch.randn(4, 6), torch.randn(1))])
