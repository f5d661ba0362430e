"""How long schedules take: the papers' laws, and a slow simulation written the obvious way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localize import get_method, list_methods
from localize.errors import ConfigError, MethodError
from localize.heads.base import Method
from localize.heads.nwise import NWise
from localize.runtime.messages import Side
from localize.runtime.schedule import Job, Round, Schedule, schedule
from localize.runtime.simulate import Costs, run, simulate
from localize.runtime.timeline import Timeline

SIZES = [(a, b) for a in range(1, 7) for b in (1, 2, 3, 5, 8)]
LAST_ONLY = {1: (1,), 2: (0, 1), 3: (0, 0, 1), 4: (0, 0, 0, 1), 5: (0, 0, 0, 0, 1)}
METHODS = [get_method(name) for name in list_methods()]
METHODS += [NWise(reach=n, gradient=g) for n in (1, 3, 4, 9) for g in ("furthest", "sum")]  # type: ignore[arg-type]

FIGURE_13 = {"parts": 4, "batches": 1, "forward": 3, "loss": 5, "backward": (12, 12, 6, 3), "update": 1}


# The papers' laws. Interlocking back-propagation (Gomez, Key et al. 2022), Figure 2, for b batches on a parts:
# end to end 2ba, Hogwild 2(b + a - 1), one-wise 2b + a - 1, two-wise 4b + a - 2, three-wise 6b + a - 3,
# n-wise 2bn + a - n.


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_figure_2_local(a: int, b: int) -> None:
    for method in (NWise(reach=1), "scpl", "al", "early_exit", "lct"):
        assert simulate(method, parts=a, batches=b).steps == 2 * b + a - 1


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_figure_2_n_wise(a: int, b: int) -> None:
    for n in range(1, a + 1):
        for gradient in ("furthest", "sum"):
            method = NWise(reach=n, gradient=gradient)  # type: ignore[arg-type]
            assert simulate(method, parts=a, batches=b).steps == 2 * b * n + a - n


def test_figure_2_in_numbers() -> None:
    assert simulate(NWise(reach=2), parts=4, batches=8).steps == 4 * 8 + 4 - 2 == 34
    assert simulate(NWise(reach=3), parts=4, batches=8).steps == 6 * 8 + 4 - 3 == 49
    assert simulate("bp", parts=4, batches=8).steps == 2 * 8 * 4 == 64


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_figure_2_end_to_end_and_hogwild(a: int, b: int) -> None:
    for method in ("bp", "joint", NWise(reach=a)):
        assert simulate(method, parts=a, batches=b).steps == 2 * a * b
    assert simulate("bp", parts=a, batches=b, order="hogwild").steps == 2 * (b + a - 1)


@pytest.mark.parametrize(
    ("method", "microbatches", "total"), [("scpl", 1, 24), ("bp", 3, 31), ("scpl", 3, 22)], ids=str
)
def test_scpl_figure_13(method: str, microbatches: int, total: int) -> None:
    """SCPL appendix A.5 prints the totals; the figure's boxes: F 1 a micro-batch, LOSS 5, B 4, 4, 2, 1, UP 1."""
    assert simulate(method, microbatches=microbatches, **FIGURE_13).steps == total  # type: ignore[arg-type]


def test_scpl_figure_13_box_by_box() -> None:
    """Its third picture, t_1 … t_22: backward passes in reverse order, an update a part."""
    found = simulate("scpl", microbatches=3, **FIGURE_13)  # type: ignore[arg-type]
    rows = {
        1: "FFFLLLLLBBBBBBBBBBBBU",
        2: "·FFFLLLLLBBBBBBBBBBBBU",
        3: "··FFFLLLLLBBBBBBU",
        4: "···FFFLLLLLBBBU",
    }
    assert found.text() == "\n".join(f"part {k} │{row:·<22}" for k, row in rows.items())
    backward = [(each.micro, each.start) for each in found.of(1) if each.kind == "backward"]
    assert backward == [(3, 8), (2, 12), (1, 16)]


@pytest.mark.parametrize("order", ["stage", "1f1b"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_gpipe_and_1f1b_fill_and_drain(order: Any, parts: int, m: int) -> None:
    """GPipe (Huang et al. 2019), section 2.3: m + K − 1 steps of one micro-batch's forward and backward."""
    f, b = 2, 3
    one = partial(simulate, "bp", parts=parts, microbatches=m, forward=f * m, backward=b * m, order=order)
    assert one(batches=1).steps == (m + parts - 1) * (f + b)
    assert one(batches=4).steps == 4 * (m + parts - 1) * (f + b)
    assert one(batches=1).idle_share == pytest.approx((parts - 1) / (m + parts - 1))


def test_1f1b_keeps_fewer_micro_batches_alive() -> None:
    """What 1F1B is for: part k never holds more than K − k + 1 forwards without their backward; GPipe all m."""
    for order, most in (("stage", [8, 8, 8]), ("1f1b", [3, 2, 1])):
        planned = schedule(get_method("bp"), parts=3, batches=2, microbatches=8, order=order)  # type: ignore[arg-type]
        alive = []
        for jobs in planned.jobs:
            held = [{"forward": 1, "backward": -1}.get(job.kind, 0) for job in jobs]
            alive.append(max(sum(held[: i + 1]) for i in range(len(held))))
        assert alive == most


def test_micro_batches_are_exact_fractions() -> None:
    assert simulate("bp", parts=3, batches=7, microbatches=3).steps == Fraction(7 * 2 * 5, 3).__float__()
    assert simulate("bp", parts=2, batches=3, microbatches=3).steps == 8


# Against a simulation that knows nothing of flows, schedules and messages.


def slowly(
    n: int, a: int, b: int, forward: list[int], loss: list[int], backward: list[int], update: int
) -> dict[int, list[tuple[int, int]]]:
    """n-wise (``furthest``) tick by tick: when each part starts and ends something, in integer costs.

    Part k does batch after batch: its forward pass as soon as the part below has done its own; its loss; then the
    gradient of every loss that it has to let through, from the nearest to the furthest, once the part above has
    passed it on; its update.
    """
    ended: dict[tuple[Any, ...], int] = {}
    spans: dict[int, list[tuple[int, int]]] = {k: [] for k in range(1, a + 1)}
    todo: dict[int, list[tuple[tuple[Any, ...], tuple[Any, ...] | None, int]]] = {}
    for k in range(1, a + 1):
        todo[k] = []
        for i in range(b):
            todo[k].append((("F", k, i), ("F", k - 1, i) if k > 1 else None, forward[k - 1]))
            todo[k].append((("L", k, i), None, loss[k - 1]))
            # The last loss trains the last n parts, any other loss j part j - n + 1 only.
            through = [j for j in range(k, min(k + n - 1, a) + 1) if j == a or j - n + 1 >= 1]
            for j in through:
                after = ("B", j, k + 1, i) if j > k else None
                todo[k].append((("B", j, k, i), after, backward[k - 1]))
            todo[k].append((("U", k, i), None, update))
    working: dict[int, tuple[tuple[Any, ...], int]] = {}
    now = 0
    while any(todo.values()) or working:
        moved = True
        while moved:  # things without a cost take no tick
            moved = False
            for k in range(1, a + 1):
                if k in working and working[k][1] == now:
                    ended[working.pop(k)[0]] = now
                    moved = True
                if k not in working and todo[k] and (todo[k][0][1] is None or todo[k][0][1] in ended):
                    what, _, cost = todo[k].pop(0)
                    working[k] = (what, now + cost)
                    if cost:
                        spans[k].append((now, now + cost))
                    moved = True
        now += 1
    return spans


COST = st.integers(0, 4)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    a = draw(st.integers(1, 5))
    per_part = st.lists(COST, min_size=a, max_size=a)
    return {
        "parts": a,
        "batches": draw(st.integers(1, 4)),
        "forward": draw(per_part),
        "loss": draw(per_part),
        "backward": draw(per_part),
        "update": draw(COST),
    }


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(1, 6))
def test_against_a_slow_simulation(case: dict[str, Any], n: int) -> None:
    n = min(n, case["parts"])
    found = simulate(NWise(reach=n), **case)
    expected = slowly(n, case["parts"], case["batches"], *(case[k] for k in ("forward", "loss", "backward", "update")))
    for k, spans in expected.items():
        assert [(each.start, each.end) for each in found.of(k) if each.kind != "wait"] == spans


# Properties of every schedule.


@st.composite
def anything(draw: st.DrawFn) -> tuple[Method, dict[str, Any]]:
    method = draw(st.sampled_from(METHODS))
    case = draw(cases())
    case["microbatches"] = draw(st.integers(1, 4))
    case["relay"] = draw(st.none() | COST)
    case["feedback"] = draw(COST)
    case["transfer"] = draw(COST)
    case["window"] = draw(st.none() | st.integers(1, 3))
    if method.name in ("bp", "joint"):
        case["order"] = draw(st.sampled_from(["stage", "1f1b", "hogwild"]))
        if case["order"] == "hogwild":
            case["microbatches"] = 1
    return method, case


def work(method: Method, case: dict[str, Any], number: int) -> Fraction:
    """What a part has to do for all batches, by hand."""
    a, k = case["parts"], number - 1
    below = {j: [p for p in method.trains(j, a) if p <= number] for j in range(number, a + 1)}
    ways = {tuple(trained) for trained in below.values() if trained}
    relay = case["backward"][k] if case["relay"] is None else case["relay"]
    total = case["forward"][k] + case["update"] + sum(case["backward"][k] if number in way else relay for way in ways)
    if method.name != "bp" or number == a:
        total += case["loss"][k]
    if method.name == "lct" and number < a:
        total += case["feedback"]
    return Fraction(total * case["batches"])


@settings(deadline=None, max_examples=200)
@given(anything())
def test_work_is_conserved_and_no_part_does_two_things_at_once(given_case: tuple[Method, dict[str, Any]]) -> None:
    method, case = given_case
    found = simulate(method, **case)
    for number in found.parts:
        mine = found.of(number)
        assert all(one.end <= two.start for one, two in itertools.pairwise(mine))
        assert found.busy(number) == pytest.approx(float(work(method, case, number)))
        assert mine[0].start == 0
        assert found.steps >= found.busy(number)


@settings(deadline=None, max_examples=200)
@given(anything())
def test_nothing_starts_before_what_it_needs(given_case: tuple[Method, dict[str, Any]]) -> None:
    method, case = given_case
    case |= {"forward": [f + 1 for f in case["forward"]], "backward": [b + 1 for b in case["backward"]], "relay": None}
    found = simulate(method, **case)
    when = {
        (each.part, each.batch, each.micro, each.kind, loss): each
        for each in found.intervals
        if each.kind in ("forward", "backward")
        for loss in each.losses or (0,)
    }
    way = Fraction(case["transfer"], case["microbatches"])
    for (part, batch, micro, kind, loss), each in when.items():
        own = when[part, batch, micro, "forward", 0]
        assert kind == "forward" or each.start >= own.end
        if part > 1 and kind == "forward":
            assert each.start >= float(when[part - 1, batch, micro, "forward", 0].end + way) - 1e-9
        if kind == "backward" and loss > part:
            assert each.start >= float(when[part + 1, batch, micro, "backward", loss].end + way) - 1e-9


def no_faster_at_a_higher_cost(method: Method, case: dict[str, Any], data: st.DataObject) -> None:
    """Raises one of the costs of a schedule."""
    before = simulate(method, **case).steps
    name = data.draw(st.sampled_from(["forward", "loss", "backward", "update", "feedback", "transfer"]))
    old, more = case[name], data.draw(st.integers(1, 3))
    if isinstance(old, list):
        place = data.draw(st.integers(0, len(old) - 1))
        case[name] = [value + more * (i == place) for i, value in enumerate(old)]
    else:
        case[name] = old + more
    assert simulate(method, **case).steps >= before


@settings(deadline=None, max_examples=100)
@given(anything(), st.data())
def test_nothing_gets_faster_where_something_costs_more(
    given_case: tuple[Method, dict[str, Any]], data: st.DataObject
) -> None:
    no_faster_at_a_higher_cost(*given_case, data)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 3))
def test_n_wise_at_its_ends_is_local_and_end_to_end(case: dict[str, Any], m: int) -> None:
    local, other = simulate(NWise(reach=1), microbatches=m, **case), simulate("scpl", microbatches=m, **case)
    assert local.intervals == other.intervals
    case["loss"] = LAST_ONLY[case["parts"]]  # bp has no other heads
    whole = simulate(NWise(reach=case["parts"]), microbatches=m, **case)
    assert whole.intervals == simulate("bp", microbatches=m, **case).intervals


@settings(deadline=None, max_examples=60)
@given(anything())
def test_a_smaller_window_is_never_faster(given_case: tuple[Method, dict[str, Any]]) -> None:
    method, case = given_case
    times = [simulate(method, **case | {"window": window}).steps for window in (1, 2, 5, None)]
    assert times == sorted(times, reverse=True)


# What costs do.


def test_transfer_hides_behind_compute() -> None:
    """A pipe of equal parts slows down only when crossing takes longer than a part's own work."""
    cycle = {
        transfer: simulate("scpl", parts=3, batches=40, transfer=transfer).steps
        - simulate("scpl", parts=3, batches=20, transfer=transfer).steps
        for transfer in (0, 1, 2, 3)
    }
    assert cycle == {0: 40, 1: 40, 2: 40, 3: 60}


def test_transfer_is_part_of_a_reach_above_one() -> None:
    """Two-wise waits for the way up and down: 2·2 + 2·transfer a batch."""
    found = [simulate(NWise(reach=2), parts=4, batches=b, transfer=1).steps for b in (10, 20)]
    assert found[1] - found[0] == 10 * (4 + 2)


def test_a_slow_part_sets_the_pace_of_local_methods_only() -> None:
    uneven = {"parts": 3, "forward": (1, 3, 1), "backward": (1, 5, 1)}
    for method, cycle in (("scpl", 8), ("bp", 12)):
        ten, twenty = (simulate(method, batches=b, **uneven).steps for b in (10, 20))  # type: ignore[arg-type]
        assert twenty - ten == 10 * cycle


def test_a_window_keeps_a_fast_part_from_running_ahead() -> None:
    def lead(window: int | None) -> float:
        found = simulate("scpl", parts=2, batches=20, forward=(1, 4), window=window)
        done = [each.end for each in found.of(1) if each.kind == "forward"]
        taken = [each.start for each in found.of(2) if each.kind == "forward"]
        return max(sum(end <= when for end in done) - i for i, when in enumerate(taken))

    # As many as may be under way, and one that is done and waits to be sent.
    assert [lead(1), lead(2), lead(5)] == [2, 3, 6]
    assert lead(None) > 8


def test_feedback_is_waited_for() -> None:
    """LCT's critic waits for the loss above; unit costs hide that, a slow part above does not."""
    found = simulate("lct", parts=2, batches=1, forward=(1, 5))
    waits = [(each.start, each.end, each.waits_for) for each in found.of(1) if each.kind == "wait"]
    assert waits == [(2, 6, "feedback from above")]
    far = simulate("lct", parts=2, batches=1, transfer=3)  # activations take their time, a number a sample none
    assert [(each.start, each.end) for each in far.of(1) if each.kind == "wait"] == [(2, 5)]
    assert not [each for each in simulate("scpl", parts=2, batches=9, forward=(1, 5)).of(1) if each.kind == "wait"]


def test_feedback_can_set_the_pace() -> None:
    """A batch takes at least a part's forward pass and that of the part above: 4 + 5, where the most work is 6."""
    ten, twenty = (simulate("lct", parts=2, batches=b, forward=(4, 5)).steps for b in (10, 20))
    assert twenty - ten == 90


# Errors.


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        simulate("bp", parts=3, batches=0, forward=(1, 2), backward=-1, loss=float("nan"), transfer="x", window=0)  # type: ignore[arg-type]
    message = str(caught.value)
    for told in ("batches=0", "forward has 2 costs; 3 parts", "backward=-1", "loss=nan", "transfer='x'", "window=0"):
        assert told in message
    assert len(message.splitlines()) == 7


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("scpl", {"order": "1f1b"}, "methods with one backward pass a part"),
        (NWise(reach=2), {"order": "hogwild"}, "nwise with 3 parts"),
        ("bp", {"order": "hogwild", "microbatches": 2}, "microbatches=2 must be 1"),
        ("bp", {"order": "zigzag"}, "order='zigzag'"),
        ("bp", {"parts": True}, "parts=True"),
        ("bp", {"microbatches": 1.5}, "microbatches=1.5"),
        ("bp", {"transfer": (1, 1, 1)}, "one a boundary"),
    ],
)
def test_what_makes_no_sense(method: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        simulate(method, **{"parts": 3, "batches": 2} | options)


def test_unknown_methods() -> None:
    with pytest.raises(MethodError, match="Did you mean 'nwise'"):
        simulate("nwize", parts=2, batches=2)


def test_a_schedule_that_cannot_go_on_is_an_error() -> None:
    """Two parts that both wait for the other: never a timeline that silently lacks jobs."""
    below = Job(1, 1, "receive", None, Side.ABOVE, "gradients")
    above = Job(2, 1, "receive", None, Side.BELOW, "activations")
    rounds = ((Round((below,)),), (Round((above,)),))
    with pytest.raises(ConfigError, match="part 1, batch 1: gradients from above; part 2"):
        run(Schedule("bp", "stage", 1, 1, (range(1, 2), range(2, 3)), rounds), Costs())


def kinds(found: Timeline) -> Iterator[str]:
    return (each.kind for each in found.intervals)


def test_what_costs_nothing_is_not_shown() -> None:
    assert set(kinds(simulate("scpl", parts=3, batches=2))) == {"forward", "backward", "wait"}
