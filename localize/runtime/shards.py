"""The batches of a loader among replicas: each takes its share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from localize.errors import ConfigError
from localize.runtime.seeding import Streams, derive, seed_all

_OWN_WAY = ("__iter__", "_get_iterator", "_index_sampler")  # a loader that overrides these reads in a way of its own


class Shard:
    """Every ``count``-th batch of a loader, from the one at ``index`` (from 0) on; an incomplete rest is left out.

    Of a ``DataLoader`` with a map-style data set nothing else is loaded; its workers draw random numbers of their own
    for each ``index``, while its samplers draw what they would draw without others. Any other iterable is read whole.

    Raises:
        ConfigError: while iterating, if the loader has fewer than ``count`` batches.
    """

    def __init__(self, loader: Iterable[Any], index: int, count: int) -> None:
        self.loader, self.index, self.count = loader, index, count
        self._picker = _Every(loader, index, count)
        if isinstance(loader, DataLoader) and _reads_by_index(loader):
            self._picker = _Chosen(_sampler_of(loader)[1], index, count)
        self._workers: Any = None  # those that persist from one epoch to the next

    def __iter__(self) -> Iterator[Any]:
        yield from self._loaded() if isinstance(self._picker, _Chosen) else self._picker
        if self._picker.seen < self.count:
            raise ConfigError(
                f"The loader yields {self._picker.seen} batches, and data_parallel={self.count} takes that many for "
                "one step; make batches smaller, or data_parallel."
            )

    def _loaded(self) -> Iterator[Any]:
        assert isinstance(self.loader, DataLoader)
        own = copy.copy(self.loader)
        own.worker_init_fn = partial(_begin, self.index, self.loader.worker_init_fn)
        # A loader lets nobody set its samplers, since its other attributes may not fit them. These do.
        vars(own).update({_sampler_of(own)[0]: self._picker, "_iterator": self._workers})
        yield from own
        self._workers = own._iterator


class _Every:
    """Every ``count``-th item; ``seen`` is how many there were in all."""

    def __init__(self, items: Iterable[Any], index: int, count: int) -> None:
        self.items, self.index, self.count, self.seen = items, index, count, 0

    def __iter__(self) -> Iterator[Any]:
        return self._pick(iter(self.items))

    def _pick(self, items: Iterator[Any]) -> Iterator[Any]:
        kept, self.seen = None, 0
        for item in items:
            if self.seen % self.count == self.index:
                kept = item
            self.seen += 1
            if self.seen % self.count == 0:
                yield kept
                kept = None


class _Chosen(_Every):
    """Every ``count``-th of the indices that a sampler yields.

    The data set draws from the same streams of random numbers as the sampler. Since each replica loads other samples,
    the sampler would go on from other places in them, and replicas would disagree about what the next batch is. So
    the sampler keeps the streams, as they were, for itself; the data set gets others, and not the same on any two
    replicas.
    """

    def __iter__(self) -> Iterator[Any]:
        return self._pick(self._apart(iter(self.items)))

    def __len__(self) -> int:
        return len(self.items) // self.count  # type: ignore[arg-type]

    def _apart(self, items: Iterator[Any]) -> Iterator[Any]:
        streams = Streams()
        seed_all(derive(int(torch.empty((), dtype=torch.int64).random_()), self.index))
        while True:
            with streams.instead():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


def _begin(index: int, then: Any, worker: int) -> None:
    """What a worker process begins with."""
    number = derive(torch.initial_seed(), index)
    seed_all(number)
    object.__setattr__(get_worker_info(), "seed", number)  # nobody may set it otherwise
    if then is not None:
        then(worker)


def _reads_by_index(loader: DataLoader[Any]) -> bool:
    own_way = any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in _OWN_WAY)
    return not own_way and not isinstance(loader.dataset, IterableDataset)


def _sampler_of(loader: DataLoader[Any]) -> tuple[str, Iterable[Any]]:
    """What yields the indices of one batch after another, and the attribute that holds it."""
    if loader.batch_sampler is not None:
        return "batch_sampler", loader.batch_sampler
    return "sampler", loader.sampler
