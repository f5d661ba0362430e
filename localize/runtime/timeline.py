"""What every part did and when, simulated or measured: totals, a text, a Chrome trace.

    part 1 │FB··FB··FB··
    part 2 │·FbBFbBFbB··      one column a time step, where they fit
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from localize.errors import ConfigError, problem_list
from localize.runtime.files import written

Kind = Literal["forward", "head", "backward", "update", "wait"]
Unit = Literal["steps", "s"]

LETTERS = {"forward": "F", "head": "L", "backward": "B", "relay": "b", "update": "U", "wait": "·"}
_MICROSECONDS = {"steps": 1e3, "s": 1e6}  # of one unit in a trace: viewers know no time steps
_MOST_PROBLEMS = 10
_CLOSE = 1e-6  # of a column: as good as equal


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
        write_trace([self], path)

    def text(self, columns: int = 120) -> str:
        """A row of letters a part, at most ``columns`` long; see ``column``.

        F forward, L loss and head, B backward, b gradients passed on only, U update, · idle. Where things begin or
        end within a column, it shows what its middle falls into.
        """
        if not self.steps:
            return ""
        width = self.column(columns)
        count = max(1, round(self.steps / width))
        numbers = len(str(self.parts[-1]))
        names = {part: self.row(part).removesuffix(str(part)) for part in self.parts}
        wide, lines = max(map(len, names.values())), []
        for part in self.parts:
            row = ["·"] * count
            for each in self.of(part):
                first, last = ((when - self.start) / width for when in (each.start, each.end))
                for column in range(math.ceil(first - 0.5), min(count, math.ceil(last - 0.5))):
                    row[column] = LETTERS[each.label]
            lines.append(f"{names[part]:<{wide}}{part:>{numbers}} │{''.join(row)}")
        return "\n".join(lines)

    def column(self, columns: int = 120) -> float:
        """How long what a column of the text shows is.

        Where beginnings and ends are all multiples of a time that keeps the row within ``columns``: the longest such
        time, or as much of it as makes a time step at most. Else, and in seconds always: rows are as long as that.
        """
        times = {when - self.start for each in self.intervals for when in (each.start, each.end)}
        if self.unit == "steps" and len(times) <= columns + 1:  # else there are more of them than columns have edges
            shares = [time / self.steps for time in times]
            count = math.lcm(*(Fraction(share).limit_denominator(columns).denominator for share in shares))
            if count <= columns and all(abs(share * count - round(share * count)) < _CLOSE for share in shares):
                finer = count * math.ceil(self.steps / count - _CLOSE)
                return self.steps / (finer if finer <= columns else count)
        return self.steps / columns


def write_trace(timelines: Sequence[Timeline], path: str | Path) -> None:
    """Writes a trace of timelines of one unit; each is a process of its own, with a row a part. See ``to_trace``."""
    events: list[dict[str, Any]] = []
    start = min((timeline.start for timeline in timelines), default=0.0)
    for number, timeline in enumerate(timelines):
        events.append(_named("process_name", number, 0, timeline.title or "localize"))
        events += [_named("thread_name", number, part, timeline.row(part)) for part in timeline.parts]
        events += [_event(each, number, start, _MICROSECONDS[timeline.unit]) for each in timeline.intervals]
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)
    written(Path(path), lambda file: file.write_text(text))


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


def _named(kind: str, process: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}


def _event(each: Interval, process: int, start: float, scale: float) -> dict[str, Any]:
    known = vars(each)
    return {
        "name": f"{each.label} {each.batch}" + (f".{each.micro}" if each.micro is not None else ""),
        "cat": each.kind,
        "ph": "X",
        "ts": (each.start - start) * scale,
        "dur": each.duration * scale,
        "pid": process,
        "tid": each.part,
        "args": {key: known[key] for key in ("batch", "micro", "losses", "trains", "waits_for")},
    }
