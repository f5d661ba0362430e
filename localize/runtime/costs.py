"""What the jobs of a schedule cost: numbers given, or those of a plan on devices of a known speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Real
from typing import cast

from localize.errors import ConfigError, problem_list
from localize.spec import Plan

Time = float | Fraction
Cost = Time | Sequence[Time]
"""A cost of every part (or boundary), or one each, for a whole batch, in any unit of time."""

_BACKWARD = 2  # a backward pass computes two products for each of the forward pass: for inputs and for weights


@dataclass(frozen=True)
class Costs:
    """What the jobs of every part cost, for a whole batch, in one unit of time.

    Args:
        forward: the part's forward pass; the activations leave right after it.
        loss: the head and its loss, forward and backward; parts without a loss have none of it.
        backward: one backward pass through the part that trains it.
        update: the optimizer's step.
        relay: a backward pass that only passes gradients on; None: as ``backward``.
        feedback: the head's second backward pass, where it learns from feedback.
        transfer: the way across a boundary of a batch's activations, or of their gradients.
    """

    forward: Cost = 1
    loss: Cost = 0
    backward: Cost = 1
    update: Cost = 0
    relay: Cost | None = None
    feedback: Cost = 0
    transfer: Cost = 0

    def problems(self, parts: int) -> Iterator[str]:
        """What is wrong with them, for so many parts."""
        for each in fields(self):
            value, count = getattr(self, each.name), parts - (each.name == "transfer")
            if value is None and each.name == "relay":
                continue
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if listed and len(value) != count:
                where = "boundary" if each.name == "transfer" else "part"
                yield f"{each.name} has {len(value)} costs; {parts} parts take one number or {count}, one a {where}."
            if not all(_is_cost(v) for v in (value if listed else [value])):
                yield f"{each.name}={value!r}: a cost is a finite number of at least 0."

    def of(self, name: str, position: int, pieces: int = 1) -> Time:
        """The cost called ``name`` of the part (or boundary) at ``position``, from 0, divided by ``pieces``.

        Exact where the cost is an integer or a fraction.
        """
        value = getattr(self, name)
        if value is None:
            return self.of("backward", position, pieces)
        cost = cast(Time, value[position] if isinstance(value, Sequence) else value)
        if pieces == 1:
            return cost
        return cost / pieces if isinstance(cost, float) else Fraction(cost) / pieces


def costs_of_plan(
    plan: Plan,
    *,
    flops: float | Sequence[float] | None = None,
    bandwidth: float | None = None,
    samples: int | None = None,
    heads: bool = True,
    feedback: bool = False,
) -> Costs:
    """What the parts of a plan cost, in seconds a batch.

    A backward pass counts as twice the forward pass, one that only passes gradients on as once. The head's forward
    pass counts with the part's, since a stage sends its activations after both. Updates count nothing.

    Args:
        plan: with costs at the batch size of its example.
        flops: floating-point operations a second that a device reaches, or one number a part; None: the forward
            milliseconds that the plan measured (``balance="time"``).
        bandwidth: bytes a second across a boundary, in each direction; None: transfers take no time.
        samples: of a batch; costs grow in proportion. None: as in the plan's example.
        heads: whether to count the heads.
        feedback: whether heads learn from feedback: their loss's gradient goes to the part only, a second backward
            pass trains the head.

    Raises:
        ConfigError: values that make no sense, or a plan without what is needed, all at once.
    """
    count = len(plan.parts)
    speeds = list(flops) if isinstance(flops, Sequence) else [flops] * count
    measured = [part.total.time_ms for part in plan.parts]
    problems = []
    if len(speeds) != count:
        problems.append(f"flops has {len(speeds)} numbers; {count} parts take one, or one each.")
    if not all(speed is None or (_is_cost(speed) and float(speed) > 0) for speed in speeds):
        problems.append(f"flops={flops!r}: floating-point operations a second, a positive number or one a part.")
    if flops is None and None in measured:
        problems.append("the plan holds no measured times; give flops, what a device reaches, or balance by time.")
    if bandwidth is not None and not (_is_cost(bandwidth) and bandwidth > 0):
        problems.append(f"bandwidth={bandwidth!r}: bytes a second, a positive number.")
    if samples is not None and not (isinstance(samples, int) and samples > 0):
        problems.append(f"samples={samples!r} is not a positive integer.")
    if problems:
        raise ConfigError(problem_list("The plan's costs cannot be had", problems))
    scale = 1.0 if samples is None else samples / samples_of(plan)
    parts: list[float] = []
    tops: list[float] = []
    for part, speed in zip(plan.parts, speeds, strict=True):
        for cost, seconds in ((part.part, parts), (part.head, tops)):
            own = (cost.time_ms or 0.0) / 1e3 if speed is None else cost.flops / speed
            seconds.append(own * scale if heads or seconds is parts else 0.0)
    return Costs(
        forward=[part + top for part, top in zip(parts, tops, strict=True)],
        loss=[top * (1 if feedback else _BACKWARD) for top in tops],
        backward=[part * _BACKWARD for part in parts],
        relay=parts,
        feedback=[top * _BACKWARD for top in tops],
        transfer=[0.0 if bandwidth is None else b.crossing_bytes * scale / bandwidth for b in plan.boundaries],
    )


def samples_of(plan: Plan) -> int:
    """The batch size that a plan's costs are for.

    Raises:
        ConfigError: none of its inputs has a batch axis.
    """
    for spec in plan.inputs:
        if spec.batch_axis is not None:
            return spec.shape[spec.batch_axis]
    raise ConfigError("The plan's inputs have no batch axis, so its costs are for no number of samples that is known.")


def _is_cost(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
