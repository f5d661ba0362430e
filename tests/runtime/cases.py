"""What the ranks of ``test_distributed.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, to_local
from localize.runtime import checkpoint, links
from localize.runtime.messages import Feedback, Upward
from localize.runtime.snapshot import Snapshot
from localize.runtime.wire import Edge, Envelope, Kind, encode
from localize.weights import weights_of
from tests import zoo
from tests.runtime import helpers

torch.set_num_threads(1)


def zoo_model(name: str, method: str, parts: int) -> tuple[LocalModel, DataLoader[Any]]:
    """A model of the zoo and seven batches of it, the last one ragged."""
    case = zoo.BY_NAME[name]
    torch.manual_seed(0)  # of the heads
    local = to_local(zoo.build(case), case.inputs(), method=method, parts=parts, verify=False)
    data = TensorDataset(case.inputs(52), case.targets(52))
    return local, DataLoader(data, batch_size=8, shuffle=True)


def small_model(method: str, parts: int) -> tuple[LocalModel, DataLoader[Any]]:
    """Batch norm and dropout; four batches, the last one ragged."""
    return helpers.converted(method, parts=parts), helpers.loader()


MODELS = {"small": small_model}


def made(model: str, method: str, parts: int) -> tuple[LocalModel, DataLoader[Any]]:
    """One of ``MODELS``, or of the zoo."""
    return MODELS[model](method, parts) if model in MODELS else zoo_model(model, method, parts)


def trained(
    model: str, method: str, parts: int, executor: str, folder: Path, epochs: int, **options: Any
) -> tuple[LocalModel, list[dict[str, Any]], dict[str, Any], Snapshot]:
    """Model, history, scores and last checkpoint after training."""
    local, loader = made(model, method, parts)
    trainer = helpers.trainer(local, folder, executor=executor, progress=False, **options)
    rows = trainer.fit(loader, loader, epochs=epochs)
    scores = trainer.evaluate(loader)
    snapshot = checkpoint.load(folder)
    assert snapshot is not None
    return local, helpers.timeless(rows), scores, snapshot


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


# ------------------------------------------------------------------ failures


def _message(error: BaseException) -> dict[str, str]:
    return {"kind": type(error).__name__, "text": str(error)}


def fails(method: str, parts: int, at: int, on: int, how: str) -> dict[str, str] | None:
    """Trains until something goes wrong on one rank at a step (from 1); what each rank says of it."""
    local, loader = small_model(method, parts)

    def misbehave(step: int, reports: object) -> None:
        if step == at and rank() == on:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise helpers.Interruption("something broke")

    trainer = helpers.trainer(local, executor="distributed", progress=False, on_step=misbehave)
    try:
        trainer.fit(loader, epochs=5)
    except Exception as error:
        return _message(error)
    return None


def distorted(what: str, at: int, method: str = "early_exit") -> dict[str, str] | None:
    """Trains on two ranks; what the first sends at a step (from 1) is distorted on its way."""
    local, loader = small_model(method, 2)
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
    ((name, value),) = envelope.message.stream.items()
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
    header, rest, payload = encode(replace(envelope, message=Upward({name: value}, target)))
    if what == "payload":
        assert payload is not None
        payload = payload[:-100]
    elif what == "header":
        header = header[:50]
    elif what == "header dtype":
        header = torch.randn(1000)
    return header, rest, payload
