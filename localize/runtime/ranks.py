"""How the processes of a run find each other. What they then have in common is a ``Session``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from localize.errors import PlacementError

FOREVER = timedelta(days=30)  # a rank may wait long for data; that another one is gone it learns otherwise
_START = timedelta(minutes=10)  # for all ranks to appear


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    count: int
    group: dist.ProcessGroup
    store: Store

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads data and reports progress."""
        return self.rank == 0


_joined: Ranks | None = None


def launched() -> bool:
    """Whether this process was started by torchrun, or belongs to a process group already."""
    return dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def restarted() -> bool:
    """Whether torchrun started this process anew after a failure."""
    return attempt() > 0


def attempt() -> int:
    """How often torchrun has started this process anew after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def expected() -> tuple[int, int]:
    """This process's rank and how many there are; known before any other one has appeared.

    Raises:
        PlacementError: the process was not started as one of several.
    """
    if not launched():
        raise PlacementError(
            "executor='distributed' runs one process a part; start this script with `torchrun --nproc-per-node K "
            "script.py`, or use `localize train … --nproc-per-node K`."
        )
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join() -> Ranks:
    """This process's place among the ranks; all of them have to call this. Errors: see ``expected``."""
    global _joined
    if _joined is not None and dist.is_initialized():
        return _joined
    if not torch.cuda.is_initialized():
        # Streams share a few queues of the device: one that waits for another rank would hold up what it shares with.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if expected() and not dist.is_initialized():
        _start_group()
    group = dist.new_group(backend="gloo", timeout=FOREVER)
    assert isinstance(group, dist.ProcessGroup)
    store = dist.distributed_c10d._get_default_store()
    _joined = Ranks(dist.get_rank(), dist.get_world_size(), group, store)
    return _joined


def launcher_keeps_store() -> bool:
    """Whether the store outlives all ranks; else the first rank keeps it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _start_group() -> None:
    # After a restart the launcher's store still holds where the processes before this one listened, and torch would
    # connect to those: each attempt gets keys of its own.
    store, rank, count = next(rendezvous("env://", timeout=_START))
    prefixed = PrefixStore(f"localize/attempt/{attempt()}", store)
    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=count, timeout=_START)
