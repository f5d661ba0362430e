"""Activation checkpointing that a model does by itself is kept: computed again, with less saved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from localize import to_local
from localize.convert.checkpointing import Checkpointed
from localize.runtime.memory import SavedBytes
from tests.convert.recording import assert_same, capture

X, Y = torch.randn(6, 8), torch.tensor([0, 1, 1, 0, 1, 0])


class Counting(nn.Linear):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, extra: nn.Module) -> None:
        super().__init__()
        self.one, self.extra, self.two = Counting(), extra, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(self.extra(torch.tanh(self.one(x)).exp().tanh())))


class Model(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], extra: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        made = extra(8) if extra is nn.BatchNorm1d else extra()
        self.first, self.block, self.last, self.run = nn.Linear(8, 8), Block(made), nn.Linear(8, 2), run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.block, torch.tanh(self.first(x))))


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def anew(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def by_reentering(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


BOTH = pytest.mark.parametrize("run", [anew, by_reentering])


def calls_in_training(local: object, calls: list[int]) -> int:
    optimizers = local.optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
    calls[0] = 0
    local.train_step(X, Y, optimizers)
    return calls[0]


@BOTH
def test_a_checkpointed_module_is_computed_again(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Once in the forward and once in the backward, with local losses too: without checkpoints it is once."""
    for method in ("bp", "early_exit"):
        model = Model(run)
        local = to_local(model, X, method=method, parts=2)
        assert calls_in_training(local, model.block.one.calls) == 2
        plain = Model(plainly)
        assert calls_in_training(to_local(plain, X, method=method, parts=2), plain.block.one.calls) == 1


@BOTH
def test_a_checkpointed_module_is_one_call(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Model(run)
    traced = capture(model, X)
    nodes = [n for n in traced.train_graph.nodes if n.target == Checkpointed()]
    assert [n.args[0].target for n in nodes] == ["block"]
    assert_same(model, traced, torch.randn(4, 8))


@BOTH
def test_dropout_is_drawn_as_in_the_model(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """The very same bits, and the same again when it is computed a second time."""
    model = Model(run, nn.Dropout)
    assert_same(model, capture(model, X), torch.randn(4, 8))


@BOTH
def test_statistics_are_updated_as_in_the_model(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Batch normalisation sees the batch a second time, in the model and in the part."""
    model = Model(run, nn.BatchNorm1d)
    assert_same(model, capture(model, X), torch.randn(4, 8))
    twin = Model(run, nn.BatchNorm1d)
    twin.load_state_dict(model.state_dict())
    local = to_local(model.train(), X, method="bp", parts=2, verify=run is anew)
    for each in (twin, local):
        torch.nn.functional.cross_entropy(each(X), Y).backward()
    assert model.block.extra.num_batches_tracked == twin.block.extra.num_batches_tracked > 0
    assert torch.equal(model.block.extra.running_mean, twin.block.extra.running_mean)


def saved(run: Callable[[nn.Module, Tensor], Tensor]) -> int:
    model = Model(run)
    local = to_local(model, X, method="bp", parts=2)
    with SavedBytes(exclude=[*model.parameters()]) as found:
        output = local(X)
        held = found.bytes
    del output
    return held


@BOTH
def test_less_is_saved(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Of the block's six activations, one at most: its input."""
    assert saved(run) <= saved(plainly) - 3 * X.numel() * 4


def test_the_plan_knows() -> None:
    plain, kept = (to_local(Model(run), X, method="bp", parts=2).plan.parts for run in (plainly, anew))
    assert sum(p.total.saved_bytes for p in kept) <= sum(p.total.saved_bytes for p in plain) - 3 * X.numel() * 4


class Towers(nn.Module):
    """``checkpoint_sequential``, and a function that is no module."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (Counting(), nn.Tanh())]
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.tower, self.inside = nn.Sequential(*layers), nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda y: torch.tanh(self.inside(y)), torch.tanh(self.first(x)), use_reentrant=self.reentrant)
        return self.last(checkpoint_sequential(self.tower, 3, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_sequential_and_functions(reentrant: bool) -> None:
    model = Towers(reentrant)
    assert_same(model, capture(model, X), torch.randn(4, 8))
    local = to_local(model, X, method="early_exit", parts=2)
    assert calls_in_training(local, model.tower[0].calls) == 2


class OwnCheckpoint(nn.Module):
    """A leaf that re-enters autograd by itself: nothing is recorded, the checkpoint is torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Counting()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            x = -x
        return checkpoint(lambda y: torch.tanh(self.inside(y)), x, use_reentrant=True)


@pytest.mark.parametrize("method", ["bp", "early_exit", "scpl", "lct"])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_leaves_that_reenter_autograd_train(method: str) -> None:
    """``backward(inputs=...)`` does not work with them, so that parts are trained without."""
    model = nn.Sequential(nn.Linear(8, 8), OwnCheckpoint(), nn.Linear(8, 8), OwnCheckpoint(), nn.Linear(8, 2))
    local = to_local(model, X, method=method, parts=2)
    assert calls_in_training(local, model[1].inside.calls) == 2
    weights = [p for p in model.parameters() if p.grad is not None]
    assert len(weights) >= 8
    sum(local.losses(X, Y)).backward()


def test_equal_calls() -> None:
    assert Checkpointed() == Checkpointed()
    assert hash(Checkpointed()) == hash(Checkpointed())
    assert Checkpointed() != checkpoint
