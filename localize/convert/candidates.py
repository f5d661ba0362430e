"""Which cut points a method can use."""

from __future__ import annotations

from localize.convert.partition import HeadCost
from localize.convert.traced import Profile, TracedModel
from localize.errors import MethodError, problem_list
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


def _listed(names: list[str]) -> str:
    shown, rest = ", ".join(map(repr, names[:_SHOWN])), len(names) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _only(points: Points, names: set[str]) -> Points:
    return {mode: [point for point in found if point.name in names] for mode, found in points.items()}
