"""From a plan's costs to samples a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from localize import get_method, to_local
from localize.errors import ConfigError
from localize.heads.nwise import NWise
from localize.runtime.costs import Costs, costs_of_plan, samples_of
from localize.runtime.predict import predict
from localize.spec import Boundary, Cost, PartCost, Plan, TensorSpec

INPUT = TensorSpec((4, 8))


def plan(
    flops: list[float],
    heads: list[float],
    crossing_bytes: int = 1000,
    forward_ms: list[float] | None = None,
    backward_ms: list[float] | None = None,
) -> Plan:
    """Parts with these forward FLOPs at a batch size of 4; a head takes half as long as its part."""
    times, back = forward_ms or [None] * len(flops), backward_ms or [None] * len(flops)
    parts = tuple(
        PartCost(k, f"from{k}", f"to{k}", Cost(own, 0, 0, ms, ms_back), Cost(head, 0, 0, _half(ms), _half(ms_back)))
        for k, (own, head, ms, ms_back) in enumerate(zip(flops, heads, times, back, strict=True), 1)
    )
    boundaries = tuple(Boundary(k, f"to{k}", "x", ("x",), INPUT, crossing_bytes) for k in range(1, len(flops)))
    return Plan("Net", "scpl", "flops", (), boundaries, parts, (TensorSpec((3,), batch_axis=None), INPUT))


def _half(ms: float | None) -> float | None:
    return None if ms is None else ms / 2


def test_costs_by_hand() -> None:
    found = costs_of_plan(plan([100, 200], [10, 0]), flops=100.0, bandwidth=500.0)
    assert found == Costs(
        forward=[1.0, 2.0],
        loss=[0.1 + 0.2, 0.0],
        backward=[2.0, 4.0],
        update=0,
        relay=[1.0, 2.0],
        feedback=[0.2, 0.0],
        transfer=[2.0],
    )


def test_heads_that_come_first() -> None:
    """They make the target of the part above, so that their forward pass is part of what it waits for."""
    found = costs_of_plan(plan([100, 200], [10, 50]), flops=100.0, head_first=True)
    assert (found.forward, found.loss, found.backward) == ([1.1, 2.5], [0.2, 1.0], [2.0, 4.0])
    bare = costs_of_plan(plan([100, 200], [10, 50]), flops=100.0, head_first=True, heads=False)
    assert (bare.forward, bare.loss) == ([1.0, 2.0], [0.0, 0.0])


def test_heads_batch_size_and_speeds() -> None:
    given = plan([100, 200], [10, 20])
    bare = costs_of_plan(given, flops=[100.0, 50.0], samples=8, heads=False)
    assert (bare.forward, bare.loss, bare.backward) == ([2.0, 8.0], [0.0, 0.0], [4.0, 16.0])
    assert bare.transfer == [0.0]
    assert costs_of_plan(given, flops=100.0, bandwidth=1000.0, samples=2).transfer == [0.5]
    assert samples_of(given) == 4


def test_heads_that_learn_from_feedback() -> None:
    """Forward, the gradient of the hidden state alone, and later a backward pass of their own; not so the last."""
    critics = costs_of_plan(plan([100, 200], [10, 20]), flops=100.0, feedback=True)
    assert (critics.loss, critics.feedback) == ([0.1 + 0.1, 0.2 + 0.4], [0.2, 0.4])


def test_measured_times() -> None:
    """Backward as measured, half of it to pass gradients on; where only forward was measured, twice that."""
    found = costs_of_plan(plan([100, 200], [10, 20], forward_ms=[2.0, 4.0], backward_ms=[3.0, 10.0]))
    assert (found.forward, found.backward, found.relay) == ([0.002, 0.004], [0.003, 0.01], [0.0015, 0.005])
    assert found.loss == pytest.approx([0.001 + 0.0015, 0.002 + 0.005])
    double = costs_of_plan(plan([100, 200], [10, 20], forward_ms=[2.0, 4.0], backward_ms=[3.0, 10.0]), samples=8)
    assert (double.forward, double.backward, double.relay) == ([0.004, 0.008], [0.006, 0.02], [0.003, 0.01])
    ahead = costs_of_plan(plan([100, 200], [10, 20], forward_ms=[2.0, 4.0]))
    assert (ahead.forward, ahead.backward, ahead.relay) == ([0.002, 0.004], [0.004, 0.008], [0.002, 0.004])
    by_flops = costs_of_plan(plan([100, 200], [0, 0], forward_ms=[2.0, 4.0], backward_ms=[9.0, 9.0]), flops=100.0)
    assert (by_flops.forward, by_flops.backward) == ([1.0, 2.0], [2.0, 4.0])


def test_the_slowest_part_sets_the_pace_of_a_local_method() -> None:
    costs = costs_of_plan(plan([100, 300, 200], [0, 0, 0]), flops=100.0)
    found = predict(get_method("scpl"), costs, parts=3, batches=2, unit="s")
    assert (found.slowest, found.slowest_work, found.step, found.efficiency) == (2, 9.0, 9.0, 1.0)
    whole = predict(get_method("bp"), costs, parts=3, batches=2, unit="s")
    assert whole.step == 18.0
    assert whole.efficiency == 0.5
    assert found.timeline.unit == "s"


def test_a_slow_link_sets_the_pace_when_it_must() -> None:
    given = plan([100, 100], [0, 0], crossing_bytes=1000)
    step = {
        bandwidth: predict(
            get_method("scpl"), costs_of_plan(given, flops=100.0, bandwidth=bandwidth), parts=2, batches=2, window=2
        ).step
        for bandwidth in (1e6, 1000.0, 500.0, 200.0)
    }
    assert step == pytest.approx({1e6: 3.0, 1000.0: 3.0, 500.0: 3.0, 200.0: 5.0})


def test_two_wise_by_hand() -> None:
    """F, way up, F above, B above, way down, B: 1 + t + 1 + 2 + t + 2, on part 1 of two."""
    costs = costs_of_plan(plan([100, 100], [0, 0], crossing_bytes=25), flops=100.0, bandwidth=100.0)
    assert predict(NWise(reach=2), costs, parts=2, batches=2).step == 6.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "no measured times"),
        ({"flops": 0.0}, "flops=0.0"),
        ({"flops": [1.0, 2.0, 3.0]}, "flops has 3 numbers; 2 parts"),
        ({"flops": 1.0, "bandwidth": -1.0}, "bandwidth=-1.0"),
        ({"flops": 1.0, "samples": 0}, "samples=0"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        costs_of_plan(plan([1, 2], [0, 0]), **options)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        costs_of_plan(plan([1, 2], [0, 0]), flops=-1.0, bandwidth=0.0, samples=0)
    assert len(str(caught.value).splitlines()) == 4


def test_costs_for_no_known_number_of_samples() -> None:
    odd = replace(plan([1], [0]), inputs=(TensorSpec((3,), batch_axis=None),))
    with pytest.raises(ConfigError, match="no batch axis"):
        samples_of(odd)


def test_a_real_plan() -> None:
    """Linear layers, 2·N·in·out FLOPs each; the prediction is the sum by hand."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    local = to_local(model, torch.randn(5, 8), method="bp", cuts=["1"])
    assert samples_of(local.plan) == 5
    costs = costs_of_plan(local.plan, flops=1000.0, bandwidth=64.0 * 5)
    first, last = 2 * 5 * 8 * 16 / 1000, 2 * 5 * 16 * 4 / 1000
    assert costs.forward == pytest.approx([first, last])
    assert costs.transfer == [1.0]  # 16 floats a sample
    found = predict(local.method, costs, parts=2, batches=3)
    assert found.step == pytest.approx(3 * (first + last) + 2)


def test_a_plan_by_time_needs_no_speed() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    local = to_local(model, torch.randn(5, 8), method="early_exit", cuts=["1"], balance="time")
    costs, parts = costs_of_plan(local.plan), [part.part for part in local.plan.parts]
    assert costs.forward == pytest.approx([(part.forward_ms or 0) / 1e3 for part in parts])
    assert costs.backward == pytest.approx([(part.backward_ms or 0) / 1e3 for part in parts])
    head = local.plan.parts[0].head
    assert costs.loss[0] == pytest.approx(head.of("time") / 1e3)
    assert min(*costs.forward, *costs.backward, *costs.loss) > 0
