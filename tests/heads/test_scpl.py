"""The supervised contrastive loss against a double loop, and SCPL's head."""

import copy

import pytest
import torch
from torch import nn

from localize.errors import MethodError
from localize.heads.base import TaskHead
from localize.heads.scpl import SCPL, supervised_contrastive_loss
from localize.task import IGNORE_INDEX, Task
from tests.heads.sites import assert_same_grads, build_heads, data, make_site, mlp_parts
from tests.reference import scpl as reference


def batch(n=12, d=5, classes=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = scale * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("normalizer", ["reference", "khosla"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("n", "classes"), [(2, 1), (2, 5), (12, 3), (9, 2), (7, 20)])
def test_loss_and_gradient_equal_the_double_loop(n, classes, temperature, normalizer):
    embeddings, labels = batch(n, classes=classes)
    fast = supervised_contrastive_loss(embeddings, labels, temperature, normalizer)
    slow = reference.contrastive_loss(embeddings, labels, temperature, normalizer)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    (fast_grad,) = torch.autograd.grad(fast, embeddings)
    (slow_grad,) = torch.autograd.grad(slow, embeddings)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-9, atol=1e-11)


def test_a_value_by_hand():
    """Two samples of one class and one of another, all orthogonal: every similarity is 0."""
    loss = supervised_contrastive_loss(torch.eye(3), torch.tensor([0, 0, 1]))
    # anchors 0 and 1: one positive, log(2 others) over 1 + 1; anchor 2: 0
    assert loss.item() == pytest.approx(2 * (torch.log(torch.tensor(2.0)).item() / 2) / 3)
    khosla = supervised_contrastive_loss(torch.eye(3), torch.tensor([0, 0, 1]), normalizer="khosla")
    assert khosla.item() == pytest.approx(2 * loss.item())


@pytest.mark.parametrize("normalizer", ["reference", "khosla"])
def test_gradcheck(normalizer):
    embeddings, labels = batch(6)
    assert torch.autograd.gradcheck(
        lambda e: supervised_contrastive_loss(e, labels, 0.5, normalizer), embeddings
    )


def test_no_positives_no_loss():
    embeddings, _ = batch(5)
    loss = supervised_contrastive_loss(embeddings, torch.arange(5))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_one_sample_gives_zero_with_a_gradient():
    embeddings, labels = batch(1)
    loss = supervised_contrastive_loss(embeddings, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_anchors_without_positives_still_push_the_others():
    embeddings, _ = batch(4)
    labels = torch.tensor([0, 0, 1, 2])
    (grad,) = torch.autograd.grad(supervised_contrastive_loss(embeddings, labels), embeddings)
    assert grad[2].abs().sum() > 0


def test_order_of_the_batch_does_not_matter():
    embeddings, labels = batch()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        supervised_contrastive_loss(embeddings, labels),
        supervised_contrastive_loss(embeddings[order], labels[order]),
    )


def test_names_and_lengths_do_not_matter():
    """Only equality of labels and directions of embeddings count."""
    embeddings, labels = batch()
    loss = supervised_contrastive_loss(embeddings, labels)
    torch.testing.assert_close(loss, supervised_contrastive_loss(embeddings * 7, 2 - labels))


def test_two_views_double_the_batch():
    embeddings, labels = batch()
    double = supervised_contrastive_loss(torch.cat([embeddings, embeddings]), torch.cat([labels, labels]))
    assert torch.isfinite(double)


def test_ignored_samples_take_no_part():
    embeddings, labels = batch(8)
    padded = torch.cat([embeddings, torch.ones(3, 5, dtype=torch.float64)])
    ignored = torch.cat([labels, torch.full((3,), IGNORE_INDEX)])
    torch.testing.assert_close(
        supervised_contrastive_loss(padded, ignored), supervised_contrastive_loss(embeddings, labels)
    )
    all_ignored = supervised_contrastive_loss(embeddings, torch.full((8,), IGNORE_INDEX))
    assert all_ignored.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_half_precision_does_not_overflow(dtype, temperature):
    """Algorithm 1 as printed takes exp(1/τ) without the row maximum: inf in half precision below τ = 0.09."""
    wide, labels = batch(16, 8, scale=1000.0)
    embeddings = wide.detach().to(dtype).requires_grad_()
    loss = supervised_contrastive_loss(embeddings, labels, temperature)
    loss.backward()
    exact = supervised_contrastive_loss(embeddings.detach().double(), labels, temperature)
    assert loss.dtype == torch.float32
    assert torch.isfinite(embeddings.grad).all()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_lower_the_precision():
    wide, labels = batch(16, 8)
    embeddings = wide.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = supervised_contrastive_loss(embeddings, labels)
    assert torch.equal(inside, supervised_contrastive_loss(embeddings, labels))


def test_a_dry_run_on_the_meta_device():
    loss = supervised_contrastive_loss(torch.randn(4, 3, device="meta"), torch.zeros(4, device="meta").long())
    assert loss.shape == ()


def test_shapes_that_do_not_fit():
    with pytest.raises(MethodError, match=r"\(4, 3\) and \(5,\)"):
        supervised_contrastive_loss(torch.zeros(4, 3), torch.zeros(5).long())
    with pytest.raises(MethodError, match="temperature=-1"):
        supervised_contrastive_loss(torch.zeros(4, 3), torch.zeros(4).long(), temperature=-1)


def test_projectors_and_their_widths():
    head = SCPL().build_head(make_site(shape=(2, 4, 8, 8), layout="map"))
    assert [tuple(p.shape) for p in head.projector.parameters()] == [(512, 256), (512,), (1024, 512), (1024,)]
    large = SCPL().build_head(make_site(shape=(2, 64, 32, 32), layout="map"))
    assert large.projector[0].in_features == 64 * 11 * 11
    paper = SCPL(pool="flatten", hidden=8, projection=4).build_head(
        make_site(shape=(2, 64, 32, 32), layout="map")
    )
    assert paper.projector[0].in_features == 65536
    assert isinstance(SCPL().build_head(make_site(shape=(2, 5, 8), layout="tokens")).projector, nn.Identity)
    assert isinstance(SCPL(projector="identity").build_head(make_site()).projector, nn.Identity)
    tokens = SCPL(projector="mlp").build_head(make_site(shape=(2, 5, 8), layout="tokens"))
    assert tokens.projector[0].in_features == 8


def test_last_part_trains_the_classifier_and_not_through_it():
    classifier = nn.Linear(8, 3)
    hidden, labels = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    head = SCPL().build_head(make_site(number=2, classifier=classifier))
    out = head(hidden, labels)
    contrast = supervised_contrastive_loss(head.projector(hidden), labels)
    (expected,) = torch.autograd.grad(contrast, hidden)
    out.loss.backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert classifier.weight.grad is not None
    assert torch.equal(out.logits, classifier(hidden))

    joint = SCPL(classifier="joint").build_head(make_site(number=2, classifier=classifier))
    joint.load_state_dict(head.state_dict())
    (both,) = torch.autograd.grad(joint(hidden, labels).loss, hidden)
    (cross,) = torch.autograd.grad(nn.functional.cross_entropy(classifier(hidden), labels), hidden)
    torch.testing.assert_close(both, expected + cross)


def test_the_classifier_belongs_to_the_part():
    part = nn.ModuleDict({"body": nn.Linear(4, 8), "top": nn.Linear(8, 3)})
    head = SCPL().build_head(make_site(number=2, classifier=part["top"]))
    assert not any("classifier" in n or "top" in n for n, _ in head.named_parameters())
    assert set(map(id, head.parameters())).isdisjoint(map(id, part.parameters()))
    part_copy, head_copy = copy.deepcopy((part, head))
    assert head_copy.site.classifier is part_copy["top"]
    assert head.site.classifier is part["top"]


def test_a_part_that_is_nothing_but_classifier_learns_from_the_task():
    assert isinstance(SCPL().build_head(make_site(number=2)), TaskHead)


def test_intermediate_exits_do_not_predict():
    head = SCPL().build_head(make_site())
    assert SCPL().predicts == "none"
    assert SCPL().predictor([head]) is None
    assert head(torch.randn(4, 8), torch.tensor([0, 1, 0, 1])).logits is None


@pytest.mark.parametrize("kind", ["regression", "causal_lm", "segmentation"])
def test_other_tasks_are_refused_with_a_method_that_works(kind):
    with pytest.raises(MethodError, match=f"the task is {kind}.*nwise") as error:
        SCPL().build_head(make_site(number=2, parts=4, task=Task(kind, 3)))
    assert "part 2 of 4" in str(error.value)


@pytest.mark.parametrize("mode", ["detached", "joint"])
@pytest.mark.parametrize("normalizer", ["reference", "khosla"])
def test_heads_equal_the_reference(mode, normalizer):
    method = SCPL(normalizer=normalizer, classifier=mode, hidden=4, projection=6)
    classifier = nn.Linear(5, 3).double()
    parts = mlp_parts()
    heads = build_heads(method, (8, 7, 5), classifier)
    slow_parts, slow_heads, slow_classifier = copy.deepcopy((parts, heads, classifier))
    x, y = data()
    hidden, losses = x, []
    for part, head in zip(parts, heads, strict=True):
        hidden = part(hidden.detach())
        losses.append(head(hidden, y).loss)
        losses[-1].backward()
    projections = [nn.Sequential(h.reduce, h.projector) for h in slow_heads]
    expected = reference.step(slow_parts, projections, x, y, slow_classifier, 0.1, normalizer, mode)
    torch.testing.assert_close(torch.stack(losses).detach(), torch.stack(expected))
    for fast, slow in zip(
        [*parts, *heads, classifier], [*slow_parts, *slow_heads, slow_classifier], strict=True
    ):
        assert_same_grads(fast, slow)


class Asked:
    """Another replica with a batch of its own, as the head sees it."""

    def __init__(self, embeddings, labels):
        self.others, self.own = (embeddings, labels), []

    def __call__(self, *rows):
        self.own.append([each.dtype for each in rows])
        return tuple(torch.cat(pair) for pair in zip(rows, self.others, strict=True))


def test_gathered_samples_are_contrasted_too():
    head = SCPL(across_replicas=True).build_head(make_site())
    apart = SCPL().build_head(make_site())
    apart.load_state_dict(head.state_dict())
    hidden, labels = torch.randn(5, 8), torch.tensor([0, 1, 0, 1, 2])
    assert torch.equal(head(hidden, labels).loss, apart(hidden, labels).loss)  # nobody to gather from

    others, theirs = torch.randn(3, 8), torch.tensor([2, 0, 1])
    with torch.no_grad():
        asked = Asked(head.projector(others), theirs)
    head.replicas = apart.replicas = asked
    whole = apart(hidden, labels).loss
    assert not asked.own  # without the option, nobody is asked
    found = head(hidden, labels).loss
    assert not torch.allclose(found, whole)
    apart.replicas = None
    torch.testing.assert_close(found, apart(torch.cat([hidden, others]), torch.cat([labels, theirs])).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(hidden, labels)
    assert asked.own == [[torch.float32, torch.int64]] * 2


def test_what_does_not_fit_is_told_before_others_are_asked():
    head = SCPL(across_replicas=True).build_head(make_site())
    head.replicas = asked = Asked(None, None)
    with pytest.raises(MethodError, match=r"\(4, 1024\) and \(3,\)"):
        head(torch.randn(4, 8), torch.zeros(3).long())
    assert not asked.own
