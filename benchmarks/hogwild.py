"""Hogwild, stale gradients that nobody waits for, beside methods that wait or send none: what it costs.

    python benchmarks/hogwild.py [--lr 2e-3 3e-2 1e-1] [--epochs 10] [--seeds 3]
    torchrun --nproc-per-node 4 benchmarks/hogwild.py       a part a rank, Hogwild alone: the same figures

Digits, four parts. Same initial weights, batches, optimizer and number of epochs for all methods of a seed; the last
epoch counts. A gradient reaches part k when 4 - k updates have been made since its batch's forward pass (see
``suites/stale.py``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find the others, however this file is started

from benchmarks.accuracy import digits_net
from benchmarks.suites.stale import Hogwild
from localize import Trainer, get_method, to_local
from localize.data import load_data
from localize.heads.base import Method
from localize.runtime import seeding
from localize.runtime.ranks import launched
from localize.runtime.schedule import Order
from localize.runtime.simulate import simulate

METHODS: dict[str, Callable[[], Method]] = {
    "bp": partial(get_method, "bp"),
    "nwise, reach 2": partial(get_method, "nwise", reach=2),
    "early_exit": partial(get_method, "early_exit"),
    "hogwild": partial(get_method, "bp"),
}


def chained(loader: DataLoader[Any], epochs: int, seed: int) -> Iterator[Any]:
    """The batches of all epochs, in the order in which ``Trainer`` with that seed reads them."""
    for epoch in range(epochs):
        with seeding.ambient(seeding.generators(), seed, epoch):
            seeding.aim(loader, seed, epoch)
            yield from loader


def train(name: str, lr: float, seed: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Accuracy on the test half (%), loss on the training half, both in the end in eval mode; steps a batch."""
    torch.manual_seed(seed)
    data = load_data("digits")
    loader, test = data.loaders(batch_size=options.batch_size, seed=seed)
    local = to_local(digits_net(), data.example(), method=METHODS[name](), cuts=["0", "1", "2"])
    optimizer = partial(torch.optim.Adam, lr=lr)
    scheduler = partial(CosineAnnealingLR, T_max=options.epochs)
    trainer = Trainer(local, optimizer=optimizer, scheduler=scheduler, seed=seed, progress=False)
    if name == "hogwild":
        learning = Hogwild(local, optimizer, scheduler, every=len(loader), seed=seed)
        learning.fit(chained(loader, options.epochs, seed))
    else:
        trainer.fit(loader, epochs=options.epochs)
    order: Order = "hogwild" if name == "hogwild" else "stage"
    number = options.epochs * len(loader)
    steps = simulate(local.method, parts=len(local.parts), batches=number, order=order).steps / number
    return 100 * trainer.evaluate(test)["accuracy"], trainer.evaluate(loader)["loss"], steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 3e-2, 1e-1], help="of Adam, cosine")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if launched() and not dist.is_initialized():
        dist.init_process_group("gloo")
    alone = not dist.is_initialized()
    lines = ["| method | steps a batch |" + "".join(f" test %, lr {lr:g} | loss |" for lr in options.lr)]
    lines.append("|---|---|" + "---|---|" * len(options.lr))
    for name in METHODS if alone else ["hogwild"]:
        cells = []
        for lr in options.lr:
            found = [train(name, lr, seed, options) for seed in range(options.seeds)]
            scores, losses, steps = map(list, zip(*found, strict=True))
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f" {statistics.mean(scores):.2f} ± {spread:.2f} | {statistics.mean(losses):.4f} |")
        lines.append(f"| {name} | {steps[0]:.2f} |" + "".join(cells))
    if alone or dist.get_rank() == 0:
        print("\n".join(lines))
    if not alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
