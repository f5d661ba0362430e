"""Buffers that are other tensors after a forward pass: they are found by name, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.several import Several

CASES = "tests.runtime.cases_rebound:"


@pytest.mark.parametrize(("method", "ranks"), [("early_exit", 2), ("early_exit", 3), ("bp", 2), ("bp", 3), ("al", 3)])
def test_many_processes_are_one(several: Several, tmp_path: Path, method: str, ranks: int) -> None:
    """The first rank once had the buffers from before training, and later evaluations used them."""
    case = "tests.runtime.cases:same_as_sequential"
    found = several.results(case, ranks, model="averages", method=method, parts=4, folder=str(tmp_path))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize(
    ("method", "gather", "ranks"),
    [("early_exit", "first", 2), ("early_exit", "all", 3), ("bp", "first", 3), ("bp", "all", 2), ("chained", "all", 3),
     ("chained", "first", 2)],
)  # fmt: skip
def test_gathered_buffers_are_the_trained_ones(several: Several, method: str, gather: str, ranks: int) -> None:
    """Values, shapes and dtypes; those of parts elsewhere take no memory before."""
    found = several.results(f"{CASES}gathered", ranks, method=method, gather=gather)
    for rank, each in enumerate(found):
        assert each["different"] == []
        assert each["moved"]
        assert each["rows"]
        assert each["scores"]
        assert (each["left"] > 0) == (gather == "first" and rank > 0)
    assert sum(each["during"] for each in found) == found[0]["all"]


@pytest.mark.parametrize("method", ["early_exit", "bp"])
def test_a_skipped_batch_leaves_no_trace(several: Several, method: str) -> None:
    for each in several.results(f"{CASES}gathered", 2, method=method, gather="all", bad=2):
        assert each["skipped"] == [1, 1, 1, 1]
        assert each["different"] == []
        assert each["finite"]
        assert each["rows"]
        assert each["scores"]


def test_replicas_keep_those_of_the_first(several: Several) -> None:
    found = several.results(f"{CASES}replicated", 4)
    for again in range(2):
        first, second, *others = found
        assert [each[f"began {again}"] for each in others] == [first[f"began {again}"], second[f"began {again}"]]
        assert first[f"means {again}"] == second[f"means {again}"]
        assert all(each[f"scores {again}"] == first[f"alone {again}"] for each in found)
        assert {n: score["loss"] for n, score in first[f"alone {again}"].items()} == first[f"rows {again}"]
    assert found[0]["means 0"] != found[0]["means 1"]
    assert any(found[0]["began 1"])


def test_replicas_take_a_buffer_of_another_shape(several: Several) -> None:
    """The second run begins with that of the first replica, whose last batch was larger: gloo ended the process."""
    found = several.results(f"{CASES}followed", 4)
    assert found[0] == found[1] == [6, 6]


def test_borrowed_buffers_are_given_up_again(several: Several) -> None:
    found = several.results(f"{CASES}emptied", 3)
    assert len({name for names in found for name in names}) == sum(len(names) for names in found)
