"""Measured time a batch of parts on ranks of their own, beside what the schedule says it takes.

    python benchmarks/law.py [--ranks 3 4] [--steps 40] [--unit 10]

`simulated` is `runtime.predict` with the times that the jobs of each part took in this very run, medians over
batches: forward (with the packing of what goes up), head (forward and backward), each backward pass that trains and
each that only passes gradients on, update. What a message takes on its way counts nothing, so `measured / simulated`
is 1 where ranks wait for nothing but what the method makes them wait for. `a message` is the time from the end of a
forward pass to the start of the next part's, where that part was idle; the last column counts it, in each direction,
for all but feedback.

`law` is the number of steps a batch in unit costs (forward = backward = 1, all else 0), `steps` the measured time over
the unit: only where each job takes one unit.

    sleep           a part sleeps one unit in its forward pass and one in each backward pass: any number of ranks on
                    any number of cores, since a sleep needs none
    sleep, uneven   the same with other times for each part
    compute         the part multiplies matrices, one thread a rank: where there are more ranks than cores, jobs take
                    longer while others run, and their measured times say so
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localize import LocalModel, Trainer, get_method, to_local
from localize.heads.base import Method
from localize.runtime import step
from localize.runtime.costs import Costs
from localize.runtime.predict import predict
from localize.runtime.ranks import join

WIDTH, CLASSES, BATCH = 16, 4, 8
UNEVEN = ((1.0, 0.5, 1.5, 0.8), (1.0, 2.0, 1.0, 1.6))  # units of forward and backward, by part
METHODS: dict[str, Callable[[], Method]] = {
    "nwise, reach 1": partial(get_method, "nwise", reach=1, head="linear"),
    "nwise, reach 2": partial(get_method, "nwise", reach=2, head="linear"),
    "nwise, reach 3": partial(get_method, "nwise", reach=3, head="linear"),
    "lct": partial(get_method, "lct"),
}


class _Slept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grad, None, None


class Sleep(nn.Module):
    """Takes so many seconds in each direction, and no core."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.times = (forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        return _Slept.apply(x, *self.times)


def converted(variant: str, method: str, options: argparse.Namespace) -> LocalModel:
    """A part a rank."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for i in range(ranks):
        width = options.width if variant == "compute" else WIDTH
        inner: list[nn.Module] = [nn.Linear(width, width), nn.Tanh()]
        if variant == "compute":
            inner *= 2
        else:
            units = (UNEVEN[0][i], UNEVEN[1][i]) if variant == "sleep, uneven" else (1.0, 1.0)
            inner.append(Sleep(*(unit * options.unit / 1e3 for unit in units)))
        if i == ranks - 1:
            inner.append(nn.Linear(width, CLASSES))
        blocks.append(nn.Sequential(*inner))
    cuts = [str(i) for i in range(ranks - 1)]
    return to_local(nn.Sequential(*blocks), example(variant, options)[0], method=METHODS[method](), cuts=cuts)


def example(variant: str, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    width, samples = (options.width, options.batch_size) if variant == "compute" else (WIDTH, BATCH)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, width, generator=generator)
    return inputs, torch.randint(0, CLASSES, (samples,), generator=generator)


# ------------------------------------------------------------------ measuring


class Watch(dict[str, list[float]]):
    """Seconds of each job of this rank's part, by name of its cost."""

    def timed(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.setdefault(name(*arguments), []).append(time.perf_counter() - start)
            return result

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Puts a clock around what a stage does with its head, and in its backward passes."""
        originals = {name: getattr(step, name) for name in ("attend", "learn_head", "pull", "learn_from_feedback")}
        names: dict[str, Callable[..., str]] = {
            "attend": lambda *_: "head",
            "learn_head": lambda *_: "loss",
            "pull": lambda *given: "backward" if given[-1].trains else "relay",
            "learn_from_feedback": lambda *_: "feedback",
        }
        for name, function in originals.items():
            setattr(step, name, self.timed(function, names[name]))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(step, name, function)


def measure(variant: str, method: str, options: argparse.Namespace, trace: Path) -> dict[str, Any] | None:
    """The time a batch, measured and simulated; on the first rank."""
    local = converted(variant, method, options)
    batch, watch = example(variant, options), Watch()
    trainer = Trainer(
        local, optimizer=partial(torch.optim.SGD, lr=1e-3), executor="distributed", progress=False, gather="none",
        trace=trace,
    )  # fmt: skip
    dist.barrier()
    with watch.watching():
        trainer.fit([batch] * options.steps)
    jobs = {name: statistics.median(seconds[len(seconds) // 4 :]) for name, seconds in watch.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, jobs)
    if dist.get_rank():
        return None
    seen = Traced(trace)
    costs = Costs(
        forward=seen.cost("forward"),
        update=seen.cost("update"),
        loss=[own.get("head", 0.0) + own.get("loss", 0.0) for own in everyone],
        **{name: [own.get(name, 0.0) for own in everyone] for name in ("backward", "relay", "feedback")},
    )
    transfers = seen.transfers()
    foreseen = partial(predict, METHODS[method](), parts=len(everyone), batches=8)
    return {
        "measured": seen.step(options.steps // 4),
        "simulated": foreseen(costs, unit="s").step,
        "with messages": foreseen(replace(costs, transfer=transfers), unit="s").step,
        "message": statistics.mean(transfers),
        "law": foreseen(Costs()).step,
    }


class Traced:
    """What a trace says: seconds by part (from 1) and batch (from 1)."""

    def __init__(self, file: Path) -> None:
        self.spent: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.ends: dict[int, dict[int, float]] = defaultdict(dict)  # when a part was done with a batch
        self.forward: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)  # start and end
        for event in json.loads(file.read_text())["traceEvents"]:
            if event["ph"] == "X" and event["cat"] != "wait":
                part, batch, kind = event["tid"], event["args"]["batch"], event["cat"]
                start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
                self.spent[part, kind][batch] += end - start
                self.ends[part][batch] = max(self.ends[part].get(batch, 0.0), end)
                if kind == "forward":
                    self.forward[part][batch] = (start, end)

    def cost(self, kind: str) -> list[float]:
        """Median over batches, by part."""
        return [statistics.median(self.spent[part, kind].values()) for part in sorted(self.ends)]

    def step(self, skipped: int) -> float:
        """The time a batch, after the first ones."""
        last = max(self.ends[1])
        return statistics.mean((each[last] - each[skipped]) / (last - skipped) for each in self.ends.values())

    def transfers(self) -> list[float]:
        """From the end of a forward pass to the start of the next part's, where that one had nothing else to do."""
        found = []
        for part in sorted(self.ends)[1:]:
            waited = [
                self.forward[part][batch][0] - left
                for batch, (_, left) in self.forward[part - 1].items()
                if self.ends[part].get(batch - 1, 0.0) < left
            ]
            found.append(max(0.0, statistics.median(waited)) if waited else 0.0)
        return found


# ------------------------------------------------------------------ the run


def run(options: argparse.Namespace) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    first = join().first
    with tempfile.TemporaryDirectory() as folder:
        for variant in options.variants:
            for method in METHODS:
                found = [measure(variant, method, options, Path(folder) / f"{r}.json") for r in range(options.rounds)]
                if first:
                    row(variant, method, dist.get_world_size(), [each for each in found if each], options)
    dist.destroy_process_group()


def row(variant: str, method: str, ranks: int, found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    middle = {key: statistics.median(each[key] for each in found) * 1e3 for key in found[0]}
    steps = f"{middle['measured'] / options.unit:.2f} | {found[0]['law']:g}" if variant == "sleep" else " | "
    cells = [f"{middle[key]:.2f}" for key in ("measured", "simulated", "message")]
    for key in ("simulated", "with messages"):
        ratios = sorted(each["measured"] / each[key] for each in found)
        cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})")
    print(f"| {variant} | {ranks} | {method} | {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", choices=[2, 3, 4], default=[3, 4])
    parser.add_argument("--variants", nargs="+", default=["sleep", "sleep, uneven", "compute"])
    parser.add_argument("--steps", type=int, default=40, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit", type=float, default=10, help="milliseconds")
    parser.add_argument("--width", type=int, default=768, help="of a matrix, in `compute`")
    parser.add_argument("--batch-size", type=int, default=128, help="in `compute`")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        sys.exit(run(arguments))
    print(f"{os.cpu_count()} cores, a thread a rank; {arguments.rounds} rounds of {arguments.steps} steps\n")
    heads = ["variant", "ranks", "method", "steps a batch", "law", "measured ms", "simulated ms", "a message ms"]
    heads += ["measured / simulated", "the same, simulated with messages"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for count in arguments.ranks:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        subprocess.run([*torchrun, *sys.argv], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
