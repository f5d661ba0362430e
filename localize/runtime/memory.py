"""How many bytes autograd really holds for the backward pass, at most, while something runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Counts what autograd saves between forward and backward, each storage once, and forgets what it frees.

        with SavedBytes(exclude=local.parameters()) as saved:
            local.train_step(x, y, optimizers)
        saved.peak_bytes

    Args:
        exclude: tensors that are there anyway (parameters, buffers).
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self.peak_bytes = 0
        self.bytes = 0
        self._holders: dict[int, int] = {}  # storage address -> how many saved tensors hold it
        self._excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
        self._hooks: Any = None

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(self, tensor), _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _hold(self, address: int, size: int) -> None:
        if address in self._excluded:
            return
        self._holders[address] = self._holders.get(address, 0) + 1
        if self._holders[address] == 1:
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _release(self, address: int, size: int) -> None:
        if address in self._excluded:
            return
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.bytes -= size


class _Held:
    """A saved tensor: alive as long as the graph needs it."""

    def __init__(self, owner: SavedBytes, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Detached: a node that saves its own output would hold itself alive through us.
        self.owner, self.tensor = owner, tensor.detach()
        self.address, self.size = storage._cdata, storage.nbytes()
        owner._hold(self.address, self.size)

    def __del__(self) -> None:
        self.owner._release(self.address, self.size)


def _unpack(held: _Held) -> Tensor:
    return held.tensor


class LiveBytes:
    """Counts tensors from when they are told of until nobody holds them any more; any thread may tell."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._lock = threading.RLock()  # re-entrant: a tensor may go while another one is being added

    def add(self, tensor: Tensor) -> Tensor:
        """Counts a tensor by its own size; returns it."""
        self._change(tensor.nbytes)
        weakref.finalize(tensor, self._change, -tensor.nbytes).atexit = False
        return tensor

    def _change(self, size: int) -> None:
        with self._lock:
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
