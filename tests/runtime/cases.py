"""What the ranks of ``test_distributed.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, to_local
from localize.runtime import checkpoint
from localize.runtime.snapshot import Snapshot
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
