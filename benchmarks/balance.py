"""The imbalance (largest part over mean part, heads included) that the planner reaches.

    python benchmarks/balance.py [--parts 4] [--method scpl]
"""

from __future__ import annotations

import argparse

import torch
import torchvision

from localize import to_local

MODELS = ("resnet50", "vgg16", "vit_b_16", "densenet121", "efficientnet_b0", "convnext_tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--methods", nargs="*", default=["bp", "scpl"])
    parser.add_argument("--balance", nargs="*", default=["flops", "activations"])
    options = parser.parse_args()
    x = torch.randn(2, 3, 224, 224)
    columns = [(m, b) for m in options.methods for b in options.balance]
    print("| model | " + " | ".join(f"{m}, {b}" for m, b in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in MODELS:
        model = torchvision.models.get_model(name)
        cells = []
        for method, balance in columns:
            plan = to_local(model, x, method=method, parts=options.parts, balance=balance, verify=False).plan
            cells.append(f"{plan.imbalance:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
