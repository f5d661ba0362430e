"""FLOPs against torch's counter on the model itself and against closed forms; saved bytes against autograd.

The profile runs a captured graph without data. Here the model runs for real, uncaptured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from localize import to_local
from localize.convert.flops import FlopCounter
from localize.convert.partition import best_cuts
from localize.convert.profile import cost_of, frozen_parameters, profile
from localize.convert.record import trace
from localize.convert.traced import Profile
from localize.spec import Cost, CutPoint
from tests import zoo
from tests.convert.found import Found

N, T, S, D, H, OUT = 2, 5, 7, 8, 2, 3
TOKENS, MEMORY = torch.randn(N, T, D), torch.randn(N, S, D)
IMAGE, VIDEO = torch.randn(N, 4, 9, 9), torch.randn(N, 4, 5, 6, 7)


class Does(nn.Module):
    """A function of its layers (the only one, or the list) and what a Linear makes of the input."""

    def __init__(
        self, function: Callable[..., Tensor], *layers: nn.Module, first: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        self.first = nn.Linear(D, D) if first is None else first

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.function(self.layers[0], x) if len(self.layers) else self.function(x)


FIRST = 2 * N * T * D * D  # the FLOPs of that Linear


def whole(model: nn.Module, *inputs: Tensor, training: bool = True) -> Cost:
    found = profile(trace(model, inputs, {}), training=training)
    return found.cost(list(found.nodes))


# ------------------------------------------------------------------------------------------ FLOPs, closed forms


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D // H)).transpose(1, 2)


def fused(x: Tensor, **options: Any) -> Tensor:
    memory = MEMORY.to(x)
    return F.scaled_dot_product_attention(heads(x), heads(memory), heads(memory), **options)


def packed(layer: nn.RNNBase, x: Tensor) -> Tensor:
    output = layer(rnn.pack_padded_sequence(x, torch.tensor([T, T - 2]), batch_first=True))[0]
    return rnn.pad_packed_sequence(output, batch_first=True)[0]


ATTENTION = 2 * 2 * N * H * T * S * (D // H)
PROJECTIONS = 2 * 2 * N * (T + S) * D * D  # of queries and results, of keys and values
FORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fused attention": (lambda: Does(fused), ATTENTION),
    "fused attention with a mask": (
        lambda: Does(lambda x: fused(x, attn_mask=torch.ones(T, S).bool())),
        ATTENTION,
    ),
    "fused attention with dropout": (lambda: Does(lambda x: fused(x, dropout_p=0.5)), ATTENTION),
    "attention by matmul": (
        lambda: Does(lambda x: (heads(x) @ heads(MEMORY.to(x)).mT).softmax(-1) @ heads(MEMORY.to(x))),
        ATTENTION,
    ),
    "attention by einsum": (
        lambda: Does(
            lambda x: torch.einsum(
                "nts,nsd->ntd", torch.einsum("ntd,nsd->nts", x, MEMORY.to(x)).softmax(-1), MEMORY.to(x)
            )
        ),
        ATTENTION,
    ),
    "attention by bmm": (
        lambda: Does(
            lambda x: torch.bmm(
                torch.baddbmm(torch.zeros(1, 1, S), x, MEMORY.to(x).mT, alpha=0.3).softmax(-1), MEMORY.to(x)
            )
        ),
        ATTENTION,
    ),
    "multi-head attention": (
        lambda: Does(
            lambda m, x: m(x, MEMORY.to(x), MEMORY.to(x))[0], nn.MultiheadAttention(D, H, batch_first=True)
        ),
        PROJECTIONS + ATTENTION,
    ),
    "multi-head attention without weights": (
        lambda: Does(
            lambda m, x: m(x, MEMORY.to(x), MEMORY.to(x), need_weights=False)[0],
            nn.MultiheadAttention(D, H, batch_first=True),
        ),
        PROJECTIONS + ATTENTION,
    ),
    "encoder layer": (
        lambda: Does(lambda m, x: m(x), nn.TransformerEncoderLayer(D, H, 4, batch_first=True)),
        2 * N * T * (4 * D * D + 2 * D * 4) + 4 * N * T * T * D,
    ),
    "decoder layer": (
        lambda: Does(lambda m, x: m(x, MEMORY.to(x)), nn.TransformerDecoderLayer(D, H, 16, batch_first=True)),
        2 * N * T * (4 * D * D + 2 * D * 16) + 4 * N * T * T * D + PROJECTIONS + ATTENTION,
    ),
    "linear over more axes": (
        lambda: Does(lambda m, x: m(x[:, None]), nn.Linear(D, OUT)),
        2 * N * T * D * OUT,
    ),
    "bilinear": (lambda: Does(lambda m, x: m(x, x), nn.Bilinear(D, D, OUT)), 2 * N * T * OUT * D * (D + 1)),
    "einsum": (
        lambda: Does(lambda m, x: torch.einsum("ntd,od->nto", x, m.weight), nn.Linear(D, OUT)),
        2 * N * T * D * OUT,
    ),
    "addmm": (lambda: Does(lambda x: torch.addmm(torch.zeros(T), x[0], x[1].T)), 2 * T * T * D),
    "addbmm": (lambda: Does(lambda x: torch.addbmm(torch.zeros(T), x, x.mT)), 2 * N * T * T * D),
    "matrix times vector": (lambda: Does(lambda x: x @ x[0, 0]), 2 * N * T * D),
    "distances": (lambda: Does(lambda x: torch.cdist(x, MEMORY.to(x))), 2 * N * T * S * D),
    "experts": (
        lambda: Does(
            lambda m, x: F.grouped_mm(
                x.flatten(0, 1), m.weight.view(2, D, OUT + 1), offs=torch.tensor([4, N * T]).int()
            ),
            nn.Linear(2 * (OUT + 1), D),
        ),
        2 * N * T * D * (OUT + 1),
    ),
    "Fourier transform": (lambda: Does(lambda x: torch.fft.rfft(x).abs()), 0),
    "checkpointed": (
        lambda: Does(
            lambda m, x: checkpoint(m, x, use_reentrant=False), nn.Sequential(nn.Linear(D, OUT), nn.ReLU())
        ),
        2 * N * T * D * OUT,
    ),
    "LSTM cell": (lambda: Does(lambda m, x: m(x[:, 0])[0], nn.LSTMCell(D, OUT)), 2 * N * 4 * OUT * (D + OUT)),
    "GRU cell": (lambda: Does(lambda m, x: m(x[:, 0]), nn.GRUCell(D, OUT)), 2 * N * 3 * OUT * (D + OUT)),
    "RNN cell": (lambda: Does(lambda m, x: m(x[:, 0]), nn.RNNCell(D, OUT)), 2 * N * OUT * (D + OUT)),
    "packed LSTM": (
        lambda: Does(packed, nn.LSTM(D, OUT, batch_first=True)),
        2 * (T + T - 2) * 4 * OUT * (D + OUT),
    ),
    "packed GRU": (
        lambda: Does(packed, nn.GRU(D, OUT, batch_first=True)),
        2 * (T + T - 2) * 3 * OUT * (D + OUT),
    ),
    "projected LSTM": (
        lambda: Does(
            lambda m, x: m(x)[0], nn.LSTM(D, 6, 2, batch_first=True, bidirectional=True, proj_size=OUT)
        ),
        2 * N * T * 2 * (4 * 6 * (D + OUT) + 6 * OUT + 4 * 6 * (2 * OUT + OUT) + 6 * OUT),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_flops_are_those_of_the_closed_form(name: str, training: bool) -> None:
    build, expected = FORMS[name]
    assert whole(build(), TOKENS, training=training).flops == FIRST + expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("layers", "directions", "batch_first"), [(1, 1, True), (1, 2, False), (3, 2, True)])
def test_flops_of_recurrent_layers(
    kind: str, layers: int, directions: int, batch_first: bool, training: bool
) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    layer = getattr(nn, kind)(D, OUT, layers, batch_first=batch_first, bidirectional=directions == 2)
    model = Does(lambda m, x: m(x if batch_first else x.transpose(0, 1))[0].sum(-1), layer)
    inputs = (D + OUT) + (layers - 1) * (directions * OUT + OUT)
    assert (
        whole(model, TOKENS, training=training).flops == FIRST + 2 * N * T * directions * gates * OUT * inputs
    )


def convolutions() -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    """(name, layer, input, FLOPs). A transposed convolution multiplies at every place of its input."""
    for x, axes in ((TOKENS.mT, 1), (IMAGE, 2), (VIDEO, 3)):
        channels, places = x.shape[1], x[0, 0].numel()
        for groups, stride, dilation in ((1, 1, 1), (1, 2, 2), (channels // 2, 1, 1), (channels, 2, 1)):
            options: dict[str, Any] = {"groups": groups, "stride": stride, "dilation": dilation}
            name, one = f"{axes}d {options}", 2 * N * channels * (2 * channels // groups) * 2**axes
            layer = getattr(nn, f"Conv{axes}d")(channels, 2 * channels, 2, **options)
            yield f"convolution {name}", layer, x, one * layer(x)[0, 0].numel()
            layer = getattr(nn, f"ConvTranspose{axes}d")(channels, 2 * channels, 2, **options)
            yield f"transposed {name}", layer, x, one * places


@pytest.mark.parametrize(
    ("layer", "x", "expected"), [pytest.param(*case[1:], id=case[0]) for case in convolutions()]
)
def test_flops_of_convolutions(layer: nn.Module, x: Tensor, expected: int) -> None:
    assert whole(nn.Sequential(layer), x).flops == expected


def test_lookups_cost_no_flops() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    assert whole(model, torch.zeros(N, T, dtype=torch.int64)).flops == 2 * N * T * 4 * 3


def test_flops_of_a_sparse_matrix() -> None:
    sparse = torch.eye(6).to_sparse()
    with FlopCounter() as counter:
        torch.sparse.mm(sparse, torch.randn(6, 4))
    assert counter.flops == 2 * 6 * 4


@pytest.mark.parametrize(
    ("a", "b", "groups", "expected"),
    [
        ((6, 16), (2, 16, 8), [3, 6], 2 * 6 * 16 * 8),
        ((2, 3, 16), (2, 16, 8), None, 2 * 2 * 3 * 16 * 8),
        ((2, 3, 16), (16, 8), [4, 8], 2 * 3 * 16 * 8),
        ((3, 16), (16, 8), [4, 8], 2 * 3 * 16 * 8),
    ],
)
def test_flops_of_grouped_products(
    a: tuple[int, ...], b: tuple[int, ...], groups: list[int] | None, expected: int
) -> None:
    left = torch.empty(a, dtype=torch.bfloat16, device="meta")
    with FlopCounter() as counter:
        torch.ops.aten._grouped_mm(
            left,
            torch.empty(b, dtype=torch.bfloat16, device="meta"),
            None if groups is None else torch.tensor(groups, dtype=torch.int32, device="meta"),
        )
    assert counter.flops == expected


# ------------------------------------------------------------------------------------------ FLOPs, torch's counter


class Looks(nn.Module):
    """A layer that looks at values: neither meta nor fake tensors can run it."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(D, OUT), nn.Linear(D, OUT)

    def forward(self, x: Tensor) -> Tensor:
        kept = x[x.sum(-1) > 0] if float(x.detach().abs().max()) < 1e6 else x
        return x + F.pad(self.large(kept).tanh().sum(0), (0, D - OUT))


def torchvision_model(name: str, size: int) -> tuple[Callable[[], nn.Module], Tensor]:
    return lambda: torchvision.models.get_model(name, num_classes=7), torch.randn(2, 3, size, size)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "resnet18": torchvision_model("resnet18", 32),
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small", 32),
    "densenet121": torchvision_model("densenet121", 32),
    "shufflenet_v2_x0_5": torchvision_model("shufflenet_v2_x0_5", 32),
    "squeezenet1_1": torchvision_model("squeezenet1_1", 48),
    "efficientnet_b0": torchvision_model("efficientnet_b0", 32),
    "regnet_y_400mf": torchvision_model("regnet_y_400mf", 32),
    "swin_t": torchvision_model("swin_t", 32),
    "attention": (
        lambda: Does(lambda m, x: m(x, x, x)[0], nn.MultiheadAttention(D, H, batch_first=True)),
        TOKENS,
    ),
    "fused attention": (
        lambda: Does(lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3, is_causal=True)),
        TOKENS,
    ),
    "GRU": (
        lambda: Does(lambda m, x: m(x)[0].tanh(), nn.GRU(D, OUT, 2, batch_first=True, bidirectional=True)),
        TOKENS,
    ),
    "RNN": (
        lambda: Does(lambda m, x: m(x)[0].tanh(), nn.RNN(D, OUT, 2, batch_first=True, dropout=0.5)),
        TOKENS,
    ),
    "packed GRU": (lambda: Does(packed, nn.GRU(D, OUT, batch_first=True)), TOKENS),
    "dropout": (lambda: Does(lambda x: F.dropout(torch.relu(F.dropout(x, 0.3)), 0.2)), TOKENS),
    "checkpoint": (
        lambda: Does(
            lambda m, x: checkpoint(m, x, use_reentrant=False).tanh(),
            nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, OUT)),
        ),
        TOKENS,
    ),
    "in place": (lambda: Does(lambda m, x: F.relu_(m(x.mul_(2).add_(1))).tanh_(), nn.Linear(D, D)), TOKENS),
    "decided by values": (lambda: nn.Sequential(nn.Linear(D, D), Looks(), nn.Linear(D, OUT)), TOKENS),
    "frozen below": (
        lambda: Does(lambda m, x: m(x).tanh(), nn.Linear(D, D), first=frozen(nn.Linear(D, D))),
        TOKENS,
    ),
}


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name: str, training: bool) -> None:
    build, x = MODELS[name]
    model = build().train(training)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert whole(model, x, training=training).flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_the_zoo_costs_what_torch_counts(case: zoo.Case, training: bool) -> None:
    if any(isinstance(m, nn.LSTM) for m in case.build().modules()):
        pytest.skip("torch counts none for an LSTM")
    model = case.build().train(training)
    with FlopCounterMode(display=False) as counter:
        model(case.inputs())
    assert whole(model, case.inputs(), training=training).flops == counter.get_total_flops()


# ------------------------------------------------------------------------------------------ saved bytes


def really_saved(model: nn.Module, x: Tensor, training: bool) -> int:
    """Bytes of all storages that autograd keeps in a real run, parameters and buffers apart."""
    resident = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train(training)(x)
    del output
    return sum(storage.nbytes() for key, storage in kept.items() if key not in resident)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_those_that_autograd_holds(name: str, training: bool) -> None:
    build, x = MODELS[name]
    model = build()
    expected = really_saved(model, x.clone(), training)
    assert whole(model, x, training=training).saved_bytes == expected > 0


# ------------------------------------------------------------------------------------------ frozen parameters


def test_frozen_parameters_have_no_gradients_and_no_state() -> None:
    model = nn.Sequential(frozen(nn.Linear(8, 8, bias=False)), nn.Linear(8, 8, bias=False))
    traced = trace(model, (torch.randn(2, 8),), {})
    found, one = profile(traced), 8 * 8 * 4
    assert frozen_parameters(traced) == {"0.weight"}
    cost = cost_of(found, list(found.nodes), frozen_parameters(traced))
    assert (cost.param_bytes, cost.frozen_bytes) == (2 * one, one)
    assert cost.of("memory") == one + one * (2 + 2) + cost.saved_bytes
    assert cost.of("memory", optimizer_states=0) == one + 2 * one + cost.saved_bytes
    assert (cost + cost).of("memory") == 2 * cost.of("memory")


def test_frozen_layers_move_the_cut() -> None:
    """Four frozen layers, then two that train, each of which takes as much memory as four."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(6)]
    model = nn.Sequential(*map(frozen, layers[:4]), *layers[4:])
    cuts = {
        balance: to_local(model, torch.randn(1, 8), method="bp", parts=2, balance=balance).plan.cuts
        for balance in ("params", "memory")
    }
    assert cuts == {"params": ("2",), "memory": ("4",)}


# ------------------------------------------------------------------------------------------ what planning asks for


@pytest.mark.parametrize("balance", ["flops", "activations", "memory"])
def test_planning_asks_for_every_cost_once(balance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts: the costs of nodes once, and of a head twice a cut point (on the first part and later)."""
    found = Found(nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)]), torch.randn(2, 8))
    asked: list[str] = []

    def head(point: CutPoint | None, first: bool) -> Cost:
        asked.append("" if point is None else point.name)
        return Cost()

    summed: list[int] = []
    cost = Profile.cost
    monkeypatch.setattr(Profile, "cost", lambda self, names: summed.append(len(names)) or cost(self, names))
    table = found.table(balance, head)
    for parts in (2, 8, 16):
        assert len(best_cuts(found.best, parts, table.cost)) == parts - 1
    assert len(asked) == 2 * (len(found.best) + 1)
    assert sum(summed) == len(found.traced.train_graph.nodes)
