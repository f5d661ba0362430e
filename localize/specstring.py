"""The small language of MODEL and DATA specs: ``kind:rest?name=value&name=value``."""

from __future__ import annotations

import ast
from typing import Any
from urllib.parse import parse_qsl

from localize.errors import ConfigError

_WORDS = {"true": True, "false": False, "none": None}


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits ``"resnet18?num_classes=10"`` into ``"resnet18"`` and ``{"num_classes": 10}``.

    Raises:
        ConfigError: what follows the question mark is no list of ``name=value``.
    """
    body, mark, query = spec.partition("?")
    if not mark:
        return body, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise ConfigError(
            f"{spec!r}: options are written `?name=value&name=value`, got {query!r}."
        ) from error
    return body, {name: literal(value) for name, value in pairs}


def literal(text: str) -> Any:
    """The value a person means: numbers, true/false/none and Python literals, else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
