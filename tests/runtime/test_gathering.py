"""Contrastive losses over the batches of all replicas: those of one process with one large batch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runtime.several import Several

CASES = "tests.runtime.cases_gathering:"


@pytest.mark.parametrize(
    ("parts", "sizes", "options"),
    [(2, [6, 6], {}), (1, [6, 6, 6], {}), (2, [7, 2, 4], {}), (1, [1, 9], {}), (3, [5, 8], {"projector": "identity"}),
     (2, [6, 3], {"microbatches": 4})],
    ids=str,
)  # fmt: skip
def test_replicas_learn_from_one_large_batch(
    several: Several, parts: int, sizes: list[int], options: dict[str, Any]
) -> None:
    """Weights and losses in float64, with batches of equal and of different sizes; and all replicas have the same."""
    found = several.results(f"{CASES}like_one_batch", parts * len(sizes), parts=parts, sizes=sizes, **options)
    assert all(rows == found[0][0] for rows, _ in found)
    for number in range(parts):
        assert len({weights for _, weights in found[number::parts]}) == 1


def test_without_replicas_there_is_nobody_to_gather_from(several: Several) -> None:
    """The same bits as without the option."""
    found, expected = (several.results(f"{CASES}alone", 2, across=across) for across in (True, False))
    assert found == expected


@pytest.mark.parametrize("where", [0, 1])
def test_all_replicas_skip_what_is_not_finite_on_one(several: Several, where: int) -> None:
    found = several.results(f"{CASES}skips", 4, where=where)
    for skipped, there, _ in found:
        assert skipped == [1, 1]
        assert there == [True, True]
    assert found[0][2] == found[2][2]
    assert found[1][2] == found[3][2]


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize(("parts", "replicas", "on"), [(1, 3, 2), (2, 3, 4)])
def test_all_stop_and_name_the_rank(
    several: Several, parts: int, replicas: int, on: int, how: str, back: bool
) -> None:
    """Whoever was gone, each rank once named the replica after itself."""
    found = several.run(
        f"{CASES}broken", parts * replicas, parts=parts, replicas=replicas, on=on, how=how, back=back
    )
    name = f"rank {on} (part {on % parts + 1} of {parts}, replica {on // parts + 1} of {replicas})"
    reason = "the process is gone" if how == "kill" else "Interruption: something broke"
    for rank, answer in enumerate(found):
        if rank == on:
            assert answer["status"] == (-9 if how == "kill" else 0)
            continue
        assert answer["result"]["kind"] == "Stopped", answer
        assert f"because of {name} at step" in answer["result"]["text"]
        assert reason in answer["result"]["text"]
        assert answer["seconds"] < 20


def test_where_it_cannot_be_told_who_is_gone_all_candidates_are_named(several: Several) -> None:
    """A rank that computes does not wait with the others, and cannot be told from one that is gone."""
    found = several.run(f"{CASES}broken", 3, parts=1, replicas=3, on=1, how="kill", back=False, busy=0)
    busy, gone, waits = found
    said = "connection to the ranks 0 (part 1 of 1, replica 1 of 3), 1 (part 1 of 1, replica 2 of 3) broke; one of"
    assert gone["status"] == -9
    assert waits["result"]["kind"] == "WireError"
    assert said in waits["result"]["text"]
    assert busy["result"]["kind"] == "Stopped"
    assert said in busy["result"]["text"]
    assert "because of rank 2 (part 1 of 1, replica 3 of 3) at step 2" in busy["result"]["text"]
