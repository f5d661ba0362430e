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
    flops: list[float], heads: list[float], crossing_bytes: int = 1000, time_ms: list[float] | None = None
) -> Plan:
    """Parts with these forward FLOPs at a batch size of 4."""
    times = time_ms or [None] * len(flops)
    parts = tuple(
        PartCost(k, f"from{k}", f"to{k}", Cost(own, time_ms=ms), Cost(head, time_ms=ms and ms / 2))
        for k, (own, head, ms) in enumerate(zip(flops, heads, times, strict=True), 1)
    )
    boundaries = tuple(Boundary(k, f"to{k}", "x", ("x",), INPUT, crossing_bytes) for k in range(1, len(flops)))
    return Plan("Net", "scpl", "flops", (), boundaries, parts, (TensorSpec((3,), batch_axis=None), INPUT))


def test_costs_by_hand() -> None:
    found = costs_of_plan(plan([100, 200], [10, 0]), flops=100.0, bandwidth=500.0)
    assert found == Costs(
        forward=[1.1, 2.0],  # with the head's, which comes before the activations are sent
        loss=[0.2, 0.0],
        backward=[2.0, 4.0],
        update=0,
        relay=[1.0, 2.0],
        feedback=[0.2, 0.0],
        transfer=[2.0],
    )


def test_heads_batch_size_and_speeds() -> None:
    given = plan([100, 200], [10, 20])
    bare = costs_of_plan(given, flops=[100.0, 50.0], samples=8, heads=False)
    assert (bare.forward, bare.loss, bare.backward) == ([2.0, 8.0], [0.0, 0.0], [4.0, 16.0])
    assert bare.transfer == [0.0]
    assert costs_of_plan(given, flops=100.0, bandwidth=1000.0, samples=2).transfer == [0.5]
    critics = costs_of_plan(given, flops=100.0, feedback=True)
    assert (critics.loss, critics.feedback) == ([0.1, 0.2], [0.2, 0.4])
    assert samples_of(given) == 4


def test_measured_times() -> None:
    found = costs_of_plan(plan([100, 200], [10, 20], time_ms=[2.0, 4.0]))
    assert (found.forward, found.backward) == ([0.003, 0.006], [0.004, 0.008])
    by_flops = costs_of_plan(plan([100, 200], [0, 0], time_ms=[2.0, 4.0]), flops=100.0)
    assert by_flops.forward == [1.0, 2.0]


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
