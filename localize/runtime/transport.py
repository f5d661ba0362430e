"""Which way payloads go: all ranks decide it together, and connect their GPUs where each has one of its own.

nccl gets one process group for each edge and direction: operations of a group run in the order in which they are
given, and that of the messages of two directions is not the same at both ends.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from localize.errors import ConfigError, PlacementError, WireError
from localize.heads.base import Method
from localize.runtime.carriers import LATE_S, Carrier, DeviceMemory, HostMemory
from localize.runtime.contracts import messages_down
from localize.runtime.lanes import CudaLane, Lane
from localize.runtime.placement import Placement
from localize.runtime.ranks import FOREVER
from localize.runtime.session import Session

TRANSPORTS = ("auto", "gloo", "nccl")
_VARIABLE = "LOCALIZE_TRANSPORT"
_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_ABORT_S = 10.0

RankEdge = tuple[int, int]  # the rank that sends, the rank that receives


def seat(device: torch.device) -> dict[str, Any]:
    """What this rank says of itself, so that all can decide: the transport it was told to use, its GPU if it has one.

    Raises:
        ConfigError: the environment asks for a transport that there is not.
    """
    wish = os.environ.get(_VARIABLE, "auto").lower()
    if wish not in TRANSPORTS:
        raise ConfigError(f"{_VARIABLE}={wish!r} is no transport; use one of {', '.join(TRANSPORTS)}.")
    if device.type != "cuda" or not dist.is_nccl_available():
        return {"transport": wish, "gpu": None}
    return {"transport": wish, "gpu": str(torch.cuda.get_device_properties(device).uuid)}


def direct(seats: Sequence[dict[str, Any]]) -> bool:
    """Whether payloads go from device to device: where every rank has a GPU of its own, unless one asks for gloo.

    Raises:
        PlacementError: a rank asks for nccl, and it is impossible.
    """
    wishes, gpus = {each["transport"] for each in seats}, [each["gpu"] for each in seats]
    if "gloo" in wishes:
        return False
    possible = None not in gpus and len(set(gpus)) == len(gpus)
    if "nccl" in wishes and not possible:
        without = [rank for rank, gpu in enumerate(gpus) if gpu is None or gpus.index(gpu) < rank]
        raise PlacementError(
            f"{_VARIABLE}=nccl takes a GPU of its own for every rank and a torch with nccl; rank "
            f"{', '.join(map(str, without))} of {len(seats)} has none. Use {_VARIABLE}=gloo, or none."
        )
    return possible


def rank_edges(placement: Placement, method: Method) -> list[RankEdge]:
    """All edges that messages travel along, of all replicas, in the same order on every rank."""
    found = []
    for replica in range(placement.replicas):
        for rank, numbers in enumerate(placement.ranges[1:], 1):
            below, above = placement.global_rank(rank - 1, replica), placement.global_rank(rank, replica)
            found.append((below, above))
            if messages_down(method, numbers[0], placement.ranges[-1][-1]):
                found.append((above, below))
    return found


# ---------------------------------------------------------------------- groups


@dataclass
class _Made:
    """The groups of two that this process has made, and keeps for the next run."""

    parent: dist.ProcessGroup | None = None  # whose members they connect
    groups: dict[RankEdge, dist.ProcessGroup | None] = field(default_factory=dict)  # None: of other ranks


_made = _Made()


class Carriers:
    """The carriers of this rank's edges.

    Args:
        session, device: this rank, and where it computes.
        edges: those along which payloads go from device to device; all ranks pass all of them. None: no edge.
        backend: of the process groups that carry payloads from device to device.
        lane: makes what copies beside the computation.

    Raises:
        WireError: the backend cannot connect two ranks, or another rank failed meanwhile.
    """

    def __init__(
        self,
        session: Session,
        device: torch.device,
        edges: Iterable[RankEdge] | None = None,
        backend: str = "nccl",
        lane: Callable[[torch.device], Lane] = CudaLane,
    ) -> None:
        if device.type == "cuda" and device.index is None:  # in the threads of links another one may be current
            device = torch.device("cuda", torch.cuda.current_device())
        self._session, self._device, self._direct = session, device, edges is not None
        self._backend, self._lane = backend, lane
        self._groups = self._connected(list(edges or ()))

    def towards(self, peer: int) -> Carrier | None:
        """What carries payloads from here to another rank; None where the CPU computes."""
        return self._of((self._session.ranks.rank, peer))

    def coming_from(self, peer: int) -> Carrier | None:
        """What carries payloads from another rank; None where the CPU computes."""
        return self._of((peer, self._session.ranks.rank))

    def _of(self, edge: RankEdge) -> Carrier | None:
        group = self._groups.get(edge)
        if group is not None:
            return DeviceMemory(self._device, self._lane(self._device), group)
        return HostMemory(self._device, self._lane(self._device)) if self._device.type == "cuda" else None

    def close(self) -> None:
        """Waits until all ranks have received all: nobody is to break off a connection in use."""
        if self._direct:
            self._session.wait_for_all()

    def abort(self) -> None:
        """Ends whatever waits for another rank's device."""
        groups, self._groups = self._groups, {}
        for edge in groups:
            _made.groups.pop(edge, None)
        _abort(groups.values())

    def _connected(self, edges: list[RankEdge]) -> dict[RankEdge, dist.ProcessGroup]:
        """This rank's groups, by edge; those of earlier runs are taken again."""
        if _made.parent is not self._session.ranks.group:
            _made.groups.clear()
            _made.parent = self._session.ranks.group
        missing = [edge for edge in edges if edge not in _made.groups]
        if missing:
            self._session.wait_for_all()  # from now on nobody waits long
        try:
            for edge in missing:
                self._connect(edge)
        except BaseException:
            _abort([group for edge in missing if (group := _made.groups.pop(edge, None)) is not None])
            raise
        return {edge: group for edge in edges if (group := _made.groups[edge]) is not None}

    def _connect(self, edge: RankEdge) -> None:
        rank = self._session.ranks.rank

        def attempt() -> Exception | None:
            try:
                group = _made.groups[edge] = _new_group(edge, rank in edge, self._backend)
                if group is not None:
                    DeviceMemory(self._device, self._lane(self._device), group).greet(rank == edge[0])
            except Exception as error:
                return error
            return None

        problem = self._session.call(attempt, edge[rank == edge[0]], LATE_S)
        if problem is not None:
            raise WireError(
                f"{self._backend} cannot connect rank {edge[0]} and rank {edge[1]}: {problem}. With "
                f"{_VARIABLE}=gloo, messages go through host memory."
            ) from problem


def _new_group(edge: RankEdge, member: bool, backend: str) -> dist.ProcessGroup | None:
    """Makes a group of two; all ranks call this, in the same order."""
    options = None
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = FOREVER
        if not _made.groups:
            atexit.register(_abort_at_exit)
    ours = _WATCHDOG not in os.environ
    if ours:  # else torch ends the process when a peer is gone, before anybody could say why
        os.environ[_WATCHDOG] = "0"
    try:
        group: Any = dist.new_group(list(edge), timeout=FOREVER, backend=backend, pg_options=options)
    finally:
        if ours:
            del os.environ[_WATCHDOG]
    return group if member else None


def _abort(groups: Iterable[dist.ProcessGroup]) -> None:
    """All at once, each in a thread: one alone would wait for what runs in the others."""
    threads = [threading.Thread(target=_abort_one, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _ABORT_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def _abort_one(group: dist.ProcessGroup) -> None:
    with suppress(Exception):  # it is gone already
        group.abort()


def _abort_at_exit() -> None:
    """Nothing is on its way any more; torch complains of groups that are left."""
    for group in _made.groups.values():
        if group is not None:
            _abort_one(group)
