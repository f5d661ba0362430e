"""A recorded graph is the model: outputs, gradients, buffers, at other batch sizes, in both modes."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.recording import assert_same, capture, runnable

Pair = namedtuple("Pair", "logits features")
SCALE = torch.tensor([0.5, 2.0, 1.0, 3.0])


class Residual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.act(out)


class SmallConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = F.max_pool2d(self.blocks(x), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.first(x)), 0.5, self.training)
        return self.last(F.dropout(x, p=0.3, training=self.training))


class PatchTransformer(nn.Module):
    """Class token, positions cut to the length, sizes taken from the input."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("positions", torch.randn(1, 9, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        x = torch.cat([self.token.expand(batch, -1, -1), self.embed(x)], dim=1)
        x = self.encoder(x + self.positions[:, : length + 1])
        return self.head(x[:, 0])


class CausalTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder, self.head = (
            nn.Embedding(7, 8),
            nn.TransformerEncoder(layer, 2),
            nn.Linear(8, 7),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1))
        return self.head(self.encoder(self.embed(tokens), mask=mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, 6), kind(6, 5, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out, state = self.rnn(self.embed(tokens))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(out[:, -1] + hidden[-1])


class Packed(Recurrent):
    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        out, (hidden, _) = self.rnn(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return self.head(padded.mean(1) + hidden[-1])


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.size(0), 5)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return self.head(hidden)


class Auxiliary(nn.Module):
    """Like googlenet: another output, of another type, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(x))
        return Pair(self.head(x), self.aux(x)) if self.training else self.head(x)


class Shared(nn.Module):
    """One module twice, one parameter under two names, one used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.out.weight = self.layer.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.layer(torch.relu(self.layer(x))) * self.scale
        return {"logits": self.out(x), "norm": x.norm(dim=1)}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.offset = nn.Linear(4, 4), [torch.arange(4.0)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        view = x[:, :2]
        x[:, 0] = view[:, 1]
        view.mul_(2)
        x += self.offset[0]
        return x * SCALE


class MutatesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.layer(x)


class FrozenBelow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.sigmoid(self.below(x))
        return self.above(x)


class Gate(nn.Module):
    """Value-dependent, but inside a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.two(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Sequential(Gate(), Gate()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gates(x))


class Double(torch.autograd.Function):
    """A backward that is not the forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 7


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Double.apply(self.first(x)))


class Operators(nn.Module):
    """Every spelling of arithmetic: operators, reflected, augmented, functions, methods, properties."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = 2 ** (1 - x / 3) - x**2 + (3 // (x.detach().abs() + 1)) + 1 / (x * x + 1) + x % 2 - -x
        y = y @ x.T @ x.mT.T + torch.pow(x, 2) + x.pow(3) + torch.special.expm1(x) + abs(x)
        y -= torch.where((x > 0) & ~(x >= 1) | (x == 0), x, y)
        y[:, 1:3] *= 2
        y = torch.add(y, x, alpha=2, out=None)
        return torch.stack([*y.split(2, dim=1)], dim=1).amax(1) + torch.linalg.vector_norm(
            x, dim=1, keepdim=True
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.attn = (
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        b, t, d = x.size()
        q, k, v = (y.view(b, t, 2, d // 2).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1)) / (d // 2) ** 0.5
        if mask is not None:
            weights = weights.masked_fill(mask[:, None, None] == 0, float("-inf"))
        x = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return self.attn(x, x, x, need_weights=False)[0], None


def hooked() -> nn.Module:
    model = SmallConv()
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    model.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def weight_normed() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 2)
    return nn.Sequential(nn.utils.weight_norm(first), nn.utils.parametrizations.weight_norm(second))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def images(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 12, 12),)


def vectors(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 4),)


def sequences(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 6, 4),)


def tokens(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 7, (n, 5)),)


def packed(n: int) -> tuple[Tensor, ...]:
    return torch.randint(0, 7, (n, 5)), torch.tensor([5, 3, 4, 2, 5])[:n]


def attended(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 5, 8), torch.ones(n, 5).tril(3)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "mlp": (mlp, vectors),
    "conv": (SmallConv, images),
    "functional-dropout": (FunctionalDropout, vectors),
    "patch-transformer": (PatchTransformer, sequences),
    "causal-transformer": (CausalTransformer, tokens),
    "lstm": (Recurrent, tokens),
    "gru": (lambda: Recurrent(nn.GRU), tokens),
    "packed-lstm": (Packed, packed),
    "cell-loop": (CellLoop, sequences),
    "auxiliary-head": (Auxiliary, vectors),
    "shared": (Shared, vectors),
    "in-place": (InPlace, vectors),
    "mutates-input": (MutatesInput, vectors),
    "no-grad": (FrozenBelow, vectors),
    "gated": (Gated, vectors),
    "autograd-function": (OwnFunction, vectors),
    "operators": (Operators, vectors),
    "attention": (Attention, attended),
    "hooks": (hooked, images),
    "weight-norm": (weight_normed, vectors),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_graph_is_the_model(case: str) -> None:
    """At the example's batch size and at others, in both modes: outputs, every gradient, every buffer."""
    torch.manual_seed(0)
    build, inputs = CASES[case]
    model = build()
    traced = capture(model, *inputs(2))
    for batch in (2, 3, 5):
        assert_same(model, traced, *inputs(batch))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_parameters_are_the_models_own(case: str) -> None:
    build, inputs = CASES[case]
    model = build()
    traced = capture(model, *inputs(2))
    own = {id(p) for p in model.parameters()}
    for training in (True, False):
        assert {id(p) for p in runnable(traced, training).parameters()} <= own


def test_tracing_twice_gives_the_same() -> None:
    model = SmallConv()
    first, second = capture(model, *images(2)), capture(model, *images(2))
    assert str(first.train_graph) == str(second.train_graph)


def test_one_graph_where_modes_agree() -> None:
    assert capture(FunctionalDropout(), *vectors(2)).modes_agree
    assert capture(SmallConv(), *images(2)).modes_agree
    traced = capture(Auxiliary(), *vectors(2))
    assert not traced.modes_agree
    assert "two graphs" in traced.notes[-1]


def test_identity_in_eval_mode_does_not_split_the_modes() -> None:
    """Dropout returns its very input in eval mode. Later uses of that input once referred to the dropout."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.drop(x))

    model = Skip()
    traced = capture(model, *vectors(2))
    assert traced.modes_agree
    assert_same(model, traced, *vectors(3))


def test_modes_of_single_modules_stay() -> None:
    model = mlp()
    model.train()
    model[1].eval()
    capture(model, *vectors(2))
    assert model.training
    assert not model[1].training


def test_graph_conventions() -> None:
    model = SmallConv()
    traced = capture(model, *images(2))
    nodes = {n.name: n for n in traced.train_graph.nodes}
    assert traced.signature.names == ("x",)
    assert nodes["x"].op == "placeholder"
    assert nodes["blocks_0_conv"].target == "blocks.0.conv"
    assert nodes["blocks_0_conv"].meta["scope"] == "blocks.0"
    assert nodes["stem"].meta["scope"] == ""
    for name in ("relu", "add_", "blocks_0_act"):  # functional, augmented, module: all in place
        node = nodes[name]
        assert node.meta["mutates"] == node.all_input_nodes[0].meta["storages"] == node.meta["storages"]
    assert nodes["blocks_0_norm"].meta["mutates"] == frozenset()
    assert isinstance(list(nodes.values())[-1].args[0], tuple)


def test_training_flag_is_live_and_copies_stay_consistent() -> None:
    model = FunctionalDropout()
    traced = capture(model, *vectors(2))
    assert list(traced.extras) == ["training_flag_0"]
    flag, owner = copy.deepcopy((traced.extras["training_flag_0"], model))
    owner.eval()
    assert flag() is False
    flag.train()
    assert owner.training
    assert model.training
    assert not list(flag.parameters())


def test_value_dependent_blocks_stay_whole() -> None:
    traced = capture(Gated(), *vectors(2))
    targets = [n.target for n in traced.train_graph.nodes if n.op == "call_module"]
    assert targets == ["gates.0", "gates.1", "head"]
    assert "gates.0, gates.1" in traced.notes[0]
    assert "test_record.py" in traced.notes[0]


def test_own_kinds_of_batch_norm_are_leaves() -> None:
    """They count batches in train mode only, which made two graphs of most timm models."""

    class NormAct(nn.BatchNorm1d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.num_batches_tracked.add_(1)
            return self.act(super().forward(x))

    model = nn.Sequential(nn.Linear(4, 4), NormAct(4))
    traced = capture(model, *vectors(2))
    assert traced.modes_agree
    assert_same(model, traced, *vectors(3))
