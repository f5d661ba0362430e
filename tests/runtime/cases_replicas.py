"""What the ranks of ``test_replicas.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from localize import LocalModel, to_local
from localize.runtime import checkpoint, team
from localize.runtime.causes import Stopped
from localize.weights import weights_of
from tests.runtime import helpers
from tests.runtime.cases import Untouchable, digest, made, rank

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
EPOCHS = 3


def without_dropout(method: str, parts: int) -> LocalModel:
    local, _ = made("mixed", method, parts)
    for module in local.to_standard().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return local


def batches(method: str) -> list[Any]:
    """Seven, the last one ragged."""
    return [(inputs.clone(), targets.clone()) for inputs, targets in made("mixed", method, 2)[1]]


def by_hand(method: str, parts: int, replicas: int, data: list[Any]) -> tuple[LocalModel, list[list[float]]]:
    """So many models in one process, a batch each, and the mean of their gradients; the mean losses by epoch."""
    models = [without_dropout(method, parts).train() for _ in range(replicas)]
    optimizers = [model.optimizers(SGD, SGD) for model in models]
    rows = []
    for _ in range(EPOCHS):
        seen: list[Tensor] = []
        for step in range(len(data) // replicas):
            for index, model in enumerate(models):
                for optimizer in optimizers[index]:
                    optimizer.zero_grad()
                losses = model.losses(*data[step * replicas + index])
                sum(losses).backward()  # type: ignore[union-attr]
                seen.append(torch.stack([loss.detach().double() for loss in losses]))
            for same in zip(*(model.parameters() for model in models), strict=True):
                grads = [p.grad for p in same]
                if grads[0] is None:
                    continue
                total = grads[0].clone()
                for grad in grads[1:]:
                    total += grad
                for parameter in same:
                    parameter.grad = total / replicas
            for each in optimizers:
                for optimizer in each:
                    optimizer.step()
        rows.append(torch.stack(seen).mean(0).tolist())
    return models[0], rows


def same_as_by_hand(method: str, parts: int, replicas: int) -> list[Any]:
    """Trains on all ranks, and then by hand; returns what all ranks know."""
    torch.manual_seed(rank())  # the first replica's weights are everyone's
    data, local = batches(method), without_dropout(method, parts)
    if rank() >= parts:
        with torch.no_grad():
            for parameter in local.parameters():
                parameter.add_(1.0)
    reads = rank() % parts == 0
    trainer = helpers.trainer(
        local, executor="distributed", progress=False, optimizer=SGD, head_optimizer=SGD, scheduler=None,
        data_parallel=replicas,
    )  # fmt: skip
    rows = helpers.timeless(trainer.fit(data if reads else Untouchable(), data, epochs=EPOCHS))
    number = rank() % parts
    mine = [local.parts[number], local.heads[number]]
    parameters = {f"{i}.{n}": p.detach() for i, m in enumerate(mine) if m is not None for n, p in m.named_parameters()}
    if rank() == 0:
        expected, losses = by_hand(method, parts, replicas, data)
        found, wanted = weights_of(local), weights_of(expected)
        assert found.keys() == wanted.keys()
        if replicas == 2:
            helpers.assert_same(found, wanted)
        else:  # the order of a sum of three is the transport's
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        for row, loss in zip(rows, losses, strict=True):
            torch.testing.assert_close([x for x in row["train_loss"] if x is not None], [x for x in loss if x])
        scores = helpers.trainer(expected, scheduler=None).evaluate(data)
        expected_loss = {n: score["loss"] for n, score in scores["exits"].items()}
        torch.testing.assert_close(rows[-1]["val_loss"], expected_loss, rtol=0 if replicas == 2 else 1e-5, atol=0)
    return [rows, digest(parameters)]


def goes_on(folder: str, stop: int | None) -> list[Any] | None:
    """Two epochs of three steps, from the last checkpoint on; weights at the end and history, as each rank has them.

    ``stop`` is a step (from 1) at which the last rank fails.
    """
    local, loader = made("mixed", "early_exit", 2)
    path = Path(folder)

    def on_step(step: int, reports: object) -> None:
        if step == stop and rank() == 3:
            raise helpers.Interruption

    trainer = helpers.trainer(
        local, path, executor="distributed", progress=False, gather="all", data_parallel=2, checkpoint_every=2,
        on_step=on_step,
    )  # fmt: skip
    try:
        rows = trainer.fit(loader, epochs=2, resume=checkpoint.any_in(path))
    except (helpers.Interruption, Stopped):
        return None
    snapshot = checkpoint.load(path)
    assert snapshot is not None
    parameters = {name: p.detach() for name, p in local.named_parameters()}
    return [digest(parameters), digest(snapshot.optimizer), helpers.timeless(rows)]


def other_number(folder: str, replicas: int, epochs: int, stop: int | None = None) -> list[Any]:
    """Trains or goes on with so many replicas, a checkpoint every two steps and at the end; steps, or what is wrong."""
    local, loader = made("mixed", "early_exit", 2)
    path = Path(folder)

    def on_step(step: int, reports: object) -> None:
        if step == stop:
            raise helpers.Interruption

    trainer = helpers.trainer(
        local, path, executor="distributed", progress=False, data_parallel=replicas, checkpoint_every=2,
        on_step=on_step,
    )  # fmt: skip
    try:
        rows = trainer.fit(loader, epochs=epochs, resume=checkpoint.any_in(path))
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [row["step"] for row in rows]


class Read(Dataset[Any]):
    """Notes which samples were asked for."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples, self.asked = samples, list[int]()

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.samples[index]


def read(replicas: int) -> list[int]:
    """The samples that this rank has loaded in an epoch."""
    local, loader = made("mixed", "early_exit", 2)
    samples = Read(loader.dataset)
    loader = DataLoader(samples, batch_size=8, shuffle=True)
    helpers.trainer(local, executor="distributed", progress=False, data_parallel=replicas).fit(loader)
    return samples.asked


def warned(unlike: list[int]) -> list[str]:
    """What is logged as a warning where some ranks built other weights: in training, and in evaluation after it."""
    local, loader = made("mixed", "early_exit", 2)
    if rank() in unlike:
        with torch.no_grad():
            for parameter in local.parameters():
                parameter.add_(1.0)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("localize").addHandler(handler)
    trainer = helpers.trainer(local, executor="distributed", progress=False, data_parallel=2)
    trainer.fit(loader)
    trainer.evaluate(loader)
    return said


def drawn(replicas: int) -> list[str]:
    """The dropout masks of the first part in two steps, told apart by a digest."""
    local, loader = made("mixed", "early_exit", 2)
    masks: list[str] = []
    dropout = next(m for m in local.to_standard().modules() if isinstance(m, nn.Dropout))
    original = dropout.forward

    def forward(x: Tensor) -> Tensor:
        if not dropout.training:
            return original(x)
        state = torch.get_rng_state()
        masks.append(digest({"state": state}))
        return original(x)

    dropout.forward = forward  # type: ignore[method-assign]
    helpers.trainer(local, executor="distributed", progress=False, data_parallel=replicas).fit(list(loader)[:4])
    return masks


class Sees(nn.Module):
    """Its buffers change in evaluation, which only the first replica's ranks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("seen", None)
        self.register_buffer("turned", torch.zeros(3, 2))
        self.register_buffer("row", None)
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("gone", torch.ones(3))
        self.register_buffer("complex", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and float(x.detach().sum()) != 123.0:
            self.seen = x.detach().mean(0)
            self.turned = torch.stack([self.seen, self.seen + 1]).t()
            self.row = self.turned[2]
            self.unsaved, self.gone = x.detach()[:, 0].clone(), None
            self.complex = self.seen * 1j
        return self.layer(x) if self.seen is None else self.layer(x) + self.seen


def sees(parts: int) -> tuple[LocalModel, list[Any]]:
    """A model, with its buffers as they are at first, and four batches."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(4)]
    net = nn.Sequential(Sees(), nn.ReLU(), Sees(), nn.Linear(6, 3))
    local = to_local(net, data[0][0], method="early_exit", parts=parts, verify=False)
    for module, fresh in ((m, Sees()) for m in local.to_standard().modules() if isinstance(m, Sees)):
        for name, buffer in fresh._buffers.items():
            setattr(module, name, buffer)
    return local, data


def seen_first() -> list[Any]:
    """Evaluates, then trains: the buffers that each rank had in its first forward pass, and weights at the end."""
    local, data = sees(2)
    trainer = helpers.trainer(local, executor="distributed", progress=False, scheduler=None, data_parallel=2)
    trainer.evaluate(data)
    began: list[list[Any]] = []

    def look(module: nn.Module, given: Any) -> None:
        held = {name: b for name, b in module._buffers.items() if b is not None}
        memory = {name: b.untyped_storage().data_ptr() for name, b in held.items()}
        kinds = {name: [str(b.dtype), list(b.shape), list(b.stride())] for name, b in held.items()}
        began.append([kinds, digest(held), memory["turned"] == memory["row"]])

    mine = next(m for m in local.parts[rank() % 2].modules() if isinstance(m, Sees))
    mine.register_forward_pre_hook(look)
    trainer.fit(data, epochs=1)
    return [began[0], digest({name: p.detach() for name, p in local.parts[rank() % 2].named_parameters()})]


def registered_late(what: str) -> list[str]:
    """The last rank's model has got tensors that the others' has not, or in another order; what fit raises."""
    local, loader = made("mixed", "early_exit", 2)
    modules = [m for m in local.to_standard().modules() if isinstance(m, nn.Linear)]
    modules[0].register_buffer("one", None)
    modules[0].register_buffer("two", torch.ones(1))
    if rank() == 3:
        if what == "order":
            modules[0]._buffers["one"] = modules[0]._buffers.pop("one")
        else:
            for number in range(7):
                modules[-1].register_buffer(f"late{number}", torch.ones(number))
    try:
        helpers.trainer(local, executor="distributed", progress=False, data_parallel=2).fit(loader)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def breaks_at_the_start(what: str) -> list[str]:
    """What one rank cannot make stops all of them."""
    local, loader = made("mixed", "early_exit", 2)

    def broken(*given: Any) -> None:
        raise MemoryError("no room")

    if rank() == 2:
        setattr(team, what, broken)
    try:
        helpers.trainer(local, executor="distributed", progress=False, data_parallel=2).fit(loader)
    except (Exception, MemoryError) as error:
        return [type(error).__name__, str(error)]
    return []
