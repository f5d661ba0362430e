"""Messages between neighbouring ranks: sent behind the back of the computation, received ahead of it.

    part a ── Outbox ──▶ header, payload ──▶ Inbox ── part b       a thread each, so that a send or a receive that
           ◀── Inbox ◀── header, payload ◀── Outbox ──             waits for the other side holds up nobody

An outbox copies a message and returns; it waits only when ``window`` messages have not left yet. An inbox receives
up to ``window`` messages before anyone asks for them. The header is checked before the payload is received.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from localize.errors import WireError
from localize.runtime.causes import Cause
from localize.runtime.ranks import Session
from localize.runtime.wire import (
    HEADER_BYTES,
    Edge,
    Envelope,
    Header,
    Kind,
    body_bytes,
    decode,
    decode_header,
    encode,
    place,
    room_for,
)

WINDOW = 2
_POLL_S = 0.25


class Contract(Protocol):
    """What a receiver expects; see ``contracts.py``."""

    edge: Edge
    step: int

    def check(self, header: Header) -> None: ...


class Outbox:
    """The sending end of an edge.

    Args:
        session: where failures are told.
        edge: from one part to its neighbour.
        peer: the neighbour's rank.
        tag: of the messages of this edge, among all between the two ranks.
        window: how many messages may wait to be received before ``put`` waits.
    """

    def __init__(self, session: Session, edge: Edge, peer: int, tag: int, window: int = WINDOW) -> None:
        self.session, self.edge, self.peer = session, edge, peer
        self._group, self._tag = session.ranks.group, tag
        self._room = threading.Semaphore(window)
        self._queue: SimpleQueue[tuple[Tensor, ...] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"outbox {edge}")
        self._thread.start()

    def put(self, envelope: Envelope) -> None:
        """Sends a message as soon as the neighbour takes it.

        Raises:
            WireError: the message cannot travel, or the neighbour is gone.
        """
        frames = tuple(frame for frame in encode(envelope) if frame is not None)
        while not self._room.acquire(timeout=_POLL_S):
            self.session.check()
        if self._error is not None:
            raise self.session.lost(self.peer, str(self.edge)) from self._error
        self._queue.put(frames)

    def abort(self, cause: Cause) -> None:
        """Tells the neighbour of a failure, if it can be told without waiting."""
        if self._error is None and self._room.acquire(blocking=False):
            header, *_ = encode(Envelope(Kind.ABORT, 0, self.edge, note={"cause": asdict(cause)}))
            self._queue.put((header,))

    def close(self) -> None:
        """Sends the last message, and waits until all have left."""
        self.put(Envelope(Kind.END, 0, self.edge))
        self._queue.put(None)
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            self.session.check()
        if self._error is not None:
            raise self.session.lost(self.peer, str(self.edge)) from self._error

    def _run(self) -> None:
        while (frames := self._queue.get()) is not None:
            try:
                for frame in frames:
                    self._group.send([frame], self.peer, self._tag).wait()
            except Exception as error:
                self._error = error
            self._room.release()


class Inbox:
    """The receiving end of an edge.

    Args:
        session, peer, tag, window: as for ``Outbox``.
        contract: what is expected.
        device: where tensors are wanted.
    """

    def __init__(
        self,
        session: Session,
        contract: Contract,
        peer: int,
        tag: int,
        device: torch.device,
        window: int = WINDOW,
    ) -> None:
        self.session, self.contract, self.peer, self.device = session, contract, peer, device
        self._group, self._tag = session.ranks.group, tag
        self._room = threading.Semaphore(window)
        self._queue: SimpleQueue[tuple[Header, Tensor | None] | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"inbox {contract.edge}")
        self._thread.start()

    def get(self) -> Envelope:
        """The next message; waits for it.

        Raises:
            WireError: it is not what was expected, or another rank failed or is gone.
        """
        while True:
            try:
                found = self._queue.get(timeout=_POLL_S)
                break
            except Empty:
                self.session.check()
        self._room.release()
        if isinstance(found, WireError):
            raise found
        if isinstance(found, Exception):
            raise self.session.lost(self.peer, str(self.contract.edge)) from found
        header, payload = found
        if header.kind is Kind.ABORT:
            raise self.session.stopped(Cause(**header.note["cause"]))
        device = None if self.device.type == "cpu" else self.device
        return decode(header, payload, device)

    def close(self) -> None:
        """Receives the last message.

        Raises:
            WireError: there is another one first.
        """
        envelope = self.get()
        if envelope.kind is not Kind.END:
            raise WireError(f"Edge {self.contract.edge}: expected the end, found {envelope.kind.name}.")
        self._thread.join()

    def _run(self) -> None:
        kind = None
        while kind not in (Kind.END, Kind.ABORT):
            self._room.acquire()
            try:
                header, payload = receive(self._receive, self.contract)
            except Exception as error:
                self._queue.put(error)
                return
            self._queue.put((header, payload))
            kind = header.kind

    def _receive(self, buffer: Tensor) -> None:
        self._group.recv([buffer], self.peer, self._tag).wait()


def receive(fill: Callable[[Tensor], None], contract: Contract) -> tuple[Header, Tensor | None]:
    """The next header, checked, and the payload that it announces; ``fill`` receives into a buffer.

    Raises:
        WireError: the header is damaged, or is not what the contract expects.
    """
    prefix = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    fill(prefix)
    rest = None
    where = place(contract.step, contract.edge)
    if more := body_bytes(prefix, where):
        rest = torch.zeros(more, dtype=torch.uint8)
        fill(rest)
    header = decode_header(prefix, rest, where)
    contract.check(header)
    if not header.payload_bytes:
        return header, None
    payload = room_for(header)
    fill(payload)
    return header, payload
