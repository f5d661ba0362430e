"""The promises that carry the toolkit, to the bit: transparency, isolation, released step = joint backward."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

from localize import get_method, list_methods, to_local
from tests.zoo import BATCH, BY_NAME, CASES, CLASSES, Case, build

METHODS = [
    get_method("bp"),
    get_method("scpl"),
    get_method("al"),
    get_method("nwise", reach=1),
    get_method("nwise", reach=2),
    get_method("nwise", reach=3, gradient="sum"),
    get_method("lct"),
    get_method("early_exit"),
    get_method("joint"),
]


def method_id(method) -> str:
    return "-".join([method.name, *(str(v) for v in method.options().values() if v in (1, 2, 3, "sum"))])


every_method = pytest.mark.parametrize("method", METHODS, ids=method_id)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def converted(case: Case, method, parts: int | None = None):
    model = build(case)
    torch.manual_seed(1)
    return to_local(model, case.inputs(), method=method, parts=parts or case.parts, task="classification")


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output


def test_every_method_of_the_package_is_tested_here():
    assert {m.name for m in METHODS} == set(list_methods())


@every_case
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_bp_in_parts_is_plain_training_bit_for_bit(case: Case, parts: int):
    plain, model = build(case), build(case)
    local = to_local(model, case.inputs(), method="bp", parts=parts, task="classification")
    reference, optimizers = sgd(plain.parameters()), local.optimizers(sgd)
    for step in range(4):
        x, y = case.inputs(BATCH - step % 2, seed=step), case.targets(BATCH - step % 2, seed=step)
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(logits_of(plain(x)), y)
        reference.zero_grad()
        loss.backward()
        reference.step()
        torch.manual_seed(step)
        result = local.train_step(x, y, optimizers)
        assert torch.equal(result.losses[-1], loss.detach())
    for (name, expected), found in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


@every_case
@every_method
def test_losses_are_isolated(case: Case, method):
    local = converted(case, method)
    losses = local.losses(case.inputs(), case.targets())
    total = len(local.parts)
    assert len(losses) == total
    for number, loss in enumerate(losses, 1):
        for other, part in enumerate(local.parts, 1):
            weights = [p for p in part.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
            if other not in method.trains(number, total):
                assert all(g is None for g in grads), f"loss {number} reaches part {other}"
    reached = torch.autograd.grad(sum(losses), list(local.parts.parameters()), allow_unused=True)
    unreached = [n for (n, _), g in zip(local.parts.named_parameters(), reached, strict=True) if g is None]
    untrained = {"aux.weight", "aux.bias"}  # a branch no loss reads
    assert not [n for n in unreached if n.split(".", 1)[1] not in untrained]


@pytest.mark.parametrize("name", ["mlp", "residual", "long_skip", "encoder"])
@every_method
def test_gradients_do_not_depend_on_what_is_out_of_reach(name, method):
    """Isolation seen from outside: other weights above the reach, and other heads, change nothing below."""
    case = BY_NAME[name]
    local = converted(case, method)
    changed = copy.deepcopy(local)
    total = len(local.parts)
    part = 1
    reached = {j for j in range(1, total + 1) if part in method.trains(j, total)}
    with torch.no_grad():
        for number in range(max(reached) + 1, total + 1):
            for p in [*changed.parts[number - 1].parameters(), *changed.grafts[str(number)].parameters()]:
                p.add_(torch.randn_like(p))
        for number in set(range(1, total)) - reached:
            if str(number) in changed.grafts:
                for p in changed.grafts[str(number)].parameters():
                    p.add_(torch.randn_like(p))
    for one in (local, changed):
        torch.manual_seed(4)
        sum(one.losses(case.inputs(), case.targets())).backward()
    pairs = zip(local.parts[part - 1].parameters(), changed.parts[part - 1].parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)


@every_case
@every_method
def test_released_step_is_the_joint_backward(case: Case, method):
    local = converted(case, method)
    other = copy.deepcopy(local)
    x, y = case.inputs(), case.targets()
    torch.manual_seed(7)
    losses = other.losses(x, y)
    sum(losses).backward()
    optimizers = local.optimizers(lambda p: torch.optim.SGD(p, lr=0.0), lambda p: torch.optim.SGD(p, lr=0.0))
    torch.manual_seed(7)
    result = local.train_step(x, y, optimizers)
    assert [float(v) for v in result.losses] == [float(v.detach()) for v in losses]
    for (name, one), (_, two) in zip(local.named_parameters(), other.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.equal(one.grad, two.grad), name
    for (name, one), (_, two) in zip(local.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(one, two), name


@every_case
@every_method
def test_output_is_the_model_s_own(case: Case, method):
    local = converted(case, method)
    model = local.to_standard().eval()
    local.eval()
    for batch in (BATCH, 3):
        x = case.inputs(batch, seed=5)
        with torch.no_grad(), representation_of(model) as below:
            expected = model(x)
            if method.name == "al":
                expected = associated_path(local.heads, below[0])
            assert torch.equal(expected, local(x))


@contextlib.contextmanager
def representation_of(model):
    """What the model's classifier is given: its last layer with one output a class."""
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES][-1]
    given = []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    yield given
    hook.remove()


def associated_path(heads, hidden):
    """AL's prediction (algorithm 3) by hand: over the top bridge, down through all decoders."""
    code = heads[-1].bridge(heads[-1].reduce(hidden))
    for head in reversed(heads):
        code = head.decoder(code)
    return code


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
def test_nwise_with_full_reach_is_bp(reach: int):
    case = BY_NAME["long_skip"]
    local = converted(case, get_method("nwise", reach=reach), parts=4)
    plain = build(case)
    nn.functional.cross_entropy(plain(case.inputs()), case.targets()).backward()
    sum(local.losses(case.inputs(), case.targets())).backward()
    same = [
        torch.equal(a.grad, b.grad)
        for a, b in zip(plain.parameters(), local.to_standard().parameters(), strict=True)
    ]
    assert all(same) == (reach == 4)


def test_losses_leave_earlier_gradients_alone():
    case = BY_NAME["mlp"]
    local = converted(case, get_method("scpl"))
    marks = {}
    for name, p in local.named_parameters():
        p.grad = marks[name] = torch.full_like(p, 3.0)
    losses = local.losses(case.inputs(), case.targets())
    assert all(p.grad is marks[name] for name, p in local.named_parameters())
    before = {name: p.grad.clone() for name, p in local.named_parameters()}
    (2 * sum(losses)).backward()
    alone = copy.deepcopy(local)
    for p in alone.parameters():
        p.grad = None
    sum(alone.losses(case.inputs(), case.targets())).backward()
    for (name, p), q in zip(local.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, before[name] + 2 * q.grad), name


@every_method
def test_no_gradients_are_computed_under_no_grad(method):
    local = converted(BY_NAME["cnn"], method)
    with torch.no_grad():
        losses = local.losses(BY_NAME["cnn"].inputs(), BY_NAME["cnn"].targets())
    assert not any(loss.requires_grad for loss in losses)
    assert all(p.grad is None for p in local.parameters())


@every_method
def test_one_optimizer_for_all_parts_is_valid_too(method):
    case = BY_NAME["cnn"]
    one, many = converted(case, method), converted(case, method)
    x, y = case.inputs(), case.targets()
    one.train_step(x, y, sgd(one.parameters()))
    many.train_step(x, y, many.optimizers(sgd, sgd))
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_parameters_are_shared_and_conversion_can_be_repeated():
    model = build(BY_NAME["residual"])
    for method, parts in itertools.product(["scpl", "bp"], [2, 4]):
        local = to_local(model, BY_NAME["residual"].inputs(), method=method, parts=parts)
        assert local.to_standard() is model
        mine = {id(p) for p in local.parts.parameters()}
        assert mine == {id(p) for p in model.parameters()}
        names = [n.split(".", 1)[1] for n, _ in local.parts.named_parameters()]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
