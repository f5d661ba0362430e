"""A rank's edges to its neighbours, and the stream of batches that runs along them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from localize.errors import WireError
from localize.model import LocalModel
from localize.part import Part
from localize.runtime.causes import Cause
from localize.runtime.contracts import Downwards, Upwards, crossing_into, messages_down
from localize.runtime.links import Inbox, Outbox
from localize.runtime.messages import Message, Side, Upward
from localize.runtime.placement import Placement
from localize.runtime.session import Session
from localize.runtime.transport import Carriers, rank_edges
from localize.runtime.wire import Edge, Envelope, Kind, place
from localize.spec import TensorSpec

_UP, _DOWN = 2, 3  # tags


class Wires:
    """Implements ``sequential.Outside`` for one rank.

    Args:
        session, placement: this rank among all.
        local: the model.
        device: where this rank computes.
        step: the number, from 0, of the first training batch that will come.
        direct: whether payloads go from device to device.

    Raises:
        WireError: nccl cannot connect two ranks, or another rank failed meanwhile (with ``direct``).
    """

    def __init__(
        self,
        session: Session,
        placement: Placement,
        local: LocalModel,
        device: torch.device,
        step: int,
        direct: bool = False,
    ) -> None:
        self.session = session
        self._kind, self._step, self._note = Kind.DATA, step, dict[str, Any]()
        self._outboxes: dict[Side, Outbox] = {}
        self._inboxes: dict[Side, Inbox] = {}
        self._sent: Downwards | None = None
        rank, total = placement.global_rank(placement.rank), len(local.parts)
        first, last = placement.numbers[0], placement.numbers[-1]
        self._carriers = Carriers(session, device, rank_edges(placement, local.method) if direct else None)
        to, of = self._carriers.towards, self._carriers.coming_from
        if first > 1:
            names = crossing_into(cast(Part, local.parts[first - 1]))
            expected = Upwards(Edge(first - 1, first), names, step, _primary(local, first))
            self._inboxes[Side.BELOW] = Inbox(session, expected, rank - 1, _UP, device, carrier=of(rank - 1))
            carrier = to(rank - 1) if messages_down(local.method, first, total) else None
            self._outboxes[Side.BELOW] = Outbox(session, Edge(first, first - 1), rank - 1, _DOWN, carrier=carrier)
        if last < total:
            self._outboxes[Side.ABOVE] = Outbox(session, Edge(last, last + 1), rank + 1, _UP, carrier=to(rank + 1))
            # Where nothing comes down but the end, too: that the rank above is gone shows on this edge.
            types = messages_down(local.method, last + 1, total)
            expected_down = Downwards(Edge(last + 1, last), types, step)
            carrier = of(rank + 1) if types else None
            self._inboxes[Side.ABOVE] = Inbox(session, expected_down, rank + 1, _DOWN, device, carrier=carrier)
            self._sent = expected_down if types else None

    # ---------------------------------------------------------------- within a batch

    def at(self, kind: Kind, step: int, samples: int, microbatches: int = 1) -> None:
        """What is sent from now on belongs to this batch; ``step`` counts from 0."""
        self._kind, self._step, self._note = kind, step, {"samples": samples, "microbatches": microbatches}

    def send(self, to: Side, message: Message) -> None:
        """See ``Outside``."""
        outbox = self._outboxes.get(to)
        if outbox is None:
            return
        if isinstance(message, Upward) and self._sent is not None and self._kind is Kind.DATA:
            self._sent.sends(self._step, message.stream)
        outbox.put(Envelope(self._kind, self._step, outbox.edge, message, self._note))

    def receive(self, source: Side) -> Message:
        """See ``Outside``.

        Raises:
            WireError: what comes is no message, or none at all comes.
        """
        envelope = self._inboxes[source].get()
        if envelope.message is None or envelope.kind is not self._kind:
            raise WireError(
                f"{place(self._step, envelope.edge)}: expected a message of {self._kind.name}, "
                f"found {envelope.kind.name}."
            )
        return envelope.message

    # ---------------------------------------------------------------- the stream

    def batches(self, kind: Kind) -> Iterator[tuple[Upward, int, int]]:
        """Until there is no more: a batch (or its first micro-batch), and how many samples and micro-batches it has."""
        while True:
            envelope = self._inboxes[Side.BELOW].get()
            if envelope.kind is Kind.EOS:
                return
            if envelope.kind is not kind or not isinstance(envelope.message, Upward):
                raise WireError(
                    f"{place(envelope.step, envelope.edge)}: expected {kind.name}, found {envelope.kind.name}."
                )
            yield envelope.message, int(envelope.note["samples"]), int(envelope.note["microbatches"])

    def end(self) -> None:
        """Tells the part above that there are no more batches, for now."""
        if Side.ABOVE in self._outboxes:
            outbox = self._outboxes[Side.ABOVE]
            outbox.put(Envelope(Kind.EOS, self._step, outbox.edge))

    def close(self) -> None:
        """Ends all edges, when nothing more is to be sent or received."""
        for outbox in self._outboxes.values():
            outbox.close()
        for inbox in self._inboxes.values():
            inbox.close()
        self._carriers.close()

    def abort(self, cause: Cause) -> None:
        """Tells the neighbours of a failure; nothing is sent or taken after that."""
        for outbox in self._outboxes.values():
            outbox.abort(cause)
        for inbox in self._inboxes.values():
            inbox.abort()
        self._carriers.abort()


def _primary(local: LocalModel, number: int) -> tuple[str, TensorSpec] | None:
    """Name and spec of what the head below part ``number`` reads, where the plan has them."""
    boundary = next((b for b in local.plan.boundaries if b.number == number - 1), None)
    return None if boundary is None else (boundary.primary, boundary.spec)
