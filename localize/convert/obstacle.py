"""What stops a recording, and where in the user's code it happened."""

from __future__ import annotations

import os
import sys
from enum import Enum, auto
from types import FrameType

import torch

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class Remedy(Enum):
    """What may be done about an obstacle. Where it does not help, the module is kept whole."""

    WHOLE = auto()  # nothing but keeping the module whole
    GUARD = auto()  # checking at run time, where the module holds too much of the model to be kept whole
    GENERAL = auto()  # the library has a way that is right for every input: take that
    SETTLE = auto()  # running the model once before recording: what it sets up at its first call is there then
    REBIND = auto()  # copying the buffer's new value into it
    WATCH = auto()  # recording again, with an eye on random numbers
    FAKE = auto()  # recording without data, on fake tensors: the model is too large to run


class Obstacle(BaseException):
    """Something that the module at ``scope`` does cannot be recorded. The recording restarts with a remedy.

    Not an ``Exception``: a user's own ``except Exception`` inside a forward must not swallow it.
    """

    def __init__(
        self, reason: str, scope: str, where: str, remedy: Remedy = Remedy.WHOLE, name: str = ""
    ) -> None:
        """``name``: of the buffer, for ``REBIND``."""
        super().__init__(f"{where}, in {describe_scope(scope)}: {reason}")
        self.reason, self.scope, self.where, self.remedy, self.name = reason, scope, where, remedy, name


def describe_scope(scope: str) -> str:
    """A module path, for reading."""
    return f"module {scope!r}" if scope else "the root module's forward"


def user_frame() -> FrameType | None:
    """The innermost frame that belongs neither to this package nor to torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_PACKAGE, _TORCH, "<")):
        frame = frame.f_back
    return frame


def user_location() -> str:
    """``file:line`` of the user's code that runs now."""
    frame = user_frame()
    if frame is None:
        return "an unknown place"
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(filename: str) -> str:
    """Paths end up in generated code, which must not depend on where packages are installed."""
    for folder in ("site-packages", "dist-packages"):
        _, found, rest = filename.rpartition(f"{os.sep}{folder}{os.sep}")
        if found:
            return rest
    here = os.getcwd() + os.sep
    return filename.removeprefix(here)
