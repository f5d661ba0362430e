"""Streams beside that of the computation, on which what crosses between ranks is copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """A stream beside that of the computation."""

    pins: bool  # whether copies to and from pinned host memory run on their own

    def mark(self) -> Any:
        """A point of the computation: all that its stream has been given so far."""

    def beside(self, after: Any = None) -> AbstractContextManager[None]:
        """What is given to the device meanwhile runs on the lane, after the mark ``after``."""

    def reach(self, mark: Any) -> None:
        """Waits until the computation has come to a mark."""

    def wait(self) -> None:
        """Waits until all that the lane has been given is done."""

    def hand_over(self, buffer: Tensor) -> None:
        """From now on the computation uses a buffer of the lane."""


class CudaLane:
    """A stream of its own on a GPU. Its threads sleep while they wait."""

    pins = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def beside(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            yield

    def reach(self, mark: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device):
            mark.synchronize()

    def wait(self) -> None:
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()

    def hand_over(self, buffer: Tensor) -> None:
        # What the lane was given is done, see ``wait``; but the memory was taken by the lane, which would otherwise
        # take it again as soon as the computation lets go of it.
        buffer.record_stream(torch.cuda.current_stream(self._device))
