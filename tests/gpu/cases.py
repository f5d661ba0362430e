"""What the ranks of ``test_ranks.py`` do; each runs in a process of its own, ``python -m tests.gpu.cases NAME JSON``.

Not forked, as elsewhere: a process that has looked for a GPU cannot be.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localize.runtime import transport
from localize.runtime.carriers import HostMemory
from localize.runtime.lanes import CudaLane
from localize.runtime.links import Inbox, Outbox
from localize.runtime.messages import Upward
from localize.runtime.ranks import join
from localize.runtime.session import Session
from localize.runtime.wire import Edge, Envelope, Header, Kind
from localize.weights import weights_of
from tests.runtime import cases, helpers
from tests.runtime.cases_carriers import OneStream

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def on_the_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def same_as_sequential(
    device: str, method: str, folder: str, own_device: bool = False, **options: Any
) -> Any:
    """Trains on all ranks, and then in one process on the same GPU; everything must be equal to the last bit."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    place, path = f"{device}:{cases.rank()}" if own_device else device, Path(folder)
    arguments: dict[str, Any] = {"model": "mixed", "method": method, "parts": 4, "epochs": 3, **options}
    many = cases.trained(executor="distributed", folder=path / "many", device=place, **arguments)
    direct = sum(group is not None for group in transport._made.groups.values())
    if cases.rank() > 0:
        return [many[1], many[2], direct]
    one = cases.trained(executor="sequential", folder=path / "one", device=place, **arguments)
    helpers.assert_same(on_the_cpu(weights_of(many[0])), on_the_cpu(weights_of(one[0])))
    helpers.assert_same(on_the_cpu(many[3].optimizer), on_the_cpu(one[3].optimizer))
    assert many[1] == one[1], (many[1], one[1])
    assert many[2] == one[2]
    return [many[1], many[2], direct]


# ------------------------------------------------------------------ many messages


class _Anything:
    """A contract that every message fulfils."""

    def __init__(self, edge: Edge) -> None:
        self.edge, self.step = edge, 0

    def check(self, header: Header) -> None:
        self.step = header.step + 1


def values_of(step: int, device: torch.device) -> dict[str, Tensor]:
    """What message ``step`` holds: the same wherever it is made."""
    draw = random.Random(step)
    values = {}
    for i in range(draw.randint(1, 4)):
        shape = [draw.choice((1, 3, 64, 700)), draw.choice((2, 17, 512))]
        numbers = (torch.arange(shape[0] * shape[1], device=device) * 37 + step * 11 + i) % 251
        value = numbers.reshape(shape).to(draw.choice(DTYPES))
        values[f"v{i}"] = value.t() if draw.random() < 0.3 else value
    return values


def _busy(draw: random.Random, device: torch.device) -> None:
    """Gives the device something to do, or waits, or neither."""
    if draw.random() < 0.5:
        matrix = torch.ones(
            draw.choice((64, 512, 2048) if device.type == "cuda" else (8, 64)), 64, device=device
        )
        for _ in range(draw.randint(1, 20)):
            matrix = matrix @ matrix.new_ones(64, 64) / 64
    if draw.random() < 0.3:
        time.sleep(draw.random() * 0.01)


def many_messages(device: str, count: int) -> int:
    """The first of two ranks sends messages and spoils its tensors at once; the second one looks at them late.

    How many tensors the second one found to be as they were sent.
    """
    place, rank, found = torch.device(device), cases.rank(), 0
    session, draw = Session(join(), ["part 1 of 2", "part 2 of 2"]), random.Random(cases.rank() + 1)
    carrier = HostMemory(place, CudaLane(place) if place.type == "cuda" else OneStream())
    if rank == 0:
        outbox = Outbox(session, Edge(1, 2), 1, 2, carrier=carrier)
        for step in range(count):
            _busy(draw, place)
            values = values_of(step, place)
            outbox.put(Envelope(Kind.DATA, step, Edge(1, 2), Upward(values, None)))
            for value in values.values():
                value.zero_()
            del values, value
        outbox.close()
    else:
        inbox = Inbox(session, _Anything(Edge(1, 2)), 0, 2, place, carrier=carrier)
        kept: list[tuple[int, dict[str, Tensor]]] = []
        for step in range(count):
            message = inbox.get().message
            assert isinstance(message, Upward)
            # Read by the device long after this thread has let go of them, while other messages arrive.
            kept.append((step, message.stream))
            del message
            _busy(draw, place)
            while kept and (len(kept) > 3 or step == count - 1):
                sent, stream = kept.pop(0)
                for name, value in values_of(sent, place).items():
                    assert stream[name].dtype == value.dtype
                    assert stream[name].is_contiguous() == value.is_contiguous(), (sent, name)
                    assert torch.equal(stream[name], value), (sent, name)
                    found += 1
                del stream
        inbox.close()
    session.wait_for_all()
    session.leave()
    return found


if __name__ == "__main__":
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    try:
        answer: dict[str, Any] = {"result": globals()[name](**arguments)}
    except Exception:
        answer = {"trace": traceback.format_exc()}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
