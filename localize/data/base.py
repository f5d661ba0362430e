"""A data set with its two halves, and loaders for them.

Shape legend: ``N`` batch, ``C`` channels or classes, ``H W`` space, ``T`` tokens, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from localize.errors import ConfigError
from localize.runtime.batches import split_batch

VALIDATION_SHARE = 5  # one sample in five, where a source comes in one piece
Loaders = tuple[DataLoader[Any], DataLoader[Any]]


class TensorData(Dataset[tuple[Tensor, Tensor]]):
    """Samples held in two tensors; a batch is one indexing operation instead of one a sample."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ConfigError(f"{len(inputs)} inputs and {len(targets)} targets; they must be as many.")
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The samples at ``indices``, stacked."""
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.targets[chosen]


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Lets a DataLoader fetch whole batches: it calls ``__getitems__`` where there is one."""

    def __init__(self, data: TensorData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.data.batch(indices)


def _as_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Data:
    """A training and a validation half, and what they are for.

    ``task`` is a task's name (see ``Task``), or None where only the model can tell.
    """

    name: str
    train: Any  # a Dataset, or a DataLoader of the user's own
    val: Any
    num_classes: int | None = None
    task: str | None = None
    note: str = ""

    def loaders(self, batch_size: int = 64, seed: int = 0, workers: int = 0) -> Loaders:
        """Loaders of both halves: training in a new order every epoch, validation in order.

        The order has a generator of its own under ``seed``, which ``Trainer`` puts at the start of every epoch.

        Raises:
            ConfigError: no batch fits.
        """
        if batch_size < 1:
            raise ConfigError(f"batch size is {batch_size}; it must be at least 1.")
        return (
            _loader(self.train, batch_size, workers, seed),
            _loader(self.val, min(batch_size * 4, 512), workers, None),
        )

    def example(self, batch: int = 2) -> Any:
        """Inputs of the first ``batch`` training samples: an example to convert a model with."""
        if isinstance(self.train, DataLoader):
            inputs, _ = split_batch(next(iter(self.train)))
            return tree_map_only(Tensor, lambda tensor: tensor[:batch], inputs)
        inputs, _ = split_batch(default_collate([self.train[i] for i in range(min(batch, len(self.train)))]))
        return inputs


def _loader(data: Any, batch_size: int, workers: int, seed: int | None) -> DataLoader[Any]:
    if isinstance(data, DataLoader):
        return data
    whole = isinstance(data, TensorData)
    return DataLoader(
        _Batches(data) if whole else data,
        batch_size=batch_size,
        shuffle=seed is not None,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),  # else every copy to a GPU waits for all that was started before
        collate_fn=_as_is if whole else None,
    )


def split_indices(length: int) -> tuple[list[int], list[int]]:
    """A fixed random split of ``range(length)`` into training and validation indices.

    Raises:
        ConfigError: too few samples for two halves.
    """
    if length < VALIDATION_SHARE:
        raise ConfigError(f"{length} samples are too few; at least {VALIDATION_SHARE} are needed.")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).tolist()
    count = length // VALIDATION_SHARE
    return sorted(order[count:]), sorted(order[:count])


def split_dataset(data: Any) -> tuple[Any, Any]:
    """Both halves of a data set that comes in one piece."""
    train, val = split_indices(len(data))
    if isinstance(data, TensorData):
        return TensorData(*data.batch(train)), TensorData(*data.batch(val))
    return Subset(data, train), Subset(data, val)
