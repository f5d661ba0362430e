"""How payloads get from one rank's GPU to another's; headers go through host memory and gloo in any case.

    HostMemory      staging ──▶ pinned memory ── gloo ──▶ pinned memory ──▶ GPU      where ranks share a GPU
    DeviceMemory    staging ── nccl, a group of two an edge ──▶ GPU                  where each has one of its own

The computation's stream copies what crosses into a staging buffer, which costs it a copy within the device, and goes
on. All else happens on a lane, a stream beside it, and is waited for by the threads of ``links.py``. So what a part
does to its tensors after they were sent, in place or by letting them go, cannot be seen at the other end.

A header leaves when its payload can follow at once, and is checked before the payload's receive begins. A payload ends
with a seal, which is looked at before the payload is handed out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from localize.runtime.lanes import Lane
from localize.runtime.wire import SEAL_BYTES, Header, Outline, check_seal, room_for

LATE_S = 120.0  # a payload follows its header at once; nccl itself says nothing of a peer that is gone

Fill = Callable[[Tensor], None]


@dataclass(frozen=True)
class Load:
    """A payload on its device, which the computation will have written when it comes to the mark."""

    payload: Tensor
    mark: Any


class Carrier(Protocol):
    """One end of an edge. A thread of its own calls ``ready`` and ``send``, or ``receive``."""

    def pack(self, lines: Outline) -> Load:
        """Copies of a message's tensors, in one buffer of bytes; the computation goes on."""

    def ready(self, load: Load) -> Tensor:
        """Waits until the payload can leave; what ``send`` takes."""

    def send(self, payload: Tensor, emit: Fill) -> None:
        """Sends what ``ready`` gave; ``emit`` sends through host memory. No buffer is in use afterwards."""

    def receive(self, header: Header, fill: Fill) -> Tensor:
        """The payload, on the device; ``fill`` receives into host memory.

        Raises:
            WireError: it is truncated.
        """

    def take(self, payload: Tensor) -> None:
        """From now on the computation uses what ``receive`` gave."""

    def late(self) -> bool:
        """Whether a payload is on its way for so long that the other end must be gone."""


class HostMemory:
    """Through host memory: copied by the lane to or from a pinned buffer, which is used again and again."""

    def __init__(self, device: torch.device, lane: Lane) -> None:
        self._device, self._lane = device, lane
        self._pinned: Tensor | None = None

    def pack(self, lines: Outline) -> Load:
        """See ``Carrier``."""
        return Load(lines.pack(self._device), self._lane.mark())

    def ready(self, load: Load) -> Tensor:
        """See ``Carrier``."""
        with self._lane.beside(load.mark):
            buffer = self._buffer(load.payload.numel())
            buffer.copy_(load.payload, non_blocking=True)
        self._lane.wait()
        return buffer

    def send(self, payload: Tensor, emit: Fill) -> None:
        """See ``Carrier``."""
        emit(payload)

    def receive(self, header: Header, fill: Fill) -> Tensor:
        """See ``Carrier``."""
        with self._lane.beside():
            buffer = self._buffer(header.payload_bytes)
        buffer[-SEAL_BYTES:] = 0
        fill(buffer)
        check_seal(header, buffer)
        with self._lane.beside():
            payload = torch.empty(header.payload_bytes, dtype=torch.uint8, device=self._device)
            payload.copy_(buffer, non_blocking=True)
        self._lane.wait()
        return payload

    def take(self, payload: Tensor) -> None:
        """See ``Carrier``."""
        self._lane.hand_over(payload)

    def late(self) -> bool:
        """See ``Carrier``; gloo tells of a peer that is gone."""
        return False

    def _buffer(self, size: int) -> Tensor:
        if self._pinned is None or self._pinned.numel() < size:
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=self._lane.pins)
        return self._pinned[:size]


class DeviceMemory:
    """From device to device, through a group of the two ranks at the ends of the edge, and for this direction only."""

    def __init__(self, device: torch.device, lane: Lane, group: dist.ProcessGroup) -> None:
        self._device, self._lane, self._group = device, lane, group
        self._peer = 1 - group.rank()
        self._since: float | None = None

    def greet(self, sends: bool) -> None:
        """Sends a byte to the other end, or receives one: nccl connects the two, which may take seconds."""
        with self._lane.beside():
            byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
            (self._group.send if sends else self._group.recv)([byte], self._peer, 0).wait()
        self._lane.wait()

    def pack(self, lines: Outline) -> Load:
        """See ``Carrier``."""
        return Load(lines.pack(self._device), self._lane.mark())

    def ready(self, load: Load) -> Tensor:
        """See ``Carrier``."""
        self._lane.reach(load.mark)
        return load.payload

    def send(self, payload: Tensor, emit: Fill) -> None:
        """See ``Carrier``."""
        with self._on_its_way():
            with self._lane.beside():
                self._group.send([payload], self._peer, 0).wait()
            self._lane.wait()

    def receive(self, header: Header, fill: Fill) -> Tensor:
        """See ``Carrier``."""
        with self._on_its_way():
            with self._lane.beside():
                payload = room_for(header, self._device)
                self._group.recv([payload], self._peer, 0).wait()
            self._lane.wait()
        with self._lane.beside():
            end = payload[-SEAL_BYTES:].cpu()
        check_seal(header, end)
        return payload

    def take(self, payload: Tensor) -> None:
        """See ``Carrier``."""
        self._lane.hand_over(payload)

    def late(self) -> bool:
        """See ``Carrier``."""
        since = self._since
        return since is not None and time.monotonic() - since > LATE_S

    @contextmanager
    def _on_its_way(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None
