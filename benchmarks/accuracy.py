"""Every method beside `bp` at an equal, short budget, with two controls that must lose.

    python benchmarks/accuracy.py --data digits --epochs 30 --seeds 3
    python benchmarks/accuracy.py --data fashion-mnist --data-dir DIR --epochs 3 --seeds 2

Same initial weights, batches and optimizer for all methods of a seed, so differences to `bp` are paired. The budget
is fixed beforehand and the last epoch counts: nothing is selected on the test half. Controls:

  frozen    parts 1..K-1 stay at their random initial weights; only the last part learns (early_exit)
  shuffled  the heads of parts 1..K-1 learn labels shuffled within the batch; the last part the true ones (early_exit)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from localize import Trainer, get_method, list_methods, to_local
from localize.data import load_data
from localize.heads.base import Head, HeadOutput, HeadSite
from localize.heads.early_exit import EarlyExit


class Shuffled(Head):
    """A head that is taught by labels of other samples."""

    def __init__(self, head: Head) -> None:
        super().__init__(head.site)
        self.head = head

    def forward(self, hidden: Tensor, target: Tensor) -> HeadOutput:
        return self.head(hidden, target[torch.randperm(len(target))])

    def predictor(self) -> nn.Module | None:
        return self.head.predictor()


@dataclass(frozen=True)
class ShuffledEarly(EarlyExit):
    name: ClassVar[str] = "shuffled"

    def build_head(self, site: HeadSite) -> Head | None:
        head = super().build_head(site)
        return head if site.is_last or head is None else Shuffled(head)


def vgg(classes: int = 10) -> nn.Module:
    """Four blocks of 3×3 convolutions with batch norm, each ending in a pooling: a VGG for 28×28."""
    layers: list[nn.Module] = []
    for block in ((1, 16, 16), (16, 32, 32), (32, 64, 64), (64, 128)):
        convolutions: list[nn.Module] = []
        for inputs, outputs in pairwise(block):
            convolutions += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.Sequential(*convolutions, nn.MaxPool2d(2)))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, classes))


def digits_net(classes: int = 10) -> nn.Module:
    """The same shape for 8×8 images: four blocks, one pooling each but the first."""
    layers: list[nn.Module] = []
    for inputs, outputs, pool in ((1, 16, False), (16, 32, True), (32, 64, True), (64, 64, True)):
        block: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.Sequential(*block, *([nn.MaxPool2d(2)] if pool else [])))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, classes))


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(seed)
    data = load_data(options.data, options.data_dir)
    loader, test = data.loaders(batch_size=options.batch_size, seed=seed)
    model = digits_net() if options.data == "digits" else vgg()
    method = {"frozen": EarlyExit(), "shuffled": ShuffledEarly()}.get(name) or get_method(name)
    local = to_local(model, data.example(), method=method, cuts=["0", "1", "2"])
    if name == "frozen":
        for part, head in list(zip(local.parts, local.heads, strict=True))[:-1]:
            part.requires_grad_(False)
            head.requires_grad_(False)
    trainer = Trainer(
        local,
        optimizer=partial(torch.optim.Adam, lr=options.lr),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=options.epochs),
        seed=seed,
        progress=False,
    )
    start = time.perf_counter()
    trainer.fit(loader, epochs=options.epochs)
    seconds = time.perf_counter() - start
    result = trainer.evaluate(test)
    exits = {number: 100 * entry["accuracy"] for number, entry in result["exits"].items()}
    return {"method": name, "seed": seed, "accuracy": 100 * result["accuracy"], "exits": exits, "seconds": seconds}


def table(rows: list[dict[str, object]]) -> str:
    base = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "bp"}
    lines = [
        "| method | final exit % (mean ± sd) | to bp, paired | exits 1..K (mean) | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        scores = [row["accuracy"] for row in mine]
        differences = [row["accuracy"] - base[row["seed"]] for row in mine if row["seed"] in base]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        exits = [statistics.mean(row["exits"][k] for row in mine) for k in mine[0]["exits"]]
        shown = " / ".join(f"{e:.2f}" for e in exits) if len(exits) > 1 else "–"
        to_bp = f"{statistics.mean(differences):+.2f}" if differences else ""
        seconds = statistics.mean(row["seconds"] for row in mine)
        lines.append(
            f"| {name} | {statistics.mean(scores):.2f} ± {spread:.2f} | {to_bp} | {shown} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--out", type=Path, help="append each result to this file, a JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.methods or [*list_methods(), "frozen", "shuffled"]
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        for name in names:
            rows.append(train(name, seed, options))
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
