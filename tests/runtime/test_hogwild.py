"""Stale gradients, exactly as stale as the schedule says: the benchmark's Hogwild against references by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import hogwild
from benchmarks.suites.stale import Hogwild, Learner, Stash
from localize import LocalModel, get_method, to_local
from localize.runtime import step
from localize.runtime.messages import Action, Message, Receive, Relay, Send, Side, Upward
from localize.runtime.schedule import Job, schedule
from localize.runtime.stage import Half, Stage
from localize.runtime.update import OptimizerSteps
from localize.weights import weights_of
from tests.runtime import helpers
from tests.runtime.cases import digest, made
from tests.runtime.several import Several

CLASSES, WIDTH = 4, 6
Batch = tuple[Tensor, Tensor]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False),
    "foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "fused": partial(torch.optim.Adam, lr=1e-2, fused=True),
}


class Skipping(nn.Module):
    """Three parts with batch norm; a value of the first one is read by all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.Tanh())
        self.middle = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH))
        self.top = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        h = torch.tanh(self.middle(stem)) + stem
        logits: Tensor = self.top(h * stem)
        return logits


def model() -> Skipping:
    torch.manual_seed(0)
    return Skipping().double()


def batches(number: int, seed: int = 1) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, 5, generator=g, dtype=torch.float64) for n in [8] * (number - 1) + [7]]
    return [(x, torch.randint(0, CLASSES, (len(x),), generator=g)) for x in inputs]


def converted(plain: nn.Module, method: str = "bp", parts: int = 3) -> LocalModel:
    cuts = {1: None, 2: ["middle"], 3: ["stem", "middle"]}[parts]
    options: dict[str, Any] = {"parts": 1} if cuts is None else {"cuts": cuts}
    return to_local(plain, batches(1)[0][0], method=method, verify=False, **options)


# ------------------------------------------------------------------ against plain training


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_one_part_is_plain_training(optimizer: str) -> None:
    one, other, losses = model(), model(), []
    steps = OPTIMIZERS[optimizer](other.parameters())
    for x, y in batches(9):
        steps.zero_grad()
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert Hogwild(converted(one, parts=1), OPTIMIZERS[optimizer]).fit(batches(9)) == losses
    helpers.assert_same(one.state_dict(), other.state_dict())


# ------------------------------------------------------------------ against weights kept by hand


def stale(plain: Skipping, data: list[Batch], optimizer: str) -> list[float]:
    """Trains ``plain`` in three parts: batch t (from 1) of part k meets its weights after t - 1 - (3 - k) updates.

    No ticks, no queues: all versions of all weights are kept, and a batch is one plain chain of three pieces.
    """
    blocks = [plain.stem, plain.middle, plain.top]
    versions = [[copies(block)] for block in blocks]
    steps = [OPTIMIZERS[optimizer](block.parameters()) for block in blocks]
    losses = []
    for t, (x, y) in enumerate(data, 1):
        used = [copies(versions[k - 1][max(0, t - 1 - (3 - k))]) for k in (1, 2, 3)]
        run = [partial(functional_call, block, weights) for block, weights in zip(blocks, used, strict=True)]
        stem = run[0]((x,))
        middle = run[1]((stem,))
        loss = F.cross_entropy(run[2](((torch.tanh(middle) + stem) * stem,)), y)
        losses.append(loss.item())
        for block, weights, kept, changing in zip(blocks, used, versions, steps, strict=True):
            grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            for name, grad in zip(weights, grads, strict=True):
                block.get_parameter(name).grad = grad
            changing.step()
            kept.append(copies(block))
    return losses


def copies(of: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    named = of.items() if isinstance(of, dict) else of.named_parameters()
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in named}


@pytest.mark.parametrize("number", [1, 2, 3, 12])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_gradients_are_those_of_the_weights_of_their_forward_pass(optimizer: str, number: int) -> None:
    one, other = model(), model()
    before = copy.deepcopy(other.state_dict())
    found = Hogwild(converted(one), OPTIMIZERS[optimizer]).fit(batches(number))
    expected = stale(other, batches(number), optimizer)
    assert found == pytest.approx(expected, rel=0, abs=1e-12)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=1e-12)
        assert not torch.equal(tensor, before[name]), name
    if number > 1:  # what is stale is not what plain training does
        fresh = Hogwild(converted(model(), parts=1), OPTIMIZERS[optimizer]).fit(batches(number))
        assert found != pytest.approx(fresh, rel=1e-4)


def test_a_value_changed_between_forward_and_backward_is_an_error() -> None:
    x, scale = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    with Stash(nn.Linear(2, 2)).keeping():
        y = (x * scale).sum()
    scale.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


# ------------------------------------------------------------------ the order of jobs


class Diary:
    """The jobs that learners do, by part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: dict[int, list[Job]] = {}
        self.counts: Counter[tuple[Any, ...]] = Counter()
        forward, attend, pull, ready = step.forward, step.attend, step.pull, OptimizerSteps.ready
        ticks = Learner.ticks

        def noting_forward(stage: Stage, stream: Any) -> Any:
            self.note(stage, "forward")
            return forward(stage, stream)

        def noting_attend(stage: Stage, works: Any, target: Any) -> Any:
            if stage.head is not None:
                self.note(stage, "head")
            return attend(stage, works, target)

        def noting_pull(stage: Stage, work: Any, grads: Any, own: Any, flow: Any) -> Any:
            assert flow.from_above == bool(grads)
            self.note(stage, "backward", losses=flow.losses, trains=flow.trains)
            return pull(stage, work, grads, own, flow)

        def noting_ready(updater: Any, stage: Stage, half: Half) -> None:
            ready(updater, stage, half)
            if half == "head":
                self.note(stage, "update")

        monkeypatch.setattr(step, "forward", noting_forward)
        monkeypatch.setattr(step, "attend", noting_attend)
        monkeypatch.setattr(step, "pull", noting_pull)
        monkeypatch.setattr(OptimizerSteps, "ready", noting_ready)
        monkeypatch.setattr(Learner, "ticks", lambda learner, scope: self.posting(learner, ticks(learner, scope)))

    def posting(self, learner: Learner, steps: Any) -> Generator[Action, Message | None]:
        message = None
        while True:
            try:
                action = steps.send(message)
            except StopIteration:
                return
            if isinstance(action, Send):
                self.posted(learner.stage, "send", action.to, action.message)
            message = yield action
            if isinstance(action, Receive):
                self.posted(learner.stage, "receive", action.source, message)

    def posted(self, stage: Stage, kind: Any, side: Side, message: Any) -> None:
        outermost = stage.number == 1 and side is Side.BELOW  # the data, which is nobody's job
        if isinstance(message, Upward) and (outermost or not message.stream):  # nor is the end
            return
        content: Any = "gradients" if isinstance(message, Relay) else "activations"
        self.note(stage, kind, side=side, content=content)

    def note(self, stage: Stage, kind: Any, **more: Any) -> None:
        key = (stage.number, kind, more.get("side"))
        self.counts[key] += 1
        self.jobs.setdefault(stage.number, []).append(Job(stage.number, self.counts[key], kind, **more))


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("method", ["bp", "joint"])
def test_jobs_are_done_in_the_order_of_the_schedule(
    monkeypatch: pytest.MonkeyPatch, method: str, parts: int, number: int
) -> None:
    local, diary = converted(model(), method, parts), Diary(monkeypatch)
    trained = Hogwild(local, OPTIMIZERS["adam"])
    trained.fit(batches(number))
    planned = schedule(get_method(method), parts=parts, batches=number, order="hogwild")
    assert [tuple(diary.jobs[k]) for k in range(1, parts + 1)] == list(planned.jobs)
    assert [learner.most for learner in trained.learners] == [min(parts - k + 1, number) for k in range(1, parts + 1)]


def test_methods_that_learn_otherwise_are_refused() -> None:
    with pytest.raises(ValueError, match="methods with one backward pass a part"):
        Hogwild(converted(model(), "early_exit"), OPTIMIZERS["adam"])


# ------------------------------------------------------------------ a part a rank


def trained(kind: str, parts: int, optimizer: str, spread: bool) -> dict[str, Any]:
    """Two runs one after the other, of 13 and 7 batches, the last ones ragged; what there is then."""
    if spread and not dist.is_initialized():
        dist.init_process_group("gloo")
    local, loader = made(kind, "bp", parts)
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    found = Hogwild(local, OPTIMIZERS[optimizer], halving, every=6, seed=3)
    torch.manual_seed(7)
    data = [*loader, *list(loader)[1:], *loader]
    own: Any = data if not spread or dist.get_rank() == 0 else None
    losses = [found.fit(own and own[:13]), found.fit(own and own[13:])]
    states = {}
    for learner in found.learners:
        inner = [value for o in learner.optimizers for s in o.state.values() for value in s.values()]
        states[str(learner.stage.number)] = digest({str(i): value for i, value in enumerate(inner)})
        states[str(learner.stage.number)] += str([o.param_groups[0]["lr"] for o in learner.optimizers])
    return {"losses": losses, "weights": digest(weights_of(local)), "optimizers": states}


@pytest.mark.parametrize("optimizer", ["adam", "foreach"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_many_processes_are_one(several: Several, ranks: int, optimizer: str) -> None:
    """Batch norm, dropout, a skip across all parts, ragged batches: weights, buffers, optimizer state and losses."""
    case: dict[str, Any] = {"kind": "mixed", "parts": ranks, "optimizer": optimizer}
    answers = several.results("tests.runtime.test_hogwild:trained", ranks, spread=True, **case)
    one = trained(**case, spread=False)
    states: dict[str, str] = {}
    for answer in answers:
        assert answer["losses"] == one["losses"]
        assert answer["weights"] == one["weights"]
        assert len(answer["optimizers"]) == 1
        states |= answer["optimizers"]
    assert states == one["optimizers"]


def too_many() -> str:
    dist.init_process_group("gloo")
    try:
        Hogwild(made("mixed", "bp", 3)[0], OPTIMIZERS["adam"])
    except ValueError as error:
        return str(error)
    return "taken"


def test_there_must_be_as_many_ranks_as_parts(several: Several) -> None:
    told = several.results("tests.runtime.test_hogwild:too_many", 2)
    assert told == ["2 ranks for 3 parts: there must be as many."] * 2


# ------------------------------------------------------------------ the command


def test_the_command_prints_a_row_a_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["hogwild.py", "--epochs", "1", "--seeds", "1", "--lr", "2e-3"])
    hogwild.main()
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert head == ["method", "steps a batch", "test %, lr 0.002", "loss"]
    assert [(row[0], row[1]) for row in rows] == [
        ("bp", "8.00"), ("nwise, reach 2", "4.09"), ("early_exit", "2.13"), ("hogwild", "2.26")
    ]  # fmt: skip
