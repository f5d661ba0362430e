"""Numbers for storages: equal ones tell that two tensors are views of the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class Storages:
    """The storages of one recording. Two recordings draw from one row of numbers, so that none means two things."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self._known: dict[int, int] = {}  # by address: tensors that were seen stay alive while a recording lasts

    def of(self, tensor: Tensor) -> frozenset[int]:
        """The number of a tensor's storage; empty for layouts that have none."""
        storage = storage_of(tensor)
        if storage is None:
            return frozenset()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = next(self._numbers)
        return frozenset((self._known[storage._cdata],))

    def new(self) -> frozenset[int]:
        """A number for a storage that no tensor of the recording has."""
        return frozenset((next(self._numbers),))


def storage_of(tensor: Tensor) -> Any:
    """The storage of a tensor; None for kinds that have none of their own, the sparse ones."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
