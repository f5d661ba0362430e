"""Each replica loads its own batches: those it would have taken if it had loaded them all."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from localize import ConfigError
from localize.runtime import seeding
from localize.runtime.seeding import generators
from localize.runtime.shards import Shard

SAMPLES, SEED = 31, 3
CPU = generators(torch.device("cpu"))


class Counting(Dataset[Tensor]):
    """Its own index, and random numbers of three kinds, as augmentation draws them; notes what was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.tensor([index, torch.rand(()), random.random(), numpy.random.rand()], dtype=torch.float64)


class Whole:
    """A loader that is no ``DataLoader``: all of it is read."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Wandering:
    """A sampler that draws whenever it is asked, from the streams that the data set draws from too."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(SAMPLES))
        while left:
            number = random.random() + torch.rand(()).item() + numpy.random.rand()
            yield left.pop(int(number * 1000) % len(left))

    def __len__(self) -> int:
        return SAMPLES


class Eager:
    """Batches of indices, drawn at once."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.randperm(SAMPLES).split(4))  # type: ignore[arg-type]


def indices(batches: Iterable[Tensor]) -> list[list[int]]:
    return [batch.reshape(-1, 4)[:, 0].int().tolist() for batch in batches]


def epoch(shard: Iterable[Any], loader: Any, number: int = 0) -> list[Tensor]:
    with seeding.ambient(CPU, SEED, number):
        seeding.aim(loader, SEED, number)
        return list(shard)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


LOADERS: dict[str, Any] = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "dropping": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "generator": {"batch_size": 4, "shuffle": True, "generator": seeded(5)},
    "replacement": {"batch_size": 4, "sampler": RandomSampler(range(SAMPLES), replacement=True, num_samples=40)},
    "subset": {"batch_size": 4, "sampler": SubsetRandomSampler(range(20))},
    "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * SAMPLES, 25)},
    "batches": {"batch_sampler": BatchSampler(RandomSampler(range(SAMPLES)), 4, drop_last=False)},
    "eager": {"batch_sampler": Eager()},
    "one by one": {"batch_size": None, "shuffle": True},
    "collated": {"batch_size": 4, "shuffle": True, "collate_fn": lambda rows: torch.stack(rows)},
}


@pytest.mark.parametrize(
    ("kind", "count", "workers"),
    [
        *((kind, count, 0) for kind in LOADERS for count in (2, 3)),
        *((kind, 2, 2) for kind in ("shuffled", "generator", "eager", "one by one")),
    ],
)
def test_shares_are_those_of_the_whole_loader(kind: str, count: int, workers: int) -> None:
    data = Counting()
    loader = DataLoader(data, num_workers=workers, **LOADERS[kind])
    for number in range(2):
        expected = [indices(epoch(Shard(Whole(loader), i, count), loader, number)) for i in range(count)]
        data.asked.clear()
        for index in range(count):
            found = indices(epoch(Shard(loader, index, count), loader, number))
            assert found == expected[index]
            if not workers:
                assert data.asked == [i for batch in found for i in batch]  # and nothing else was loaded
                data.asked.clear()
        steps = sum(map(len, expected))
        assert 0 < steps == len(indices(epoch(loader, loader, number))) // count * count


@pytest.mark.parametrize("workers", [0, 2])
def test_what_replicas_draw_differs_and_can_be_repeated(workers: int) -> None:
    """Replicas that seed alike would augment different samples alike."""
    loader = DataLoader(Counting(), batch_size=4, shuffle=True, num_workers=workers)
    shares = [torch.cat(epoch(Shard(loader, index, 2), loader)) for index in range(2)]
    for column in (1, 2, 3):
        assert len({float(row[column]) for share in shares for row in share}) == len(shares[0]) + len(shares[1])
    for index, share in enumerate(shares):
        assert torch.equal(torch.cat(epoch(Shard(loader, index, 2), loader)), share)


def test_a_sampler_that_draws_between_batches_yields_the_same_to_all() -> None:
    """Since replicas load different samples, it went on from different random numbers."""
    loader = DataLoader(Counting(), batch_size=4, sampler=Wandering())  # type: ignore[arg-type]
    shares = [indices(epoch(Shard(loader, index, 2), loader)) for index in range(2)]
    taken = [i for share in shares for batch in share for i in batch]
    assert sorted(taken) == list(range(SAMPLES))


def test_the_loader_itself_is_as_it_was() -> None:
    loader = DataLoader(Counting(), batch_size=4, shuffle=True)
    before, expected = dict(vars(loader)), indices(epoch(loader, loader))
    shares = iter(Shard(loader, 0, 2))
    next(shares)  # in the middle of it
    assert vars(loader) == before
    assert indices(epoch(loader, loader)) == expected


class Seeds(Dataset[Tensor]):
    """Who loads, and what it was given to draw from."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        info = get_worker_info()
        assert info is not None
        return torch.tensor([info.id, info.seed % 2**31, self.mark])  # type: ignore[attr-defined]


def mark(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.mark = 100 + worker  # type: ignore[attr-defined]


def test_workers_begin_as_the_loader_says_and_persist() -> None:
    loader = DataLoader(
        Seeds(), batch_size=2, num_workers=2, worker_init_fn=mark, persistent_workers=True
    )
    shards = [Shard(loader, index, 2) for index in range(2)]
    first = [torch.cat(epoch(shard, loader)) for shard in shards]
    workers = [shard._workers for shard in shards]
    assert first[0][:, 2].unique().tolist() == [100, 101]
    assert len({int(seed) for share in first for seed in share[:, 1]}) == 4
    second = [torch.cat(epoch(shard, loader, 1)) for shard in shards]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # workers of the first epoch
    assert [shard._workers for shard in shards] == workers
    assert loader._iterator is None


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(14.0).split(1))


class Twice(DataLoader[Tensor]):
    """Reads in a way of its own."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield -batch


def test_other_loaders_are_read_whole() -> None:
    stream = DataLoader(Stream(), batch_size=2)
    assert [[int(b[0]) for b in Shard(stream, i, 2)] for i in range(2)] == [[0, 4, 8], [2, 6, 10]]
    twice = Twice(torch.arange(1.0, 5.0), batch_size=2)  # type: ignore[arg-type]
    assert [[float(b[0]) for b in Shard(twice, i, 2)] for i in range(2)] == [[1, 3], [-1, -3]]
    assert [list(Shard(range(7), index, 3)) for index in range(3)] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("loader", [range(2), DataLoader(torch.arange(2.0))], ids=["any", "DataLoader"])  # type: ignore[arg-type]
def test_too_few_batches_for_one_step(loader: Iterable[Any]) -> None:
    with pytest.raises(ConfigError, match="yields 2 batches, and data_parallel=3"):
        list(Shard(loader, 0, 3))
