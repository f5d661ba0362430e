"""What a rank has of a model: the tensors of its own parts, and for a while those that others lend it.

A tensor of a part that is elsewhere stays the very object it was, so that the user's model keeps its structure, names
and shapes; but it is put on the meta device, without memory, and takes its values back when they are gathered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from localize.errors import PlacementError
from localize.hollow import empty_out, unwatched
from localize.model import LocalModel
from localize.runtime.buffers import Layout, layouts, others, places
from localize.runtime.exchange import Exchange, spread
from localize.runtime.filling import Filling
from localize.runtime.materialise import give_away, materialise
from localize.runtime.placement import Placement
from localize.runtime.session import Session
from localize.weights import memory

_log = logging.getLogger(__name__)


class Holdings:
    """The model's tensors by name, and the ranks that use each; what no part uses is the first rank's.

    A forward pass may give a module's buffer another tensor, or none, so that only names stay what they are. Buffers
    that no ``state_dict`` has count, too; memory for these is kept everywhere.
    """

    def __init__(self, local: LocalModel, placement: Placement, session: Session) -> None:
        self.local, self.placement, self.session = local, placement, session
        self._device = torch.device("cpu")
        self._watched: dict[str, tuple[Tensor, int]] = {}
        self._places = places(local)
        self._others = others(local, self._places)
        holders = [(name, holder) for name, place in self._places.items() for holder in place.holders]
        self._at = {(id(module), leaf): name for name, (module, leaf) in holders}
        self._names = {id(tensor): name for name, tensor in self._others.items()}
        users: dict[str, set[int]] = {}
        for number, (part, head) in enumerate(zip(local.parts, local.heads, strict=True), 1):
            for name in self._in(part, head):
                users.setdefault(name, set()).add(placement.rank_of(number))
        current = self._current()
        same = {id(tensor): users[name] for name, tensor in current.items() if name in users and tensor is not None}
        self.ranks = {name: sorted(users.get(name, same.get(id(t), {0}))) for name, t in current.items()}

    def _in(self, *modules: nn.Module | None) -> set[str]:
        """The names of what modules have."""
        found = set()
        for module in chain.from_iterable(m.modules() for m in modules if m is not None):
            tensors = (*module._parameters.values(), *module._buffers.values())
            found |= {self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names}
            found |= {self._at[id(module), leaf] for leaf in module._buffers if (id(module), leaf) in self._at}
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a ``state_dict`` has now, under the names that there were when this was made."""
        buffers = {name: place.tensor for name, place in self._places.items() if place.saved}
        return self._others | {name: tensor for name, tensor in buffers.items() if tensor is not None}

    def held(self, name: str) -> bool:
        """Whether this rank uses a tensor."""
        return self.placement.rank in self.ranks[name]

    def mine(self) -> list[str]:
        """The names of what this rank uses, of buffers that are None, too."""
        return [name for name in self.ranks if self.held(name)]

    def owned(self) -> list[str]:
        """The tensors that this rank answers for: each has one such rank, the lowest that uses it."""
        return [name for name, ranks in self.ranks.items() if ranks[0] == self.placement.rank]

    def release(self) -> None:
        """Frees what only other ranks use, and will train."""
        tensors = self.tensors
        kept = {memory(tensor) for name, tensor in tensors.items() if self.held(name)}
        foreign = [name for name in tensors if not self.held(name)]
        give_away(self.local, foreign)
        with self._unwatched():
            for name in foreign:
                try:
                    if memory(tensors[name]) not in kept:
                        empty_out(tensors[name])
                except RuntimeError as error:
                    _log.warning("%s stays in memory on rank %d: %s", name, self.placement.rank, error)

    def materialise(self, seed: int) -> None:
        """Gives memory and values to what this rank uses and is on the meta device; see ``materialise.py``."""
        tensors = self.tensors
        own = {id(tensor) for name, tensor in tensors.items() if self.held(name)}
        foreign = {id(tensor) for tensor in tensors.values()} - own
        materialise(self.local, seed, lambda t: id(t) not in foreign)

    def _unwatched(self) -> AbstractContextManager[None]:
        return unwatched(self.local.to_standard(), self.local)

    def move(self, device: torch.device) -> None:
        """Puts what this rank uses on its device."""
        self._device = device
        own = zip(self.local.parts, self.local.heads, strict=True)
        for number, (part, head) in enumerate(own, 1):
            for tensor in tensors_in(part, head) if number in self.placement.numbers else ():
                if tensor.device != device:
                    tensor.data = tensor.data.to(device)

    # ---------------------------------------------------------------- what several ranks have

    def watch(self) -> None:
        """Before training: notes the buffers here that are in the memory of buffers that other ranks use."""
        self._watched.clear()
        users: dict[int, set[int]] = {}
        for name, place in self._places.items():
            if place.tensor is not None:
                users.setdefault(memory(place.tensor), set()).update(self.ranks[name])
        for name, place in self._places.items():
            tensor = place.tensor
            if tensor is not None and self.held(name) and len(users[memory(tensor)]) > 1:
                self._watched[name] = (tensor, tensor._version)

    def check(self) -> None:
        """After a step.

        Raises:
            PlacementError: a forward pass changed one of these, which the other ranks do not see.
        """
        for name, (tensor, version) in self._watched.items():
            replaced = len(self.ranks[name]) > 1 and self._places[name].tensor is not tensor
            if replaced or tensor._version != version:
                raise PlacementError(
                    f"The forward pass changes the buffer {name}, which parts of other ranks use, too, and do not see "
                    "change. Give each part a buffer of its own, cut so that all who use it are in one part, or train "
                    "with executor='sequential'."
                )

    # ---------------------------------------------------------------- between ranks

    def gather(self, everywhere: bool = False) -> None:
        """Brings everything to the first rank (to all ranks), on the CPU unless it has memory there already.

        Each replica does so for itself.
        """
        to = range(len(self.placement.ranges)) if everywhere else range(1)
        self._exchange({rank: set(self.ranks) for rank in to}, None)

    @contextmanager
    def borrowed(self, wanted: dict[int, list[nn.Module]]) -> Iterator[None]:
        """Tensors of other ranks for a while; ``wanted`` lists the modules that each rank runs, by rank."""
        nothing = {name for name, place in self._places.items() if place.tensor is None}
        before = self._without_memory()
        self._exchange({rank: self._in(*modules) for rank, modules in wanted.items()}, self._device)
        lent = before - self._without_memory()
        try:
            yield
        finally:
            for name in lent & nothing:
                self._places[name].bind(None)
            self._empty(lent)

    def told(self) -> dict[str, Layout]:
        """What is in the places of buffers now, of other ranks' too."""
        return layouts(self._places, self._places)

    def copy(self, told: dict[str, Layout], broadcast: Callable[[Tensor], None], gives: bool) -> None:
        """Makes what this rank uses that of the one that gives, among ranks that use the same; see ``spread``."""
        with self._unwatched(), torch.no_grad():
            spread(self.mine(), Filling(self._places, told), self._others, self._device, broadcast, gives)

    def _exchange(self, wanted: dict[int, set[str]], device: torch.device | None) -> None:
        needs = {to: {n for n in names if to not in self.ranks[n]} for to, names in wanted.items()}
        own = layouts(self._places, [name for name in self._places if self.held(name)])
        exchange = Exchange(self.session, self.placement, {name: ranks[0] for name, ranks in self.ranks.items()})
        with self._unwatched(), torch.no_grad():
            exchange.bring(needs, Filling(self._places, own, device), self._others)

    def _current(self) -> dict[str, Tensor | None]:
        return self._others | {name: place.tensor for name, place in self._places.items()}

    def _without_memory(self) -> set[str]:
        return {name for name, tensor in self._current().items() if tensor is None or tensor.is_meta}

    def _empty(self, names: set[str]) -> None:
        """Takes memory away that nothing else is in."""
        current = {name: tensor for name, tensor in self._current().items() if tensor is not None}
        kept = {memory(tensor) for name, tensor in current.items() if name not in names}
        with self._unwatched():
            for name in names & current.keys():
                if memory(current[name]) not in kept:
                    empty_out(current[name])


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
