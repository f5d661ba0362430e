"""What ranks must have in common before they start: what they train, and where their checkpoints go."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from localize.errors import CheckpointError, PlacementError, problem_list
from localize.model import LocalModel
from localize.runtime.checkpoint import TOKEN
from localize.runtime.options import Options
from localize.runtime.session import POLL_S, Session
from localize.spec import plain
from localize.weights import fingerprint

PATIENCE_S = 60.0  # network file systems may show a new folder that late
_LISTED = 5  # names of tensors in a message
_FACTORIES = ("optimizer", "head_optimizer", "scheduler")
_PRESENT = (*_FACTORIES[1:], "checkpoint_dir", "trace")
_VALUES = (
    "seed", "precision", "checkpoint_every", "gather", "data_parallel", "microbatches", "on_nonfinite",
)  # fmt: skip


def agree(session: Session, local: LocalModel, options: Options, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Makes sure that all ranks train the same; returns what each gave as ``own``, which may differ.

    Raises:
        PlacementError: they do not; it lists what differs.
    """
    about = {
        "model": repr(fingerprint(local.to_standard())["sha256"][:12]),
        "method": repr(f"{local.method.name} {plain(local.method.options())}"),
        "cuts": repr(list(local.plan.cuts)),
        **{name: repr(getattr(options, name)) for name in _VALUES},
        "clip_grad_norm": repr(None if options.clip_grad_norm is None else float(options.clip_grad_norm)),
        **{name: "not given" if getattr(options, name) is None else "given" for name in _PRESENT},
    }
    factories = {name: settings(getattr(options, name)) for name in _FACTORIES}
    everyone = session.gather({"about": about, "factories": factories, "own": own})
    problems = []
    for rank, other in enumerate(everyone):
        for kind in ("about", "factories"):
            for name, first in everyone[0][kind].items():
                there = other[kind][name]
                if None not in (first, there) and first != there:
                    problems.append(f"{name} is {first} on rank 0 and {there} on rank {rank}")
    if problems:
        advice = (
            "Every process has to be given the same model and options. With balance='time', convert once "
            "(`localize convert … --balance time`) and train the artefact, or pass cuts=."
        )
        raise PlacementError(problem_list("The ranks do not train the same", [*problems, advice]))
    return [other["own"] for other in everyone]


def same_names(session: Session, names: list[str]) -> None:
    """Tells what differs between the tensors of the ranks' models, which are not the same, or in another order.

    Raises:
        PlacementError: always.
    """
    everyone = session.gather(names)
    first, problems = everyone[0], []
    for rank, other in enumerate(everyone):
        for here, there, one, two in ((0, rank, first, other), (rank, 0, other, first)):
            lacking = sorted({*one} - {*two})
            if lacking:
                more = f" and {len(lacking) - _LISTED} more" if len(lacking) > _LISTED else ""
                problems.append(f"rank {here} has {', '.join(lacking[:_LISTED])}{more}, and rank {there} has not")
        if {*first} == {*other} and first != other:
            problems.append(f"rank {rank} has the same tensors as rank 0, but they were registered in another order")
    advice = (
        "A forward pass that registers buffers does so only on the ranks that run it; register all of them in "
        "__init__, in one order (one that is not known yet as None)."
    )
    raise PlacementError(problem_list("The ranks' models do not have the same tensors", [*problems, advice]))


def settings(factory: object) -> str | None:
    """``Adam(lr=0.001)`` of a class, or of a ``partial`` of one; None of what only its code, or no text, could tell."""
    positional, keywords = (), dict[str, Any]()
    if isinstance(factory, partial):
        positional, keywords, factory = factory.args, factory.keywords, factory.func
    if not isinstance(factory, type) or not all(map(_plain, (*positional, *keywords.values()))):
        return None
    given = [*map(repr, positional), *(f"{name}={value!r}" for name, value in sorted(keywords.items()))]
    return f"{factory.__qualname__}({', '.join(given)})"


def _plain(value: object) -> bool:
    """Whether ``repr`` says what it is, in every process the same."""
    if isinstance(value, list | tuple):
        return all(_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_plain(each) for pair in value.items() for each in pair)
    return value is None or isinstance(value, bool | int | float | str)


# -------------------------------------------------------------------- folders


def share(session: Session, folder: Path) -> None:
    """Makes sure that all ranks have the same ``folder``: all read what the first one writes there for a moment.

    Raises:
        PlacementError: some rank has another folder, perhaps under the same path on another machine.
        CheckpointError: on the first rank: the folder cannot be written to.
    """
    token = folder / f"{TOKEN}{uuid.uuid4().hex}"
    try:
        if session.ranks.first:
            _write(token)
        name = session.gather(token.name)[0]
        everyone = session.gather([str(folder.absolute()), _sees(session, folder / name)])
    finally:
        if session.ranks.first:
            with suppress(OSError):
                token.unlink()
    others = [f"rank {rank} ({path})" for rank, (path, sees) in enumerate(everyone) if not sees]
    if others:
        raise PlacementError(
            f"checkpoint_dir must be the same folder for all ranks, on a disk that they share: rank 0 has "
            f"{everyone[0][0]}, and what it writes there does not appear for {', '.join(others)}."
        )


def _write(token: Path) -> None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(token.name, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"checkpoint_dir={str(token.parent)!r} cannot be written to: {error}.") from error


def _sees(session: Session, token: Path) -> bool:
    end = time.monotonic() + PATIENCE_S
    while True:
        with suppress(OSError, UnicodeDecodeError):
            if token.read_text(encoding="utf-8") == token.name:
                return True
        if time.monotonic() > end:
            return False
        session.check()
        time.sleep(POLL_S / 5)
