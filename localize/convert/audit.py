"""What a recording could miss, seen at the dispatcher, below every Python function.

A leaf may read a tensor that another leaf left on itself, in a global, in a closure. Such a side channel works as
long as both ends run in one part, one after the other; a cut between them would let gradients, which a local loss
must not send that far, pass by. So an operator in a leaf that reads a storage which neither the leaf's arguments
nor the leaf itself made is noted: a ``link``. And whoever writes into a parameter is noticed before it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from localize.convert.restore import ModelState
from localize.convert.storages import storage_of


class LeafCall:
    """The storages that the operators of one leaf call read and make."""

    def __init__(self, arguments: Iterable[Tensor]) -> None:
        self.made: dict[int, Any] = {}  # by address; alive until the call ends
        self.foreign: list[Tensor] = []  # what it reads that was made before, no argument among it
        self.known = {storage._cdata for storage in map(storage_of, arguments) if storage is not None}


class Audit(TorchDispatchMode):
    """Active while a model is recorded; sees every operator.

    Args:
        state: the model's, before the recording: what is about to be written is kept there.
        registered: parameters and buffers, which anybody may read.
    """

    def __init__(self, state: ModelState, registered: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._state = state
        self._registered = {storage._cdata for storage in map(storage_of, registered) if storage is not None}
        self._made: dict[int, StorageWeakRef] = {}  # since the recording began, by address
        self._leaf: LeafCall | None = None
        self.drew = False  # random numbers were drawn; whoever wants to know sets it back before

    def made(self, tensor: Tensor) -> None:
        """``tensor`` is a value of the graph."""
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in self._registered:
            self._note(storage)

    def _note(self, storage: Any) -> None:
        if not self._is_made(storage):
            self._made[storage._cdata] = StorageWeakRef(storage)

    def _is_made(self, storage: Any) -> bool:
        reference = self._made.get(storage._cdata)
        return reference is not None and not reference.expired()

    @contextmanager
    def leaf(self, arguments: Iterable[Tensor]) -> Iterator[LeafCall]:
        """Watches one leaf call; ``arguments`` are what it may read."""
        self._leaf = call = LeafCall(arguments)
        try:
            yield call
        finally:
            self._leaf = None
            for storage in call.made.values():
                self._note(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in func.tags
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write:
                    self._state.keep_written(value)
        leaf = self._leaf
        if leaf is None:
            return func(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in leaf.known:
                leaf.known.add(storage._cdata)
                if self._is_made(storage):
                    leaf.foreign.append(tensor)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in leaf.known:
                leaf.known.add(storage._cdata)
                leaf.made[storage._cdata] = storage
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of an operator's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
