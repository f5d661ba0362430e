"""What a recording could miss, seen at the dispatcher, below every Python function.

A leaf may read a tensor that another leaf left on itself, in a global, in a closure. Such a side channel works as
long as both ends run in one part, one after the other; a cut between them would let gradients, which a local loss
must not send that far, pass by. So an operator in a leaf that reads a storage which neither the leaf's arguments
nor the leaf itself made is noted: a ``link``. And whoever writes into a parameter is noticed before it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from localize.convert.restore import ModelState


class LeafCall:
    """The storages that the operators of one leaf call read and make."""

    def __init__(self, arguments: Iterable[Tensor]) -> None:
        self.made: dict[int, Any] = {}  # by address; alive until the call ends
        self.foreign: set[fx.Node] = set()  # nodes whose storages it reads, no argument among them
        self.known = {storage._cdata for storage in map(storage_of, arguments) if storage is not None}


class Audit(TorchDispatchMode):
    """Active while a model is recorded; sees every operator.

    Args:
        state: the model's, before the recording: what is about to be written is kept there.
        registered: parameters and buffers, which anybody may read.
    """

    def __init__(self, state: ModelState, registered: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._state = state
        self._registered = {storage._cdata for storage in map(storage_of, registered) if storage is not None}
        self._makers: dict[int, tuple[StorageWeakRef, fx.Node]] = {}
        self._leaf: LeafCall | None = None

    def made(self, tensor: Tensor, node: fx.Node) -> None:
        """``node`` made ``tensor``; whoever made its storage first remains its maker."""
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in self._registered and self._maker(storage) is None:
            self._makers[storage._cdata] = (StorageWeakRef(storage), node)

    def _maker(self, storage: Any) -> fx.Node | None:
        reference, node = self._makers.get(storage._cdata, (None, None))
        return node if reference is not None and not reference.expired() else None

    @contextmanager
    def leaf(self, arguments: Iterable[Tensor]) -> Iterator[LeafCall]:
        """Watches one leaf call; ``arguments`` are what it may read."""
        self._leaf = LeafCall(arguments)
        try:
            yield self._leaf
        finally:
            self._leaf = None

    def close(self, leaf: LeafCall, node: fx.Node) -> None:
        """The call is ``node``: what it made is its own, what it read besides links it."""
        for storage in leaf.made.values():
            self._makers[storage._cdata] = (StorageWeakRef(storage), node)
        if leaf.foreign:
            node.meta["links"] = node.meta.get("links", frozenset()) | leaf.foreign

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write:
                    self._state.keep_written(value)
        leaf = self._leaf
        if leaf is None:
            return func(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in leaf.known:
                leaf.known.add(storage._cdata)
                maker = self._maker(storage)
                if maker is not None:
                    leaf.foreign.add(maker)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in leaf.known:
                leaf.known.add(storage._cdata)
                leaf.made[storage._cdata] = storage
        return result


class SideRead(nn.Module):
    """Reads an attribute that a module's forward sets, right after its call.

    It refers to the owner without being its parent: the owner's parameters stay where they are.
    """

    def __init__(self, owner: nn.Module, attribute: str, key: Any = None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner
        self.attribute, self.key = attribute, key

    def forward(self, _: Any) -> Any:
        value = getattr(self.__dict__["owner"], self.attribute)
        return value if self.key is None else value[self.key]

    def extra_repr(self) -> str:
        return self.attribute if self.key is None else f"{self.attribute}[{self.key!r}]"


def find_left(tensor: Tensor, leaf: nn.Module) -> tuple[nn.Module, str, Any] | None:
    """Where ``leaf`` left ``tensor``: (a module inside, its attribute, the key if that is a dict)."""
    for module in leaf.modules():
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if value is tensor:
                return module, name, None
            if type(value) is dict and not name.startswith("_"):
                for key, item in value.items():
                    if item is tensor:
                        return module, name, key
    return None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of an operator's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> Any:
    """The storage of a tensor; None for kinds that have none of their own, the sparse ones."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
