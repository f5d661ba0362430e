"""Kills a random rank at a random moment, again and again, and compares the final weights with an undisturbed run's.

    python benchmarks/restarts.py --kills 30 --ranks 3

Each kill is a ``kill -9`` of one process, at any moment from the first step on: in a forward pass, while a checkpoint
is written (``--async-checkpoint``: by a thread), between two messages. torchelastic starts all ranks anew, and they go
on from the last checkpoint. Printed: kills, restarts, seconds from a kill to the next step, and whether the weights
are equal to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from localize import Trainer, to_local

SAMPLES, BATCH = 203, 16  # the last batch of an epoch is ragged


def model(width: int = 64) -> nn.Module:
    """Batch norm and dropout: what a resumed run gets wrong first."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)) for _ in range(6)
    ]
    return nn.Sequential(nn.Linear(16, width), *blocks, nn.Linear(width, 4))


def train(options: argparse.Namespace) -> None:
    """What every rank does, and again after each restart."""
    folder = Path(options.folder)
    local = to_local(model(), torch.randn(4, 16), method=options.method, parts=options.parts, verify=False)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 16, generator=generator)
    targets = torch.randint(0, 4, (SAMPLES,), generator=generator)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True)
    rank, started = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    chance = random.Random(f"{options.seed}/{started}")
    victim, delay = chance.randrange(options.ranks), chance.uniform(0.0, options.within)
    armed = started < options.kills and rank == victim

    def on_step(step: int, reports: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if rank == 0:
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"restart": started, "step": step, "time": time.time()}) + "\n")
        time.sleep(options.pause)

    trainer = Trainer(
        local,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        executor="distributed" if options.ranks > 1 else "sequential",
        seed=5,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=5,
        async_checkpoint=options.async_checkpoint,
        progress=False,
        on_step=on_step,
    )
    trainer.fit(loader, epochs=options.epochs, resume=True)
    if rank == 0:
        (folder / "digest").write_text(digest(local))


def digest(local: nn.Module) -> str:
    """Of all parameters and buffers."""
    result = hashlib.sha256()
    for name, tensor in sorted(local.state_dict().items()):
        result.update(name.encode() + bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return result.hexdigest()


def main(options: argparse.Namespace) -> int:
    here = Path(__file__).resolve()
    common = ["--method", options.method, "--parts", str(options.parts), "--epochs", str(options.epochs)]
    with tempfile.TemporaryDirectory() as temporary:
        one, many = Path(temporary) / "one", Path(temporary) / "many"
        one.mkdir()
        many.mkdir()
        # The same script without kills, in one process.
        alone = [sys.executable, str(here), "--worker", "--ranks", "1", "--folder", str(one), *common]
        subprocess.run([*alone, "--kills", "0", "--pause", "0"], check=True, env=os.environ | {"RANK": "0"})
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks),
            "--max-restarts", str(options.kills + 5), "--monitor-interval", "0.1", str(here), "--worker",
            "--ranks", str(options.ranks), "--folder", str(many), "--kills", str(options.kills),
            "--seed", str(options.seed), "--within", str(options.within), "--pause", str(options.pause), *common,
        ]  # fmt: skip
        if options.async_checkpoint:
            torchrun.append("--async-checkpoint")
        started = time.time()
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(torchrun, env=os.environ | quiet, capture_output=True, text=True)
        seconds = time.time() - started
        if done.returncode:
            print(done.stderr[-4000:])
            return 1
        log = [json.loads(line) for line in (many / "log.jsonl").read_text().splitlines()]
        equal = (one / "digest").read_text() == (many / "digest").read_text()
    times: dict[int, list[float]] = {}
    for line in log:
        times.setdefault(line["restart"], []).append(line["time"])
    restarts = max(times)
    gaps = [times[i + 1][0] - times[i][-1] for i in range(restarts) if i in times and i + 1 in times]
    beside = ", checkpoints beside training" if options.async_checkpoint else ""
    print(f"{options.method}, {options.parts} parts on {options.ranks} ranks, {log[-1]['step']} steps{beside}")
    print(f"kills: {options.kills}  restarts: {restarts}  steps done again: {len(log) - log[-1]['step']}")
    if gaps:
        gaps.sort()
        middle, longest = gaps[len(gaps) // 2], gaps[-1]
        print(f"seconds from the last step before a kill to the next: median {middle:.1f}, max {longest:.1f}")
    print(f"whole run: {seconds:.0f} s")
    print(f"final weights equal to the undisturbed run's in one process: {'yes, bit for bit' if equal else 'NO'}")
    return 0 if equal and restarts >= options.kills else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="scpl")
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=0.5, help="seconds after the first step in which to kill")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds of every step, so that there is time")
    parser.add_argument("--async-checkpoint", action="store_true", help="checkpoints are written by a thread")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.worker:
        train(chosen)
    else:
        sys.exit(main(chosen))
