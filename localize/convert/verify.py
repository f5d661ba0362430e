"""Proof, at conversion time, that the parts one after another are the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localize.convert.restore import preserved
from localize.errors import TraceError
from localize.part import Part, run_parts
from localize.signature import Call, CallSignature, leaves_of


def verify(model: nn.Module, parts: Sequence[Part], signature: CallSignature, example: Sequence[Tensor]) -> None:
    """Compares parts and model, bit for bit: in train mode on the example, in eval mode on another batch size.

    Buffers, modes and random states are as before afterwards.

    Raises:
        TraceError: an output differs; the conversion would train another model than the user's.
    """
    for training, leaves in ((True, list(example)), (False, other_batch(example))):
        args, kwargs = signature.unbind(leaves)
        call = Call(args, kwargs)
        expected = _run(model, parts, training, model, *args, **kwargs)
        found = _run(model, parts, training, run_parts, parts, signature, call)
        difference = compare(expected, found)
        if difference:
            mode = "train" if training else "eval"
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise TraceError(
                f"The captured model is not the model: in {mode} mode, on inputs {shapes}, {difference}. The forward "
                "probably depends on state or values that the capture cannot see. Cut around the block at fault with "
                "cuts=[...], or pass verify=False to go on at your own risk."
            )


def _run(
    model: nn.Module, parts: Sequence[Part], training: bool, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with preserved(model, *parts, training=training), torch.no_grad():
        torch.manual_seed(0)
        return run(*args, **kwargs)


def other_batch(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The leaves with one sample more, where their first axis is the batch (that of the first leaf)."""
    batch = leaves[0].shape[0] if leaves[0].dim() else None
    return [
        torch.cat([leaf, leaf[:1]]) if leaf.dim() and batch and leaf.shape[0] == batch else leaf for leaf in leaves
    ]


def compare(expected: Any, found: Any) -> str | None:
    """What is different between two outputs; None where they are equal bit for bit."""
    if type(expected) is not type(found):
        return f"the output is a {type(found).__name__} instead of a {type(expected).__name__}"
    left, right = leaves_of(expected), leaves_of(found)
    if len(left) != len(right):
        return f"the output has {len(right)} entries instead of {len(left)}"
    for position, (one, other) in enumerate(zip(left, right, strict=True)):
        if not isinstance(one, Tensor):
            if one != other:
                return f"output {position} is {other!r} instead of {one!r}"
        elif one.shape != other.shape or one.dtype != other.dtype:
            return (
                f"output {position} is {tuple(other.shape)} {other.dtype} instead of {tuple(one.shape)} {one.dtype}"
            )
        elif not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)):
            return f"output {position} differs by up to {(one - other).abs().max().item():.3g}"
    return None
