"""Text that is written for people: what it says of a size does not steer the program."""

from __future__ import annotations

import ast
import linecache
from functools import lru_cache
from types import FrameType

_WRITES = ("assert", "check", "print", "warn", "log", "debug", "info", "error", "exception", "format_message")


def is_message(frame: FrameType | None) -> bool:
    """Whether the line that runs in ``frame`` is inside an assertion, an exception, a warning, a log or a print."""
    if frame is None:
        return False
    return any(start <= frame.f_lineno <= end for start, end in _stretches(frame.f_code.co_filename))


@lru_cache(maxsize=256)
def _stretches(filename: str) -> tuple[tuple[int, int], ...]:
    """First and last lines of all such places in a file; empty where its source is not at hand."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    places = (node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Assert | ast.Call))
    return tuple((node.lineno, node.end_lineno or node.lineno) for node in places if _is_for_people(node))


def _is_for_people(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return True
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return any(word in name.lower() for word in _WRITES)
