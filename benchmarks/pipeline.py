"""Step time of parts on ranks of their own, beside their limit and beside what else trains a model in parts.

    python benchmarks/pipeline.py                                  ResNet-18 (CIFAR stem), batch 64, two ranks
    python benchmarks/pipeline.py --model tiny --steps 6 --rounds 2

One interleaved run: each round takes all variants one after another, a thread a process, and the table shows medians
over rounds. `limit` is the slower part alone: its forward pass, head, backward pass and update, on a batch that is
there already, while the other ranks do the same with theirs. `naive` is `bp` on the same ranks: one part works at
a time. `GPipe` and `1F1B` are torch.distributed.pipelining on parts of the same model, cut for `bp`, with m
micro-batches. `threads` is one process with all parts of the SCPL model and as many threads as there are ranks. With
`--own-microbatches`, SCPL and bp also run in our stages with micro-batches. Freed memory is kept by all processes, as
`localize train` has it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from localize import LocalModel, Trainer, to_local
from localize.part import Part, advance
from localize.runtime.allocator import keep_freed_memory
from localize.runtime.messages import Upward
from localize.runtime.ranks import join
from localize.runtime.sequential import run_batch, stages_of
from localize.runtime.update import OptimizerSteps

CLASSES = 10
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
GOALS = {"limit / localize": 0.97, "naive / localize": 1.9, "best TDP / localize": 1.4, "threads / localize": 1.0}


def build(options: argparse.Namespace) -> nn.Module:
    """ResNet-18 with the stem for 32×32 images, or something small."""
    torch.manual_seed(0)
    if options.model == "resnet18":
        model = torchvision.models.resnet18(num_classes=CLASSES)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )


def converted(options: argparse.Namespace, method: str) -> LocalModel:
    """Cut by the first rank's measurements where costs are measured."""
    # As many samples as in training: caches make small batches cost otherwise, layer by layer.
    model, example = build(options), torch.randn(options.batch_size, 3, 32, 32)
    cuts: list[Any] = [options.cuts.split(",") if options.cuts else None]
    if cuts[0] is None:
        if dist.get_rank() == 0:
            trial = to_local(model, example, method=method, parts=options.ranks, balance=options.balance)
            cuts[0] = list(trial.plan.cuts)
        dist.broadcast_object_list(cuts)
        options.cuts = ",".join(cuts[0])  # the same for all variants
    torch.manual_seed(1)
    return to_local(model, example, method=method, cuts=cuts[0], balance="flops", verify=False)


# ------------------------------------------------------------------ variants


def fitted(local: LocalModel, batches: list[Any], executor: str, micro: int = 1) -> float:
    """Seconds a step of ``Trainer.fit``, the first quarter of the steps left out."""
    times: list[float] = []
    trainer = Trainer(
        local, optimizer=SGD, executor=executor, progress=False, gather="none",
        on_step=lambda step, reports: times.append(time.perf_counter()), microbatches=micro,
    )  # fmt: skip
    trainer.fit(batches)
    return per_step(times)


def per_step(times: Sequence[float]) -> float:
    skipped = len(times) // 4
    return (times[-1] - times[skipped]) / (len(times) - 1 - skipped)


class _Nowhere:
    """Where a part alone sends to."""

    def send(self, to: Any, message: Any) -> None:
        return None

    def receive(self, source: Any) -> Any:
        raise AssertionError("a part alone waits for nobody")


def part_alone(local: LocalModel, number: int, batches: list[Any]) -> Callable[[], float]:
    """Seconds a step of one part without any others."""
    x, y = batches[0]
    local.train()
    streams = [local.signature.stream((x,), {})]
    with torch.no_grad():
        for part in list(local.parts)[: number - 1]:
            streams.append({k: v.detach() for k, v in advance(part, streams[-1])[1].items()})
    stage = stages_of(local)[number - 1]
    owned = [p for m in (stage.part, stage.head) if m is not None for p in m.parameters() if p.requires_grad]
    updater = OptimizerSteps([stage], [SGD(owned)], on_nonfinite="raise")

    def measure() -> float:
        times = []
        for _ in batches:
            updater.start()
            run_batch([stage], [Upward(streams[-1], y)], updater, outside=_Nowhere())
            updater.finish()
            times.append(time.perf_counter())
        return per_step(times)

    return measure


class Piece(nn.Module):
    """A part as torch.distributed.pipelining wants it: tensors in, tensors out."""

    def __init__(self, part: Part, takes: list[str], last: bool) -> None:
        super().__init__()
        self.part, self.takes, self.last = part, takes, last

    def forward(self, *values: Tensor) -> Any:
        result, above = advance(self.part, dict(zip(self.takes, values, strict=True)))
        return result if self.last else tuple(above[name] for name in sorted(above))


def pipelined(options: argparse.Namespace, kind: Any, micro: int, batches: list[Any]) -> Callable[[], float]:
    """Seconds a step of a schedule of torch.distributed.pipelining."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local = converted(options, "bp").train()
    small = batches[0][0][: options.batch_size // micro]
    stream = local.signature.stream((small,), {})
    with torch.no_grad():
        for part in list(local.parts)[:rank]:
            _, stream = advance(part, stream)
    names = sorted(stream)
    piece = Piece(local.parts[rank], names, rank == ranks - 1)
    inputs = tuple(stream[name].detach().requires_grad_(rank > 0) for name in names)
    outputs = piece(*inputs)  # from these the stage learns shapes, and which gradients travel
    stage = PipelineStage(piece, rank, ranks, torch.device("cpu"), input_args=inputs, output_args=outputs)
    schedule = kind(stage, n_microbatches=micro, loss_fn=F.cross_entropy)
    optimizer = SGD(piece.parameters())

    def measure() -> float:
        times = []
        for x, y in batches:
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(**({"target": y, "losses": []} if rank == ranks - 1 else {}))
            optimizer.step()
            times.append(time.perf_counter())
        return per_step(times)

    return measure


def variants(options: argparse.Namespace, batches: list[Any]) -> dict[str, Callable[[], float | None]]:
    """What every rank calls, by name; a number where it counts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    last = rank == ranks - 1

    def threads() -> float | None:
        if rank:
            return None
        torch.set_num_threads(ranks)
        try:
            return fitted(alone, batches, "sequential")
        finally:
            torch.set_num_threads(1)

    def distributed(local: LocalModel, micro: int = 1) -> float | None:
        # Steps end on the last rank; the others are ahead of it by what is on its way.
        seconds = fitted(local, batches, "distributed", micro)
        return seconds if last else None

    alone = converted(options, options.method)
    found: dict[str, Callable[[], float | None]] = {
        "limit": part_alone(converted(options, options.method), rank + 1, batches),
        "localize": partial(distributed, converted(options, options.method)),
        "naive": partial(distributed, converted(options, "bp")),
        "threads": threads,
    }
    for kind, name in ((ScheduleGPipe, "GPipe"), (Schedule1F1B, "1F1B")):
        for micro in options.microbatches:
            found[f"{name}, m={micro}"] = pipelined(options, kind, micro, batches)
    for micro in options.own_microbatches:
        for method in (options.method, "bp"):
            found[f"our {method}, {micro} pieces"] = partial(distributed, converted(options, method), micro)
    return found


# ------------------------------------------------------------------ the run


def measure(options: argparse.Namespace) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    keep_freed_memory()
    join()
    generator = torch.Generator().manual_seed(2)
    batches = [
        (
            torch.randn(options.batch_size, 3, 32, 32, generator=generator),
            torch.randint(0, CLASSES, (options.batch_size,), generator=generator),
        )
        for _ in range(options.steps)
    ]
    rounds: dict[str, list[float]] = {}
    alone: list[list[float]] = []  # each part, by round
    for name, variant in (chosen := variants(options, batches)).items():
        dist.barrier()
        variant()  # warm
        rounds[name] = []
    for _ in range(options.rounds):
        for name, variant in chosen.items():
            dist.barrier()
            seconds = variant()
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, seconds)
            rounds[name].append(max(s for s in everyone if s is not None))
            if name == "limit":
                alone.append(everyone)
    if dist.get_rank() == 0:
        report(options, rounds, alone)
    dist.destroy_process_group()


def report(options: argparse.Namespace, rounds: dict[str, list[float]], alone: list[list[float]]) -> None:
    middle = {name: statistics.median(values) for name, values in rounds.items()}
    print(f"{options.model}, batch {options.batch_size}, {options.method} on {options.ranks} ranks, one thread each; "
          f"{options.rounds} rounds of {options.steps} steps")  # fmt: skip
    each = ", ".join(f"{statistics.median(part) * 1e3:.1f}" for part in zip(*alone, strict=True))
    print(f"Cut after {options.cuts}; the parts alone take {each} ms.")
    print("\n| variant | ms a step | fastest and slowest round |\n|---|---|---|")
    for name, values in rounds.items():
        print(f"| {name} | {middle[name] * 1e3:.1f} | {min(values) * 1e3:.1f}–{max(values) * 1e3:.1f} |")
    pipelines = [n for n in middle if "m=" in n]
    best = min(pipelines, key=lambda n: middle[n]) if pipelines else "naive"
    over = {
        "limit / localize": "limit", "naive / localize": "naive", "best TDP / localize": best,
        "threads / localize": "threads",
    }  # fmt: skip
    print("\n| ratio | goal | median of rounds |\n|---|---|---|")
    for label, name in over.items():
        ratio = statistics.median(a / b for a, b in zip(rounds[name], rounds["localize"], strict=True))
        print(f"| {label}{f' ({best})' if 'TDP' in label else ''} | {GOALS[label]:.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["resnet18", "tiny"], default="resnet18")
    parser.add_argument("--method", default="scpl")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--balance", default="time", help="what the parts are balanced by")
    parser.add_argument("--cuts", help="names to cut after, with commas, for all variants")
    parser.add_argument("--microbatches", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--own-microbatches", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=12, help="a round")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        sys.exit(subprocess.run([*torchrun, str(arguments.ranks), *sys.argv]).returncode)
