"""What a batch that is not finite must leave behind: nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from localize.errors import LocalizeError
from localize.runtime.stage import Stage
from localize.weights import fill


class Buffers:
    """Buffers of stages before a batch, to be put back where the update is left out.

    A skipped update is not enough: one NaN in a running mean stays there for good.
    """

    def __init__(self) -> None:
        self._before: dict[int, list[_Before]] = {}

    def remember(self, stage: Stage) -> None:
        """Before the stage's forward pass, which may give a module's buffer another tensor."""
        self._before[stage.number] = [
            _Before(module, dict(module._buffers.items()))
            for half in (stage.part, stage.head)
            for module in (half.modules() if half is not None else ())
        ]

    def put_back(self, number: int) -> None:
        """After the batch, for a part that was skipped: the same tensors, in the same memory, with the same values."""
        with torch.no_grad():
            for before in self._before.pop(number, []):
                before.put_back()

    def forget(self) -> None:
        """After the batch, for all others."""
        self._before.clear()


@dataclass
class _Before:
    """The buffers of one module."""

    module: nn.Module
    buffers: dict[str, Tensor | None]

    kept: list[_Kept] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = [_Kept(buffer) for buffer in self.buffers.values() if buffer is not None]

    def put_back(self) -> None:
        table, now = self.module._buffers, dict(self.module._buffers.items())  # a scripted module's is no dict
        for name in now.keys() - self.buffers.keys():
            del table[name]
        for name, buffer in self.buffers.items():
            if name not in now or now[name] is not buffer:
                table[name] = buffer
        for kept in self.kept:
            kept.put_back()


class _Kept:
    """A buffer with the memory that it had, and a copy of its values."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.memory = buffer, buffer.data  # a change that is undone is none: it counts no version
        self.values = self.memory.clone()

    def put_back(self) -> None:
        strided = self.buffer.layout is self.memory.layout is torch.strided
        if strided and not self.buffer.is_set_to(self.memory):  # by ``buffer.data = …``
            self.buffer.data = self.memory
        fill(self.memory, self.values)


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
