"""What cannot be captured is refused with place and reason, and leaves the model as it was."""

from __future__ import annotations

import random
import threading

import numpy
import pytest
import torch
from torch import Tensor, nn

from localize.convert.record import trace
from localize.errors import ConfigError, TraceError
from tests.convert.recording import CALL, assert_same, assert_untouched, capture, state_of


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)


class BranchesOnValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        return x if x.sum().item() > 0 else -x


class UsesNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.from_numpy(numpy.ones(4, dtype="float32"))


class DrawsInPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if random.random() < 0.5 else self.norm(self.layer(x))


class Switches(Base):
    """Past ``torch.autocast``, whose regions are followed."""

    def forward(self, x: Tensor) -> Tensor:
        torch.set_autocast_enabled("cpu", True)
        try:
            return self.layer(x).float()
        finally:
            torch.set_autocast_enabled("cpu", False)


class Fails(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        raise RuntimeError("no such thing")


class SideChannel(Base):
    def __init__(self) -> None:
        super().__init__()

        class Keeper(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                self.kept = [x.exp()]  # in a list: which of its tensors is meant cannot be told
                return super().forward(x)

        self.keeper = Keeper(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.keeper(x) + self.keeper.kept[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (BranchesOnValue, ["test_record_errors.py:", "root module", "item", "of their own"]),
        (UsesNumpy, ["test_record_errors.py:", "root module", "recorder cannot see"]),
        (DrawsInPython, ["test_record_errors.py:", "root module", "random numbers of Python"]),
        (Switches, ["test_record_errors.py:", "root module", "autocast"]),
        (Fails, ["own forward fails", "RuntimeError: no such thing", "train mode"]),
        (SideChannel, ["test_record_errors.py:", "side channel"]),
    ],
)
def test_refused_at_the_root(model: type[nn.Module], words: list[str]) -> None:
    network, x = model(), torch.randn(3, 4)
    before = state_of(network)
    with pytest.raises(TraceError) as caught:
        trace(network, (x,), {})
    for word in words:
        assert word in str(caught.value)
    assert_untouched(network, before)


@pytest.mark.parametrize("model", [BranchesOnValue, UsesNumpy, DrawsInPython, Switches, SideChannel])
def test_kept_whole_below_the_root(model: type[nn.Module]) -> None:
    network = nn.Sequential(nn.Linear(4, 4), model(), nn.Linear(4, 2))
    random.seed(1)
    traced = capture(network, torch.randn(3, 4))
    assert [str(n.target) for n in traced.train_graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    if model is not DrawsInPython:
        assert_same(network, traced, torch.randn(5, 4))


def test_reassigned_attribute_keeps_the_module_whole() -> None:
    class Counts(Base):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(self.layer(x)) * self.calls

    network = nn.Sequential(Counts(), nn.Linear(4, 2))
    traced = capture(network, torch.randn(3, 4))
    assert "calls" in traced.notes[0]
    assert "calls" not in vars(network[0])


def test_batch_of_one_and_batch_norm() -> None:
    with pytest.raises(TraceError, match="batch of at least 2"):
        trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (torch.randn(1, 4),), {})


def test_wrong_call() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        trace(nn.Linear(2, 2), (torch.randn(1, 2), torch.randn(1, 2)), {})
    with pytest.raises(TraceError, match="no tensor"):
        trace(nn.Linear(2, 2), (3,), {})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_lazy_and_scripted() -> None:
    with pytest.raises(TraceError, match="no shape yet"):
        trace(nn.Sequential(nn.LazyLinear(3)), (torch.randn(2, 4),), {})
    with pytest.raises(TraceError, match="scripted"):
        trace(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), (torch.randn(2, 2),), {})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_scripted_submodule_is_a_leaf() -> None:
    network = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    traced = capture(network, torch.randn(2, 4))
    assert [n.target for n in traced.train_graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert_same(network, traced, torch.randn(3, 4))


def test_other_threads_are_not_recorded() -> None:
    other = nn.Linear(4, 4)

    class Threaded(Base):
        def forward(self, x: Tensor) -> Tensor:
            worker = threading.Thread(target=lambda: other(torch.ones(1, 4)))
            worker.start()
            worker.join()
            return self.norm(self.layer(x))

    traced = capture(Threaded(), torch.randn(3, 4))
    assert [n.target for n in traced.train_graph.nodes if n.op == "call_module"] == ["layer", "norm"]
    assert nn.Module.__call__ is CALL
