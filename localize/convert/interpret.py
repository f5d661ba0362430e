"""Interpreters of a captured graph: what each notes down while the graph runs node by node."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from localize.convert.flops import FlopCounter
from localize.convert.traced import TracedModel
from localize.convert.values import check_value
from localize.signature import tensors_of

# Their output has the shape and type of their input. Most are slow on fake tensors, so that the run that only
# asks for shapes passes them over.
_KEEP_SHAPE = frozenset(
    {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d}
    | {nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Dropout}
)

Shapes = list[tuple[tuple[int, ...], torch.dtype]]


class Run(fx.Interpreter):
    """Runs a graph over the original modules, without generating code for it.

    ``constants`` take the place of the tensors among ``traced.extras``, by target.
    """

    def __init__(self, traced: TracedModel, training: bool, constants: Mapping[str, Tensor]) -> None:
        super().__init__(traced.root, graph=traced.graph(training))
        self._traced = traced
        self._constants = constants

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if target is check_value else super().call_function(target, args, kwargs)  # there may be no data

    def fetch_attr(self, target: str) -> Any:
        return self._constants[target] if target in self._constants else self._traced.resolve(target)


class ShapeRun(Run):
    """Notes the shape and type of every tensor in every value."""

    def __init__(self, traced: TracedModel, training: bool, constants: Mapping[str, Tensor]) -> None:
        super().__init__(traced, training, constants)
        self.shapes: dict[str, Shapes] = {}
        self.plain: set[str] = set()  # nodes whose value is one tensor

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            self.shapes[n.name] = [(tuple(map(int, t.shape)), t.dtype) for t in tensors_of(value)]
            if isinstance(value, Tensor):
                self.plain.add(n.name)
        return value


class QuickShapeRun(ShapeRun):
    """Shapes only."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if type(module) in _KEEP_SHAPE and args and not (module._forward_hooks or module._forward_pre_hooks):
            return args[0]
        return super().call_module(target, args, kwargs)


class CostRun(ShapeRun):
    """Also notes each node's FLOPs and the storages that autograd keeps for its backward."""

    def __init__(
        self, traced: TracedModel, training: bool, constants: Mapping[str, Tensor], excluded: Sequence[Tensor]
    ) -> None:
        super().__init__(traced, training, constants)
        self.flops: dict[str, float] = {}
        self.saved: dict[str, dict[int, int]] = {}
        self._counter = FlopCounter()
        self._notes = _SavedNotes(self._counter, excluded)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts while active."""
        with torch.autograd.graph.saved_tensors_hooks(self._notes.note, _Saved.unpack), self._counter:
            yield

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.flops
        value = super().run_node(n)
        self.flops[n.name] = self._counter.flops - before
        self.saved[n.name] = self._notes.settle()
        return value


class _Saved:
    """What autograd keeps in place of a tensor. The tensor stays for as long as its node runs, whose forward may
    compute gradients itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()  # an output would keep its own graph alive

    def unpack(self) -> Tensor:
        if self.tensor is None:
            raise RuntimeError("A profiling run has no backward.")
        return self.tensor


class _SavedNotes:
    """What autograd saves.

    Apart from the interpreter, because a graph holds its hooks: one that held the values of the run in turn
    would keep them, and with them the user's model, out of the garbage collector's sight for good.
    """

    def __init__(self, counter: FlopCounter, excluded: Sequence[Tensor]) -> None:
        self._current: list[tuple[weakref.ref[_Saved], dict[int, int]]] = []  # of the node that runs
        self._counter = counter
        self._references: dict[int, tuple[int, StorageWeakRef]] = {}
        self._excluded = {key for tensor in excluded for key in self._sizes(tensor)}

    def _sizes(self, tensor: Tensor) -> dict[int, int]:
        """Bytes by a small number for each storage of a tensor. The weak reference keeps addresses from reuse."""
        sizes = {}
        for storage in storages_of(tensor):
            if storage._cdata not in self._references:
                self._references[storage._cdata] = (len(self._references), StorageWeakRef(storage))
            number = self._references[storage._cdata][0]
            sizes[number] = storage.nbytes() or self._counter.workspaces.get(storage._cdata, 0)
        return sizes or {-id(tensor): tensor.numel() * tensor.element_size()}

    def note(self, tensor: Tensor) -> _Saved:
        """Autograd wants to keep ``tensor``."""
        saved = _Saved(tensor)
        self._current.append((weakref.ref(saved), self._sizes(tensor)))
        return saved

    def settle(self) -> dict[int, int]:
        """The node has run: bytes by storage of what autograd still keeps of it."""
        found: dict[int, int] = {}
        for reference, sizes in self._current:
            saved = reference()
            if saved is not None:  # else a graph of the forward's own, which is done
                saved.tensor = None
                found |= {key: nbytes for key, nbytes in sizes.items() if key not in self._excluded}
        self._current.clear()
        return found


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Where a tensor's values and indices lie; empty for kinds that do not tell."""
    with torch.no_grad():
        if tensor.layout is torch.sparse_coo:
            held = [tensor._indices(), tensor._values()]
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            held = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            held = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        else:
            held = [tensor]
        try:
            return [each.untyped_storage() for each in held]
        except (NotImplementedError, RuntimeError):
            return []
