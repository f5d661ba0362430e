"""Payloads of GPUs: the same bits whichever way they go, in the right order, and no rank waits for one that is gone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from localize import WireError
from localize.errors import ConfigError, PlacementError
from localize.heads.early_exit import EarlyExit
from localize.heads.nwise import NWise
from localize.runtime import transport
from localize.runtime.carriers import DeviceMemory, HostMemory
from localize.runtime.links import Outbox
from localize.runtime.messages import Upward
from localize.runtime.placement import Placement
from localize.runtime.ranks import FOREVER
from localize.runtime.waiters import Waiters
from localize.runtime.wire import Edge, Envelope, Header, Kind, Outline, decode, decode_header, outline
from tests.runtime.cases_carriers import OneStream
from tests.runtime.several import Several

CASES = "tests.runtime.cases_carriers:"
CPU = torch.device("cpu")


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    ("kind", "method"),
    [("device", "early_exit"), ("device", "lct"), ("device", "bp"), ("host", "al"), ("host", "bp")],
)
def test_carriers_change_no_bit(several: Several, tmp_path: Path, kind: str, method: str) -> None:
    """Three ranks: skips, ragged batches, evaluation, and gradients on the way down; equal to one process."""
    found = several.results(
        f"{CASES}same_as_sequential",
        3,
        kind=kind,
        model="mixed",
        method=method,
        parts=4,
        folder=str(tmp_path),
    )
    assert found[1][0] == found[0][0]
    carrier = {"device": "DeviceMemory", "host": "HostMemory"}[kind]
    for rank, (_, counts) in enumerate(found):
        receives = rank > 0 or method in ("lct", "bp")
        assert (counts.get(carrier, 0) >= 21) == receives  # each training batch at least
        edges = {"early_exit": 2, "lct": 4, "bp": 4}
        assert counts.get("groups", 0) == (edges[method] if kind == "device" else 0)


def test_groups_are_made_once(several: Several) -> None:
    """The second run needs edges downwards in addition; scores need no more."""
    for made in several.results(f"{CASES}twice", 3, parts=3):
        assert made == [2, 2, 4, 4]


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("dtype", "as float32 with 2 axes, as before, found"),
        ("axes", "as float32 with 2 axes, as before, found"),
        ("step", "expected step 3, found step 4"),
        ("kind", "expected DATA, found EVAL"),
        ("payload", "the payload is truncated"),
        ("header", "expected a header with its checksum, found a damaged or truncated one"),
    ],
)
def test_what_is_not_the_next_message_is_refused(several: Several, kind: str, what: str, said: str) -> None:
    first, second = several.results(f"{CASES}distorted", 2, kind=kind, what=what, at=3)
    assert second["kind"] == "WireError"
    assert said in second["text"]
    assert "edge part 1 -> part 2:" in second["text"]
    assert first["kind"] == "Stopped"
    assert said in first["text"]


@pytest.mark.parametrize(
    ("method", "on", "how"), [("bp", 1, "raise"), ("early_exit", 0, "kill"), ("bp", 2, "kill")]
)
def test_all_stop_when_one_fails(several: Several, method: str, on: int, how: str) -> None:
    found = several.run(f"{CASES}fails", 3, method=method, parts=3, at=5, on=on, how=how)
    own = {"early_exit": [1, 2, 1], "bp": [2, 4, 2]}[method]
    for rank, answer in enumerate(found):
        if how == "raise" or rank != on:
            assert (answer["result"]["aborted"], answer["result"]["left"]) == (own[rank], 0)
        if rank == on:
            assert answer["status"] == (-9 if how == "kill" else 0)
            continue
        assert answer["result"]["kind"] == "Stopped", answer
        assert f"because of rank {on} (part {on + 1} of 3) at step" in answer["result"]["text"]
        assert answer["seconds"] < 20


@pytest.mark.parametrize("method", ["early_exit", "bp"])
def test_nobody_waits_forever_for_a_payload(several: Several, method: str) -> None:
    """nccl says nothing of a peer that is gone: a payload that does not follow its header is what tells of it."""
    for answer in several.run(f"{CASES}withheld", 2, method=method):
        assert answer["status"] == 0, answer
        assert answer["result"]["kind"] == "Stopped"
        assert "the process is gone" in answer["result"]["text"]
        assert answer["seconds"] < 20


@pytest.mark.parametrize(
    ("how", "said"),
    [("error", "gloo cannot connect rank 0 and rank 1: unhandled system error. With LOCALIZE_TRANSPORT=gloo"),
     ("silence", "the process is gone")],
)  # fmt: skip
def test_ranks_that_cannot_be_connected_say_so(several: Several, how: str, said: str) -> None:
    answers = several.run(f"{CASES}not_connected", 2, how=how)
    assert all(answer["seconds"] < 20 for answer in answers)
    assert any(said in answer["result"]["text"] for answer in answers), answers


def test_groups_are_aborted_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To abort one of nccl's communicators may wait for what runs in the others."""
    monkeypatch.setattr(transport, "_ABORT_S", 1.0)
    together, done = threading.Barrier(2, timeout=10), []

    class Waits:
        def abort(self) -> None:
            together.wait()
            done.append("together")

    class Fails:
        def abort(self) -> None:
            raise RuntimeError("it is gone already")

    class Hangs:
        def abort(self) -> None:
            threading.Event().wait()

    groups: list[Any] = [Waits(), Fails(), Hangs(), Waits()]
    started = time.monotonic()
    transport._abort(groups)
    assert done == ["together"] * 2
    assert time.monotonic() - started < 5


# ------------------------------------------------------------------ one end


def lines_of(*values: Tensor) -> Outline:
    stream = {f"v{i}": value for i, value in enumerate(values)}
    return outline(Envelope(Kind.DATA, 4, Edge(1, 2), Upward(stream, torch.arange(2))))


def header_of(lines: Outline) -> Header:
    return decode_header(lines.header, lines.rest, "here")


def test_what_happens_to_a_tensor_afterwards_cannot_be_seen() -> None:
    carrier, value = HostMemory(CPU, OneStream()), torch.ones(3)
    lines = lines_of(value)
    load = carrier.pack(lines)
    value.zero_()
    message = decode(header_of(lines), carrier.ready(load)).message
    assert isinstance(message, Upward)
    assert message.stream["v0"].tolist() == [1.0] * 3


def test_through_host_memory_in_this_order() -> None:
    """Nothing is sent before it is in host memory, and no buffer is given away before the device has what was in it."""
    events: list[str] = []
    carrier, lines = HostMemory(CPU, OneStream(events)), lines_of(torch.ones(3))
    load = carrier.pack(lines)
    assert events == ["mark"]
    payload = carrier.ready(load)
    assert events == ["mark", "beside, after mark", "wait"]
    sent: list[Tensor] = []
    carrier.send(payload, lambda frame: sent.append(frame.clone()))
    events.clear()

    def fill(buffer: Tensor) -> None:
        events.append("fill")
        buffer.copy_(sent[0])

    received = carrier.receive(header_of(lines), fill)
    carrier.take(received)
    assert events == ["beside", "fill", "beside", "wait", "hand over"]


def test_a_pinned_buffer_is_used_again_and_grows() -> None:
    carrier = HostMemory(CPU, OneStream())
    small, large = lines_of(torch.full((4,), 1.0)), lines_of(torch.full((400,), 2.0))
    payloads, places = [], []
    for lines in (large, small, large):
        buffer = carrier.ready(carrier.pack(lines))
        payloads.append(buffer.clone())
        places.append(buffer.data_ptr())
    assert len(set(places)) == 1
    received = [
        carrier.receive(header_of(lines), lambda buffer, sent=sent: buffer.copy_(sent))  # type: ignore[misc]
        for lines, sent in zip((large, small, large), payloads, strict=True)
    ]
    for payload, sent in zip(received, payloads, strict=True):
        assert torch.equal(payload, sent)  # and not what came later
    growing = HostMemory(CPU, OneStream())
    assert growing.ready(growing.pack(small)).numel() < growing.ready(growing.pack(large)).numel()


class _Group:
    """A group of this rank and another one, which sends back what it is sent."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.held = events, [torch.zeros(0)]

    def rank(self) -> int:
        return 1

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Group:
        self.events.append(f"send to {peer}")
        self.held = [tensor.clone() for tensor in tensors]
        return self

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Group:
        self.events.append(f"receive from {peer}")
        tensors[0].copy_(self.held[0])
        return self

    def wait(self) -> None:
        self.events.append("work waits")


def test_through_device_memory_in_this_order() -> None:
    """A header may leave when the computation has come to the mark; nothing goes through host memory."""
    events: list[str] = []
    group: Any = _Group(events)
    carrier, lines = DeviceMemory(CPU, OneStream(events), group), lines_of(torch.ones(3))

    def never(frame: Tensor) -> None:
        raise AssertionError("host memory")

    payload = carrier.ready(carrier.pack(lines))
    assert events == ["mark", "reach mark"]
    carrier.send(payload, never)
    assert events[2:] == ["beside", "send to 0", "work waits", "wait"]
    events.clear()
    received = carrier.receive(header_of(lines), never)
    assert events == ["beside", "receive from 0", "work waits", "wait", "beside"]
    assert torch.equal(received, payload)
    assert not carrier.late()


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_header_leaves_when_its_payload_can_follow(kind: str) -> None:
    """Else the other end would wait for this end's computation, on its device and for nobody knows how long."""
    events: list[str] = []
    group: Any = _Group(events)
    lane = OneStream(events)
    carrier = HostMemory(CPU, lane) if kind == "host" else DeviceMemory(CPU, lane, group)
    session: Any = SimpleNamespace(ranks=SimpleNamespace(group=group), check=lambda: None, waiters=Waiters(group))
    outbox = Outbox(session, Edge(1, 2), 7, 2, carrier=carrier)
    outbox.put(Envelope(Kind.DATA, 0, Edge(1, 2), Upward({"x": torch.ones(3)}, None)))
    outbox.close()
    headers, payload = ["send to 7", "work waits"], ["send to 7", "work waits"]
    ready = ["mark", "beside, after mark", "wait"]
    if kind == "device":
        ready, payload = ["mark", "reach mark"], ["beside", "send to 0", "work waits", "wait"]
    assert events == ready + headers + payload + headers  # the last one: of the end


@pytest.mark.parametrize("cut", [1, 8, 200])
def test_a_truncated_payload_is_refused_before_it_is_handed_out(cut: int) -> None:
    group: Any = _Group([])
    device, host, lines = (
        DeviceMemory(CPU, OneStream(), group),
        HostMemory(CPU, OneStream()),
        lines_of(torch.ones(3)),
    )
    payload = host.ready(host.pack(lines))
    group.held = [torch.cat([payload[:-cut], torch.zeros(cut, dtype=torch.uint8)])]
    for receive in (device.receive, HostMemory(CPU, OneStream()).receive):
        with pytest.raises(WireError, match=r"Step 5, edge part 1 -> part 2: .* the payload is truncated"):
            receive(header_of(lines), lambda buffer: buffer[: payload.numel() - cut].copy_(payload[:-cut]))


# ------------------------------------------------------------------ who goes which way


def seats(*gpus: str | None, wish: str = "auto") -> list[dict[str, Any]]:
    return [{"transport": wish if rank == 1 else "auto", "gpu": gpu} for rank, gpu in enumerate(gpus)]


def test_from_device_to_device_where_each_rank_has_one_of_its_own() -> None:
    assert transport.direct(seats("a", "b", "c"))
    assert not transport.direct(seats("a", "b", "a"))
    assert not transport.direct(seats("a", None))
    assert not transport.direct(seats(None, None))
    assert not transport.direct(seats("a", "b", wish="gloo"))
    assert transport.direct(seats("a", "b", wish="nccl"))


def test_nccl_where_it_is_impossible_says_on_which_ranks() -> None:
    with pytest.raises(PlacementError, match="rank 1, 2 of 4 has none"):
        transport.direct(seats("a", "a", None, "b", wish="nccl"))


def test_a_rank_says_where_it_sits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALIZE_TRANSPORT", raising=False)
    assert transport.seat(CPU) == {"transport": "auto", "gpu": None}
    monkeypatch.setenv("LOCALIZE_TRANSPORT", "GLOO")
    assert transport.seat(CPU)["transport"] == "gloo"
    monkeypatch.setenv("LOCALIZE_TRANSPORT", "mpi")
    with pytest.raises(ConfigError, match="'mpi' is no transport; use one of auto, gloo, nccl"):
        transport.seat(CPU)


def test_edges_of_all_replicas() -> None:
    placement = Placement(1, (range(1, 2), range(2, 4), range(4, 5)), replica=1, replicas=2)
    assert transport.rank_edges(placement, EarlyExit()) == [(0, 1), (1, 2), (3, 4), (4, 5)]
    down = transport.rank_edges(placement, NWise(reach=2))
    assert down == [(0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3), (4, 5), (5, 4)]


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch without nccl")
def test_options_of_nccl_are_as_torch_has_them() -> None:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = FOREVER
    assert options.is_high_priority_stream
    assert options._timeout == FOREVER
