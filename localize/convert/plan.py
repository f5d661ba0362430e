"""From a captured model to a plan: what it is trained for, where it is cut, what every part costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from localize.convert.cuts import choose_cuts, classifier_cut, find_cuts, module_path
from localize.convert.graft import HeadCosts
from localize.convert.planning import check_ties, part_costs, parts_for_budget, plan_cuts, respect_ties
from localize.convert.profile import profile_modes
from localize.convert.split import Cuts
from localize.convert.traced import Profile, TracedModel
from localize.errors import ConfigError, MethodError
from localize.heads.base import Method
from localize.spec import Boundary, Cost, CutPoint, PartCost, Plan, TensorSpec, indices_of
from localize.task import Task, infer_task


@dataclass
class Planner:
    """All that planning needs of one captured model: costs, cut points, the task.

    Args:
        traced: the captured model.
        method: its heads count in the balance.
        balance: what the parts are balanced by.
        wanted: what the model is trained for; inferred from its output where None.
        loss: replaces the inferred task's loss.
    """

    traced: TracedModel
    method: Method
    balance: str
    wanted: Task | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    task: Task = field(init=False)
    profiles: dict[bool, Profile] = field(init=False)

    def __post_init__(self) -> None:
        self.profiles = profile_modes(self.traced, measure_time=self.balance == "time")
        output = self._dry_output(False)
        self.task = self.wanted.completed(output) if self.wanted is not None else infer_task(output, self.loss)

    # ---------------------------------------------------------------- the model's output

    def _dry_leaves(self, mode: bool) -> list[Any]:
        """The leaves of the output as empty tensors of the right shape; constants as they are."""
        output = next(node for node in self.traced.graph(mode).nodes if node.op == "output")
        leaves: Sequence[Any] = output.args[0]
        return [self._dry(mode, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]

    def _dry(self, mode: bool, node: fx.Node) -> Any:
        specs = self.profiles[mode].nodes[node.name].specs
        return torch.empty(specs[0].shape, dtype=specs[0].dtype, device="meta") if specs else None

    def _dry_output(self, mode: bool) -> Any:
        return self.traced.outputs[mode].restore(self._dry_leaves(mode))

    def logits_leaf(self, mode: bool) -> int:
        """The position of the logits among the leaves of the model's output."""
        leaves = self._dry_leaves(mode)
        logits = self.task.logits(self.traced.outputs[mode].restore(leaves))
        return next(i for i, leaf in enumerate(leaves) if leaf is logits)

    @cached_property
    def logits(self) -> TensorSpec:
        """Shape of the model's logits."""
        output = self.task.logits(self._dry_output(True))
        axis = 0 if output.dim() else None
        layout = {2: "vector", 3: "tokens", 4: "map"}.get(output.dim(), "other")
        return TensorSpec(tuple(output.shape), output.dtype, axis, layout)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- places

    @cached_property
    def cut_points(self) -> dict[bool, list[CutPoint]]:
        """The cut points worth considering, by mode; the same names in both."""
        return find_cuts(self.traced, self.profiles)

    @cached_property
    def every_cut(self) -> dict[bool, list[CutPoint]]:
        """All legal cut points, by mode: what a person may name."""
        return find_cuts(self.traced, self.profiles, thin=False)

    @cached_property
    def classifier(self) -> dict[bool, CutPoint | None]:
        """The place below the model's own classifier, by mode."""
        points = self.every_cut
        found = classifier_cut(self.traced, points[False], training=False)
        if found is None:
            return {True: None, False: None}
        return {mode: next((p for p in points[mode] if p.name == found.name), None) for mode in (True, False)}

    # ---------------------------------------------------------------- choices

    @cached_property
    def head_costs(self) -> HeadCosts:
        """What the method's heads cost."""
        shape = self.logits.features

        def stand_in(hidden: Tensor) -> Tensor:
            return hidden.new_zeros((hidden.shape[0], *shape))

        return HeadCosts(self.method, self.task, self.logits, stand_in if self._reads_representation else None)

    @property
    def _reads_representation(self) -> bool:
        return self.method.splits_classifier and self.classifier[True] is not None

    def head_cost(self, point: CutPoint | None) -> Cost:
        """The cost of the method's head on a cut point, or on the last part (None)."""
        if point is not None:
            return self.head_costs.of(point.spec)
        below = self.classifier[True]
        last = below.spec if below is not None and self._reads_representation else self.logits
        return self.head_costs.of(last, 3, 3)

    def choose(self, parts: int | str, cuts: Sequence[str] | None, memory_budget_bytes: int | None) -> Layout:
        """Where to cut, and what every part costs.

        Raises:
            CutError: unknown cut names, more parts than possible, or a budget that cannot be met.
            ConfigError: ``parts`` makes no sense.
        """
        head_cost = self.head_cost
        train = self.profiles[True]
        if cuts is not None:
            points = self.every_cut
            chosen = choose_cuts(cuts, points[True])
            check_ties(self.traced, train, [points[True][i] for i in chosen])
            return self._layout(points, chosen)
        wanted = parts if isinstance(parts, int) else None
        points = respect_ties(self.traced, self.profiles, self.cut_points, wanted)
        points = self._fitting(self._below_classifier(points, wanted), parts)
        if parts == "auto":
            if memory_budget_bytes is None:
                raise ConfigError("parts='auto' needs memory_budget_bytes=: what one part with its head may take.")
            parts = parts_for_budget(self.traced, train, points[True], memory_budget_bytes, head_cost)
        assert isinstance(parts, int)
        chosen, *_ = plan_cuts(self.traced, train, points[True], parts, self.balance, head_cost)
        return self._layout(points, chosen)

    def _below_classifier(
        self, points: dict[bool, list[CutPoint]], parts: int | None
    ) -> dict[bool, list[CutPoint]]:
        """For methods that train the model's classifier apart: cuts that leave the last part more than that.

        All of them where the model is too small for such a choice.
        """
        limit = self.classifier[True]
        if not self.method.splits_classifier or limit is None:
            return points
        nodes = list(self.traced.graph(True).nodes)[: limit.position]
        last_layer = max(i for i, node in enumerate(nodes) if self.profiles[True].nodes[node.name].params)
        names = {point.name for point in points[True] if point.position <= last_layer}
        if len(names) + 1 < (parts or 1):
            return points
        return {mode: [point for point in found if point.name in names] for mode, found in points.items()}

    def _fitting(self, points: dict[bool, list[CutPoint]], parts: int | str) -> dict[bool, list[CutPoint]]:
        """The cuts whose hidden state the method can work on.

        Raises:
            MethodError: there are none, and cuts are wanted.
        """
        names, refusals = set(), []
        for point in points[True]:
            try:
                self.head_cost(point)
            except MethodError as error:
                refusals.append(error)
            else:
                names.add(point.name)
        if refusals and not names and parts != 1:
            raise refusals[0]
        return {mode: [point for point in found if point.name in names] for mode, found in points.items()}

    def _layout(self, points: dict[bool, list[CutPoint]], chosen: Sequence[int]) -> Layout:
        cuts = {
            mode: Cuts(tuple(points[mode][i] for i in chosen), self.classifier[mode], self.logits_leaf(mode))
            for mode in (True, False)
        }
        costs, _ = part_costs(self.traced, self.profiles[True], cuts[True].points, lambda point: Cost())
        return Layout(cuts, self._plan(cuts[True], costs))

    def _plan(self, cuts: Cuts, costs: Sequence[Cost]) -> Plan:
        nodes = list(self.traced.graph(True).nodes)
        edges = [0, *(p.position for p in cuts.points), len(nodes)]
        ends = [_ends(self.traced, nodes[a:b]) for a, b in pairwise(edges)]
        boundaries = [
            Boundary(k, p.name, p.primary, p.crossing, p.spec, p.crossing_bytes) for k, p in enumerate(cuts.points, 1)
        ]
        below = cuts.classifier
        inside = below is not None and below.position > edges[-2]
        representation = below.spec if below is not None and inside else None
        last = representation if representation is not None and self.method.splits_classifier else self.logits
        total = len(costs)
        heads = [self._exact_head(spec, k, total) for k, spec in enumerate([*(p.spec for p in cuts.points), last], 1)]
        return Plan(
            model=type(self.traced.root).__name__,
            method=self.method.name,
            balance=self.balance,
            cuts=tuple(p.name for p in cuts.points),
            boundaries=tuple(boundaries),
            parts=tuple(
                PartCost(k, first, last, cost, head)
                for k, ((first, last), cost, head) in enumerate(zip(ends, costs, heads, strict=True), 1)
            ),
            inputs=tuple(TensorSpec.of(t) for t in self.traced.example),
            indices=tuple(indices_of(t) for t in self.traced.example),
            representation=representation,
            notes=tuple(self.traced.notes),
        )


    def _exact_head(self, spec: TensorSpec, number: int, parts: int) -> Cost:
        try:
            return self.head_costs.of(spec, number, parts)
        except MethodError:  # a cut by hand that the method cannot work on: graft says so, for all parts at once
            return Cost()


@dataclass(frozen=True)
class Layout:
    """The outcome of planning: the cuts by mode, and the plan for people to read."""

    cuts: dict[bool, Cuts]
    plan: Plan


def _ends(traced: TracedModel, nodes: Sequence[fx.Node]) -> tuple[str, str]:
    """The first and the last module (or node) of a stretch of the graph."""
    work = [n for n in nodes if n.op.startswith("call_") and n.meta.get("storages")]
    if not work:
        return "", ""
    named = [module_path(traced, n) or n.name for n in (work[0], work[-1])]
    return named[0], named[1]
