"""What a batch that is not finite must leave behind: nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from localize.runtime.stage import Stage


class Buffers:
    """Buffers of stages before a batch, to be put back where the update is left out.

    A skipped update is not enough: one NaN in a running mean stays there for good.
    """

    def __init__(self) -> None:
        self._before: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def remember(self, stage: Stage) -> None:
        """Before the stage's forward pass."""
        held = [*stage.part.buffers(), *(stage.head.buffers() if stage.head is not None else ())]
        self._before[stage.number] = [(buffer, buffer.detach().clone()) for buffer in held]

    def put_back(self, number: int) -> None:
        """After the batch, for a part that was skipped."""
        with torch.no_grad():
            for buffer, before in self._before.pop(number, []):
                buffer.copy_(before)

    def forget(self) -> None:
        """After the batch, for all others."""
        self._before.clear()
