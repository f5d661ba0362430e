"""What the ranks of ``test_distributed.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, list_methods, to_local
from localize.heads.base import Method
from localize.heads.nwise import NWise
from localize.runtime import checkpoint, links
from localize.runtime.causes import Stopped
from localize.runtime.messages import Feedback, Upward
from localize.runtime.placement import placement_of
from localize.runtime.snapshot import Snapshot
from localize.runtime.stage import StageReport
from localize.runtime.wire import Edge, Envelope, Kind, encode
from localize.weights import weights_of
from tests import zoo
from tests.runtime import helpers
from tests.runtime.rebound import AVERAGES

torch.set_num_threads(1)

METHODS: dict[str, str | Method] = {
    **{name: name for name in list_methods()},
    "nwise-3-sum": NWise(reach=3, gradient="sum"),
}
"""By the name of a case."""


class Mixed(nn.Module):
    """Batch norm, dropout, and a value of the first layer that every part reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(5)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(10) for _ in range(5)])
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(10, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.tanh(self.stem(x))
        h = stem
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = self.drop(torch.relu(norm(layer(h)))) + 0.5 * stem
        return self.head(h * stem)


MIXED = zoo.Case("mixed", Mixed, (6,), parts=4)


def made(model: str, method: str, parts: int) -> tuple[LocalModel, DataLoader[Any]]:
    """A model and seven batches of it, the last one ragged; the same weights wherever it is made."""
    case = (zoo.BY_NAME | {"mixed": MIXED, "averages": AVERAGES})[model]
    torch.manual_seed(0)  # of the heads
    local = to_local(zoo.build(case), case.inputs(), method=METHODS[method], parts=parts, verify=False)
    data = TensorDataset(case.inputs(52), case.targets(52))
    return local, DataLoader(data, batch_size=8, shuffle=True)


def trained(
    model: str, method: str, parts: int, executor: str, folder: Path, epochs: int, **options: Any
) -> tuple[LocalModel, list[dict[str, Any]], dict[str, Any], Snapshot]:
    """Model, history, scores before and after, and last checkpoint. Only the first rank may read data."""
    local, loader = made(model, method, parts)
    data: Any = Untouchable() if executor == "distributed" and rank() else loader
    trainer = helpers.trainer(local, folder, executor=executor, progress=False, **options)
    scores = {"before": trainer.evaluate(data)}
    rows = trainer.fit(data, data, epochs=epochs)
    scores["after"] = trainer.evaluate(data)
    snapshot = checkpoint.load(folder)
    assert snapshot is not None
    return local, helpers.timeless(rows), scores, snapshot


class Untouchable:
    """A loader that nobody is to read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("only the first rank reads data")


def rank() -> int:
    return int(os.environ["RANK"])


def same_as_sequential(model: str, method: str, parts: int, folder: str, epochs: int = 3, **options: Any) -> Any:
    """Trains on all ranks, and then in one process; everything must be equal to the last bit."""
    path = Path(folder)
    local, rows, scores, snapshot = trained(model, method, parts, "distributed", path / "many", epochs, **options)
    if rank() > 0:
        return [rows, scores]
    found = trained(model, method, parts, "sequential", path / "one", epochs, **options)
    one, one_rows, one_scores, one_snapshot = found
    helpers.assert_same(weights_of(local), weights_of(one))
    helpers.assert_same(snapshot.weights, one_snapshot.weights)
    helpers.assert_same(snapshot.optimizer, one_snapshot.optimizer)
    assert rows == one_rows, (rows, one_rows)
    assert scores == one_scores
    assert snapshot.trainer["optimizers"] == one_snapshot.trainer["optimizers"]
    assert snapshot.about["step"] == one_snapshot.about["step"]
    return [rows, scores]


def runs(
    method: str, parts: int, executor: str, folder: str, stop: int | None = None, ranks_kept: str = "first"
) -> dict[str, Any] | None:
    """Trains three epochs, or goes on to do so, with checkpoints; ``stop`` is a step at which the last rank fails.

    What there is at the end, on the first rank: digests of weights and optimizer state, and the history.
    """
    local, loader = made("mixed", method, parts)
    path = Path(folder)

    def stopping(step: int, reports: object) -> None:
        if step == stop and rank() == int(os.environ["WORLD_SIZE"]) - 1:
            raise helpers.Interruption

    trainer = helpers.trainer(
        local, path, executor=executor, progress=False, on_step=stopping, checkpoint_every=4, gather=ranks_kept
    )
    try:
        rows = trainer.fit(loader, loader, epochs=3, resume=checkpoint.any_in(path))
    except (helpers.Interruption, Stopped):
        return None
    if rank() > 0:
        return None
    snapshot = checkpoint.load(path)
    assert snapshot is not None
    return {
        "model": digest(weights_of(local)),
        "weights": digest(snapshot.weights),
        "optimizer": digest(snapshot.optimizer),
        "rows": helpers.timeless(rows),
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """Equal where all tensors are, to the last bit."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    return result.hexdigest()


def holdings(parts: int, gather: str, folder: str) -> dict[str, Any]:
    """What a rank has in memory while it trains and afterwards, by name of the tensor."""
    local, loader = made("mixed", "al", parts)
    model = local.to_standard()
    marked = next(model.parameters())
    marked.mark = "a user's own"  # type: ignore[attr-defined]
    during: list[list[str]] = []

    def look(step: int, reports: list[StageReport]) -> None:
        during.append([name for name, tensor in weights_of(local).items() if not tensor.is_meta])
        during.append([str(i) for i, report in enumerate(reports, 1) if report.loss is not None])

    helpers.trainer(local, executor="distributed", progress=False, on_step=look, gather=gather).fit(loader)
    if rank() == 0 and gather == "first":
        local.save(folder)
    return {
        "during": during[0],
        "reported": during[1],
        "after": [name for name, tensor in weights_of(local).items() if not tensor.is_meta],
        "own": [n for i in numbers_of(local) for n in names_in(local, i)],
        "all": list(weights_of(local)),
        "same object": next(model.parameters()) is marked and marked.mark == "a user's own",  # type: ignore[attr-defined]
        "trainable": all(p.requires_grad for p in local.parameters()),
    }


def numbers_of(local: LocalModel) -> range:
    """The parts of this rank."""
    return placement_of(local, rank(), int(os.environ["WORLD_SIZE"])).numbers


def names_in(local: LocalModel, number: int) -> list[str]:
    """Original names of what a part and its head have."""
    names = list(local.parts[number - 1].state_dict())
    head = local.heads[number - 1]
    return names + [f"heads.{number}.{name}" for name in (head.state_dict() if head is not None else ())]


def unlike(what: str) -> dict[str, str] | None:
    """Trains where the second of two ranks was given something else than the first."""
    method = "bp" if rank() and what == "method" else "early_exit"
    local, loader = made("mixed", method, 3 if rank() and what == "cuts" else 2)
    try:
        helpers.trainer(local, executor="distributed", seed=rank() if what == "seed" else 3).fit(loader)
    except Exception as error:
        return _message(error)
    return None


def refused(parts: int, **options: Any) -> dict[str, str] | None:
    """What training with these options is refused for."""
    local, loader = made("mixed", "bp", parts)
    try:
        helpers.trainer(local, executor="distributed", **options).fit(loader)
    except Exception as error:
        return _message(error)
    return None


# ------------------------------------------------------------------ failures


def _message(error: BaseException) -> dict[str, str]:
    return {"kind": type(error).__name__, "text": str(error)}


def fails(
    method: str, parts: int, at: int, on: int, how: str, replicas: int = 1, again: bool = False
) -> dict[str, str] | None:
    """Trains until something goes wrong on one rank at a step (from 1); what each rank says of it."""
    local, loader = made("mixed", method, parts)

    def misbehave(step: int, reports: object) -> None:
        if step == at and rank() == on:
            if how == "kill later":
                time.sleep(1.0)  # by now all others are done with the epoch
            if how.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise helpers.Interruption("something broke")

    trainer = helpers.trainer(local, executor="distributed", progress=False, on_step=misbehave, data_parallel=replicas)
    for _ in range(1 + again):
        try:
            trainer.fit(loader, epochs=5)
        except Exception as error:
            said = _message(error)
        else:
            said = None
    return said


def distorted(what: str, at: int, method: str = "early_exit") -> dict[str, str] | None:
    """Trains on two ranks; what the first sends at a step (from 1) is distorted on its way."""
    local, loader = made("mixed", method, 2)
    if rank() == 0:
        links.encode = partial(_distorting, what, at - 1)  # type: ignore[assignment]
    try:
        helpers.trainer(local, executor="distributed", progress=False).fit(loader, epochs=5)
    except Exception as error:
        return _message(error)
    return None


def _distorting(what: str, at: int, envelope: Envelope) -> Any:
    if envelope.step != at or not isinstance(envelope.message, Upward):
        return encode(envelope)
    (name, value), *others = envelope.message.stream.items()
    target = envelope.message.target
    match what:
        case "dtype":
            value = value.double()
        case "axes":
            value = value[..., None]
        case "channels":
            value = value[:, 1:]
        case "name":
            name = "elsewhere"
        case "step":
            envelope = replace(envelope, step=at + 1)
        case "edge":
            envelope = replace(envelope, edge=Edge(2, 3))
        case "type":
            return encode(replace(envelope, message=Feedback(target)))
        case "kind":
            envelope = replace(envelope, kind=Kind.EVAL, step=0)
    header, rest, payload = encode(replace(envelope, message=Upward({name: value, **dict(others)}, target)))
    if what == "payload":
        assert payload is not None
        payload = payload[:-100]
    elif what == "header":
        header = header[:50]
    elif what == "header dtype":
        header = torch.randn(1000)
    return header, rest, payload


def traced(method: str, parts: int, file: str) -> None:
    """One epoch with a trace."""
    local, loader = made("mixed", method, parts)
    helpers.trainer(local, executor="distributed", progress=False, trace=file).fit(loader)
