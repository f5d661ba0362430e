"""Modules and tensors that graphs need beside the user's own, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
