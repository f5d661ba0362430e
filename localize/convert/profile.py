"""What every node of a graph makes and costs: shapes, FLOPs, saved bytes, parameters, milliseconds.

The graph runs twice on fake tensors (no data, no arithmetic), so a model that does not fit can be planned:
once at the example's batch size for the costs, once at another for the batch axes. A model that fake tensors
cannot run is run for real instead, and left as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from localize.convert.flops import FlopCounter
from localize.convert.layouts import layout_of
from localize.convert.restore import preserved
from localize.convert.traced import NodeProfile, Profile, TracedModel, tensors_in
from localize.errors import TraceError
from localize.spec import TensorSpec

TIMED_RUNS = 3

# Their output has the shape and type of their input. Most are slow on fake tensors, so that the run that only
# asks for shapes passes them over.
_KEEP_SHAPE = frozenset(
    {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d}
    | {nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Dropout}
)

Shapes = list[tuple[tuple[int, ...], torch.dtype]]


def profile(traced: TracedModel, training: bool = True, measure_time: bool = False) -> Profile:
    """Costs of every node of one mode's graph, at the example's batch size.

    Args:
        traced: the captured model; neither its values nor its random states change.
        training: which mode's graph, and which mode the modules run in.
        measure_time: also measure milliseconds a node, on real tensors where the example is.

    Raises:
        TraceError: the graph cannot be run.
    """
    costs, batches, others = _profile_run(traced, training)
    times = _measure(traced, training) if measure_time else {}
    names = parameter_names(traced)
    axes = {name: _batch_axes(found, others.get(name), batches) for name, found in costs.shapes.items()}
    first = {name: found[0][0] for name, found in costs.shapes.items() if name in costs.plain}
    nodes = {}
    for node in traced.graph(training).nodes:
        found = costs.shapes.get(node.name, [])
        plain = node.name in costs.plain
        specs = tuple(
            TensorSpec(shape, dtype, axis, layout_of(traced, node, first, axis) if plain else "other")
            for (shape, dtype), axis in zip(found, axes.get(node.name, []), strict=True)
        )
        nodes[node.name] = NodeProfile(
            specs=specs,
            is_tensor=plain,
            flops=costs.flops.get(node.name, 0),
            time_ms=times.get(node.name),
            saved=tuple(costs.saved.get(node.name, {}).items()),
            params=tuple(parameters_read(traced, node, names).items()),
        )
    return Profile(nodes)


def parameter_names(traced: TracedModel) -> dict[int, str]:
    """The one name of every parameter object, by ``id``: a tied parameter has several paths but one name."""
    names = {id(p): name for name, p in traced.root.named_parameters()}
    for target, extra in traced.extras.items():
        if isinstance(extra, nn.Module):
            for path, p in extra.named_parameters():
                names.setdefault(id(p), f"{target}.{path}")
    return names


def parameters_read(traced: TracedModel, node: fx.Node, names: dict[int, str]) -> dict[str, int]:
    """Name → bytes of the parameters a node reads: all below a leaf module, and those it is handed.

    A ``get_attr`` node itself reads nothing: it is repeated in whichever part needs it, so its parameter
    belongs to the nodes that use it.
    """
    tensors: list[Tensor] = []
    if node.op == "call_module":
        tensors += traced.resolve(str(node.target)).parameters()
    for source in node.all_input_nodes:
        if source.op == "get_attr" and node.op != "output":
            value = traced.resolve(str(source.target))
            tensors += value.parameters() if isinstance(value, nn.Module) else [value]
    return {names[id(p)]: p.numel() * p.element_size() for p in tensors if id(p) in names}


class _Run(fx.Interpreter):
    """Runs a graph over the original modules, without generating code for it."""

    def __init__(self, traced: TracedModel, training: bool) -> None:
        super().__init__(traced.root, graph=traced.graph(training))
        self._traced = traced

    def fetch_attr(self, target: str) -> Any:
        return self._traced.resolve(target)


class _ShapeRun(_Run):
    """Notes the shape and type of every tensor in every value."""

    def __init__(self, traced: TracedModel, training: bool) -> None:
        super().__init__(traced, training)
        self.shapes: dict[str, Shapes] = {}
        self.plain: set[str] = set()  # nodes whose value is one tensor

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            self.shapes[n.name] = [(tuple(map(int, t.shape)), t.dtype) for t in tensors_in(value)]
            if isinstance(value, Tensor):
                self.plain.add(n.name)
        return value


class _QuickShapeRun(_ShapeRun):
    """Shapes only."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if type(module) in _KEEP_SHAPE and args and not (module._forward_hooks or module._forward_pre_hooks):
            return args[0]
        return super().call_module(target, args, kwargs)


class _CostRun(_ShapeRun):
    """Also notes each node's FLOPs and the storages that autograd keeps for its backward."""

    def __init__(self, traced: TracedModel, training: bool, excluded: Sequence[Tensor]) -> None:
        super().__init__(traced, training)
        self.flops: dict[str, float] = {}
        self.saved: dict[str, dict[int, int]] = {}
        self._counter = FlopCounter()
        self._current: dict[int, int] = {}
        self._references: dict[int, tuple[int, StorageWeakRef]] = {}
        self._excluded = {self._key(t) for t in excluded}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts while active."""
        with torch.autograd.graph.saved_tensors_hooks(self._note_saved, _never_unpacked), self._counter:
            yield

    def run_node(self, n: fx.Node) -> Any:
        before, self._current = self._counter.flops, {}
        value = super().run_node(n)
        self.flops[n.name] = self._counter.flops - before
        self.saved[n.name] = self._current
        return value

    def _key(self, tensor: Tensor) -> int:
        """A small number for the tensor's storage. The weak reference keeps addresses from being reused."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._references:
            self._references[storage._cdata] = (len(self._references), StorageWeakRef(storage))
        return self._references[storage._cdata][0]

    def _note_saved(self, tensor: Tensor) -> None:
        try:
            key, nbytes = self._key(tensor), tensor.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):  # sparse and the like have no storage of their own
            key, nbytes = -id(tensor), tensor.numel() * tensor.element_size()
        else:
            nbytes = nbytes or self._counter.workspaces.get(tensor.untyped_storage()._cdata, 0)
        if key not in self._excluded:
            self._current[key] = nbytes


def _never_unpacked(_: Any) -> Tensor:
    raise RuntimeError("A profiling run has no backward.")


_Runs = tuple[_CostRun, tuple[int, int], dict[str, Shapes]]
"""The costs at the example's batch size, that size and another, and the shapes at the other."""


def _profile_run(traced: TracedModel, training: bool) -> _Runs:
    """The run at the example's batch size, and the shapes at another (empty where no other size works)."""
    try:
        return _runs(traced, training, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception:  # what fake tensors cannot do raises errors of many kinds
        pass
    try:
        return _runs(traced, training, None)
    except Exception as error:
        raise TraceError(f"The captured graph fails on the example it was captured with: {error}") from error


def _runs(traced: TracedModel, training: bool, fake: FakeTensorMode | None) -> _Runs:
    resident = [t for m in _modules(traced) for t in (*m.parameters(), *m.buffers())]
    resident += [t for t in traced.extras.values() if isinstance(t, Tensor)]
    mode: AbstractContextManager[Any] = fake or nullcontext()
    with preserved(*_modules(traced), training=training), torch.enable_grad():
        if fake is not None:
            # The operators would convert each of these once anyway; what is saved has the copy's storage.
            resident += [fake.from_tensor(t) for t in resident]
        costs = _CostRun(traced, training, resident)
        leaves = [leaf if fake is None else fake.from_tensor(leaf) for leaf in traced.example]
        with mode, costs.watching():
            costs.run(*leaves)
        with mode, torch.no_grad():
            other, shapes = _shapes_at_another_batch(traced, training, leaves)
    batch = leaves[0].shape[0] if leaves[0].dim() else 0
    return costs, (batch, other), shapes


def _modules(traced: TracedModel) -> list[nn.Module]:
    return [traced.root, *(m for m in traced.extras.values() if isinstance(m, nn.Module))]


def _shapes_at_another_batch(
    traced: TracedModel, training: bool, leaves: Sequence[Tensor]
) -> tuple[int, dict[str, Shapes]]:
    """Another batch size that works, and the shapes there."""
    batch = leaves[0].shape[0] if leaves[0].dim() else 0
    for other in (2 * batch, batch + 1, 3 * batch) if batch else ():  # a view or a window may need a multiple
        run = _QuickShapeRun(traced, training)
        index = torch.arange(other, device=leaves[0].device) % batch
        try:
            run.run(*(t[index.to(t.device)] if t.dim() and t.shape[0] == batch else t for t in leaves))
        except Exception:  # a guard of the capture, or the model itself, refuses this size
            continue
        return other, run.shapes
    return batch, {}


def _batch_axes(found: Shapes, others: Shapes | None, batches: tuple[int, int]) -> list[int | None]:
    """Per tensor, the first axis whose size is the batch's in both runs; None where there is none.

    An axis that merely grows with the batch (windows or tokens folded into it) holds no samples.
    """
    if others is None or len(others) != len(found):
        others = found
    axes: list[int | None] = []
    for (here, _), (there, _) in zip(found, others, strict=True):
        sizes = list(zip(here, there, strict=True)) if len(here) == len(there) else []
        axes.append(sizes.index(batches) if batches in sizes else None)
    return axes


class _TimedRun(_Run):
    """Notes the milliseconds of every node; waits for the device around each."""

    def __init__(self, traced: TracedModel, training: bool) -> None:
        super().__init__(traced, training)
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


def _measure(traced: TracedModel, training: bool) -> dict[str, float]:
    """Median milliseconds of every node over several real runs, after one to warm up."""
    runs: list[dict[str, float]] = []
    with preserved(*_modules(traced), training=training), torch.no_grad():
        for _ in range(TIMED_RUNS + 1):
            run = _TimedRun(traced, training)
            run.run(*traced.example)
            runs.append(run.times)
    return {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}
