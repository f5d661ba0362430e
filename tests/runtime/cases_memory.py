"""What the ranks of ``test_distributed.py`` have in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, to_local
from localize.part import advance
from localize.runtime import links
from localize.runtime.memory import LiveBytes, SavedBytes
from localize.runtime.messages import Upward
from localize.runtime.sequential import stages_of
from localize.runtime.wire import Envelope, encode, room_for
from localize.signature import tensors_of
from localize.weights import weights_of
from tests import zoo
from tests.runtime import helpers
from tests.runtime.cases import METHODS, names_in, numbers_of


def peaks(method: str, parts: int) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients, optimizer state and activations of this rank while it trains.

    ``own``: the same of its parts, one after another, in one process that sends nothing. ``wire``: of messages that
    wait to leave or to be taken; the largest one; and how many may wait here, at most.
    """
    case = zoo.BY_NAME["cnn"]
    inputs, targets = case.inputs(192), case.targets(192)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    optimizers: list[Optimizer] = []
    waiting, sizes, gradients = LiveBytes(), [0], [0]

    def build() -> LocalModel:
        torch.manual_seed(0)
        return to_local(zoo.build(case), inputs[:4], method=METHODS[method], parts=parts, verify=False)

    def optimizer(parameters: Any) -> Optimizer:
        optimizers.append(torch.optim.Adam(parameters))
        return optimizers[-1]

    def counted_encode(envelope: Envelope) -> Any:
        frames = encode(envelope)
        sizes.append(sum(f.nbytes for f in frames if f is not None))
        return tuple(None if frame is None else waiting.add(frame) for frame in frames)

    def counted_room(header: Any) -> Tensor:
        sizes.append(header.payload_bytes)
        return waiting.add(room_for(header))

    def look(step: int, reports: object) -> None:
        gradients.append(sum(p.grad.nbytes for p in local.parameters() if p.grad is not None))

    links.encode, links.room_for = counted_encode, counted_room  # type: ignore[assignment]
    local = build()
    numbers = numbers_of(local)
    options: dict[str, Any] = {"progress": False, "gather": "none", "optimizer": optimizer, "head_optimizer": optimizer}
    with SavedBytes(exclude=[*local.parameters(), *local.buffers()]) as saved:
        helpers.trainer(local, executor="distributed", on_step=look, **options).fit(loader)
    found = {
        "weights": sum(t.nbytes for t in weights_of(local).values() if not t.is_meta),
        "gradients": max(gradients),
        "optimizer": sum(t.nbytes for o in optimizers for t in tensors_of(list(o.state.values()))),
        "saved": saved.peak_bytes,
    }
    edges = (numbers[0] > 1) + (numbers[-1] < parts)
    there_and_back = 1 if method == "early_exit" else 2
    wire = {"peak": waiting.peak_bytes, "message": max(sizes), "most": edges * there_and_back * (links.WINDOW + 1)}

    whole = build().train()
    optimizers.clear()
    helpers.trainer(whole, **options).fit(loader)
    mine = [p for i in numbers for m in (whole.parts[i - 1], whole.heads[i - 1]) if m for p in m.parameters()]
    states = [o.state[p] for o in optimizers for p in mine if p in o.state]
    own = {
        "weights": sum(weights_of(whole)[n].nbytes for i in numbers for n in names_in(whole, i)),
        "gradients": sum(p.nbytes for p in mine if p.requires_grad),
        "optimizer": sum(t.nbytes for t in tensors_of(states)),
        "saved": _saved_alone(whole, numbers, inputs[:32].clone(), targets[:32].clone()),
    }
    return {"found": found, "own": own, "wire": wire}


def _saved_alone(local: LocalModel, numbers: range, inputs: Tensor, targets: Tensor) -> int:
    """The most that one of the parts saves in its forward pass with its head's."""
    arrived, most = Upward(local.signature.stream((inputs,), {}), targets), 0
    for stage in stages_of(local):
        with SavedBytes(exclude=[*local.parameters(), *local.buffers()]) as saved:
            result, above = advance(stage.part, arrived.stream)
            if stage.head is not None:
                stage.head(stage.task.logits(result) if stage.is_last else result, targets)
            if stage.number in numbers:
                most = max(most, saved.peak_bytes)
        arrived = Upward({name: value.detach() for name, value in above.items()}, targets)
    return most
