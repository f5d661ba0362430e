"""What the ranks of ``test_saver.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import os
import signal
import threading
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from localize.runtime import checkpoint, saver
from localize.runtime.causes import Stopped
from localize.runtime.checkpoint import LATEST, WEIGHTS, Share
from localize.runtime.distributed import DistributedRun
from localize.runtime.ranks import join
from localize.runtime.run import Run
from localize.runtime.session import Session
from localize.runtime.snapshot import Snapshot
from localize.weights import weights_of
from tests.runtime import cases_replicas, helpers
from tests.runtime.cases import digest, made, rank

torch.set_num_threads(1)
PATIENCE_S = 30.0


class Held:
    """Stands in for ``checkpoint.write``: waits until it is let go, and writes then."""

    def __init__(self) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        self._write = checkpoint.write

    def __call__(self, partial: Path, snapshot: Snapshot, packed: bytes, share: Share) -> None:
        self.entered.set()
        assert self.go.wait(PATIENCE_S), "nobody let it go: was training waiting for it?"
        self._write(partial, snapshot, packed, share)


def change(run: Run) -> None:
    """Everything that a checkpoint holds, in place: all that training would change next, and more."""
    state = run.state
    with torch.no_grad():
        for tensor in weights_of(run.local).values():
            if not tensor.is_meta:
                tensor.add_(1)
        for optimizer in state.optimizers:
            for entries in optimizer.state.values():
                for value in entries.values():
                    value.add_(1)
            for group in optimizer.param_groups:
                group["lr"] = 99.0
        state.tally.loss.add_(1)
    for scheduler in state.schedulers:
        assert scheduler is not None
        scheduler.last_epoch += 7
    state.tally.skipped[0] += 1
    state.history[0]["train_loss"][0] = -1.0
    state.history.append(deepcopy(state.history[0]))
    state.step, state.epoch, state.batch = state.step + 1, state.epoch + 1, 0


def changed_after_saving(executor: str, folder: str) -> dict[str, Any]:
    """Trains into the second epoch, saves with the thread held back, changes everything, and lets it go."""
    local, loader = made("mixed", "early_exit", 4)
    path, kind = Path(folder), DistributedRun if executor == "distributed" else Run
    held, save = Held(), kind.save
    checkpoint.write = held
    found: dict[str, Any] = {}

    def saving(run: Any) -> None:
        then = deepcopy(run.state.snapshot())
        save(run)
        change(run)
        now = run.state.snapshot()
        held.go.set()
        run.saver.wait()
        if executor == "distributed":
            run.team.session.wait_for_all()
        loaded = checkpoint.load(path)
        assert loaded is not None
        found.update(
            steps=[s.about["step"] for s in (then, loaded, now)],
            weights=len(then.weights),
            optimizer=len(then.optimizer),
            equal=different(then, loaded) == [],
            differs=different(now, loaded),
        )
        raise helpers.Interruption

    kind.save = saving  # type: ignore[method-assign]
    trainer = helpers.trainer(
        local, path, executor=executor, progress=False, checkpoint_every=9, async_checkpoint=True
    )
    try:
        trainer.fit(loader, loader, epochs=3)
    except (helpers.Interruption, Stopped):
        return found
    raise AssertionError("no checkpoint was made")


def different(snapshot: Snapshot, loaded: Snapshot) -> list[str]:
    """Where a checkpoint differs from what this process had."""
    own, theirs = snapshot.trainer, loaded.trainer
    measured = torch.tensor(own["tally"]["measured"])
    tally = [torch.equal(o["tally"]["loss"][measured], theirs["tally"]["loss"][measured]) for o in (own,)]
    found = {
        "weights": all(torch.equal(t, loaded.weights[n]) for n, t in snapshot.weights.items()),
        "optimizer": all(torch.equal(t, loaded.optimizer[n]) for n, t in snapshot.optimizer.items()),
        "counters": snapshot.about
        == {k: v for k, v in loaded.about.items() if k not in ("format", "file_bytes")},
        "history": own["history"] == theirs["history"],
        "hyperparameters": all(o in theirs["optimizers"] for o in own["optimizers"]),
        "tally": all(tally),
    }
    return [name for name, same in found.items() if not same]


def cannot_write(on: int, at: int, folder: str) -> dict[str, Any]:
    """Trains where one rank's disk is full when the checkpoint of a step is written; what each rank says of it."""
    local, loader = made("mixed", "early_exit", 3)
    write, steps, latest = checkpoint.write, list[int](), Path(folder) / checkpoint.LATEST
    latest.touch()

    def writing(partial: Path, snapshot: Snapshot, packed: bytes, share: Share) -> None:
        if rank() == on and snapshot.about["step"] == at:
            while latest.read_text() != f"step-{at - 3:08d}\n":  # the first rank may be steps ahead of the others
                time.sleep(0.01)
            raise OSError(28, "No space left on device")
        write(partial, snapshot, packed, share)

    checkpoint.write = writing
    trainer = helpers.trainer(
        local, Path(folder), executor="distributed", progress=False, checkpoint_every=3, async_checkpoint=True,
        on_step=lambda step, reports: steps.append(step), gather="none",
    )  # fmt: skip
    try:
        trainer.fit(loader, epochs=3)
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error), "steps": len(steps)}
    return {"kind": None}


def held_while_another_fails(folder: str) -> dict[str, Any]:
    """Two ranks: the second one waits for a disk that never answers when the first one fails."""
    local, loader = made("mixed", "early_exit", 2)
    saver.PATIENCE_S = 0.3
    held = Held()
    waiting = Path(folder) / "waiting"

    def listening(session: Session) -> None:
        if held.entered.is_set():
            waiting.touch()
        check(session)

    def on_step(step: int, reports: object) -> None:
        if rank() == 0 and step == 2:
            while not waiting.exists():  # until the other one is there
                time.sleep(0.01)
            raise helpers.Interruption("something broke")

    if rank() == 1:
        checkpoint.write = held
    check = Session.check
    Session.check = listening  # type: ignore[method-assign]
    trainer = helpers.trainer(
        local, Path(folder) / "a", executor="distributed", progress=False, checkpoint_every=1, on_step=on_step,
        async_checkpoint=True,
    )  # fmt: skip
    try:
        trainer.fit(loader, epochs=2)
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return {"kind": None}


def replicas_go_on(folder: str, stop: int | None) -> list[Any] | None:
    """See ``cases_replicas.goes_on``; threads write the checkpoints."""
    helpers.trainer = partial(helpers.trainer, async_checkpoint=True)  # type: ignore[assignment]
    return cases_replicas.goes_on(folder, stop)


def runs(folder: str, moment: str | None = None, on: int = 0, at: int = 8) -> dict[str, Any] | None:
    """Trains three epochs, or goes on to do so; what there is at the end, on the first rank.

    ``moment``: when, in the making of the checkpoint of step ``at``, rank ``on`` is killed.
    """
    local, loader = made("mixed", "lct", 4)
    path = Path(folder)
    if moment is not None:
        kill_in(moment, on, at)
    several = os.environ["WORLD_SIZE"] != "1"
    trainer = helpers.trainer(
        local, path, executor="distributed" if several else "sequential", progress=False, checkpoint_every=4,
        async_checkpoint=True,
    )  # fmt: skip
    try:
        rows = trainer.fit(loader, loader, epochs=3, resume=True)
    except Stopped:
        return None
    if rank() > 0:
        return None
    snapshot = checkpoint.load(path)
    assert snapshot is not None
    return {
        "model": digest(weights_of(local)),
        "weights": digest(snapshot.weights),
        "optimizer": digest(snapshot.optimizer),
        "rows": helpers.timeless(rows),
    }


def kill_in(moment: str, on: int, at: int) -> None:
    """Makes the thread that writes a checkpoint end its process."""
    write, commit, save_file, replace = checkpoint.write, checkpoint.commit, checkpoint.save_file, os.replace
    steps: list[int] = []

    def killing(what: Any, when: Any) -> Any:
        def instead(*args: Any) -> Any:
            if rank() == on and when(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return what(*args)

        return instead

    def watched(partial: Path, snapshot: Snapshot, packed: bytes, share: Share) -> None:
        assert threading.current_thread() is not threading.main_thread()
        steps.append(snapshot.about["step"])
        write(partial, snapshot, packed, share)

    checkpoint.write = watched
    match moment:
        case "half":  # weights are there, optimizer state is not
            checkpoint.save_file = killing(
                save_file, lambda t, f: steps[-1] == at and WEIGHTS[:7] not in f.name
            )
        case "commit":
            checkpoint.commit = killing(commit, lambda folder, partial, about: about["step"] == at)
        case "rename":
            os.replace = killing(replace, lambda a, b: steps[-1] == at and Path(b).name != LATEST)
        case "pointer":  # renamed, and not the latest yet
            os.replace = killing(replace, lambda a, b: steps[-1] == at and Path(b).name == LATEST)


def counts_while_gathering(rounds: int) -> dict[str, Any]:
    """Two threads count while the main one gathers, posts and looks: what each was told."""
    ranks = join()
    session = Session(ranks, [f"part {i + 1}" for i in range(ranks.count)])
    told: list[int] = []

    def count() -> None:
        told.extend(session.count("share") for _ in range(rounds))

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    gathered = []
    for i in range(rounds):
        session.post("board", i)
        session.look("board")
        session.check()
        gathered.append(session.gather([ranks.rank, i]))
    for thread in threads:
        thread.join()
    session.leave()
    return {"told": told, "gathered": gathered}
