"""Calls of torch that no function mode sees and no graph can hold: a forward that makes them is kept whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_PLACES: tuple[tuple[Any, str, str], ...] = (
    (torch, "manual_seed", "the random generator is seeded"),
    (torch.random, "manual_seed", "the random generator is seeded"),
    (torch, "set_rng_state", "the random generator's state is set"),
    (torch.random, "set_rng_state", "the random generator's state is set"),
    (saved_tensors_hooks, "__enter__", "what autograd saves is changed (saved_tensors_hooks)"),
)


@contextmanager
def refused(listens: Callable[[], bool], refuse: Callable[[str], BaseException]) -> Iterator[None]:
    """While it lasts, such calls raise what ``refuse`` makes of a reason, where ``listens()``."""
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in _PLACES]

    def guarded(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # torch's checkpoints have hooks of their own, which change nothing but when things are computed.
            own = bool(args) and type(args[0]).__module__ == "torch.utils.checkpoint"
            if listens() and not own:
                raise refuse(reason)
            return original(*args, **kwargs)

        return call

    for (owner, name, reason), (_, _, original) in zip(_PLACES, originals, strict=True):
        setattr(owner, name, guarded(original, reason))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
