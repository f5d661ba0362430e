"""A fair comparison: every method with the same model, data order, budget and seeds, beside `bp`.

The initial weights, the order of the batches and the optimizer are the same for all methods of a seed, so the
difference to `bp` is taken within a seed (paired), and its spread over seeds is what a difference must exceed.

    python examples/compare_methods.py --epochs 10 --seeds 3
"""

import argparse
import statistics
import time
from functools import partial

import torch
from model import build_model

from localize import Trainer, list_methods, to_local
from localize.data import load_data


def accuracy(local: torch.nn.Module, val: torch.utils.data.DataLoader) -> float:
    """Share of the validation half that the last exit classifies correctly, in %."""
    hits = total = 0
    for images, labels in val:
        hits += int((local.predict(images).argmax(1) == labels).sum())
        total += len(labels)
    return 100 * hits / total


def run(method: str, seed: int, epochs: int) -> tuple[float, float]:
    """Accuracy in % and training time in seconds."""
    torch.manual_seed(seed)
    data = load_data("digits")
    train, val = data.loaders(batch_size=64, seed=seed)
    local = to_local(build_model(), data.example(), method=method, parts=4)
    trainer = Trainer(local, optimizer=partial(torch.optim.Adam, lr=2e-3), seed=seed)
    start = time.perf_counter()
    trainer.fit(train, epochs=epochs)
    return accuracy(local, val), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list_methods())
    arguments = parser.parse_args()
    methods = ["bp", *(m for m in arguments.methods if m != "bp")]
    results: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for seed in range(arguments.seeds):
        for method in methods:  # interleaved: what slows the machine for a while hits all of them
            results[method].append(run(method, seed, arguments.epochs))
    print(f"{'method':<12}{'accuracy %':>12}{'to bp':>9}{'± spread':>10}{'seconds':>9}")
    for method, runs in results.items():
        scores = [score for score, _ in runs]
        differences = [score - base for score, (base, _) in zip(scores, results["bp"], strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else float("nan")
        seconds = statistics.mean(s for _, s in runs)
        print(
            f"{method:<12}{statistics.mean(scores):>12.2f}{statistics.mean(differences):>+9.2f}"
            f"{spread:>10.2f}{seconds:>9.1f}"
        )


if __name__ == "__main__":
    main()
