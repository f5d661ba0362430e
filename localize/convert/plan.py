"""From a captured model to a plan: what it is trained for, and where it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from localize.convert.candidates import Points, below_classifier, check_reach, fitting
from localize.convert.cuts import choose_cuts, classifier_cut, find_cuts
from localize.convert.graft import HeadCosts, HeadTiming
from localize.convert.logits import empty_output, logits_leaf, logits_spec
from localize.convert.partition import HeadCost, PartTable, best_cuts, cuts_for_budget
from localize.convert.profile import profile_modes
from localize.convert.split import Cuts
from localize.convert.summary import summary
from localize.convert.ties import check_ties, respect_ties
from localize.convert.traced import Profile, TracedModel
from localize.errors import ConfigError, MethodError
from localize.heads.base import Method
from localize.part import kind_of
from localize.spec import Cost, CutPoint, Plan, TensorSpec
from localize.task import Task, infer_task


@dataclass(frozen=True)
class Planned:
    """The outcome of planning: the cuts by mode, and the plan for people to read."""

    cuts: dict[bool, Cuts]
    plan: Plan


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
        output = empty_output(self.traced, self.profiles[False], training=False)
        self.task = (
            self.wanted.completed(output) if self.wanted is not None else infer_task(output, self.loss)
        )

    @cached_property
    def logits(self) -> TensorSpec:
        """Shape of the model's logits."""
        return logits_spec(self.traced, self.profiles[True], self.task, self.method.heads_below)

    # ---------------------------------------------------------------- places

    @cached_property
    def cut_points(self) -> Points:
        """The cut points worth considering, by mode; the same names in both."""
        return find_cuts(self.traced, self.profiles)

    @cached_property
    def every_cut(self) -> Points:
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

    # ---------------------------------------------------------------- heads

    @cached_property
    def head_costs(self) -> HeadCosts:
        """What the method's heads cost."""
        shape = self.logits.features
        axis = (self._represented.spec.batch_axis if self._represented is not None else None) or 0

        def stand_in(hidden: Tensor) -> Tensor:
            return hidden.new_zeros((hidden.shape[axis], *shape))

        classifier = stand_in if self._represented is not None else None
        return HeadCosts(self.method, self.task, self.logits, classifier, self._timing)

    @property
    def _timing(self) -> HeadTiming | None:
        """How heads are timed; None where no time is balanced."""
        if self.balance != "time":
            return None
        whole = self.profiles[True].cost(list(self.profiles[True].nodes))
        device, dtype = kind_of(self.traced.root)
        real = self.traced.ran and not any(t.is_meta for t in self.traced.example) and device.type != "meta"
        return HeadTiming(whole, device if real else None, dtype)

    @property
    def _represented(self) -> CutPoint | None:
        """Where the last head reads the representation below the model's classifier."""
        return self.classifier[True] if self.method.splits_classifier else None

    @property
    def _last_hidden(self) -> TensorSpec:
        """What the last head reads."""
        return self._represented.spec if self._represented is not None else self.logits

    def head_cost(self, point: CutPoint | None, first: bool = False) -> Cost:
        """The cost of the method's head on a cut point, or on the last part (None).

        Args:
            point: the cut point.
            first: the part below it is the first of all.

        Raises:
            MethodError: the method cannot work on such a hidden state.
        """
        if point is not None:
            return self.head_costs.of(point.spec, 1 if first else 2, 3)
        last = self._last_hidden
        return self.head_costs.of(last, 1, 1) if first else self.head_costs.of(last, 3, 3)

    def _exact_head(self, spec: TensorSpec, number: int, parts: int) -> Cost:
        try:
            return self.head_costs.of(spec, number, parts)
        except MethodError:  # a cut by hand that the method cannot work on: graft says so, for all parts at once
            return Cost()

    # ---------------------------------------------------------------- choices

    def choose(
        self, parts: int | str, cuts: Sequence[str] | None, memory_budget_bytes: int | None
    ) -> Planned:
        """Where to cut, and what every part costs.

        Raises:
            CutError: unknown cut names, more parts than possible, or a budget that cannot be met.
            ConfigError: ``parts`` makes no sense.
            MethodError: the method can work nowhere.
        """
        if cuts is not None:
            points = self.every_cut
            chosen = choose_cuts(cuts, points[True])
            check_ties(self.traced, self.profiles[True], [points[True][i] for i in chosen])
        else:
            points = self._usable(parts)
            chosen = self._best(points[True], parts, memory_budget_bytes)
        notes = check_reach(self.traced, self.profiles[True], [points[True][i] for i in chosen], self.method)
        by_mode = {
            mode: Cuts(
                tuple(points[mode][i] for i in chosen),
                self.classifier[mode],
                logits_leaf(self.traced, self.profiles[mode], self.task, mode),
            )
            for mode in (True, False)
        }
        train = self.profiles[True]
        plan = summary(
            self.traced, train, by_mode[True], self.method, self.balance, self.logits, self._exact_head
        )
        return Planned(by_mode, replace(plan, notes=(*plan.notes, *notes, *self._estimates(plan))))

    def _estimates(self, plan: Plan) -> list[str]:
        """Which of a plan's heads could not be timed."""
        read = {self._last_hidden, *(boundary.spec for boundary in plan.boundaries)}
        found = {spec: why for spec, why in self.head_costs.estimated.items() if spec in read}
        return [f"head on {spec}: time estimated from FLOPs, since {why}" for spec, why in found.items()]

    def _usable(self, parts: int | str) -> Points:
        """The cut points that the model's tied parameters and the method leave."""
        wanted = parts if isinstance(parts, int) else None
        points = respect_ties(self.traced, self.profiles, self.cut_points, wanted)
        if self._represented is not None:
            points = below_classifier(self.traced, self.profiles[True], points, self._represented, wanted)
        return fitting(points, self.head_cost, parts)

    def _best(
        self, points: Sequence[CutPoint], parts: int | str, memory_budget_bytes: int | None
    ) -> list[int]:
        def table(balance: str, head_cost: HeadCost) -> PartTable:
            return PartTable(
                self.traced, self.profiles[True], points, balance, head_cost, self.method.heads_below
            )

        if isinstance(parts, int):
            # The first part's head is taken for any other: telling them apart would double the dry runs.
            return best_cuts(points, parts, table(self.balance, lambda point, _: self.head_cost(point)).cost)
        if memory_budget_bytes is None:
            raise ConfigError(
                "parts='auto' needs memory_budget_bytes=: what one part with its head may take."
            )
        memory = table("memory", self.head_cost)
        return cuts_for_budget(memory, table(self.balance, self.head_cost), memory_budget_bytes)
