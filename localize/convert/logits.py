"""The model's output without a run: empty tensors of the shapes that a profile found."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from localize.convert.traced import Profile, TracedModel
from localize.errors import ConfigError
from localize.spec import TensorSpec
from localize.task import Task


def empty_output(traced: TracedModel, profile: Profile, training: bool) -> Any:
    """The model's output in its own structure, of tensors without data."""
    return traced.outputs[training].restore(_leaves(traced, profile, training))


def logits_spec(traced: TracedModel, profile: Profile, task: Task, needs_samples: bool) -> TensorSpec:
    """Shape and layout of the logits in train mode.

    Args:
        traced: the captured model.
        profile: of train mode.
        task: says which output are the logits.
        needs_samples: whether they must tell samples apart, on an axis that the task's loss can do with: the
            first, or, of sequences and numbers, any.

    Raises:
        ConfigError: they do not, though the inputs hold samples.
    """
    node = _output(traced, True)[logits_leaf(traced, profile, task, True)]
    inputs = [n for n in traced.graph(True).nodes if n.op == "placeholder"]
    follows = any(profile.nodes[n.name].specs[0].batch_axis is not None for n in inputs)
    logits = task.logits(empty_output(traced, profile, True))
    axis = profile.nodes[node.name].specs[0].batch_axis
    if axis == 0 or (axis == 1 and task.kind in _ANY_BATCH_AXIS and logits.dim() == 3):
        return TensorSpec.of(logits, axis)
    if needs_samples and follows:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in traced.example)
        raise ConfigError(
            f"The batch of the inputs {shapes} cannot be found: the logits {tuple(logits.shape)} do not grow with "
            f"the first axis, nor with the second. Heads for {task.kind} need one row of logits a sample: pass "
            "inputs (N, …), or (T, N, …) to a model that gives (N, C). Method 'bp' does without."
        )
    return TensorSpec.of(logits)


_ANY_BATCH_AXIS = ("causal_lm", "regression")  # losses over all elements, wherever samples are


def logits_leaf(traced: TracedModel, profile: Profile, task: Task, training: bool) -> int:
    """The position of the logits among the leaves of the model's output."""
    leaves = _leaves(traced, profile, training)
    logits = task.logits(traced.outputs[training].restore(leaves))
    return next(i for i, leaf in enumerate(leaves) if leaf is logits)


def _leaves(traced: TracedModel, profile: Profile, training: bool) -> list[Any]:
    """The leaves of the output: tensors as empty ones, constants as they are."""
    return [_empty(profile, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in _output(traced, training)]


def _output(traced: TracedModel, training: bool) -> Any:
    return next(node for node in traced.graph(training).nodes if node.op == "output").args[0]


def _empty(profile: Profile, node: fx.Node) -> Any:
    specs = profile.nodes[node.name].specs
    return torch.empty(specs[0].shape, dtype=specs[0].dtype, device="meta") if specs else None
