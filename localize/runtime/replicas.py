"""Data parallelism inside a part: several ranks have the same parts, each with batches of its own.

    replica 1   rank 0 ── part 1 ──▶ rank 1 ── part 2        batches 1, 3, 5, …
                  │ mean gradients     │                     an all-reduce among the ranks of the same parts,
    replica 2   rank 2 ── part 1 ──▶ rank 3 ── part 2        before each update
                                                             batches 2, 4, 6, …

Replicas start with the weights of the first one and make the same updates, so they stay equal to the last bit. What
a part counts in its forward pass (batch norm's statistics) stays its replica's own; that of the first one is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localize.errors import ConfigError
from localize.runtime.metrics import Tally
from localize.runtime.placement import Holdings, Placement
from localize.runtime.ranks import Session

_FOREVER = timedelta(days=30)  # that another rank is gone is learnt otherwise
_groups: dict[tuple[int, int], dist.ProcessGroup] = {}


def join_replicas(placement: Placement) -> None:
    """Makes the groups of ranks that have the same parts; all ranks call this, and it lasts for the process."""
    count, replicas = len(placement.ranges), placement.replicas
    if replicas == 1 or (count, replicas) in _groups:
        return
    for position in range(count):
        ranks = [replica * count + position for replica in range(replicas)]
        group = dist.new_group(ranks, backend="gloo", timeout=_FOREVER)
        if position == placement.rank:
            assert isinstance(group, dist.ProcessGroup)
            _groups[count, replicas] = group


class Replicas:
    """The ranks that have this rank's parts; ``join_replicas`` comes first."""

    def __init__(self, session: Session, placement: Placement) -> None:
        self.session, self.count, self.first = session, placement.replicas, placement.replica == 0
        self._group = _groups[len(placement.ranges), placement.replicas]
        self._next = placement.global_rank(placement.rank, (placement.replica + 1) % placement.replicas)

    def alike(self, holdings: Holdings) -> None:
        """Gives all replicas the weights and buffers of the first one."""
        for name, tensor in holdings.tensors.items():
            if holdings.held(name):
                values = tensor.detach().cpu().contiguous()
                self.session.call(partial(self._broadcast, values), self._next)
                tensor.data.copy_(values)

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
            self.session.call(partial(self._sum, total), self._next)
            *sums, holders = total.split(sizes)
            for parameter, values, holder in zip(own, sums, holders.tolist(), strict=True):
                if holder:
                    _put(parameter, values.div_(self.count))

    def pool(self, tally: Tally) -> None:
        """Hands what all replicas have counted of these parts to the first one; the others begin anew."""
        counted = {name: getattr(tally, name) for name in ("loss", "weight", "hits")}
        sums = {name: values.cpu() for name, values in counted.items()} | {"samples": torch.tensor([tally.samples])}
        for values in sums.values():
            self.session.call(partial(self._sum, values), self._next)
        for name, values in counted.items():
            values.copy_(sums[name] if self.first else torch.zeros_like(values))
        tally.samples = int(sums["samples"]) if self.first else 0

    def _broadcast(self, values: Tensor) -> None:
        self._group.broadcast(values, 0).wait()

    def _sum(self, values: Tensor) -> None:
        self._group.allreduce([values]).wait()


def _flat(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    if grad is None:
        return torch.zeros(parameter.numel(), dtype=parameter.dtype)
    return grad.detach().cpu().reshape(-1)


def _put(parameter: nn.Parameter, values: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    parameter.grad.copy_(values.view(parameter.shape))


class Shard:
    """Every ``count``-th batch of a loader, from the one at ``index`` (from 0) on; an incomplete rest is left out.

    Raises:
        ConfigError: while iterating, if the loader has fewer than ``count`` batches.
    """

    def __init__(self, loader: Iterable[Any], index: int, count: int) -> None:
        self.loader, self.index, self.count = loader, index, count

    def __iter__(self) -> Iterator[Any]:
        kept, number = None, 0
        for number, batch in enumerate(self.loader, 1):
            if (number - 1) % self.count == self.index:
                kept = batch
            if number % self.count == 0:
                yield kept
                kept = None
        if number < self.count:
            raise ConfigError(
                f"The loader yields {number} batches, and data_parallel={self.count} takes that many for one step; "
                "make batches smaller, or data_parallel."
            )
