"""What every part did and when, simulated or measured: totals, a text, a Chrome trace.

    part 1 │FB··FB··FB··
    part 2 │·FbBFbBFbB··      one column a time step
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from localize.errors import ConfigError, problem_list

Kind = Literal["forward", "head", "backward", "update", "wait"]
Unit = Literal["steps", "s"]

LETTERS = {"forward": "F", "head": "L", "backward": "B", "relay": "b", "update": "U", "wait": "·"}
_MICROSECONDS = {"steps": 1e3, "s": 1e6}  # of one unit in a trace: viewers know no time steps
_MOST_PROBLEMS = 10


@dataclass(frozen=True)
class Interval:
    """Part ``part`` did ``kind`` for ``batch`` (all from 1) from ``start`` to ``end``, in the timeline's unit.

    ``micro`` is the micro-batch, None for what is done once a batch; ``losses`` are the parts whose losses'
    gradients a backward pass carried, ``trains`` whether it trained the part or only passed them on; ``waits_for``
    is what a wait was for, as a person reads it.
    """

    part: int
    batch: int
    kind: Kind
    start: float
    end: float
    micro: int | None = None
    losses: tuple[int, ...] = ()
    trains: bool = True
    waits_for: str = ""

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def label(self) -> str:
        """``relay`` for a backward pass that trains nothing here; else the kind."""
        return "relay" if self.kind == "backward" and not self.trains else self.kind


@dataclass(frozen=True)
class Timeline:
    """Intervals of all parts, in any order of arrival; those of one part do not overlap.

    ``ranks`` are the parts of each rank, where ranks have several.

    Raises:
        ConfigError: intervals that end before they start, overlap or have an unknown kind, all at once.
    """

    intervals: tuple[Interval, ...]
    unit: Unit = "steps"
    title: str = ""
    ranks: tuple[range, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.intervals, key=lambda each: (each.part, each.start, each.end)))
        object.__setattr__(self, "intervals", ordered)
        problems = list(_problems(ordered))
        if problems:
            left = len(problems) - _MOST_PROBLEMS
            more = [f"and {left} more"] if left > 0 else []
            raise ConfigError(problem_list("This is no timeline", [*problems[:_MOST_PROBLEMS], *more]))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """The numbers of the parts, ascending."""
        return tuple(sorted({each.part for each in self.intervals}))

    @cached_property
    def start(self) -> float:
        return min((each.start for each in self.intervals), default=0.0)

    @cached_property
    def end(self) -> float:
        return max((each.end for each in self.intervals), default=0.0)

    @property
    def steps(self) -> float:
        """From the first start to the last end: time steps, or seconds where measured."""
        return self.end - self.start

    @cached_property
    def _by_part(self) -> dict[int, tuple[Interval, ...]]:
        found: dict[int, list[Interval]] = defaultdict(list)
        for each in self.intervals:
            found[each.part].append(each)
        return {part: tuple(own) for part, own in found.items()}

    def of(self, part: int) -> tuple[Interval, ...]:
        """One part's intervals, in order of time."""
        return self._by_part.get(part, ())

    def row(self, part: int) -> str:
        """What a person calls a part's row: ``part 3``, or ``rank 1, part 3``."""
        ranks = [rank for rank, numbers in enumerate(self.ranks) if part in numbers]
        return f"rank {ranks[0]}, part {part}" if ranks else f"part {part}"

    def busy(self, part: int) -> float:
        """How long a part worked: all its intervals but the waits."""
        return sum(each.duration for each in self.of(part) if each.kind != "wait")

    @property
    def idle_share(self) -> float:
        """The share of all parts' (ranks') time, from first start to last end, in which they did not work; 0 to 1."""
        whole = self.steps * len(self.ranks or self.parts)
        return 1 - sum(map(self.busy, self.parts)) / whole if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": self.title,
            "unit": self.unit,
            "steps": self.steps,
            "idle_share": self.idle_share,
            "busy": {str(part): self.busy(part) for part in self.parts},
            **({"ranks": [list(numbers) for numbers in self.ranks]} if self.ranks else {}),
            "intervals": [dict(vars(each)) for each in self.intervals],
        }

    def to_trace(self, path: str | Path) -> None:
        """Writes a trace for ``chrome://tracing`` or ui.perfetto.dev, a row a part; one time step shows as 1 ms.

        The file's folder is made where there is none.
        """
        scale = _MICROSECONDS[self.unit]
        events: list[dict[str, Any]] = [_named("process_name", 0, self.title or "localize")]
        events += [_named("thread_name", part, f"part {part}") for part in self.parts]
        for each in self.intervals:
            known = vars(each)
            events.append(
                {
                    "name": f"{each.label} {each.batch}" + (f".{each.micro}" if each.micro is not None else ""),
                    "cat": each.kind,
                    "ph": "X",
                    "ts": (each.start - self.start) * scale,
                    "dur": each.duration * scale,
                    "pid": 0,
                    "tid": each.part,
                    "args": {key: known[key] for key in ("batch", "micro", "losses", "trains", "waits_for")},
                }
            )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False))

    def text(self, columns: int = 120) -> str:
        """A row of letters a part, at most ``columns`` long, one a time step where they fit.

        F forward, L loss and head, B backward, b gradients passed on only, U update, · idle. Where a column is
        more than a time step (or the unit is seconds), it shows what its middle falls into.
        """
        if not self.steps:
            return ""
        whole = self.unit == "steps" and self.steps <= columns
        count = max(1, round(self.steps)) if whole else columns
        width = self.steps / count
        wide = len(str(self.parts[-1]))
        lines = []
        for part in self.parts:
            row = ["·"] * count
            for each in self.of(part):
                first, last = ((when - self.start) / width for when in (each.start, each.end))
                for column in range(math.ceil(first - 0.5), min(count, math.ceil(last - 0.5))):
                    row[column] = LETTERS[each.label]
            lines.append(f"part {part:>{wide}} │{''.join(row)}")
        return "\n".join(lines)


def _problems(ordered: Iterable[Interval]) -> Iterable[str]:
    before: Interval | None = None
    for each in ordered:
        if each.kind not in get_args(Kind):
            yield f"part {each.part}, batch {each.batch}: kind {each.kind!r} is none of {', '.join(get_args(Kind))}."
        if not each.start <= each.end:
            yield f"part {each.part}, batch {each.batch}: {each.kind} starts at {each.start} and ends at {each.end}."
        if before is not None and before.part == each.part and each.start < before.end:
            yield (
                f"part {each.part}: {before.kind} of batch {before.batch} ends at {before.end}, after the start of "
                f"{each.kind} of batch {each.batch} at {each.start}."
            )
        before = each


def _named(kind: str, part: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": part, "args": {"name": name}}
