"""Timelines, simulated or measured: totals, text, traces and pictures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from localize.errors import ConfigError
from localize.heads.nwise import NWise
from localize.runtime import gantt
from localize.runtime.gantt import draw
from localize.runtime.simulate import simulate
from localize.runtime.timeline import Interval, Timeline

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
