"""Tensors with a shape and no memory, on the meta device, and models that are built of them."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from localize.signature import tensors_of

_PLAIN = (Tensor, nn.Parameter)
# What torch says, beside NotImplementedError, where an operation needs values, or meets tensors that have some.
_NO_VALUES = re.compile(
    r"Tensor\.item\(\) cannot be called on meta tensors"
    r"|cannot repeat_interleave a meta tensor without output_size"
    r"|can't convert meta device type tensor to numpy"
    r"|'lengths' argument should be a 1D CPU int64 tensor, but got 1D meta Long tensor"
    r"|Tensor on device (meta is not on the expected device \w+(:\d+)?|\w+(:\d+)? is not on the expected device meta)!"
    r"|Input and (parameter|hidden) tensors are not at the same device, found .*\bmeta\b"
    r"|Expected all tensors to be on the same device, but .*\bmeta\b"
)


def replace_by(tensor: Tensor, values: Tensor) -> None:
    """Makes ``tensor``, the object that everybody holds, one with the memory of ``values``.

    Raises:
        RuntimeError: somebody holds a weak reference to it, or a graph that leads to it.
    """
    tensor.grad = None
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, requires_grad=tensor.requires_grad)
    attributes = dict(tensor.__dict__)  # an optimizer's marks, say
    try:
        torch.utils.swap_tensors(tensor, values)
    except RuntimeError:
        gc.collect()  # a dry run's notes may be waiting for it
        torch.utils.swap_tensors(tensor, values)
    tensor.__dict__.update(attributes)


def lacks_values(error: Exception) -> bool:
    """Whether a computation on the meta device failed for want of values, and may be right with them."""
    return isinstance(error, NotImplementedError) or _NO_VALUES.match(str(error)) is not None


def empty_out(tensor: Tensor) -> None:
    """Takes a tensor's memory away, and its values with it.

    Raises:
        RuntimeError: as ``replace_by``.
    """
    if not tensor.is_meta:
        replace_by(tensor, torch.empty_like(tensor, device="meta"))


@contextmanager
def unwatched(*roots: nn.Module) -> Iterator[None]:
    """While it lasts, layers below ``roots`` hold no weak references to their tensors, as torch's recurrent ones do."""
    layers = [m for root in roots for m in root.modules() if isinstance(m, nn.RNNBase)]
    for layer in layers:
        layer._flat_weight_refs = []
    try:
        yield
    finally:
        for layer in layers:
            layer._flat_weight_refs = [None if w is None else weakref.ref(w) for w in layer._flat_weights]


@contextmanager
def without_values(tensors: Iterable[Tensor], *roots: nn.Module) -> Iterator[None]:
    """While it lasts, these tensors, of modules below ``roots``, are on the meta device; then they are as before."""
    real = [tensor for tensor in tensors if not tensor.is_meta]
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with unwatched(*roots):
            for tensor in real:
                values = tensor.detach()
                empty_out(tensor)
                kept.append((tensor, values))
        yield
    finally:
        with unwatched(*roots):
            for tensor, values in kept:
                replace_by(tensor, values)


class HollowBuild:
    """While it lasts, a parameter loses its memory as soon as a module registers it; buffers are computed.

        with HollowBuild() as build:
            model = Net()
        build.doubts(model)

    Whatever writes into such a parameter does nothing; whatever needs its values raises.
    """

    def __init__(self) -> None:
        self._emptied: list[Tensor] = []
        self._draws = _Draws()
        self._register: Callable[..., None] = nn.Module.register_parameter

    def __enter__(self) -> HollowBuild:
        original = self._register = nn.Module.register_parameter
        emptied = self._emptied

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            original(module, name, param)
            if type(param) is nn.Parameter and not param.is_meta:
                try:
                    empty_out(param)
                except RuntimeError:  # it stays in memory
                    return
                emptied.append(param)

        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment, unused-ignore]
        self._draws.__enter__()  # type: ignore[no-untyped-call, unused-ignore]
        return self

    def __exit__(self, *error: Any) -> None:
        self._draws.__exit__(*error)  # type: ignore[no-untyped-call, unused-ignore]
        nn.Module.register_parameter = self._register  # type: ignore[method-assign, unused-ignore]

    def doubts(self, model: nn.Module) -> str | None:
        """Why ``model``, given the values of its ``state_dict``, may not be what a normal build makes; or None."""
        saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
        tensors = dict(_kept_by(model))
        lost = [name for name, tensor in tensors.items() if id(tensor) not in saved and tensor.is_meta]
        if lost:
            return f"{lost[0]} is made from parameters"
        if any(type(tensor) not in _PLAIN for tensor in tensors.values()):
            return "it has tensors of a class of their own"
        if self._others_emptied({id(tensor) for tensor in tensors.values()}):
            return "its code keeps parameters outside of it"
        if self._draws.seen():
            return "its code draws random numbers for something else than parameters"
        return None

    def _others_emptied(self, own: set[int]) -> bool:
        """Whether parameters that lost their memory live on elsewhere: in a second model, say."""
        others = [weakref.ref(parameter) for parameter in self._emptied if id(parameter) not in own]
        self._emptied.clear()
        if others:
            gc.collect()
        return any(other() is not None for other in others)


class _Draws(TorchDispatchMode):
    """Follows random numbers: a build that leaves out some draws gets other ones afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._random: dict[int, StorageWeakRef] = {}
        self._read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [tensor for tensor in tensors_of((args, kwargs)) if not tensor.is_meta]
        if torch.Tag.nondeterministic_seeded in func.tags or any(map(self._is_random, given)):
            self._read |= not isinstance(result, Tensor | tuple | list)  # a number, to Python
            written = [tensor for tensor in given if func._schema.is_mutable]
            for tensor in (*tensors_of(result), *written):
                if not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    self._random[storage._cdata] = StorageWeakRef(storage)
        return result

    def _is_random(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._random

    def seen(self) -> bool:
        """Whether a random tensor is still there, or one was read by Python."""
        return self._read or any(not storage.expired() for storage in self._random.values())


def _kept_by(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain attributes of all modules, by name."""
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    yield (f"{path}.{name}" if path else name), value
