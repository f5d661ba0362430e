"""Several ranks for the same parts: their mean gradient trains one model."""

from __future__ import annotations

from pathlib import Path

import pytest

from localize import CheckpointError, ConfigError, PlacementError
from localize.runtime.placement import placement_of
from tests.runtime.cases import made
from tests.runtime.helpers import converted, trainer
from tests.runtime.several import Several

CASES = "tests.runtime.cases_replicas:"


@pytest.mark.parametrize(
    ("method", "parts", "replicas"),
    [("early_exit", 2, 2), ("al", 2, 2), ("nwise", 2, 2), ("lct", 2, 2), ("bp", 2, 2), ("scpl", 1, 2),
     ("early_exit", 1, 3)],
)  # fmt: skip
def test_replicas_train_one_model(several: Several, method: str, parts: int, replicas: int) -> None:
    """Weights, batch norm's statistics of the first replica, losses of the epoch, scores; for two to the last bit."""
    case = f"{CASES}same_as_by_hand"
    found = several.results(case, parts * replicas, method=method, parts=parts, replicas=replicas)
    assert all(rows == found[0][0] for rows, _ in found)
    assert found[0][0][-1]["step"] == 3 * (7 // replicas)  # of seven batches, one is left out
    for number in range(parts):
        assert len({weights for _, weights in found[number::parts]}) == 1  # all replicas have the same bits


def test_a_run_with_replicas_goes_on(several: Several, tmp_path: Path) -> None:
    """From the middle of an epoch, with the same weights on all replicas, and losses of all of them."""
    case = f"{CASES}goes_on"
    whole = several.results(case, 4, folder=str(tmp_path / "whole"), stop=None)
    assert several.results(case, 4, folder=str(tmp_path / "halves"), stop=5) == [None] * 4
    assert several.results(case, 4, folder=str(tmp_path / "halves"), stop=None) == whole
    assert all(found == whole[0] for found in whole)


def test_an_epoch_is_finished_with_as_many_replicas(several: Several, tmp_path: Path) -> None:
    """Batches were counted as steps, so that other ones would have been trained twice or not at all."""
    case, where = f"{CASES}other_number", str(tmp_path)
    interrupted = several.results(case, 4, folder=where, replicas=2, epochs=2, stop=5)
    assert all(kind in ("Interruption", "Stopped") for kind, _ in interrupted)
    for ranks, replicas in ((2, 1), (3, 3)):
        for kind, text in several.results(case, ranks, folder=where, replicas=replicas, epochs=2):
            assert kind == "CheckpointError"
            assert f"after step 1 of epoch 2 with data_parallel=2, and here it is {replicas}" in text
    with pytest.raises(CheckpointError, match="data_parallel=2, and here it is 1"):
        local, loader = made("mixed", "early_exit", 2)
        trainer(local, tmp_path).fit(loader, epochs=2, resume=True)
    assert several.results(case, 4, folder=where, replicas=2, epochs=2) == [[3, 6]] * 4


def test_between_epochs_the_number_of_replicas_may_change(several: Several, tmp_path: Path) -> None:
    case, where = f"{CASES}other_number", str(tmp_path)
    assert several.results(case, 4, folder=where, replicas=2, epochs=1) == [[3]] * 4
    assert several.results(case, 2, folder=where, replicas=1, epochs=2) == [[3, 10]] * 2
    assert several.results(case, 3, folder=where, replicas=3, epochs=3) == [[3, 10, 12]] * 3
    local, loader = made("mixed", "early_exit", 2)
    assert [row["step"] for row in trainer(local, tmp_path).fit(loader, epochs=4, resume=True)] == [3, 10, 12, 19]


def test_a_replica_loads_its_own_batches(several: Several) -> None:
    """Of 52 samples in seven batches, all of six."""
    first, _, second, _ = found = several.results(f"{CASES}read", 4, replicas=2)
    assert [len(asked) for asked in found] in ([24, 0, 24, 0], [24, 0, 20, 0])
    assert len({*first, *second}) == len(first) + len(second)


def test_only_weights_that_count_are_warned_of(several: Several) -> None:
    """Those of the first replica are everyone's; and batch norm's statistics differ between replicas."""
    assert several.results(f"{CASES}warned", 4, unlike=[2, 3]) == [[], [], [], []]
    first, *others = several.results(f"{CASES}warned", 4, unlike=[1])
    assert ["different weights" in text for text in first] == [True]
    assert others == [[], [], []]


def test_no_two_batches_draw_the_same(several: Several) -> None:
    first, _, second, _ = several.results(f"{CASES}drawn", 4, replicas=2)
    assert len({*first, *second}) == len(first) + len(second) > 0


def test_all_replicas_stop_when_one_rank_is_gone(several: Several) -> None:
    case = "tests.runtime.cases:fails"
    found = several.run(case, 4, method="early_exit", parts=2, at=2, on=3, how="kill", replicas=2)
    for rank, answer in enumerate(found):
        if rank == 3:
            assert answer["status"] == -9
            continue
        assert answer["result"]["kind"] == "Stopped", answer
        assert "rank 3 (part 2 of 2, replica 2 of 2)" in answer["result"]["text"]
        assert answer["seconds"] < 20


def test_buffers_of_the_first_replica_are_everyones(several: Several) -> None:
    """An evaluation, which only that one does, made them others; replicas once waited for each other for good."""
    found = several.results(f"{CASES}seen_first", 4)
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        assert one == other
        kinds, _, shares = one[0]
        assert shares
        assert kinds["seen"] == ["torch.float32", [6], [1]]
        assert kinds["turned"] == ["torch.float32", [6, 2], [1, 6]]
        assert kinds["unsaved"] == ["torch.float32", [8], [1]]
        assert kinds["complex"] == ["torch.complex64", [6], [1]]
        assert "gone" not in kinds
    assert found[0] != found[1]


@pytest.mark.parametrize("what", ["more", "order"])
def test_models_with_other_tensors_are_refused(several: Several, what: str) -> None:
    for kind, text in several.results(f"{CASES}registered_late", 4, what=what):
        assert kind == "PlacementError"
        assert "register all of them in __init__" in text
        if what == "more":
            assert "late4 and 2 more, and rank 0 has not" in text
            assert "rank 3 has " in text
        else:
            assert "rank 3 has the same tensors as rank 0, but they were registered in another order" in text
        assert not any(f"rank {n}" in text for n in (1, 2))


@pytest.mark.parametrize("what", ["Holdings", "Replicas"])
def test_an_error_before_ranks_have_agreed_is_told(several: Several, what: str) -> None:
    found = several.run(f"{CASES}breaks_at_the_start", 4, what=what, timeout=40.0)
    for rank, answer in enumerate(found):
        kind, text = answer["result"]
        assert kind == ("MemoryError" if rank == 2 else "Stopped")
        assert "no room" in text
        assert answer["seconds"] < 20


def test_places() -> None:
    local = made("mixed", "bp", 4)[0]
    places = [placement_of(local, rank, 6, 2) for rank in range(6)]
    assert [(p.rank, p.replica) for p in places] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [p.numbers for p in places[:3]] == [p.numbers for p in places[3:]]
    assert [p.global_rank(p.rank) for p in places] == list(range(6))
    assert places[0].names[5].endswith("4 of 4, replica 2 of 2")
    for ranks in (5, 10):
        with pytest.raises(PlacementError, match="start 2, 4, 6, 8 processes"):
            placement_of(local, 0, ranks, 2)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes several processes"):
        trainer(converted(), data_parallel=2)
