"""The table of methods: names to classes, loaded when asked for.

A new method of the package is one file beside this one and one line in ``_TABLE``; one of the user's own is a
class anywhere, under ``@register_method``.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields, replace
from typing import Any, TypeVar

from localize.errors import MethodError, did_you_mean
from localize.heads.base import Method

_TABLE = {
    "bp": "localize.heads.bp:BP",
    "scpl": "localize.heads.scpl:SCPL",
    "al": "localize.heads.al:AL",
    "nwise": "localize.heads.nwise:NWise",
    "lct": "localize.heads.lct:LCT",
    "early_exit": "localize.heads.early_exit:EarlyExit",
    "joint": "localize.heads.joint:Joint",
}
_registered: dict[str, type[Method] | Method] = {}

M = TypeVar("M", bound="type[Method] | Method")


def list_methods() -> list[str]:
    """Names of all methods: the package's, then those registered from outside."""
    return [*_TABLE, *_registered]


def method_class(name: str) -> type[Method]:
    """The class behind a name; its dataclass fields are the options.

    Raises:
        MethodError: no method has this name.
    """
    entry = _lookup(name)
    return entry if isinstance(entry, type) else type(entry)


def get_method(name: str, **options: Any) -> Method:
    """The method of this name with these options, the rest at their defaults.

    Raises:
        MethodError: an unknown name, an unknown option, or an option out of range.
    """
    entry = _lookup(name)
    if isinstance(entry, type):
        return entry.from_options(options)
    type(entry).from_options(options)  # names unknown options as from_options does
    return replace(entry, **options)


def resolve_method(method: str | Method | type[Method]) -> Method:
    """A method from what a user passes: its name, an instance with options, or its class.

    Raises:
        MethodError: none of these, or an unknown name.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return get_method(method)
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    raise MethodError(
        f"method={method!r} is neither a name ({', '.join(list_methods())}) nor a Method instance such as "
        "SCPL(temperature=0.1)."
    )


def register_method(method: M) -> M:
    """Makes a rule defined outside the package known by its ``name``; usable as a class decorator.

    An instance registers its options as the name's defaults.

    Raises:
        MethodError: not a ``Method`` with a name, or the name is taken by another one.
    """
    cls = method if isinstance(method, type) else type(method)
    if not issubclass(cls, Method):
        raise MethodError(f"register_method takes a subclass of Method or an instance, got {method!r}.")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise MethodError(
            f"{cls.__qualname__} needs a class attribute name: ClassVar[str], a word such as 'my_rule'; "
            f"it has {name!r}."
        )
    if not _is_own_dataclass(cls):
        raise MethodError(
            f"{cls.__qualname__} must be a dataclass: put @dataclass(frozen=True) below @register_method."
        )
    known = _registered.get(name)
    other = known if isinstance(known, type) or known is None else type(known)
    if name in _TABLE or (other is not None and _path(other) != _path(cls)):
        taken_by = _TABLE.get(name) or _path(other)
        raise MethodError(f"The method name {name!r} is taken by {taken_by}; give {_path(cls)} another name.")
    _registered[name] = method
    return method


def _lookup(name: str) -> type[Method] | Method:
    if name in _registered:
        return _registered[name]
    if name not in _TABLE:
        known = list_methods()
        raise MethodError(f"Unknown method {name!r}.{did_you_mean(name, known)} Methods: {', '.join(known)}.")
    module, _, attribute = _TABLE[name].partition(":")
    cls: type[Method] = getattr(importlib.import_module(module), attribute)
    return cls


def _is_own_dataclass(cls: type[Method]) -> bool:
    """Whether all annotated options of the class became dataclass fields."""
    own = [n for n, a in inspect.get_annotations(cls).items() if "ClassVar" not in str(a)]
    return set(own) <= {f.name for f in fields(cls)}


def _path(cls: type | None) -> str:
    return f"{cls.__module__}:{cls.__qualname__}" if cls is not None else "?"
