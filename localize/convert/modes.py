"""Modules and tensors that graphs need beside the user's own, and whether two modes' graphs are the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from localize.convert.audit import SideRead


class TrainingFlag(nn.Module):
    """Gives its owner's ``training`` flag when it runs. It refers to the owner without being its parent."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # unregistered: the owner's parameters stay where they are
        self.training = owner.training

    def train(self, mode: bool = True) -> TrainingFlag:
        """Sets the owner's flag too: in a part the owner itself, whose forward was recorded, is absent."""
        self.__dict__["owner"].training = mode
        self.training = mode
        return self

    def forward(self) -> bool:
        return bool(self.__dict__["owner"].training)


class Extras:
    """Names for what a graph refers to and the root does not hold. One registry serves both modes' graphs."""

    def __init__(self, root: nn.Module) -> None:
        self.values: dict[str, Any] = {}
        self._root = root
        self._names: dict[Any, str] = {}
        self._counts: dict[str, int] = {}

    def flag(self, owner: nn.Module) -> str:
        """Target of the module that gives ``owner.training``."""
        key = ("flag", id(owner))
        return (
            self._names[key] if key in self._names else self._add("training_flag", key, TrainingFlag(owner))
        )

    def constant(self, tensor: Tensor) -> str:
        """Target of a tensor that is neither a parameter nor a buffer."""
        return self._add("constant", ("constant", id(tensor)), tensor)

    def read(self, owner: nn.Module, attribute: str, key: Any) -> str:
        """Target of the module that reads what ``owner``'s forward left on it."""
        return self._add("left", ("left", id(owner), attribute, key), SideRead(owner, attribute, key))

    def check(self, check: nn.Module) -> str:
        """Target of the module that checks the settings of one graph."""
        return self._add("check", ("check", id(check)), check)

    def module(self, module: nn.Module) -> str:
        """Target of a module that is not registered in the root, for instance one made in a forward."""
        stateless = (
            not vars(module)["_parameters"] and not vars(module)["_buffers"] and not vars(module)["_modules"]
        )
        key = ("stateless", type(module), repr(module)) if stateless else ("module", id(module))
        return self._add("module", key, module)

    def _add(self, kind: str, key: Any, value: Any) -> str:
        if key not in self._names:
            number = self._counts.get(kind, 0)
            while hasattr(self._root, f"{kind}_{number}"):
                number += 1
            self._counts[kind] = number + 1
            self._names[key] = f"{kind}_{number}"
            self.values[self._names[key]] = value
        return self._names[key]


def same_graph(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether two graphs do the same: op, target and arguments node by node."""
    if len(first.nodes) != len(second.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if a.op != b.op or (a.target != b.target and a.target is not b.target):
            return False
        args, kwargs = fx.map_arg((a.args, a.kwargs), lambda node: twin[node])
        if not _same((args, kwargs), (b.args, b.kwargs)):
            return False
        twin[a] = b
    return True


def _same(first: Any, second: Any) -> bool:
    """Equality that tells 1 from True and 1.0, which choose different overloads, and takes NaN as equal to itself."""
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(item, second[key]) for key, item in first.items())
    if isinstance(first, slice) and isinstance(second, slice):
        return _same((first.start, first.stop, first.step), (second.start, second.stop, second.step))
    return first is second or (
        type(first) is type(second) and bool(first == second or (first != first and second != second))
    )


def merge_aliases(graph: fx.Graph, other: fx.Graph) -> None:
    """Adds what aliases and mutates what in the other mode: a cut must be legal in both."""
    twin = dict(zip(other.nodes, graph.nodes, strict=True))
    for theirs, mine in twin.items():
        for key in ("storages", "mutates"):
            mine.meta[key] = mine.meta[key] | theirs.meta[key]
        links = frozenset(twin[node] for node in theirs.meta.get("links", ()) if node in twin)
        if links:
            mine.meta["links"] = mine.meta.get("links", frozenset()) | links
