"""Bytes that autograd saves at most during one `train_step`, beside the plan's prediction and end-to-end training.

    python benchmarks/memory.py [--model resnet50] [--parts 4] [--batch-size 8] [--size 224]

`predicted` is the plan's largest part with its head. `bp` trains the same model end to end; `bp, checkpointed` is
end to end with activation checkpointing of its top-level blocks, the honest rival: cheaper in memory still where it
is smaller, at the price of a second forward pass.

    python benchmarks/memory.py --ranks 2 [--method scpl] [--model resnet18] [--batch-size 16] [--size 64]

With ranks: what each holds at most in a run with Adam (weights, gradients, optimizer state, saved activations), beside
the same of its part alone in one process, and the bytes of messages that wait to leave or to be taken.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localize import LocalModel, Trainer, get_method, list_methods, to_local
from localize.part import advance
from localize.runtime import links
from localize.runtime.memory import LiveBytes, SavedBytes
from localize.runtime.messages import Upward
from localize.runtime.ranks import join
from localize.runtime.sequential import run_batch, stages_of
from localize.runtime.update import OptimizerSteps
from localize.runtime.wire import encode, room_for
from localize.weights import weights_of


def peak_of_step(local, x, y) -> int:
    optimizers = local.optimizers(lambda p: torch.optim.SGD(p, lr=1e-3))
    with SavedBytes(exclude=[*local.parameters(), *local.buffers()]) as saved:
        local.train_step(x, y, optimizers, keep_grads=False)
    return saved.peak_bytes


def peak_checkpointed(model: nn.Module, x, y) -> int:
    """Each bottleneck block recomputed in the backward pass."""
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            inner = block.forward
            block.forward = lambda h, inner=inner: checkpoint(inner, h, use_reentrant=False)
    with SavedBytes(exclude=[*model.parameters(), *model.buffers()]) as saved:
        nn.functional.cross_entropy(model(x), y).backward()
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            del block.forward
    return saved.peak_bytes


# ------------------------------------------------------------------ on several ranks


class _Nowhere:
    """Where a part alone sends to."""

    def send(self, to: Any, message: Any) -> None:
        return None

    def receive(self, source: Any) -> Any:
        raise AssertionError("a part alone waits for nobody; take a method whose losses stay in their parts")


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    return sum(t.nbytes for o in optimizers for state in o.state.values() for t in state.values())


def of_rank(options: argparse.Namespace, build: Callable[[], LocalModel], x: Tensor, y: Tensor) -> dict[str, int]:
    """Bytes that this rank holds at most while it trains, by kind; see ``links.py`` for ``messages``."""
    optimizers: list[torch.optim.Optimizer] = []
    waiting, gradients = LiveBytes(), [0]
    links.encode = lambda envelope: tuple(f if f is None else waiting.add(f) for f in encode(envelope))
    links.room_for = lambda header: waiting.add(room_for(header))

    def factory(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.Adam(parameters))
        return optimizers[-1]

    def look(step: int, reports: object) -> None:
        gradients.append(sum(p.grad.nbytes for p in local.parameters() if p.grad is not None))

    local = build()
    trainer = Trainer(
        local, optimizer=factory, head_optimizer=factory, executor="distributed", gather="none", progress=False,
        on_step=look,
    )  # fmt: skip
    with SavedBytes(exclude=[*local.parameters(), *local.buffers()]) as saved:
        trainer.fit([(x, y)] * options.steps)
    weights = sum(t.nbytes for t in weights_of(local).values() if not t.is_meta)
    held = {"weights": weights, "gradients": max(gradients), "optimizer": state_bytes(optimizers)}
    return held | {"activations": saved.peak_bytes, "messages": waiting.peak_bytes}


def of_part(build: Callable[[], LocalModel], number: int, x: Tensor, y: Tensor) -> int:
    """Bytes that a part holds at most in one process, alone: weights, gradients, optimizer state, activations."""
    local = build().train()
    stage = stages_of(local)[number - 1]
    stream = local.signature.stream((x,), {})
    with torch.no_grad():
        for part in list(local.parts)[: number - 1]:
            stream = {name: value.detach() for name, value in advance(part, stream)[1].items()}
    own = [m for m in (stage.part, stage.head) if m is not None]
    parameters = [p for m in own for p in m.parameters()]
    optimizer = torch.optim.Adam(parameters)
    with SavedBytes(exclude=[*local.parameters(), *local.buffers()]) as saved:
        run_batch([stage], [Upward(stream, y)], OptimizerSteps([stage], [optimizer]), outside=_Nowhere())
    buffers = sum(b.nbytes for m in own for b in m.buffers())
    weights = sum(p.nbytes for p in parameters)
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    return weights + buffers + gradients + state_bytes([optimizer]) + saved.peak_bytes


def by_rank(options: argparse.Namespace, x: Tensor, y: Tensor) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    rank = join().rank

    def build() -> LocalModel:
        torch.manual_seed(0)
        model = torchvision.models.get_model(options.model)
        return to_local(model, x, method=options.method, parts=options.ranks, balance="memory", verify=False)

    found = of_rank(options, build, x, y)
    everyone: list[Any] = [None] * options.ranks
    dist.all_gather_object(everyone, (found, of_part(build, rank + 1, x, y)))
    if rank == 0:
        print(f"{options.model}, batch {options.batch_size}, {options.size}², {options.method}, a part a rank, MB\n")
        print(f"| rank | {' | '.join(found)} | own part alone | ratio without messages | with |\n|{'---|' * 9}")
        for number, (held, own) in enumerate(everyone):
            total = sum(held.values())
            cells = [f"{v / 1e6:.1f}" for v in (*held.values(), own)]
            ratios = f"{(total - held['messages']) / own:.3f} | {total / own:.3f}"
            print(f"| {number} | {' | '.join(cells)} | {ratios} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--balance", default="activations")
    parser.add_argument("--ranks", type=int, help="train on so many ranks instead, a part each")
    parser.add_argument("--method", default="scpl", help="with --ranks")
    parser.add_argument("--steps", type=int, default=6, help="with --ranks")
    options = parser.parse_args()
    if options.ranks and "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        sys.exit(subprocess.run([*torchrun, str(options.ranks), *sys.argv]).returncode)
    x = torch.randn(options.batch_size, 3, options.size, options.size)
    y = torch.randint(0, 1000, (options.batch_size,))
    if options.ranks:
        by_rank(options, x, y)
        return
    model = torchvision.models.get_model(options.model)
    whole = peak_of_step(to_local(model, x, method="bp", parts=1), x, y)
    print(f"{options.model}, batch {options.batch_size}, {options.size}², K={options.parts}, {options.balance}")
    print("| method | predicted MB | measured MB | measured / predicted | measured / bp |")
    print("|---|---|---|---|---|")
    print(f"| bp, one part | | {whole / 1e6:.1f} | | 1 |", flush=True)
    if hasattr(model, "layer4"):
        rival = peak_checkpointed(model, x, y)
        print(f"| bp, checkpointed | | {rival / 1e6:.1f} | | {rival / whole:.3f} |", flush=True)
    for name in list_methods():
        method = get_method(name, reach=1) if name == "nwise" else get_method(name)
        local = to_local(model, x, method=method, parts=options.parts, balance=options.balance, verify=False)
        totals = [p.total.saved_bytes for p in local.plan.parts]
        reach_all = method.reach_in(options.parts) > 1
        predicted = sum(totals) if reach_all else max(totals)
        found = peak_of_step(local, x, y)
        label = f"{name} (reach 1)" if name == "nwise" else name
        print(
            f"| {label} | {predicted / 1e6:.1f} | {found / 1e6:.1f} | {found / predicted:.3f} | {found / whole:.3f} |",
            flush=True,
        )
        del local
        gc.collect()


if __name__ == "__main__":
    main()
