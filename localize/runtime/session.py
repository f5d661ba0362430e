"""What the processes of one run have in common: they agree, and learn that one of them failed.

Small values go through the store that the launcher keeps: every wait on it is short and looks for a failure in
between, so that nobody waits long for a rank that is gone. The first rank to fail writes down why; all others stop
with that reason. Tensors go through a process group of gloo, see ``links.py``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import PrefixStore

from localize.errors import LocalizeError
from localize.runtime.causes import Cause, Stopped
from localize.runtime.ranks import Ranks, launcher_keeps_store
from localize.runtime.waiters import Waiters

POLL_S = 0.25  # how often a waiting rank looks for a failure elsewhere
_GRACE_S = 2.0  # how long one whose neighbour is gone waits for that neighbour's reason
_STAY_S = 10.0  # how long the process that keeps the store stays after a failure, for the others to learn of it
_ABORT = "abort"
_LEFT = "left"
_LONGEST = 1000  # characters of a reason
T = TypeVar("T")
Lost = Callable[[Exception], LocalizeError]  # the error to raise of one that broke a wait
_sessions = 0


class Session:
    """One ``fit`` or ``evaluate`` of all ranks together.

    Attributes:
        ranks: this process among them.
        names: which parts each rank has, in words.
        step: the step this rank is at, from 0; for messages.
        waiters: the threads that wait for other ranks.
    """

    def __init__(self, ranks: Ranks, names: Sequence[str]) -> None:
        global _sessions
        _sessions += 1
        self.ranks, self.names, self.step = ranks, list(names), 0
        self._store = PrefixStore(f"localize/{_sessions}", ranks.store)
        self.waiters = Waiters(ranks.group)
        self._gathered, self._has_signed_off = 0, False

    # ---------------------------------------------------------------- failing

    def check(self) -> None:
        """Raises ``Stopped`` where any rank has failed."""
        cause = self._known_cause()
        if cause is not None:
            raise self.stopped(cause)

    def stopped(self, cause: Cause) -> Stopped:
        """The error of a rank that stops because another one failed."""
        tells = cause.gone and self.ranks.rank == (1 if cause.rank == 0 else 0)
        here = f"Rank {self.ranks.rank} ({self.names[self.ranks.rank]})"
        return Stopped(f"{here} stopped at step {self.step + 1}, because of {cause}", cause, tells)

    def fail(self, error: BaseException, edge: str | None = None) -> Cause:
        """Tells all ranks of an error here; returns the run's first failure, which may be another's."""
        if isinstance(error, Stopped):
            return error.cause
        return self._blame(self._cause(self.ranks.rank, edge, _in_words(error)))

    def lost(self, rank: int, edge: str | None) -> Stopped:
        """The error of a rank whose connection to a neighbour broke: that one's own reason, if it has left any."""
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end:
            cause = self._known_cause()
            if cause is not None:
                return self.stopped(cause)
            time.sleep(POLL_S / 5)
        return self.stopped(self._blame(self._cause(rank, edge, "the process is gone.", gone=True)))

    def _cause(self, rank: int, edge: str | None, error: str, gone: bool = False) -> Cause:
        return Cause(rank, self.names[rank], self.step + 1, edge, error, gone)

    def _blame(self, cause: Cause) -> Cause:
        try:
            first = self._store.compare_set(_ABORT, "", json.dumps(asdict(cause)))
        except RuntimeError:  # the store is gone, too
            return cause
        return Cause(**json.loads(first))

    def _known_cause(self) -> Cause | None:
        try:
            return Cause(**json.loads(self._store.get(_ABORT))) if self._store.check([_ABORT]) else None
        except RuntimeError:
            return self._storeless()

    def _storeless(self) -> Cause:
        if launcher_keeps_store():
            return self._cause(self.ranks.rank, None, "the launcher is gone, and its store with it.")
        return self._cause(0, None, "the process is gone, and with it the store that would say why.", gone=True)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:
            raise self.stopped(self._storeless()) from error

    def leave(self) -> None:
        """The last call of all. The process that keeps the store stays until the others need it no more.

        Raises:
            Stopped: another rank failed meanwhile; ``give_up`` is to follow.
        """
        self._ask(self._sign_off)
        while self._keeps_store and self._ask(self._signed_off) < self.ranks.count:
            self.check()
            time.sleep(POLL_S / 50)

    def give_up(self) -> None:
        """The last call after a failure, when others were told. No thread of the session runs after it.

        Connections may be closed for that, so that these processes cannot have another session.
        """
        try:
            self._stay_for_the_others()
        finally:
            self.waiters.end(POLL_S)

    def _stay_for_the_others(self) -> None:
        """Until all ranks know why the run failed, if they come to hear of it here."""
        cause = self._known_cause()
        killed = cause is not None and cause.gone
        # Of ranks that were killed only one is known, and whoever waits for a neighbour notices soon.
        end = time.monotonic() + (_GRACE_S + POLL_S if killed else _STAY_S)
        with suppress(RuntimeError):  # the store is gone, and with it what there was to wait for
            self._sign_off()
            while self._keeps_store and self._signed_off() < self.ranks.count - (1 if killed else 0):
                if time.monotonic() > end:
                    return
                time.sleep(POLL_S / 10)

    def _sign_off(self) -> None:
        if not self._has_signed_off:
            self._store.add(_LEFT, 1)
        self._has_signed_off = True

    def _signed_off(self) -> int:
        return self._store.add(_LEFT, 0)

    @property
    def _keeps_store(self) -> bool:
        return self.ranks.first and not launcher_keeps_store()

    # ---------------------------------------------------------------- agreeing

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, by rank. Values are plain data (JSON); all ranks call this in the same order.

        Raises:
            Stopped: another rank failed meanwhile.
        """
        self._gathered += 1
        prefix = f"gather/{self._gathered}"
        self._ask(lambda: self._store.set(f"{prefix}/{self.ranks.rank}", json.dumps(value)))
        keys = [f"{prefix}/{rank}" for rank in range(self.ranks.count)]
        self._wait(keys)
        result = self._ask(lambda: [json.loads(self._store.get(key)) for key in keys])
        # Whoever is here has read all that came before: what lies two gatherings back, nobody needs.
        self._ask(lambda: self._store.delete_key(f"gather/{self._gathered - 2}/{self.ranks.rank}"))
        return result

    def wait_for_all(self) -> None:
        """Until every rank is here. Errors: see ``gather``, among whose calls this counts."""
        self.gather(None)

    def _wait(self, keys: list[str]) -> None:
        pause = 0.0005  # asked anew now and then: a wait of the store itself is not interrupted by a failure
        while not self._ask(lambda: self._store.check(keys)):
            try:
                self.check()
            except Stopped:  # a rank that failed on what all gave: then it is there for this one, too
                if self._ask(lambda: self._store.check(keys)):
                    return
                raise
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_S / 10)

    def count(self, name: str) -> int:
        """How many ranks have called this with ``name``, this one included."""
        return self._ask(lambda: self._store.add(f"count/{name}", 1))

    def post(self, name: str, value: Any) -> None:
        """Leaves a value for others to look at."""
        self._ask(lambda: self._store.set(f"board/{name}/{self.ranks.rank}", json.dumps(value)))

    def look(self, name: str) -> list[Any]:
        """The last value of every rank, by rank; None where it has posted none. Waits for nobody."""
        store, keys = self._store, [f"board/{name}/{rank}" for rank in range(self.ranks.count)]
        return self._ask(lambda: [json.loads(store.get(k)) if store.check([k]) else None for k in keys])

    # ---------------------------------------------------------------- tensors

    def watched(
        self, function: Callable[[], T], lost: Lost, waiting: Callable[[], Any] = lambda: None,
        limit_s: float = math.inf,
    ) -> T:  # fmt: skip
        """Runs what may wait long for other ranks, in a thread, and gives up where a rank fails.

        ``lost`` makes the error to raise of one of ``function``, or of a ``TimeoutError`` after ``limit_s``.
        ``waiting`` is called once if it takes long. Raises ``Stopped`` where another rank failed meanwhile.
        """
        results, errors = list[T](), list[Exception]()

        def run() -> None:
            try:
                results.append(function())
            except Exception as error:
                errors.append(error)

        thread = self.waiters.start(run, "waiting for other ranks")
        end = time.monotonic() + limit_s
        thread.join(POLL_S)
        if thread.is_alive():
            waiting()
        while thread.is_alive():
            self.check()
            if time.monotonic() > end:
                raise lost(TimeoutError())
            thread.join(POLL_S)
        if errors:
            raise lost(errors[0]) from errors[0]
        return results[0]

    def call(self, function: Callable[[], T], other: int, limit_s: float = math.inf) -> T:
        """Runs what may wait long for rank ``other``, see ``watched``. Raises ``Stopped``, also where that is gone."""
        return self.watched(function, lambda error: self.lost(other, None), limit_s=limit_s)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Hands a tensor to a rank that calls ``receive`` for it."""
        held = tensor.detach().cpu().contiguous()
        self.call(lambda: self.ranks.group.send([held], to, 1).wait(), to)

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """A tensor of a rank that calls ``send``, of the shape and dtype of ``like``, on the CPU."""
        held = torch.empty(like.shape, dtype=like.dtype)
        self.call(lambda: self.ranks.group.recv([held], source, 1).wait(), source)
        return held


def _in_words(error: BaseException) -> str:
    """An error in one line, whatever its own code does."""
    try:
        text = str(error).strip() or "no message"
    except Exception:
        text = "an error whose message cannot be made"
    known = isinstance(error, LocalizeError)
    return " ".join((text if known else f"{type(error).__name__}: {text}").split())[:_LONGEST]
