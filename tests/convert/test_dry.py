"""Meta tensors, fake tensors and real ones give the same costs; what meta tensors stood in for is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.convert.dry import NotOnMeta, on_fake, on_meta
from localize.convert.profile import profile, runs
from localize.convert.record import trace
from localize.convert.traced import TracedModel
from tests import zoo


class Does(nn.Module):
    """Layers, then any function of their output."""

    def __init__(self, function: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.Sequential(*layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers(x))


def noted(traced: TracedModel, training: bool, place: Any) -> dict[str, Any]:
    """All that a run notes down; storages by the order in which they were met."""
    costs, batches, others = runs(traced, training, place)
    numbers: dict[int, int] = {}
    saved = {
        name: [(numbers.setdefault(key, len(numbers)), nbytes) for key, nbytes in found.items()]
        for name, found in costs.saved.items()
    }
    return {
        "flops": costs.flops,
        "saved": saved,
        "shapes": costs.shapes,
        "batches": batches,
        "others": others,
    }


def tables(model: nn.Module) -> list[Any]:
    """The very tables of all modules, and what is in them, in order."""
    return [
        (id(vars(module)[name]), [(key, id(t)) for key, t in vars(module)[name].items()])
        for module in model.modules()
        for name in ("_parameters", "_buffers", "_modules")
    ]


# ------------------------------------------------------------------------------------------ the same costs

TOKENS = torch.randn(4, 6, 8)
IMAGES = torch.randn(2, 4, 12, 12)
SAME: dict[str, tuple[nn.Module, Tensor]] = {
    "frozen batch norm": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).requires_grad_(False)), IMAGES),
    "norms": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)), IMAGES),
    "pools": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)), IMAGES),
    "dropouts": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout2d(), nn.AlphaDropout()), IMAGES),
    "cells": (Does(lambda x: x[0], nn.Flatten(), nn.LSTMCell(48, 5)), TOKENS),
    "attention": (Does(lambda x: (x @ x.mT).softmax(-1) @ x, nn.Linear(8, 8)), TOKENS),
    "made in the forward": (Does(lambda x: x * torch.arange(8) * torch.tensor(2.0), nn.Linear(8, 8)), TOKENS),
    "weight norm": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU()), TOKENS),
    "spectral norm": (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))), TOKENS),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [c for c in zoo.CASES if c.name != "encoder"], ids=str)
def test_the_zoo_costs_the_same_on_meta_and_on_fake_tensors(case: zoo.Case, training: bool) -> None:
    traced = trace(case.build(), (case.inputs(),), {})
    assert noted(traced, training, on_meta) == noted(traced, training, on_fake)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_layers_cost_the_same_on_meta_and_on_fake_tensors(name: str, training: bool) -> None:
    model, x = SAME[name]
    traced = trace(model, (x,), {})
    assert noted(traced, training, on_meta) == noted(traced, training, on_fake)


DIFFERENT: dict[str, tuple[nn.Module, Tensor]] = {
    "LSTM": (Does(lambda x: x[0], nn.LSTM(8, 5)), TOKENS),
    "GRU": (Does(lambda x: x[0], nn.GRU(8, 5)), TOKENS),
    "RNN": (Does(lambda x: x[0], nn.RNN(8, 5)), TOKENS),
    "fused attention": (Does(lambda x: F.scaled_dot_product_attention(x, x, x), nn.Linear(8, 8)), TOKENS),
    "encoder": (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), TOKENS),
    "embedding bag": (nn.Sequential(nn.EmbeddingBag(5, 3), nn.ReLU()), torch.zeros(4, 3, dtype=torch.int64)),
    "half precision": (nn.Sequential(nn.Linear(8, 8), nn.ReLU()).bfloat16(), TOKENS.bfloat16()),
    "halved on the way": (Does(lambda x: F.layer_norm(x.bfloat16(), (8,)), nn.Linear(8, 8)), TOKENS),
    "channels last": (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last),
        IMAGES,
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_on_meta_is_refused(name: str) -> None:
    model, x = DIFFERENT[name]
    traced, before = trace(model, (x,), {}), tables(model)
    with pytest.raises(NotOnMeta):
        runs(traced, True, on_meta)
    assert tables(model) == before
    found = profile(traced)
    assert {name: node.flops for name, node in found.nodes.items()} == runs(traced, True, on_fake)[0].flops


class Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_cuda else -x


def test_a_layer_that_looks_at_the_device_is_refused() -> None:
    traced = trace(nn.Sequential(nn.Linear(8, 8), Looks()), (TOKENS,), {})
    with pytest.raises(NotOnMeta):
        runs(traced, True, on_meta)


DEVICES: list[str] = []


class Notes(nn.Module):
    def __init__(self, fails_on: str = "") -> None:
        super().__init__()
        self.fails_on = fails_on

    def forward(self, x: Tensor) -> Tensor:
        DEVICES.append(f"{type(x).__name__} {x.device}")
        if x.device.type == self.fails_on:
            raise ValueError("not here")
        return x


@pytest.fixture(name="devices")
def _devices() -> Iterator[list[str]]:
    DEVICES.clear()
    yield DEVICES
    DEVICES.clear()


def test_meta_comes_first_then_fake_tensors(devices: list[str]) -> None:
    for fails_on, expected in (("", ["Tensor meta"] * 2), ("meta", ["Tensor meta", *["FakeTensor cpu"] * 2])):
        traced = trace(nn.Sequential(nn.Linear(8, 8), Notes(fails_on)), (TOKENS,), {})
        devices.clear()
        profile(traced)
        assert devices == expected


# ------------------------------------------------------------------------------------------ nothing left behind


class Entangled(nn.Module):
    """Tied weights, one layer under two names, a view, a buffer outside the state, a gap, a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.out.weight = self.embed.weight
        self.again = self.embed
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.register_buffer("scale", torch.ones(8), persistent=False)
        self.register_buffer("gap", None)
        self.register_buffer("part_of_scale", self.scale[:4])
        self.grown = nn.Parameter(torch.ones(8), requires_grad=False)
        self.constant = torch.full((8,), 2.0)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.again(self.embed(x))) * self.scale + self.constant * self.grown
        self.part_of_scale.add_(0)
        if self.fails:
            raise KeyboardInterrupt
        return self.out(x)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    model = Entangled()
    traced = trace(model, (TOKENS,), {})
    before, values = (
        tables(model),
        {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())},
    )
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), on_meta([model]):
        model.fails = fails
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        assert [n for n, _ in (*model.named_parameters(), *model.named_buffers())] == list(values)
        assert model.out.weight is model.embed.weight
        assert [p.requires_grad for p in (model.embed.weight, model.grown)] == [True, False]
        model.constant = model.constant.to("meta")
        assert model(torch.empty(4, 6, 8)).device.type == "meta"
    model.fails = False
    assert tables(model) == before
    assert all(torch.equal(v, values[k]) for k, v in (*model.named_parameters(), *model.named_buffers()))
    assert noted(traced, True, on_meta) == noted(traced, True, on_fake)
    assert tables(model) == before


def test_a_tensor_that_cannot_be_stood_in_for_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    before = tables(model)
    with pytest.raises(NotOnMeta), on_meta([model]):
        pass
    assert tables(model) == before
