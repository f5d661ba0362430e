"""What the ranks of ``test_rebound.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, to_local
from localize.runtime.stage import StageReport
from localize.weights import weights_of
from tests import zoo
from tests.runtime import helpers
from tests.runtime.cases import made, rank
from tests.runtime.rebound import AVERAGES, Average, Chained


def chained() -> LocalModel:
    torch.manual_seed(0)
    return to_local(zoo.build(AVERAGES), AVERAGES.inputs(), method=Chained(), parts=4, verify=False)


def data(bad: int | None = None) -> DataLoader[Any]:
    """Seven batches; the one at ``bad`` is not finite."""
    inputs, targets = AVERAGES.inputs(56), AVERAGES.targets(56)
    if bad is not None:
        inputs[8 * bad] = math.nan
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """What is not the same to the last bit."""
    assert one.keys() == other.keys()
    return [n for n, t in one.items() if t.is_meta or t.dtype != other[n].dtype or not torch.equal(t, other[n])]


def gathered(method: str, gather: str, bad: int | None = None) -> dict[str, Any]:
    """What a rank has after training, against one process; and the buffers that it had in memory meanwhile."""
    found: list[Any] = []
    during: list[str] = []

    def look(step: int, reports: list[StageReport]) -> None:
        during[:] = [name for name, t in weights_of(found[-1]).items() if not t.is_meta and ".mean" in name]

    rows, scores = [], []
    for executor in ("distributed", "sequential"):
        local = chained() if method == "chained" else made("averages", method, 4)[0]
        found.append(local)
        options = {"gather": gather, "on_nonfinite": "raise" if bad is None else "skip"}
        if executor == "distributed":
            options["on_step"] = look  # type: ignore[assignment]
        trainer = helpers.trainer(local, executor=executor, progress=False, **options)
        before = trainer.evaluate(data())
        rows.append(helpers.timeless(trainer.fit(data(bad), data(), epochs=2)))
        scores.append([before, trainer.evaluate(data())])
    many, one = found
    left = [name for name, tensor in weights_of(many).items() if tensor.is_meta]
    return {
        "different": [] if gather == "first" and rank() else differ(weights_of(many), weights_of(one)),
        "finite": all(bool(t.isfinite().all()) for t in weights_of(one).values()),
        "skipped": rows[0][0]["skipped"],
        "moved": all(bool(t.any()) for n, t in weights_of(one).items() if ".mean" in n),
        "rows": rows[0] == rows[1],
        "scores": scores[0] == scores[1],
        "during": len(during),
        "left": len(left),
        "all": sum(".mean" in name for name in weights_of(one)),
    }


def replicated() -> dict[str, Any]:
    """Two replicas of two parts, trained twice: what averages begin and end with, and what the model is worth then."""
    local = made("averages", "early_exit", 2)[0]
    batches = list(data())[:4]
    with torch.no_grad():
        for module in local.to_standard().modules():
            if isinstance(module, nn.Linear) and rank() >= 2:
                module.bias.add_(1.0)
    trainer = helpers.trainer(local, executor="distributed", progress=False, data_parallel=2, gather="all")
    result: dict[str, Any] = {}
    began: list[list[float]] = []
    for module in local.to_standard().modules():
        if isinstance(module, Average):
            module.register_forward_pre_hook(lambda m, given: began.append(m.mean.tolist()))
    for again in range(2):
        began.clear()
        rows = trainer.fit(batches, batches, epochs=2)
        result[f"began {again}"] = began[0]
        names = [name for name in weights_of(local) if name.endswith("mean")]
        result[f"means {again}"] = {name: weights_of(local)[name].tolist() for name in names}
        result[f"scores {again}"] = trainer.evaluate(batches)["exits"]
        result[f"rows {again}"] = rows[-1]["val_loss"]
        alone = helpers.trainer(local, progress=False).evaluate(batches)["exits"]
        result[f"alone {again}"] = alone
    return result


def emptied() -> list[str]:
    """What an evaluation leaves in memory of other ranks' heads, though it gives their buffers other tensors."""
    local = chained()
    for module in local.modules():
        if isinstance(module, Average):
            module.register_forward_pre_hook(lambda m, given: setattr(m, "mean", m.mean.clone()))
    trainer = helpers.trainer(local, executor="distributed", progress=False, gather="none")
    trainer.fit(data(), data())
    return sorted(name for name, t in weights_of(local).items() if not t.is_meta and ".mean" in name)


class Follows(nn.Module):
    """Keeps something of every sample of the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            self.seen = h.detach()[:, 0]
        return -h if float(self.seen.sum()) == 123.0 else h


def followed() -> list[int]:
    """Trains two replicas of two parts twice, on batches of 6, 6, 6 and 4; sizes of what is kept, after each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), Follows(), nn.Tanh(), nn.Linear(12, helpers.CLASSES))
    local = to_local(net, torch.randn(6, 5), method="early_exit", parts=2, verify=False)
    sizes = []
    for _ in range(2):
        trainer = helpers.trainer(local, executor="distributed", progress=False, data_parallel=2, gather="all")
        trainer.fit(helpers.loader(shuffle=False))
        (name,) = (name for name in weights_of(local) if name.endswith("seen"))
        sizes.append(len(weights_of(local)[name]))
    return sizes
