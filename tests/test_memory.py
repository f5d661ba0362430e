"""On one device, activations take the room of the largest part, not of the sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from localize import get_method, to_local
from localize.runtime.memory import SavedBytes

DEPTH = 8


def tower() -> nn.Module:
    """Eight equal layers: what they save can be counted by hand."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 4))


X, Y = torch.randn(32, 64), torch.randint(0, 4, (32,))
LAYER_BYTES = 32 * 64 * 4  # the output of one Tanh


def peak(local) -> int:
    tensors = [*local.parameters(), *local.buffers()]
    optimizers = local.optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
    with SavedBytes(exclude=tensors) as saved:
        local.train_step(X, Y, optimizers)
    assert saved.bytes == 0, "everything is released at the end of a step"
    return saved.peak_bytes


def test_counter_counts_each_storage_once_and_forgets():
    x = torch.randn(10, 10, requires_grad=True)
    with SavedBytes(exclude=[x]) as saved:
        y = x.exp()  # saves its output
        z = y * y  # saves it again, twice
        assert saved.bytes == 400
        z.sum().backward()
    assert (saved.bytes, saved.peak_bytes) == (0, 400)


def test_end_to_end_holds_everything():
    assert peak(to_local(tower(), X, method="bp", parts=4)) >= (DEPTH - 1) * LAYER_BYTES


@pytest.mark.parametrize("method", ["early_exit", "nwise-1", "scpl", "al", "lct"])
def test_reach_one_holds_one_part(method):
    method = get_method("nwise", reach=1) if method == "nwise-1" else get_method(method)
    whole = peak(to_local(tower(), X, method="bp", parts=1))
    local = to_local(tower(), X, method=method, cuts=["5", "9", "11"])
    predicted = max(p.total.saved_bytes for p in local.plan.parts)
    found = peak(local)
    assert found <= 1.01 * predicted
    heads = max(p.head.saved_bytes for p in local.plan.parts)
    assert found - heads < 0.5 * whole


def test_windows_of_n_parts():
    """Eight parts of one layer: reach n holds n of them, and one that is being computed."""
    cuts = [str(2 * i + 1) for i in range(DEPTH - 1)]
    peaks = [peak(to_local(tower(), X, method=get_method("nwise", reach=n), cuts=cuts)) for n in (1, 2, 4, 8)]
    assert peaks == sorted(peaks)
    for n, found in zip((1, 2, 4, 8), peaks, strict=True):
        assert found <= (n + 1.1) * LAYER_BYTES


def test_isolated_losses_release_too():
    local = to_local(tower(), X, method="early_exit", parts=4)
    with SavedBytes(exclude=[*local.parameters()]) as saved:
        sum(local.losses(X, Y)).backward()
    assert saved.peak_bytes < 0.5 * DEPTH * LAYER_BYTES


def test_gradients_too_can_be_released_part_by_part():
    local = to_local(tower(), X, method="early_exit", parts=4)
    optimizers = local.optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
    local.train_step(X, Y, optimizers)
    assert all(p.grad is not None for p in local.parameters())
    local.train_step(X, Y, optimizers, keep_grads=False)
    assert all(p.grad is None for p in local.parameters())
