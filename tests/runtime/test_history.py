from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from localize import ConfigError
from localize.runtime import history
from tests.runtime.helpers import Breaking, Interruption, converted, loader, timeless, trainer

ROWS = [
    {"epoch": 1, "train_loss": [None, 2.0], "val_accuracy": {1: 0.5, 2: 0.75}, "seconds": 1.5},
    {"epoch": 2, "train_loss": [None, float("nan")], "val_accuracy": {}, "seconds": 1.25},
]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / history.JSONL).read_text().splitlines()]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / history.CSV).open() as file:
        return list(csv.DictReader(file))


def test_rows_become_lines_and_a_flat_table(tmp_path: Path) -> None:
    history.write(tmp_path / "log", ROWS)
    first, second = lines(tmp_path / "log")
    assert first == {
        "epoch": 1,
        "train_loss": [None, 2.0],
        "val_accuracy": {"1": 0.5, "2": 0.75},
        "seconds": 1.5,
    }
    assert second["train_loss"] == [None, None], "NaN is not JSON"
    top, below = table(tmp_path / "log")
    assert list(top) == [
        "epoch",
        "train_loss.1",
        "train_loss.2",
        "val_accuracy.1",
        "val_accuracy.2",
        "seconds",
    ]
    assert top["train_loss.1"] == ""
    assert top["val_accuracy.2"] == "0.75"
    assert below["val_accuracy.2"] == ""


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    history.write(tmp_path, ROWS)
    history.write(tmp_path, ROWS[:1])
    assert [row["epoch"] for row in lines(tmp_path)] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [history.CSV, history.JSONL]


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*log_dir"):
        history.write(tmp_path / "file", ROWS)


def test_a_row_says_what_happened_in_the_epoch(tmp_path: Path) -> None:
    trained = trainer(converted("nwise"), log_dir=tmp_path)
    rows = trained.fit(loader(), loader(), epochs=2)
    assert rows is trained.history
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [4, 8]
    row = rows[1]
    assert len(row["train_loss"]) == 3
    assert list(row["train_accuracy"]) == list(row["val_accuracy"]) == list(row["val_loss"]) == [1, 2, 3]
    assert row["lr"] == [0.005] * 3, "the rate that the epoch was trained with"
    assert row["skipped"] == [0, 0, 0]
    assert row["seconds"] > 0
    assert row["samples_per_second"] == pytest.approx(22 / row["seconds"])
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    assert table(tmp_path)[1]["train_loss.2"] == str(row["train_loss"][1])


def test_without_validation_and_with_parts_that_have_no_loss() -> None:
    row = trainer(converted("bp")).fit(loader(), epochs=1)[0]
    assert row["train_loss"][:2] == [None, None]
    assert row["train_loss"][2] > 0
    assert row["val_loss"] == row["val_accuracy"] == {}
    assert list(row["train_accuracy"]) == [3]


@pytest.mark.parametrize("at", [2, 7, 9])
def test_a_resumed_run_continues_the_files_as_if_nothing_had_been(tmp_path: Path, at: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trainer(converted(), log_dir=whole).fit(loader(), loader(), epochs=3)
    options = {"log_dir": cut, "checkpoint_every": 3}
    with pytest.raises(Interruption):
        trainer(converted(), tmp_path / "state", **options).fit(Breaking(loader(), at), loader(), epochs=3)
    resumed = trainer(converted(), tmp_path / "state", **options)
    assert timeless(resumed.fit(loader(), loader(), epochs=3, resume=True)) == timeless(expected)
    assert timeless(lines(cut)) == timeless(lines(whole))
    assert [row["epoch"] for row in table(cut)] == ["1", "2", "3"]
