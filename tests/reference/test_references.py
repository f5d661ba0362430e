"""The references agree with each other, and with plain autograd, where methods coincide."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.heads.sites import CLASSES, assert_same_grads, data, mlp_parts
from tests.reference import bp, early_exit, joint, lct, nwise, scpl


@pytest.fixture
def model():
    parts = mlp_parts(widths=(6, 8, 7, CLASSES))
    heads = [nn.Linear(8, CLASSES).double(), nn.Linear(7, CLASSES).double(), None]
    return parts, heads, *data()


def twice(model):
    parts, heads, x, y = model
    return [(*copy.deepcopy((parts, heads)), x, y) for _ in range(2)]


def same(one, two, heads=True):
    for a, b in zip(one[0], two[0], strict=True):
        assert_same_grads(a, b)
    for a, b in zip(one[1][:-1], two[1][:-1], strict=True):
        if heads:
            assert_same_grads(a, b)


def test_bp_is_autograd(model):
    parts, _, x, y = model
    slow = copy.deepcopy(parts)
    bp.step(parts, x, y)
    F.cross_entropy(nn.Sequential(*slow)(x), y).backward()
    for a, b in zip(parts, slow, strict=True):
        assert_same_grads(a, b)


@pytest.mark.parametrize("gradient", ["furthest", "sum"])
def test_one_wise_is_early_exit(model, gradient):
    one, two = twice(model)
    losses = nwise.step(*one, reach=1, gradient=gradient)
    torch.testing.assert_close(losses, early_exit.step(*two))
    same(one, two)


def test_k_wise_is_bp_for_the_parts(model):
    one, two = twice(model)
    nwise.step(*one, reach=3)
    bp.step(two[0], *two[2:])
    same(one, two, heads=False)


def test_k_wise_summed_is_joint(model):
    one, two = twice(model)
    nwise.step(*one, reach=3, gradient="sum")
    joint.step(*two)
    same(one, two)


def test_two_wise_by_hand(model):
    (parts, heads, x, y), _ = twice(model)
    nwise.step(parts, heads, x, y, reach=2)
    h1 = parts[0](x)
    h2 = parts[1](h1)
    second = F.cross_entropy(heads[1](h2), y)
    third = F.cross_entropy(parts[2](h2), y)
    lowest, middle = parts[0][0].weight, parts[1][0].weight
    torch.testing.assert_close(lowest.grad, torch.autograd.grad(second, lowest, retain_graph=True)[0])
    torch.testing.assert_close(middle.grad, torch.autograd.grad(third, middle)[0])


def test_lct_trains_parts_as_early_exit_does_and_critics_otherwise(model):
    one, two = twice(model)
    lct.step(*one)
    early_exit.step(*two)
    same(one, two, heads=False)
    assert not torch.allclose(one[1][0].weight.grad, two[1][0].weight.grad)


def test_scpl_without_contrast_trains_the_top_alone(model):
    parts, _, x, y = model
    zero = [lambda hidden: torch.ones_like(hidden) + 0 * hidden] * 3
    scpl.step(parts, zero, x, y)
    assert all(float(p.grad.abs().sum()) < 1e-12 for p in parts[0].parameters())
    assert float(parts[2][0].weight.grad.abs().sum()) > 0
