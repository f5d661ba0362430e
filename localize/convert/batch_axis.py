"""Which axis of the inputs is the batch: the first, or the second where the first is time.

Found by running two sizes, never assumed: the output grows with the batch, and layers that know where they expect it
(``batch_first``) find it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize.convert.traced import TracedModel

AXES = (0, 1)  # where a batch may be, the usual place first
Sizes = tuple[int, int]
"""The batch size of the example, and another."""

_Shapes = Mapping[str, Sequence[tuple[tuple[int, ...], torch.dtype]]]


def batch_axes(leaves: Sequence[Tensor], axis: int) -> list[int | None]:
    """The batch axis of every input where ``axis`` is that of the first one; None for those without.

    Beside inputs (T, N, …) there may be others with the batch first, masks (N, T) and lengths (N); and beside
    inputs (N, T, …) the states (1, N, D) of recurrent layers.
    """
    if not leaves or leaves[0].dim() <= axis:
        return [None] * len(leaves)
    size, axes = leaves[0].shape[axis], dict.fromkeys((axis, *AXES))
    return [next((a for a in axes if t.dim() > a and t.shape[a] == size), None) for t in leaves]


def resized(leaves: Sequence[Tensor], axis: int, batch: int) -> list[Tensor]:
    """The inputs with ``batch`` samples, the given ones in turn; ``axis`` as in ``batch_axes``."""
    made = []
    for leaf, own in zip(leaves, batch_axes(leaves, axis), strict=True):
        if own is None:
            made.append(leaf)
        else:
            made.append(leaf.index_select(own, torch.arange(batch, device=leaf.device) % leaf.shape[own]))
    return made


def keeps_samples(traced: TracedModel, graph: fx.Graph, here: _Shapes, there: _Shapes, sizes: Sizes, axis: int) -> bool:
    """Whether what grew between two runs can be the batch.

    Args:
        traced: the captured model.
        graph: the one that ran.
        here: shapes by node name, with ``sizes[0]`` samples.
        there: those with ``sizes[1]``.
        sizes: of the axis that grew.
        axis: which axis of the first input that was.
    """
    grown = {name: _grown(found, there.get(name, ()), sizes) for name, found in here.items()}
    outputs = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    if not any(a is not None and a <= axis for node in outputs for a in grown.get(node.name, ())):
        return False
    for node in graph.nodes:
        expected = _expected_axis(traced, node)
        source = node.args[0] if node.args else None
        if expected is None or not isinstance(source, fx.Node):
            continue
        found = grown.get(source.name, [])
        if len(found) == 1 and found[0] is not None and found[0] != expected:
            return False
    return True


def _grown(here: Sequence[Any], there: Sequence[Any], sizes: Sizes) -> list[int | None]:
    """Per tensor, the first axis that has the batch's size in both runs."""
    if len(here) != len(there):
        return [None] * len(here)
    axes: list[int | None] = []
    for (one, _), (other, _) in zip(here, there, strict=True):
        pairs = list(zip(one, other, strict=True)) if len(one) == len(other) else []
        axes.append(pairs.index(sizes) if sizes in pairs else None)
    return axes


def _expected_axis(traced: TracedModel, node: fx.Node) -> int | None:
    """The batch axis that a layer reads its first input with; None for layers that do not care."""
    if node.op != "call_module":
        return None
    module = traced.resolve(str(node.target))
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    knows = isinstance(module, nn.RNNBase | nn.MultiheadAttention)
    return (0 if module.batch_first else 1) if knows else None
