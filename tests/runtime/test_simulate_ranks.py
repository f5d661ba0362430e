"""Fewer ranks than parts: cases by hand, and what holds for every schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localize import get_method
from localize.errors import ConfigError
from localize.heads.base import Method
from localize.heads.nwise import NWise
from localize.runtime.costs import Costs
from localize.runtime.placement import assign
from localize.runtime.predict import predict
from localize.runtime.schedule import schedule
from localize.runtime.simulate import shared, simulate, work
from localize.runtime.timeline import Interval, Timeline
from tests.runtime.test_simulate import COST, SIZES, anything, no_faster_at_a_higher_cost

# By hand.


@pytest.mark.parametrize("b", [1, 2, 5])
def test_four_parts_on_two_ranks(b: int) -> None:
    """Rank 0 takes F1 B1 F2 B2, 4 steps a batch; rank 1 starts when F2 is done, after 3, and takes as long."""
    for method in ("early_exit", "scpl", "al", NWise(reach=1)):
        found = simulate(method, parts=4, batches=b, ranks=2)
        assert found.ranks == (range(1, 3), range(3, 5))
        assert found.steps == 3 + 4 * b


def test_four_parts_on_two_ranks_box_by_box() -> None:
    found = simulate("early_exit", parts=4, batches=2, loss=1, ranks=2)
    assert found.text() == (
        "rank 0, part 1 │FLB···FLB·······\n"
        "rank 0, part 2 │···FLB···FLB····\n"
        "rank 1, part 3 │····FLB···FLB···\n"
        "rank 1, part 4 │·······FLB···FLB"
    )


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_one_rank_is_the_sequential_executor(a: int, b: int) -> None:
    for method in ("early_exit", "al", "lct", "bp", "joint", NWise(reach=2)):
        costs: dict[str, Any] = {"forward": 2, "loss": 3, "backward": 4, "update": 1, "relay": 5, "feedback": 6}
        found = simulate(method, parts=a, batches=b, transfer=7, window=1, ranks=1, **costs)
        chosen = get_method(method) if isinstance(method, str) else method
        one = work(schedule(chosen, parts=a, batches=1), Costs(**costs))
        assert found.steps == b * sum(one.values())
        if chosen.name == "early_exit":
            assert found.steps == b * a * (2 + 3 + 4 + 1)
        assert found.idle_share == 0
        assert all(each.kind != "wait" for each in found.intervals)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_end_to_end_takes_as_long_on_any_number_of_ranks(ranks: int) -> None:
    """One part works at a time, wherever it is; 2ab."""
    assert simulate("bp", parts=4, batches=3, ranks=ranks).steps == 2 * 4 * 3


def test_two_wise_on_two_ranks() -> None:
    """L2 trains part 1 through part 2, L3 part 2 through part 3 (another rank), L4 both parts of that one."""
    found = simulate(NWise(reach=2), parts=4, batches=1, ranks=2)
    assert boxes(found) == [
        (1, "forward", 0, 1),
        (2, "forward", 1, 2),
        (2, "relay", 2, 3),
        (3, "forward", 2, 3),
        (1, "backward", 3, 4),
        (3, "relay", 3, 4),
        (2, "backward", 4, 5),
        (4, "forward", 4, 5),
        (4, "backward", 5, 6),
        (3, "backward", 6, 7),
    ]


def test_micro_batches_on_two_ranks() -> None:
    """Each rank has a piece go through all its parts before it takes the next one."""
    found = simulate("bp", parts=4, batches=1, microbatches=2, forward=2, backward=2, ranks=2)
    rows = {part: [(each.micro, each.label[0], each.start) for each in working(found, part)] for part in found.parts}
    assert rows == {
        1: [(1, "f", 0), (2, "f", 2), (2, "b", 9), (1, "b", 11)],
        2: [(1, "f", 1), (2, "f", 3), (2, "b", 8), (1, "b", 10)],
        3: [(1, "f", 2), (2, "f", 4), (2, "b", 7), (1, "b", 9)],
        4: [(1, "f", 3), (2, "f", 5), (2, "b", 6), (1, "b", 8)],
    }
    assert found.steps == 12


@pytest.mark.parametrize("microbatches", [2, 3, 4])
def test_gpipe_on_two_ranks_is_gpipe_of_two_larger_parts(microbatches: int) -> None:
    """The first rank once did all micro-batches of part 1 before any of part 2, and the first one left late."""
    found = simulate("bp", parts=4, batches=10, microbatches=microbatches, ranks=2)
    merged = simulate("bp", parts=2, batches=10, microbatches=microbatches, forward=2, backward=2)
    assert found.steps == merged.steps


def test_1f1b_on_two_ranks_is_1f1b_of_two_larger_parts() -> None:
    for m in (1, 2, 5):
        four = simulate("bp", parts=4, batches=3, microbatches=m, order="1f1b", ranks=2)
        two = simulate("bp", parts=2, batches=3, microbatches=m, order="1f1b", forward=2, backward=2)
        assert four.steps == two.steps
    four = simulate("bp", parts=4, batches=7, order="hogwild", ranks=2)
    two = simulate("bp", parts=2, batches=7, order="hogwild", forward=2, backward=2)
    assert four.steps == two.steps


def test_transfers_within_a_rank_are_free() -> None:
    """3 until part 2 is done, 5 on the way, 4 for the batch; and 5 a batch where the link sets the pace."""
    assert simulate("scpl", parts=4, batches=1, transfer=(50, 5, 50), ranks=2).steps == 3 + 5 + 4
    ten, twenty = (simulate("scpl", parts=4, batches=b, transfer=(50, 5, 50), ranks=2).steps for b in (10, 20))
    assert twenty - ten == 50


def test_a_wait_holds_up_all_parts_of_a_rank() -> None:
    """Part 2 waits for the feedback of part 3, 3 + 9, and part 1 does not start on its next batch meanwhile."""
    found = simulate("lct", parts=3, batches=2, forward=(1, 1, 9), ranks=(range(1, 3), range(3, 4)))
    (wait, *_) = [each for each in found.of(2) if each.kind == "wait"]
    assert (wait.start, wait.end, wait.waits_for) == (4, 12, "feedback from above")
    assert [each.start for each in found.of(1) if each.kind == "forward"] == [0, 12]


# The assignment.


def test_the_busiest_rank_has_least_to_do() -> None:
    """By all that a part does for a batch, not by its forward pass alone."""
    found = simulate("scpl", parts=4, batches=1, forward=(4, 1, 1, 1), backward=(0, 1, 1, 6), ranks=2)
    assert found.ranks == (range(1, 4), range(4, 5))
    assert assign([4, 2, 2, 7], 2) == found.ranks
    assert shared(get_method("scpl"), Costs(update=(3, 0, 0, 0)), 4, 2) == (range(1, 2), range(2, 5))


def test_as_many_ranks_as_parts_is_one_each() -> None:
    alone = simulate("nwise", parts=4, batches=3)
    assert simulate("nwise", parts=4, batches=3, ranks=4) == alone
    assert alone.ranks == ()
    assert "ranks" not in alone.to_dict()


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        (0, "ranks=0"),
        (True, "ranks=True"),
        (4, "ranks=4 is more than the 3 parts"),
        ((range(1, 3),), "they have the parts 1 to 3"),
    ],
)
def test_ranks_that_make_no_sense(ranks: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        simulate("bp", parts=3, batches=2, forward=-1, ranks=ranks)
    assert "forward=-1" in str(caught.value)


def test_a_prediction_of_fewer_ranks() -> None:
    costs = Costs(forward=(1, 3, 1, 1), backward=(1, 5, 1, 1))
    found = predict(get_method("scpl"), costs, parts=4, batches=2, ranks=2)
    assert found.timeline.ranks == (range(1, 3), range(3, 5))
    assert (found.step, found.slowest, found.slowest_work, found.efficiency) == (10, 0, 10, 1)
    assert list(found.to_dict()) == ["step", "slowest_rank", "slowest_rank_work", "efficiency"]
    assert found.timeline.title == "scpl, 4 parts on 2 ranks, 2 batches"


# Every schedule.


@st.composite
def on_ranks(draw: st.DrawFn) -> tuple[Method, dict[str, Any]]:
    method, case = draw(anything())
    ends = sorted(draw(st.sets(st.integers(1, case["parts"] - 1)))) if case["parts"] > 1 else []
    edges = [0, *ends, case["parts"]]
    case["ranks"] = tuple(range(low + 1, high + 1) for low, high in pairwise(edges))
    case["window"] = None
    return method, case


def working(found: Timeline, part: int) -> list[Interval]:
    return [each for each in found.of(part) if each.kind != "wait"]


def boxes(found: Timeline) -> list[tuple[int, str, float, float]]:
    return [
        (each.part, each.label, each.start, each.end)
        for each in sorted(found.intervals, key=lambda each: (each.start, each.part))
        if each.kind != "wait"
    ]


@settings(deadline=None, max_examples=200)
@given(on_ranks())
def test_a_rank_does_one_thing_at_a_time(given_case: tuple[Method, dict[str, Any]]) -> None:
    method, case = given_case
    found = simulate(method, **case)
    for numbers in case["ranks"]:
        own = sorted((each for part in numbers for each in found.of(part)), key=lambda each: (each.start, each.end))
        assert not own or own[0].start == 0
        assert all(before.end == after.start for before, after in pairwise(own))  # what is no work is a wait


@settings(deadline=None, max_examples=200)
@given(on_ranks())
def test_all_is_done_and_no_rank_is_faster_than_its_work(given_case: tuple[Method, dict[str, Any]]) -> None:
    method, case = given_case
    found, alone = simulate(method, **case), simulate(method, **case | {"ranks": None})
    for part in range(1, case["parts"] + 1):
        assert found.busy(part) == pytest.approx(alone.busy(part))
    most = max(sum(map(found.busy, numbers)) for numbers in case["ranks"])
    assert found.steps >= most - 1e-9
    if len(case["ranks"]) == 1:
        assert found.steps == pytest.approx(most)


@settings(deadline=None, max_examples=200)
@given(on_ranks())
def test_a_rank_a_part_is_never_slower(given_case: tuple[Method, dict[str, Any]]) -> None:
    """Where transfers take no time, sharing a rank only adds things to wait for."""
    method, case = given_case
    case["transfer"] = 0
    if case.get("order", "stage") == "stage":
        assert simulate(method, **case | {"ranks": None}).steps <= simulate(method, **case).steps + 1e-9


@settings(deadline=None, max_examples=150)
@given(on_ranks(), st.data())
def test_nothing_gets_faster_where_something_costs_more(
    given_case: tuple[Method, dict[str, Any]], data: st.DataObject
) -> None:
    no_faster_at_a_higher_cost(*given_case, data)


@settings(deadline=None, max_examples=100)
@given(on_ranks(), COST)
def test_nothing_starts_before_what_it_needs(given_case: tuple[Method, dict[str, Any]], way: int) -> None:
    method, case = given_case
    case |= {"forward": [f + 1 for f in case["forward"]], "backward": [b + 1 for b in case["backward"]], "relay": None}
    case["transfer"] = way
    found = simulate(method, **case)
    first_of_rank = {numbers[0] for numbers in case["ranks"]}
    when = {
        (each.part, each.batch, each.micro, each.kind, loss): each
        for each in found.intervals
        if each.kind in ("forward", "backward")
        for loss in each.losses or (0,)
    }
    for (part, batch, micro, kind, loss), each in when.items():
        if part > 1 and kind == "forward":
            needed = way / case["microbatches"] if part in first_of_rank else 0
            assert each.start >= when[part - 1, batch, micro, "forward", 0].end + needed - 1e-9
        if kind == "backward":
            assert each.start >= when[part, batch, micro, "forward", 0].end
        if kind == "backward" and loss > part:
            needed = way / case["microbatches"] if part + 1 in first_of_rank else 0
            assert each.start >= when[part + 1, batch, micro, "backward", loss].end + needed - 1e-9
