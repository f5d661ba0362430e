"""A small model with everything that a resumed run could get wrong, its data, and comparisons to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, to_local
from localize.heads.base import Method
from localize.runtime.trainer import Trainer
from localize.weights import weights_of

CLASSES, SAMPLES, BATCH = 4, 22, 6  # the last batch is ragged
BATCHES = 4  # an epoch


def model(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


def converted(method: str | Method = "early_exit", parts: int = 3, dropout: float = 0.3) -> LocalModel:
    torch.manual_seed(1)
    return to_local(model(dropout), torch.randn(4, 5), method=method, parts=parts, verify=False)


def data(samples: int = SAMPLES) -> TensorDataset:
    g = torch.Generator().manual_seed(7)
    targets = torch.randint(0, CLASSES, (samples,), generator=g)
    inputs = torch.randn(samples, 5, generator=g) + targets[:, None]
    return TensorDataset(inputs, targets)


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=BATCH, shuffle=shuffle)


class Interruption(Exception):
    """What a test stops training with."""


class Breaking:
    """A loader that fails in front of batch ``at``, counted over all epochs from 1."""

    def __init__(self, inner: DataLoader[Any], at: int) -> None:
        self.inner, self.at, self.given = inner, at, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.inner:
            self.given += 1
            if self.given == self.at:
                raise Interruption
            yield batch


def trainer(local: LocalModel, folder: Path | None = None, **options: Any) -> Trainer:
    chosen: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "scheduler": partial(StepLR, step_size=1, gamma=0.5),
        "checkpoint_dir": folder,
        "seed": 3,
    }
    return Trainer(local, **(chosen | options))


def tensors(local: LocalModel) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in weights_of(local).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History without what the clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in rows]
