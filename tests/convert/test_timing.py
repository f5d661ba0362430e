"""Times of nodes and heads, on a clock that the layers themselves move on: what is added up, and of what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import load, to_local
from localize.convert import graft, timing
from localize.convert.graft import HeadCosts, HeadTiming
from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.timing import TimedRun, Times, measure
from localize.heads.base import Head, HeadOutput, HeadSite, Method, TaskHead
from localize.heads.registry import resolve_method
from localize.spec import Cost, TensorSpec
from localize.task import Task

N = 4


class Clock:
    """Stands still but for what layers of this file take, in milliseconds."""

    def __init__(self) -> None:
        self.ms = 0.0

    def __call__(self) -> float:
        return self.ms / 1e3


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localize.convert.timing.time.perf_counter", CLOCK)


class _Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        CLOCK.ms += forward
        ctx.backward_ms = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        CLOCK.ms += ctx.backward_ms
        return grads[0], None, None


class Takes(nn.Linear):
    """A layer that takes so many milliseconds forward and backward."""

    def __init__(self, forward: float, backward: float, width: int = 6, out: int = 6) -> None:
        super().__init__(width, out)
        self.ms = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return _Takes.apply(super().forward(x), *self.ms)


class Does(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(6, 6), function, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def run_of(model: nn.Module, *inputs: Tensor) -> tuple[TimedRun, Any, set[str]]:
    """A run, what came out of it, and the nodes that could not be run backward."""
    failed: set[str] = set()
    run = TimedRun(trace(model, inputs or (torch.randn(N, 6),), {}), True, failed)
    with torch.no_grad():
        (output,) = run.run(*run._traced.example)
    return run, output, failed


def total(times: dict[str, Times]) -> tuple[float, float]:
    return sum(t.forward_ms for t in times.values()), sum(t.backward_ms for t in times.values())


# ------------------------------------------------------------------------------------------ nodes


def test_each_node_has_its_forward_and_its_backward() -> None:
    found = measure(trace(nn.Sequential(Takes(1, 5), nn.ReLU(), Takes(2, 3)), (torch.randn(N, 6),), {}), True)
    assert [t for t in found.values() if t != Times(0, 0)] == [
        Times(pytest.approx(1), pytest.approx(5)),
        Times(pytest.approx(2), pytest.approx(3)),
    ]


def test_times_are_medians_of_rounds_after_a_first_one() -> None:
    layer = Takes(0, 0)
    traced = trace(nn.Sequential(layer), (torch.randn(N, 6),), {})
    rounds = iter([(100, 200), (1, 7), (2, 8), (50, 6), (0.5, 90), (0.25, 1)])

    def next_round(module: Takes, _: Any) -> None:
        if not torch.is_grad_enabled():  # for its value; the backward pass of the same round follows
            module.ms = next(rounds)

    layer.register_forward_pre_hook(next_round)
    assert total(measure(traced, True)) == pytest.approx((1, 7))
    assert next(rounds, None) is None


def test_parts_are_balanced_by_what_a_step_takes() -> None:
    """By forward passes alone the cut would be in the middle."""
    model = nn.Sequential(*[Takes(1, 2) for _ in range(5)], Takes(1, 14))
    plan = to_local(model, torch.randn(N, 6), method="bp", parts=2, balance="time").plan
    assert plan.cuts == ("4",)
    assert [part.part.forward_ms for part in plan.parts] == pytest.approx([5, 1])
    assert [part.part.backward_ms for part in plan.parts] == pytest.approx([10, 14])
    assert plan.imbalance == pytest.approx(1)
    assert [part["part"]["backward_ms"] for part in plan.to_dict()["parts"]] == pytest.approx([10, 14])
    _, columns, *rows = str(plan).splitlines()[:4]
    assert columns.split()[-1] == "ms"
    assert [row.split()[-1] for row in rows] == ["15.000", "15.000"]
    assert "ms" not in str(replace(plan, balance="flops")).splitlines()[1].split()


def test_a_loaded_plan_is_measured_anew(tmp_path: Path) -> None:
    """Files from before there were backward times lack them, and are read all the same."""
    model = nn.Sequential(Takes(1, 2), Takes(1, 2), Takes(2, 4))
    to_local(model, torch.randn(N, 6), method="bp", parts=2, balance="time").save(tmp_path / "a")
    path = tmp_path / "a" / "plan.json"
    content = json.loads(path.read_text())
    for part in content["plan"]["parts"]:
        assert part["part"].pop("backward_ms") == pytest.approx(4)
    path.write_text(json.dumps(content))
    local = load(tmp_path / "a", model)
    assert [part.part.backward_ms for part in local.plan.parts] == pytest.approx([4, 4])


# ------------------------------------------------------------------------------------------ which gradients


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The shapes of what gradients were computed of, backward pass by backward pass."""
    found: list[list[tuple[int, ...]]] = []
    gradients = timing.gradients

    def noted(outputs: Any, inputs: Any, ones: Any = None) -> None:
        found.append([tuple(t.shape) for t in inputs])
        gradients(outputs, inputs, ones)

    monkeypatch.setattr(timing, "gradients", noted)
    return found


def test_the_first_layer_wants_no_gradient_of_its_input(wanted: list[list[tuple[int, ...]]]) -> None:
    run_of(nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)))
    assert wanted == [[(5, 6), (5,)], [(N, 5)], [(2, 5), (N, 5)]]


def test_frozen_layers(wanted: list[list[tuple[int, ...]]]) -> None:
    """Below all that trains they take nothing; above they pass gradients on."""
    frozen = [nn.Linear(6, 6).requires_grad_(False) for _ in range(2)]
    run, _, _ = run_of(nn.Sequential(frozen[0], nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 6), frozen[1]))
    assert wanted == [[(5, 6), (5,)], [(6, 5), (6,), (N, 5)], [(N, 6)]]
    assert all(times.backward_ms == 0 for times in run.times.values())


def test_a_stretch_without_gradients(wanted: list[list[tuple[int, ...]]]) -> None:
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.b(self.a(x)).repeat(1, 2)
            return self.c(x)

    run_of(Still())
    assert wanted == [[(2, 6), (2,)]]


def test_a_parameter_that_a_function_reads(wanted: list[list[tuple[int, ...]]]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.still = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            return (x * self.still) * x

    run_of(Scaled())
    assert wanted == [[(6,)], [(N, 6)], [(N, 6), (N, 6)]]


def into_a_buffer(x: Tensor) -> Tensor:
    y = torch.zeros_like(x).detach()
    y[:, 1:] = x[:, 1:]
    return y * 2


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], list[list[tuple[int, ...]]]]] = {
    "relu_": (F.relu_, [[(N, 6)]]),
    "module": (nn.ReLU(inplace=True), [[(N, 6)]]),
    "chain": (lambda x: x.mul_(2).add_(x), [[(N, 6)], [(N, 6)]]),
    "view": (lambda x: x.view(-1).mul_(3).view(N, 6), [[(N, 6)], [(6 * N,)], [(6 * N,)]]),
    "into a buffer": (into_a_buffer, [[(N, 6)], [(N, 5)], [(N, 6)]]),
    "split": (lambda x: torch.cat(x.chunk(2, 1), 1), [[(N, 6)], [(N, 3), (N, 3)]]),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_operations_in_place(name: str, wanted: list[list[tuple[int, ...]]]) -> None:
    """The second run of a node must not show in the values of those after it."""
    function, expected = IN_PLACE[name]
    model, x = Does(function), torch.randn(N, 6)
    _, output, failed = run_of(model, x)
    assert not failed
    with torch.no_grad():
        assert torch.equal(output, model(x))
    assert wanted == [[(6, 6), (6,)], *expected, [(6, 6), (6,), (N, 6)]]


# ------------------------------------------------------------------------------------------ no backward pass


class _Fails(_Takes):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("no backward")


class Fails(Takes):
    def forward(self, x: Tensor) -> Tensor:
        return _Fails.apply(nn.Linear.forward(self, x), *self.ms)


def test_what_cannot_be_run_backward_counts_twice_its_forward() -> None:
    found = measure(trace(nn.Sequential(Takes(1, 7), Fails(4, 0), Takes(1, 7)), (torch.randn(N, 6),), {}), True)
    assert total(found) == pytest.approx((6, 7 + 8 + 7))


class Once(Takes):
    """Must not be called twice in a row."""

    called = False

    def forward(self, x: Tensor) -> Tensor:
        if self.called:
            raise RuntimeError("called twice")
        self.called = True
        return super().forward(x)


class Resets(nn.Linear):
    def __init__(self, layer: Once) -> None:
        super().__init__(6, 6)
        self.layers = [layer]

    def forward(self, x: Tensor) -> Tensor:
        self.layers[0].called = False
        return super().forward(x)


def test_layers_that_remember_are_timed_forward_alone() -> None:
    once = Once(3, 1)
    traced = trace(nn.Sequential(Resets(once), once), (torch.randn(N, 6),), {})
    assert total(measure(traced, True)) == pytest.approx((3, 6))
    assert not traced.notes


class Reads(Resets):
    """Must come right after the layer that it looks at."""

    def forward(self, x: Tensor) -> Tensor:
        if self.layers[0].count % 2 == 0:
            raise RuntimeError("called in between")
        self.layers[0].count += 1
        return nn.Linear.forward(self, x)


class Counts(Takes):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


def test_notes_tell_of_backward_passes_that_could_not_be_timed() -> None:
    counts = Counts(3, 1)
    traced = trace(nn.Sequential(counts, Reads(counts)), (torch.randn(N, 6),), {})
    counts.count = 0
    assert total(measure(traced, True)) == pytest.approx((3, 6))
    counts.count = 0
    measure(traced, True)
    note = "backward passes: times estimated as twice those of forward passes, since RuntimeError: called in between"
    assert [each for each in traced.notes if "estimated" in each] == [note]


# ------------------------------------------------------------------------------------------ no trace left


def test_gradients_and_hooks_of_the_user_see_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2), nn.Linear(2, 2))
    model(torch.randn(N, 6)).sum().backward()
    seen: list[Any] = []
    model[0].weight.register_hook(seen.append)
    model[3].weight.register_post_accumulate_grad_hook(seen.append)
    model[4].register_full_backward_hook(lambda *_: seen.append(1))
    traced = trace(model, (torch.randn(N, 6),), {})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    held = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    measure(traced, True)
    assert not seen
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for parameter, (grad, values) in zip(model.parameters(), held, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, values)
    assert all(p.grad_fn is None for p in model.parameters())


# ------------------------------------------------------------------------------------------ heads


def head_costs(method: Any, timing_: HeadTiming | None) -> HeadCosts:
    return HeadCosts(method, Task("classification", 3), TensorSpec((N, 3)), timing=timing_)


MODEL = Cost(flops=1000.0, forward_ms=2.0, backward_ms=6.0)
HERE = HeadTiming(MODEL, torch.device("cpu"), torch.float32)


class SlowHead(Head):
    """Takes 3 ms forward and 4 ms backward for every feature of the hidden state."""

    def __init__(self, site: HeadSite) -> None:
        super().__init__(site)
        width = site.hidden.features[0]
        self.layer = Takes(3 * width, 4 * width, width, 2)

    def forward(self, hidden: Tensor, target: Any) -> HeadOutput:
        assert hidden.requires_grad
        return HeadOutput(self.layer(hidden).square().mean())


@dataclass(frozen=True)
class Slow(Method):
    name: ClassVar[str] = "slow"

    def build_head(self, site: HeadSite) -> Head | None:
        if site.number == 2 and site.parts == 4:
            return None
        return TaskHead(site) if site.is_last else SlowHead(site)


def test_heads_are_built_and_timed() -> None:
    random, costs = torch.get_rng_state(), head_costs(Slow(), HERE)
    cost = costs.of(TensorSpec((N, 8)), 1, 2)
    assert (cost.forward_ms, cost.backward_ms) == pytest.approx((24, 32))
    assert (cost.flops, cost.param_bytes) == (2 * N * 8 * 2, 4 * (8 * 2 + 2))
    assert torch.equal(torch.get_rng_state(), random)
    none = costs.of(TensorSpec((N, 8)), 2, 4)
    assert none == Cost(forward_ms=0.0, backward_ms=0.0)
    assert head_costs(Slow(), None).of(TensorSpec((N, 8)), 1, 2).forward_ms is None


def test_a_slow_head_moves_the_cut() -> None:
    """The middle layer is wide, and a head takes longer there than all layers together."""
    model = nn.Sequential(Takes(5, 5, 6, 1), Takes(5, 5, 1, 40), Takes(5, 5, 40, 6), Takes(5, 5))
    x = torch.randn(N, 6)
    assert to_local(model, x, method="bp", parts=2, balance="time").plan.cuts == ("1",)
    plan = to_local(model, x, method=Slow(), parts=2, balance="time").plan
    assert plan.cuts == ("0",)
    assert [part.head.of("time") for part in plan.parts] == pytest.approx([7, 0])
    assert [part.total.of("time") for part in plan.parts] == pytest.approx([17, 30])


def test_heads_that_are_not_timed_are_as_fast_for_their_flops_as_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, flops = TensorSpec((N, 8)), 2 * N * 8 * 2
    expected = pytest.approx((2.0 * flops / 1000, 6.0 * flops / 1000))
    nowhere = head_costs(Slow(), HeadTiming(MODEL, None, torch.float32)).of(spec, 1, 2)
    assert (nowhere.forward_ms, nowhere.backward_ms) == expected
    monkeypatch.setattr(graft, "LARGEST", 4 * (8 * 2 + 2))  # its weights alone
    large = head_costs(Slow(), HERE).of(spec, 1, 2)
    assert (large.forward_ms, large.backward_ms) == expected


def test_a_plan_tells_which_of_its_heads_could_not_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(head: Head, device: torch.device) -> Times:
        raise RuntimeError("no kernel\nand more")

    model = nn.Sequential(Takes(1, 2), Takes(1, 2, 6, 5), Takes(1, 2, 5, 6))
    plan = to_local(model, torch.randn(N, 6), method=Slow(), cuts=["0"], balance="time").plan
    assert not [note for note in plan.notes if "estimated" in note]
    monkeypatch.setattr(graft, "measure_head", fails)
    plan = to_local(model, torch.randn(N, 6), method=Slow(), cuts=["0"], balance="time").plan
    found = [note for note in plan.notes if "estimated" in note]
    assert found == [f"head on {plan.boundaries[0].spec}: time estimated from FLOPs, since RuntimeError: no kernel"]


def test_models_without_data_have_estimates_of_their_heads() -> None:
    with torch.device("meta"):
        planner = Planner(trace(nn.Sequential(Takes(1, 2), Takes(1, 2)), (torch.empty(N, 6),), {}), Slow(), "time")
    assert planner.head_costs.timing == HeadTiming(planner.profiles[True].cost(["_0", "_1"]), None, torch.float32)


@pytest.mark.parametrize("method", ["scpl", "al", "nwise", "lct", "early_exit", "joint", "bp"])
def test_every_method_has_times(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real clock
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    plan = to_local(model, torch.randn(N, 3, 8, 8), method=method, balance="time").plan
    heads = [part.head for part in plan.parts if part.head.param_bytes]
    assert all(head.forward_ms and head.backward_ms for head in heads)
    assert len(heads) == {"bp": 0, "scpl": 2, "al": 2}.get(method, 1)
    assert all(part.part.forward_ms and part.part.backward_ms for part in plan.parts)


def test_heads_that_are_alike_are_timed_once() -> None:
    asked: list[tuple[tuple[int, ...], bool]] = []

    def told(head: Head, device: torch.device) -> Times:
        asked.append((head.site.hidden.shape, head.site.is_last))
        return Times(len(asked), 10 * len(asked))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graft, "measure_head", told)
        costs = head_costs(resolve_method("early_exit"), HERE)
        narrow, wide = TensorSpec((N, 6)), TensorSpec((N, 8))
        found = [costs.of(narrow, k, 4) for k in (1, 2, 3)] + [costs.of(wide, 2, 4), costs.of(TensorSpec((N, 3)), 4, 4)]
        assert costs.of(narrow, 2, 3) == found[0]
        found.append(costs.of(TensorSpec((N, 20)), 1, 2))
        found.append(costs.of(TensorSpec((N, 21)), 1, 2))
    assert asked == [((N, 6), False), ((N, 8), False), ((N, 3), True), ((N, 20), False)]
    assert [cost.of("time") for cost in found] == pytest.approx([11, 11, 11, 22, 33, 44, 44 * 21 / 20])
    assert [cost.flops for cost in found] == [2 * N * width * 3 for width in (6, 6, 6, 8, 0, 20, 21)]
