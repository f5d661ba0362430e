"""Gives tensors on the meta device memory and values: those that are wanted here, and no others.

    the artefact's file    where the model was loaded with ``localize.load(folder, device="meta")``: read one by one
    reset_parameters()     everything else: of each module with tensors, on random numbers of its own

What a tensor gets depends on the seed and on the paths of modules, not on what else is wanted: so several processes,
each with some of the parts, begin with the very bits that one process begins with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from localize.errors import CheckpointError, PlacementError, problem_list
from localize.hollow import empty_out, replace_by, unwatched
from localize.model import LocalModel
from localize.runtime import seeding
from localize.signature import tensors_of
from localize.stored import opened, postponed
from localize.weights import named_tensors, roots

_log = logging.getLogger(__name__)
_INITIALISERS = ("reset_parameters", "_reset_parameters")
_UNUSED = ("_init_weights", "init_weights", "initialize_weights")  # what they take and reset, nobody has agreed on
_INITIALISATION = -1  # beside the numbers of parts, which other streams of random numbers are derived from


def materialise(local: LocalModel, seed: int, wanted: Callable[[Tensor], bool] = lambda tensor: True) -> None:
    """Gives tensors on the meta device their values, on the CPU, as far as they are ``wanted``.

    Raises:
        PlacementError: some of the model's tensors have no values, and nothing that sets them; all are named. Or
            some that are wanted were trained by other ranks.
        CheckpointError: the artefact's weights are gone, or other ones by now.
    """
    tensors = _by_name(local)
    gone = _given_away(local)
    pending = {name: tensor for name, tensor in tensors.items() if tensor.is_meta and name not in gone}
    lost = [name for name in gone if name in tensors and tensors[name].is_meta and wanted(tensors[name])]
    if lost:
        raise PlacementError(
            f"The values of {', '.join(lost[:3])}{f' and {len(lost) - 3} more' if len(lost) > 3 else ''} are on other "
            "ranks, which trained them: fit with gather='all', or go on with the ranks and parts that there were."
        )
    if not any(map(wanted, pending.values())):
        return
    file = postponed(local)
    unsaved = {name: tensor for name, tensor in pending.items() if name not in _names_in(file)}
    with torch.no_grad(), unwatched(local.to_standard(), local), seeding.Seeded([torch.default_generator], seed):
        units = _units(local, unsaved)
        _check(local, units, unsaved)
        if file is not None:
            _read(file, {name: t for name, t in pending.items() if name not in unsaved and wanted(t)})
        for unit in units:
            unit.materialise(seed, wanted)
    _log.debug("%d of %d tensors got values, %d of them from a file", *_counts(pending, unsaved))


def give_away(local: LocalModel, names: Iterable[str]) -> None:
    """Notes that other ranks train these tensors: what they are here will not be their value."""
    local.__dict__["_given_away"] = _given_away(local) | set(names)


def _given_away(local: LocalModel) -> set[str]:
    given: set[str] = local.__dict__.get("_given_away", set())
    return given


def _counts(pending: Mapping[str, Tensor], unsaved: Mapping[str, Tensor]) -> tuple[int, int, int]:
    real = {name for name, tensor in pending.items() if not tensor.is_meta}
    return len(real), len(pending), len(real - unsaved.keys())


def _by_name(local: LocalModel) -> dict[str, Tensor]:
    """All tensors: those of a ``state_dict``, and those that none holds, as the parts' own."""
    tensors = named_tensors(local)
    known = set(map(id, tensors.values()))
    parts: list[tuple[str, nn.Module]] = [(f"parts.{number}", part) for number, part in enumerate(local.parts, 1)]
    for prefix, root in roots(local) + parts:
        for name, tensor in (*root.named_parameters(prefix), *root.named_buffers(prefix)):
            if id(tensor) not in known:
                known.add(id(tensor))
                tensors[name] = tensor
    return tensors


# -------------------------------------------------------------------- from a file


def _names_in(path: Path | None) -> Collection[str]:
    if path is None:
        return ()
    with opened(path) as file:
        return frozenset(file.keys())


def _read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with opened(path) as file:
        for name, tensor in tensors.items():
            values = file.get_tensor(name)
            if values.shape != tensor.shape:
                raise CheckpointError(
                    f"{path} has {name} with shape {tuple(values.shape)}, and the model was loaded when it had "
                    f"{tuple(tensor.shape)}; load it again."
                )
            replace_by(tensor, torch.empty_like(tensor, device="cpu").copy_(values))


# -------------------------------------------------------------------- from the modules themselves


@dataclass(frozen=True)
class _Unit:
    """A module with an initialiser, and those inside of it: set as a whole, for one may set what is in another.

    Attributes:
        path: of the outermost one.
        resets: initialisers by path, those of inner modules first.
        tensors: those that are to be set.
        foreign: others in the same modules, which keep their values.
    """

    path: str
    resets: Mapping[str, Callable[[], object]]
    tensors: tuple[Tensor, ...]
    foreign: tuple[Tensor, ...]

    def materialise(self, seed: int, wanted: Callable[[Tensor], bool]) -> None:
        """Leaves those of the tensors that are ``wanted`` with memory and values."""
        if any(map(wanted, self.tensors)):
            self._allocate()
            self._run(seed)
            self._drop(tensor for tensor in self.tensors if not wanted(tensor))

    def unset(self) -> list[Tensor]:
        """The tensors that no initialiser writes to.

        Raises:
            Exception: what an initialiser raises.
        """
        try:
            unset = self._unwritten(self._run(0))  # without memory
        except Exception:
            unset = list(self.tensors)
        if unset:  # some do nothing where there is no memory, and others read what is there
            self._allocate()
            try:
                unset = self._unwritten(self._run(0))
            finally:
                self._drop(self.tensors)
        return unset

    def _allocate(self) -> None:
        for tensor in self.tensors:
            if tensor.is_meta:
                replace_by(tensor, torch.empty_like(tensor, device="cpu"))

    def _drop(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            empty_out(tensor)

    def _run(self, seed: int) -> set[int]:
        """Runs the initialisers, each on random numbers of its own; the storages that were written to."""
        kept = [(tensor, tensor.clone()) for tensor in self.foreign]
        writes = _Writes()
        with writes:
            for path, reset in self.resets.items():
                torch.default_generator.manual_seed(seeding.derive(seed, _INITIALISATION, *path.encode()))
                reset()
        for tensor, values in kept:
            tensor.copy_(values)
        return writes.storages

    def _unwritten(self, written: set[int]) -> list[Tensor]:
        return [t for t in self.tensors if t.numel() and t.untyped_storage()._cdata not in written]


class _Writes(TorchDispatchMode):
    """Notes the storages that are written to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                self.storages |= {tensor.untyped_storage()._cdata for tensor in tensors_of(value)}
        return func(*args, **kwargs)


def _units(local: LocalModel, tensors: Mapping[str, Tensor]) -> list[_Unit]:
    """The outermost modules that have an initialiser and, directly in them, some of ``tensors``."""
    pending = set(map(id, tensors.values()))
    units: list[_Unit] = []
    inside: set[int] = set()
    for prefix, root in roots(local) if tensors else ():
        for path, module in root.named_modules(prefix=prefix):
            if id(module) in inside or not _resets(path, module, pending, recurse=False):
                continue
            inside.update(map(id, module.modules()))
            below = [*module.parameters(), *module.buffers()]
            unset = tuple(tensor for tensor in below if id(tensor) in pending)
            foreign = tuple(tensor for tensor in below if id(tensor) not in pending)
            units.append(_Unit(path, _resets(path, module, pending), unset, foreign))
    return units


def _resets(path: str, module: nn.Module, pending: Collection[int], recurse: bool = True) -> dict[str, Any]:
    """Initialisers by path, of modules that have tensors in ``pending`` directly in them; innermost first."""
    found = {}
    for name, inner in reversed(list(module.named_modules(prefix=path))) if recurse else [(path, module)]:
        reset = next((r for r in (getattr(inner, n, None) for n in _INITIALISERS) if callable(r)), None)
        own = (*inner.parameters(recurse=False), *inner.buffers(recurse=False))
        if reset is not None and any(id(tensor) in pending for tensor in own):
            found[name] = reset
    return found


def _check(local: LocalModel, units: Iterable[_Unit], tensors: Mapping[str, Tensor]) -> None:
    """Tries the initialisers, one module at a time: what none of them writes to would be left as it happens to be.

    Raises:
        PlacementError: names all such tensors, and all initialisers that fail.
    """
    unset = set(map(id, tensors.values()))
    failed = []
    for unit in units:
        unset.difference_update(map(id, unit.tensors))
        try:
            unset.update(map(id, unit.unset()))
        except Exception as error:
            failed.append(f"{unit.path or 'the model'}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    problems = [f"{name}: no reset_parameters() writes to it" for name, t in tensors.items() if id(t) in unset]
    problems += [f"reset_parameters() of {problem}" for problem in failed]
    if problems:
        advice = (
            "Save an artefact of the model with real weights (`localize convert`, or local.save) and load that with "
            "localize.load(folder, device='meta'), or put real tensors in these places before you convert it."
        )
        title = "Tensors on the meta device cannot be given values"
        raise PlacementError(f"{problem_list(title, problems)}\n{advice}")
    own_ways = [n for n in _UNUSED if callable(getattr(local.to_standard(), n, None))] if tensors else []
    if own_ways:
        _log.warning(
            "Weights on the meta device are set by the reset_parameters() of each layer; the model's own %s is not "
            "called. Save an artefact of a model that was built with real weights where that matters.", own_ways[0]
        )  # fmt: skip
