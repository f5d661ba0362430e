"""Values that leave the graph for Python: kept in one piece below the root, checked at run time at the root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import to_local
from localize.convert.traced import TracedModel
from localize.convert.values import check_result, check_value, is_guardable
from localize.errors import TraceError
from tests.convert.recording import assert_same, capture, run_graph

X = torch.ones(3, 4)
WHERE = r"test_values.py:\d+"


class Root(nn.Module):
    """``body`` is the root's own forward, between two layers."""

    def __init__(self, body: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.body = nn.Linear(4, 4), nn.Linear(4, 2), body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(torch.tanh(self.first(x)), x))


class Block(nn.Module):
    """``body`` is the forward of a block: as much of the model as ``width`` says."""

    def __init__(self, body: Callable[[Tensor, Tensor], Any], width: int = 1) -> None:
        super().__init__()
        self.inside, self.wide, self.body = nn.Linear(4, 4), nn.Linear(4, width), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.inside(x), x) + self.wide(x)[:, :1]


def blocks(body: Callable[[Tensor, Tensor], Any], width: int = 1) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), Block(body, width), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():  # the block's decisions are on the model's very input
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    return model


def leaves(traced: TracedModel) -> list[str]:
    return [str(n.target) for n in traced.train_graph.nodes if n.op == "call_module"]


DECISIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "bool": lambda h, x: h * 2 if x.sum() > 0 else -h,
    "item": lambda h, x: h * 2 if (x.sum() > 0).item() else -h,
    "int": lambda h, x: h * 2 if int(x.sign().sum()) > 0 else -h,
    "all": lambda h, x: h * 2 if torch.all(x > 0) else -h,
    "equal": lambda h, x: h * 2 if torch.equal(x, x.abs()) else -h,
    "list": lambda h, x: h * 2 if (x[0] > 0).tolist() == [True] * 4 else -h,
}


@pytest.mark.parametrize("case", DECISIONS)
def test_a_decision_at_the_root_is_checked(case: str) -> None:
    """It cannot be kept whole, since it is the model. The message says where the decision is taken."""
    model = Root(DECISIONS[case])
    traced = capture(model, X)
    assert any(note.startswith("decides on values at tests/convert/test_values.py") for note in traced.notes)
    for value in (X, 2 * X):
        assert torch.equal(run_graph(traced, [value], training=True), model(value))
    with pytest.raises(TraceError, match=rf"decision at tests/convert/{WHERE}.*nn.Module of their own"):
        run_graph(traced, [-X], training=True)


@pytest.mark.parametrize("case", DECISIONS)
def test_a_decision_in_a_small_block_is_taken_anew(case: str) -> None:
    model = blocks(DECISIONS[case])
    traced = capture(model, X)
    assert leaves(traced) == ["0", "1", "2", "3"]
    assert any("kept whole: 1 " in note for note in traced.notes)
    for value in (X, -X, torch.randn(5, 4)):
        assert_same(model, traced, value)


def test_a_decision_in_most_of_the_model_is_checked() -> None:
    """A block that holds more than half of the model, kept whole, would leave nothing to cut."""
    model = blocks(DECISIONS["bool"], width=40)
    traced = capture(model, X)
    assert {"1.inside", "1.wide"} <= set(leaves(traced))
    with pytest.raises(TraceError, match=WHERE):
        run_graph(traced, [-X], training=True)


def test_integers_go_on_in_arithmetic() -> None:
    """``.item()`` of an integer tensor is a number of the graph: another value gives another result."""

    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            k = n.sum().item()
            return self.last(torch.roll(self.first(x), k + 1, 1)) + 2 * k

    model = Shifts()
    traced = capture(model, X, torch.tensor([1, 1]))
    for n in (torch.tensor([1, 1]), torch.tensor([2, 3]), torch.tensor([0, 0])):
        assert_same(model, traced, torch.randn(5, 4), n)


def test_integers_in_comparisons_are_checked() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(-x if n.item() > 2 else x)

    model = Chooses()
    traced = capture(model, X, torch.tensor(1))
    assert torch.equal(run_graph(traced, [X, torch.tensor(2)], training=True), model(X, torch.tensor(2)))
    with pytest.raises(TraceError, match=WHERE):
        run_graph(traced, [X, torch.tensor(3)], training=True)


FLOATS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda h, x: h * x.mean().item(),
    "float": lambda h, x: h * float(x.detach().mean()),
    "tolist": lambda h, x: h * x.mean(0).tolist()[0],
    "numpy": lambda h, x: h * x.mean().detach().numpy().item(),
    "text": lambda h, x: h * float(f"{x.mean():.3f}"),
}


@pytest.mark.parametrize("case", FLOATS)
def test_floats_are_refused_at_the_root_and_kept_whole_below(case: str) -> None:
    """A guard on a float would stop every other batch."""
    with pytest.raises(TraceError, match=rf"{WHERE}.*Python depends on a tensor's values"):
        capture(Root(FLOATS[case]), X)
    model = blocks(FLOATS[case])
    traced = capture(model, X)
    assert "1" in leaves(traced)
    assert_same(model, traced, torch.randn(5, 4))


SIZED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nonzero": lambda h, x: h + len((x > 0).nonzero()),
    "mask": lambda h, x: h + h[x > 0].view(-1).sum() / max(h[x > 0].shape[0], 1),
    "unique": lambda h, x: h + torch.unique(x.sign()).numel(),
    "loop": lambda h, x: h + sum(h[i, j] for i, j in (x > 0).nonzero()),
    "pairs": lambda h, x: h + sum(h[i].sum() for i in torch.where(x[:, 0] > 0)[0]),
    "counts": lambda h, x: h + torch.repeat_interleave(h[0], (x[0] > 0).long()).shape[0],
}


@pytest.mark.parametrize("case", SIZED)
def test_sizes_that_depend_on_values_keep_a_block_whole(case: str) -> None:
    """How many values fit is as good as a value; a batch with another number was once computed with the example's."""
    model = blocks(SIZED[case])
    traced = capture(model, X)
    for value in (X, -X, torch.randn(5, 4)):
        assert_same(model, traced, value)


def test_a_loop_that_runs_for_no_value_at_capture() -> None:
    """It leaves no node; it must leave a check, or it never runs again."""
    model = Root(lambda h, x: h + sum(h[i].sum() for i in torch.where(x[:, 0] > 0)[0]))
    traced = capture(model, -X)
    assert torch.equal(run_graph(traced, [-2 * X], training=True), model(-2 * X))
    with pytest.raises(TraceError, match=WHERE):
        run_graph(traced, [X], training=True)


def test_sizes_that_depend_on_values_flow_without_python() -> None:
    model = Root(lambda h, x: h + h[x > 0].sum() / (x > 0).nonzero().size(0))
    traced = capture(model, X)
    assert_same(model, traced, torch.randn(5, 4).abs())


class Gives(nn.Module):
    """A leaf that returns a flag, a number or a name beside a tensor."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return x * 2, self.what(x)


class Takes(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.gives, self.last = Gives(what), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, found = self.gives(x)
        return self.last(x if found in (True, 1.0, "plus") else -x)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum().sign()),
        lambda x: "plus" if x.sum() > 0 else "minus",
    ],
    ids=["bool", "float", "str"],
)
def test_what_leaves_return_beside_tensors_is_checked(what: Callable[[Tensor], Any]) -> None:
    model = Takes(what)
    traced = capture(model, X)
    assert_same(model, traced, torch.ones(5, 4))
    with pytest.raises(TraceError, match=rf"module called at tests/convert/{WHERE} returned"):
        run_graph(traced, [-X], training=True)


def test_checks_stop_the_parts_too() -> None:
    local = to_local(Root(DECISIONS["bool"]), X, method="early_exit", parts=2)
    local.losses(X, torch.tensor([0, 1, 1]))
    with pytest.raises(TraceError, match=WHERE):
        local.losses(-X, torch.tensor([0, 1, 1]))


def test_which_values_can_be_checked() -> None:
    assert all(map(is_guardable, (True, 3, None, "x", torch.float32, [1, (2, True)])))
    assert not any(map(is_guardable, (0.5, [1, 0.5], torch.ones(1), {1: 2})))


def test_checks() -> None:
    check_value("item", 3, "here:1", torch.tensor(3))
    with pytest.raises(TraceError, match=r"here:1 on a value that was 3 at capture and is 4 now"):
        check_value("item", 3, "here:1", torch.tensor(4))
    check_result(float("nan"), float("nan"), "here:1")
    check_result("a", "a", "here:1")
    for found, expected in ((True, 1), (1.0, 2.0), ("a", "b")):
        with pytest.raises(TraceError, match=r"here:1 returned"):
            check_result(found, expected, "here:1")


def test_the_number_of_axes_is_checked() -> None:
    """With one sample ``squeeze`` takes more away, and the model takes another way."""
    model = Root(lambda h, x: h if h.squeeze().dim() == 2 else h * 2)
    traced = capture(model, X)
    assert_same(model, traced, torch.randn(5, 4))
    with pytest.raises(TraceError, match=WHERE):
        run_graph(traced, [torch.randn(1, 4)], training=False)


def test_draws_are_known_whatever_the_function_is_called() -> None:
    with pytest.raises(TraceError, match="random numbers"):
        capture(Root(lambda h, x: h if torch.binomial(torch.ones(1) * 4, torch.ones(1) / 2) < 2 else -h), X)
