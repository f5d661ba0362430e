"""Threads that wait for other ranks in the transport, and how they are called back.

Such a thread must not wake up while Python ends: it would take the process down with SIGABRT, whatever the process
wanted to say. Nothing interrupts a wait in gloo from outside, but a wait that takes too long closes all connections
of its group, and so ends all the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

_UNUSED_TAG = 1 << 20  # of messages that nobody sends
_AT_ONCE = timedelta(milliseconds=1)
_END_S = 5.0  # for threads whose connections are closed to end
_log = logging.getLogger(__name__)


class Waiters:
    """The threads of one session, started by its main thread; daemons: what waits for a device may never come back.

    Attributes:
        groups: the process groups of gloo in which they may wait.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.groups = [group]
        self._threads: list[threading.Thread] = []

    def start(self, target: Callable[[], None], name: str) -> threading.Thread:
        """Runs a function that may wait for other ranks."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, daemon=True, name=name)
        self._threads.append(thread)
        thread.start()
        return thread

    def end(self, patience_s: float) -> None:
        """After a failure: has all threads end, those that do not within ``patience_s`` by closing connections.

        A Ctrl-C on the way is raised when it is done.
        """
        try:
            self._end(patience_s)
        except KeyboardInterrupt:
            self._end(0.0)
            raise

    def _end(self, patience_s: float) -> None:
        if self._ended(patience_s):
            return
        for group in self.groups:
            for peer in range(group.size()):  # waiting for one that is gone already closes nothing: try the next
                if peer != group.rank():
                    with suppress(RuntimeError):
                        group.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(_AT_ONCE)
        if not self._ended(_END_S):
            _log.debug("threads that wait for other ranks do not end: %s", ", ".join(t.name for t in self._threads))

    def _ended(self, within_s: float) -> bool:
        end = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
