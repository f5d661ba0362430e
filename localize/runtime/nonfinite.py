"""What a batch that is not finite must leave behind: nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localize.errors import LocalizeError
from localize.runtime.stage import Stage


class Buffers:
    """Buffers of stages before a batch, to be put back where the update is left out.

    A skipped update is not enough: one NaN in a running mean stays there for good.
    """

    def __init__(self) -> None:
        self._before: dict[int, list[tuple[nn.Module, str, Tensor | None, Tensor | None]]] = {}

    def remember(self, stage: Stage) -> None:
        """Before the stage's forward pass, which may give a module's buffer another tensor."""
        self._before[stage.number] = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for half in (stage.part, stage.head)
            for module in (half.modules() if half is not None else ())
            for name, buffer in module._buffers.items()
        ]

    def put_back(self, number: int) -> None:
        """After the batch, for a part that was skipped: the same tensors, with the values that they had."""
        with torch.no_grad():
            for module, name, buffer, before in self._before.pop(number, []):
                if buffer is not None and before is not None:
                    if (buffer.shape, buffer.dtype) != (before.shape, before.dtype):
                        buffer.data = before
                    else:
                        buffer.copy_(before)
                module._buffers[name] = buffer

    def forget(self) -> None:
        """After the batch, for all others."""
        self._before.clear()


def check_weights(stages: Sequence[Stage], step: int) -> None:
    """Makes sure that no checkpoint is written of weights from which training cannot go on.

    A loss is looked at before each update, but finite losses can have gradients that are not (√x at 0).

    Raises:
        LocalizeError: weights are not finite; the message names the parts.
    """
    weights = {stage.number: [*stage.parameters("part"), *stage.parameters("head")] for stage in stages}
    with torch.no_grad():
        flags = {n: [p.isfinite().all() for p in held] for n, held in weights.items() if held}
        broken = [n for n, each in flags.items() if not torch.stack(each).all()]  # one wait a part, on a GPU
    if broken:
        raise LocalizeError(
            f"After step {step}, weights of part {', '.join(map(str, broken))} of {stages[0].parts} are not finite, "
            "though the losses were: a gradient was not. No checkpoint was written and the last one is intact. Clip "
            "gradients (clip_grad_norm=1.0), lower the learning rate, or pass on_nonfinite='skip'."
        )
