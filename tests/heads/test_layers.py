"""Reductions by layout, pooling, and the last layer to the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localize.errors import MethodError
from localize.heads.layers import Resize, check_hidden, conv_block, linear_exit
from localize.heads.pooling import AverageTo, PooledVector, PoolTo, as_map, pool_sizes
from localize.heads.registry import get_method
from localize.spec import TensorSpec
from localize.task import Task
from tests.heads.sites import CLASSES, make_site


def test_as_map_brings_any_layout_to_batch_channels_space():
    x = torch.randn(2, 3, 4, 5)
    assert as_map(x, TensorSpec((2, 3, 4, 5), layout="map")) is x
    last = x.permute(0, 2, 3, 1)
    assert torch.equal(as_map(last, TensorSpec((2, 4, 5, 3), layout="map_last")), x)
    batch_last = x.permute(1, 2, 3, 0)
    assert torch.equal(as_map(batch_last, TensorSpec((3, 4, 5, 2), batch_axis=3, layout="map")), x)
    mixed = x.permute(2, 0, 3, 1)  # H N W C
    assert torch.equal(as_map(mixed, TensorSpec((4, 2, 5, 3), batch_axis=1, layout="map_last")), x)


@pytest.mark.parametrize(
    ("channels", "sizes", "limit", "expected"),
    [
        (64, (32, 32), 8192, (11, 11)),
        (8, (32, 32), 8192, (32, 32)),
        (512, (4, 4), 8192, (4, 4)),
        (512, (5, 5), 8192, (4, 4)),
        (9000, (7, 7), 8192, (1, 1)),
        (1024, (4, 2), 8192, (4, 2)),
        (1024, (8, 2), 8192, (4, 2)),
        (256, (100,), 8192, (32,)),
        (64, (8, 8, 8), 8192, (5, 5, 5)),
        (64, (64, 64), None, (64, 64)),
        (64, (64, 64), 1, (1, 1)),
    ],
)
def test_pool_sizes_are_the_largest_that_fit(channels, sizes, limit, expected):
    assert pool_sizes(channels, sizes, limit) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [((7, 5), (3, 2)), ((8, 8), (4, 2)), ((6, 6), (6, 4)), ((9,), (4,)), ((4, 5, 6), (2, 2, 4))],
)
def test_average_to_is_adaptive_average_pooling_with_its_gradient(old, new):
    adaptive = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(old)]
    x = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *new, dtype=torch.float64)
    pool = AverageTo(old, new).double()
    for name, buffer in pool.named_buffers():  # built in float32, as a head is before it is cast
        setattr(pool, name, buffer)
    fast = pool(x)
    (fast_grad,) = torch.autograd.grad((fast * weight).sum(), x)
    (slow_grad,) = torch.autograd.grad((adaptive(x, new) * weight).sum(), x)
    torch.testing.assert_close(fast, adaptive(x, new), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-6, atol=1e-7)
    other = torch.randn(2, 3, *(size + 3 for size in old), dtype=torch.float64)
    assert torch.equal(pool(other), adaptive(other, new))


def test_pooling_keeps_nothing_for_the_backward_pass():
    x = torch.randn(2, 3, 56, 56, requires_grad=True)
    for sizes in ((5, 5), (4, 4), (1, 1)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=saved: kept.append(t.numel()) or t, lambda t: t
        ):
            AverageTo((56, 56), sizes)(x)
        assert sum(saved) < 1000


def test_pool_to_leaves_a_small_map_alone():
    x = torch.randn(2, 8, 4, 4)
    pool = PoolTo(8, (4, 4))
    assert pool(x) is x
    assert pool.out_features == 128
    assert not pool.state_dict()


@pytest.mark.parametrize(
    ("shape", "layout", "axis", "limit", "features"),
    [
        ((2, 10), "vector", 0, 8192, 10),
        ((10, 2), "vector", 1, 8192, 10),
        ((2, 7, 10), "tokens", 0, 8192, 10),
        ((7, 2, 10), "tokens", 1, 8192, 10),
        ((2, 3, 4, 5), "map", 0, 8192, 60),
        ((2, 3, 4, 5), "map", 0, 1, 3),
        ((2, 4, 5, 3), "map_last", 0, 1, 3),
        ((2, 300, 10, 10), "map", 0, 8192, 7500),
        ((2, 300, 10, 10), "map", 0, None, 30000),
        ((2, 3, 4, 5, 6, 2), "other", 0, 8192, 720),
        ((2, 100, 10, 10), "other", 0, 8192, 8192),
    ],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_pooled_vector_gives_a_row_a_sample(shape, layout, axis, limit, features, batch):
    reduce = PooledVector(TensorSpec(shape, batch_axis=axis, layout=layout), limit)
    assert reduce.out_features == features
    actual = tuple(batch if i == axis else s for i, s in enumerate(shape))
    x = torch.randn(actual)
    out = reduce(x)
    assert out.shape == (batch, features)
    alone = reduce(x.narrow(axis, batch - 1, 1))  # a row depends on its own sample only
    torch.testing.assert_close(out[-1:], alone)


def test_reductions_take_other_image_sizes_and_token_counts():
    assert PooledVector(TensorSpec((2, 64, 32, 32), layout="map"))(torch.randn(2, 64, 40, 24)).shape == (
        2,
        64 * 121,
    )
    assert PooledVector(TensorSpec((2, 7, 10), layout="tokens"))(torch.randn(2, 3, 10)).shape == (2, 10)


def test_mean_over_tokens():
    x = torch.randn(2, 7, 10)
    assert torch.equal(PooledVector(TensorSpec((2, 7, 10), layout="tokens"))(x), x.mean(1))


def test_conv_block_has_the_layers_it_says():
    block = conv_block(2, 3, 4, bias=False)
    assert [type(m) for m in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert block[0].bias is None
    assert block(torch.randn(2, 3, 5, 5)).shape == (2, 4, 5, 5)
    assert conv_block(1, 3, 4)(torch.randn(2, 3, 9)).shape == (2, 4, 9)


@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize(
    ("kind", "shape", "layout", "expected"),
    [
        ("classification", (2, 6), "vector", (2, CLASSES)),
        ("classification", (2, 6, 4, 4), "map", (2, CLASSES)),
        ("classification", (2, 5, 6), "tokens", (2, CLASSES)),
        ("regression", (2, 6, 4, 4), "map", (2, 4)),
        ("causal_lm", (2, 5, 6), "tokens", (2, 5, CLASSES)),
        ("segmentation", (2, 6, 4, 4), "map", (2, CLASSES, 16, 16)),
        ("segmentation", (2, 4, 4, 6), "map_last", (2, CLASSES, 16, 16)),
    ],
)
def test_linear_exit_gives_logits_for_every_task(kind, shape, layout, expected, width):
    task = Task(kind, CLASSES if kind != "regression" else None)
    net = linear_exit(make_site(shape=shape, layout=layout, task=task), "early_exit", width=width)
    assert net(torch.randn(shape)).shape == expected


@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize(
    ("kind", "shape", "layout", "words"),
    [("causal_lm", (2, 6), "vector", "tokens"), ("segmentation", (2, 5, 6), "tokens", r"map \(N, C, H, W\)")],
)
def test_dense_tasks_need_dense_hidden_states(kind, shape, layout, words, width):
    with pytest.raises(MethodError, match=words):
        linear_exit(
            make_site(shape=shape, layout=layout, task=Task(kind, CLASSES)), "early_exit", width=width
        )


def test_resize_is_free_where_the_size_fits():
    x = torch.randn(2, 3, 4, 4)
    assert Resize((4, 4))(x) is x


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.int64}, "torch.int64"),
        ({"batch_axis": None}, "no axis is the batch"),
        ({"shape": (2,)}, "one number a sample"),
    ],
)
def test_hidden_states_no_head_can_stand_on(changes, words):
    with pytest.raises(MethodError, match=words) as error:
        check_hidden(make_site(number=2, parts=4, **changes), "scpl")
    assert "'scpl', part 2 of 4" in str(error.value)
    assert "bp" in str(error.value)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_tokens_of_a_recurrent_layer_are_read_by_their_final_state(kind, directions, axis):
    rnn = kind(3, 4, bidirectional=directions == 2, batch_first=axis == 0)
    tokens, state = rnn(torch.randn((2, 5, 3) if axis == 0 else (5, 2, 3)))
    state = state[0] if isinstance(state, tuple) else state
    final = "both" if directions == 2 else "last"
    spec = TensorSpec(tuple(tokens.shape), batch_axis=axis, layout="tokens", final=final)
    assert torch.equal(PooledVector(spec)(tokens), torch.cat(list(state), 1))
    assert torch.equal(PooledVector(spec, token_pool="mean")(tokens), tokens.mean(1 - axis))


@pytest.mark.parametrize(("how", "expected"), [("first", 0), ("last", 6)])
def test_one_token_may_stand_for_all(how, expected):
    tokens = torch.randn(2, 7, 10)
    reduce = PooledVector(TensorSpec((2, 7, 10), layout="tokens"), token_pool=how)
    assert torch.equal(reduce(tokens), tokens[:, expected])


@pytest.mark.parametrize("method", ["scpl", "al", "nwise", "lct", "early_exit", "joint"])
def test_every_method_with_heads_has_token_pools(method):
    site = make_site(shape=(2, 5, 8), layout="tokens")
    hidden = torch.randn(3, 5, 8)
    other = hidden.clone()
    other[:, 1:] += 1
    for how, same in (("first", True), ("last", False), ("mean", False)):
        head = get_method(method, token_pool=how).build_head(site).eval()
        target = torch.tensor([0, 1, 0])
        assert torch.allclose(head(hidden, target).loss, head(other, target).loss) is same
    with pytest.raises(MethodError, match="token_pool='cls' is none of"):
        get_method(method, token_pool="cls")


def test_tokens_that_are_not_those_of_the_output_are_refused():
    """The tokens of an encoder were taken for those that the decoder predicts."""
    site = make_site(shape=(2, 7, 6), layout="tokens", task=Task("causal_lm", CLASSES))
    with pytest.raises(MethodError, match=r"7 tokens, and the model's output .* has 5"):
        linear_exit(site, "early_exit")


def test_maps_of_other_dimensions_than_the_output_are_refused():
    site = make_site(shape=(2, 6, 3, 4, 4), layout="map", task=Task("segmentation", CLASSES))
    with pytest.raises(MethodError, match="segmentation head needs a map"):
        linear_exit(site, "early_exit")
