"""What the jobs of a schedule cost: numbers given, or those of a plan on devices of a known speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Real
from typing import cast

from localize.errors import ConfigError, problem_list
from localize.spec import Cost as Spent
from localize.spec import Plan

Time = float | Fraction
Cost = Time | Sequence[Time]
"""A cost of every part (or boundary), or one each, for a whole batch, in any unit of time."""

_BACKWARD = 2  # a backward pass computes two products for each of the forward pass: for inputs and for weights
_HALF = 0.5  # of a backward pass: the products for inputs alone


@dataclass(frozen=True)
class Costs:
    """What the jobs of every part cost, for a whole batch, in one unit of time.

    Args:
        forward: what comes before the activations leave: the part's forward pass.
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
    head_first: bool = False,
) -> Costs:
    """What the parts of a plan cost, in seconds a batch.

    A backward pass counts as measured, or as twice the forward pass where that is not so; one that only passes
    gradients on as half of it. A head's forward and backward pass are its part's ``loss``, since the activations
    leave before them. Updates count nothing.

    Args:
        plan: with costs at the batch size of its example.
        flops: floating-point operations a second that a device reaches, or one number a part; None: the milliseconds
            that the plan measured (``balance="time"``).
        bandwidth: bytes a second across a boundary, in each direction; None: transfers take no time.
        samples: of a batch; costs grow in proportion. None: as in the plan's example.
        heads: whether to count the heads.
        feedback: whether heads below the last learn from feedback: their loss's gradient goes to the part only (half a
            backward pass), a second backward pass trains the head.
        head_first: whether the activations leave after the head's forward pass, which then counts with the part's:
            methods whose heads make the target of the part above (``Method.encodes_target``).

    Raises:
        ConfigError: values that make no sense, or a plan without what is needed, all at once.
    """
    count = len(plan.parts)
    speeds = list(flops) if isinstance(flops, Sequence) else [flops] * count
    measured = [part.total.forward_ms for part in plan.parts]
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
    parts = [_passes(part.part, speed, scale) for part, speed in zip(plan.parts, speeds, strict=True)]
    tops = [_passes(part.head, speed, scale if heads else 0.0) for part, speed in zip(plan.parts, speeds, strict=True)]
    losses = [back * (_HALF if feedback and k < count else 1) for k, (_, back) in enumerate(tops, 1)]
    before = [ahead if head_first else 0.0 for ahead, _ in tops]
    return Costs(
        forward=[ahead + first for (ahead, _), first in zip(parts, before, strict=True)],
        loss=[ahead - first + loss for (ahead, _), first, loss in zip(tops, before, losses, strict=True)],
        backward=[back for _, back in parts],
        relay=[back * _HALF for _, back in parts],
        feedback=[back for _, back in tops],
        transfer=[0.0 if bandwidth is None else b.crossing_bytes * scale / bandwidth for b in plan.boundaries],
    )


def _passes(cost: Spent, speed: float | None, scale: float) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass; ``speed`` in FLOPs a second, None: as measured."""
    ahead = (cost.forward_ms or 0.0) / 1e3 if speed is None else cost.flops / speed
    measured = cost.backward_ms is not None and speed is None
    back = (cost.backward_ms or 0.0) / 1e3 if measured else ahead * _BACKWARD
    return ahead * scale, back * scale


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
