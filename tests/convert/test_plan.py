"""Planning as a whole: budgets are kept, and refusals say where and why."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from localize import list_methods, to_local
from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.traced import TracedModel
from localize.errors import CutError, MethodError, TraceError
from localize.heads.nwise import NWise
from localize.heads.registry import resolve_method
from localize.spec import BALANCES
from tests import zoo


@cache
def traced(name: str) -> TracedModel:
    case = next(case for case in zoo.CASES if case.name == name)
    return trace(case.build(), (case.inputs(),), {})


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("model", ["mlp", "residual", "encoder"])
def test_no_part_of_auto_exceeds_the_budget(model: str, method: str, balance: str) -> None:
    """The number of parts came from their memory, but the cuts from the balance, which knew no budget."""
    planner = Planner(traced(model), resolve_method(method), balance)
    with pytest.raises(CutError, match="at least") as told:
        planner.choose("auto", None, 1)
    least = int(str(told.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    for budget in (least, round(1.3 * least), 2 * least, 10 * least):
        plan = planner.choose("auto", None, budget).plan
        assert max(part.total.of("memory") for part in plan.parts) <= budget


def test_refused_cuts_are_named_and_no_part_is_made_up() -> None:
    """The message once spoke of "part 2 of 3" where two parts were asked for."""
    planner = Planner(traced("mlp"), NWise(head="conv"), "flops")
    with pytest.raises(MethodError) as told:
        planner.choose(2, None, None)
    message = str(told.value)
    assert "of 3" not in message
    assert re.search(
        r"after '1', '3': Method 'nwise', hidden state N×16 \(vector\): head='conv' needs a map", message
    )


class Branches(nn.Module):
    """Two branches side by side, which meet at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.b = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.c = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = self.a(x)
        return self.c(left + self.b(x))


def test_a_loss_that_does_not_reach_its_part_is_refused() -> None:
    """Two-wise: part 1 learns from the loss of part 2, which stands on the other branch."""
    x = torch.randn(4, 8)
    with pytest.raises(MethodError, match=r"part 1 is trained by the loss of part 2, which does not depend"):
        to_local(Branches(), x, method="nwise", cuts=["a.1", "b.1"])
    to_local(Branches(), x, method="bp", cuts=["a.1", "b.1"])  # its one loss reaches everything


def test_models_without_data_are_planned() -> None:
    """A model that is too large to run can be converted on the meta device."""
    with torch.device("meta"):
        model, x = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(8)]), torch.empty(2, 4096)
    plan = to_local(model, x, method="bp", parts=4, task="regression").plan
    assert [part.part.param_bytes for part in plan.parts] == [4 * 2 * (4096 * 4096 + 4096)] * 4
    assert any("not compared" in note for note in plan.notes)


class TooLarge(nn.Sequential):
    """Runs on fake tensors only, as a model does whose activations no device has room for."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x.view(x.shape[0], -1))


def test_the_device_that_tensors_are_made_on_by_default_is_the_users_business() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        local = to_local(model, torch.randn(4, 8), method="early_exit", parts=2)
    assert local.plan.cuts == to_local(model, torch.randn(4, 8, device="meta"), method="early_exit", parts=2).plan.cuts
    assert {p.device.type for p in local.parameters()} == {"meta"}


def test_models_too_large_to_run_are_captured_without_data() -> None:
    torch.manual_seed(0)
    model = TooLarge(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    local = to_local(model, torch.randn(4, 2, 4), method="bp", parts=3, task="regression")
    assert any("too large to run" in note for note in local.plan.notes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(6, 2, 4)
    torch.manual_seed(1)
    expected = nn.Sequential(*model)(x.flatten(1))
    torch.manual_seed(1)
    assert torch.equal(local(x), expected)


def test_real_failures_of_a_model_are_told_as_its_own() -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TraceError, match="out of memory"):
        to_local(nn.Sequential(Fails(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), parts=2)
