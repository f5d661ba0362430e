"""Every error a user can meet. A message says what is wrong, where, the values, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LocalizeError(Exception):
    """Base of all errors raised on purpose. At the command line: one line on stderr, exit status 2."""


class TraceError(LocalizeError):
    """The model cannot be captured as a graph, or the captured graph is not the model."""


class CutError(LocalizeError):
    """The model cannot be cut as asked: too many parts, unknown cut names, tied weights across a cut."""


class MethodError(LocalizeError):
    """Unknown method, an option out of range, or a method that does not fit the model or the task."""


class TaskError(LocalizeError):
    """The model's output or the targets fit no task."""


class PlacementError(LocalizeError):
    """Parts cannot be placed on the devices or ranks given."""


class ConfigError(LocalizeError):
    """An argument, file or option has a value that makes no sense."""


class CheckpointError(LocalizeError):
    """A saved artefact or checkpoint is missing, truncated, of another model or of a newer version."""


class WireError(LocalizeError):
    """A message between two stages is not the one expected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest known name, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def problem_list(title: str, problems: Iterable[str]) -> str:
    """Joins several problems into one message, a bullet each, so that nobody meets them one a run."""
    lines = list(problems)
    if len(lines) == 1:
        return f"{title}: {lines[0]}"
    return "\n".join([f"{title}:", *(f"  - {line}" for line in lines)])
