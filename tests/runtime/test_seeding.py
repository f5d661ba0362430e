from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler

from localize.runtime import seeding
from tests.runtime.helpers import BATCHES, assert_same, converted, data, loader, model, tensors, trainer

CPU = seeding.generators(torch.device("cpu"))


def test_seeds_are_the_same_everywhere_and_unlike_for_neighbours() -> None:
    assert seeding.derive(0, 1, 2) == 9454204633046300541
    made = {seeding.derive(s, part, step) for s in range(3) for part in range(5) for step in range(50)}
    assert len(made) == 3 * 5 * 50
    assert seeding.derive(1, 11) != seeding.derive(11, 1) != seeding.derive(1, 1, 1)


def test_a_seeded_block_draws_its_own_numbers_and_leaves_the_ambient_ones_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeding.Seeded(CPU, 1):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeding.Seeded(CPU, 1):
        assert torch.equal(torch.rand(3), inside)


def test_the_ambient_numbers_come_back_after_an_error() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError), seeding.Seeded(CPU, 1):
        torch.rand(1)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_seeds_torch_python_and_numpy_and_puts_them_back() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(numpy.random.rand())

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    outside = draw()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    drawn = []
    for epoch in (0, 1, 0):
        with seeding.ambient(CPU, 4, epoch):
            drawn.append(draw())
    assert draw() == outside
    assert drawn[0] == drawn[2] != drawn[1]


class EpochOrder(Sampler[int]):
    """As DistributedSampler: a new order an epoch, if somebody says which epoch it is."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(22, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def test_loaders_with_an_order_of_their_own_are_put_at_the_epoch() -> None:
    shuffled = DataLoader(data(), batch_size=6, sampler=EpochOrder())
    with_generator = DataLoader(
        data(), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(2)
    )
    sampler = RandomSampler(data(), generator=torch.Generator())
    batched = DataLoader(data(), batch_sampler=torch.utils.data.BatchSampler(sampler, 6, False))
    for each in (shuffled, with_generator, batched):
        orders = []
        for epoch in (0, 1, 0):
            seeding.aim(each, 3, epoch)
            orders.append(torch.cat([target for _, target in each]).tolist())
        assert orders[0] == orders[2] != orders[1]


def masks(seed: int, noise: bool = False, **options: Any) -> list[tuple[int, Tensor]]:
    """What each dropout of the model drops, in the order of the calls, with the number of its part."""
    local = converted(**options)
    seen: list[tuple[int, Tensor]] = []
    for number, part in enumerate(local.parts, 1):
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(
                    lambda m, args, out, number=number: seen.append((number, out == 0))
                )
                module.register_forward_pre_hook(lambda m, args: (torch.ones_like(args[0]),))
    draw = (lambda step, reports: torch.rand(step)) if noise else None
    trainer(local, seed=seed, on_step=draw).fit(loader(shuffle=False), epochs=1)
    return seen


def test_dropout_masks_are_functions_of_seed_part_and_step() -> None:
    seen = masks(seed=3)
    assert len(seen) == 3 * BATCHES
    for step, samples in enumerate([6, 6, 6, 4]):
        in_step = seen[3 * step : 3 * step + 3]
        for part in {number for number, _ in in_step}:
            with seeding.Seeded(CPU, seeding.derive(3, part, step, 0, 0)):  # replica 0, piece 0
                for mask in (mask for number, mask in in_step if number == part):
                    assert torch.equal(mask, F.dropout(torch.ones(samples, 12), 0.3) == 0)
    assert len({mask.numpy().tobytes() for _, mask in seen}) == len(seen)


def test_dropout_masks_do_not_depend_on_who_else_draws_numbers() -> None:
    quiet, noisy = masks(seed=3), masks(seed=3, noise=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(quiet, noisy, strict=True))
    other_seed = masks(seed=4)
    assert not any(torch.equal(one, other) for (_, one), (_, other) in zip(quiet, other_seed, strict=True))


def test_training_is_a_function_of_the_seed_and_leaves_the_callers_numbers_alone() -> None:
    results = []
    for start in (1, 2):
        local = converted()
        torch.manual_seed(start)
        before = torch.get_rng_state()
        trainer(local).fit(loader(), loader(), epochs=2)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(tensors(local))
    assert_same(*results)


def test_optimizers_that_draw_numbers_do_not_move_the_data_order() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            torch.rand(17)

    seen = []
    for kind in (torch.optim.SGD, Noisy):
        local = converted()
        trainer(local, optimizer=lambda p, kind=kind: kind(p, lr=0.1)).fit(loader(), epochs=2)
        seen.append(tensors(local))
    assert_same(*seen)


def test_the_helper_model_drops_something() -> None:
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model().modules())
