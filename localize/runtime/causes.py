"""Why a run of several processes ended: the first failure, and what all others raise because of it."""

from __future__ import annotations

from dataclasses import dataclass

from localize.errors import WireError


@dataclass(frozen=True)
class Cause:
    """The first failure of a run. ``step`` counts from 1, as messages for people do; 0: before the first."""

    rank: int
    parts: str
    step: int
    edge: str | None
    error: str
    gone: bool = False  # its process, which therefore said nothing itself

    def __str__(self) -> str:
        edge = f", edge {self.edge}" if self.edge else ""
        return f"rank {self.rank} ({self.parts}) at step {self.step}{edge}: {self.error}"


class Stopped(WireError):
    """Another rank failed, and so this one stops; ``cause`` is that rank's failure.

    ``tells``: the other one cannot tell of it any more, and this is the rank to do so.
    """

    def __init__(self, message: str, cause: Cause, tells: bool = False) -> None:
        super().__init__(message)
        self.cause, self.tells = cause, tells
