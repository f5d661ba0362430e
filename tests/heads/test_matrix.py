"""Every method on every layout and task: it trains, the same whatever the order of the samples, or says what does.

Models are converted for real, so the layouts and batch axes are those that planning finds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import CutError, MethodError, get_method, list_methods, to_local
from localize.part import advance

BATCH, CLASSES = 4, 3


class Chain(nn.Module):
    """Blocks one after another, each followed by tanh, then what turns the hidden state into the output."""

    def __init__(self, blocks: list[nn.Module], out: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.out, self.read = nn.ModuleList(blocks), out, read

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            made = block(x)
            x = torch.tanh(made[0] if isinstance(made, tuple) else made)
        return self.out(self.read(x))


def layers(
    make: Callable[..., nn.Module], first: int, width: int, count: int = 3, **options: object
) -> list[nn.Module]:
    return [make(first if i == 0 else width, width, **options) for i in range(count)]


def encoder(batch_first: bool) -> list[nn.Module]:
    def block(_: int, width: int) -> nn.Module:
        return nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=batch_first)

    return layers(block, 8, 8)


class ClassToken(nn.Module):
    """A vision transformer in small: its classifier reads token 0."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(2, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(encoder(batch_first=True))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens[:, 0])


class HeadsApart(nn.Module):
    """Attention heads on an axis of their own, (N, heads, T, D), between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (2, 4)).transpose(1, 2)
        for query in self.queries:
            x = F.scaled_dot_product_attention(query(x), x, x)
        return self.out(x.transpose(1, 2).flatten(2).mean(1))


class Windows(nn.Module):
    """Swin's windows: samples are folded into the first axis between its blocks, where nothing can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(encoder(batch_first=True))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        x = self.stem(x).reshape(-1, 3, 8)
        for block in self.blocks:
            x = block(x)
        return self.out(x.reshape(samples, -1, 8).mean(1))


class LastAxisBatch(Chain):
    """Turns its input over: (T, N, D) inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the input, without the batch
    layout: str  # of the first boundary
    hidden_axis: int | None = 0  # of the batch there
    axis: int = 0  # of the batch in the input
    ids: int = 0
    target: tuple[int, ...] | None = ()  # shape without the batch; None: numbers of shape (2)
    target_axis: int = 0
    task: str | None = None
    refuses: frozenset[str] = frozenset()  # methods that cannot work there
    elsewhere: str = ""  # the layout at another cut, which a method may choose

    def batch(self, samples: int = BATCH) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1)
        shape = (*self.shape[: self.axis], samples, *self.shape[self.axis :])
        x = torch.randint(self.ids, shape, generator=g) if self.ids else torch.randn(shape, generator=g)
        if self.target is None:
            return x, torch.randn(samples, 2, generator=g)
        labels = (*self.target[: self.target_axis], samples, *self.target[self.target_axis :])
        return x, torch.randint(CLASSES, labels, generator=g)


def mean(axis: int | tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.mean(axis)


def linear(width: int = 8, outputs: int = CLASSES) -> nn.Module:
    return nn.Linear(width, outputs)


def at(index: int, axis: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda x: x.select(axis, index)


def as_is(x: Tensor) -> Tensor:
    return x


CONV = {"kernel_size": 3, "padding": 1}
FIRST = {"batch_first": True}
ONE_A_SAMPLE = frozenset({"scpl", "al"})
CASES = [
    Case("vector", lambda: Chain(layers(nn.Linear, 6, 8), linear(), as_is), (6,), "vector"),
    Case("map", lambda: Chain(layers(nn.Conv2d, 2, 8, **CONV), linear(), mean((2, 3))), (2, 5, 4), "map"),
    Case("map_last", lambda: Chain(layers(nn.Linear, 6, 8), linear(), mean((1, 2))), (5, 4, 6), "map_last"),
    Case("map of one axis", lambda: Chain(layers(nn.Conv1d, 2, 8, **CONV), linear(), mean(2)), (2, 7), "map"),
    Case("video", lambda: Chain(layers(nn.Conv3d, 2, 8, **CONV), linear(), mean((2, 3, 4))), (2, 3, 5, 4), "map"),
    Case("video_last", lambda: Chain(layers(nn.Linear, 6, 8), linear(), mean((1, 2, 3))), (3, 5, 4, 6), "map_last"),
    Case("tokens", lambda: Chain(encoder(True), linear(), mean(1)), (7, 8), "tokens"),
    Case("class token", ClassToken, (2, 4, 4), "tokens"),
    Case("tokens, batch second", lambda: Chain(encoder(False), linear(), mean(0)), (7, 8), "tokens", 1, axis=1),
    Case("tokens, one a sample", lambda: Chain(encoder(False), linear(), mean(0)), (BATCH, 8), "tokens", 1, axis=1),
    Case("tokens, turned over", lambda: LastAxisBatch(encoder(False), linear(), mean(0)), (7, 8), "tokens", 1),
    Case("rnn", lambda: Chain(layers(nn.GRU, 6, 8, **FIRST), linear(), at(-1)), (7, 6), "tokens"),
    Case("rnn, batch second", lambda: Chain(layers(nn.LSTM, 6, 8), linear(), at(-1, 0)), (7, 6), "tokens", 1, axis=1),
    Case(
        "rnn, both directions",
        lambda: Chain([nn.LSTM(6, 4, bidirectional=True, **FIRST), nn.GRU(8, 8, **FIRST)], linear(), at(-1)),
        (7, 6),
        "tokens",
    ),
    Case("heads apart", HeadsApart, (5, 8), "other"),
    Case("windows", Windows, (9, 6), "tokens"),
    Case(
        "language model",
        lambda: Chain([nn.Embedding(9, 8), *layers(nn.GRU, 8, 8, count=2, **FIRST)], linear(), as_is),
        (7,),
        "tokens",
        ids=9,
        target=(7,),
        refuses=ONE_A_SAMPLE,
    ),
    Case(
        "language model, batch second",
        lambda: Chain([nn.Embedding(9, 8), *layers(nn.GRU, 8, 8, count=2)], linear(), as_is),
        (7,),
        "tokens",
        1,
        axis=1,
        ids=9,
        target=(7,),
        target_axis=1,
        refuses=ONE_A_SAMPLE | {"lct"},
    ),
    Case(
        "language model, convolutions",
        lambda: Chain(layers(nn.Conv1d, 2, 8, **CONV), linear(), lambda x: x.transpose(1, 2)),
        (2, 7),
        "map",
        target=(7,),
        task="causal_lm",
        refuses=ONE_A_SAMPLE,
        elsewhere="tokens",
    ),
    Case(
        "segmentation",
        lambda: Chain(layers(nn.Conv2d, 2, 8, **CONV), nn.Conv2d(8, CLASSES, 1), as_is),
        (2, 6, 4),
        "map",
        target=(6, 4),
        refuses=ONE_A_SAMPLE,
    ),
    Case(
        "segmentation, channels last",
        lambda: Chain(layers(nn.Linear, 2, 8), nn.Conv2d(8, CLASSES, 1), lambda x: x.permute(0, 3, 1, 2)),
        (6, 4, 2),
        "map_last",
        target=(6, 4),
        refuses=ONE_A_SAMPLE,
    ),
    Case(
        "regression",
        lambda: Chain(layers(nn.Conv2d, 2, 8, **CONV), linear(8, 2), mean((2, 3))),
        (2, 5, 4),
        "map",
        target=None,
        task="regression",
        refuses=frozenset({"scpl"}),
    ),
    Case(
        "regression, rnn batch second",
        lambda: Chain(layers(nn.GRU, 6, 8), linear(8, 2), at(-1, 0)),
        (7, 6),
        "tokens",
        1,
        axis=1,
        target=None,
        task="regression",
        refuses=frozenset({"scpl"}),
    ),
]
MAPS = ("map", "map_last")
METHODS = [
    ("bp", {}, None),
    ("scpl", {}, None),
    ("scpl", {"pool": "flatten", "projector": "mlp"}, None),
    ("al", {}, None),
    ("nwise", {}, None),
    ("nwise", {"head": "linear", "gradient": "sum"}, None),
    ("nwise", {"head": "conv"}, MAPS),
    ("nwise", {"head": "mlp_sr"}, MAPS),
    ("nwise", {"head": "transformer"}, ("tokens",)),
    ("lct", {}, None),
    ("lct", {"critic": "linear"}, None),
    ("lct", {"critic": "conv"}, MAPS),
    ("lct", {"critic": "imagenet"}, MAPS),
    ("early_exit", {}, None),
    ("early_exit", {"hidden": 4}, None),
    ("early_exit", {"token_pool": "first"}, None),
    ("joint", {}, None),
    ("joint", {"token_pool": "last"}, None),
]  # name, options, layouts that the options are for (None: all)


def fits(case: Case, name: str, options: dict[str, object], layouts: tuple[str, ...] | None) -> bool:
    dense = case.target is not None and len(case.target) > 0
    if name in case.refuses or (layouts is not None and not {case.layout, case.elsewhere} & {*layouts}):
        return False
    one_a_sample = options.get("head") == "mlp_sr" or options.get("critic") in ("conv", "imagenet")
    return not (dense and one_a_sample) and not (case.task == "causal_lm" and options.get("head") == "conv")


def convert(case: Case, name: str, options: dict[str, object]):
    torch.manual_seed(0)
    return to_local(case.build(), case.batch()[0], method=get_method(name, **options), task=case.task, parts=2)


def test_nothing_is_cut_where_samples_are_folded_into_windows() -> None:
    with pytest.raises(CutError, match=r"cannot be cut after 'blocks\.0'.*\n.*Cut points are"):
        to_local(Windows(), torch.randn(4, 9, 6), method="bp", cuts=["blocks.0"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layouts_and_batch_axes_are_found(case: Case) -> None:
    local = convert(case, "bp", {})
    spec = local.plan.boundaries[0].spec
    assert local.plan.batch_axis == case.axis
    assert (spec.layout, spec.batch_axis) == (case.layout, case.hidden_axis)


OPTIONS_ON = ("map", "video_last", "tokens, batch second", "rnn, both directions", "language model", "segmentation")
PAIRS = [
    pytest.param(
        case,
        *method,
        id="-".join([case.name, method[0], *map(str, method[1].values())]),
        marks=[pytest.mark.slow] if method[1] and case.name != "tokens, batch second" else [],
    )
    for case in CASES
    for method in METHODS
    if not method[1] or case.name in OPTIONS_ON
]


@pytest.mark.parametrize(("case", "name", "options", "layouts"), PAIRS)
def test_it_trains_or_says_what_does(
    case: Case, name: str, options: dict[str, object], layouts: tuple[str, ...] | None
) -> None:
    if not fits(case, name, options, layouts):
        with pytest.raises(MethodError) as refusal:
            convert(case, name, options)
        instead = str(refusal.value).rpartition(". ")[2] if "Use" not in str(refusal.value) else str(refusal.value)
        named = [word for word in re.findall(r"\w+", instead) if word in list_methods()]
        assert any(_works(case, word) for word in named), str(refusal.value)
        return
    local = convert(case, name, options)
    x, target = case.batch()
    losses = local.losses(x, target)
    sum(losses).backward()
    assert all(math.isfinite(loss.item()) for loss in losses)
    for part in local.parts:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    for head in local.heads[:-1]:
        assert head is None or all(p.grad is not None for p in head.parameters())
    local.train_step(x, target, local.optimizers(lambda p: torch.optim.SGD(p, lr=0.1)))


@cache
def _works(case: Case, name: str) -> bool:
    try:
        convert(case, name, {})
    except MethodError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in list_methods() if name != "bp"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_samples_are_told_apart(case: Case, name: str) -> None:
    """Samples in another order change no loss, and bring every prediction with them; one alone is predicted alike."""
    if name in case.refuses:
        return
    local = convert(case, name, {}).double()
    x, target = case.batch()
    x = x if case.ids else x.double()
    target = target.double() if target.is_floating_point() else target
    order = torch.tensor([2, 0, 3, 1])
    # No batch norm in the loss: its running statistics do the same for every order.
    local.eval()
    with torch.no_grad():
        one = local.losses(x, target)
        other = local.losses(x.index_select(case.axis, order), target.index_select(case.target_axis, order))
    torch.testing.assert_close(one, other)
    for number in local.predict_all(x):
        whole = local.predict(x, exit=number)
        turned = local.predict(x.index_select(case.axis, order), exit=number)
        torch.testing.assert_close(whole.index_select(case.target_axis, order), turned)
        alone = local.predict(x.narrow(case.axis, 2, 1), exit=number)
        torch.testing.assert_close(whole.narrow(case.target_axis, 2, 1), alone)


@pytest.mark.parametrize("case", [c for c in CASES if "lct" not in c.refuses], ids=lambda case: case.name)
def test_a_loss_a_sample_moves_with_its_sample(case: Case) -> None:
    local = convert(case, "lct", {})
    local.eval()
    x, target = case.batch()
    order = torch.tensor([3, 2, 0, 1])
    with torch.no_grad():
        made = []
        for inputs, labels in ((x, target), (x.index_select(case.axis, order), target[order])):
            stream = local.signature.stream((inputs,), {})
            made.append(local.heads[0](advance(local.parts[0], stream)[0], labels).per_sample)
    assert made[0].shape == (BATCH,)
    torch.testing.assert_close(made[0][order], made[1])
