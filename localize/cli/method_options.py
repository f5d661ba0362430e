"""A method's options from the command line: its dataclass fields are the flags."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from localize.errors import ConfigError, MethodError, did_you_mean
from localize.heads.base import Method
from localize.heads.registry import get_method, method_class


def choose_method(
    name: str, tokens: Sequence[str] = (), options: Iterable[str] = ()
) -> tuple[Method, list[str]]:
    """The method ``name`` with its options, and the arguments that are no options.

    Args:
        name: a registered name.
        tokens: what the command itself did not know, options and arguments mixed:
            ``["model.py", "--temperature", "0.1"]``.
        options: ``["temperature=0.1"]``.

    Raises:
        ConfigError: a flag that neither the command nor the method has, or a value that does not fit.
        MethodError: an unknown method or option, or a value out of range.
    """
    cls = method_class(name)
    kinds = option_types(cls)
    pairs, arguments = _split(cls, tokens, kinds)
    for pair in options:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option takes NAME=VALUE, got {pair!r}.")
        pairs.append((key.replace("-", "_"), value))
    return get_method(cls.name, **{key: _value(cls, key, text, kinds) for key, text in pairs}), arguments


def option_types(cls: type[Method]) -> dict[str, Any]:
    """The options of a method and their types."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def option_rows(cls: type[Method]) -> list[tuple[str, str, Any]]:
    """Flag, type and default of every option."""
    kinds = option_types(cls)
    return [
        (
            f"--{f.name.replace('_', '-')}",
            type_name(kinds[f.name]),
            f.default if f.default is not MISSING else "required",
        )
        for f in fields(cls)
    ]


def type_name(kind: Any) -> str:
    """``int``, ``float``, ``flatten | auto``: as a person writes it."""
    if get_origin(kind) is Literal:
        return " | ".join(str(a) for a in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in get_args(kind))
    if kind is type(None):
        return "none"
    return "true | false" if kind is bool else getattr(kind, "__name__", str(kind))


def _split(
    cls: type[Method], tokens: Sequence[str], kinds: dict[str, Any]
) -> tuple[list[tuple[str, str]], list[str]]:
    """``["model.py", "--temperature", "0.1", "--no-keep"]`` as pairs of option and value, and arguments."""
    pairs: list[tuple[str, str]] = []
    arguments: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            arguments.append(token)
            continue
        key, equals, value = token.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        kind = kinds.get(key)
        if key not in kinds and kinds.get(key.removeprefix("no_")) is bool and not equals:
            pairs.append((key.removeprefix("no_"), "false"))
        elif key not in kinds:
            raise unknown_option(token, cls, kinds)
        elif equals or (kind is bool and not (rest and rest[0].lower() in ("true", "false"))):
            pairs.append((key, value if equals else "true"))
        elif not rest or rest[0].startswith("--"):
            raise ConfigError(f"{token} needs a value ({type_name(kind)}).")
        else:
            pairs.append((key, rest.pop(0)))
    return pairs, arguments


def unknown_option(token: str, cls: type[Method], kinds: dict[str, Any]) -> ConfigError:
    """The error for a flag that nobody knows."""
    known = [f"--{k.replace('_', '-')}" for k in kinds]
    return ConfigError(
        f"No such option: {token}.{did_you_mean(token.partition('=')[0], known)} "
        f"Options of method {cls.name!r}: {', '.join(known) or 'none'}."
    )


def _value(cls: type[Method], key: str, text: str, kinds: dict[str, Any]) -> Any:
    """``text`` in the type of option ``key``."""
    if key not in kinds:
        cls.from_options({key: text})  # raises, and names the options there are
    try:
        return _parse(kinds[key], text)
    except ValueError:
        raise MethodError(f"Method {cls.name!r}: {key}={text!r} is not {type_name(kinds[key])}.") from None


def _parse(kind: Any, text: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        for allowed in arguments:
            if str(allowed).lower() == text.lower():
                return allowed
        raise ValueError(text)
    if origin in (Union, types.UnionType):
        for choice in sorted(arguments, key=lambda a: a is str):  # text fits all, so it is tried last
            try:
                return _parse(choice, text)
            except ValueError:
                continue
        raise ValueError(text)
    if kind is type(None):
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(text)
        return text.lower() in ("true", "1", "yes")
    return kind(text) if kind in (int, float, str) else text
