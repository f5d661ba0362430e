"""Converts every classification model of torchvision into parts, with every method, and checks the result.

    python benchmarks/torchvision_models.py [--models REGEX] [--parts 4] [--markdown FILE]

For each model: seconds of one full conversion (verified in train and eval mode and on a second batch size), then
  output     parts one after another = the model, in train and in eval mode, bit for bit
  gradients  `bp` over the parts = the model's own backward pass, every parameter, bit for bit
  isolated   per method: no loss reaches a parameter outside its reach, and each trained parameter has a gradient
Image sizes are the smallest a model takes, so that the sweep ends on two cores; sizes do not change the graphs.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from localize import LocalizeError, get_method, list_methods, to_local

SIZES = {"inception_v3": 299, "alexnet": 64, "maxvit_t": 224}
HEAVY = re.compile(r"vit_h_14|regnet_y_128gf")


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    options: dict[str, object] = {"weights": None}
    size = SIZES.get(name, 64)
    if name.startswith("vit_"):
        size = 2 * int(name.rpartition("_")[2])
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = torchvision.models.get_model(name, **options)
    return model, torch.randn(2, 3, size, size)


def logits(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def gradients_agree(model: nn.Module, local: nn.Module, x: Tensor, y: Tensor) -> bool:
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(3)
    nn.functional.cross_entropy(logits(model(x)), y).backward()
    plain = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for n, b in model.named_buffers():
        b.data.copy_(buffers[n])
    torch.manual_seed(3)
    sum(local.losses(x, y)).backward()
    same = all(
        (plain[n] is None) == (p.grad is None) and (p.grad is None or torch.equal(plain[n], p.grad))
        for n, p in model.named_parameters()
    )
    model.zero_grad(set_to_none=True)
    return same


def is_isolated(local: nn.Module, x: Tensor, y: Tensor) -> str:
    losses = local.losses(x, y)
    total = len(local.parts)
    for number, loss in enumerate(losses, 1):
        reach = local.method.trains(number, total)
        for other, part in enumerate(local.parts, 1):
            weights = list(part.parameters())
            grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
            if other not in reach and any(g is not None for g in grads):
                return f"loss {number} reaches part {other}"
    if not all(torch.isfinite(loss) for loss in losses):
        return "loss not finite"
    return ""


def check(name: str, parts: int) -> dict[str, object]:
    model, x = build(name)
    y = torch.tensor([1, 7])
    row: dict[str, object] = {"model": name, "Mparams": sum(p.numel() for p in model.parameters()) / 1e6}
    start = time.perf_counter()
    local = to_local(model, x, method="bp", parts=parts)
    row["seconds"] = time.perf_counter() - start
    row["imbalance"] = local.plan.imbalance
    row["output"] = "yes"  # to_local raises otherwise
    row["gradients"] = "yes" if gradients_agree(model, local, x, y) else "NO"
    failed = []
    for method in list_methods():
        # Heads on small images are small; the graphs are the same, so verifying once is enough.
        local = to_local(model, x, method=get_method(method), parts=parts, verify=False)
        problem = is_isolated(local, x, y)
        if problem:
            failed.append(f"{method}: {problem}")
        model.zero_grad(set_to_none=True)
        del local
    row["isolated"] = "; ".join(failed) or "yes"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="only names that match this expression")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = torchvision.models.list_models(module=torchvision.models)
    names = [n for n in names if re.search(options.models, n)]
    head = "| model | M params | convert s | imbalance | output | gradients | every method isolated |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    good = 0
    for name in names:
        try:
            row = check(name, options.parts)
        except LocalizeError as error:
            row = {"model": name, "output": f"{type(error).__name__}: {error}"}
        good += row.get("gradients") == "yes" and row.get("isolated") == "yes"
        lines.append(
            f"| {name} | {row.get('Mparams', 0):.1f} | {row.get('seconds', 0):.2f} | {row.get('imbalance', 0):.3f} "
            f"| {row.get('output')} | {row.get('gradients', '')} | {row.get('isolated', '')} |"
        )
        print(lines[-1], flush=True)
        gc.collect()
    lines.append(f"\n{good} of {len(names)} right.")
    print(lines[-1])
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
