"""Tied parameters: all readers of one stay in one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from localize.convert.traced import Profile, TracedModel
from localize.errors import CutError, problem_list
from localize.spec import CutPoint


@dataclass(frozen=True)
class TiedParameter:
    """A parameter that several nodes read, and where in the graph: at ``first``, …, ``last``."""

    name: str
    first: int
    last: int

    def is_cut_by(self, point: CutPoint) -> bool:
        return self.first < point.position <= self.last


@contextmanager
def untied(model: nn.Module, wanted: bool) -> Iterator[tuple[str, ...]]:
    """Gives every further name of a tied parameter a copy of its own, for good; undone where the block raises.

    Gives the notes that say so. The model itself changes, so that it and its parts go on being one: the copies start
    equal and are trained apart. A module that is used twice has one set of weights all the same.
    """
    first: dict[int, str] = {}
    seen: set[tuple[int, str]] = set()
    copied: list[tuple[nn.Module, str, nn.Parameter]] = []
    notes: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False) if wanted else ():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if id(parameter) in first and (id(owner), leaf) not in seen:
            copied.append((owner, leaf, parameter))
            owner._parameters[leaf] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            notes.append(
                f"untied: {name} was {first[id(parameter)]}, and is a copy of its own from now on, in the model too; "
                "they start equal and are trained apart"
            )
        first.setdefault(id(parameter), name)
        seen.add((id(owner), leaf))
    try:
        yield tuple(notes)
    except BaseException:
        for owner, leaf, parameter in copied:
            owner._parameters[leaf] = parameter
        raise


def tied_parameters(traced: TracedModel, profile: Profile, training: bool = True) -> list[TiedParameter]:
    """All parameters that more than one node reads."""
    spans: dict[str, list[int]] = {}
    for i, node in enumerate(traced.graph(training).nodes):
        for name, _ in profile.nodes[node.name].params:
            spans.setdefault(name, []).append(i)
    return [TiedParameter(name, found[0], found[-1]) for name, found in spans.items() if len(found) > 1]


def respect_ties(
    traced: TracedModel,
    profiles: dict[bool, Profile],
    cuts: dict[bool, list[CutPoint]],
    parts: int | None = None,
) -> dict[bool, list[CutPoint]]:
    """The cut points, of both modes, that keep all readers of every tied parameter in one part.

    Raises:
        CutError: so few remain that ``parts`` parts are impossible; the message names the parameters.
    """
    ties = {mode: tied_parameters(traced, profiles[mode], mode) for mode in cuts}
    broken = {p.name: tie.name for mode in cuts for p in cuts[mode] for tie in ties[mode] if tie.is_cut_by(p)}
    kept = {mode: [p for p in cuts[mode] if p.name not in broken] for mode in cuts}
    if parts is not None and len(kept[True]) + 1 < parts <= len(cuts[True]) + 1:
        listed = ", ".join(sorted(set(broken.values())))
        raise CutError(
            f"{parts} parts are impossible while all readers of a shared parameter stay in one part: "
            f"{len(kept[True])} of {len(cuts[True])} cut points remain (shared: {listed}). Use "
            f"parts={len(kept[True]) + 1} or fewer{_instead(traced.root)}."
        )
    return kept


def check_ties(
    traced: TracedModel, profile: Profile, chosen: Sequence[CutPoint], training: bool = True
) -> None:
    """Raises ``CutError`` where cuts that a person chose part the readers of a tied parameter; lists all."""
    ties = tied_parameters(traced, profile, training)
    problems = [
        f"the cut after {point.name!r} would part the readers of {tie.name!r}."
        for point in chosen
        for tie in ties
        if tie.is_cut_by(point)
    ]
    if problems:
        raise CutError(
            f"{problem_list('Shared parameters', problems)}\n"
            f"Move the cut: all readers of a parameter have to be in one part{_instead(traced.root)}."
        )


def _instead(model: nn.Module) -> str:
    """What else may be done, where parameters have several names."""
    owners: dict[int, set[tuple[int, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        owners.setdefault(id(parameter), set()).add((id(model.get_submodule(path)), leaf))
    if all(len(places) == 1 for places in owners.values()):
        return ""
    return ", or pass tied='untie': every name gets a copy of its own, which is trained apart"
