"""A batch in pieces: micro-batches go up one by one, so that the parts above start earlier.

    part 1   F F F F L B B B B U            four micro-batches: F forward, L the head, which learns from the whole
    part 2     F F F F L B B B B U          batch, B backward, U update
"""

from __future__ import annotations

from localize.errors import ConfigError, problem_list
from localize.model import LocalModel
from localize.part import Stream
from localize.runtime.messages import Upward
from localize.spec import TensorSpec


def check(local: LocalModel, count: int) -> None:
    """Makes sure that batches of this model can be cut into ``count`` micro-batches and put together again.

    Raises:
        ConfigError: they cannot; all reasons at once.
    """
    if count == 1:
        return
    inputs = [spec for spec in local.plan.inputs if spec.batch_axis is not None]
    problems = [] if inputs else ["no input of the model has a batch axis that is known"]
    samples = inputs[0].shape[inputs[0].batch_axis or 0] if inputs else 1
    for number, head in enumerate(local.heads, 1):
        if head is not None and not _holds_samples(head.site.hidden, samples):
            problems.append(f"the hidden state of head {number}, {head.site.hidden}, does not keep samples apart")
    if problems:
        raise ConfigError(
            problem_list(f"microbatches={count} does not work with this model; leave it at 1", problems)
        )


def _holds_samples(hidden: TensorSpec, samples: int) -> bool:
    """Whether a batch's hidden state is that of its samples side by side."""
    axis = hidden.batch_axis
    return axis is not None and len(hidden.shape) > axis and hidden.shape[axis] % samples == 0


def split(local: LocalModel, batch: Upward, count: int) -> list[Upward]:
    """A batch as ``count`` micro-batches, fewer where it has fewer samples; the first one has the target.

    Sizes differ by one at most: batch norm makes nothing of a single sample.

    Raises:
        ConfigError: inputs are of different batch sizes.
    """
    if count == 1:
        return [batch]
    axes = {
        name: spec.batch_axis
        for name, spec in zip(local.signature.names, local.plan.inputs, strict=True)
        if spec.batch_axis is not None and batch.stream[name].dim() > spec.batch_axis
    }
    samples = {name: batch.stream[name].shape[axis] for name, axis in axes.items()}
    if len(set(samples.values())) != 1:
        raise ConfigError(
            f"The inputs are of different batch sizes, {samples}; no micro-batches can be made of them. "
            "Where one of them holds no samples (a mask, say), convert with an example of another batch size, which "
            "tells such inputs apart."
        )
    count = max(1, min(count, next(iter(samples.values()))))
    cut = {name: value.tensor_split(count, axes[name]) for name, value in batch.stream.items() if name in axes}
    streams: list[Stream] = [
        {name: cut[name][i] if name in cut else value for name, value in batch.stream.items()} for i in range(count)
    ]
    return [Upward(stream, None if i else batch.target) for i, stream in enumerate(streams)]
