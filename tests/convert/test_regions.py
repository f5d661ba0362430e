"""Autocast regions inside a forward are those of the parts, whatever they run in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import to_local
from localize.convert.regions import HERE, InAutocast, Method, Regions
from localize.errors import TraceError
from tests.convert.recording import assert_same, capture, run_graph, runner

X = torch.randn(3, 4)
BF16 = torch.bfloat16


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.randn(4, 4))
        self.other = nn.Parameter(torch.randn(4, 4))


class Lower(Base):
    """A region in bfloat16: a function, a method and a leaf module in it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", BF16):
            y = torch.mm(x, self.scale)
            y = self.mid(y.matmul(self.other))
        return self.last(y.float())


class Exact(Base):
    """A region without autocasting: nothing changes at capture, but under bfloat16 it is what keeps a sum exact."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        with torch.autocast("cpu", enabled=False):
            y = self.mid(x.float()) @ self.scale
        return self.last(torch.tanh(y))


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            y = self.first(x)
            with torch.autocast("cpu", enabled=False):
                y = self.mid(y.float())
            y = y.matmul(self.scale)
        return self.last(y.float())


class Decorated(Base):
    @torch.autocast("cpu", BF16)
    def inside(self, x: Tensor) -> Tensor:
        return self.mid(x) @ self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.first(x)).float())


class Around(Base):
    @torch.autocast("cpu", BF16)
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.mid(torch.tanh(self.first(x)))))


MODELS = [Lower, Exact, Nested, Decorated, Around]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("ambient", [False, True])
def test_parts_run_in_the_same_regions(kind: type[Base], ambient: bool) -> None:
    """Outside of any autocast, and in one that was not there at capture: bit for bit, gradients too."""
    model = kind()
    traced = capture(model, X)
    assert traced.modes_agree
    with torch.autocast("cpu", BF16, enabled=ambient):
        assert_same(model, traced, torch.randn(5, 4))


def test_exact_regions_are_exact_under_bfloat16() -> None:
    model = Exact()
    local = to_local(model, X, method="bp", cuts=["first"])
    seen: list[torch.dtype] = []
    model.mid.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", BF16):
        found = local(X)
        expected = model(X)
    assert seen == [torch.float32, torch.float32]
    assert torch.equal(found, expected)
    assert not torch.equal(found.float(), model(X))  # the other layers were cast


def test_a_region_around_everything_can_be_cut() -> None:
    model = Around()
    local = to_local(model, X, method="bp", parts=3)
    assert len(local.parts) == 3
    output = local(X)
    assert output.dtype is BF16
    assert torch.equal(output, model(X))


AGAIN = [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("again", AGAIN, ids=["copy", "pickle"])
def test_parts_with_regions_are_copied(kind: type[Base], again: Callable[[Any], Any]) -> None:
    model = kind()
    local = to_local(model, X, method="bp", parts=2)
    value = local.parts[0](X)
    upper = again(local.parts[1])
    assert torch.equal(upper(value), local.parts[1](value))
    with torch.autocast("cpu", BF16):
        assert torch.equal(upper(value), local.parts[1](value))


def test_switched_by_another_way_is_refused() -> None:
    """Past ``torch.autocast``, whose contexts are noticed."""

    class Switches(Base):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_autocast_enabled("cpu", True)
            try:
                return self.last(self.first(x)).float()
            finally:
                torch.set_autocast_enabled("cpu", False)

    with pytest.raises(TraceError, match=r"test_regions.py:\d+.*autocast is switched"):
        capture(Switches(), X)


def test_regions_inside_leaves_are_their_own_business() -> None:
    class Leaf(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                return super().forward(x).float()

    model = nn.Sequential(nn.Linear(4, 4), Leaf(4, 4), nn.Linear(4, 2))
    traced = capture(model, X)
    assert [n.op for n in traced.train_graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert_same(model, traced, X)


def test_an_ambient_autocast_at_capture_is_not_a_region() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.autocast("cpu", BF16):
        traced = capture(model, X)
    assert runner(traced, True)(X).dtype is torch.float32
    assert run_graph(traced, [X], training=True).dtype is torch.float32


def test_the_innermost_region_of_a_device_counts() -> None:
    regions = Regions(torch.device("cpu"))
    context = torch.amp.autocast_mode.autocast
    own = context.__enter__, context.__exit__
    with regions.noticed(lambda: True):
        with torch.autocast("cpu", BF16), torch.autocast("cuda", torch.float16, enabled=False):
            assert regions.here == ((HERE, True, BF16), ("cuda", False, torch.float16))
            with torch.autocast("cpu", enabled=False):
                assert regions.here[0][:2] == (HERE, False)
                assert regions.account_for_state()
            torch.set_autocast_enabled("cpu", False)
            assert not regions.account_for_state()
        assert regions.here == ()
        assert regions.account_for_state()
    assert (context.__enter__, context.__exit__) == own
    with regions.noticed(lambda: False), torch.autocast("cpu", BF16):
        assert regions.here == ()


def test_equal_calls_in_equal_regions() -> None:
    """What the graphs of both modes are compared by."""
    one = InAutocast(torch.mm, ((HERE, True, BF16),))
    assert one == InAutocast(torch.mm, ((HERE, True, BF16),))
    assert hash(one) == hash(InAutocast(torch.mm, ((HERE, True, BF16),)))
    assert one != InAutocast(torch.mm, ((HERE, False, BF16),))
    assert one != InAutocast(torch.matmul, ((HERE, True, BF16),))
    assert InAutocast(Method("matmul"), ()) == InAutocast(Method("matmul"), ())
    assert Method("matmul") != Method("mm")
    assert one(X, X.T).dtype is BF16
