"""Has checkpoints written: at once, or by a thread while training goes on.

    training  … step 10 │ copy │ step 11 │ step 12 │ …       changes nothing that the thread reads
    thread                     └ write, flush, commit        raises at the next step what went wrong here

At most one checkpoint is in the making, and so at most one copy in memory. A thread that is killed, or left alone,
leaves what a process that is killed leaves: the last checkpoint as it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from localize.errors import CheckpointError, LocalizeError
from localize.runtime import checkpoint
from localize.runtime.checkpoint import WHOLE, Share
from localize.runtime.session import POLL_S
from localize.runtime.snapshot import Snapshot, copied

PATIENCE_S = 60.0  # how long a run that failed waits for the checkpoint that is being written
_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class Saver:
    """Writes the checkpoints of one run, one after the other.

    While a thread writes, the copy takes as much CPU memory as weights, buffers and optimizer state do (of a process:
    its own). Without a thread there is no copy of what is on the CPU. safetensors before 0.8 keeps Python's lock
    while it writes, so that training waits for that part nevertheless.

    Args:
        asynchronous: whether a thread writes.

    Attributes:
        listen: called now and then while training waits for the thread; raises where there is a reason not to.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self.listen: Callable[[], None] = _nothing
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._left_alone = False

    def save(self, folder: Path, snapshot: Snapshot, share: Share = WHOLE) -> None:
        """Writes a share of a checkpoint, or begins to, when the one before is done; the last share commits it.

        ``snapshot`` may be of live tensors and state: they may change when this returns.

        Raises:
            CheckpointError: this one or the one before cannot be written; the last complete one is as it was.
        """
        self.wait()
        packed = checkpoint.pack(snapshot.trainer)
        if not self.asynchronous:
            self._write(folder, snapshot, packed, share, _nothing)
            self.check()
            return
        copy, arrived = copied(snapshot)
        name = f"checkpoint of step {snapshot.about['step']}"
        # A daemon: a disk that answers no more keeps no process from ending.
        self._thread = threading.Thread(
            target=self._write, args=(folder, copy, packed, share, arrived), daemon=True, name=name
        )
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong in the thread, if anything has."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits until nothing is being written; raises as ``check`` does, and what ``listen`` raises."""
        while self._thread is not None:
            self._thread.join(POLL_S)
            if self._thread.is_alive():
                self.listen()
            else:
                self._thread = None
        self.check()

    def stop(self) -> None:
        """After training has failed: lets the checkpoint that is being written become complete.

        One that takes too long is left alone, and will not become the latest when it is written in the end. What
        goes wrong is logged, since training has an error of its own to raise.
        """
        thread = self._thread
        if thread is not None:
            try:
                thread.join(PATIENCE_S)
            finally:
                self._left_alone = thread.is_alive()
                if self._left_alone:
                    _log.warning(
                        "The %s was not complete after %g s, and is given up.", thread.name, PATIENCE_S
                    )
        if isinstance(self._error, CheckpointError):
            _log.warning("%s", self._error)

    def _write(
        self, folder: Path, snapshot: Snapshot, packed: bytes, share: Share, arrived: Callable[[], None]
    ) -> None:
        step = snapshot.about["step"]
        partial = checkpoint.partial_of(folder, step, share)
        try:
            with checkpoint.writing(folder, step):
                arrived()
                checkpoint.write(partial, snapshot, packed, share)
                if not self._left_alone and share.last():
                    checkpoint.commit(folder, partial, snapshot.about)
        except BaseException as error:
            if not isinstance(error, LocalizeError):
                error.add_note(f"This happened while the checkpoint of step {step} was written.")
            self._error = error
