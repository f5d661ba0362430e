"""Tensors from the ranks that have them to those that want them.

First each rank learns what is in the places of the buffers that it will get, since a forward pass may have put anything
there; then come the values, name by name, in one order everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from localize.hollow import replace_by
from localize.runtime.buffers import laid_out
from localize.runtime.filling import Filling, empty
from localize.runtime.placement import Placement
from localize.runtime.session import Session


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
        here, own, recipients = self.placement.rank, dict(filling.layouts), sorted(needs)
        for source in range(len(self.placement.ranges)):
            for to in recipients:
                names = [n for n in needs[to] if n in filling.known and self.owners[n] == source]
                if names and here == source:
                    self._tell({name: own[name] for name in names}, to)
                elif names and here == to:
                    filling.layouts |= self._told(source)
        for name, source in self.owners.items():
            place = filling.known.get(name)
            for to in recipients:
                if name not in needs[to] or here not in (source, to):
                    continue
                if here == source:
                    self._send(others[name] if place is None else place.tensor, to)
                elif place is None:
                    self._take(others[name], source, filling.device)
                else:
                    layout = filling.layouts[name]
                    filling.put(name, None if layout is None else self._receive(empty(layout), source))
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


def spread(
    names: Iterable[str],
    filling: Filling,
    others: Mapping[str, Tensor],
    device: torch.device,
    broadcast: Callable[[Tensor], None],
    gives: bool,
) -> None:
    """Gives tensors of one rank to all that make the same call.

    Args:
        names: of what is spread, in one order everywhere.
        filling: for buffers; knows the layouts of those of the rank that gives.
        others: what is no buffer.
        device: for buffers that are not there yet.
        broadcast: puts into a tensor, contiguous and on the CPU, what is in that of the rank that gives.
        gives: whether this is that rank.
    """
    for name in names:
        tensor = others[name] if name in others else filling.known[name].tensor
        layout = filling.layouts.get(name)
        if gives or name in others:
            if tensor is not None:
                values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
                broadcast(values)
                if not gives:
                    tensor.data.copy_(values)
        elif layout is None:
            filling.put(name, None)
        else:
            values = empty(layout)
            broadcast(values)
            filling.put(name, values.to(device))
    if not gives:
        filling.join()
