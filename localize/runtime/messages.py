"""What stages tell each other, and how they ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from torch import Tensor

from localize.heads.base import Target
from localize.part import Stream


class Side(Enum):
    """A neighbour of a stage."""

    BELOW = -1
    ABOVE = 1


@dataclass(frozen=True)
class Upward:
    """What a part gives the part above: the values that cross the boundary, detached, and the target.

    Of a batch in micro-batches, the first one brings the target of all, and the others None.
    """

    stream: Stream
    target: Target


@dataclass(frozen=True)
class Relay:
    """Gradients of crossing values, on their way down to the parts that losses above train."""

    grads: Stream


@dataclass(frozen=True)
class Feedback:
    """The loss of every sample, (N), for the part below to learn from."""

    per_sample: Tensor


Message = Upward | Relay | Feedback


@dataclass(frozen=True)
class Send:
    """A stage's wish to send ``message`` to a neighbour; it does not wait for it to arrive."""

    to: Side
    message: Message


@dataclass(frozen=True)
class Receive:
    """A stage's wish for the next message of a neighbour; it waits for it."""

    source: Side


@dataclass(frozen=True)
class Begin:
    """A stage tells what it does next, and with which micro-batch (from 1), where there are several."""

    work: Literal["forward", "head", "backward"]
    micro: int | None = None


Action = Send | Receive | Begin
