"""Runs of a model, in one mode, that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from localize.convert.restore import ModelState, RandomState


@contextmanager
def untouched(modules: Iterable[nn.Module], training: bool, contents: bool = True) -> Iterator[None]:
    """Puts ``modules`` in one mode for a while and restores whatever their forward changed, random states too.

    ``contents=False`` leaves the *values* of buffers alone, for runs that write into none. Fake runs may write:
    an operator on real tensors only (a counter of batches) is executed even there.
    """
    tops = list(modules)
    states = [ModelState(module) for module in tops]
    generators = RandomState()
    if not contents:
        for state in states:
            state.buffers.clear()
    try:
        for module in tops:
            module.train(training)
        yield
    finally:
        for state in states:
            state.restore()
        generators.restore()
