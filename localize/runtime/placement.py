"""Which rank has which parts, and that it holds the weights of those alone.

A tensor of a part that is elsewhere stays the very object it was, so that the user's model keeps its structure, names
and shapes; but it is put on the meta device, without memory, and takes its values back when they are gathered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from localize.errors import PlacementError
from localize.hollow import empty_out, replace_by, unwatched
from localize.model import LocalModel
from localize.runtime.materialise import give_away, materialise
from localize.runtime.session import Session
from localize.weights import every_tensor, named_tensors

_log = logging.getLogger(__name__)
_DTYPES = tuple(sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str))
_KIND = 2 + 32  # numbers that tell of a buffer: its dtype, how many axes, and their sizes


@dataclass(frozen=True)
class Placement:
    """The parts of every rank: consecutive numbers from 1, at least one each.

    With several replicas of all parts, ``rank`` is counted within this process's replica; they follow one another.
    """

    rank: int
    ranges: tuple[range, ...]
    replica: int = 0
    replicas: int = 1

    @property
    def numbers(self) -> range:
        """The parts of this rank."""
        return self.ranges[self.rank]

    @property
    def names(self) -> list[str]:
        """Every rank's parts in words, of all replicas."""
        total = self.ranges[-1][-1]
        names = [
            f"part {r[0]} of {total}" if len(r) == 1 else f"parts {r[0]}–{r[-1]} of {total}" for r in self.ranges
        ]
        if self.replicas == 1:
            return names
        return [f"{n}, replica {i} of {self.replicas}" for i in range(1, self.replicas + 1) for n in names]

    def global_rank(self, rank: int, replica: int | None = None) -> int:
        """The number, among all processes, of a rank of this (or another) replica."""
        return (self.replica if replica is None else replica) * len(self.ranges) + rank

    def rank_of(self, number: int) -> int:
        """The rank that has a part."""
        return next(rank for rank, numbers in enumerate(self.ranges) if number in numbers)


def assign(costs: Sequence[float], ranks: int) -> tuple[range, ...]:
    """Consecutive parts to ranks so that the largest sum of costs is as small as possible.

    Raises:
        PlacementError: more ranks than parts.
    """
    parts = len(costs)
    if ranks > parts:
        raise PlacementError(
            f"There are {ranks} ranks for {parts} parts; start {parts} processes, or convert with parts={ranks}."
        )
    # best[n]: the smallest largest sum for the first n parts on the ranks so far, and where the last rank begins
    none: tuple[float, list[int]] = (float("inf"), [])
    best = [(0.0, none[1])] + [none] * parts
    for _ in range(ranks):
        best = [none] + [
            min((max(best[m][0], sum(costs[m:n])), [*best[m][1], n]) for m in range(n)) for n in range(1, parts + 1)
        ]
    ends = best[parts][1]
    return tuple(range(start + 1, end + 1) for start, end in zip([0, *ends[:-1]], ends, strict=True))


def placement_of(local: LocalModel, rank: int, ranks: int, replicas: int = 1) -> Placement:
    """Parts to ranks by the cost that the model was balanced by; ``rank`` and ``ranks`` count all processes.

    Raises:
        PlacementError: more ranks than parts, or a number of ranks that is no multiple of ``replicas``.
    """
    count, each = len(local.parts), ranks // replicas
    if ranks % replicas or (replicas > 1 and each > count):
        possible = ", ".join(str(n * replicas) for n in range(1, count + 1))
        raise PlacementError(
            f"There are {ranks} ranks for {replicas} replicas of {count} parts; start {possible} processes."
        )
    costs = [1.0] * count
    if len(local.plan.parts) == count:
        costs = [max(p.total.of(local.plan.balance), 1e-9) for p in local.plan.parts]
    return Placement(rank % each, assign(costs, each), rank // each, replicas)


class Holdings:
    """The model's tensors by name, and the ranks that use each; what no part uses is the first rank's.

    A forward pass may give a module's buffer another tensor, so that only names stay what they are.
    """

    def __init__(self, local: LocalModel, placement: Placement, session: Session) -> None:
        self.local, self.placement, self.session = local, placement, session
        tensors = named_tensors(local)
        users: dict[int, set[int]] = {}
        for number, (part, head) in enumerate(zip(local.parts, local.heads, strict=True), 1):
            for tensor in tensors_in(part, head):
                users.setdefault(id(tensor), set()).add(placement.rank_of(number))
        self.ranks = {name: sorted(users.get(id(tensor), {0})) for name, tensor in tensors.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the modules hold now, under the names that there were when this was made."""
        current = every_tensor(self.local)
        return {name: current[name] for name in self.ranks}

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in reversed(self.tensors.items())}

    def held(self, name: str) -> bool:
        """Whether this rank uses a tensor."""
        return self.placement.rank in self.ranks[name]

    def owned(self) -> list[str]:
        """The tensors that this rank answers for: each has one such rank, the lowest that uses it."""
        return [name for name, ranks in self.ranks.items() if ranks[0] == self.placement.rank]

    def release(self) -> None:
        """Frees what only other ranks use, and will train."""
        tensors = self.tensors
        foreign = [name for name in tensors if not self.held(name)]
        give_away(self.local, foreign)
        with self._unwatched():
            for name in foreign:
                try:
                    empty_out(tensors[name])
                except RuntimeError as error:
                    _log.warning("%s stays in memory on rank %d: %s", name, self.placement.rank, error)

    def materialise(self, seed: int) -> None:
        """Gives memory and values to what this rank uses and is on the meta device; see ``materialise.py``."""
        names = self._names()
        materialise(self.local, seed, lambda t: id(t) not in names or self.held(names[id(t)]))

    def _unwatched(self) -> AbstractContextManager[None]:
        return unwatched(self.local.to_standard(), self.local)

    def move(self, device: torch.device) -> None:
        """Puts what this rank uses on its device."""
        own = zip(self.local.parts, self.local.heads, strict=True)
        for number, (part, head) in enumerate(own, 1):
            for tensor in tensors_in(part, head) if number in self.placement.numbers else ():
                if tensor.device != device:
                    tensor.data = tensor.data.to(device)

    # ---------------------------------------------------------------- between ranks

    def gather(self, everywhere: bool = False) -> None:
        """Brings all weights to the first rank (to all ranks), on the CPU unless they are there already.

        Each replica does so for itself.
        """
        to = range(len(self.placement.ranges)) if everywhere else range(1)
        with self._unwatched():
            for name, tensor in self.tensors.items():
                self._deliver(name, tensor, [rank for rank in to if rank not in self.ranks[name]])

    @contextmanager
    def borrowed(self, wanted: dict[int, list[Tensor]]) -> Iterator[None]:
        """Tensors of other ranks for a while; ``wanted`` lists all that each rank needs, by rank."""
        names = self._names()
        lent: list[str] = []
        needs = {rank: {names[id(t)] for t in tensors if id(t) in names} for rank, tensors in wanted.items()}
        with self._unwatched():
            for name, tensor in self.tensors.items():
                to = [rank for rank in sorted(needs) if name in needs[rank] and rank not in self.ranks[name]]
                absent = tensor.is_meta
                self._deliver(name, tensor, to)
                if absent and not tensor.is_meta:
                    lent.append(name)
        try:
            yield
        finally:
            tensors = self.tensors if lent else {}
            with self._unwatched():
                for name in lent:
                    empty_out(tensors[name])

    def _deliver(self, name: str, tensor: Tensor, to: Sequence[int]) -> None:
        owner, rank = self.ranks[name][0], self.placement.rank
        for other in to:
            if rank == owner:
                self._send(tensor, self.placement.global_rank(other))
            elif rank == other:
                values = self._receive(tensor, self.placement.global_rank(owner))
                if tensor.is_meta or (tensor.shape, tensor.dtype) != (values.shape, values.dtype):
                    replace_by(tensor, values)
                else:
                    tensor.data.copy_(values)

    def _send(self, tensor: Tensor, to: int) -> None:
        if not isinstance(tensor, nn.Parameter):  # a buffer may not have the shape and dtype that it began with
            self.session.send(kind_of(tensor), to)
        self.session.send(tensor, to)

    def _receive(self, like: Tensor, source: int) -> Tensor:
        if not isinstance(like, nn.Parameter):
            like = like_of(self.session.receive(torch.empty(_KIND, dtype=torch.int64), source))
        return self.session.receive(like, source)


def kind_of(tensor: Tensor) -> Tensor:
    """Dtype and shape of a tensor as numbers, so many for every tensor."""
    kind = [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    return torch.tensor(kind + [0] * (_KIND - len(kind)))


def like_of(kind: Tensor) -> Tensor:
    """A tensor without memory of the dtype and shape that ``kind_of`` told."""
    dtype, axes, *shape = kind.tolist()
    return torch.empty(shape[:axes], dtype=_DTYPES[dtype], device="meta")


def tensors_in(*modules: nn.Module | None) -> list[Tensor]:
    """All parameters and buffers."""
    there = [module for module in modules if module is not None]
    return list(chain.from_iterable(chain(m.parameters(), m.buffers()) for m in there))


@contextmanager
def trainable_only(local: LocalModel, numbers: range) -> Iterator[None]:
    """Makes ``local.optimizers`` leave out the parts (and heads) that are not in ``numbers``."""
    foreign = [
        parameter
        for number, (part, head) in enumerate(zip(local.parts, local.heads, strict=True), 1)
        for parameter in tensors_in(part, head)
        if number not in numbers and parameter.requires_grad
    ]
    for parameter in foreign:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in foreign:
            parameter.requires_grad_(True)
