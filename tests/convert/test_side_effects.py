"""What a forward sets on modules: set up once, given anew at each call, counted, kept to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import to_local
from localize.errors import TraceError
from tests.convert.recording import assert_same, assert_untouched, capture, state_of

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 1])


class Base(nn.Module):
    """Either the root, or a block between two layers (see ``within``)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))


class Averages(Base):
    """Gives its buffer a new value by assignment."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0).detach()
        return self.other(x - self.mean)


class Linked(Base):
    """The old value takes part in the backward pass of what came before the new one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.mean
        self.mean = y.detach().mean(0) + 1
        return self.other(y * self.mean)


class Moves(Base):
    """To the device that it is on already."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.to(x.device)
        return self.other(self.layer(x) - self.mean)


def within(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 4))


def as_root(block: nn.Module) -> nn.Module:
    return block


@pytest.mark.parametrize("place", [as_root, within])
@pytest.mark.parametrize("kind", [Averages, Linked, Moves])
def test_buffers_that_are_given_new_values(kind: type[Base], place: Callable[[nn.Module], nn.Module]) -> None:
    """Three calls, then a backward pass: values and gradients are those of a model that nobody converted."""
    torch.manual_seed(0)
    plain, cut = place(kind()), place(kind())
    cut.load_state_dict(plain.state_dict())
    before = state_of(cut)
    local = to_local(cut, X, method="bp", parts=2)
    assert_untouched(cut, before)
    for seed in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        expected, found = plain(x), local(x)
        assert torch.equal(expected, found)
        for output in (expected, found):
            (output * torch.arange(4.0)).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), cut.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-6), name
    for one, other in zip(plain.buffers(), cut.buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_rebound_buffer_stays_the_same_object() -> None:
    """An optimizer, a state dict, another part may hold it."""
    model = Averages()
    buffer = model.mean
    local = to_local(model, X, method="bp", parts=2)
    local(X)
    assert model.mean is buffer
    assert buffer.abs().sum() > 0


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.other(self.layer(x)) * self.calls


class Remembers(Base):
    """The next call reads the tensor that this one leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) + self.last
        self.last = x.detach().mean(0)
        return self.other(x)


@pytest.mark.parametrize("kind", [Counts, Remembers])
def test_state_in_attributes(kind: type[Base]) -> None:
    """Refused at the root; a block is kept whole, and counts as ever."""
    with pytest.raises(TraceError, match=r"sets its own attribute '(calls|last)', which the next call reads"):
        capture(kind(), X)
    plain, cut = within(kind()), within(kind())
    cut.load_state_dict(plain.state_dict())
    local = to_local(cut, X, method="bp", parts=2)
    assert any("kept whole: 1 " in note for note in local.plan.notes)
    for _ in range(3):
        assert torch.equal(plain(X), local(X))


class SetsUp(Base):
    """Makes a table at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        return self.other(self.layer(x) * self.table)


class Grows(Base):
    """A cache that is made anew for longer inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(2.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < x.shape[-1]:
            self.table = torch.arange(float(x.shape[-1]))
        return self.other(self.layer(x) * self.table[: x.shape[-1]])


@pytest.mark.parametrize("kind", [SetsUp, Grows])
def test_what_the_first_call_sets_up(kind: type[Base]) -> None:
    """The model runs once before it is recorded; afterwards it is as it was, and sets itself up again."""
    model = kind()
    table = model.table
    traced = capture(model, X)
    assert model.table is table
    assert traced.modes_agree
    assert {n.target for n in traced.train_graph.nodes if n.op == "call_module"} >= {"layer", "other"}
    assert_same(model, traced, torch.randn(5, 4))


class Shows(Base):
    """Keeps results to be looked at, and a number that comes out the same at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Any = None
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        self.hidden, self.width = self.layer(x), 2 + 2
        return self.other(self.hidden)


def test_results_to_be_looked_at_are_noted() -> None:
    traced = capture(Shows(), X)
    assert any(note.startswith("sets hidden") and "parts do not" in note for note in traced.notes)
    inside = capture(within(Shows()), X)
    assert any(note.startswith("sets 1.hidden") for note in inside.notes)
    assert not any("kept whole" in note for note in inside.notes)
    assert not capture(within(Quiet()), X).notes


class Quiet(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x))


class Distances(nn.Module):
    """Makes its table at the first call, in place of a buffer of another shape (convit does)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[1] != x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))[None]
        return self.layer(x) + self.table


def test_a_table_that_takes_the_place_of_a_buffer_is_a_constant() -> None:
    """The graph read the old buffer, of another shape, which was back in its place after the capture."""
    model = nn.Sequential(Distances(), nn.Linear(4, 4), Distances(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    local = to_local(model, x, method="bp", parts=2)
    assert model[0].table.shape == (1, 1)
    found = local(x)
    assert torch.equal(found, model(x))


def test_hooks_that_will_not_run_again_are_noted() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    local = to_local(model, X, method="bp", parts=2)
    assert any("forward hooks of 0 ran at capture" in note for note in local.plan.notes)
