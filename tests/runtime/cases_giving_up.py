"""What ranks do in ``test_giving_up.py``."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from localize.errors import CheckpointError, LocalizeError
from localize.runtime.distributed import DistributedRun
from localize.runtime.saver import Saver
from localize.runtime.session import Session
from localize.runtime.waiters import Waiters
from tests.runtime import helpers
from tests.runtime.cases import _message, made, rank

WAITING = ("inbox", "outbox", "waiting")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(WAITING)]


def threads_left(method: str, on: int, replicas: int) -> dict[str, Any]:
    """Trains until a rank fails; which threads wait for other ranks during training, and after it."""
    local, loader = made("mixed", method, 3 if replicas == 1 else 2)
    during: list[str] = []

    def misbehave(step: int, reports: object) -> None:
        if step == 4:
            during.extend(threads())
            if rank() == on:
                raise helpers.Interruption("something broke")

    trainer = helpers.trainer(
        local, executor="distributed", progress=False, on_step=misbehave, data_parallel=replicas
    )
    try:
        trainer.fit(loader, epochs=5)
    except Exception as error:
        return {**_message(error), "during": during, "after": threads()}
    return {"kind": None}


def gives_up_badly(how: str) -> dict[str, Any]:
    """Two ranks, where something else goes wrong on the second one when it fails."""
    local, loader = made("mixed", "early_exit", 2)

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    def cannot(saver: Saver) -> None:
        raise OSError("cannot stop")

    def interrupted(waiters: Waiters, within_s: float) -> bool:
        Waiters._ended = ended  # type: ignore[method-assign]
        raise KeyboardInterrupt

    ended = Waiters._ended

    def misbehave(step: int, reports: object) -> None:
        if rank() == 1 and step == 4:
            if how == "no stop":
                Saver.stop = cannot  # type: ignore[method-assign]
            elif how == "Ctrl-C":
                Waiters._ended = interrupted  # type: ignore[method-assign]
            raise Unprintable if how == "no words" else helpers.Interruption("something broke")

    trainer = helpers.trainer(local, executor="distributed", progress=False, on_step=misbehave)
    try:
        trainer.fit(loader, epochs=5)
    except BaseException as error:
        said = str(error) if rank() == 0 else ""
        return {"kind": type(error).__name__, "said": said, "after": threads()}
    return {"kind": "nothing"}


def starts_anew(folder: str) -> list[str]:
    """The second rank cannot read its share of a checkpoint when the others are ready; then all begin once more."""
    said = []

    def cannot(run: DistributedRun) -> None:
        if rank() == 1:
            raise CheckpointError("cannot be read")

    DistributedRun.resume = cannot  # type: ignore[method-assign]
    for resume in (True, False):
        local, loader = made("mixed", "early_exit", 2)
        trainer = helpers.trainer(local, Path(folder), executor="distributed", progress=False)
        try:
            trainer.fit(loader, epochs=1, resume=resume)
        except LocalizeError as error:
            said.append(type(error).__name__)
    return said


def looks_late() -> dict[str, str]:
    """The last rank is busy for a while after the first one failed, and hears of it only then."""
    local, loader = made("mixed", "early_exit", 3)
    check = Session.check

    def checking(session: Session) -> None:
        if rank() == 2 and session.step >= 2:
            time.sleep(1.5)
        check(session)

    def misbehave(step: int, reports: object) -> None:
        if rank() == 0 and step == 4:
            raise helpers.Interruption("something broke")
        if rank() == 2 and step == 2:
            time.sleep(2.5)

    Session.check = checking  # type: ignore[method-assign]
    trainer = helpers.trainer(local, executor="distributed", progress=False, on_step=misbehave)
    try:
        trainer.fit(loader, epochs=5)
    except Exception as error:
        return _message(error)
    return {"kind": "nothing"}


def breaks() -> None:
    """The second rank fails, in a process that then ends."""
    local, loader = made("mixed", "bp", 3)

    def misbehave(step: int, reports: object) -> None:
        if rank() == 1 and step == 10:
            raise helpers.Interruption("something broke")

    helpers.trainer(local, executor="distributed", progress=False, on_step=misbehave).fit(loader, epochs=5)
