"""Time and memory of a training step on one GPU: methods whose losses stay in their parts, beside end-to-end training.

    python benchmarks/gpu.py [--models resnet50 gpt texts] [--precisions bf16 fp32] [--parts 4] [--json FILE]
    python benchmarks/gpu.py --device cpu --tiny

All variants train the same model with the same cuts, batch and optimizer (AdamW):

- `bp`: the model as it is, one backward pass through all of it;
- `bp, checkpointed`: the same, and every part but the last is recomputed in the backward pass
  (`torch.utils.checkpoint`, non-reentrant): the rival that saves memory without another learning rule;
- a method: all parts on the one device, one after another; activations and gradients of a part go before the next one
  runs. `check`: with the look at each loss that `Trainer` takes before it updates a part (`on_nonfinite="raise"`),
  which waits for the device once a part.

A step is forward, backward and update. `step` is the median of single steps, each waited for; `running` the time a step
in a series that is waited for at its end, as in training. `peak` is the most that the allocator had given out during a
step, `beyond` that without what is there before it (weights, optimizer state, buffers, the batch). Where the time limit
is reached, what is left is named and not measured. Without a GPU, only the miniature on the CPU runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localize import LocalModel, to_local
from localize.errors import LocalizeError
from localize.part import advance
from localize.runtime.messages import Upward
from localize.runtime.precision import autocast_for, install
from localize.runtime.sequential import run_batch, stages_of
from localize.runtime.update import OptimizerSteps

Step = Callable[[], object]


# ------------------------------------------------------------------ models


class Block(nn.Module):
    """A transformer's block, normed first, causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """As GPT-2, with embeddings of their own at both ends; or one class a text, read from its last token."""

    def __init__(
        self, vocabulary: int, length: int, width: int, heads: int, layers: int, classes: int = 0
    ) -> None:
        super().__init__()
        self.classes = classes
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes or vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, -1] if self.classes else x)


def resnet(tiny: bool, batch: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-50 at 224² (ResNet-18 at 32²), a batch of 64 (4)."""
    n, size = batch or (4 if tiny else 64), 32 if tiny else 224
    model = torchvision.models.resnet18(num_classes=10) if tiny else torchvision.models.resnet50()
    return model, torch.randn(n, 3, size, size), torch.randint(0, model.fc.out_features, (n,))


def gpt(tiny: bool, batch: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """12 layers of width 768, 1024 tokens (4 of 32, 16), a batch of 8 (2)."""
    n, length, vocabulary = batch or (2 if tiny else 8), 16 if tiny else 1024, 61 if tiny else 50257
    model = GPT(vocabulary, length, *((32, 2, 4) if tiny else (768, 12, 12)))
    ids = torch.randint(0, vocabulary, (n, length + 1))
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def texts(tiny: bool, batch: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """The same blocks and tokens, and one of 100 (10) classes a text: what scpl and al can learn from; 16 texts (4)."""
    n, length, vocabulary = batch or (4 if tiny else 16), 16 if tiny else 1024, 61 if tiny else 50257
    classes = 10 if tiny else 100
    model = GPT(vocabulary, length, *((32, 2, 4) if tiny else (768, 12, 12)), classes=classes)
    return model, torch.randint(0, vocabulary, (n, length)), torch.randint(0, classes, (n,))


MODELS = {"resnet50": resnet, "gpt": gpt, "texts": texts}
MIDDLE = {"resnet50": "layer2", "gpt": "blocks.1", "texts": "blocks.1"}
TASKS: dict[str, Any] = {"resnet50": "classification", "gpt": "causal_lm", "texts": "classification"}
METHODS = ("scpl", "early_exit", "al")


# ------------------------------------------------------------------ variants


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Fused: it takes no memory beside its state, whatever the number of parameters that it updates at once."""
    held = list(parameters)
    return torch.optim.AdamW(held, lr=1e-4, fused=held[0].device.type == "cuda")


def refusal(name: str, method: str) -> str | None:
    """Why a method cannot train a model, if it cannot; asked of the miniature, since that is quick."""
    model, x, _ = MODELS[name](True, None)
    try:
        to_local(model, x[:2], method=method, task=TASKS[name], verify=False, cuts=[MIDDLE[name]])
    except LocalizeError as error:
        return str(error).splitlines()[0]
    return None


def converted(
    name: str, method: str, cuts: Any, options: argparse.Namespace
) -> tuple[LocalModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = MODELS[name](options.tiny, options.batch_size)
    how: dict[str, Any] = {"cuts": cuts} if cuts else {"parts": options.parts, "balance": "activations"}
    local = to_local(model, x[:2], method=method, task=TASKS[name], verify=False, **how)
    return local.to(options.device).train(), x.to(options.device), y.to(options.device)


def end_to_end(local: LocalModel, x: Tensor, y: Tensor, precision: str, checkpointed: bool) -> Step:
    """A step of the model itself, or of its parts one after another, recomputed."""
    model, parts = local.to_standard(), list(local.parts)
    optimizer, autocast = adamw(model.parameters()), autocast_for(precision, x.device)

    def forward() -> Tensor:
        if not checkpointed:
            return model(x)
        stream = local.signature.stream((x,), {})
        for part in parts[:-1]:
            _, stream = checkpoint(advance, part, stream, use_reentrant=False)
        return advance(parts[-1], stream)[0]

    def step() -> Tensor:
        with autocast() if precision != "fp32" else nullcontext():
            logits = forward()
            loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def by_parts(local: LocalModel, x: Tensor, y: Tensor, precision: str, check: bool) -> Step:
    """A step of a method, as ``Trainer`` takes it."""
    stages = stages_of(local)
    install(precision, stages, x.device)
    updater = OptimizerSteps(
        stages, local.optimizers(adamw), keep_grads=False, on_nonfinite="raise" if check else None
    )

    def step() -> object:
        updater.start()
        reports = run_batch(stages, [Upward(local.signature.stream((x,), {}), y)], updater)
        updater.finish()
        return reports

    return step


# ------------------------------------------------------------------ measuring


def measure(step: Step, options: argparse.Namespace) -> dict[str, float | None]:
    """Milliseconds of a step, and bytes."""
    cuda = options.device.startswith("cuda")

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def timed(count: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        return 1e3 * (time.perf_counter() - started) / count

    timed(options.warmup)
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    single = [timed(1) for _ in range(options.steps)]
    running = timed(options.steps)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "step_ms": statistics.median(single),
        "slowest_ms": max(single),
        "running_ms": running,
        "peak_bytes": peak,
        "beyond_bytes": None if peak is None else peak - before,
    }


def variants(method: str) -> list[str]:
    return ["bp", "bp, checkpointed"] if method == "bp" else [method, f"{method}, check"]


def measured(
    name: str, method: str, made: tuple[LocalModel, Tensor, Tensor], until: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All variants and precisions of one converted model. ``until``: when nothing new is begun any more."""
    local, x, y = made
    about = [
        {"model": name, "precision": p, "variant": v} for p in options.precisions for v in variants(method)
    ]
    found = []
    for row in about:
        if time.monotonic() > until:
            found.append({**row, "skipped": "time limit"})
            continue
        variant, precision = row["variant"], row["precision"]
        if method == "bp":
            step = end_to_end(local, x, y, precision, variant != "bp")
        else:
            step = by_parts(local, x, y, precision, variant != method)
        try:
            found.append({**row, **measure(step, options)})
        except torch.OutOfMemoryError as error:
            found.append({**row, "skipped": str(error).splitlines()[0]})
        local.zero_grad(set_to_none=True)
        del step  # and its optimizers
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return found


def in_order(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """By model, precision and variant."""
    return sorted(
        rows, key=lambda r: (options.models.index(r["model"]), options.precisions.index(r["precision"]))
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | precision | variant | step ms | to bp | slowest | running ms | peak MB | beyond MB | to bp |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    whole: dict[str, Any] = {}
    for row in rows:
        head = f"| {row['model']} | {row['precision']} | {row['variant']} |"
        if "skipped" in row:
            lines.append(f"{head} {row['skipped']} | | | | | | |")
            continue
        whole = row if row["variant"] == "bp" else whole
        same = (whole.get("model"), whole.get("precision")) == (row["model"], row["precision"])
        times = row["step_ms"] / whole["step_ms"] if same else float("nan")
        text = (
            f"{head} {row['step_ms']:.1f} | {times:.2f} | {row['slowest_ms']:.1f} | {row['running_ms']:.1f} |"
        )
        if row["peak_bytes"] is None:
            lines.append(f"{text} – | – | – |")
            continue
        room = row["beyond_bytes"] / whole["beyond_bytes"] if same else float("nan")
        lines.append(f"{text} {row['peak_bytes'] / 1e6:.0f} | {row['beyond_bytes'] / 1e6:.0f} | {room:.2f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="miniatures of the models")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--limit-s", type=float, default=420.0, help="begin nothing new after so many seconds"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here; --device cpu --tiny runs a miniature.")
        return
    until = time.monotonic() + options.limit_s
    found: list[dict[str, Any]] = []
    for name in options.models:
        cuts = None
        for method in ("bp", *METHODS):
            why = "time limit" if time.monotonic() > until else refusal(name, method)
            if why is not None:
                found += [
                    {"model": name, "precision": p, "variant": method, "skipped": why}
                    for p in options.precisions
                ]
                continue
            made = converted(name, method, cuts, options)
            cuts = cuts or list(made[0].plan.cuts)
            found += measured(name, method, made, until, options)
            del made
    rows = in_order(found, options)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    about = {"device": device, "torch": torch.__version__, "parts": options.parts, "steps": options.steps}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
