"""What the ranks of ``test_materialise.py`` do: models that begin on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import localize
from localize import LocalModel, to_local
from localize.runtime import checkpoint
from localize.signature import tensors_of
from localize.weights import named_tensors, weights_of
from tests.runtime import helpers
from tests.runtime.cases import METHODS, Untouchable, names_in, numbers_of, rank

# In the forked process, before it has threads: torch makes its pool of threads anew there, and two at once abort.
torch.set_num_threads(1)

WIDTH, CLASSES, LAYERS = 16, 4, 36
SOURCE = "tests.runtime.cases_materialise:"


class Block(nn.Module):
    """A layer with statistics, dropout and a table that no file has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.register_buffer("table", torch.arange(1, 2).float().sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.linear(x)))) + 0.1 * self.table


class Bare(nn.Module):
    """Parameters of its own, which its ``reset_parameters`` sets; it is entered, and its tensors go to two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.shift)
        nn.init.trunc_normal_(self.scale, 1.0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.middle(x * self.scale)) + self.shift


class Plain(nn.Module):
    """Nothing that only ``__init__`` can make; a parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bare, self.attention = nn.Linear(WIDTH, WIDTH), Bare(), nn.MultiheadAttention(WIDTH, 2)
        self.norm, self.lower, self.upper = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.upper.weight = self.lower.weight
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.bare(torch.tanh(self.first(x))))
        x = x + self.attention(x[None], x[None], x[None], need_weights=False)[0][0]
        return self.last(self.drop(self.upper(torch.relu(self.lower(x)))))


class Tower(nn.Sequential):
    """Layers of one size: none is much of a part."""

    def __init__(self) -> None:
        super().__init__(*(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, CLASSES))


class Sequence(nn.Module):
    """A recurrent layer, which holds weak references to its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTM(4, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.upper(self.lower(x.unflatten(1, (4, 4)))[0])[0][:, -1])


MODELS: dict[str, type[nn.Module]] = {"Plain": Plain, "Tower": Tower, "Sequence": Sequence}


def data(shuffle: bool = True) -> DataLoader[Any]:
    """Four batches an epoch, the last one ragged."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES, (28,), generator=generator)
    samples = TensorDataset(torch.randn(28, WIDTH, generator=generator), targets)
    return DataLoader(samples, batch_size=8, shuffle=shuffle)


def saved(folder: Path, model: str, method: str, parts: int) -> LocalModel:
    """An artefact of real weights; its statistics have moved, too."""
    torch.manual_seed(0)
    local = to_local(MODELS[model](), torch.randn(4, WIDTH), method=METHODS[method], parts=parts)
    local.source = f"{SOURCE}{model}"
    helpers.trainer(local, seed=9, progress=False).fit(data())
    local.save(folder)
    return local


def began(origin: str, model: str, method: str, parts: int, folder: Path) -> LocalModel:
    """On the meta device: from an artefact, or with nothing to go by but a seed. ``real``: the artefact, as always."""
    if origin == "seed":
        with torch.device("meta"):
            hollow = MODELS[model]()
        return to_local(hollow, torch.randn(4, WIDTH), method=METHODS[method], parts=parts)
    return localize.load(folder, device="meta" if origin == "file" else None)


def same_as_sequential(
    origin: str, model: str, method: str, parts: int, folder: str, **options: Any
) -> list[dict[str, Any]]:
    """Trains on all ranks, and then in one process, and with real weights; everything is equal to the last bit."""
    root, artefact = Path(folder), Path(folder) / "artefact"
    local = began(origin, model, method, parts, artefact)
    assert all(tensor.is_meta for tensor in local.parameters())
    train, val = (Untouchable() if rank() else data(shuffle) for shuffle in (True, False))
    trainer = helpers.trainer(local, root / "many", executor="distributed", progress=False, **options)
    before = trainer.evaluate(val)
    rows = helpers.timeless(trainer.fit(train, val, epochs=2))
    rows.append(trainer.evaluate(val))
    if rank() > 0:
        return rows
    many = checkpoint.load(root / "many")
    for other in (origin, "real") if origin == "file" else (origin,):
        one = began(other, model, method, parts, artefact)
        alone = helpers.trainer(one, root / f"one-{other}", progress=False)
        assert alone.evaluate(data(shuffle=False)) == before
        assert helpers.timeless(alone.fit(data(), data(shuffle=False), epochs=2)) == rows[:-1]
        assert alone.evaluate(data(shuffle=False)) == rows[-1]
        single = checkpoint.load(root / f"one-{other}")
        assert many is not None and single is not None
        helpers.assert_same(many.weights, single.weights)
        helpers.assert_same(many.optimizer, single.optimizer)
        helpers.assert_same(weights_of(local), weights_of(one))
    local.save(root / "after")
    helpers.assert_same(weights_of(localize.load(root / "after", MODELS[model]())), weights_of(local))
    return rows


def resumed(origin: str, folder: str, several: bool) -> dict[str, float] | None:
    """Three epochs, or as many as are missing, from what is in the folder; a sum of all weights."""
    local = began(origin, "Plain", "lct", 4, Path(folder) / "artefact")
    executor = "distributed" if several else "sequential"
    trainer = helpers.trainer(local, Path(folder) / "run", executor=executor, progress=False)
    done = checkpoint.any_in(Path(folder) / "run")
    trainer.fit(data(), epochs=3 if done else 1, resume=done)
    if rank() > 0:
        return None
    return {name: float(tensor.double().sum()) for name, tensor in weights_of(local).items()}


def held(origin: str, gather: str, folder: str) -> dict[str, Any]:
    """Which tensors have memory, by name, and what is said of a second run by one process."""
    local = began(origin, "Plain", "al", 4, Path(folder) / "artefact")

    def real() -> list[str]:
        return [name for name, tensor in named_tensors(local).items() if not tensor.is_meta]

    found: dict[str, Any] = {"at first": real()}
    during: list[list[str]] = []
    options: dict[str, Any] = {"gather": gather, "on_step": lambda step, reports: during.append(real())}
    helpers.trainer(local, executor="distributed", progress=False, **options).fit(data())
    found |= {"during": during[0], "after": real(), "all": list(named_tensors(local))}
    found["own"] = [n for i in numbers_of(local) for n in names_in(local, i) if n in named_tensors(local)]
    for what, action in (("alone", lambda: helpers.trainer(local)), ("save", lambda: local.save(f"{folder}/{rank()}"))):
        try:
            action()
        except localize.LocalizeError as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors with memory, each storage once, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of((args, kwargs, result)):
            if not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._storages.values()))
        return result


def start(origin: str, parts: int, folder: str) -> dict[str, int]:
    """The most bytes that are in memory at once until the first batch can come; ``own``: those of this rank's parts."""
    with Live() as live:
        if origin == "seed":
            cuts = [str(3 * LAYERS * part // parts - 1) for part in range(1, parts)]  # choosing them takes memory
            with torch.device("meta"):
                layers = [(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(LAYERS)]
                model = nn.Sequential(*(m for each in layers for m in each), nn.Linear(WIDTH, CLASSES))
            local = to_local(model, torch.randn(4, WIDTH), method="early_exit", cuts=cuts)
        else:
            local = began(origin, "Tower", "early_exit", parts, Path(folder) / "artefact")
        trainer = helpers.trainer(local, executor="distributed", progress=False)
        with trainer._crew() as crew:
            crew.run(resume=False)
    tensors = named_tensors(local)
    own = sum(tensors[n].nbytes for i in numbers_of(local) for n in names_in(local, i) if n in tensors)
    return {"peak": live.peak_bytes, "own": own, "whole": sum(tensor.nbytes for tensor in tensors.values())}


class Scaled(nn.Module):
    """A parameter that no ``reset_parameters`` sets, in the first part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x * self.scale)))


def unset() -> str:
    """What each rank says where one of them has a tensor that nothing sets."""
    with torch.device("meta"):
        model = Scaled()
    local = to_local(model, torch.randn(4, WIDTH), method="early_exit", parts=2)
    try:
        helpers.trainer(local, executor="distributed", progress=False).fit(data())
    except localize.LocalizeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
