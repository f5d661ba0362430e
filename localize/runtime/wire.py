"""The form in which messages travel between ranks: a header, checked before anything else is received, and bytes.

    header    HEADER_BYTES of uint8: magic, version, kind, type, step, parts, sizes, checksum, and a body in JSON:
              name, dtype, shape and strides of every tensor, the shape of the target, a note of plain values
    rest      what of the body did not fit into the header, if anything
    payload   the tensors' bytes, each at a multiple of 256, and a seal at the end

A transport that is told a wrong size fills a buffer in part, or with another type's bytes, and says nothing. So sizes
come from a header with a checksum, and the seal at the very end tells whether all of the payload arrived. Strides
travel too: a kernel may round otherwise for another memory layout, and results must not depend on who computes.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from localize.errors import WireError
from localize.runtime.messages import Feedback, Message, Relay, Upward
from localize.runtime.packing import Packed, count, describe, fill, harvest, offsets, once, plant, room

VERSION = 1
HEADER_BYTES = 4096
_MAGIC = b"LCLZ"
_PREFIX = struct.Struct("<4sHBBqIIqII")  # magic, version, kind, type, step, from, to, payload, body, checksum
_ROOM = HEADER_BYTES - _PREFIX.size
SEAL_BYTES = 8


class Kind(IntEnum):
    """What a message is part of."""

    DATA = 1  # a training batch
    EVAL = 2  # a batch to be evaluated
    EOS = 3  # no more batches, for now
    ABORT = 4  # the sender, or someone it heard of, failed; the note says who and why
    END = 5  # the last message of all


class Type(IntEnum):
    """What a message holds."""

    NOTHING = 0
    UPWARD = 1
    RELAY = 2
    FEEDBACK = 3


@dataclass(frozen=True)
class Edge:
    """From one part to its neighbour; parts are counted from 1."""

    source: int
    to: int

    def __str__(self) -> str:
        return f"part {self.source} -> part {self.to}"


@dataclass(frozen=True)
class Envelope:
    """A message and what is said about it. ``note`` holds plain values (JSON)."""

    kind: Kind
    step: int
    edge: Edge
    message: Message | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """Everything that is known of a message before its payload is received."""

    kind: Kind
    type: Type
    step: int
    edge: Edge
    payload_bytes: int
    checksum: int
    tensors: tuple[Packed, ...] = ()
    target: Any = None  # the tree of a target; see ``plant``
    note: Mapping[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------- sending


def place(step: int, edge: Edge) -> str:
    """Where something is wrong, for people: they count steps from 1."""
    return f"Step {step + 1}, edge {edge}"


@dataclass(frozen=True)
class Outline:
    """A message but for its payload: header and rest of the body (uint8), and what the payload is to hold."""

    header: Tensor
    rest: Tensor | None
    packed: Sequence[Packed]
    tensors: Sequence[Tensor]
    payload_bytes: int
    seal: int

    def pack(self, device: torch.device) -> Tensor:
        """The payload, as uint8 on ``device``, in copies: what happens to the tensors afterwards does not matter."""
        payload = torch.empty(self.payload_bytes, dtype=torch.uint8, device=device)
        fill(payload, self.packed, self.tensors)
        payload[-SEAL_BYTES:].view(torch.int64).fill_(self.seal)
        return payload


def encode(envelope: Envelope) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Header, rest of the body and payload as uint8 tensors on the CPU; the latter two only where there is any.

    The bytes are copies: what the sender does to its tensors afterwards does not matter. Errors: see ``outline``.
    """
    lines = outline(envelope)
    return lines.header, lines.rest, lines.pack(torch.device("cpu")) if lines.packed else None


def outline(envelope: Envelope) -> Outline:
    """A message but for its payload.

    Raises:
        WireError: the message holds what cannot travel.
    """
    where = place(envelope.step, envelope.edge)
    kind, tensors, tree = _unpacked(envelope.message, where)
    packed = [describe(name, tensor, where) for name, tensor in tensors]
    body = json.dumps(
        {
            "tensors": [[p.name, str(p.dtype).removeprefix("torch."), p.shape, p.strides] for p in packed],
            "target": tree,
            "note": dict(envelope.note),
        },
        separators=(",", ":"),
    ).encode()
    size = _payload_bytes(packed)
    fields = (
        _MAGIC, VERSION, envelope.kind, kind, envelope.step, envelope.edge.source, envelope.edge.to, size, len(body)
    )  # fmt: skip
    checksum = zlib.crc32(body, zlib.crc32(_PREFIX.pack(*fields, 0)))
    head = _PREFIX.pack(*fields, checksum) + body[:_ROOM]
    header = torch.frombuffer(bytearray(head.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)
    rest = torch.frombuffer(bytearray(body[_ROOM:]), dtype=torch.uint8) if len(body) > _ROOM else None
    return Outline(header, rest, packed, [tensor for _, tensor in tensors], size, _seal(size, checksum))


def _unpacked(message: Message | None, where: str) -> tuple[Type, list[tuple[str, Tensor]], Any]:
    match message:
        case None:
            return Type.NOTHING, [], None
        case Upward():
            leaves: list[tuple[str, Tensor]] = []
            tree = plant(message.target, leaves, where)
            return Type.UPWARD, [*message.stream.items(), *leaves], tree
        case Relay():
            return Type.RELAY, list(message.grads.items()), None
        case Feedback():
            return Type.FEEDBACK, [("per_sample", message.per_sample)], None


def _payload_bytes(packed: Sequence[Packed]) -> int:
    return offsets(packed)[1] + SEAL_BYTES if packed else 0


def _seal(size: int, checksum: int) -> int:
    """Eight bytes that hardly anything else leaves at the end of a payload, as a number in this machine's order."""
    return int.from_bytes(struct.pack("<II", checksum, ~size & 0xFFFFFFFF), sys.byteorder, signed=True)


# ----------------------------------------------------------------- receiving


def body_bytes(header: Tensor, where: str) -> int:
    """How many bytes of the body are still to be received after this header; ``where`` is for messages.

    Raises:
        WireError: the header is not one.
    """
    length: int = _prefix(header, where)[8]
    return max(0, length - _ROOM)


def decode_header(header: Tensor, rest: Tensor | None, where: str) -> Header:
    """What a header says, checked for consistency; ``where`` it was received is for messages.

    Raises:
        WireError: it is truncated, damaged, of another version or contradicts itself.
    """
    fields = _prefix(header, where)
    *known, size, length, checksum = fields
    body = bytes(header.numpy())[_PREFIX.size :][:length] + (b"" if rest is None else bytes(rest.numpy()))
    if zlib.crc32(body, zlib.crc32(_PREFIX.pack(*known, size, length, 0))) != checksum:
        raise WireError(f"{where}: expected a header with its checksum, found a damaged or truncated one.")
    try:
        content = json.loads(body)
        tensors = tuple(
            Packed(name, getattr(torch, dtype), tuple(shape), None if strides is None else tuple(strides))
            for name, dtype, shape, strides in content["tensors"]
        )
        _, _, kind, type_, step, source, to = known
        result = Header(
            Kind(kind), Type(type_), step, Edge(source, to), size, checksum, tensors, content["target"], content["note"]
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"{where}: the header makes no sense: {error}.") from error
    wanted = _payload_bytes(tensors)
    if wanted != size:
        raise WireError(
            f"{where}: expected a payload of {wanted} bytes for {', '.join(map(str, tensors))}, "
            f"found one of {size} announced."
        )
    return result


def _prefix(header: Tensor, where: str) -> tuple[Any, ...]:
    fields: tuple[Any, ...] = _PREFIX.unpack(bytes(header[: _PREFIX.size].numpy()))
    if fields[0] != _MAGIC:
        raise WireError(
            f"{where}: expected a header that begins with {_MAGIC!r}, found one that begins with {fields[0]!r}."
        )
    if fields[1] != VERSION:
        raise WireError(
            f"{where}: expected a message of version {VERSION}, found {fields[1]}; use one localize everywhere."
        )
    return fields


def room_for(header: Header, device: torch.device | None = None) -> Tensor:
    """A buffer for the payload that a header announces. Its end is no seal, whatever was in that memory before."""
    payload = torch.empty(header.payload_bytes, dtype=torch.uint8, device=device)
    payload[-SEAL_BYTES:] = 0
    return payload


def check_seal(header: Header, end: Tensor) -> None:
    """Looks at the end of a payload, on the CPU.

    Raises:
        WireError: the payload is truncated.
    """
    if end[-SEAL_BYTES:].clone().view(torch.int64).item() != _seal(header.payload_bytes, header.checksum):
        raise WireError(
            f"{place(header.step, header.edge)}: expected {header.payload_bytes} bytes of "
            f"{', '.join(map(str, header.tensors))}, found fewer: the payload is truncated."
        )


def decode(header: Header, payload: Tensor | None, device: torch.device | None = None) -> Envelope:
    """The message; its tensors are views of ``payload`` as far as their layout allows.

    A payload that is not on the CPU was checked when it arrived, since looking at it here would wait for the device.

    Raises:
        WireError: the payload is truncated.
    """
    if payload is not None and payload.device.type == "cpu":
        check_seal(header, payload)
    tensors = []
    for spec, offset in zip(header.tensors, offsets(header.tensors)[0], strict=True):
        assert payload is not None
        tensors.append((spec.name, _restored(payload, spec, offset, device)))
    return Envelope(header.kind, header.step, header.edge, _message(header, tensors), header.note)


def _message(header: Header, tensors: list[tuple[str, Tensor]]) -> Message | None:
    match header.type:
        case Type.NOTHING:
            return None
        case Type.UPWARD:
            leaves = tensors[len(tensors) - count(header.target) :]
            stream = dict(tensors[: len(tensors) - len(leaves)])
            return Upward(stream, harvest(header.target, iter([tensor for _, tensor in leaves])))
        case Type.RELAY:
            return Relay(dict(tensors))
        case Type.FEEDBACK:
            return Feedback(tensors[0][1])


def _restored(payload: Tensor, spec: Packed, offset: int, device: torch.device | None) -> Tensor:
    # ``data``: views count changes in place together, and autograd would take one for a change of all others.
    value = room(payload, spec, offset).data
    if device is not None:
        value = value.to(device, non_blocking=True)
    if spec.strides is None or not value.numel():
        return value
    result = torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device=value.device)
    once(result, spec.strides).copy_(value)
    return result
