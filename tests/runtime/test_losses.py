"""Isolated losses and the hooks on parameters: each hook acts once, as in the model's own backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import LocalModel, get_method, to_local

X, Y = torch.randn(6, 4), torch.randint(0, 3, (6,))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def capped(grad: Tensor) -> Tensor:
    """Not linear: on a part of the gradient, or on one that it was applied to already, it is another one."""
    return grad.clamp(-1e-3, 2e-3) * 0.1


def hooked(local: LocalModel) -> list[int]:
    """Hooks on all weights of the parts; how often each was called."""
    calls = [0] * len(list(local.parts.parameters()))

    def hook(grad: Tensor, index: int) -> Tensor:
        calls[index] += 1
        return capped(grad)

    for index, parameter in enumerate(local.parts.parameters()):
        parameter.register_hook(lambda grad, index=index: hook(grad, index))
    return calls


def gradients(local: LocalModel) -> list[Tensor]:
    return [p.grad.clone() for p in local.parts.parameters() if p.grad is not None]


def test_hooks_act_as_in_the_models_own_backward() -> None:
    plain, cut = model(), model()
    local = to_local(cut, X, method="bp", parts=2)
    calls = hooked(local)
    for parameter in plain.parameters():
        parameter.register_hook(capped)
    (2 * F.cross_entropy(plain(X), Y)).backward()
    (2 * sum(local.losses(X, Y))).backward()
    assert set(calls) == {1}
    for one, other in zip(plain.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("method", ["bp", "early_exit", "scpl", "lct", "al", "nwise"])
def test_hooks_act_once_in_losses_and_in_train_step(method: str) -> None:
    rule: Any = get_method("nwise", reach=2) if method == "nwise" else method
    joint, stepped = (to_local(model(), X, method=rule, cuts=["1", "3"]) for _ in range(2))
    stepped.load_state_dict(joint.state_dict())
    once, again = hooked(joint), hooked(stepped)
    sum(joint.losses(X, Y)).backward()
    stepped.train_step(X, Y, stepped.optimizers(lambda p: torch.optim.SGD(p, lr=0.0)))
    assert set(once) == set(again) == {1}
    for one, other in zip(gradients(joint), gradients(stepped), strict=True):
        assert torch.equal(one, other)


def test_hooks_behind_the_gradient_run_once_and_see_it() -> None:
    local = to_local(model(), X, method="early_exit", cuts=["1", "3"])
    seen: list[Tensor] = []
    weight = next(local.parts[1].parameters())
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    losses = local.losses(X, Y)
    assert not seen
    sum(losses).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)
    handle.remove()
    sum(local.losses(X, Y)).backward()
    assert len(seen) == 1


class Breaks(torch.autograd.Function):
    """Its backward pass fails as long as it is told to."""

    broken = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        if Breaks.broken:
            raise ArithmeticError("broken")
        return grad


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Breaks.apply(x)


def test_hooks_survive_a_failure() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), Breaking(), nn.Linear(4, 3))
    local = to_local(layers, X, method="early_exit", cuts=["1"], verify=False)
    calls = hooked(local)
    with pytest.raises(ArithmeticError, match="broken"):
        local.losses(X, Y)
    assert not any(calls)
    Breaks.broken = False
    sum(local.losses(X, Y)).backward()
    assert set(calls) == {1}
