"""Random numbers that are functions of where they are drawn, and of nothing else.

    ambient   seeded once an epoch from (seed, epoch): data order, augmentation
    a step    the whole of it runs beside the ambient stream, which does not move: (seed, 0, step, replica)
    a stage   its forward passes draw from streams of their own: (seed, part, step, replica, micro-batch),
              and its head's likewise, with -1 for the micro-batch
    a layer   initial weights that no file holds: (seed, -1, path)

So an epoch that is resumed in the middle sees the same data, and a part draws the same dropout masks whether
all parts share a process or each has one.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_NUMPY_SEEDS = 2**32


def derive(*numbers: int) -> int:
    """A seed of 64 bits from integers: equal everywhere, and unrelated for neighbours."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def generators(*devices: torch.device) -> list[torch.Generator]:
    """The default generators of the CPU and of ``devices``, as far as they have one."""
    result = [torch.default_generator]
    for device in devices:
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            result.append(torch.cuda.default_generators[index])
        elif device.type == "mps":
            result.append(torch.mps._get_default_mps_generator())
    return result


class Seeded:
    """A context in which the default generators start from ``seed``; afterwards they are as they were before."""

    __slots__ = ("_before", "_generators", "_seed")

    def __init__(self, used: Sequence[torch.Generator], seed: int) -> None:
        self._generators, self._seed = used, seed
        self._before: list[Tensor] = []

    def __enter__(self) -> None:
        self._before = [generator.get_state() for generator in self._generators]
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)


class Streams:
    """Where all that data loading may draw from has come to.

    That is torch's default generators (of the CPU, unless ``used`` says which), Python's ``random`` and, where it is
    loaded, NumPy's global one.
    """

    def __init__(self, used: Sequence[torch.Generator] = (torch.default_generator,)) -> None:
        numpy: Any = sys.modules.get("numpy")
        self._used = used
        self._states = (
            [generator.get_state() for generator in used],
            random.getstate(),
            numpy.random.get_state() if numpy is not None else None,
        )

    def put(self) -> None:
        """Goes on from here."""
        states, python_state, numpy_state = self._states
        for generator, state in zip(self._used, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        if numpy_state is not None:
            sys.modules["numpy"].random.set_state(numpy_state)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """A context that draws from here, and goes on from where the last one ended."""
        before = Streams(self._used)
        self.put()
        try:
            yield
        finally:
            self._states = Streams(self._used)._states
            before.put()


def seed_all(number: int, used: Sequence[torch.Generator] = (torch.default_generator,)) -> None:
    """Seeds what ``Streams`` looks at."""
    for generator in used:
        generator.manual_seed(number)
    random.seed(number)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number % _NUMPY_SEEDS)


@contextmanager
def ambient(used: Sequence[torch.Generator], seed: int, epoch: int) -> Iterator[None]:
    """All that ``Streams`` looks at, seeded for one epoch and put back afterwards."""
    before = Streams(used)
    try:
        seed_all(derive(seed, epoch), used)
        yield
    finally:
        before.put()


def aim(loader: Any, seed: int, epoch: int) -> None:
    """Puts a loader's own sources of order at the start of ``epoch`` (from 0).

    ``set_epoch`` is called on the loader and its samplers, where they have it; generators that were handed to
    them are seeded, since they would otherwise go on from wherever the process left them.
    """
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    for holder in holders:
        set_epoch = getattr(holder, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(derive(seed, epoch))
