"""Converting ResNet-50 (K = 4, by FLOPs) against `torch.distributed.pipelining.pipeline()` splitting the same model.

    python benchmarks/conversion.py [--runs 5]

Both get the same example (2, 3, 224, 224); `pipeline()` is told to split at the four layers. Interleaved, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
import torchvision
from torch.distributed.pipelining import SplitPoint, pipeline

from localize import to_local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--method", default="bp", help="bp only cuts, as pipeline() does; others build heads too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    x = torch.randn(2, 3, 224, 224)

    def ours() -> None:
        to_local(torchvision.models.get_model(options.model), x, method=options.method, parts=4, balance="flops")

    def unverified() -> None:
        to_local(torchvision.models.get_model(options.model), x, method=options.method, parts=4, verify=False)

    def theirs() -> None:
        spec = dict.fromkeys(("layer2", "layer3", "layer4"), SplitPoint.BEGINNING)
        pipeline(torchvision.models.get_model(options.model), mb_args=(x,), split_spec=spec)

    def model_alone() -> None:
        torchvision.models.get_model(options.model)

    seconds: dict[str, list[float]] = {}
    for run in range(options.runs + 1):
        for name, work in (("ours", ours), ("unverified", unverified), ("theirs", theirs), ("model", model_alone)):
            start = time.perf_counter()
            work()
            if run:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    building = statistics.median(seconds["model"])
    net = {name: [s - building for s in times] for name, times in seconds.items()}
    labels = {"ours": "to_local, verified", "unverified": "to_local, verify=False", "theirs": "pipeline()"}
    for name, label in labels.items():
        print(f"{label:<24}{statistics.median(net[name]):6.2f} s (model building {building:.2f} s taken off)")
    for name in ("ours", "unverified"):
        ratio = statistics.median(a / b for a, b in zip(net[name], net["theirs"], strict=True))
        print(f"ratio {name}: {ratio:.3f}")


if __name__ == "__main__":
    main()
