"""Which cut points a method can use."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from localize.convert.cuts import module_path
from localize.convert.liveness import dependencies
from localize.convert.partition import HeadCost
from localize.convert.traced import Profile, TracedModel
from localize.errors import MethodError, problem_list
from localize.heads.base import Method
from localize.spec import CutPoint

_SHOWN = 4  # names of cuts in one line of an error message

Points = dict[bool, list[CutPoint]]
"""Cut points by mode (True for train), the same names in both."""


def below_classifier(
    traced: TracedModel, profile: Profile, points: Points, classifier: CutPoint, parts: int | None
) -> Points:
    """For methods that train the model's classifier apart: cuts that leave the last part more than that.

    All of them where the model is too small for such a choice.
    """
    nodes = list(traced.train_graph.nodes)[: classifier.position]
    last_layer = max(i for i, node in enumerate(nodes) if profile.nodes[node.name].params)
    names = {point.name for point in points[True] if point.position <= last_layer}
    return points if len(names) + 1 < (parts or 1) else _only(points, names)


def fitting(points: Points, head_cost: HeadCost, parts: int | str) -> Points:
    """The cuts whose hidden state the method can work on.

    Raises:
        MethodError: there are none, and cuts are wanted; every reason is given, with the cuts it holds for.
    """
    names: set[str] = set()
    refusals: dict[str, list[str]] = {}
    for point in points[True]:
        try:
            head_cost(point, False)
        except MethodError as error:
            refusals.setdefault(str(error), []).append(point.name)
        else:
            names.add(point.name)
    if refusals and not names and parts != 1:
        problems = [f"after {_listed(after)}: {reason}" for reason, after in refusals.items()]
        raise MethodError(problem_list("No place to cut", problems))
    return _only(points, names)


def check_reach(traced: TracedModel, profile: Profile, chosen: Sequence[CutPoint], method: Method) -> list[str]:
    """Notes on layers that no loss trains. Cuts between two branches do that: the hidden state is one of them.

    Raises:
        MethodError: a whole part would learn nothing; all such parts are listed.
    """
    nodes = list(traced.train_graph.nodes)
    depends_on = dependencies(nodes, profile)
    readers = [i for i, node in enumerate(nodes) if profile.nodes[node.name].params]
    if not readers or not method.heads_below:
        return []
    parts = len(chosen) + 1
    everything = depends_on[nodes[readers[-1]].name]  # what the model's own output depends on
    reached = [*(depends_on[point.primary] for point in chosen), everything]
    below = [bisect_left(readers, position) for position in (0, *(point.position for point in chosen))]
    problems, notes = [], []
    for number, (start, stop) in enumerate(pairwise((*below, len(readers))), 1):
        own = whole = everything & ((1 << stop) - (1 << start))
        losses = [j for j in range(1, parts + 1) if number in method.trains(j, parts)]
        for loss in losses:
            own &= ~reached[loss - 1]
        if not own or not losses:
            continue
        names = " and ".join(f"part {j}" for j in losses)
        if own == whole:
            problems.append(f"part {number} is trained by the loss of {names}, which does not depend on it.")
        else:
            missed = [module_path(traced, nodes[readers[i]]) for i in range(start, stop) if own >> i & 1]
            notes.append(f"not trained: {', '.join(missed)}; the loss of {names} does not depend on them")
    if problems:
        raise MethodError(
            f"{problem_list(f'Method {method.name!r} would leave layers untrained', problems)}\n"
            "Cut where branches meet (cuts=), use fewer parts, or a method whose loss reaches only its own part (scpl)."
        )
    return notes


def _listed(names: list[str]) -> str:
    shown, rest = ", ".join(map(repr, names[:_SHOWN])), len(names) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _only(points: Points, names: set[str]) -> Points:
    return {mode: [point for point in found if point.name in names] for mode, found in points.items()}
