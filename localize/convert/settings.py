"""Plain attributes that a forward reads: a strength, a rate, a flag. Their values are part of the captured program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from localize.errors import TraceError
from localize.part import kind_of

_KINDS = frozenset({bool, int, float, str, type(None)})
_INTERNAL = frozenset((*vars(nn.Module()), *vars(nn.Module))) - {"training"}
_MISSING = object()

Entry = tuple[Any, str, Any, Any]
"""A module or what it refers to, how that is called, an attribute (key, index) and its value."""


@dataclass
class Settings:
    """What one recording read."""

    values: dict[tuple[int, str], tuple[nn.Module, Any]] = field(default_factory=dict)
    flags: dict[int, int] = field(default_factory=dict)  # by owner: reads of ``training`` that Python decided on
    owners: dict[int, nn.Module] = field(default_factory=dict)
    reads_dtype: bool = False  # some tensor was asked for its type
    inside: dict[int, tuple[Any, nn.Module, str, dict[Any, Any]]] = field(default_factory=dict)  # of configurations

    def note(self, owner: nn.Module, name: str, value: Any) -> None:
        """``owner.name`` was read."""
        if name == "training":
            self.owners[id(owner)] = owner
            self.flags[id(owner)] = self.flags.get(id(owner), 0) + 1
        else:
            self.values.setdefault((id(owner), name), (owner, value))

    def note_inside(self, owner: nn.Module, name: str, value: Any) -> None:
        """``owner.name`` was read, which is a dict, a list or an object: a configuration, perhaps."""
        if id(value) not in self.inside:
            plain = {key: item for key, item in _items(value) if type(item) in _KINDS}
            self.inside[id(value)] = (value, owner, name, plain)

    def flag_used(self, owner: nn.Module) -> None:
        """A ``training`` flag that was read went to a function, where it stays live."""
        self.flags[id(owner)] = self.flags.get(id(owner), 0) - 1

    @contextmanager
    def noticed(self, listens: Callable[[], bool]) -> Iterator[None]:
        """While it lasts, reads of modules' plain attributes are noticed where ``listens()``."""

        earlier = vars(nn.Module).get("__getattribute__")  # of a program that patches modules itself
        read = earlier or object.__getattribute__

        def noticing(module: nn.Module, name: str) -> Any:
            value = read(module, name)
            if name in _INTERNAL or not listens():
                return value
            if type(value) in _KINDS and _is_plain(module, name):
                self.note(module, name, value)
            elif name in object.__getattribute__(module, "__dict__") and _has_items(value):
                self.note_inside(module, name, value)
            return value

        nn.Module.__getattribute__ = noticing  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            if earlier is None:
                del nn.Module.__getattribute__
            else:
                nn.Module.__getattribute__ = earlier  # type: ignore[method-assign]


class CheckSettings(nn.Module):
    """Guard: what the captured program was made for still holds. It refers to the modules without holding them.

    A copy, or what comes out of a pickle, checks nothing: the modules it was made with are not its own.
    """

    def __init__(
        self, entries: Sequence[Entry] = (), root: nn.Module | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """``dtype``: of ``root``'s parameters; None where nobody asked."""
        super().__init__()
        self.__dict__.update(entries=tuple(entries), root=root, dtype=dtype)

    def forward(self) -> None:
        """Raises ``TraceError`` where something changed."""
        for module, path, name, value in self.__dict__["entries"]:
            now = _item(module, name)
            if now is not value and not (type(now) is type(value) and now == value):
                raise TraceError(_changed(path, str(name), value, now))
        dtype = self.__dict__["dtype"]
        if dtype is not None and kind_of(self.__dict__["root"])[1] is not dtype:
            now = kind_of(self.__dict__["root"])[1]
            raise TraceError(
                f"The model was converted in {dtype} and is in {now} now, and its forward asks tensors for their type. "
                "Convert again."
            )

    def __reduce__(self) -> Any:
        return CheckSettings, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckSettings:
        return CheckSettings()


def check_of(
    root: nn.Module, settings: Sequence[Settings], original: dict[int, dict[str, Any]], mode: bool | None
) -> CheckSettings | None:
    """The check of what recordings of ``root`` read; None where there is nothing to check.

    Args:
        root: the model.
        settings: of the recordings that one graph stands for.
        original: every module's attributes before the session: what the model sets up by itself is no setting.
        mode: the graph's, where train and eval mode have graphs of their own; None where one serves both.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    entries: dict[tuple[int, str], Entry] = {}
    for read in settings:
        for (key, name), (owner, value) in read.values.items():
            if key in paths and original[key].get(name, getattr(type(owner), name, _MISSING)) is value:
                entries[key, name] = (owner, paths[key], name, value)
        for key, count in read.flags.items():
            if mode is not None and count > 0 and key in paths:
                entries[key, "training"] = (read.owners[key], paths[key], "training", mode)
        for key, (held, owner, name, plain) in read.inside.items():
            if id(owner) not in paths or any(_item(held, item) is not value for item, value in plain.items()):
                continue  # the forward itself changes it
            path = f"{paths[id(owner)]}.{name}".lstrip(".")
            entries.update({(key, str(item)): (held, path, item, value) for item, value in plain.items()})
    dtype = kind_of(root)[1] if any(read.reads_dtype for read in settings) else None
    return CheckSettings(list(entries.values()), root, dtype) if entries or dtype is not None else None


def _has_items(value: Any) -> bool:
    """Whether a value is a container or an object of a small class: no module, no tensor, no function."""
    if isinstance(value, nn.Module | torch.Tensor | type | FunctionType | MethodType | ModuleType):
        return False
    return type(value) in (dict, list, tuple) or type(getattr(value, "__dict__", None)) is dict


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return list(value.items() if isinstance(value, dict) else vars(value).items())


def _item(holder: Any, name: Any) -> Any:
    if isinstance(holder, list | tuple):
        return holder[name] if name < len(holder) else _MISSING
    return holder.get(name, _MISSING) if isinstance(holder, dict) else getattr(holder, name, _MISSING)


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a value that is kept: not one that a property works out."""
    if name in object.__getattribute__(module, "__dict__"):
        return True
    place: Mapping[str, Any] = next((vars(kind) for kind in type(module).__mro__ if name in vars(kind)), {})
    return type(place.get(name)) in _KINDS and not name.startswith("__")


def _changed(path: str, name: str, value: Any, now: Any) -> str:
    where = f"{path}.{name}" if path else f"the model's {name!r}"
    found = "gone" if now is _MISSING else repr(now)
    if name == "training":
        return (
            f"Module {path!r} is in {'train' if now else 'eval'} mode while its part is not, and its forward branches "
            "on that. Switch modes with local.train() and local.eval(), or put the branch into an nn.Module of its own."
        )
    return (
        f"{where} was {value!r} at capture and is {found} now, and the captured forward reads it. Convert again, or "
        "put the lines that read it into an nn.Module of their own: it is kept whole and reads the value at every call."
    )
