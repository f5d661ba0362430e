"""What the ranks of ``test_buffers_odd.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from localize import LocalModel, to_local
from localize.runtime import checkpoint
from localize.runtime.causes import Stopped
from localize.weights import roots
from tests import zoo
from tests.runtime import helpers
from tests.runtime.cases import METHODS, rank
from tests.runtime.odd import WIDTH, Chained, Net, Odd, Twice, Writes

torch.set_num_threads(1)


def made(kind: str, method: str) -> LocalModel:
    """A model with something odd in each of four parts; the same wherever it is made."""
    torch.manual_seed(0)
    net = Net(kind)
    rule = Chained(kind) if method == "chained" else METHODS[method]
    local = to_local(net, inputs(8), method=rule, parts=4, verify=False)
    shared = torch.linspace(-1, 1, WIDTH)
    for odd in (module for _, root in roots(local) for module in root.modules() if isinstance(module, Odd)):
        odd.begin(shared)
    return local


def inputs(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def data(bad: int | None = None) -> DataLoader[Any]:
    """Seven batches; the one at ``bad`` is not finite."""
    given = inputs(52)
    if bad is not None:
        given[8 * bad] = math.nan
    targets = torch.randint(0, zoo.CLASSES, (52,), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(given, targets), batch_size=8)


# ------------------------------------------------------------------ what there is


def buffers(local: LocalModel) -> Iterator[tuple[str, Tensor | None]]:
    """All buffers by name, those too that no ``state_dict`` has, and those that are None."""
    for prefix, root in roots(local):
        for path, module in root.named_modules(prefix=prefix):
            for name, buffer in module._buffers.items():
                yield (f"{path}.{name}" if path else name), buffer


def look(local: LocalModel) -> dict[str, Any]:
    """Everything that a model is made of, to the last bit, and which buffers are in the same memory."""
    found: dict[str, Any] = {}
    memory: dict[int, list[str]] = {}
    for name, parameter in (*local.to_standard().named_parameters(), *local.grafts.named_parameters("grafts")):
        found[name] = digest(parameter)
    for name, buffer in buffers(local):
        found[name] = None if buffer is None else digest(buffer)
        if buffer is not None and not buffer.is_meta:
            memory.setdefault(buffer.untyped_storage()._cdata, []).append(name)
    found["same memory"] = sorted(names for names in memory.values() if len(names) > 1)
    return found


def digest(tensor: Tensor) -> list[Any]:
    if tensor.is_meta:
        return ["on the meta device"]
    plain = tensor.detach().contiguous().reshape(-1)
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    bits = hashlib.sha256(bytes(plain.reshape(-1).view(torch.uint8).numpy())).hexdigest()
    return [str(tensor.dtype), list(tensor.shape), list(tensor.stride()), bits]


def behave(local: LocalModel) -> dict[str, Any]:
    """What a model computes, in evaluation and in training, and what it is made of afterwards."""
    found: dict[str, Any] = {"before": look(local)}
    for mode in (False, True):
        local.train(mode)
        for who, module in (("local", local), ("standard", local.to_standard())):
            torch.manual_seed(5)
            found[f"{who} {mode}"] = digest(module(inputs(8)))
    return found | {"after": look(local)}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [d for k in {**one, **other} for d in differences(one.get(k), other.get(k), f"{where}/{k}")]
    return [] if one == other else [f"{where}: {one} and {other}"]


# ------------------------------------------------------------------ training


def trained(kind: str, method: str, gather: str, folder: str, bad: int | None = None) -> list[str]:
    """Trains on all ranks twice, and then in one process; what is not the same here, where weights are gathered."""
    found: list[dict[str, Any]] = []
    for executor in ("distributed", "sequential"):
        local = made(kind, method)
        path = Path(folder) / (executor if executor == "distributed" else f"{executor}-{rank()}")
        options: dict[str, Any] = {"on_nonfinite": "raise" if bad is None else "skip", "progress": False}
        options |= {"executor": executor, "gather": gather}
        helpers.trainer(local, **options).fit(data(), epochs=1)
        between = look(local) if gather == "all" else {}
        trainer = helpers.trainer(local, path, **options)
        scores = [trainer.evaluate(data())]
        rows = helpers.timeless(trainer.fit(data(bad), data(), epochs=2))
        scores.append(trainer.evaluate(data()))
        here = gather == "all" or rank() == 0
        found.append({"scores": scores, "rows": rows, "between": between, "model": behave(local) if here else {}})
        if executor == "distributed" and not here:
            found.append({**found[0]})
            break
        if rank() == 0:
            found[-1]["checkpoint"] = saved(path)
    return differences(*found)


def saved(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds."""
    snapshot = checkpoint.load(folder)
    assert snapshot is not None
    held = {**snapshot.weights, **snapshot.optimizer}
    return {name: digest(tensor) for name, tensor in held.items()} | {"about": snapshot.about["step"]}


def runs(kind: str, method: str, executor: str, folder: str, every: int, stop: int | None = None) -> Any:
    """Trains two epochs, or goes on to do so, with checkpoints; ``stop`` is a step at which all is given up.

    What there is at the end, on the first rank.
    """
    local, path = made(kind, method), Path(folder)

    def stopping(step: int, reports: object) -> None:
        if step == stop:
            raise helpers.Interruption

    trainer = helpers.trainer(
        local, path, executor=executor, progress=False, on_step=stopping, checkpoint_every=every
    )
    try:
        rows = trainer.fit(data(), data(), epochs=2, resume=checkpoint.any_in(path))
    except (helpers.Interruption, Stopped):
        return None
    if rank() > 0:
        return None
    return {"rows": helpers.timeless(rows), "model": behave(local), "checkpoint": saved(path)}


def written_elsewhere(kind: str) -> dict[str, str] | None:
    """What is said where two ranks use one buffer and change it."""
    torch.manual_seed(0)
    if kind == "module":
        net: nn.Module = Twice()
    else:
        shared = torch.zeros(WIDTH)
        net = nn.Sequential(
            nn.Linear(6, WIDTH), Writes(shared), nn.Tanh(), nn.Linear(WIDTH, WIDTH), Writes(shared), nn.Tanh(),
            nn.Linear(WIDTH, zoo.CLASSES),
        )  # fmt: skip
    local = to_local(net, inputs(8), method="early_exit", parts=2, verify=False)
    try:
        helpers.trainer(local, executor="distributed", progress=False).fit(data())
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return None

