"""Checkpoints that a thread writes hold what there was when they were made, and nothing goes wrong unheard."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from localize import CheckpointError, ConfigError
from localize.runtime import checkpoint, saver, snapshot
from localize.runtime.checkpoint import LATEST, Share
from localize.runtime.saver import Saver
from localize.runtime.snapshot import Snapshot
from tests.runtime.cases_saver import Held
from tests.runtime.helpers import (
    BATCHES,
    Breaking,
    Interruption,
    assert_same,
    converted,
    loader,
    tensors,
    timeless,
    trainer,
)
from tests.runtime.several import Several

CASES = "tests.runtime.cases_saver:"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Holds back the thread that writes until ``held.go`` is set."""
    instead = Held()
    monkeypatch.setattr(checkpoint, "write", instead)
    yield instead
    instead.go.set()


beside = partial(trainer, async_checkpoint=True)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint of step")]


def step_of_latest(folder: Path) -> int:
    loaded = checkpoint.load(folder)
    assert loaded is not None
    step: int = loaded.about["step"]
    return step


# -------------------------------------------------------------------- what is saved


@pytest.mark.parametrize(("executor", "ranks"), [("sequential", 1), ("distributed", 2)])
def test_what_changes_after_saving_is_not_in_the_checkpoint(
    several: Several, tmp_path: Path, executor: str, ranks: int
) -> None:
    for each in several.results(
        f"{CASES}changed_after_saving", ranks, executor=executor, folder=str(tmp_path)
    ):
        assert each["steps"] == [9, 9, 10]
        assert each["weights"] > 3
        assert each["optimizer"] > 3
        assert each["equal"]
        expected = ["weights", "optimizer", "counters", "history", "hyperparameters", "tally"]
        assert each["differs"] == expected, "the test changes everything"


def test_a_copy_shares_no_memory_and_waits_for_nothing() -> None:
    flat = torch.arange(12.0)
    made = Snapshot(
        {"step": 1}, {"a": flat[:4], "b": flat.view(3, 4).t()}, {"a/step": flat[5]}, {"history": []}
    )
    copy, arrived = snapshot.copied(made)
    arrived()
    flat.zero_()
    assert copy.weights["a"].tolist() == [0, 1, 2, 3]
    assert copy.weights["b"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert copy.optimizer["a/step"].item() == 5
    assert all(t.is_contiguous() for t in copy.weights.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_is_of_the_moment_it_was_asked_for() -> None:
    weight = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # so that nothing has been copied yet when `copied` returns
    copy, arrived = snapshot.copied(Snapshot({"step": 1}, {"w": weight}, {"w/step": torch.ones(())}))
    weight.zero_()
    waiter = threading.Thread(target=arrived)
    waiter.start()
    waiter.join()
    assert copy.weights["w"].is_pinned()
    assert bool((copy.weights["w"] == 1).all())


def test_the_copy_takes_what_weights_and_optimizer_take_and_goes_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    sizes: list[tuple[int, int]] = []

    def counting(live: Snapshot) -> Any:
        assert not [ref for ref in alive if ref() is not None], "two copies at once"
        copy, arrived = snapshot.copied(live)
        both = [[*s.weights.values(), *s.optimizer.values()] for s in (live, copy)]
        alive.extend(weakref.ref(tensor) for tensor in both[1])
        live_bytes, copy_bytes = (sum(t.nbytes for t in each) for each in both)
        assert copy_bytes == sum(t.untyped_storage().nbytes() for t in both[1])
        sizes.append((live_bytes, copy_bytes))
        return copy, arrived

    monkeypatch.setattr(saver, "copied", counting)
    beside(converted(), tmp_path, checkpoint_every=1).fit(loader(), epochs=2)
    assert len(sizes) == 2 * BATCHES + 1
    assert all(live == copy > 0 for live, copy in sizes)
    assert not [ref for ref in alive if ref() is not None]


def test_on_a_cpu_nothing_is_copied_and_no_thread_made_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(live: Snapshot) -> Any:
        raise AssertionError("a copy")

    monkeypatch.setattr(saver, "copied", refused)
    trainer(converted(), tmp_path / "a").fit(loader(), epochs=1)
    trainer(converted(), tmp_path / "b", async_checkpoint=False).fit(loader(), epochs=1)
    with pytest.raises(AssertionError, match="a copy"):
        beside(converted(), tmp_path / "c").fit(loader(), epochs=1)
    options = trainer(converted(), tmp_path / "d").options
    assert options.saves_beside(torch.device("cuda", 1))
    assert not options.saves_beside(torch.device("cpu"))


@pytest.mark.parametrize(("value", "folder"), [("yes", True), (2, True), (True, False)])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, value: Any, folder: bool) -> None:
    with pytest.raises(ConfigError, match="async_checkpoint"):
        trainer(converted(), tmp_path if folder else None, async_checkpoint=value)


# -------------------------------------------------------------------- who waits for whom


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, held: Held) -> None:
    """The thread is let go two steps later only; held back by it, training would never come there."""
    steps: list[int] = []

    def on_step(step: int, reports: object) -> None:
        steps.append(step)
        if step == 5:
            assert held.entered.wait(10)
            assert not (tmp_path / LATEST).exists()
        if step == 7:
            held.go.set()

    beside(converted(), tmp_path, checkpoint_every=4, on_step=on_step).fit(loader(), epochs=2)
    assert steps == [*range(1, 9)]
    assert step_of_latest(tmp_path) == 8
    assert not threads()


def test_one_checkpoint_at_a_time_in_order_and_the_end_waits_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, entered, busy = checkpoint.write, list[int](), threading.Lock()

    def slowly(partial: Path, snapshot: Snapshot, packed: bytes, share: Share) -> None:
        assert busy.acquire(blocking=False), "two at once"
        entered.append(snapshot.about["step"])
        threading.Event().wait(0.02)
        write(partial, snapshot, packed, share)
        busy.release()

    monkeypatch.setattr(checkpoint, "write", slowly)
    beside(converted(), tmp_path, checkpoint_every=1).fit(loader(), epochs=2)
    assert entered == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert step_of_latest(tmp_path) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000008", "step-00000008-2"]


# -------------------------------------------------------------------- errors


class Full:
    """Stands in for ``checkpoint.write``: the disk is full at one step, once ``may`` is set."""

    def __init__(self, at: int) -> None:
        self.at, self.write, self.may = at, checkpoint.write, threading.Event()

    def __call__(self, partial: Path, snapshot: Snapshot, packed: bytes, share: Share) -> None:
        if snapshot.about["step"] == self.at:
            assert self.may.wait(10)
            raise OSError(28, "No space left on device")
        self.write(partial, snapshot, packed, share)


SAID = r"^The checkpoint of step {} cannot be written to .*No space left.*last one is intact"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_is_raised_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    full, steps = Full(at=4), list[int]()
    full.may.set()
    monkeypatch.setattr(checkpoint, "write", full)

    def on_step(step: int, reports: object) -> None:
        steps.append(step)
        for thread in threads():
            thread.join()

    training = trainer(
        converted(), tmp_path, checkpoint_every=2, on_step=on_step, async_checkpoint=asynchronous
    )
    with pytest.raises(CheckpointError, match=SAID.format(4)):
        training.fit(loader(), epochs=3)
    assert steps == ([1, 2, 3, 4] if asynchronous else [1, 2, 3])
    assert step_of_latest(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000002"]


def test_an_error_while_the_next_checkpoint_waits_is_raised_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, steps, wait = Full(at=2), list[int](), Saver.wait

    def waiting(own: Saver) -> None:
        if own._thread is not None and steps[-1:] == [3]:
            full.may.set()
        wait(own)

    monkeypatch.setattr(checkpoint, "write", full)
    monkeypatch.setattr(Saver, "wait", waiting)
    training = beside(
        converted(), tmp_path, checkpoint_every=2, on_step=lambda step, reports: steps.append(step)
    )
    with pytest.raises(CheckpointError, match=SAID.format(2)):
        training.fit(loader(), epochs=3)
    assert steps == [1, 2, 3]


def test_an_error_of_the_last_checkpoint_is_raised_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(at=2 * BATCHES)
    full.may.set()
    monkeypatch.setattr(checkpoint, "write", full)
    training = beside(converted(), tmp_path)
    with pytest.raises(CheckpointError, match=SAID.format(8)):
        training.fit(loader(), epochs=2)
    assert step_of_latest(tmp_path) == 4
    assert len(training.history) == 2


def test_what_nobody_expects_says_where_it_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("too little")

    monkeypatch.setattr(checkpoint, "write", broken)
    with pytest.raises(MemoryError, match="too little") as caught:
        beside(converted(), tmp_path).fit(loader(), epochs=1)
    assert caught.value.__notes__ == ["This happened while the checkpoint of step 4 was written."]


@pytest.mark.parametrize(
    ("on", "at"), [(0, 6), (2, 6), (1, 21)], ids=["first rank", "last rank", "at the end"]
)
def test_all_ranks_stop_where_one_cannot_write(several: Several, tmp_path: Path, on: int, at: int) -> None:
    """With ``gather='none'`` nothing but the last checkpoint keeps a rank from ending before the others."""
    found = several.run(f"{CASES}cannot_write", 3, on=on, at=at, folder=str(tmp_path))
    for rank, answer in enumerate(found):
        result = answer["result"]
        assert result["kind"] == ("CheckpointError" if rank == on else "Stopped"), answer
        assert f"The checkpoint of step {at} cannot be written" in result["text"]
        assert (f"because of rank {on} (part {on + 1} of 3)" in result["text"]) == (rank != on)
        assert answer["seconds"] < 20
    assert found[on]["result"]["steps"] < at + 3 or at == 21
    assert step_of_latest(tmp_path) == at - 3


# -------------------------------------------------------------------- training that fails


def test_a_checkpoint_is_completed_when_training_fails(tmp_path: Path, held: Held) -> None:
    timer = threading.Timer(0.3, held.go.set)

    def on_step(step: int, reports: object) -> None:
        if step == 3:
            timer.start()
            raise Interruption

    with pytest.raises(Interruption):
        beside(converted(), tmp_path, checkpoint_every=2, on_step=on_step).fit(loader(), epochs=1)
    assert step_of_latest(tmp_path) == 2
    assert not threads()


def test_one_that_takes_forever_is_given_up_and_never_the_latest(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver, "PATIENCE_S", 0.1)
    with pytest.raises(Interruption):
        beside(converted(), tmp_path, checkpoint_every=2).fit(Breaking(loader(), 4), epochs=1)
    assert "The checkpoint of step 2 was not complete after 0.1 s" in caplog.text
    (left,) = threads()
    held.go.set()
    left.join()
    assert checkpoint.load(tmp_path) is None
    whole, resumed = converted(), converted()
    trainer(whole).fit(loader(), epochs=1)
    beside(resumed, tmp_path).fit(loader(), epochs=1, resume=True)
    assert_same(tensors(whole), tensors(resumed))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000004"]


def test_an_error_beside_another_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Full(at=2)
    monkeypatch.setattr(checkpoint, "write", full)

    def on_step(step: int, reports: object) -> None:
        if step == 2:
            full.may.set()
            raise Interruption

    with pytest.raises(Interruption):
        beside(converted(), tmp_path, checkpoint_every=2, on_step=on_step).fit(loader(), epochs=1)
    assert "The checkpoint of step 2 cannot be written" in caplog.text


def test_a_rank_that_waits_for_its_disk_stops_when_another_one_fails(
    several: Several, tmp_path: Path
) -> None:
    first, second = several.run(f"{CASES}held_while_another_fails", 2, folder=str(tmp_path))
    assert first["result"]["kind"] == "Interruption"
    assert second["result"]["kind"] == "Stopped"
    assert (
        "because of rank 0 (part 1 of 2) at step 3: Interruption: something broke" in second["result"]["text"]
    )
    assert max(first["seconds"], second["seconds"]) < 15
    assert checkpoint.load(tmp_path / "a") is None


# -------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("at", [3, 4, 6, 9])
def test_a_resumed_run_ends_where_one_without_a_thread_ends(tmp_path: Path, at: int) -> None:
    whole = converted()
    training = trainer(whole, tmp_path / "whole")
    rows = training.fit(loader(), loader(), epochs=3)
    with pytest.raises(Interruption):
        beside(converted(), tmp_path / "a", checkpoint_every=2).fit(
            Breaking(loader(), at), loader(), epochs=3
        )
    local = converted()
    again = beside(local, tmp_path / "a", checkpoint_every=2).fit(loader(), loader(), epochs=3, resume=True)
    assert_same(tensors(whole), tensors(local))
    assert timeless(rows) == timeless(again)
    one, other = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "a")
    assert one is not None and other is not None
    assert_same(one.weights, other.weights)
    assert_same(one.optimizer, other.optimizer)


@pytest.mark.parametrize(
    ("ranks", "moment", "on", "left"),
    [(1, "half", 0, 4), (1, "commit", 0, 4), (1, "rename", 0, 4), (1, "pointer", 0, 4), (2, "half", 1, 4)],
)
def test_killed_while_a_thread_writes_it_goes_on_from_the_one_before(
    several: Several, tmp_path: Path, ranks: int, moment: str, on: int, left: int
) -> None:
    whole = several.results(f"{CASES}runs", ranks, folder=str(tmp_path / "whole"))[0]
    answers = several.run(f"{CASES}runs", ranks, folder=str(tmp_path / "a"), moment=moment, on=on)
    assert answers[on]["status"] == -9, answers
    assert step_of_latest(tmp_path / "a") == left
    assert several.results(f"{CASES}runs", ranks, folder=str(tmp_path / "a"))[0] == whole


def test_ranks_that_write_beside_training_are_one_process(several: Several, tmp_path: Path) -> None:
    several.results(
        "tests.runtime.cases:same_as_sequential", 3, model="mixed", method="nwise", parts=4, folder=str(tmp_path),
        async_checkpoint=True, checkpoint_every=1,
    )  # fmt: skip


def test_replicas_go_on_from_what_threads_wrote(several: Several, tmp_path: Path) -> None:
    whole = several.results(
        "tests.runtime.cases_replicas:goes_on", 4, folder=str(tmp_path / "whole"), stop=None
    )
    stopped = several.results(f"{CASES}replicas_go_on", 4, folder=str(tmp_path / "a"), stop=5)
    assert stopped == [None] * 4
    assert step_of_latest(tmp_path / "a") == 4
    assert several.results(f"{CASES}replicas_go_on", 4, folder=str(tmp_path / "a"), stop=None) == whole


def test_the_store_counts_right_from_several_threads(several: Several) -> None:
    rounds, ranks = 100, 3
    found = several.results(f"{CASES}counts_while_gathering", ranks, rounds=rounds)
    assert sorted(n for each in found for n in each["told"]) == [*range(1, 2 * ranks * rounds + 1)]
    for each in found:
        assert each["gathered"] == [[[rank, i] for rank in range(ranks)] for i in range(rounds)]
