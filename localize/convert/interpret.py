"""Interpreters of a captured graph: what each notes down while the graph runs node by node."""

from __future__ import annotations

import time
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
        with torch.autograd.graph.saved_tensors_hooks(self._notes.note, _never_unpacked), self._counter:
            yield

    def run_node(self, n: fx.Node) -> Any:
        before, self._notes.current = self._counter.flops, {}
        value = super().run_node(n)
        self.flops[n.name] = self._counter.flops - before
        self.saved[n.name] = self._notes.current
        return value


class _SavedNotes:
    """What autograd saves.

    Apart from the interpreter, because a graph holds its hooks: one that held the values of the run in turn
    would keep them, and with them the user's model, out of the garbage collector's sight for good.
    """

    def __init__(self, counter: FlopCounter, excluded: Sequence[Tensor]) -> None:
        self.current: dict[int, int] = {}  # of the node that runs: storage → bytes
        self._counter = counter
        self._references: dict[int, tuple[int, StorageWeakRef]] = {}
        self._excluded = {self._key(t) for t in excluded}

    def _key(self, tensor: Tensor) -> int:
        """A small number for the tensor's storage. The weak reference keeps addresses from being reused."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._references:
            self._references[storage._cdata] = (len(self._references), StorageWeakRef(storage))
        return self._references[storage._cdata][0]

    def note(self, tensor: Tensor) -> None:
        try:
            key, nbytes = self._key(tensor), tensor.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):  # sparse and the like have no storage of their own
            key, nbytes = -id(tensor), tensor.numel() * tensor.element_size()
        else:
            nbytes = nbytes or self._counter.workspaces.get(tensor.untyped_storage()._cdata, 0)
        if key not in self._excluded:
            self.current[key] = nbytes


def _never_unpacked(_: Any) -> Tensor:
    raise RuntimeError("A profiling run has no backward.")


class TimedRun(Run):
    """Notes the milliseconds of every node; waits for the device around each."""

    def __init__(self, traced: TracedModel, training: bool) -> None:
        super().__init__(traced, training, {})
        self.times: dict[str, float] = {}
        self._on_gpu = any(t.is_cuda for t in traced.example)

    def run_node(self, n: fx.Node) -> Any:
        self._wait()
        start = time.perf_counter()
        value = super().run_node(n)
        self._wait()
        self.times[n.name] = (time.perf_counter() - start) * 1e3
        return value

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
