"""Whatever a trial run does to a model is undone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from localize.convert.restore import preserved


class Scribbles(nn.Module):
    """Changes buffers, attributes and containers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(3), [1]
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        self.count += 1
        self.cache = x
        return self.norm(x) * torch.rand(()) * random.random()


def test_several_models_that_share_modules_in_one_mode() -> None:
    first, second = Scribbles(), Scribbles()
    second.norm = first.norm
    first.eval()
    second.norm.train()
    generators = (torch.get_rng_state(), random.getstate())
    states = [{k: v.clone() for k, v in m.named_buffers()} for m in (first, second)]
    with pytest.raises(ValueError, match="halfway"), preserved(first, second, training=True) as state:
        assert state.modules == [first, first.norm, second]
        assert all(m.training for m in state.modules)
        second(first(torch.randn(4, 3)))
        raise ValueError("halfway")
    assert (first.training, second.training, first.norm.training) == (False, True, True)
    for model, before in zip((first, second), states, strict=True):
        assert model.seen == [1]
        assert not hasattr(model, "cache")
        assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_modes_stay_where_none_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    model[1].train()
    with preserved(model):
        assert [m.training for m in model.modules()] == [False, False, True]
