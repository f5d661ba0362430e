"""Text that is written for people: what it says of a size does not steer the program."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from types import FrameType

_WRITERS = frozenset({"warn", "warn_once", "warning", "warning_once"})
_LOGGED = frozenset({"debug", "info", "error", "exception", "critical", "log"})  # where the receiver is a log

Place = tuple[int, int]
"""Line and column."""


def is_message(frame: FrameType | None) -> bool:
    """Whether what runs in ``frame`` makes a text for an assertion, an exception, a warning, a log or a print."""
    if frame is None:
        return False
    line, last_line, column, last_column = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    if line is None or last_line is None or column is None or last_column is None:
        return False
    start, end = (line, column), (last_line, last_column)
    return any(first <= start and end <= last for first, last in _stretches(frame.f_code.co_filename))


@lru_cache(maxsize=256)
def _stretches(filename: str) -> tuple[tuple[Place, Place], ...]:
    """Where a file makes such texts; empty where its source is not at hand."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    texts = (text for node in ast.walk(tree) for text in _texts(node))
    return tuple(((t.lineno, t.col_offset), (t.end_lineno or 0, t.end_col_offset or 0)) for t in texts)


def _texts(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions under ``node`` that only people read. A condition is none of them."""
    if isinstance(node, ast.Assert) and node.msg is not None:
        yield node.msg
    elif isinstance(node, ast.Raise) and node.exc is not None:
        yield node.exc
    elif isinstance(node, ast.Call):
        receiver, name = _called(node.func)
        if name == "_assert":
            yield from node.args[1:]
        elif name == "print":
            yield node  # it makes the text itself
        elif name in _WRITERS or (name in _LOGGED and "log" in receiver.lower()):
            yield from node.args


def _called(function: ast.expr) -> tuple[str, str]:
    """(receiver, name) of what a call calls: ("logger", "info")."""
    if isinstance(function, ast.Attribute):
        return _called(function.value)[1], function.attr
    return "", getattr(function, "id", "")
