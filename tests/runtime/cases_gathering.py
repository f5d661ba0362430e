"""What the ranks of ``test_gathering.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localize import LocalModel, to_local
from localize.heads.scpl import SCPL
from localize.weights import weights_of
from tests.runtime import helpers
from tests.runtime.cases import digest, rank

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS, EPOCHS, CLASSES = 3, 3, 4
LAST = "6."  # the classifier


def made(parts: int, across: bool, projector: str = "mlp") -> LocalModel:
    """Without batch norm and dropout, which would see the batches one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, CLASSES)
    ).double()
    method = SCPL(hidden=16, projection=8, projector=projector, across_replicas=across)
    return to_local(model, torch.randn(4, 5, dtype=torch.float64), method=method, parts=parts, verify=False)


def batches(sizes: list[int]) -> list[list[tuple[Tensor, Tensor]]]:
    """By step, the batch of each replica."""
    g = torch.Generator().manual_seed(5)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, 5, generator=g).double(), torch.randint(CLASSES, (size,), generator=g)

    return [[batch(sizes[(i + step) % len(sizes)]) for i in range(len(sizes))] for step in range(STEPS)]


def train(local: LocalModel, data: list[Any], **options: Any) -> list[dict[str, Any]]:
    trainer = helpers.trainer(local, optimizer=SGD, head_optimizer=SGD, scheduler=None, progress=False, **options)
    return helpers.timeless(trainer.fit(data, epochs=EPOCHS))


def own(local: LocalModel, number: int) -> str:
    """A digest of the parameters of a part and its head."""
    mine = [local.parts[number], local.heads[number]]
    return digest(
        {f"{i}.{n}": p.detach() for i, m in enumerate(mine) if m is not None for n, p in m.named_parameters()}
    )


def like_one_batch(parts: int, sizes: list[int], projector: str = "mlp", **options: Any) -> list[Any]:
    """Trains on all ranks, and in one process with the batches of each step as one; returns what all ranks know.

    The classifier's loss is a mean of batches, which is that of the whole only where they are of one size.
    """
    replicas, data = len(sizes), batches(sizes)
    local = made(parts, across=True, projector=projector)
    flat = [b for step in data for b in step]
    rows = train(local, flat, executor="distributed", data_parallel=replicas, **options)
    if rank() == 0:
        one = made(parts, across=True, projector=projector)
        expected = train(one, [tuple(map(torch.cat, zip(*step, strict=True))) for step in data])
        found, wanted = weights_of(local), weights_of(one)
        alike = len(set(sizes)) == 1
        for name, values in wanted.items():
            if alike or not name.startswith(LAST):
                torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-14)
        for row, other in zip(rows, expected, strict=True):
            last = parts if alike else parts - 1
            torch.testing.assert_close(row["train_loss"][:last], other["train_loss"][:last], rtol=1e-10, atol=0)
        before = weights_of(made(parts, across=True, projector=projector))
        assert not any(torch.equal(found[name], before[name]) for name in found)  # all of them were trained
        apart = made(parts, across=False, projector=projector)
        train(apart, flat)
        assert not torch.allclose(weights_of(apart)["0.weight"], found["0.weight"], rtol=1e-4)
    return [rows, own(local, rank() % parts)]


def alone(across: bool) -> list[Any]:
    """Two ranks with a part each, and no replicas."""
    local = made(2, across)
    rows = train(local, [b for step in batches([6]) for b in step], executor="distributed")
    return [rows, own(local, rank())]


def skips(where: int) -> list[Any]:
    """One replica's batch is not finite at the second step: no part of any replica follows it."""
    local, data = made(2, across=True), batches([6, 6])
    data[1][where][0][3] = torch.nan
    rows = train(
        local, [b for step in data for b in step], executor="distributed", data_parallel=2, on_nonfinite="skip"
    )
    return [rows[-1]["skipped"], [x == x for x in rows[-1]["train_loss"]], own(local, rank() % 2)]


class Trap(torch.autograd.Function):
    """Does something to this process on the way forward, or on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, how: str, back: bool) -> Tensor:
        ctx.how, ctx.back = how, back
        if not back:
            harm(how)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.back:
            harm(ctx.how)
        return grad, None, None


def harm(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise helpers.Interruption("something broke")


def broken(parts: int, replicas: int, on: int, how: str, back: bool, busy: int | None = None) -> dict[str, str] | None:
    """Rank ``on`` fails at its second step: in its head, between two waits for the other replicas.

    ``busy`` is a rank that computes for long at that moment.
    """
    local, data = made(parts, across=True), batches([6] * replicas)
    head = local.heads[rank() % parts]
    assert head is not None
    original, steps = head.forward, 0

    def forward(hidden: Tensor, target: Tensor) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2 and rank() == busy:
            time.sleep(8)
        if steps == 2 and rank() == on and not back:
            hidden = Trap.apply(hidden, how, back)
        made = original(hidden, target)
        if steps == 2 and rank() == on and back:
            made.loss = Trap.apply(made.loss, how, back)
        return made

    head.forward = forward  # type: ignore[method-assign]
    try:
        train(local, [b for step in data for b in step], executor="distributed", data_parallel=replicas)
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return None
