"""Interlocking back-propagation: who is trained by which loss, and the three heads."""

import pytest
import torch
from torch import nn

from localize.errors import MethodError
from localize.heads.base import TaskHead
from localize.heads.bp import BP
from localize.heads.early_exit import EarlyExit
from localize.heads.joint import Joint
from localize.heads.nwise import NWise
from localize.task import Task
from tests.heads.sites import CLASSES, make_site

# By hand, from "part k is trained by the loss of part min(k+N-1, K)": {(K, N): parts trained by losses 1..K}
FURTHEST = {
    (1, 1): [[1]],
    (2, 1): [[1], [2]],
    (2, 2): [[], [1, 2]],
    (3, 1): [[1], [2], [3]],
    (3, 2): [[], [1], [2, 3]],
    (3, 3): [[], [], [1, 2, 3]],
    (4, 1): [[1], [2], [3], [4]],
    (4, 2): [[], [1], [2], [3, 4]],
    (4, 3): [[], [], [1], [2, 3, 4]],
    (4, 4): [[], [], [], [1, 2, 3, 4]],
    (5, 1): [[1], [2], [3], [4], [5]],
    (5, 2): [[], [1], [2], [3], [4, 5]],
    (5, 3): [[], [], [1], [2], [3, 4, 5]],
    (5, 4): [[], [], [], [1], [2, 3, 4, 5]],
    (5, 5): [[], [], [], [], [1, 2, 3, 4, 5]],
}
# From "loss j trains parts max(1, j-N+1)..j"
SUM = {
    (1, 1): [[1]],
    (2, 1): [[1], [2]],
    (2, 2): [[1], [1, 2]],
    (3, 1): [[1], [2], [3]],
    (3, 2): [[1], [1, 2], [2, 3]],
    (3, 3): [[1], [1, 2], [1, 2, 3]],
    (4, 1): [[1], [2], [3], [4]],
    (4, 2): [[1], [1, 2], [2, 3], [3, 4]],
    (4, 3): [[1], [1, 2], [1, 2, 3], [2, 3, 4]],
    (4, 4): [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],
    (5, 1): [[1], [2], [3], [4], [5]],
    (5, 2): [[1], [1, 2], [2, 3], [3, 4], [4, 5]],
    (5, 3): [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]],
    (5, 4): [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]],
    (5, 5): [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]],
}


def table(method, parts):
    return [list(method.trains(number, parts)) for number in range(1, parts + 1)]


@pytest.mark.parametrize(("parts", "reach"), list(FURTHEST))
def test_who_trains_whom(parts, reach):
    furthest, total = NWise(reach=reach), NWise(reach=reach, gradient="sum")
    assert table(furthest, parts) == FURTHEST[parts, reach]
    assert table(total, parts) == SUM[parts, reach]
    assert furthest.reach_in(parts) == reach
    trained = [part for row in FURTHEST[parts, reach] for part in row]
    assert sorted(trained) == list(range(1, parts + 1))  # every part by exactly one loss


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_reach_is_capped_by_the_number_of_parts(parts):
    method = NWise(reach=9)
    assert method.reach_in(parts) == parts
    assert table(method, parts) == table(NWise(reach=parts), parts)
    assert table(method, parts) == table(BP(), parts)


def test_tables_of_the_baselines():
    assert table(BP(), 3) == [[], [], [1, 2, 3]]
    assert table(EarlyExit(), 3) == [[1], [2], [3]]
    assert table(Joint(), 3) == [[1], [1, 2], [1, 2, 3]]
    assert (BP().reach_in(3), EarlyExit().reach_in(3), Joint().reach_in(3)) == (3, 1, 3)


def test_bp_has_a_head_on_the_last_part_only():
    assert BP().build_head(make_site(1, 2)) is None
    assert isinstance(BP().build_head(make_site(2, 2)), TaskHead)


def test_the_released_conv_head():
    head = NWise().build_head(make_site(shape=(2, 16, 8, 8), layout="map"))
    layers = [m for m in head.modules() if not list(m.children()) and list(m.parameters())]
    assert [type(m) for m in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    sizes = [tuple(m.weight.shape) for m in layers]
    assert sizes == [(128, 16, 3, 3), (128,), (64, 128, 3, 3), (64,), (CLASSES, 64)]
    assert head.predictor()(torch.randn(3, 16, 12, 10)).shape == (3, CLASSES)


def test_dgl_s_mlp_with_spatial_reduction():
    head = NWise(head="mlp_sr").build_head(make_site(shape=(2, 16, 10, 10), layout="map"))
    linear = [tuple(m.weight.shape) for m in head.modules() if isinstance(m, nn.Linear)]
    assert linear == [(64, 64), (64, 64), (64, 64), (CLASSES, 64)]
    pointwise = [tuple(m.weight.shape) for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert pointwise == [(16, 16, 1, 1)] * 3
    sizes = []
    for m in head.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[2:])))
    assert head.predictor()(torch.randn(3, 16, 10, 10)).shape == (3, CLASSES)
    assert sizes == [(3, 3)] * 3


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 8), "vector"), ((2, 5, 8), "tokens"), ((2, 64, 32, 32), "map"), ((2, 4, 4, 8), "map_last")],
)
def test_linear_heads(shape, layout):
    head = NWise(head="linear").build_head(make_site(shape=shape, layout=layout))
    weights = [tuple(p.shape) for p in head.parameters()]
    assert len(weights) == 2
    assert weights[0][1] <= 8192
    assert head.predictor()(torch.randn(shape)).shape == (2, CLASSES)


def test_auto_takes_conv_on_maps_and_linear_elsewhere():
    conv = NWise().build_head(make_site(shape=(2, 4, 4, 8), layout="map_last"))
    assert any(isinstance(m, nn.Conv2d) for m in conv.modules())
    one = NWise().build_head(make_site(shape=(2, 8, 20), layout="map"))
    assert any(isinstance(m, nn.Conv1d) for m in one.modules())
    linear = NWise().build_head(make_site(shape=(2, 5, 8), layout="tokens"))
    assert not any(isinstance(m, nn.Conv2d) for m in linear.modules())


@pytest.mark.parametrize("head", ["conv", "mlp_sr"])
def test_heads_that_need_a_map_say_so(head):
    with pytest.raises(MethodError, match=r"needs a map.*nwise with head='linear' or 'auto'") as error:
        NWise(head=head).build_head(make_site(number=3, parts=4, shape=(2, 5, 8), layout="tokens"))
    assert "part 3 of 4, hidden state N×5×8 (tokens)" in str(error.value)


def test_dense_tasks():
    lm = NWise().build_head(make_site(shape=(2, 5, 8), layout="tokens", task=Task("causal_lm", CLASSES)))
    assert lm(torch.randn(2, 5, 8), lm.example_target(2, "cpu")).logits.shape == (2, 5, CLASSES)
    segmentation = make_site(shape=(2, 8, 4, 4), layout="map", task=Task("segmentation", CLASSES))
    conv = NWise().build_head(segmentation)
    assert conv(torch.randn(2, 8, 4, 4), conv.example_target(2, "cpu")).logits.shape == (2, CLASSES, 16, 16)
    with pytest.raises(MethodError, match="head='mlp_sr' makes one prediction a sample"):
        NWise(head="mlp_sr").build_head(segmentation)


@pytest.mark.parametrize("method", [NWise(), EarlyExit(), EarlyExit(hidden=4), Joint()], ids=str)
def test_exits_share_the_heads_weights(method):
    head = method.build_head(make_site())
    predictor = method.predictor([head])
    assert method.predicts == "exits"
    assert {id(p) for p in predictor.parameters()} == {id(p) for p in head.parameters()}
    hidden, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    out = head(hidden, labels)
    assert torch.equal(predictor(hidden), out.logits)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))


def test_joint_weighs_its_exits():
    plain, heavy = (Joint(exit_weight=w).build_head(make_site()) for w in (1.0, 3.0))
    heavy.load_state_dict(plain.state_dict())
    hidden, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(heavy(hidden, labels).loss, 3 * plain(hidden, labels).loss)


def test_regression_exits_have_the_output_s_shape():
    head = EarlyExit().build_head(make_site(task=Task("regression")))
    assert head(torch.randn(3, 8), torch.randn(3, 4)).logits.shape == (3, 4)
    assert head.example_target(3, "cpu").shape == (3, 4)


@pytest.mark.parametrize("axis", [0, 1])
def test_transformer_heads_of_language_models_do_not_look_ahead(axis):
    shape = (2, 5, 8) if axis == 0 else (5, 2, 8)
    site = make_site(shape=shape, layout="tokens", task=Task("causal_lm", CLASSES), batch_axis=axis)
    head = NWise(head="transformer").build_head(site).eval()
    hidden = torch.randn(shape)
    later = hidden.clone()
    later.select(1 - axis, 3).add_(1)
    with torch.no_grad():
        one, other = head.net(hidden), head.net(later)
    assert one.shape == (2, 5, CLASSES)
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert not torch.allclose(one[:, 3:], other[:, 3:])
    assert [type(m).__name__ for m in head.net].count("TransformerBlocks") == 1
    assert len(head.net[1].blocks) == 2


def test_transformer_heads_of_classifiers_look_everywhere():
    site = make_site(shape=(2, 5, 6), layout="tokens")  # 4 attention heads do not divide 6
    head = NWise(head="transformer", token_pool="first").build_head(site).eval()
    hidden = torch.randn(2, 5, 6)
    later = hidden.clone()
    later[:, 4] += 1
    assert head.net(hidden).shape == (2, CLASSES)
    assert not torch.allclose(head.net(hidden), head.net(later))


@pytest.mark.parametrize(("layout", "shape"), [("map", (2, 8, 4, 4)), ("vector", (2, 8))])
def test_transformer_heads_need_tokens(layout, shape):
    with pytest.raises(MethodError, match="needs tokens"):
        NWise(head="transformer").build_head(make_site(shape=shape, layout=layout))
