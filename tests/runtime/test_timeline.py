"""Timelines, simulated or measured: totals, text, traces and pictures."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localize.errors import ConfigError
from localize.heads.nwise import NWise
from localize.runtime import gantt
from localize.runtime.gantt import draw
from localize.runtime.simulate import simulate
from localize.runtime.timeline import Interval, Timeline, write_trace

MEASURED = Timeline(
    (
        Interval(2, 1, "forward", 10.002, 10.0035),
        Interval(1, 1, "forward", 10.0, 10.0015),
        Interval(1, 1, "head", 10.0015, 10.002),
        Interval(1, 1, "wait", 10.002, 10.003, waits_for="gradients from above"),
        Interval(1, 1, "backward", 10.003, 10.004, losses=(1, 2)),
        Interval(2, 1, "backward", 10.0035, 10.004, micro=2, losses=(2,), trains=False),
    ),
    unit="s",
    title="measured",
)


def test_measured_timelines_start_anywhere() -> None:
    assert MEASURED.steps == pytest.approx(0.004)
    assert [each.kind for each in MEASURED.of(1)] == ["forward", "head", "wait", "backward"]
    assert MEASURED.busy(1) == pytest.approx(0.003)
    assert MEASURED.idle_share == pytest.approx((0.001 + 0.002) / 0.008)
    assert MEASURED.text(8) == "part 1 │FFFL··BB\npart 2 │····FFFb"


def test_a_trace_has_every_interval_in_microseconds(tmp_path: Path) -> None:
    MEASURED.to_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {1: "part 1", 2: "part 2"}
    shown = [event for event in events if event["ph"] == "X"]
    assert len(shown) == 6
    found = {(event["tid"], event["name"]): (event["ts"], event["dur"]) for event in shown}
    assert found[1, "forward 1"] == (0, pytest.approx(1500))
    assert found[2, "relay 1.2"] == (pytest.approx(3500), pytest.approx(500))
    waits = [event["args"]["waits_for"] for event in shown if event["cat"] == "wait"]
    assert waits == ["gradients from above"]


def test_a_time_step_shows_as_a_millisecond(tmp_path: Path) -> None:
    simulate("scpl", parts=2, batches=1).to_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] == "X" and e["cat"] == "backward"] == [1000, 2000]


def test_text_one_letter_a_step() -> None:
    """Two-wise, as the README of the interlocking paper's method draws it: part 2 lets L2 through, L3 trains it."""
    assert simulate(NWise(reach=2), parts=4, batches=2).text() == (
        "part 1 │F··BF··B··\npart 2 │·Fb·BFb·B·\npart 3 │··Fb·BFb·B\npart 4 │···FB··FB·"
    )


def test_text_of_a_long_timeline_shows_what_the_middle_of_a_column_falls_into() -> None:
    found = simulate("scpl", parts=12, batches=500)
    lines = found.text(60).splitlines()
    assert len(lines) == 12
    assert {len(line) for line in lines} == {len("part 12 │") + 60}
    assert lines[0].startswith("part  1 │")
    assert simulate("bp", parts=2, batches=1, forward=0, backward=0).text() == ""


@pytest.mark.parametrize(
    ("costs", "column", "row"),
    [
        ({"forward": 0.5}, 0.5, "FBB" * 8 + "·"),
        ({"forward": 0.5, "backward": 0.75}, 0.25, "FFBBB" * 8 + "··"),
        ({"forward": Fraction(1, 3), "backward": Fraction(1, 2)}, 1 / 6, "FFBBB" * 8 + "··"),
        ({"forward": 2, "backward": 4}, 1, "FFBBBB" * 8 + "··"),  # a time step at most
        ({"forward": 1.5, "backward": 3}, 0.75, "FFBBBB" * 8 + "··"),
        ({"forward": 10, "backward": 20}, 10, "FBB" * 8 + "·"),  # 250 steps, no column for each
        ({"forward": 1e-5, "backward": 2e-5}, 1e-5, "FBB" * 8 + "·"),
    ],
)
def test_a_column_is_what_all_boxes_are_multiples_of(costs: dict[str, Any], column: float, row: str) -> None:
    found = simulate("early_exit", parts=2, batches=8, **costs)
    assert found.column() == pytest.approx(column)
    first = found.text().splitlines()[0]
    assert first == f"part 1 │{row}"


def test_boxes_of_no_common_measure_stretch_to_the_whole_row() -> None:
    found = simulate("early_exit", parts=2, batches=2, forward=0.5, backward=0.507)
    first, second = found.text(100).splitlines()
    assert found.column(100) == pytest.approx(found.steps / 100)
    assert first == "part 1 │" + "F" * 20 + "B" * 20 + "F" * 20 + "B" * 20 + "·" * 20
    assert len(second) == len(first)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.fractions(0, 2, max_denominator=6), min_size=6, max_size=6),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_where_columns_fit_they_are_exact(costs: list[Fraction], batches: int, ranks: int) -> None:
    """Letters times columns are how long things took; rows are never longer than asked for."""
    found = simulate(NWise(reach=2), parts=3, batches=batches, forward=costs[:3], backward=costs[3:], ranks=ranks)
    if not found.steps:
        assert found.text() == ""
        return
    rows = dict(zip(found.parts, found.text().splitlines(), strict=True))
    times = {when for each in found.intervals for when in (each.start, each.end)}
    exact = all(abs(when / found.column() - round(when / found.column())) < 1e-6 for when in times)
    fine = Fraction(1, math.lcm(*(cost.denominator for cost in costs)))
    assert exact or found.steps / fine > 120
    for part, row in rows.items():
        boxes = row.partition("│")[2]
        assert len(boxes) <= 120
        if exact:
            letters = sum(letter != "·" for letter in boxes)
            assert letters * found.column() == pytest.approx(found.busy(part))


def test_names_of_rows_are_aligned() -> None:
    found = simulate("scpl", parts=12, batches=1, ranks=11)
    lines = found.text().splitlines()
    assert len({line.index("│") for line in lines}) == 1
    assert lines[0].startswith("rank 0, part   1 │")
    assert lines[-1].startswith("rank 10, part 12 │")


def test_a_trace_takes_its_place_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.json"
    MEASURED.to_trace(file)
    before = file.read_bytes()

    def full(self: Path, text: str) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        simulate("scpl", parts=2, batches=1).to_trace(file)
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_may_go_into_a_pipe_or_through_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit((tmp_path / "pipe").read_text)
        MEASURED.to_trace(tmp_path / "pipe")
        assert len(json.loads(read.result(30))["traceEvents"]) == 9
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    MEASURED.to_trace(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["traceEvents"]


def test_several_timelines_are_processes_of_one_trace(tmp_path: Path) -> None:
    one = Timeline((Interval(1, 1, "forward", 10, 11), Interval(2, 1, "forward", 11, 12)), "s", "a, attempt 1")
    two = Timeline((Interval(1, 1, "forward", 20, 22),), "s", "a, attempt 2")
    write_trace([one, two], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        0: "a, attempt 1",
        1: "a, attempt 2",
    }
    shown = [(e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert shown == [(0, 1, 0, 1e6), (0, 2, 1e6, 1e6), (1, 1, 10e6, 2e6)]


def test_rows_of_a_trace_are_named_by_their_rank(tmp_path: Path) -> None:
    simulate("scpl", parts=3, batches=1, ranks=2).to_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["rank 0, part 1", "rank 1, part 2", "rank 1, part 3"]


def test_parts_that_do_two_things_at_once_are_no_timeline() -> None:
    bad = (
        Interval(1, 1, "forward", 0, 2),
        Interval(1, 2, "forward", 1, 3),
        Interval(2, 1, "backward", 5, 4),
        Interval(3, 1, "sleep", 0, 1),  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError) as caught:
        Timeline(bad)
    message = str(caught.value)
    assert "part 1: forward of batch 1 ends at 2, after the start of forward of batch 2 at 1" in message
    assert "part 2, batch 1: backward starts at 5 and ends at 4" in message
    assert "part 3, batch 1: kind 'sleep'" in message


def test_nothing_is_a_timeline() -> None:
    empty = Timeline(())
    assert (empty.steps, empty.parts, empty.idle_share, empty.text()) == (0, (), 0, "")


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture{suffix}"
    draw([simulate("scpl", parts=2, batches=2), simulate("bp", parts=2, batches=2, microbatches=2)], path)
    start = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


def test_a_picture_has_a_box_a_job(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = simulate(NWise(reach=2), parts=3, batches=2)
    draw([found], tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    work = [each for each in found.intervals if each.kind != "wait"]
    in_legend = 1
    for kind in ("forward", "backward", "relay"):
        boxes = svg.count(f"fill: {gantt.COLORS[kind]}")
        assert boxes == sum(each.label == kind for each in work) + in_legend
    draw([found], tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == svg  # the same picture every time


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = simulate("scpl", parts=2, batches=2)
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf; got '.*a\.gif'"):
        draw([steps], tmp_path / "a.gif")
    with pytest.raises(ConfigError, match=r"one unit, got 2 in \['s', 'steps'\]"):
        draw([steps, MEASURED], tmp_path / "a.svg")
    with pytest.raises(ConfigError, match="got 0 in none"):
        draw([], tmp_path / "a.svg")

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'localize-torch\[plot\]'"):
        draw([steps], tmp_path / "a.svg")
