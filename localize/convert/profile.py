"""What every node of a graph makes and costs: shapes, FLOPs, saved bytes, parameters, milliseconds.

The graph runs twice without data or arithmetic: once at the example's batch size for the costs, once at another
for the batch axes. (Capturing it took a real run, so the model does fit on some device.) What runs neither on the
meta device nor on fake tensors runs for real instead, and is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from localize.convert.batch_axis import AXES, Sizes, keeps_samples, resized
from localize.convert.dry import StandIn, for_real, on_fake, on_meta
from localize.convert.interpret import CostRun, QuickShapeRun, Shapes
from localize.convert.layouts import final_of, layout_of
from localize.convert.restore import preserved
from localize.convert.timing import measure
from localize.convert.traced import NodeProfile, Profile, TracedModel
from localize.errors import TraceError
from localize.spec import Cost, TensorSpec


def profile_modes(traced: TracedModel, measure_time: bool = False) -> dict[bool, Profile]:
    """The profiles of both modes (True for train): one object twice where the modes agree."""
    train = profile(traced, training=True, measure_time=measure_time)
    return {True: train, False: train if traced.modes_agree else profile(traced, training=False)}


def profile(traced: TracedModel, training: bool = True, measure_time: bool = False) -> Profile:
    """Costs of every node of one mode's graph, at the example's batch size.

    Args:
        traced: the captured model; neither its values nor its random states change.
        training: which mode's graph, and which mode the modules run in.
        measure_time: also measure milliseconds a node, forward and backward, on real tensors where the example is.

    Raises:
        TraceError: the graph cannot be run.
    """
    costs, batches, others = _profile_run(traced, training)
    times = measure(traced, training) if measure_time else {}
    names = traced.parameter_names()
    axes = {name: _batch_axes(found, others.get(name), batches) for name, found in costs.shapes.items()}
    first = {name: found[0][0] for name, found in costs.shapes.items() if name in costs.plain}
    nodes = {}
    for node in traced.graph(training).nodes:
        found = costs.shapes.get(node.name, [])
        plain = node.name in costs.plain
        specs = tuple(
            TensorSpec(shape, dtype, axis, layout_of(traced, node, first, axis), final_of(traced, node, first, axis))
            if plain
            else TensorSpec(shape, dtype, axis)
            for (shape, dtype), axis in zip(found, axes.get(node.name, []), strict=True)
        )
        nodes[node.name] = NodeProfile(
            specs=specs,
            is_tensor=plain,
            flops=costs.flops.get(node.name, 0),
            forward_ms=times[node.name].forward_ms if times else None,
            backward_ms=times[node.name].backward_ms if times else None,
            saved=tuple(costs.saved.get(node.name, {}).items()),
            params=tuple(parameters_read(traced, node, names).items()),
        )
    return Profile(nodes)


def parameters_read(traced: TracedModel, node: fx.Node, names: dict[int, str]) -> dict[str, int]:
    """Name → bytes of the parameters a node reads: all below a leaf module, and those it is handed."""
    tensors = traced.tensors_read(node)
    return {names[id(p)]: p.numel() * p.element_size() for p in tensors if id(p) in names}


def frozen_parameters(traced: TracedModel) -> frozenset[str]:
    """The names of the parameters that do not train: they have no gradients and no optimizer state."""
    frozen = {id(p) for root in traced.roots for p in root.parameters() if not p.requires_grad}
    return frozenset(name for key, name in traced.parameter_names().items() if key in frozen)


def cost_of(profile: Profile, names: Sequence[str], frozen: Set[str]) -> Cost:
    """Cost of a set of nodes run as one part, with the bytes of the ``frozen`` among its parameters."""
    params = {path: nbytes for name in names for path, nbytes in profile.nodes[name].params}
    still = sum(nbytes for path, nbytes in params.items() if path in frozen)
    return replace(profile.cost(names), frozen_bytes=still)


def parameter_cost(path: str, nbytes: int, frozen: Set[str]) -> Cost:
    """Cost of one parameter alone."""
    return Cost(param_bytes=nbytes, frozen_bytes=nbytes if path in frozen else 0)


Place = Callable[[Sequence[nn.Module]], AbstractContextManager[StandIn]]
"""Where a graph runs: puts stand-ins in place of the modules' tensors and gives those for other tensors."""

_Runs = tuple[CostRun, Sizes, dict[str, Shapes]]
"""The costs at the example's batch size, that size and another, and the shapes at the other."""


def _profile_run(traced: TracedModel, training: bool) -> _Runs:
    """The run at the example's batch size, and the shapes at another (empty where no other size works)."""
    for place in (on_meta, on_fake):
        try:
            return runs(traced, training, place)
        except Exception:  # what cannot be done without data raises errors of many kinds
            continue
    try:
        return runs(traced, training, for_real)
    except Exception as error:
        raise TraceError(f"The captured graph fails on the example it was captured with: {error}") from error


def runs(traced: TracedModel, training: bool, place: Place) -> _Runs:
    """See ``_profile_run``. All places that can run a graph give the same."""
    modules = traced.roots
    resident = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    constants = {name: t for name, t in traced.extras.items() if isinstance(t, Tensor)}
    resident += constants.values()
    with preserved(*modules, training=training), torch.enable_grad(), place(modules) as stand_in:
        constants = {name: stand_in(t) for name, t in constants.items()}
        resident += [stand_in(t) for t in resident]  # alive while it runs: operators shall meet the very same
        costs = CostRun(traced, training, constants, resident)
        leaves = [stand_in(leaf) for leaf in traced.example]
        with costs.watching():
            costs.run(*leaves)
        with torch.no_grad():
            sizes, shapes = _shapes_at_another_batch(traced, training, constants, leaves, costs.shapes)
    return costs, sizes, shapes


def _shapes_at_another_batch(
    traced: TracedModel,
    training: bool,
    constants: Mapping[str, Tensor],
    leaves: Sequence[Tensor],
    here: dict[str, Shapes],
) -> tuple[Sizes, dict[str, Shapes]]:
    """The batch size and another that works, and the shapes there. The batch is the axis that the output follows."""
    found: list[tuple[Sizes, dict[str, Shapes]]] = []
    for axis in AXES:
        batch = leaves[0].shape[axis] if leaves[0].dim() > axis else 0
        for other in (2 * batch, batch + 1, 3 * batch) if batch else ():  # a view or a window may need a multiple
            run = QuickShapeRun(traced, training, constants)
            try:
                run.run(*resized(leaves, axis, other))
            except Exception:  # a guard of the capture, or the model itself, refuses this size
                continue
            if keeps_samples(traced, traced.graph(training), here, run.shapes, (batch, other), axis):
                return (batch, other), run.shapes
            found.append(((batch, other), run.shapes))
            break
    batch = leaves[0].shape[0] if leaves[0].dim() else 0
    return found[0] if found else ((batch, batch), {})


def _batch_axes(found: Shapes, others: Shapes | None, batches: Sizes) -> list[int | None]:
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
