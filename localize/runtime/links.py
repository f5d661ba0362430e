"""Messages between neighbouring ranks: sent behind the back of the computation, received ahead of it.

    part a ── Outbox ──▶ header, payload ──▶ Inbox ── part b       a thread each, so that a send or a receive that
           ◀── Inbox ◀── header, payload ◀── Outbox ──             waits for the other side holds up nobody

An outbox copies a message and returns; it waits only when ``window`` messages have not left yet. An inbox receives
up to ``window`` messages before anyone asks for them. The header is checked before the payload is received. Payloads
of tensors on a GPU have a carrier, see ``carriers.py``; on the CPU the threads here send and receive them themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from localize.errors import WireError
from localize.runtime.carriers import Carrier, Load
from localize.runtime.causes import Cause
from localize.runtime.session import POLL_S, Session
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
    outline,
    place,
    room_for,
)

WINDOW = 2


class Contract(Protocol):
    """What a receiver expects; see ``contracts.py``."""

    edge: Edge
    step: int

    def check(self, header: Header) -> None: ...


@dataclass(frozen=True)
class _Parcel:
    """What an outbox has to send: header and rest, and payload unless it is ``load``."""

    frames: tuple[Tensor, ...]
    load: Load | None = None


class Outbox:
    """The sending end of an edge.

    Args:
        session: where failures are told.
        edge: from one part to its neighbour.
        peer: the neighbour's rank.
        tag: of the messages of this edge, among all between the two ranks.
        window: how many messages may wait to be received before ``put`` waits.
        carrier: of payloads; None where tensors are on the CPU.
    """

    def __init__(
        self,
        session: Session,
        edge: Edge,
        peer: int,
        tag: int,
        window: int = WINDOW,
        carrier: Carrier | None = None,
    ) -> None:
        self.session, self.edge, self.peer, self._carrier = session, edge, peer, carrier
        self._group, self._tag = session.ranks.group, tag
        self._room = threading.Semaphore(window)
        self._queue: SimpleQueue[_Parcel | None] = SimpleQueue()
        self._error: Exception | None = None
        self._thread = session.waiters.start(self._run, f"outbox {edge}")

    def put(self, envelope: Envelope) -> None:
        """Sends a message as soon as the neighbour takes it.

        Raises:
            WireError: the message cannot travel, or the neighbour is gone.
        """
        parcel = self._packed(envelope)
        while not self._room.acquire(timeout=POLL_S):
            self._check()
        if self._error is not None:
            raise self.session.lost(self.peer, str(self.edge)) from self._error
        self._queue.put(parcel)

    def abort(self, cause: Cause) -> None:
        """Tells the neighbour of a failure, if it can be told without waiting; sends nothing after that."""
        if self._error is None and self._room.acquire(blocking=False):
            header, *_ = encode(Envelope(Kind.ABORT, 0, self.edge, note={"cause": asdict(cause)}))
            self._queue.put(_Parcel((header,)))
        self._queue.put(None)

    def close(self) -> None:
        """Sends the last message, and waits until all have left."""
        self.put(Envelope(Kind.END, 0, self.edge))
        self._queue.put(None)
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            self._check()
        if self._error is not None:
            raise self.session.lost(self.peer, str(self.edge)) from self._error

    def _packed(self, envelope: Envelope) -> _Parcel:
        if self._carrier is None:
            return _Parcel(tuple(frame for frame in encode(envelope) if frame is not None))
        lines = outline(envelope)
        frames = (lines.header,) if lines.rest is None else (lines.header, lines.rest)
        return _Parcel(frames, self._carrier.pack(lines) if lines.packed else None)

    def _check(self) -> None:
        self.session.check()
        if self._carrier is not None and self._carrier.late():
            raise self.session.lost(self.peer, str(self.edge))

    def _run(self) -> None:
        while (parcel := self._queue.get()) is not None:
            try:
                self._deliver(parcel)
            except Exception as error:
                self._error = error  # and the rest is let go, so that nobody waits for room
            del parcel  # its memory is not to be kept until there is another one
            self._room.release()

    def _deliver(self, parcel: _Parcel) -> None:
        if self._carrier is None or parcel.load is None:
            for frame in parcel.frames:
                self._send(frame)
            return
        # A header leaves when its payload can follow at once: whoever has received one does not wait long.
        payload = self._carrier.ready(parcel.load)
        for frame in parcel.frames:
            self._send(frame)
        self._carrier.send(payload, self._send)

    def _send(self, frame: Tensor) -> None:
        self._group.send([frame], self.peer, self._tag).wait()


class Inbox:
    """The receiving end of an edge.

    Args:
        session, peer, tag, window: as for ``Outbox``.
        contract: what is expected.
        device: where tensors are wanted.
        carrier: of payloads; without one they come to the CPU, and go to the device when they are asked for.
    """

    def __init__(
        self,
        session: Session,
        contract: Contract,
        peer: int,
        tag: int,
        device: torch.device,
        window: int = WINDOW,
        carrier: Carrier | None = None,
    ) -> None:
        self.session, self.contract, self.peer, self.device = session, contract, peer, device
        self._carrier = carrier
        self._group, self._tag = session.ranks.group, tag
        self._room = threading.Semaphore(window)
        self._queue: SimpleQueue[tuple[Header, Tensor | None] | Exception] = SimpleQueue()
        self._over = False
        self._thread = session.waiters.start(self._run, f"inbox {contract.edge}")

    def get(self) -> Envelope:
        """The next message; waits for it.

        Raises:
            WireError: it is not what was expected, or another rank failed or is gone.
        """
        while True:
            try:
                found = self._queue.get(timeout=POLL_S)
                break
            except Empty:
                self.session.check()
                if self._carrier is not None and self._carrier.late():
                    raise self.session.lost(self.peer, str(self.contract.edge)) from None
        self._room.release()
        if isinstance(found, WireError):
            raise found
        if isinstance(found, Exception):
            raise self.session.lost(self.peer, str(self.contract.edge)) from found
        header, payload = found
        if header.kind is Kind.ABORT:
            raise self.session.stopped(Cause(**header.note["cause"]))
        if self._carrier is not None and payload is not None:
            self._carrier.take(payload)
        there = self._carrier is not None or self.device.type == "cpu"
        return decode(header, payload, None if there else self.device)

    def close(self) -> None:
        """Receives the last message.

        Raises:
            WireError: there is another one first.
        """
        envelope = self.get()
        if envelope.kind is not Kind.END:
            raise WireError(f"Edge {self.contract.edge}: expected the end, found {envelope.kind.name}.")
        self._thread.join()

    def abort(self) -> None:
        """Nobody asks for another message: its thread ends when one comes."""
        self._over = True
        self._room.release()  # its thread may wait for room

    def _run(self) -> None:
        kind = None
        while kind not in (Kind.END, Kind.ABORT):
            self._room.acquire()
            if self._over:
                return
            try:
                header, payload = receive(self._receive, self.contract, self._carrier)
            except WireError as error:
                self._queue.put(error)
                return
            except Exception as error:
                self._queue.put(error)
                # Told to all at once: this rank may be waiting for something else, or for nobody.
                self.session.lost(self.peer, str(self.contract.edge))
                return
            self._queue.put((header, payload))
            kind = header.kind

    def _receive(self, buffer: Tensor) -> None:
        self._group.recv([buffer], self.peer, self._tag).wait()


def receive(
    fill: Callable[[Tensor], None], contract: Contract, carrier: Carrier | None = None
) -> tuple[Header, Tensor | None]:
    """The next header, checked, and the payload that it announces; ``fill`` receives into a buffer.

    Raises:
        WireError: the header is damaged, or is not what the contract expects; with a carrier: or the payload is
            truncated (without one, ``decode`` says so).
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
    if carrier is not None:
        return header, carrier.receive(header, fill)
    payload = room_for(header)
    fill(payload)
    return header, payload
