"""What freed memory that is kept saves a training step on a CPU: pages asked for, time in the system, peak memory.

    python benchmarks/allocator.py [--method scpl] [--steps 5]

ResNet-18 with the stem for 32×32 images, batch 64, two parts in one process with one thread, two steps to warm up. Each
row is a process of its own: with glibc's defaults, and as `localize train` has it (`runtime/allocator.py`).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from pipeline import CLASSES, SGD, build

from localize import Trainer, to_local
from localize.runtime.allocator import keep_freed_memory


def measure(options: argparse.Namespace) -> str:
    """A row of the table."""
    torch.set_num_threads(1)
    if options.only == "kept" and not keep_freed_memory():
        return "| kept | this C library cannot | | | |"
    local = to_local(
        build(options), torch.randn(4, 3, 32, 32), method=options.method, cuts=["layer2.1.conv1"], verify=False
    )
    batches = [(torch.randn(64, 3, 32, 32), torch.randint(0, CLASSES, (64,))) for _ in range(options.steps)]
    trainer = Trainer(local, optimizer=SGD, progress=False)
    trainer.fit((batches * 2)[:2])
    before = resource.getrusage(resource.RUSAGE_SELF)
    trainer.fit(batches)
    after = resource.getrusage(resource.RUSAGE_SELF)
    pages, user, system = (
        (getattr(after, name) - getattr(before, name)) / options.steps
        for name in ("ru_minflt", "ru_utime", "ru_stime")
    )
    return f"| {options.only} | {pages:,.0f} | {user:.2f} | {system:.3f} | {after.ru_maxrss / 1024:,.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="scpl")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=["given back", "kept"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = "resnet18"
    if arguments.only:
        sys.exit(print(measure(arguments)))
    print("| freed memory | pages a step | user s | system s | peak resident MB |\n|---|---|---|---|---|", flush=True)
    for only in ("given back", "kept"):
        subprocess.run([sys.executable, *sys.argv, "--only", only], check=True)
