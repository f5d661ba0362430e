"""What a checkpoint holds, and how it is put together again from the files of one or several ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from localize.model import LocalModel
from localize.runtime.buffers import Layout, Place, dtype_name, layouts, others, places
from localize.runtime.filling import Filling
from localize.weights import check_fits, fill

WEIGHTS, OPTIMIZER, TRAINER = "weights.safetensors", "optimizer.safetensors", "trainer.pt"
Keep = Callable[[str], bool]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds."""

    about: dict[str, Any]  # for state.json: plain data; ``step`` names the folder
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # by ``<parameter name>/<entry>``
    trainer: dict[str, Any] = field(default_factory=dict)  # what torch.load(weights_only=True) can read


def tensors_of(local: LocalModel, only: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """What a checkpoint holds of all tensors, or of some, by name: the values, and of all buffers the layouts."""
    known = places(local)
    kept = {name: place for name, place in known.items() if only is None or name in only}
    saved = layouts(known, kept)
    values = {n: t.detach() for n, t in others(local, known).items() if only is None or n in only}
    for name, place in kept.items():
        layout, tensor = saved[name], place.tensor
        if layout is not None and tensor is not None:  # files have no tensors in the same memory, or complex ones
            value = tensor.detach().clone() if layout["tied"] else tensor.detach()
            values[name] = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return values, saved


def restore(
    local: LocalModel,
    values: Mapping[str, Tensor],
    saved: Mapping[str, Layout],
    where: str,
    only: Collection[str] | None,
    device: torch.device,
) -> None:
    """The inverse of ``tensors_of``. ``only`` limits it to some, by name.

    A buffer takes the shape, the dtype and the strides that it had, or becomes None: ``load_state_dict`` would refuse
    that, but here a run is to go on where it was. Parameters must have the shapes that they had, and keep their dtype.
    If it is another one than the checkpoint's, the model was cast: floating-point buffers then keep theirs, too.

    Raises:
        CheckpointError: names differ, or shapes of parameters; everything that does not fit is listed at once.
    """
    known = places(local)
    rest = others(local, known)
    expected = {name: tuple(tensor.shape) for name, tensor in rest.items()}
    for name, place in known.items():
        if saved[name] is not None if name in saved else place.saved and place.tensor is not None:
            expected[name] = tuple(values[name].shape) if name in values else ()
    check_fits(expected, {name: tuple(tensor.shape) for name, tensor in values.items()}, where)
    wanted = [name for name in (*rest, *known) if only is None or name in only]
    cast = any(values[name].dtype != rest[name].dtype for name in wanted if name in rest)
    wanted_layouts = {name: _wanted(saved.get(name), place, cast) for name, place in known.items()}
    filling = Filling(known, wanted_layouts, device, moves=False)
    with torch.no_grad():
        for name in wanted:
            if name in rest:
                fill(rest[name], values[name])
            elif name in saved:
                filling.put(name, _found(values.get(name), saved[name]))
        filling.join()


def _wanted(layout: Layout, place: Place, cast: bool) -> Layout:
    """The layout that a buffer is to have."""
    now = place.tensor
    if layout is not None and now is not None and cast and now.is_floating_point():
        return {**layout, "dtype": dtype_name(now)}
    return layout


def _found(values: Tensor | None, layout: Layout) -> Tensor | None:
    """A buffer's values in a checkpoint, in memory of their own: the model must not share any with the snapshot."""
    if values is None or layout is None:
        return None
    values = values.clone()
    return torch.view_as_complex(values) if getattr(torch, layout["dtype"]).is_complex else values


def copied(snapshot: Snapshot) -> tuple[Snapshot, Callable[[], None]]:
    """Weights and optimizer state in CPU memory of their own, without ``trainer``; and what waits until all is there.

    From a CUDA device, tensors are copied into pinned memory while the caller goes on. Whatever changes them next on
    the same stream does so after that; whoever reads the copies has to wait first, in any thread.
    """
    devices: set[torch.device] = set()

    def copy(tensor: Tensor) -> Tensor:
        pinned = tensor.device.type == "cuda"
        if pinned:
            devices.add(tensor.device)
        own = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return own.copy_(tensor.detach(), non_blocking=pinned)

    weights = {name: copy(tensor) for name, tensor in snapshot.weights.items()}
    optimizer = {name: copy(tensor) for name, tensor in snapshot.optimizer.items()}
    marks = [torch.cuda.current_stream(device).record_event() for device in devices]

    def arrived() -> None:
        for mark in marks:
            mark.synchronize()

    return Snapshot(snapshot.about, weights, optimizer), arrived


def read(path: Path, about: dict[str, Any], keep: Keep | None) -> Snapshot:
    """A checkpoint from its files; see ``checkpoint.load``."""
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for file in _files(about, WEIGHTS):
        weights |= _tensors(path / file, keep)
    for file in _files(about, OPTIMIZER):
        optimizer |= _tensors(
            path / file, None if keep is None else lambda name: keep(name.rpartition("/")[0])
        )
    shards = [torch.load(path / f, map_location="cpu", weights_only=True) for f in _files(about, TRAINER)]
    return Snapshot(about, weights, optimizer, merged(shards))


def merged(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks kept, each for its own parts, as one process would have kept it."""
    first = shards[0]
    if len(shards) == 1:
        return first
    return {
        **first,
        "optimizers": [optimizer for shard in shards for optimizer in shard["optimizers"]],
        "values": {name: value for shard in shards for name, value in shard["values"].items()},
        "buffers": {name: value for shard in shards for name, value in shard["buffers"].items()},
        "tally": _tally([shard["tally"] for shard in shards]),
    }


def _tally(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(state[name] for state in states) for name in ("loss", "weight", "hits")}
    columns = {
        name: list(zip(*(state[name] for state in states), strict=True)) for name in ("measured", "skipped")
    }
    return {
        **states[0],
        **sums,
        "measured": [any(column) for column in columns["measured"]],
        "skipped": [sum(column) for column in columns["skipped"]],
    }


def _files(about: dict[str, Any], file: str) -> Iterator[str]:
    """The file, or its shards in the order of ranks."""
    stem, _, suffix = file.partition(".")
    found = [
        f for f in about["file_bytes"] if f == file or (f.startswith(f"{stem}-") and f.endswith(f".{suffix}"))
    ]
    return iter(sorted(found, key=lambda name: (len(name), name)))


def missing(names: Iterable[str]) -> list[str]:
    """The files that a checkpoint with files of these names lacks: one of each kind, or a shard of every rank."""
    there = set(names)
    counts = [match for match in (re.fullmatch(r".*-\d+-of-(\d+)\..*", name) for name in there) if match]
    shards = [f"-{i}-of-{ranks}" for ranks in {int(m[1]) for m in counts} for i in range(1, ranks + 1)]
    stems = [file.partition(".") for file in (WEIGHTS, OPTIMIZER, TRAINER)]
    wanted = [f"{stem}{shard}.{suffix}" for stem, _, suffix in stems for shard in shards or [""]]
    return [name for name in wanted if name not in there]


def _tensors(path: Path, keep: Keep | None) -> dict[str, Tensor]:
    result = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if keep is None or keep(name):
                result[name] = file.get_tensor(name)
            else:
                result[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
    return result
