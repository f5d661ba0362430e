"""Hogwild: parts that never wait for gradients, and get stale ones. What ``benchmarks/hogwild.py`` trains with.

Part k of K goes K - k batches ahead, then does one forward pass, one backward pass and one update after the other
(``runtime.schedule``, order ``hogwild``):

    tick       1      2      3      4      5     three parts; F3 forward pass of batch 3,
    part 1    F1     F2    F3 B1  F4 B2  F5 B3   B1 backward pass of batch 1, and its update
    part 2           F1    F2 B1  F3 B2  F4 B3
    part 3                 F1 B1  F2 B2  F3 B3

A gradient is that of the weights and activations of its batch's forward pass: each forward pass keeps a copy of the
weights that its backward pass will read (PipeDream calls that weight stashing). It is applied to weights that K - k
updates have changed since. All passes are those of the library's stages (``runtime.step``).
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from localize import LocalModel
from localize.heads.base import Target
from localize.runtime import batches as loaders
from localize.runtime import seeding, step
from localize.runtime.messages import Receive, Relay, Send, Side, Upward
from localize.runtime.schedule import schedule_problems
from localize.runtime.seeding import Seeded
from localize.runtime.sequential import stages_of
from localize.runtime.stage import Stage
from localize.runtime.update import OptimizerSteps
from localize.signature import Call

Message = Upward | Relay
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Scope = Callable[[Stage, int, int], Seeded]  # of a stage, a batch (from 0, over all runs) and a piece, see ``step``
END = Upward({}, None)  # goes up after the last batch


class Stash:
    """Gives backward passes the weights and buffers that their forward pass saw, whatever has become of them.

    ``torch.autograd.graph.allow_mutation_on_saved_tensors`` does, too, but looks at every single operation and keeps
    a record of all versions. Activation checkpoints inside a part compute with the new weights, here as there.
    """

    def __init__(self, module: nn.Module) -> None:
        held = itertools.chain(module.parameters(), module.buffers())
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in held} - {0}

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Around one forward pass: the copies live as long as its graph."""
        copies: dict[tuple[Any, ...], Tensor] = {}

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            kept, storage = tensor.detach(), tensor.untyped_storage().data_ptr()  # detached: the graph may have made it
            if storage in self._storages:
                key = (storage, kept.storage_offset(), kept.shape, kept.stride(), kept.dtype)
                kept = copies[key] if key in copies else copies.setdefault(key, kept.clone())
            return kept, kept._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            kept, version = packed
            if kept._version != version:
                raise RuntimeError(f"A value {tuple(kept.shape)} was changed in place between forward and backward.")
            return kept

        with saved_tensors_hooks(pack, unpack):
            yield


class Learner:
    """One part: forward passes ahead of gradients, and an update after each backward pass.

    Attributes:
        losses: of each batch, in order; empty for a part without a loss.
        most: how many batches were between forward and backward pass at the most.
    """

    def __init__(self, stage: Stage, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None, every: int):
        weights = [*stage.parameters("part"), *stage.parameters("head")]
        self.stage, self.every, self.stash = stage, every, Stash(stage.part)
        self.optimizers = [optimizer(weights)] if weights else []
        self.schedulers = [scheduler(each) for each in self.optimizers] if scheduler else []
        self.updater = OptimizerSteps([stage], self.optimizers)
        self.pending: deque[tuple[step.Work, Target]] = deque()
        self.losses: list[Tensor] = []
        self.forwards = self.updates = self.most = 0

    def ticks(self, scope: Scope) -> Generator[Send | Receive, Message | None]:
        """All batches, until END comes from below."""
        ahead, ended = self.stage.parts - self.stage.number, False
        while not ended or self.pending:
            if not ended:
                arrived = yield Receive(Side.BELOW)
                assert isinstance(arrived, Upward)
                ended = not arrived.stream
                upward = END if ended else self._forward(arrived, scope)
                if not self.stage.is_last:
                    yield Send(Side.ABOVE, upward)
                del arrived, upward
            if self.pending and (ended or len(self.pending) > ahead):
                yield from self._learn(*self.pending.popleft(), scope)

    def _forward(self, arrived: Upward, scope: Scope) -> Upward:
        with scope(self.stage, self.forwards, 0), self.stash.keeping():
            work = step.forward(self.stage, arrived.stream)
        self.pending.append((work, arrived.target))
        self.forwards, self.most = self.forwards + 1, max(self.most, len(self.pending))
        return step.departing([work], 0, arrived.target)

    def _learn(self, work: step.Work, target: Target, scope: Scope) -> Generator[Send | Receive, Message | None]:
        stage, (flow,) = self.stage, self.stage.flows
        with scope(stage, self.updates, step.HEAD):
            lesson = step.attend(stage, [work], target)
        if lesson.made is not None:
            self.losses.append(lesson.made.loss.detach())
        self.updater.start()
        self.updater.begin(stage, None)
        own = step.learn_head(stage, lesson)
        relayed = (yield Receive(Side.ABOVE)) if flow.from_above else Relay({})
        assert isinstance(relayed, Relay)
        passed = step.pull(stage, work, relayed.grads, own, flow)
        if flow.down is not None:
            yield Send(Side.BELOW, Relay(passed))
        self.updater.ready(stage, "part")
        self.updater.ready(stage, "head")
        self.updates += 1
        if self.every and self.updates % self.every == 0:
            for scheduler in self.schedulers:
                scheduler.step()


class Here:
    """One direction of a boundary, between parts of this process. ``ready``: one may take, and wait if need be."""

    ready = property(lambda self: bool(self.messages))

    def __init__(self) -> None:
        self.messages: deque[Any] = deque()

    def put(self, message: Any) -> None:
        self.messages.append(message)

    def take(self) -> Message:
        return self.messages.popleft()  # type: ignore[no-any-return]

    def close(self) -> None:
        """After the last message."""


class Feed(Here):
    """What the first part is given: a new batch whenever it asks."""

    ready = True

    def __init__(self, upward: Iterator[Upward]) -> None:
        self.upward = upward

    def take(self) -> Message:
        return next(self.upward, END)


class There(Here):
    """To or from the process of a neighbour; only who receives waits."""

    ready = True

    def __init__(self, rank: int, window: int) -> None:
        super().__init__()  # ``messages`` are those under way, in two pieces each
        self.rank, self.window = rank, window

    def put(self, message: Any) -> None:
        file = io.BytesIO()
        torch.save(message.grads if isinstance(message, Relay) else (message.stream, message.target), file)
        content = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        for tensor in (torch.tensor([len(content)]), content):
            self.messages.append((dist.isend(tensor, self.rank), tensor))
        while len(self.messages) > 2 * self.window:  # no part is that far ahead: this one has arrived
            self.messages.popleft()[0].wait()

    def take(self) -> Message:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, self.rank)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(content, self.rank)
        found = torch.load(io.BytesIO(bytes(content.numpy())), weights_only=True)
        return Upward(*found) if isinstance(found, tuple) else Relay(found)

    def close(self) -> None:
        while self.messages:
            self.messages.popleft()[0].wait()


class Hogwild:
    """Trains a conversion that has one backward pass a part (``bp``, ``joint``) with stale gradients, on the CPU.

    In a process group, part k is trained by rank k - 1, and only the first rank reads batches; ``fit`` is called by
    all, and all have all weights afterwards. The same bits come out wherever the parts are.

    Args:
        local: the conversion.
        optimizer: makes an optimizer from parameters.
        scheduler: makes a learning-rate schedule from an optimizer; each part steps its own after every ``every``
            updates of its own.
        seed: of dropout, which is drawn as ``Trainer`` draws it.

    Raises:
        ValueError: the method learns otherwise, or there are not as many ranks as parts.
    """

    def __init__(
        self,
        local: LocalModel,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        every: int = 0,
        seed: int = 0,
    ) -> None:
        self.local, self.seed, self.rank = local, seed, dist.get_rank() if dist.is_initialized() else None
        problems = schedule_problems(local.method, len(local.parts), 1, 1, "hogwild")
        if self.rank is not None and dist.get_world_size() != len(local.parts):
            problems.append(f"{dist.get_world_size()} ranks for {len(local.parts)} parts: there must be as many.")
        if problems:
            raise ValueError(" ".join(problems))
        own = [stage for stage in stages_of(local) if self.rank in (None, stage.number - 1)]
        self.learners = [Learner(stage, optimizer, scheduler, every) for stage in own]
        self._generators = seeding.generators()

    def fit(self, batches: Iterable[Any]) -> list[float]:
        """All batches once, then what is still under way; the last part's loss of each.

        To go through a data set several times without a pause, chain its batches.
        """
        self.local.train()
        channels, before = self._channels(batches), len(self.learners[-1].losses)
        ticks = {learner.stage.number: learner.ticks(self._scope) for learner in self.learners}
        wishes = {number: next(steps) for number, steps in ticks.items()}
        while wishes:  # the lowest part that can go on goes on
            number = next(n for n in wishes if isinstance(wishes[n], Send) or channels[_way(n, wishes[n])].ready)
            wish, answer, channel = wishes[number], None, channels[_way(number, wishes[number])]
            if isinstance(wish, Send):
                channel.put(wish.message)
            else:
                answer = channel.take()
            try:
                wishes[number] = ticks[number].send(answer)
            except StopIteration:
                del wishes[number]
        for channel in channels.values():
            channel.close()
        return self._shared([float(loss) for loss in self.learners[-1].losses[before:]])

    def _channels(self, batches: Iterable[Any]) -> dict[tuple[int, Side], Here]:
        """By the part below the boundary (0: the data) and the direction."""
        channels: dict[tuple[int, Side], Here] = {(0, Side.ABOVE): Feed(self._upward(batches))}
        here, parts = {learner.stage.number for learner in self.learners}, len(self.local.parts)
        for lower, way in itertools.product(range(1, parts), Side):
            elsewhere = {lower, lower + 1} - here
            channels[lower, way] = There(min(elsewhere) - 1, parts + 1) if elsewhere else Here()
        return channels

    def _upward(self, batches: Iterable[Any]) -> Iterator[Upward]:
        for inputs, target in loaders.pairs(batches, loaders.split_batch):
            call = Call.of(inputs)
            yield Upward(self.local.signature.stream(call.args, call.kwargs), target)

    def _scope(self, stage: Stage, number: int, piece: int) -> Seeded:
        return Seeded(self._generators, seeding.derive(self.seed, stage.number, number, piece))

    def _shared(self, losses: list[float]) -> list[float]:
        """Gives every rank all weights and buffers, and the last one's losses."""
        if self.rank is None:
            return losses
        for rank, pair in enumerate(zip(self.local.parts, self.local.heads, strict=True)):
            for module in filter(None, pair):
                for tensor in itertools.chain(module.parameters(), module.buffers()):
                    dist.broadcast(tensor.detach(), rank)
        box = [losses]
        dist.broadcast_object_list(box, len(self.local.parts) - 1)
        return box[0]


def _way(number: int, wish: Send | Receive) -> tuple[int, Side]:
    """What a part's wish is about: the part below the boundary, and the direction."""
    side = wish.to if isinstance(wish, Send) else wish.source
    way = side if isinstance(wish, Send) else Side(-side.value)
    return (number if side is Side.ABOVE else number - 1), way
