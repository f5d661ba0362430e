"""Local critics: who learns from what, and the papers' parameter counts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localize.errors import MethodError
from localize.heads.base import TaskHead
from localize.heads.lct import LCT, Critic
from localize.task import Task
from tests.heads.sites import CLASSES, assert_same_grads, build_heads, data, make_site, mlp_parts
from tests.reference import lct as reference


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("channels", "size", "classes", "millions"),
    [
        (256, 32, 10, 1.61),  # ResNet-50, Sub_1 to Sub_3
        (512, 16, 10, 0.92),
        (1024, 8, 10, 1.26),
        (256, 32, 100, 13.40),
        (512, 16, 100, 3.87),
        (1024, 8, 100, 2.00),
    ],
)
def test_table_viii_cifar_critics(channels, size, classes, millions):
    site = make_site(shape=(2, channels, size, size), layout="map", task=Task("classification", classes))
    with torch.device("meta"):
        critic = LCT(pool="flatten").build_head(site)
    assert count(critic) / 1e6 == pytest.approx(millions, abs=0.006)
    if classes == 10:
        with torch.device("meta"):
            assert count(LCT().build_head(site)) == count(critic)


@pytest.mark.parametrize(("channels", "millions"), [(256, 0.25), (512, 0.40), (1024, 0.69)])
def test_table_viii_imagenet_critics(channels, millions):
    site = make_site(shape=(2, channels, 14, 14), layout="map", task=Task("classification", 1000))
    with torch.device("meta"):
        critic = LCT(critic="imagenet").build_head(site)
    assert count(critic) / 1e6 == pytest.approx(millions, abs=0.006)


def test_large_maps_are_pooled_before_the_convolution():
    site = make_site(shape=(2, 8, 64, 64), layout="map")
    critic = LCT().build_head(site)
    assert [m.in_features for m in critic.modules() if isinstance(m, nn.Linear)] == [128 * 64]
    assert critic.predictor()(torch.randn(3, 8, 64, 64)).shape == (3, CLASSES)
    whole = LCT(pool="flatten").build_head(site)
    assert [m.in_features for m in whole.modules() if isinstance(m, nn.Linear)] == [128 * 64 * 64]


def test_the_paper_s_critic_has_a_convolution_without_bias():
    critic = LCT().build_head(make_site(shape=(2, 8, 4, 4), layout="map"))
    (conv,) = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert conv.bias is None
    assert tuple(conv.weight.shape) == (128, 8, 3, 3)


def test_the_imagenet_critic_averages_its_last_convolution():
    critic = LCT(critic="imagenet").build_head(make_site(shape=(2, 8, 4, 4), layout="map"))
    first, second, linear = (m for m in critic.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    x = torch.randn(3, 8, 4, 4)
    features = second(first(x).relu()).relu()
    by_hand = F.conv2d(features, linear.weight[:, :, None, None], linear.bias).mean((2, 3))
    torch.testing.assert_close(critic.predictor()(x), by_hand)


@pytest.mark.parametrize(("shape", "layout"), [((2, 8), "vector"), ((2, 5, 8), "tokens")])
def test_linear_critics(shape, layout):
    critic = LCT().build_head(make_site(shape=shape, layout=layout))
    assert [tuple(p.shape) for p in critic.parameters()] == [(CLASSES, 8), (CLASSES,)]


def test_a_critic_a_step_for_language_models():
    critic = LCT().build_head(make_site(shape=(2, 5, 8), layout="tokens", task=Task("causal_lm", CLASSES)))
    out = critic(torch.randn(2, 5, 8), critic.example_target(2, "cpu"))
    assert out.logits.shape == (2, 5, CLASSES)
    assert out.per_sample.shape == (2,)


def test_the_last_part_says_every_sample_s_loss():
    head = LCT().build_head(make_site(number=2))
    assert isinstance(head, TaskHead)
    logits, labels = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(
        head(logits, labels).per_sample, F.cross_entropy(logits, labels, reduction="none")
    )


def test_feedback_loss_by_hand():
    critic = LCT().build_head(make_site())
    out = critic(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    feedback = torch.tensor([1.0, 0.0, 5.0, 2.0])
    expected = sum(abs(f - e) for f, e in zip(feedback.tolist(), out.per_sample.tolist(), strict=True)) / 4
    assert critic.feedback_loss(out, feedback).item() == pytest.approx(expected)


def test_a_critic_learns_from_feedback_alone_and_its_part_from_its_loss_alone():
    """What a stage does: ∂loss/∂leaf for the part, then the feedback loss for the critic's weights."""
    part = nn.Linear(6, 8)
    critic = LCT().build_head(make_site())
    hidden = part(torch.randn(4, 6))
    leaf = hidden.detach().requires_grad_()
    out = critic(leaf, torch.tensor([0, 1, 2, 0]))
    (delta,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    hidden.backward(delta)
    assert part.weight.grad is not None
    assert all(p.grad is None for p in critic.parameters())
    before = part.weight.grad.clone()
    upper = torch.rand(4, requires_grad=True)
    critic.feedback_loss(out, upper).backward(inputs=list(critic.parameters()))
    assert all(p.grad is not None for p in critic.parameters())
    assert torch.equal(part.weight.grad, before)
    assert leaf.grad is None
    assert upper.grad is None


def test_optimizers_are_separate():
    assert LCT().separate_head_optimizer
    assert LCT().head_learning_rate == 1e-4
    assert LCT().feedback == "loss"
    assert LCT().predicts == "exits"


def test_a_custom_loss_is_refused_early():
    task = Task("classification", CLASSES, loss_fn=lambda a, b: a.sum())
    with pytest.raises(MethodError, match=r"sample by sample.*nwise"):
        LCT().build_head(make_site(task=task))
    assert LCT().build_head(make_site(number=1, parts=1, task=task)) is not None


@pytest.mark.parametrize("critic", ["conv", "imagenet"])
def test_critics_that_need_a_map_say_so(critic):
    with pytest.raises(MethodError, match=r"from a map.*critic='linear'"):
        LCT(critic=critic).build_head(make_site())


def test_heads_equal_the_reference():
    """The stage's order of things on plain modules, against the reference."""
    parts, heads = mlp_parts(widths=(6, 8, 7, CLASSES)), build_heads(LCT(), (8, 7, CLASSES))
    slow_parts, slow_heads = copy.deepcopy((parts, heads))
    x, y = data()
    outputs, hidden = [], x
    for part, head in zip(parts, heads, strict=True):
        hidden = part(hidden.detach())
        leaf = hidden.detach().requires_grad_()
        outputs.append(head(leaf, y))
        (delta,) = torch.autograd.grad(outputs[-1].loss, leaf, retain_graph=True)
        hidden.backward(delta)
    for below, head, above in zip(outputs, heads[:-1], outputs[1:], strict=False):
        assert isinstance(head, Critic)
        head.feedback_loss(below, above.per_sample.detach()).backward(inputs=list(head.parameters()))
    expected = reference.step(slow_parts, [h.predictor() for h in slow_heads], x, y)
    torch.testing.assert_close(torch.stack([o.loss.detach() for o in outputs]), torch.stack(expected))
    for fast, slow in zip([*parts, *heads], [*slow_parts, *slow_heads], strict=True):
        assert_same_grads(fast, slow)
