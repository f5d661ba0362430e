"""Associated Learning: three gradient flows by hand, every shortcut, what travels upward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localize.errors import MethodError
from localize.heads.al import AL
from localize.task import IGNORE_INDEX, Task
from tests.heads.sites import CLASSES, assert_same_grads, build_heads, data, make_site, mlp_parts
from tests.reference import al as reference

WIDTHS = (8, 7, 5)


def associated(heads):
    return [reference.Associated(h.reduce, h.encoder, h.decoder, h.bridge) for h in heads]


def run(parts, heads, x, y):
    """Parts and heads in order, each loss's backward on its own; what a stage does."""
    hidden, target, losses = x, y, []
    for part, head in zip(parts, heads, strict=True):
        hidden = part(hidden.detach())
        out = head(hidden, target)
        out.loss.backward()
        target = out.target
        losses.append(out.loss.detach())
    return losses


@pytest.mark.parametrize("with_classifier", [True, False])
@pytest.mark.parametrize("target_gradient", [False, True])
def test_one_backward_gives_the_three_flows(target_gradient, with_classifier):
    classifier = nn.Linear(5, CLASSES).double() if with_classifier else None
    parts = mlp_parts()
    heads = build_heads(AL(hidden=6, target_gradient=target_gradient), WIDTHS, classifier)
    slow_parts, slow_heads, slow_classifier = copy.deepcopy((parts, heads, classifier))
    x, y = data()
    losses = run(parts, heads, x, y)
    expected = reference.step(
        slow_parts, associated(slow_heads), x, y, CLASSES, slow_classifier, target_gradient=target_gradient
    )
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    for fast, slow in zip([*parts, *heads], [*slow_parts, *slow_heads], strict=True):
        assert_same_grads(fast, slow)
    if classifier is not None:
        assert_same_grads(classifier, slow_classifier)


@pytest.mark.parametrize("number", [1, 2])
def test_each_loss_reaches_only_its_own(number):
    """The head's loss taken apart: what L_A and L_AE each reach, through the graph of the one loss."""
    head = AL(hidden=6).build_head(make_site(number=number, parts=3))
    leaf = torch.randn(4, 8, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    target = labels if number == 1 else (torch.rand(4, 6), labels)
    below = F.one_hot(labels, CLASSES).float() if number == 1 else target[0]
    loss = head(leaf, target).loss
    loss.backward()
    code = head.encoder(below)
    bridged = head.bridge(leaf)
    decoded = head.decoder(code)
    association, bridge = F.mse_loss(bridged, code.detach()), list(head.bridge.parameters())
    reconstruction = F.cross_entropy(decoded, labels) if number == 1 else F.mse_loss(decoded, below)
    torch.testing.assert_close(loss, association + reconstruction)
    for p, g in zip(bridge, torch.autograd.grad(association, bridge), strict=True):
        torch.testing.assert_close(p.grad, g)
    own = [*head.encoder.parameters(), *head.decoder.parameters()]
    for p, g in zip(own, torch.autograd.grad(reconstruction, own), strict=True):
        torch.testing.assert_close(p.grad, g)
    association = F.mse_loss(head.bridge(leaf), code.detach())
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(association, leaf)[0])


def test_target_gradient_adds_the_association_to_the_encoder():
    plain = AL(hidden=6).build_head(make_site())
    paper = AL(hidden=6, target_gradient=True).build_head(make_site())
    paper.load_state_dict(plain.state_dict())
    hidden, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    for head in (plain, paper):
        head(hidden, labels).loss.backward()
    code = plain.encoder(F.one_hot(labels, CLASSES).float())
    weights = list(plain.encoder.parameters())
    extra = torch.autograd.grad(F.mse_loss(plain.bridge(hidden), code), weights)
    for a, b, more in zip(weights, paper.encoder.parameters(), extra, strict=True):
        torch.testing.assert_close(b.grad, a.grad + more)
    for a, b in zip(plain.bridge.parameters(), paper.bridge.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def test_what_travels_upward_is_detached_code_and_labels():
    first, second = build_heads(AL(hidden=6), (8, 7))
    labels = torch.tensor([0, 1, 2])
    code, same = first(torch.randn(3, 8, dtype=torch.float64), labels).target
    assert code.shape == (3, 6)
    assert not code.requires_grad
    assert same is labels
    torch.testing.assert_close(code, first.encoder(F.one_hot(labels, CLASSES).double()).detach())
    out = second(torch.randn(3, 7, dtype=torch.float64), (code, labels))
    assert out.logits is None
    assert out.target[0].shape == (3, 6)


def test_a_code_with_a_graph_does_not_let_gradients_down():
    second = AL(hidden=6).build_head(make_site(number=2, parts=3))
    code = torch.randn(3, 6, requires_grad=True)
    second(torch.randn(3, 8), (code, torch.tensor([0, 1, 2]))).loss.backward()
    assert code.grad is None


def test_a_wrong_target_names_where_the_right_one_comes_from():
    second = AL(hidden=6).build_head(make_site(number=2, parts=3))
    with pytest.raises(MethodError, match=r"head 2 is \(code, labels\), which head 1 hands on"):
        second(torch.randn(3, 8), torch.tensor([0, 1, 2]))


def test_every_shortcut_is_the_path_by_hand():
    parts, method = mlp_parts(), AL(hidden=6)
    heads = build_heads(method, WIDTHS)
    x, _ = data()
    hidden = x
    for exit, part in enumerate(parts, start=1):
        hidden = part(hidden)
        predictor = method.predictor(heads[:exit])
        logits = predictor(hidden)
        assert logits.shape == (len(x), CLASSES)
        torch.testing.assert_close(logits, reference.predict(parts, associated(heads), x, exit))
        used = {id(p) for p in predictor.parameters()}
        for k, head in enumerate(heads, start=1):
            assert used.isdisjoint(map(id, head.encoder.parameters()))
            assert used.issuperset(map(id, head.decoder.parameters())) == (k <= exit)
            assert used.issuperset(map(id, head.bridge.parameters())) == (k == exit)


def test_the_first_decoder_gives_logits_without_a_cap():
    heads = build_heads(AL(hidden=6), WIDTHS)
    assert [type(m) for m in heads[0].decoder] == [nn.Linear]
    assert [type(m) for m in heads[1].decoder] == [nn.Linear, nn.Tanh]


def test_ignored_labels_change_nothing():
    x, y = data()
    padded = torch.cat([x, torch.randn(3, 6, dtype=torch.float64)])
    labels = torch.cat([y, torch.full((3,), IGNORE_INDEX)])
    parts, heads = mlp_parts(), build_heads(AL(hidden=6), WIDTHS)
    more_parts, more_heads = copy.deepcopy((parts, heads))
    torch.testing.assert_close(run(parts, heads, x, y), run(more_parts, more_heads, padded, labels))
    for one, two in zip([*parts, *heads], [*more_parts, *more_heads], strict=True):
        assert_same_grads(one, two)


def test_the_model_s_classifier_learns_on_detached_features():
    classifier = nn.Linear(8, CLASSES)
    method = AL(hidden=6)
    assert method.splits_classifier
    assert AL(keep_classifier=False).splits_classifier
    head = method.build_head(make_site(number=2, classifier=classifier))
    bare = method.build_head(make_site(number=2))
    bare.load_state_dict(head.state_dict())
    hidden = torch.randn(3, 8, requires_grad=True)
    target = (torch.rand(3, 6), torch.tensor([0, 1, 2]))
    with_it, without = head(hidden, target).loss, bare(hidden, target).loss
    torch.testing.assert_close(with_it, without + F.cross_entropy(classifier(hidden), target[1]))
    (one,) = torch.autograd.grad(with_it, hidden)
    (two,) = torch.autograd.grad(without, hidden)
    assert torch.equal(one, two)


def test_regression_meets_the_target_itself():
    task = Task("regression")
    method = AL(hidden=6)
    heads = [method.build_head(make_site(k, 2, task=task)) for k in (1, 2)]
    hidden, y = torch.randn(3, 8), torch.randn(3, 4)
    out = heads[0](hidden, y)
    code = heads[0].encoder(y)
    expected = F.mse_loss(heads[0].bridge(hidden), code) + F.mse_loss(heads[0].decoder(code), y)
    torch.testing.assert_close(out.loss, expected)
    heads[1](hidden, out.target).loss.backward()
    assert method.predictor(heads)(hidden).shape == (3, 4)


@pytest.mark.parametrize("kind", ["causal_lm", "segmentation"])
def test_dense_tasks_are_refused_with_a_method_that_works(kind):
    with pytest.raises(MethodError, match=f"the task is {kind}.*nwise"):
        AL().build_head(make_site(task=Task(kind, 3)))


@pytest.mark.parametrize("number", [1, 2])
def test_example_target_fits(number):
    head = AL(hidden=6).build_head(make_site(number=number, parts=3))
    assert head(torch.randn(5, 8), head.example_target(5, "cpu")).loss.isfinite()


def test_autocast_losses_are_float32():
    first = AL(hidden=6).build_head(make_site())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = first(torch.randn(3, 8), torch.tensor([0, 1, 2]))
    assert out.loss.dtype == torch.float32
