"""Cut points: the legal gaps of a graph, thinned out and named; and what a person's names mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from localize.convert.liveness import Gap, is_work, legal_gaps, settle_checks
from localize.convert.naming import place_names
from localize.convert.profile import parameters_read
from localize.convert.traced import Profile, TracedModel
from localize.errors import CutError, did_you_mean, problem_list
from localize.spec import CutPoint

_SHOWN = 6  # valid names in an error message


def find_cuts(
    traced: TracedModel, profiles: dict[bool, Profile], thin: bool = True
) -> dict[bool, list[CutPoint]]:
    """The cut points of both modes' graphs, lowest first and the same names in both.

    Guards of the capture are moved within the graphs to where their numbers are known; nothing else changes.

    Args:
        traced: the captured model.
        profiles: by mode (True for train); one object twice where ``traced.modes_agree``.
        thin: keep only the best gaps between two layers with parameters, and the one below the classifier.
            Without, every legal gap: what a person may name.
    """
    found = _named_gaps(traced, profiles[True], training=True)
    in_eval: dict[str, CutPoint] = {}
    if not traced.modes_agree:
        in_eval = _same_places(traced, profiles, found)
        found = [point for point in found if point.name in in_eval]
    kept = _thinned(traced, profiles[True], found) if thin else found
    return {True: kept, False: kept if traced.modes_agree else [in_eval[point.name] for point in kept]}


def _same_places(
    traced: TracedModel, profiles: dict[bool, Profile], found: Sequence[CutPoint]
) -> dict[str, CutPoint]:
    """Eval mode's cut points that are the same place as those of train mode, under the names of the latter.

    A name alone may mislead: nodes are numbered apart in both graphs. Where names agree by chance, other parameters
    lie below.
    """
    read = {mode: _parameters_below(traced, profiles[mode], mode) for mode in (True, False)}
    common = read[True][-1] & read[False][-1]
    points = _named_gaps(traced, profiles[False], training=False)
    named = {name: point for point in points for name in (point.name, *point.aliases)}
    same: dict[str, CutPoint] = {}
    last = -1
    for point in found:
        for there in (named[name] for name in (point.name, *point.aliases) if name in named):
            below = read[True][point.position], read[False][there.position]
            if there.position > last and below[0] & common == below[1] & common:
                same[point.name], last = replace(there, name=point.name, aliases=point.aliases), there.position
                break
    return same


def _parameters_below(traced: TracedModel, profile: Profile, training: bool) -> list[frozenset[str]]:
    """By position in a graph: the parameters that the nodes below it read."""
    below = [frozenset[str]()]
    for node in traced.graph(training).nodes:
        read = frozenset(name for name, _ in profile.nodes[node.name].params)
        below.append(below[-1] if read <= below[-1] else below[-1] | read)
    return below


def choose_cuts(names: Sequence[str], cut_points: Sequence[CutPoint]) -> list[int]:
    """Indices of the cut points that ``names`` (any order, aliases included) stand for, lowest first.

    Raises:
        CutError: names that are no cut points, or two names of one place; all of them at once.
    """
    index = {
        name: i for i, point in reversed(list(enumerate(cut_points))) for name in (point.name, *point.aliases)
    }
    problems: list[str] = []
    chosen: dict[int, str] = {}
    for name in names:
        place = index.get(name)
        if place is None:
            problems.append(f"the model cannot be cut after {name!r}.{did_you_mean(name, index)}")
        elif place in chosen:
            other = chosen[place]
            problems.append(
                f"{name!r} is given twice." if other == name else f"{other!r} and {name!r} are one place."
            )
        else:
            chosen[place] = name
    if problems:
        raise CutError(f"{problem_list('Bad cuts', problems)}\n{_valid_names(cut_points)}")
    return sorted(chosen)


def classifier_cut(
    traced: TracedModel, cut_points: Sequence[CutPoint], training: bool = True
) -> CutPoint | None:
    """The place below the model's own classifier, or None where there is no such place.

    The classifier is the outermost module that ends the graph (layers without parameters may follow), reads
    one tensor, and has no more than half of the layers with parameters; failing that, the last such layer.
    """
    nodes = list(traced.graph(training).nodes)
    names = traced.parameter_names()
    readers = [i for i, n in enumerate(nodes) if parameters_read(traced, n, names)]
    if len(readers) < 2:
        return None
    for start in _suffix_starts(traced, nodes, readers):
        below = [
            p for p in cut_points if p.position <= start and not _works(traced, nodes[p.position : start])
        ]
        if below and len(below[0].crossing) == 1:
            return below[0]
    between = [p for p in cut_points if readers[-2] < p.position <= readers[-1] and len(p.crossing) == 1]
    return _best(traced, nodes, between) if between else None


def _suffix_starts(traced: TracedModel, nodes: Sequence[fx.Node], readers: Sequence[int]) -> list[int]:
    """Where the modules around the last layer with parameters begin, outermost first, if they end it all."""
    path = module_path(traced, nodes[readers[-1]])
    starts = []
    for depth in range(1, path.count(".") + 2 if path else 1):
        module = ".".join(path.split(".")[:depth])
        inside = [
            i for i, n in enumerate(nodes) if _makes_tensor(n) and _is_below(module_path(traced, n), module)
        ]
        theirs = [i for i in readers if i >= inside[0]]
        if set(theirs) <= set(inside) and len(theirs) * 2 <= len(readers):
            starts.append(inside[0])
    return starts


def _works(traced: TracedModel, nodes: Sequence[fx.Node]) -> bool:
    """Whether any node makes a tensor, dropout apart, which belongs to the layer above it."""
    return any(_makes_tensor(n) and not _is_dropout(traced, n) for n in nodes)


def _makes_tensor(node: fx.Node) -> bool:
    return node.op.startswith("call_") and bool(node.meta.get("storages"))


def module_path(traced: TracedModel, node: fx.Node) -> str:
    """The module that a node belongs to: the leaf module it calls, else the one it was recorded in."""
    if node.op == "call_module" and str(node.target) not in traced.extras:
        return str(node.target)
    return str(node.meta.get("scope", ""))


def _is_below(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def _named_gaps(traced: TracedModel, profile: Profile, training: bool) -> list[CutPoint]:
    graph = traced.graph(training)
    settle_checks(graph, profile)
    gaps = legal_gaps(graph, profile)
    work = [(i, n) for i, n in enumerate(graph.nodes) if is_work(n, profile)]
    paths = [(n.name, module_path(traced, n), n.op == "call_module" and n.target not in traced.extras) for _, n in work]
    names = dict(zip([i + 1 for i, _ in work], place_names(paths), strict=True))
    return [_cut_point(gap, names[gap.position], profile) for gap in gaps]


def _cut_point(gap: Gap, names: tuple[str, ...], profile: Profile) -> CutPoint:
    return CutPoint(
        position=gap.position,
        name=names[0],
        primary=gap.primary,
        crossing=gap.crossing,
        spec=profile.nodes[gap.primary].specs[0],
        crossing_bytes=gap.crossing_bytes,
        aliases=names[1:],
    )


def _thinned(traced: TracedModel, profile: Profile, points: Sequence[CutPoint]) -> list[CutPoint]:
    """The best gap between every two layers with parameters, and the one below the classifier.

    Best: fewest bytes, then the latest, but a head should read what dropout has not yet thinned.
    """
    nodes = list(traced.graph(True).nodes)
    segments: dict[int, list[CutPoint]] = {}
    readers_below = 0
    upward = iter(points)
    point = next(upward, None)
    for i, node in enumerate(nodes):
        while point is not None and point.position == i:
            segments.setdefault(readers_below, []).append(point)
            point = next(upward, None)
        readers_below += bool(profile.nodes[node.name].params)
    best = [_best(traced, nodes, segment) for segment in segments.values()]
    classifier = classifier_cut(traced, points)
    if classifier is not None and classifier not in best:
        best.append(classifier)
    return sorted(best, key=lambda p: p.position)


def _best(traced: TracedModel, nodes: Sequence[fx.Node], segment: Sequence[CutPoint]) -> CutPoint:
    fewest = min(point.crossing_bytes for point in segment)
    leanest = [point for point in segment if point.crossing_bytes == fewest]
    start = leanest[0].position
    for point in reversed(leanest):
        if not any(_is_dropout(traced, node) for node in nodes[start : point.position]):
            return point
    return leanest[0]


def _is_dropout(traced: TracedModel, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(traced.resolve(str(node.target)), nn.modules.dropout._DropoutNd)
    return "dropout" in str(getattr(node.target, "__name__", node.target)) and node.op.startswith("call_")


def _valid_names(cut_points: Sequence[CutPoint]) -> str:
    if not cut_points:
        return "This model has no cut points."
    step = max(1, len(cut_points) // _SHOWN)
    shown = [point.name for point in cut_points[::step][:_SHOWN]]
    rest = len(cut_points) - len(shown)
    return f"Cut points are {', '.join(shown)}{f' and {rest} more' if rest else ''}."
