"""What the ranks of ``test_carriers.py`` do: as ``cases.py``, with carriers, in groups of gloo and without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from localize.runtime import carriers, links, transport, wires
from localize.runtime.carriers import DeviceMemory, HostMemory
from localize.runtime.messages import Upward
from localize.runtime.wire import Envelope, Kind, Outline, outline
from tests.runtime import cases, helpers


class OneStream:
    """A lane of a device that does one thing after another; keeps a list of what it was asked for."""

    pins = False

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events

    def mark(self) -> str:
        self.events.append("mark")
        return "mark"

    @contextmanager
    def beside(self, after: Any = None) -> Iterator[None]:
        self.events.append(f"beside, after {after}" if after else "beside")
        yield

    def reach(self, mark: Any) -> None:
        self.events.append(f"reach {mark}")

    def wait(self) -> None:
        self.events.append("wait")

    def hand_over(self, buffer: Tensor) -> None:
        self.events.append("hand over")


def install(kind: str, counts: dict[str, int] | None = None) -> None:
    """Makes this rank's wires use a carrier, as on GPUs: ``host``, or ``device`` with groups of gloo for nccl's."""
    made = {} if counts is None else counts
    wires.Carriers = partial(  # type: ignore[assignment,misc]
        transport.Carriers, backend="gloo", lane=lambda device: OneStream()
    )
    if kind == "device":
        transport.direct = lambda seats: True  # type: ignore[assignment]
        original = transport._new_group

        def counted(edge: transport.RankEdge, member: bool, backend: str) -> Any:
            made["groups"] = made.get("groups", 0) + 1
            return original(edge, member, backend)

        transport._new_group = counted  # type: ignore[assignment]
    else:
        transport.Carriers._of = lambda self, edge: HostMemory(self._device, OneStream())  # type: ignore
    for carrier in (HostMemory, DeviceMemory):
        carrier.receive = _counting(carrier.receive, carrier.__name__, made)  # type: ignore[method-assign]


def _counting(receive: Callable[..., Tensor], name: str, counts: dict[str, int]) -> Callable[..., Tensor]:
    def counted(*arguments: Any) -> Tensor:
        counts[name] = counts.get(name, 0) + 1
        return receive(*arguments)

    return counted


def same_as_sequential(kind: str, **arguments: Any) -> list[Any]:
    """See ``cases.same_as_sequential``; and how many payloads this rank received, by carrier, and groups were made."""
    counts: dict[str, int] = {}
    install(kind, counts)
    return [cases.same_as_sequential(**arguments), counts]


def fails(**arguments: Any) -> dict[str, Any]:
    """See ``cases.fails``; and how many groups were aborted, and are left."""
    install("device")
    aborted = []
    transport._abort_one = aborted.append  # type: ignore[assignment]
    said = cases.fails(**arguments)
    return {
        **(said or {}),
        "aborted": len(aborted),
        "left": sum(g is not None for g in transport._made.groups.values()),
    }


def twice(parts: int) -> list[int]:
    """How many groups there are after each of two runs in the same processes, and after their scores."""
    install("device")
    made = []
    for method in ("early_exit", "bp"):
        local, loader = cases.made("mixed", method, parts)
        trainer = helpers.trainer(local, executor="distributed", progress=False)
        trainer.fit(loader)
        made.append(len(transport._made.groups))
        trainer.evaluate(loader)
        made.append(len(transport._made.groups))
    return made


def distorted(kind: str, what: str, at: int) -> dict[str, str] | None:
    """Trains on two ranks; what the first sends at a step (from 1) is distorted on its way."""
    install(kind)
    local, loader = cases.made("mixed", "early_exit", 2)
    if cases.rank() == 0:
        links.outline = partial(_distorting, what, at - 1)  # type: ignore[assignment]
        if what == "payload":
            _send_less(at)
    return _trains(local, loader)


def _trains(local: Any, loader: Any) -> dict[str, str] | None:
    try:
        helpers.trainer(local, executor="distributed", progress=False).fit(loader, epochs=5)
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return None


def _distorting(what: str, at: int, envelope: Envelope) -> Outline:
    if envelope.step != at or not isinstance(envelope.message, Upward):
        return outline(envelope)
    (name, value), *others = envelope.message.stream.items()
    match what:
        case "dtype":
            value = value.double()
        case "axes":
            value = value[..., None]
        case "step":
            envelope = replace(envelope, step=at + 1)
        case "kind":
            envelope = replace(envelope, kind=Kind.EVAL, step=0)
    message = Upward({name: value, **dict(others)}, envelope.message.target)
    lines = outline(replace(envelope, message=message))
    return replace(lines, header=lines.header[:50]) if what == "header" else lines


def _send_less(at: int) -> None:
    """From message ``at`` on (from 1), the end of a payload is missing."""
    sent = [0]
    for carrier in (HostMemory, DeviceMemory):
        original: Any = carrier.send

        def send(self: Any, payload: Tensor, emit: Any, original: Any = original) -> None:
            sent[0] += 1
            original(self, payload if sent[0] < at else payload[:-100], emit)

        carrier.send = send  # type: ignore[method-assign]


def withheld(method: str) -> dict[str, str] | None:
    """Trains on two ranks; the first announces the payload of its third message, and never sends it."""
    install("device")
    carriers.LATE_S = 1.0
    local, loader = cases.made("mixed", method, 2)
    if cases.rank() == 0:
        sent, original = [0], DeviceMemory.send

        def send(self: DeviceMemory, payload: Tensor, emit: Any) -> None:
            sent[0] += 1
            if sent[0] == 3:
                with self._on_its_way():
                    threading.Event().wait()
            original(self, payload, emit)

        DeviceMemory.send = send  # type: ignore[method-assign]
    return _trains(local, loader)


def not_connected(how: str) -> dict[str, str] | None:
    """Trains on two ranks, between which no group of two can be used."""
    install("device")
    transport.LATE_S = 1.0
    local, loader = cases.made("mixed", "early_exit", 2)

    def greet(self: DeviceMemory, sends: bool) -> None:
        if how == "silence" and cases.rank() == 1:
            threading.Event().wait()
        if how == "error":
            raise RuntimeError("unhandled system error")
        original(self, sends)

    original = DeviceMemory.greet
    DeviceMemory.greet = greet  # type: ignore[method-assign]
    return _trains(local, loader)
