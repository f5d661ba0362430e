"""Milliseconds of a graph's nodes and of heads, forward and backward, as a training step takes them."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from localize.convert.interpret import Run
from localize.convert.restore import preserved
from localize.convert.traced import TracedModel
from localize.heads.base import Head, Target
from localize.nest import flatten, unflatten
from localize.signature import tensors_of

TIMED_RUNS = 5
SLOW_RUNS, SLOW_MS = 3, 100.0  # a head runs no more than so often once that took so long

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a forward pass and of the backward pass that belongs to it.

    ``since`` says why they are an estimate; empty where they were measured.
    """

    forward_ms: float
    backward_ms: float
    since: str = ""

    @classmethod
    def median(cls, found: Sequence[Times]) -> Times:
        """The medians of several, forward and backward each for itself."""
        return cls(statistics.median(t.forward_ms for t in found), statistics.median(t.backward_ms for t in found))


def timed(call: Callable[[], T], on_gpu: bool) -> tuple[T, float]:
    """What ``call`` gives, and the milliseconds that it took; waits for the GPU around it."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = call()
    if on_gpu:
        torch.cuda.synchronize()
    return value, (time.perf_counter() - start) * 1e3


def reason(error: Exception) -> str:
    """The kind of an error and its first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


# ---------------------------------------------------------------- nodes


def measure(traced: TracedModel, training: bool) -> dict[str, Times]:
    """Median times of every node of one mode's graph over several real runs, after one to warm up.

    A backward pass that cannot be run counts as twice the forward pass; where that goes for all of them, the model's
    notes say so. The model, its gradients and all random states are afterwards as they were.
    """
    try:
        return _rounds(traced, training, with_backward=True)
    except Exception as error:  # some layer must not run twice in one forward pass
        _log.debug("Backward passes cannot be timed.", exc_info=True)
        note = f"backward passes: times estimated as twice those of forward passes, since {reason(error)}"
        if note not in traced.notes:
            traced.notes.append(note)
        return _rounds(traced, training, with_backward=False)


def _rounds(traced: TracedModel, training: bool, with_backward: bool) -> dict[str, Times]:
    failed: set[str] = set()
    runs = []
    with preserved(*traced.roots, training=training), torch.no_grad():
        for _ in range(TIMED_RUNS + 1):
            run = TimedRun(traced, training, failed, with_backward)
            run.run(*traced.example)
            runs.append(run.times)
    found = {name: Times.median([run[name] for run in runs[1:]]) for name in runs[0]}
    if not with_backward:
        failed |= found.keys()
    return {name: Times(t.forward_ms, 2 * t.forward_ms) if name in failed else t for name, t in found.items()}


class TimedRun(Run):
    """Notes the milliseconds of every node, forward and backward; waits for the device around each.

    A node runs forward without gradients, for the value that the nodes after it see. If gradients pass through it in
    training, it then runs again on copies of its arguments, and the backward pass of that is timed: gradients of
    the parameters it reads and of those arguments that depend on parameters. Neither frozen parameters nor what
    comes from the model's inputs alone (the first layer's input, all below frozen layers) take any.

    Args:
        traced: the captured model.
        training: which mode's graph.
        failed: names of nodes whose backward pass cannot be run; those found to be so are added.
        with_backward: whether backward passes run at all.
    """

    def __init__(self, traced: TracedModel, training: bool, failed: set[str], with_backward: bool = True) -> None:
        super().__init__(traced, training, {})
        self.times: dict[str, Times] = {}
        self._failed, self._with_backward = failed, with_backward
        self._learning: set[fx.Node] = set()  # nodes whose values need a gradient
        self._on_gpu = any(t.is_cuda for t in traced.example)

    def run_node(self, n: fx.Node) -> Any:
        weights = self._weights(n)
        inherits = not self._learning.isdisjoint(n.all_input_nodes)
        takes = bool(weights or inherits) and self._with_backward and _computes(n)
        # Copies come first: the node may write into its arguments.
        copies = self._attempt(n, lambda: self._copied(n, weights)) if takes else None
        value, forward = timed(lambda: super(TimedRun, self).run_node(n), self._on_gpu)
        backward = self._attempt(n, lambda: self._backward(n, copies)) if copies is not None else None
        if backward is not None or n.name in self._failed or (inherits and n.meta.get("entry")):
            self._learning |= {n, *(source for source in self.env if _writes_into(n, source))}
        self.times[n.name] = Times(forward, backward or 0.0)
        return value

    def _attempt(self, n: fx.Node, call: Callable[[], T]) -> T | None:
        if n.name in self._failed:
            return None
        try:
            with torch.enable_grad():
                return call()
        except Exception:  # what cannot be run backward raises errors of many kinds
            _log.debug("The backward pass of %s cannot be timed.", n.name, exc_info=True)
            self._failed.add(n.name)
            return None

    def _weights(self, n: fx.Node) -> list[Tensor]:
        """The parameters that a node reads and that train."""
        return [t for t in self._traced.tensors_read(n) if t.requires_grad]

    def _copied(self, n: fx.Node, weights: Sequence[Tensor]) -> _Copies:
        """Copies of a node's arguments, which it may write into. Those that need a gradient are no leaves."""
        if any(p._backward_hooks for p in weights) or any(map(_is_hooked, self._modules_of(n))):
            raise RuntimeError("The user's hooks would see these gradients.")
        made: dict[fx.Node, Any] = {}
        copies = _Copies([], list(weights))

        def copy(source: fx.Node) -> Any:
            if source not in made:
                held = source.op == "get_attr" and isinstance(self.env[source], nn.Module | nn.Parameter)
                made[source] = self.env[source] if held else copies.of(self.env[source], source in self._learning)
            return made[source]

        copies.args, copies.kwargs = fx.node.map_arg((n.args, n.kwargs), copy)
        return copies

    def _modules_of(self, n: fx.Node) -> Iterator[nn.Module]:
        """The module that a node calls and those below it."""
        held = [source.target for source in n.all_input_nodes if source.op == "get_attr"]
        for target in [n.target] if n.op == "call_module" else held:
            called = self._traced.resolve(str(target))
            if isinstance(called, nn.Module):
                yield from called.modules()

    def _backward(self, n: fx.Node, copies: _Copies) -> float | None:
        """Milliseconds of the backward pass of a node; None where its value needs no gradient."""
        result = getattr(self, n.op)(n.target, copies.args, copies.kwargs)
        written = [t for t in copies.tensors if t._version]
        outputs = {id(t): t for t in (*tensors_of(result), *written) if t.requires_grad}
        if not outputs:
            return None
        ones = [torch.ones_like(t) for t in outputs.values()]
        return timed(lambda: gradients(list(outputs.values()), copies.wanted, ones), self._on_gpu)[1]


@dataclass
class _Copies:
    """What a node runs on for its backward pass."""

    tensors: list[Tensor]
    wanted: list[Tensor]  # gradients are computed of these
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def of(self, value: Any, learns: bool) -> Any:
        """``value`` with copies of its tensors; of those in floating point gradients are wanted where it ``learns``."""
        leaves, spec = flatten(value)
        return unflatten([self._copy(leaf, learns) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def _copy(self, tensor: Tensor, learns: bool) -> Tensor:
        leaf = tensor.detach()
        if learns and (leaf.is_floating_point() or leaf.is_complex()):
            self.wanted.append(leaf.requires_grad_())
        self.tensors.append(leaf.clone())
        return self.tensors[-1]


def gradients(outputs: Sequence[Tensor], wanted: Sequence[Tensor], ones: Sequence[Tensor] | None = None) -> None:
    """A backward pass from ``outputs``, weighted by ``ones``; nothing is left behind."""
    torch.autograd.grad(outputs, wanted, ones, allow_unused=True)


def _writes_into(n: fx.Node, source: fx.Node) -> bool:
    """Whether a node changes the value that ``source`` gave."""
    return bool(n.meta.get("mutates", frozenset()) & source.meta.get("storages", frozenset()))


def _computes(n: fx.Node) -> bool:
    """Whether gradients may pass through a node, and take time there: entries of tuples only hand them on."""
    return n.op.startswith("call_") and not n.meta.get("entry") and not _ends_here(n)


def _ends_here(n: fx.Node) -> bool:
    """Whether a node was recorded under ``no_grad``: all that is used of it is its values without their history."""
    return bool(n.users) and all(_ends_here(u) if u.meta.get("entry") else u.target == "detach" for u in n.users)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


# ---------------------------------------------------------------- heads


def measure_head(head: Head, device: torch.device) -> Times:
    """Median times of a head on a hidden state of its site: its loss, and the gradients of the hidden state and of
    the weights. Numbers are random, labels of class 0. Runs after one to warm up.
    """
    spec, on_gpu = head.site.hidden, device.type == "cuda"
    batch = spec.shape[spec.batch_axis or 0] if spec.shape else 1
    hidden, target = torch.randn(spec.shape, device=device).to(spec.dtype), head.example_target(batch, device)
    found: list[Times] = []
    while len(found) <= TIMED_RUNS:
        found.append(_step(head, hidden.detach().requires_grad_(), target, on_gpu))
        if len(found) > SLOW_RUNS and sum(t.forward_ms + t.backward_ms for t in found[1:]) > SLOW_MS:
            break
    return Times.median(found[1:])


def _step(head: Head, leaf: Tensor, target: Target, on_gpu: bool) -> Times:
    output, forward = timed(lambda: head(leaf, target), on_gpu)
    if not output.loss.requires_grad:
        return Times(forward, 0.0)
    wanted = [leaf, *(p for p in head.parameters() if p.requires_grad)]
    return Times(forward, timed(lambda: gradients([output.loss], wanted), on_gpu)[1])
