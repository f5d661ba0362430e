"""How fast a plan will train: its costs on devices and links of known speed, run through a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from localize.heads.base import Method
from localize.runtime.costs import Costs
from localize.runtime.jobs import Order
from localize.runtime.schedule import schedule
from localize.runtime.simulate import ends, simulate, work
from localize.runtime.timeline import Timeline, Unit


@dataclass(frozen=True)
class Prediction:
    """What a schedule comes to once it runs evenly.

    ``step`` is the time a batch, in the costs' unit; ``slowest`` the part (where ranks have several: the rank, from 0)
    with the most work of its own and ``slowest_work`` that work a batch, which no schedule can beat; ``timeline`` shows
    the first batches.
    """

    timeline: Timeline
    step: float
    slowest: int
    slowest_work: float

    @property
    def efficiency(self) -> float:
        """The slowest part's (or rank's) own work over the time a batch takes: 1 where nothing is waited for."""
        return self.slowest_work / self.step if self.step else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the timeline apart."""
        who = "rank" if self.timeline.ranks else "part"
        return {
            "step": self.step,
            f"slowest_{who}": self.slowest,
            f"slowest_{who}_work": self.slowest_work,
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
    ranks: int | Sequence[range] | None = None,
) -> Prediction:
    """The time a batch, from batches after a start that fills the pipe: arguments as of ``simulate``.

    ``batches`` is how many the timeline shows.

    Raises:
        ConfigError: costs, numbers or an order that make no sense, all at once.
    """

    shape: dict[str, Any] = {"parts": parts, "microbatches": microbatches, "order": order}
    shown = simulate(method, batches=batches, window=window, unit=unit, ranks=ranks, **shape, **vars(costs))
    shape["ranges"] = shown.ranks or None
    start = 4 * parts
    if order == "hogwild":  # batches overlap, and the last ones do so otherwise
        once, twice = (ends(schedule(method, batches=n, **shape), costs, window)[-1] for n in (start, 2 * start))
    else:
        planned = schedule(method, batches=start, **shape)
        once, twice = ends(replace(planned, rounds=tuple(rounds * 2 for rounds in planned.rounds)), costs, window)
    own = work(schedule(method, batches=1, **shape), costs)
    todo = [float(sum(own[part] for part in numbers)) for numbers in shown.ranks] or [float(own[part]) for part in own]
    slowest = max(range(len(todo)), key=lambda place: todo[place])
    number = slowest if shown.ranks else slowest + 1
    return Prediction(shown, (twice - once) / start, number, todo[slowest])
