"""Proof, at conversion time, that the parts one after another are the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize import nest
from localize.convert.batch_axis import batch_axes, resized
from localize.convert.compare import gradients_differ, outputs_differ, tensors_differ
from localize.convert.restore import preserved
from localize.errors import TraceError
from localize.part import Part, run_parts
from localize.signature import Call, CallSignature, leaves_of

CLOSE = 1e-4  # of the largest entry: where the parts take another way to the same result on purpose


@dataclass(frozen=True)
class Trial:
    """A comparison of parts and model on some inputs.

    ``optional``: the model may not take such inputs, or the parts refuse them; that proves nothing.
    """

    training: bool
    inputs: list[Tensor]
    optional: bool = False

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in self.inputs)
        return f"in {'train' if self.training else 'eval'} mode, on inputs {shapes}"


@dataclass(frozen=True)
class Outcome:
    """What a run left: the outputs of two calls, the inputs and buffers after them, the gradients of the second."""

    outputs: list[Any]
    inputs: list[Tensor]
    buffers: dict[str, Tensor]
    grads: dict[str, Tensor | None]


def verify(
    model: nn.Module,
    parts: Sequence[Part],
    signature: CallSignature,
    example: Sequence[Tensor],
    batch_axis: int = 0,
    exact: bool = True,
) -> tuple[str, ...]:
    """Compares parts and model: in train mode on the example, in eval mode on other sizes.

    Outputs, written inputs and buffers have to be equal bit for bit, after a second call too, which reads what the
    first one left; gradients up to rounding. Buffers, modes and random states are as before afterwards.

    Args:
        model: the user's.
        parts: its parts, bottom first.
        signature: how it is called.
        example: its example inputs.
        batch_axis: of the first input.
        exact: outputs are equal bit for bit; False where the capture took another way to the same result.

    Returns:
        Notes on what could not be compared.

    Raises:
        TraceError: there is a difference; the conversion would train another model than the user's.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *example)):
        return ("there is no data on the meta device: parts and model were not compared",)
    notes: list[str] = []
    _try(model, parts, signature, Trial(True, list(example)), exact, notes)
    for trial in _other_sizes(example, batch_axis):
        if _try(model, parts, signature, trial, exact, notes):
            return tuple(notes)
    return (*notes, "the model takes no other batch size: only the example's was compared")


def _try(
    model: nn.Module, parts: Sequence[Part], signature: CallSignature, trial: Trial, exact: bool, notes: list[str]
) -> bool:
    """Whether the comparison took place, and was passed."""

    def own(inputs: Sequence[Tensor]) -> Any:
        args, kwargs = signature.unbind(inputs)
        return model(*args, **kwargs)

    def ours(inputs: Sequence[Tensor]) -> Any:
        return run_parts(parts, signature, Call(*signature.unbind(inputs)))

    try:
        expected = _run(model, parts, trial, own)
    except Exception as error:
        if trial.training:
            raise TraceError(
                f"The model's own forward fails when it is called twice, {trial}: {type(error).__name__}: {error}"
            ) from error
        return False
    try:
        found = _run(model, parts, trial, ours)
    except TraceError as error:
        if not trial.optional:
            raise
        notes.append(f"only for sizes like the example's: {error}")
        return False
    difference = _difference(expected, found, 0.0 if exact else CLOSE)
    if difference:
        raise TraceError(
            f"The captured model is not the model: {trial}, {difference}. The forward probably depends on state or "
            "values that the capture cannot see. Move that into a submodule of its own, which is then kept whole; or "
            "cut around the block at fault with cuts=[...]; or pass verify=False to go on at your own risk."
        )
    return True


def _difference(expected: Outcome, found: Outcome, tolerance: float) -> str | None:
    calls = ("", " at the second call")
    for one, other, when in zip(expected.outputs, found.outputs, calls, strict=False):
        difference = outputs_differ(one, other, tolerance)
        if difference:
            return difference + when
    written = outputs_differ(expected.inputs, found.inputs, tolerance)
    if written:
        return f"of the inputs after the call, {written}"
    if not tolerance:
        difference = tensors_differ(expected.buffers, found.buffers, "buffer")
        if difference:
            return difference
    return gradients_differ(expected.grads, found.grads) if expected.grads else None


def _run(model: nn.Module, parts: Sequence[Part], trial: Trial, run: Callable[[Sequence[Tensor]], Any]) -> Outcome:
    """Two calls in train mode, with gradients; one call without in eval mode."""
    outputs: list[Any] = []
    grads: dict[str, Tensor | None] = {}
    with _unfused(), preserved(model, *parts, training=trial.training), torch.set_grad_enabled(trial.training):
        torch.manual_seed(0)
        shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
        for _ in range(2 if trial.training else 1):
            inputs = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in trial.inputs]
            output = None  # the graph of the call before goes first
            output = run(inputs)
            outputs.append(_detached(output))
        left = [leaf.detach().clone() for leaf in inputs]
        # A buffer of another shape is a table that the model makes at its first call; parts hold it as a constant.
        buffers = {n: buffer.clone() for n, buffer in model.named_buffers() if buffer.shape == shapes.get(n)}
        if trial.training:  # last: a checkpoint that computes again may touch buffers
            grads = _gradients(model, output)
        return Outcome(outputs, left, buffers, grads)


def _detached(output: Any) -> Any:
    leaves, spec = nest.flatten(output)
    return nest.unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _gradients(model: nn.Module, output: Any) -> dict[str, Tensor | None]:
    """Of a weighted sum of all outputs, for every parameter; empty where autograd cannot tell."""
    roots = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not roots or not trainable:
        return {}
    weights = [torch.linspace(0.5, 1.5, root.numel()).view(root.shape).to(root) for root in roots]
    try:
        grads = torch.autograd.grad(roots, list(trainable.values()), weights, allow_unused=True)
    except RuntimeError:  # re-entrant checkpoints want backward(), whose hooks may do anything
        return {}
    return dict(zip(trainable, grads, strict=True))


def _other_sizes(example: Sequence[Tensor], batch_axis: int) -> Iterator[Trial]:
    """Another batch and other lengths (image sizes, numbers of tokens), then another batch alone."""
    more = other_batch(example, batch_axis)
    shorter = _shorter(more, example, batch_axis)
    if shorter is not None:
        yield Trial(False, shorter, optional=True)
    yield Trial(False, more)


def other_batch(leaves: Sequence[Tensor], batch_axis: int = 0) -> list[Tensor]:
    """The leaves with one sample more, where they hold samples; ``batch_axis`` is that of the first leaf."""
    size = leaves[0].shape[batch_axis] if leaves[0].dim() > batch_axis else 0
    return resized(leaves, batch_axis, size + 1) if size else list(leaves)


def _shorter(leaves: Sequence[Tensor], example: Sequence[Tensor], batch_axis: int) -> list[Tensor] | None:
    """The leaves with half of every length: of ids' second axis, of maps' space, of sequences' time."""
    samples = batch_axes(example, batch_axis)
    lengths = {size for leaf, axis in zip(leaves, samples, strict=True) for size in _lengths(leaf, axis) if size >= 4}
    if not lengths:
        return None
    shorter = []
    for leaf, axis in zip(leaves, samples, strict=True):
        index = tuple(
            slice(size // 2) if size in lengths and i != axis else slice(None) for i, size in enumerate(leaf.shape)
        )
        shorter.append(leaf[index].contiguous())
    return shorter


def _lengths(leaf: Tensor, batch_axis: int | None) -> list[int]:
    axes = [i for i in range(leaf.dim()) if i != batch_axis]
    if not leaf.is_floating_point():
        return [leaf.shape[i] for i in axes]
    if leaf.dim() == 3:
        return [leaf.shape[axes[0]]]
    return [leaf.shape[i] for i in axes[1:]]  # the channels come first


@contextmanager
def _unfused() -> Iterator[None]:
    """Without the fused attention of inference, which drops padded positions and the layers one by one do not.

    It is another function by design, taken only where no gradient is wanted.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
