"""Runs of a model that leave no trace in it: attributes, buffers, modes and random states come back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(modules: Iterable[nn.Module], training: bool, contents: bool) -> Iterator[None]:
    """Puts ``modules`` (and all below) in one mode for a while and restores whatever their forward changed.

    Attributes, registered tensors and every module's own mode are restored as objects. ``contents=True`` also
    restores the *values* of buffers, which a run on real tensors changes in place; fake runs never do.
    """
    everything = {id(m): m for top in modules for m in top.modules()}.values()
    states = [(m, m.training, dict(vars(m)), _registries(m)) for m in everything]
    values = _buffer_values(everything) if contents else []
    draws = _random_states()
    try:
        for module in everything:
            module.training = training
        yield
    finally:
        for module, mode, attributes, registries in states:
            vars(module).clear()
            vars(module).update(attributes)
            for registry, entries in registries:
                registry.clear()
                registry.update(entries)
            if module.training != mode:  # scripted modules keep it elsewhere
                module.training = mode
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        _restore_random(draws)


def _registries(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A module's own dictionaries with a copy of their entries; a scripted module's are no dictionaries."""
    found = [vars(module).get(name) for name in _REGISTRIES]
    return [(registry, dict(registry)) for registry in found if isinstance(registry, dict)]


def _buffer_values(modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    buffers = {id(b): b for m in modules for b in m.buffers(recurse=False)}
    return [(b, b.detach().clone()) for b in buffers.values()]


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), gpu, random.getstate(), numpy.random.get_state() if numpy else None


def _restore_random(states: tuple[Any, ...]) -> None:
    cpu, gpu, python, numpy_state = states
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state_all(gpu)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)
