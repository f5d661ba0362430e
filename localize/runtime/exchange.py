"""Tensors from the ranks that have them to those that want them.

First each rank learns what is in the places of the buffers that it will get, since a forward pass may have put anything
there; then come the values, name by name, in one order everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localize.hollow import replace_by
from localize.runtime.buffers import laid_out
from localize.runtime.filling import Filling, empty
from localize.runtime.session import Session

if TYPE_CHECKING:
    from localize.runtime.placement import Placement


class Exchange:
    """All ranks of a replica take part in it, and make the same calls.

    Args:
        owners: the rank that answers for a tensor, by name.
    """

    def __init__(self, session: Session, placement: Placement, owners: Mapping[str, int]) -> None:
        self.session, self.placement, self.owners = session, placement, owners

    def bring(self, needs: Mapping[int, set[str]], filling: Filling, others: Mapping[str, Tensor]) -> None:
        """Brings tensors to the ranks that need them, by rank.

        Args:
            needs: names by rank, of what it does not have; the same on every rank.
            filling: for buffers; knows the layouts of those that this rank has.
            others: what is no buffer.
        """
        here, own = self.placement.rank, dict(filling.layouts)
        for source in range(len(self.placement.ranges)):
            for to in sorted(needs):
                names = [n for n in needs[to] if n in filling.known and self.owners[n] == source]
                if names and here == source:
                    self._tell({name: own[name] for name in names}, to)
                elif names and here == to:
                    filling.layouts |= self._told(source)
        for name, source in self.owners.items():
            for to in sorted(needs):
                if name in needs[to] and here == source:
                    self._send(filling.known[name].tensor if name in filling.known else others[name], to)
                elif name in needs[to] and here == to and name in filling.known:
                    layout = filling.layouts[name]
                    filling.put(name, None if layout is None else self._receive(empty(layout), source))
                elif name in needs[to] and here == to:
                    self._take(others[name], source, filling.device)
        filling.join()

    def _take(self, tensor: Tensor, source: int, device: torch.device | None) -> None:
        """Receives the values of what is no buffer; it stays the same object."""
        values = self._receive(tensor, source)
        if tensor.is_meta or tensor.device != (device or tensor.device):
            replace_by(tensor, laid_out(values.to(device or values.device), tensor.stride()))
        else:
            tensor.data.copy_(values)

    def _send(self, tensor: Tensor | None, to: int) -> None:
        if tensor is not None:
            self.session.send(tensor.detach().resolve_conj().resolve_neg(), self.placement.global_rank(to))

    def _receive(self, like: Tensor, source: int) -> Tensor:
        return self.session.receive(like, self.placement.global_rank(source))

    def _tell(self, value: Any, to: int) -> None:
        """Plain data, to a rank that calls ``_told``."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self._send(torch.tensor(len(text)), to)
        self._send(text, to)

    def _told(self, source: int) -> Any:
        length = int(self._receive(torch.tensor(0), source))
        return json.loads(bytes(self._receive(torch.empty(length, dtype=torch.uint8), source).tolist()))
