"""How fast a plan will train: its costs on devices and links of known speed, run through a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localize.heads.base import Method
from localize.runtime.costs import Costs
from localize.runtime.schedule import Order
from localize.runtime.simulate import simulate
from localize.runtime.timeline import Timeline, Unit


@dataclass(frozen=True)
class Prediction:
    """What a schedule comes to once it runs evenly.

    ``step`` is the time a batch, in the costs' unit; ``slowest`` the part with the most work of its own and
    ``slowest_work`` that work a batch, which no schedule can beat; ``timeline`` shows the first batches.
    """

    timeline: Timeline
    step: float
    slowest: int
    slowest_work: float

    @property
    def efficiency(self) -> float:
        """The slowest part's own work over the time a batch takes: 1 where nothing is waited for."""
        return self.slowest_work / self.step if self.step else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the timeline apart."""
        return {
            "step": self.step,
            "slowest_part": self.slowest,
            "slowest_part_work": self.slowest_work,
            "efficiency": self.efficiency,
        }


def predict(
    method: Method,
    costs: Costs,
    *,
    parts: int,
    batches: int,
    microbatches: int = 1,
    window: int | None = None,
    order: Order = "stage",
    unit: Unit = "steps",
) -> Prediction:
    """The time a batch, from batches after a start that fills the pipe: arguments as of ``simulate``.

    ``batches`` is how many the timeline shows.

    Raises:
        ConfigError: costs, numbers or an order that make no sense, all at once.
    """

    def timeline(count: int) -> Timeline:
        arguments: dict[str, Any] = {"parts": parts, "microbatches": microbatches, "window": window, **vars(costs)}
        return simulate(method, batches=count, order=order, unit=unit, **arguments)

    shown, start = timeline(batches), 4 * parts
    once, twice = timeline(start), timeline(2 * start)
    work = {part: twice.busy(part) / (2 * start) for part in twice.parts}
    slowest = max(work, key=lambda part: work[part], default=1)
    return Prediction(shown, (twice.end - once.end) / start, slowest, work.get(slowest, 0.0))
