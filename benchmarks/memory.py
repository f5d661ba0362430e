"""Bytes that autograd saves at most during one `train_step`, beside the plan's prediction and end-to-end training.

    python benchmarks/memory.py [--model resnet50] [--parts 4] [--batch-size 8] [--size 224]

`predicted` is the plan's largest part with its head. `bp` trains the same model end to end; `bp, checkpointed` is
end to end with activation checkpointing of its top-level blocks, the honest rival: cheaper in memory still where it
is smaller, at the price of a second forward pass.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from localize import get_method, list_methods, to_local
from localize.runtime.memory import SavedBytes


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--balance", default="activations")
    options = parser.parse_args()
    x = torch.randn(options.batch_size, 3, options.size, options.size)
    y = torch.randint(0, 1000, (options.batch_size,))
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
