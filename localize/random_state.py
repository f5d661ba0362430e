"""Where all random generators are that a model may draw from."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RandomState:
    """A snapshot of every random generator a model's code may draw from."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.python = random.getstate()
        self.numpy = _numpy_state()

    def restore(self) -> None:
        """Puts every generator back."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def drawn_in_python(self) -> bool:
        """Whether Python's or NumPy's generator moved since the snapshot."""
        return self.python != random.getstate() or not _equal(self.numpy, _numpy_state())


def _numpy_state() -> tuple[Any, ...] | None:
    numpy = sys.modules.get("numpy")  # a program that has not imported it does not draw from it
    return None if numpy is None else numpy.random.get_state()


def _equal(first: tuple[Any, ...] | None, second: tuple[Any, ...] | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(first[2:] == second[2:] and (first[1] == second[1]).all())
