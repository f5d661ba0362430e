"""Proof, at conversion time, that the parts one after another are the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localize.convert.batch_axis import resized
from localize.convert.restore import preserved
from localize.errors import TraceError
from localize.part import Part, run_parts
from localize.signature import Call, CallSignature, leaves_of


def verify(
    model: nn.Module,
    parts: Sequence[Part],
    signature: CallSignature,
    example: Sequence[Tensor],
    reassigned: Sequence[str] = (),
    batch_axis: int = 0,
) -> None:
    """Compares parts and model, bit for bit: in train mode on the example, in eval mode on another batch size.

    Outputs and buffers must be equal; where the model's own forward sets attributes (``reassigned``), they must be
    on a second run too, which reads what the first one set. Buffers, modes and random states are as before
    afterwards.

    Raises:
        TraceError: there is a difference; the conversion would train another model than the user's.
    """
    for training, leaves in ((True, list(example)), (False, other_batch(example, batch_axis))):
        args, kwargs = signature.unbind(leaves)
        call = Call(args, kwargs)
        runs = 2 if reassigned else 1
        expected = _run(model, parts, training, runs, lambda c=call: model(*c.args, **c.kwargs))  # type: ignore[misc]
        found = _run(model, parts, training, runs, lambda c=call: run_parts(parts, signature, c))  # type: ignore[misc]
        difference = compare(expected[0], found[0]) or _compare_buffers(expected[1], found[1])
        if difference:
            mode = "train" if training else "eval"
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            why = (
                f"The forward sets {', '.join(map(repr, reassigned))} on the model itself, which parts cannot follow: "
                "move that into a submodule, which is then kept whole."
                if reassigned
                else "The forward probably depends on state or values that the capture cannot see. Cut around the "
                "block at fault with cuts=[...], or pass verify=False to go on at your own risk."
            )
            raise TraceError(
                f"The captured model is not the model: in {mode} mode, on inputs {shapes}, {difference}. {why}"
            )


def _run(
    model: nn.Module, parts: Sequence[Part], training: bool, runs: int, run: Callable[[], Any]
) -> tuple[Any, dict[str, Tensor]]:
    """The output of the last run, and the buffers after it."""
    # The fused attention of inference drops padded positions, which the layers one by one do not: another function
    # by design, taken only where no gradient is wanted.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with preserved(model, *parts, training=training), torch.no_grad():
            torch.manual_seed(0)
            for _ in range(runs):
                output = run()
            return output, {name: buffer.clone() for name, buffer in model.named_buffers()}
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _compare_buffers(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    for name, buffer in expected.items():
        if name not in found or not _equal(buffer, found[name]):
            return f"buffer {name!r} is another one afterwards"
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = one == other
    return bool((same | (one.isnan() & other.isnan())).all()) if one.is_floating_point() else bool(same.all())


def other_batch(leaves: Sequence[Tensor], batch_axis: int = 0) -> list[Tensor]:
    """The leaves with one sample more, where they hold samples; ``batch_axis`` is that of the first leaf."""
    size = leaves[0].shape[batch_axis] if leaves[0].dim() > batch_axis else 0
    return resized(leaves, batch_axis, size + 1) if size else list(leaves)


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
        elif not _equal(one, other):
            return f"output {position} differs by up to {(one - other).abs().max().item():.3g}"
    return None
