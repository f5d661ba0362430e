"""Plain values that a forward reads are part of the capture: one that changes later is an error, not a difference."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import LocalModel, to_local
from localize.errors import ConfigError, TraceError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Reads its strength where ``read`` finds it."""

    shared = 2.0

    def __init__(self, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.read = read
        self.own, self.unread = 2.0, 2.0
        self.table, self.levels, self.thing = {"scale": 2.0}, [1.0, 2.0], SimpleNamespace(scale=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.read(self))


def _own(m: Scaled) -> None:
    m.own = 3.0


def _shared(m: Scaled) -> None:
    m.shared = 3.0


def _table(m: Scaled) -> None:
    m.table["scale"] = 3.0


def _levels(m: Scaled) -> None:
    m.levels[1] = 3.0


def _thing(m: Scaled) -> None:
    m.thing.scale = 3.0


CASES: dict[str, tuple[Callable[[Any], float], Callable[[Scaled], None]]] = {
    "attribute": (lambda m: m.own, _own),
    "of the class": (lambda m: m.shared, _shared),
    "in a dict": (lambda m: m.table["scale"], _table),
    "in a list": (lambda m: m.levels[1], _levels),
    "of an object": (lambda m: m.thing.scale, _thing),
}


def converted(read: Callable[[Any], float]) -> tuple[Scaled, LocalModel]:
    model = Scaled(read)
    return model, to_local(model, X, method="bp", parts=2, task="regression")


@pytest.mark.parametrize("case", CASES)
def test_a_setting_that_changes_is_an_error(case: str) -> None:
    read, change = CASES[case]
    model, local = converted(read)
    assert torch.equal(local(X), model(X))
    change(model)
    with pytest.raises(TraceError, match=r"2\.0 at capture and is 3\.0 now.*Convert again"):
        local(X)


def test_a_setting_that_nobody_reads_may_change() -> None:
    model, local = converted(lambda m: m.own)
    model.unread = 3.0
    assert torch.equal(local(X), model(X))


def test_copies_check_nothing_that_is_not_theirs() -> None:
    model, local = converted(lambda m: m.own)
    expected = model(X)
    copied = copy.deepcopy(local)
    model.own = 3.0
    assert torch.equal(copied(X), expected)
    part = pickle.loads(pickle.dumps(local.parts[0]))
    assert sum(p.numel() for p in part.parameters()) == 20


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Scaled(lambda m: 2.0 if m.training else 1.0), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def test_a_block_in_another_mode_than_its_part_is_an_error() -> None:
    model = Branches()
    local = to_local(model, X, method="bp", parts=2, task="regression")
    for training in (True, False):
        local.train(training)
        assert torch.equal(local(X), model(X))
    local.train()
    model.inner.eval()
    with pytest.raises(TraceError, match=r"'inner' is in eval mode.*local\.eval\(\)"):
        local(X)


def test_another_type_is_an_error_where_the_forward_asks_for_it() -> None:
    class Asks(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + torch.ones(4, dtype=x.dtype))

    model = Asks(lambda _: 1.0)
    local = to_local(model, X, method="bp", parts=2, task="regression")
    local.double()
    with pytest.raises(TraceError, match=r"torch\.float32 and is in torch\.float64 now"):
        local(X.double())


def test_decisions_on_random_numbers_are_refused() -> None:
    """A check would hold by chance, and fail in the middle of training."""

    class Skips(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(x if self.training and torch.rand(1) < 0.5 else self.a(x))

    with pytest.raises(TraceError, match="decides on random numbers"):
        to_local(Skips(lambda _: 1.0), X, method="bp", parts=2, task="regression")


def test_parameters_that_share_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data
    with pytest.raises(TraceError, match=r"'0\.weight' and '2\.weight' share memory"):
        to_local(model, X, method="bp", parts=2)


def test_empty_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"empty, \(0, 4\)"):
        to_local(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.empty(0, 4), method="bp", parts=2)
