"""Processor seconds and memory that conversion takes on deep graphs, phase by phase, on one thread.

    python benchmarks/planning.py [--nodes 1000 3000] [--models residual dense]

*capture* records the model in both modes, *profile* runs the graphs without data, *cuts* finds where one may cut.
*plan* is what depends on what is asked for (method, balance, K): costs of heads, of every possible part, and the best
partition; its largest and mean time over all of them are shown. *split* and *verify* are those of K = 4. Memory is
what Python objects took at the peak of each phase (tracemalloc), taken in a run of its own.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from localize.convert.plan import Planner
from localize.convert.record import trace
from localize.convert.split import split
from localize.convert.verify import verify
from localize.heads.registry import resolve_method

PARTS = (2, 4, 8, 16)
METHODS = ("bp", "scpl", "al")
BALANCES = ("flops", "activations", "memory", "params")
COLUMNS = ("capture", "profile", "cuts", "plan, mean", "plan, max", "split", "verify")


class Residual(nn.Module):
    """``blocks`` blocks of two convolutions with a skip: 7 nodes each."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[self.Block(8) for _ in range(nodes // 7)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Dense(nn.Module):
    """Every layer reads all earlier ones of its group of 40: 4 nodes each, and up to 40 tensors cross."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        self.joins = nn.ModuleList()
        for _ in range(max(1, nodes // 160)):
            self.groups.append(nn.ModuleList([nn.Linear(16 + 4 * i, 4) for i in range(40)]))
            self.joins.append(nn.Linear(16 + 4 * 40, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layers, join in zip(self.groups, self.joins, strict=True):
            found = [x]
            for layer in layers:
                found.append(torch.relu(layer(torch.cat(found, 1))) * 0.5)
            x = join(torch.cat(found, 1))
        return self.head(x)


class Mlp(nn.Module):
    """A plain chain: 2 nodes a layer, as many places to cut as can be."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(nodes // 2)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "dense": (Dense, (2, 16)),
    "mlp": (Mlp, (2, 16)),
}


class Phases:
    """Processor seconds of named pieces of work, and the memory that one conversion took."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self.seconds: dict[str, list[float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        self.seconds.setdefault(name, []).append(time.process_time() - start)
        return result


def measure(kind: str, nodes: int) -> tuple[Phases, int, int]:
    """The phases of one model; how many nodes and cut points it has."""
    build, shape = MODELS[kind]
    model, x = build(nodes), torch.randn(shape)
    phases = Phases()
    traced = phases.run("capture", lambda: trace(model, (x,), {}))
    first = phases.run("profile", lambda: Planner(traced, resolve_method("bp"), "flops"))
    points = phases.run("cuts", lambda: (first.cut_points, first.classifier))[0][True]
    planned = first.choose(4, None, None)
    pieces = phases.run("split", lambda: split(traced, planned.cuts))
    phases.run("verify", lambda: verify(model, pieces, traced.signature, traced.example, traced.reassigned))
    phases.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    for method in METHODS:
        for balance in BALANCES:
            for parts in PARTS:
                planner = of_another(first, method, balance)
                phases.run("plan", lambda p=planner, k=parts: p.choose(k, None, None))
    return phases, len(traced.train_graph.nodes), len(points)


def of_another(planner: Planner, method: str, balance: str) -> Planner:
    """A planner of the same captured model that has its profile and cut points, but no costs of heads."""
    found = copy.copy(planner)
    found.method, found.balance = resolve_method(method), balance
    for name in ("head_costs", "logits", "every_cut"):
        found.__dict__.pop(name, None)
    return found


def row(kind: str, nodes: int) -> str:
    """One line of the table."""
    measure(kind, 50)  # imports and first calls
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    phases, found, points = measure(kind, nodes)
    cells = []
    for column in COLUMNS:
        name, _, which = column.partition(", ")
        values = phases.seconds[name]
        cells.append(f"{max(values) if which == 'max' else sum(values) / len(values):.2f}")
    return f"| {kind} | {found} | {points} | {' | '.join(cells)} | {phases.megabytes - before:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="*", default=[1000, 3000])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--here", action="store_true", help="no processes of their own, no header")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.here:
        for kind in options.models:
            for nodes in options.nodes:
                print(row(kind, nodes), flush=True)
        return
    print(f"| model | nodes | cut points | {' | '.join(f'{column}, s' for column in COLUMNS)} | MB |")
    print("|---" * (len(COLUMNS) + 4) + "|", flush=True)
    for kind in options.models:
        for nodes in options.nodes:
            command = [sys.executable, __file__, "--here", "--models", kind, "--nodes", str(nodes)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
