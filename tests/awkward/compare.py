"""Differences between a model and its twin: outputs, gradients, state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Wrong(Exception):
    """The converted model did something else than the model."""


def compare(what: str, expected: Any, found: Any) -> None:
    if type(expected) is not type(found):
        raise Wrong(f"{what} is a {type(found).__name__} instead of a {type(expected).__name__}")
    if isinstance(expected, Tensor):
        _tensors(what, expected, found)
    elif isinstance(expected, dict):
        if list(expected) != list(found):
            raise Wrong(f"{what} has the keys {list(found)} instead of {list(expected)}")
        for key in expected:
            compare(f"{what}[{key!r}]", expected[key], found[key])
    elif isinstance(expected, list | tuple):
        if len(expected) != len(found):
            raise Wrong(f"{what} has {len(found)} entries instead of {len(expected)}")
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            compare(f"{what}[{i}]", one, other)
    elif isinstance(expected, bool | int | float | str | torch.dtype | torch.device | None):
        if expected != found and expected == expected:
            raise Wrong(f"{what} is {found!r} instead of {expected!r}")
    elif not isinstance(expected, nn.Module) and not callable(expected) and hasattr(expected, "__dict__"):
        compare(what, dict(sorted(vars(expected).items())), dict(sorted(vars(found).items())))


def _tensors(what: str, expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype or expected.layout != found.layout:
        raise Wrong(
            f"{what} is {found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        )
    if expected.requires_grad != found.requires_grad:
        raise Wrong(f"{what}: requires_grad is {found.requires_grad} instead of {expected.requires_grad}")
    if expected.layout != torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    same = (expected == found) | ((expected != expected) & (found != found))
    if not bool(same.all()):
        raise Wrong(f"{what} is another: {found.flatten()[:3].tolist()} instead of {expected.flatten()[:3].tolist()}")


def gradients(title: str, twin: nn.Module, model: nn.Module) -> None:
    for (name, one), (_, other) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        if (one.grad is None) != (other.grad is None):
            raise Wrong(f"{title}: gradient of {name} is {'missing' if other.grad is None else 'too much'}")
        if one.grad is not None:
            compare(f"{title}: gradient of {name}", one.grad, other.grad)


_NOTHING = "no such attribute"
_UNTOLD = re.compile("^_(?!buffers$|parameters$)")  # nn.Module's own tables, and what users call private


def state(title: str, twin: nn.Module, model: nn.Module, scratch: Sequence[str]) -> None:
    """Parameters, buffers and plain attributes of all modules, but for those in ``scratch``."""
    theirs, mine = dict(twin.named_modules()), dict(model.named_modules())
    if list(theirs) != list(mine):
        raise Wrong(f"{title}: the modules are {list(mine)} instead of {list(theirs)}")
    for path, module in theirs.items():
        where = f"{title}: state of {path or 'the root'}"
        prefix = f"{path}." if path else ""
        for name in vars(module).keys() | vars(mine[path]).keys():
            if not _UNTOLD.match(name) and prefix + name not in scratch:
                one, other = vars(module).get(name, _NOTHING), vars(mine[path]).get(name, _NOTHING)
                compare(f"{where}: {name}", one, other)
