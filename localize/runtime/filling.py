"""Gives buffers of this process what buffers elsewhere, or at another time, were: see ``buffers.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localize.hollow import replace_by
from localize.runtime.buffers import Layout, Place, dtype_name, laid_out
from localize.weights import fill, memory


class Filling:
    """Makes buffers what ``layouts`` says: ``put`` for each, then ``join``.

    What two processes say of two buffers in the same memory may differ: each knows only of those that it runs. They
    are in the same memory if both say so.

    Args:
        known: the places.
        layouts: of the buffers to be filled and of those that are there; ``put`` and ``join`` read it.
        device: where they are to be; None: where they are, and those without memory on the CPU.
        moves: whether those with memory on another device move there, too.
    """

    def __init__(
        self,
        known: Mapping[str, Place],
        layouts: dict[str, Layout],
        device: torch.device | None = None,
        moves: bool = True,
    ) -> None:
        self.known, self.layouts, self.device, self.moves = known, layouts, device, moves
        self._order = {name: i for i, name in enumerate(known)}
        self._memory: dict[str, int] = {}  # of what is in the places now
        self._together: dict[int, set[str]] = {}
        self._done: list[str] = []
        for name in known:
            self._moved(name)

    def put(self, name: str, values: Tensor | None) -> None:
        """Gives a buffer its values, or None; a tensor that was there stays the same object, if it is nobody else's."""
        place, layout = self.known[name], self.layouts[name]
        if layout is None or values is None:
            place.bind(None)
            self._moved(name)
            return
        self._done.append(name)
        now = place.tensor
        if now is not None and self._fits(name, now, layout):
            fill(now, values)
            return
        here = None if now is None or now.is_meta else now.device
        where = (self.device if self.moves else here) or here or self.device or values.device
        new = laid_out(values.to(where, getattr(torch, layout["dtype"])), layout["stride"])
        if now is None or self._others_with(name):
            place.bind(new)
        else:
            try:
                replace_by(now, new)
            except RuntimeError:  # somebody watches the tensor itself
                place.bind(new)
        self._moved(name)

    def join(self) -> None:
        """Puts buffers into the same memory that were so."""
        for name in self._done:
            group = [other for other in (name, *self._tied(name)) if self._is_here(other)]
            if len(group) > 1:
                first = max(group, key=lambda other: (_extent(self.layouts[other]), -self._order[other]))
                for other in group:
                    self._show(other, first)

    def _show(self, name: str, first: str) -> None:
        """Makes a buffer a view of another one's memory, where it was."""
        place, leader = self.known[name], self.known[first].tensor
        layout, whole = self.layouts[name], self.layouts[first]
        assert place.tensor is not None and leader is not None and layout is not None and whole is not None
        ahead = layout["offset"] - whole["offset"]
        here = leader.storage_offset() + ahead
        if self._memory[name] == self._memory[first] and place.tensor.storage_offset() == here:
            return
        if layout["dtype"] == whole["dtype"] and ahead >= 0 and ahead + _extent(layout) <= _extent(whole):
            same = (layout["shape"], layout["stride"], ahead) == (whole["shape"], whole["stride"], 0)
            view = leader if same else leader.detach().as_strided(layout["shape"], layout["stride"], here)
            if not same:  # what lies between the elements of a strided leader is nobody else's
                fill(view, place.tensor)
            place.bind(view)
            self._moved(name)

    def _tied(self, name: str) -> list[str]:
        """The buffers in the same memory, as both sides say."""
        layout = self.layouts[name]
        assert layout is not None
        told = {other: self.layouts.get(other) for other in layout["tied"] if other in self.known}
        return [other for other, theirs in told.items() if theirs is not None and name in theirs["tied"]]

    def _is_here(self, name: str) -> bool:
        tensor = self.known[name].tensor
        return tensor is not None and not tensor.is_meta

    def _fits(self, name: str, tensor: Tensor, layout: Mapping[str, Any]) -> bool:
        """Whether the values can go into the tensor that is there, and into no other buffer."""
        kind = (dtype_name(tensor), list(tensor.shape), list(tensor.stride()))
        if tensor.is_meta or (self.moves and tensor.device != (self.device or tensor.device)):
            return False
        if kind != (layout["dtype"], list(layout["shape"]), list(layout["stride"])):
            return False
        tied, start = self._tied(name), layout["offset"] - tensor.storage_offset()
        return all(other in tied and self._start(other) == start for other in self._others_with(name))

    def _start(self, name: str) -> int:
        """How far in memory a buffer is ahead of where it is here."""
        layout, tensor = self.layouts[name], self.known[name].tensor
        assert layout is not None and tensor is not None
        return int(layout["offset"] - tensor.storage_offset())

    def _others_with(self, name: str) -> set[str]:
        """The other buffers that are in its memory here."""
        return self._together[self._memory[name]] - {name}

    def _moved(self, name: str) -> None:
        if name in self._memory:
            self._together[self._memory.pop(name)].discard(name)
        tensor = self.known[name].tensor
        if tensor is not None:
            self._memory[name] = memory(tensor)
            self._together.setdefault(self._memory[name], set()).add(name)


def empty(layout: Mapping[str, Any]) -> Tensor:
    """A tensor of this dtype and shape, on the CPU."""
    return torch.empty(layout["shape"], dtype=getattr(torch, layout["dtype"]))


def _extent(layout: Layout) -> int:
    """From the first element to behind the last one in memory, in elements."""
    assert layout is not None
    if 0 in layout["shape"]:
        return 0
    pairs = zip(layout["shape"], layout["stride"], strict=True)
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in pairs)
