"""What carries out ``fit`` and ``evaluate``: this process alone, or several, each with some of the parts."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from localize.errors import ConfigError, PlacementError
from localize.model import LocalModel
from localize.runtime import agreement, checkpoint, evaluation, metrics, transport
from localize.runtime.distributed import DistributedRun
from localize.runtime.holdings import Holdings
from localize.runtime.materialise import materialise
from localize.runtime.options import Options
from localize.runtime.placement import placement_of
from localize.runtime.precision import PRECISIONS, autocast_for
from localize.runtime.ranks import expected, join, restarted
from localize.runtime.replicas import Replicas, join_replicas
from localize.runtime.run import Run
from localize.runtime.session import Session
from localize.runtime.wires import Wires

_log = logging.getLogger(__name__)


class Crew(Protocol):
    """Who trains: a context around one ``fit`` or ``evaluate``."""

    first: bool  # whether this process reads data and shows progress
    goes_on: bool  # whether it was started anew after a failure, to go on from a checkpoint

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def agreed(self, value: Any) -> Any:
        """What the first process gave; plain data."""

    def run(self, resume: bool) -> Run:
        """A new run, or the one in ``checkpoint_dir`` where it stands."""

    def evaluate(self, loader: Iterable[Any]) -> dict[str, Any]: ...

    def finish(self) -> None:
        """After training: when the last checkpoint is complete, and weights are where they are wanted."""


class Alone:
    """One process has all parts."""

    first, goes_on = True, False
    _run: Run | None = None

    @staticmethod
    def place(local: LocalModel, options: Options, device: torch.device | str | None) -> torch.device:
        """Where the model is computed; moves it there, if asked to. What is on the meta device gets values first."""
        materialise(local, options.seed)
        return place(local, device)

    def __init__(self, local: LocalModel, options: Options, device: torch.device) -> None:
        self.local, self.options, self.device = local, options, device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._run is not None:
            self._run.saver.stop()

    def agreed(self, value: Any) -> Any:
        return value

    def run(self, resume: bool) -> Run:
        if self.options.checkpoint_dir is not None:
            checkpoint.clean(self.options.checkpoint_dir)
        run = self._run = Run(self.local, self.options, self.device)
        if resume:
            run.resume()
        return run

    def evaluate(self, loader: Iterable[Any]) -> dict[str, Any]:
        autocast = autocast_for(self.options.precision, self.device)
        return metrics.evaluate(self.local, loader, self.options.split_batch, self.device, autocast)

    def finish(self) -> None:
        if self._run is not None:
            self._run.saver.wait()


class Team:
    """Several processes, each with consecutive parts. All of them do all of this, in the same order.

    Attributes:
        session: what the ranks have in common.
        placement, holdings: which parts and tensors this rank has.
        reads: whether this rank has the first part of its replica, and so reads data.
        replicas: the ranks that have the same parts, if there are any.
        wires: its edges to the neighbours, while it is open.
    """

    wires: Wires
    _run: Run | None = None
    _broken = False  # whether a run of these processes failed: connections may be closed, on any of them

    @staticmethod
    def place(local: LocalModel, options: Options, device: torch.device | str | None) -> torch.device:
        """Where this rank computes. Its parts move there when training starts."""
        # What cannot be placed is told before any rank waits for another.
        placement = placement_of(local, *expected(), options.data_parallel)
        join()
        join_replicas(placement)
        return device_for(device, local)

    def __init__(self, local: LocalModel, options: Options, device: torch.device) -> None:
        self.local, self.options, self.device = local, options, device
        self._ranks = join()
        self.first = self._ranks.first
        self.goes_on = restarted() and options.checkpoint_dir is not None
        self.placement = placement_of(local, self._ranks.rank, self._ranks.count, options.data_parallel)
        self.reads = self.placement.rank == 0
        self.replicas: Replicas | None = None
        self._open: Wires | None = None

    def __enter__(self) -> Self:
        if Team._broken:
            raise PlacementError(
                "An earlier run of these processes failed, and their connections are closed; start them anew."
            )
        self.session = Session(self._ranks, self.placement.names)
        try:
            self.holdings = Holdings(self.local, self.placement, self.session)
            self.replicas = Replicas(self.session, self.placement) if self.placement.replicas > 1 else None
            self._agree()
        except BaseException as error:
            self._give_up(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            Team._broken = True
            self._give_up(error)
            return
        try:
            if self._open is not None:
                self._open.close()
            self.session.leave()
        except BaseException as failure:
            Team._broken = True
            self._give_up(failure)
            raise
        self._open = None

    def _give_up(self, error: BaseException) -> None:
        """Tells the others first, so that none waits for what this rank still does; then waits for its own threads."""
        opened, self._open = self._open, None
        try:
            cause = self.session.fail(error)
            if opened is not None:
                opened.abort(cause)
            if self._run is not None:
                self._run.saver.stop()
        finally:
            self.session.give_up()

    def agreed(self, value: Any) -> Any:
        return self.session.gather(value)[0]

    def run(self, resume: bool) -> Run:
        folder = self.options.checkpoint_dir
        if folder is not None:
            if self.first:
                checkpoint.clean(folder)
            agreement.share(self.session, folder)
        self.holdings.materialise(self.options.seed)
        self.holdings.release()
        self.holdings.move(self.device)
        if self.replicas is not None:
            self.replicas.alike(self.holdings)
        # Nobody writes a checkpoint before the folder is clean, or reads one that is being made.
        self.session.wait_for_all()
        run = self._run = DistributedRun(self)
        if resume:
            run.resume()
        self.connect(run.state.step)
        return run

    def connect(self, step: int = 0) -> None:
        """Opens the edges to the neighbours; ``step`` counts from 0."""
        self.session.step = step
        self.wires = self._open = Wires(
            self.session, self.placement, self.local, self.device, step, self._direct
        )

    def evaluate(self, loader: Iterable[Any]) -> dict[str, Any]:
        if self._open is None:
            self.holdings.materialise(self.options.seed)
            self.holdings.move(self.device)
            self.connect()
        return evaluation.evaluate(self, loader, autocast_for(self.options.precision, self.device))

    def finish(self) -> None:
        if self._run is not None:
            self._run.saver.wait()
        self.session.wait_for_all()  # the last checkpoint is complete when all shares of it are
        everywhere = self.options.gather == "all"
        if everywhere or (self.options.gather == "first" and self.placement.replica == 0):
            self.holdings.gather(everywhere)

    def _agree(self) -> None:
        """Makes sure that all ranks are about to do the same.

        Raises:
            PlacementError: they are not, or these options do not work on several ranks.
        """
        parts = len(self.local.parts)
        if PRECISIONS[self.options.precision] is torch.float16 and self.local.method.reach_in(parts) > 1:
            raise PlacementError(
                f"precision='fp16' with {self.local.method.name!r}, whose losses reach several parts, needs one loss "
                "scale for all ranks, which they do not share; use precision='bf16' or executor='sequential'."
            )
        names = list(self.holdings.ranks)
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        own = {"weights": _sample(self.holdings), "seat": transport.seat(self.device), "names": digest}
        everyone = agreement.agree(self.session, self.local, self.options, own)
        if len({other["names"] for other in everyone}) > 1:
            agreement.same_names(self.session, names)
        self._direct = transport.direct([other["seat"] for other in everyone])
        # Those of the first replica are everyone's.
        values = [other["weights"] for other in everyone[: len(self.placement.ranges)]]
        if self.first and any(one[n] != other[n] for one in values for other in values for n in one if n in other):
            _log.warning(
                "The ranks built models with different weights; call torch.manual_seed before the model is built, so "
                "that a run can be repeated. Each part keeps the weights of its own rank."
            )


def place(local: LocalModel, device: torch.device | str | None) -> torch.device:
    """Moves the model, if asked to; returns where it is.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is not None:
        try:
            local.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}"
            ) from error
    anything: Tensor | None = next(local.parameters(), next(local.buffers(), None))
    return anything.device if anything is not None else torch.device("cpu")


def device_for(wanted: torch.device | str | None, local: LocalModel) -> torch.device:
    """Where this rank computes: ``cuda`` is the device with the number of the process on its machine."""
    if wanted is None:
        first = next((t for t in local.parameters() if not t.is_meta), None)
        return torch.device("cpu") if first is None else first.device
    device = torch.device(wanted)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def _sample(holdings: Holdings) -> dict[str, list[float]]:
    """The first value of some tensors: differs where weights were drawn at random without a common seed."""
    names = [name for name, tensor in holdings.tensors.items() if tensor.numel() and not tensor.is_meta]
    chosen = names[:: max(1, len(names) // 16)]
    return {name: [float(holdings.tensors[name].detach().flatten()[0].real)] for name in chosen}
