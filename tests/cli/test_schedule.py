"""``localize schedule`` from end to end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from localize import load
from localize.heads.nwise import NWise
from localize.runtime.gantt import COLORS
from localize.runtime.placement import placement_of
from localize.runtime.simulate import simulate
from tests.cli.test_commands import Cli, artefact, cli  # noqa: F401


def test_two_wise_as_the_issue_types_it(cli: Cli) -> None:  # noqa: F811
    out = cli.ok("schedule", "--method", "nwise", "--reach", "2", "--parts", "4", "--batches", "8")
    assert simulate(NWise(reach=2), parts=4, batches=8).text() in out
    assert "nwise, reach 2, 4 parts, 8 batches" in out
    row = next(line for line in out.splitlines() if "time steps" not in line and "41.18" in line)
    assert row.split()[-5:] == ["34", "4", "2", "3", "41.18"]
    assert "F forward" in cli.err


def test_for_machines(cli: Cli) -> None:  # noqa: F811
    found = cli.json("schedule", "--method", "bp", "--parts", "3", "--batches", "4", "--microbatches", "3", "--compare")
    assert (found["steps"], found["unit"], found["parts"]) == (4 * (3 + 3 - 1) * 2 / 3, "steps", 3)
    assert [each["title"] for each in found["compared"]] == [
        "bp, 3 parts, 4 batches",
        "bp, 3 parts, 4 batches of 3 micro-batches",
        "bp, 3 parts, 4 batches of 3 micro-batches, 1f1b",
    ]
    assert found["compared"][0]["steps"] == 24
    work = [each for each in found["intervals"] if each["kind"] != "wait"]
    assert len(work) == 3 * 4 * 3 * 2


def test_the_figure_of_the_scpl_paper(cli: Cli) -> None:  # noqa: F811
    costs = ["--forward", "3", "--loss", "5", "--backward", "12,12,6,3", "--update", "1", "--batches", "1"]
    for method, micro, total in (("scpl", "1", "24"), ("bp", "3", "31"), ("scpl", "3", "22")):
        out = cli.ok("schedule", "--method", method, "--microbatches", micro, *costs, "--quiet")
        assert out == f"{total}\n"


def test_costs_are_exact(cli: Cli) -> None:  # noqa: F811
    assert cli.ok("schedule", "--method", "bp", "--forward", "1/3", "--backward", "2/3", "-k", "3", "-q") == "24\n"
    assert cli.json("schedule", "--forward", "1/4,0.5", "--parts", "2")["costs"]["forward"] == [0.25, 0.5]


def test_picture_and_trace(cli: Cli) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    cli.ok("schedule", "--parts", "2", "--compare", "--plot", "a.svg", "--trace", "a.json")
    assert Path("a.svg").read_text().startswith("<?xml")
    assert json.loads(Path("a.json").read_text())["traceEvents"]
    assert "Wrote a.svg" in cli.err
    assert "Wrote a.json" in cli.err


def test_folders_of_picture_and_trace_are_made(cli: Cli) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    cli.ok("schedule", "--parts", "2", "--plot", "no/such/a.svg", "--trace", "nor/this/a.json")
    assert Path("no/such/a.svg").read_text().startswith("<?xml")
    assert json.loads(Path("nor/this/a.json").read_text())["traceEvents"]


@pytest.mark.parametrize("flag", ["--plot", "--trace"])
def test_a_file_that_cannot_be_written_is_named(cli: Cli, flag: str) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    Path("file").touch()
    told = cli.fails("schedule", "--parts", "2", flag, "file/a.svg")
    assert "cannot be written" in told
    assert "'file'" in told


def test_a_model_s_throughput(cli: Cli) -> None:  # noqa: F811
    arguments = ["schedule", "model.py", "--method", "scpl", "--parts", "2", "--flops", "1M", "--compare"]
    found = cli.json(*arguments)
    plan = cli.json("inspect", "model.py", "--method", "scpl", "--parts", "2")["plan"]
    work = [3 * (part["part"]["flops"] + part["head"]["flops"]) / 1e6 for part in plan["parts"]]
    assert found["step"] == pytest.approx(max(work))
    assert found["samples_per_s"] == pytest.approx(2 / max(work))
    end_to_end = 3 * sum(part["part"]["flops"] for part in plan["parts"]) / 1e6
    assert found["compared"][0]["step"] == pytest.approx(end_to_end)
    assert found["unit"] == "s"
    bigger = cli.json(*arguments, "--batch-size", "32")
    assert bigger["samples_per_s"] == pytest.approx(found["samples_per_s"])
    assert bigger["step"] == pytest.approx(16 * found["step"])
    slow = cli.json(*arguments, "--bandwidth", "0.05k")
    assert slow["step"] == pytest.approx(plan["boundaries"][0]["crossing_bytes"] / 50)
    assert "samples/s" in cli.ok(*arguments)


def test_fewer_ranks_than_parts(cli: Cli) -> None:  # noqa: F811
    arguments = ["schedule", "--method", "early_exit", "--parts", "4", "--ranks", "2", "--batches", "3", "--compare"]
    out = cli.ok(*arguments)
    assert simulate("early_exit", parts=4, batches=3, ranks=2).text() in out
    assert "rank 1, part 4 │" in out
    assert "slowest rank" in out
    found = cli.json(*arguments)
    assert (found["ranks"], found["slowest_rank"], found["slowest_rank_work"]) == ([[1, 2], [3, 4]], 0, 4)
    assert (found["steps"], found["step"]) == (3 + 4 * 3, 4)
    assert "slowest_part" not in found
    assert {each["title"].partition(",")[2][:20] for each in found["compared"]} == {" 4 parts on 2 ranks,"}
    assert "ranks" not in cli.json("schedule", "--parts", "2")


def test_all_rows_are_about_the_same_ranks(cli: Cli) -> None:  # noqa: F811
    """Heads are counted for the first row only, and would part the others elsewhere."""
    costs = ["--forward", "1", "--backward", "1", "--loss", "6,0,0,0"]
    found = cli.json("schedule", "--parts", "4", "--ranks", "2", "--compare", *costs)
    assert found["ranks"] == [[1], [2, 3, 4]]
    assert [each["slowest_rank_work"] for each in found["compared"]] == [6] * 3


def test_ranks_of_a_model_are_those_that_training_gives_its_parts(cli: Cli, artefact: str) -> None:  # noqa: F811
    local = load(artefact)
    for ranks in (1, 2):
        found = cli.json("schedule", artefact, "--flops", "1G,9G,2G", "--ranks", str(ranks))
        assert found["ranks"] == [list(numbers) for numbers in placement_of(local, 0, ranks).ranges]
    assert "ranks=4 is more than the 3 parts" in cli.fails("schedule", artefact, "--flops", "1G", "--ranks", "4")


def test_small_costs_are_shown_exactly(cli: Cli) -> None:  # noqa: F811
    out = cli.ok("schedule", "--parts", "2", "--batches", "2", "--forward", "0.5", "--backward", "3/4")
    assert "part 1 │FFBBBFFBBB··\npart 2 │··FFBBBFFBBB\n" in out
    assert "a column is 0.25 time steps" in cli.err
    cli.ok("schedule", "--parts", "2")
    assert "a column" not in cli.err


def test_many_parts_are_announced(cli: Cli) -> None:  # noqa: F811
    out = cli.ok("schedule", "--parts", "101", "--batches", "3")
    assert "Simulating 101 parts" in cli.err
    assert len([line for line in out.splitlines() if "│" in line]) == 101
    cli.ok("schedule", "--parts", "4")
    assert "Simulating" not in cli.err


def test_an_artefact_knows_its_method_and_parts(cli: Cli, artefact: str) -> None:  # noqa: F811
    found = cli.json("schedule", artefact, "--flops", "1G,1G,2G")
    assert (found["method"], found["parts"], found["samples"]) == ("al", 3, 2)
    assert "--method, --parts would need the model" in cli.fails("schedule", artefact, "-m", "scpl", "-k", "2")
    assert "no measured times" in cli.fails("schedule", artefact)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parts", "0", "--batches", "0"], "parts"),
        (["--parts", "auto"], "parts='auto'"),
        (["--ranks", "0"], "ranks=0"),
        (["--ranks", "5"], "ranks=5 is more than the 4 parts"),
        (["--ranks", "two"], "Invalid value for '--ranks'"),
        (["--forward", "fast"], "--forward is 'fast'"),
        (["--forward", "1,2", "--parts", "3"], "forward has 2 costs; 3 parts"),
        (["--backward", "-1"], "backward"),
        (["--order", "1f1b"], "order='1f1b' is for methods"),
        (["--flops", "1T"], "--flops cannot be used here"),
        (["--cuts", "a", "--bandwidth", "1G"], "--bandwidth, --cuts cannot be used here"),
        (["model.py", "--forward", "2"], "costs of MODEL's parts come from its plan"),
        (["model.py", "--flops", "fast"], "--flops is 'fast'"),
        (["model.py", "--flops", "1T", "--bandwidth", "100Gbit"], "bytes a second"),
        (["model.py", "--parts", "2", "--flops", "1T,1T,1T"], "flops has 3 numbers; 2 parts"),
        (["model.py", "--parts", "2"], "no measured times"),
        (["model.py", "other.py"], "One MODEL is needed, got 2"),
        (["--window", "0"], "window=0"),
        (["--plot", "a.gif"], "suffixes"),
        (["--rech", "2", "--method", "nwise"], "Did you mean '--reach'"),
    ],
)
def test_what_makes_no_sense(cli: Cli, arguments: list[str], told: str) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    assert told in cli.fails("schedule", *arguments)


PAGE = Path(__file__).parent.parent.parent / "docs" / "schedules.md"
SHOWN = re.findall(r"```sh\n(localize schedule [^\n]*)\n```(?:\n\n```text\n(.*?)```)?", PAGE.read_text(), re.S)


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=range(len(SHOWN)))
def test_what_the_page_shows(cli: Cli, command: str, shown: str) -> None:  # noqa: F811
    if "torchvision:" in command:
        pytest.importorskip("torchvision")
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    assert shown in cli.ok(*shlex.split(command)[1:])


def test_the_picture_of_the_page_is_the_command_s(cli: Cli) -> None:  # noqa: F811
    """Numbers of boxes only: how a picture is written depends on matplotlib's version."""
    pytest.importorskip("matplotlib")
    command = next(command for command, _ in SHOWN if "--plot" in command)
    cli.ok(*shlex.split(command)[1:])
    drawn, kept = Path("schedule.svg").read_text(), (PAGE.parent / "images" / "schedule.svg").read_text()
    for color in COLORS.values():
        assert drawn.count(color) == kept.count(color)
