"""Every method's fast path against its slow, obvious implementation, parameter by parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from localize import get_method, to_local
from tests.reference import al, bp, early_exit, joint, lct, nwise, scpl
from tests.zoo import BY_NAME, CLASSES, build

# Models whose parts are functions of one tensor, in train and eval mode the same graph.
SIMPLE = ["mlp", "cnn", "residual", "encoder", "channels_last"]
CUTS = {"residual": ["blocks.0", "blocks.1", "stem"]}  # one tensor across


def predictors(heads):
    return [head.predictor() if head is not None else None for head in heads]


def contrast(head):
    return nn.Sequential(head.reduce, head.projector)


def reference_step(local, x, y):
    """Leaves the reference's gradients on ``local``'s own parameters."""
    method, parts, heads = local.method, list(local.parts), local.heads
    match method.name:
        case "bp":
            return bp.step(parts, x, y)
        case "scpl":
            parts, classifier = split_last(parts)
            projections = [contrast(h) if classifier or h is not heads[-1] else None for h in heads]
            options = method.temperature, method.normalizer, method.classifier
            return scpl.step(parts, projections, x, y, classifier, *options)
        case "al":
            parts, classifier = split_last(parts)
            associated = [al.Associated(h.reduce, h.encoder, h.decoder, h.bridge) for h in heads]
            return al.step(parts, associated, x, y, CLASSES, classifier, method.target_gradient)
        case "nwise":
            return nwise.step(parts, predictors(heads), x, y, method.reach, method.gradient)
        case "lct":
            return lct.step(parts, predictors(heads), x, y)
        case "early_exit":
            return early_exit.step(parts, predictors(heads), x, y)
        case "joint":
            return joint.step(parts, predictors(heads), x, y)
    raise AssertionError(method.name)


def split_last(parts):
    """The parts with the last below its classifier, and the classifier; None where it is nothing but that."""
    if parts[-1].route.hidden is None:
        return parts, None
    return [*parts[:-1], _Below(parts[-1])], _Classifier(parts[-1])


class _Below(nn.Module):
    """The last part without its classifier, whose parameters alone it has."""

    def __init__(self, part) -> None:
        super().__init__()
        self.below = part.below_classifier()
        self.__dict__["part"] = part

    def forward(self, x):
        return self.__dict__["part"].run_hidden(x)


class _Classifier(nn.Module):
    def __init__(self, part) -> None:
        super().__init__()
        below = {id(p) for p in part.below_classifier().parameters()}
        self.weights = nn.ParameterList([p for p in part.parameters() if id(p) not in below])
        self.__dict__["part"] = part

    def forward(self, hidden):
        return self.__dict__["part"].run_classifier(hidden)


METHODS = [
    get_method("bp"),
    get_method("scpl"),
    get_method("scpl", normalizer="khosla", temperature=0.5, classifier="joint", projector="mlp"),
    get_method("al"),
    get_method("al", target_gradient=True, hidden=32),
    *[get_method("nwise", reach=n, gradient=g) for n in (1, 2, 3, 4) for g in ("furthest", "sum")],
    get_method("lct"),
    get_method("early_exit"),
    get_method("joint"),
]


@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: m.name + "-" + "-".join(map(str, m.options().values()))
)
def test_fast_path_is_the_reference(name, method, parts):
    case = BY_NAME[name]
    model = build(case).double()
    for module in model.modules():  # the reference runs parts in another order: no randomness
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    x, y = case.inputs(), case.targets()
    x = x.double() if x.is_floating_point() else x
    torch.manual_seed(1)
    cuts = CUTS[name][: parts - 1] if name in CUTS else None
    local = to_local(model, x, method=method, parts=parts, cuts=cuts)
    by_hand = copy.deepcopy(local)
    found = local.losses(x, y)
    sum(found).backward()
    expected = reference_step(by_hand, x, y)
    wanted = [float(e) for e in expected]
    got = [float(f.detach()) for f in found]
    assert got[-len(wanted) :] == pytest.approx(wanted, rel=1e-9)
    for (label, one), (_, two) in zip(local.named_parameters(), by_hand.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), label
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-7, atol=1e-10, msg=label)
