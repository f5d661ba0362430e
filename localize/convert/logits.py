"""The model's output without a run: empty tensors of the shapes that a profile found."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from localize.convert.traced import Profile, TracedModel
from localize.spec import TensorSpec
from localize.task import Task


def empty_output(traced: TracedModel, profile: Profile, training: bool) -> Any:
    """The model's output in its own structure, of tensors without data."""
    return traced.outputs[training].restore(_leaves(traced, profile, training))


def logits_spec(traced: TracedModel, profile: Profile, task: Task) -> TensorSpec:
    """Shape and layout of the logits in train mode."""
    return TensorSpec.of(task.logits(empty_output(traced, profile, True)))


def logits_leaf(traced: TracedModel, profile: Profile, task: Task, training: bool) -> int:
    """The position of the logits among the leaves of the model's output."""
    leaves = _leaves(traced, profile, training)
    logits = task.logits(traced.outputs[training].restore(leaves))
    return next(i for i, leaf in enumerate(leaves) if leaf is logits)


def _leaves(traced: TracedModel, profile: Profile, training: bool) -> list[Any]:
    """The leaves of the output: tensors as empty ones, constants as they are."""
    output = next(node for node in traced.graph(training).nodes if node.op == "output")
    return [_empty(profile, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in output.args[0]]


def _empty(profile: Profile, node: fx.Node) -> Any:
    specs = profile.nodes[node.name].specs
    return torch.empty(specs[0].shape, dtype=specs[0].dtype, device="meta") if specs else None
