"""What every method's heads must do, on every layout: one table of cases, one set of checks."""

import copy

import pytest
import torch
from torch import nn

from localize.heads.al import AL
from localize.heads.base import Head
from localize.heads.bp import BP
from localize.heads.early_exit import EarlyExit
from localize.heads.joint import Joint
from localize.heads.lct import LCT
from localize.heads.nwise import NWise
from localize.heads.scpl import SCPL
from tests.heads.sites import CLASSES, make_site

METHODS = [
    BP(),
    SCPL(hidden=8, projection=4),
    SCPL(projector="identity", normalizer="khosla", pool="flatten"),
    AL(hidden=6),
    AL(hidden=6, target_gradient=True),
    NWise(),
    NWise(head="linear", gradient="sum", reach=3),
    LCT(),
    EarlyExit(),
    EarlyExit(hidden=4),
    Joint(exit_weight=0.5),
]
HIDDEN = {
    "vector": ((2, 8), 0),
    "map": ((2, 8, 7, 5), 0),
    "map_last": ((2, 7, 5, 8), 0),
    "tokens": ((5, 2, 8), 1),
    "other": ((2, 3, 4, 2, 2), 0),
}
CASES = [
    pytest.param(method, layout, number, id=f"{method}-{layout}-{number}")
    for method in METHODS
    for layout in HIDDEN
    for number in ((1, 2, 3) if isinstance(method, SCPL | AL) else (1, 2))
]

FEW = [case for case in CASES if case.values[1] in ("map", "tokens")]


def build(method, layout, number, device="cpu", dtype=torch.float32):
    shape, axis = HIDDEN[layout]
    classifier = Classifier(axis, dtype) if number == 3 else None
    with torch.device(device):
        return method.build_head(
            make_site(number, 3, shape, layout, classifier=classifier, batch_axis=axis, dtype=dtype)
        )


class Classifier(nn.Module):
    def __init__(self, axis, dtype):
        super().__init__()
        self.axis, self.linear = axis, nn.LazyLinear(CLASSES, dtype=dtype)

    def forward(self, hidden):
        return self.linear(hidden.movedim(self.axis, 0).flatten(1))


def hidden_state(layout, batch, device="cpu", dtype=torch.float32):
    shape, axis = HIDDEN[layout]
    size = tuple(batch if i == axis else s for i, s in enumerate(shape))
    return torch.randn(size, device=device, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("method", "layout", "number"), CASES)
def test_a_head_gives_a_finite_loss_and_a_gradient(method, layout, number):
    head = build(method, layout, number)
    if head is None:
        assert isinstance(method, BP)
        return
    assert isinstance(head, Head)
    for batch in (2, 5):
        hidden = hidden_state(layout, batch)
        out = head(hidden, head.example_target(batch, "cpu"))
        (grad,) = torch.autograd.grad(out.loss, hidden)
        assert out.loss.shape == ()
        assert torch.isfinite(out.loss)
        assert torch.isfinite(grad).all()
        if out.per_sample is not None:
            assert out.per_sample.shape == (batch,)
        if method.feedback:
            assert torch.isfinite(
                head.feedback_loss(head(hidden, head.example_target(batch, "cpu")), torch.ones(batch))
            )


@pytest.mark.parametrize(("method", "layout", "number"), CASES)
def test_a_dry_run_on_the_meta_device_says_what_a_head_costs(method, layout, number):
    if number == 3:
        return  # with the part's own classifier, which the dry run leaves out
    head, real = build(method, layout, number, "meta"), build(method, layout, number)
    if head is None:
        return
    out = head(hidden_state(layout, 2, "meta"), head.example_target(2, "meta"))
    assert out.loss.device.type == "meta"
    assert [p.shape for p in head.parameters()] == [p.shape for p in real.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("method", "layout", "number"), FEW)
def test_heads_take_the_precision_of_the_hidden_state(method, layout, number, dtype):
    head = build(method, layout, number, dtype=dtype)
    if head is None:
        return
    out = head(hidden_state(layout, 3, dtype=dtype), head.example_target(3, "cpu"))
    out.loss.backward()
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize(("method", "layout", "number"), FEW)
def test_heads_under_autocast(method, layout, number):
    head = build(method, layout, number)
    if head is None:
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(hidden_state(layout, 3), head.example_target(3, "cpu"))
    out.loss.backward()
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("layout", list(HIDDEN))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_exits_give_logits_and_a_copy_is_independent(method, layout):
    heads = [build(method, layout, 1), build(method, layout, 2)]
    if method.predicts == "none":
        assert heads[0] is None or method.predictor(heads) is None
        return
    for number in (2, 1):  # from above: zeroed weights below would make the path constant
        predictor = method.predictor(heads[:number]).eval()
        hidden = hidden_state(layout, 4)
        logits = predictor(hidden)
        assert logits.shape == (4, CLASSES)
        alone = copy.deepcopy(predictor)
        for p in heads[number - 1].parameters():
            p.data.zero_()
        assert torch.equal(alone(hidden), logits)
        assert not torch.equal(predictor(hidden), logits)
