"""Several processes, each with some of the parts: a run as one rank sees it.

    rank 0   F1 B1 │ F2 B2 │ F3 B3 │       reads data; batch i goes up as soon as Fi is done, before the head and Bi
    rank 1      F1 B1 │ F2 B2 │ F3 B3      starts on batch i when it has arrived, and not before batch i-1 is done

What a part does with a batch is ``stage_step``, as everywhere; ``Wires`` carries out its sends and receives. Where a
loss reaches several parts, the stage waits for gradients from above before it goes on to the next batch, since its
next forward pass needs the new weights. So the results are those of one process, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from localize.runtime import metrics
from localize.runtime.checkpoint import Share
from localize.runtime.gathering import gathering
from localize.runtime.holdings import trainable_only
from localize.runtime.messages import Upward
from localize.runtime.nonfinite import check_weights
from localize.runtime.run import Run
from localize.runtime.sequential import stages_of
from localize.runtime.shards import Shard
from localize.runtime.stage import Stage, StageReport
from localize.runtime.wire import Kind

if TYPE_CHECKING:
    from localize.runtime.team import Team

T = TypeVar("T")
_BOARD_S = 0.5  # how often losses are posted for the other ranks


class DistributedRun(Run):
    """The stages of one rank. Counters, history and scores are the same on every rank."""

    def __init__(self, team: Team) -> None:
        self.team = team
        super().__init__(team.local, team.options, team.device)
        self.reports = team.first
        self.state.numbers, self.state.held = team.placement.numbers, frozenset(team.holdings.mine())
        self.state.owned = team.holdings.owned()
        self._saves, self._posted_at = 0, 0.0
        self.saver.listen = team.session.check
        self._known: list[float | None] = [None] * len(team.local.parts)
        self.state.replicas = team.placement.replicas
        self._shard: Shard | None = None
        if team.replicas is not None:
            self.updater.average = team.replicas.average

    def _stages(self) -> list[Stage]:
        return [stage for stage in stages_of(self.local) if stage.number in self.team.placement.numbers]

    def _optimizers(self) -> list[Optimizer]:
        with trainable_only(self.local, self.team.placement.numbers):
            return super()._optimizers()

    # ---------------------------------------------------------------- data

    def _located(self, train: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        place = self.team.placement
        if place.replicas > 1 and (self._shard is None or self._shard.loader is not train):
            self._shard = Shard(train, place.replica, place.replicas)
        return super()._located(train if self._shard is None else self._shard)

    def _length(self, train: Iterable[Any]) -> int | None:
        whole = super()._length(train)
        return None if whole is None else whole // self.team.placement.replicas

    @property
    def _draw(self) -> tuple[int, int]:
        return self.state.step, self.team.placement.replica

    # ---------------------------------------------------------------- steps

    def _steps(self, train: Iterable[Any]) -> Iterator[list[StageReport]]:
        self.team.holdings.watch()
        if self.team.reads:
            yield from super()._steps(train)
        else:
            for arrived, samples, microbatches in self._arriving():
                with self._step_place():
                    reports = self.carry_out([arrived], samples, microbatches)
                del arrived
                yield reports
        self.team.wires.end()

    def _arriving(self) -> Iterator[tuple[Upward, int, int]]:
        """Batches from below; a trace shows how long they were waited for."""
        batches, number = self.team.wires.batches(Kind.DATA), self.stages[0].number
        while True:
            if self.recorder is not None:
                self.recorder.batch = self.state.step + 1
                self.recorder.begin(number, "wait", f"part {number - 1}")
            found = next(batches, None)
            if self.recorder is not None:
                self.recorder.end()
            if found is None:
                return
            yield found

    def carry_out(self, arrived: Iterable[Upward], size: int, microbatches: int) -> list[StageReport]:
        self.team.wires.at(Kind.DATA, self.state.step, size, microbatches)
        reports = super().carry_out(arrived, size, microbatches)
        self.team.holdings.check()
        self.team.session.step = self.state.step
        return reports

    def _execute(self, arrived: Iterable[Upward], microbatches: int) -> list[StageReport]:
        with gathering((stage.head for stage in self.stages), self.team.replicas):
            own = self._run_batch(arrived, microbatches, self.team.wires)
        reports = [StageReport(None, None)] * len(self.local.parts)
        for stage, report in zip(self.stages, own, strict=True):
            reports[stage.number - 1] = report
        return reports

    # ---------------------------------------------------------------- what all ranks know

    def _losses(self, reports: Sequence[StageReport]) -> Sequence[Tensor | float | None]:
        """This rank's losses, and those that others posted last: a little late, and nobody waits for them."""
        now = time.monotonic()
        if now - self._posted_at >= _BOARD_S:
            self._posted_at = now
            own = {s.number: reports[s.number - 1].loss for s in self.stages}
            self.team.session.post("losses", {n: None if loss is None else float(loss) for n, loss in own.items()})
            for posted in self.team.session.look("losses"):
                for number, loss in (posted or {}).items():
                    self._known[int(number) - 1] = loss
            self.team.session.check()
        pairs = zip(reports, self._known, strict=True)
        return [known if report.loss is None else report.loss for report, known in pairs]

    def _tally(self) -> metrics.Tally:
        everyone = self.team.session.gather(self.state.tally.plain())
        total, place = self.state.tally.join(everyone), self.team.placement
        total.samples = sum(each["samples"] for each in everyone[:: len(place.ranges)])
        total.skipped = self.state.tally.join(everyone[: len(place.ranges)]).skipped  # all replicas skip the same
        return total

    def _of_first_replica(self, own: list[T]) -> list[list[T]]:
        return self.team.session.gather(own)[: len(self.team.placement.ranges)]

    def _recorded(self, own: list[list[Any]]) -> list[list[list[Any]]]:
        return self._of_first_replica(own)

    def _rates(self) -> list[float]:
        return [rate for rates in self._of_first_replica(super()._rates()) for rate in rates]

    # ---------------------------------------------------------------- checkpoints

    def resume(self) -> None:
        super().resume()
        if self.team.placement.replica:  # what all replicas had counted is the first one's
            self.state.tally = metrics.Tally(len(self.local.parts), self.device)

    def save(self) -> None:
        """Has this rank's share of a checkpoint written. Whoever is the last to do so makes it the latest one.

        The first replica does; the others have the same weights.
        """
        folder = self.options.checkpoint_dir
        assert folder is not None
        check_weights(self.stages, self.state.step)
        if self.team.replicas is not None:
            self.team.replicas.pool(self.state.tally)
        if self.team.placement.replica:
            return
        self._saves += 1
        number, ranks, count = self._saves, len(self.team.placement.ranges), self.team.session.count
        shard = f"-{self.team.placement.rank + 1}-of-{ranks}"
        share = Share(number, shard, lambda: count(f"checkpoint/{number}") == ranks)  # asked in the saver's thread
        self.saver.save(folder, self.state.snapshot(), share)
