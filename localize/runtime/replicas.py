"""Data parallelism inside a part: several ranks have the same parts, each with batches of its own.

    replica 1   rank 0 ── part 1 ──▶ rank 1 ── part 2        batches 1, 3, 5, …
                  │ mean gradients     │                     an all-reduce among the ranks of the same parts,
    replica 2   rank 2 ── part 1 ──▶ rank 3 ── part 2        before each update
                                                             batches 2, 4, 6, …

Replicas start with the weights of the first one and make the same updates, so they stay equal to the last bit. What
a part counts in its forward pass (batch norm's statistics) stays its replica's own; that of the first one is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localize.errors import LocalizeError, WireError
from localize.runtime.holdings import Holdings
from localize.runtime.metrics import Tally
from localize.runtime.placement import Placement
from localize.runtime.ranks import FOREVER
from localize.runtime.session import POLL_S, Session

_ROLL_CALL_S = 3.0  # how long the others have to show that they are there, after a connection broke
_groups: dict[tuple[int, int], dist.ProcessGroup] = {}


def join_replicas(placement: Placement) -> None:
    """Makes the groups of ranks that have the same parts; all ranks call this, and it lasts for the process."""
    count, replicas = len(placement.ranges), placement.replicas
    if replicas == 1 or (count, replicas) in _groups:
        return
    for position in range(count):
        ranks = [replica * count + position for replica in range(replicas)]
        group = dist.new_group(ranks, backend="gloo", timeout=FOREVER)
        if position == placement.rank:
            assert isinstance(group, dist.ProcessGroup)
            _groups[count, replicas] = group


class Replicas:
    """The ranks that have this rank's parts; ``join_replicas`` comes first.

    All of them make the same calls in the same order. Where one fails or is gone, the others are ``Stopped``.

    Attributes:
        count: how many there are.
        index: which of them this one is, from 0.
    """

    def __init__(self, session: Session, placement: Placement) -> None:
        self.session, self.count, self.index = session, placement.replicas, placement.replica
        self.first = self.index == 0
        self._group = _groups[len(placement.ranges), placement.replicas]
        session.waiters.groups.append(self._group)
        members = [placement.global_rank(placement.rank, replica) for replica in range(self.count)]
        self._giver = members[0]
        self._others = [rank for rank in members if rank != session.ranks.rank]
        self._calls = 0

    def alike(self, holdings: Holdings) -> None:
        """Gives all replicas the weights of the first one, and its buffers, whatever a forward pass made of them.

        All ranks call this, and have the same names.
        """
        everyone = self.session.gather(holdings.told() if self.first else None)
        holdings.copy(everyone[self._giver], self._give, self.first)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Puts the mean of all replicas' gradients into ``.grad``; a replica without one counts as zeros.

        One that no replica has stays None. Takes, for a while, the memory of these gradients once more.
        """
        trained = list(parameters)
        for dtype in dict.fromkeys(p.dtype for p in trained):
            own = [p for p in trained if p.dtype == dtype]
            there = torch.tensor([float(p.grad is not None) for p in own]).to(dtype)
            pieces = [_flat(p) for p in own]
            total = torch.cat([*pieces, there])
            sizes = [*(len(piece) for piece in pieces), len(own)]
            del pieces
            self.add(total)
            *sums, holders = total.split(sizes)
            for parameter, values, holder in zip(own, sums, holders.tolist(), strict=True):
                if holder:
                    _put(parameter, values.div_(self.count))

    def pool(self, tally: Tally) -> None:
        """Hands what all replicas have counted of these parts to the first one; the others begin anew."""
        counted = {name: getattr(tally, name) for name in ("loss", "weight", "hits")}
        sums = {name: values.cpu() for name, values in counted.items()} | {"samples": torch.tensor([tally.samples])}
        for values in sums.values():
            self.add(values)
        for name, values in counted.items():
            values.copy_(sums[name] if self.first else torch.zeros_like(values))
        tally.samples = int(sums["samples"]) if self.first else 0

    # ---------------------------------------------------------------- tensors of all

    def add(self, values: Tensor) -> None:
        """Puts the sum over all replicas into ``values``, on the CPU."""
        self._call(partial(self._sum, values))

    def each(self, values: Tensor) -> list[Tensor]:
        """What every replica gave, by replica, on the CPU; all give one shape and dtype."""
        found = [torch.empty_like(values) for _ in range(self.count)]
        self._call(partial(self._exchange, found, values))
        return found

    def _give(self, values: Tensor) -> None:
        """Puts the first replica's values into everyone's, which are contiguous and on the CPU."""
        whole = values.reshape(-1).view(torch.uint8)  # gloo does not know every dtype
        if len(whole):
            self._call(partial(self._broadcast, whole))

    def _broadcast(self, values: Tensor) -> None:
        self._group.broadcast(values, 0).wait()

    def _sum(self, values: Tensor) -> None:
        self._group.allreduce([values]).wait()

    def _exchange(self, found: list[Tensor], values: Tensor) -> None:
        self._group.allgather([found], [values]).wait()

    # ---------------------------------------------------------------- failing

    def _call(self, function: Callable[[], None]) -> None:
        """Runs what waits for all replicas, in a thread, and gives up where a rank fails.

        Raises:
            Stopped: another rank failed meanwhile, or is gone.
            WireError: one of the others is gone, and it cannot be told which.
        """
        self._calls += 1
        self.session.watched(function, self._lost, waiting=self._show)

    def _show(self) -> None:
        """Lets the others know that this rank is there; see ``_silent``."""
        self.session.post("replicas", self._calls)

    def _lost(self, error: Exception) -> LocalizeError:
        """The error where a connection of the group broke, which does not say to whom.

        Whoever waits in the same call shows so; if only one rank does not, it is that one.
        """
        self._show()
        end = time.monotonic() + _ROLL_CALL_S
        silent = self._silent()
        while len(silent) > 1 and time.monotonic() < end:
            self.session.check()
            time.sleep(POLL_S / 5)
            silent = self._silent()
        self.session.check()
        if len(silent) == 1:
            return self.session.lost(silent[0], None)
        listed = ", ".join(f"{rank} ({self.session.names[rank]})" for rank in silent or self._others)
        what = "one of them is gone" if silent else f"all of them are there: {' '.join(str(error).split())}"
        found = WireError(f"Step {self.session.step + 1}: the connection to the ranks {listed} broke; {what}.")
        cause = self.session.fail(found)
        return found if cause.rank == self.session.ranks.rank else self.session.stopped(cause)

    def _silent(self) -> list[int]:
        """The other replicas' ranks that have not come as far as this one's current call, or do not wait in it."""
        shown = self.session.look("replicas")
        return [rank for rank in self._others if (shown[rank] or 0) < self._calls]


def _flat(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    if grad is None:
        return torch.zeros(parameter.numel(), dtype=parameter.dtype)
    return grad.detach().cpu().reshape(-1)


def _put(parameter: nn.Parameter, values: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    parameter.grad.copy_(values.view(parameter.shape))
