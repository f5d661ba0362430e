"""Imbalance (largest part over mean part, heads included) that the planner reaches, beside two even splits.

    python benchmarks/balance.py [--parts 2 4 8] [--methods bp scpl] [--models resnet50 ...]

All splits choose from the same legal cut points and are measured with the same costs. A cell reads *planner / layers /
params*: the planner's split, an even one by the number of layers with parameters, and an even one by parameters; the
two take the cut points nearest to the even places. Behind ``≥``, where it is above 1.005: what no split can beat, the
most expensive stretch between two neighbouring cut points, heads apart, over the planner's mean part. *bytes*, the last
column: what crosses the planner's cuts over what crosses those of the lowest maximum without slack, all K together.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn

from localize.convert.balance import best_partition
from localize.convert.partition import PartTable, best_cuts
from localize.convert.plan import Planner
from localize.convert.profile import profile_modes
from localize.convert.record import trace
from localize.convert.traced import Profile, TracedModel
from localize.errors import LocalizeError
from localize.heads.registry import resolve_method
from localize.spec import CutPoint

# fmt: off
TORCHVISION = (
    "alexnet", "vgg16", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "googlenet",
    "squeezenet1_1", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0",
    "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t",
)
# fmt: on
TEXT = ("bert", "gpt2", "llama")  # of transformers, where it is installed: 12 layers of 256


def text_model(name: str) -> nn.Module:
    """A sequence classifier of 12 layers."""
    transformers = __import__("transformers")
    classes = {"bert": "Bert", "gpt2": "GPT2", "llama": "Llama"}
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "vocab_size": 1000}
    sizes |= {"intermediate_size": 512} if name != "gpt2" else {}
    config = getattr(transformers, f"{classes[name]}Config")(**sizes, num_labels=10, pad_token_id=0)
    return getattr(transformers, f"{classes[name]}ForSequenceClassification")(config)


def example(name: str) -> tuple[nn.Module, Tensor]:
    """A model, and a batch of two for it."""
    if name in TEXT:
        return text_model(name), torch.randint(1, 1000, (2, 64))
    return torchvision.models.get_model(name), torch.randn(2, 3, 224, 224)


class Splits:
    """Splits of one model over the same cut points and costs, and how uneven each is."""

    def __init__(self, planner: Planner, parts: int) -> None:
        self.parts = parts
        self.points: Sequence[CutPoint] = planner._usable(parts)[True]
        self.nodes = [node.name for node in planner.traced.train_graph.nodes]
        self.profile = planner.profiles[True]
        self.table = PartTable(
            planner.traced,
            self.profile,
            self.points,
            planner.balance,
            lambda point, first: planner.head_cost(point),
        )
        self.balance = planner.balance
        self.heads = [planner.head_cost(point).of(planner.balance) for point in (*self.points, None)]

    def planned(self, slack: bool = True) -> list[int]:
        if slack:
            return [i + 1 for i in best_cuts(self.points, self.parts, self.table.cost)]
        crossing = [point.crossing_bytes for point in self.points]
        return best_partition(self.table.cost, self.parts, crossing, slack=0) or []

    def even(self, weigh: Callable[[Profile, str], float]) -> list[int]:
        """The cut points nearest to where ``weigh`` has reached 1/K, 2/K, … of its sum; all different."""
        sums = [0.0]
        for name in self.nodes:
            sums.append(sums[-1] + weigh(self.profile, name))
        reached = [sums[point.position] for point in self.points]
        chosen: list[int] = []
        for k in range(1, self.parts):
            low = chosen[-1] if chosen else 0  # as many candidates must be left as there are cuts to come
            free = range(low, len(self.points) - (self.parts - 1 - k))
            chosen.append(min(free, key=lambda i: abs(reached[i] - sums[-1] * k / self.parts)) + 1)
        return chosen

    def stretch(self, a: int, b: int) -> float:
        """The cost between two candidates, heads apart; also where the planner would leave layers untrained."""
        edges = [0, *(point.position for point in self.points), len(self.nodes)]
        return self.profile.cost(self.nodes[edges[a] : edges[b]]).of(self.balance)

    def costs(self, cuts: Sequence[int]) -> list[float]:
        """Of every part with its head."""
        return [self.stretch(a, b) + self.heads[b - 1] for a, b in pairwise((0, *cuts, len(self.points) + 1))]

    def imbalance(self, cuts: Sequence[int]) -> float:
        costs = self.costs(cuts)
        return max(costs) / statistics.mean(costs)

    def bound(self) -> float:
        largest = max(self.stretch(i, i + 1) for i in range(len(self.points) + 1))
        return max(1.0, largest / statistics.mean(self.costs(self.planned())))

    def bytes(self, cuts: Sequence[int]) -> int:
        return sum(self.points[i - 1].crossing_bytes for i in cuts)


def layers(profile: Profile, name: str) -> float:
    return float(bool(profile.nodes[name].params))


def parameters(profile: Profile, name: str) -> float:
    return float(sum(nbytes for _, nbytes in profile.nodes[name].params))


Figures = tuple[tuple[float, ...], int, int]
"""Imbalance of the planner, of both even splits, and the bound; bytes across with and without slack."""


def figures(
    name: str, counts: Sequence[int], keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[Figures]]:
    """(method, balance) → the figures for every number of parts of one model."""
    model, x = example(name)
    traced: TracedModel = trace(model, (x,), {})
    profiles = profile_modes(traced)
    found: dict[tuple[str, str], list[Figures]] = {}
    for method, balance in keys:
        planner = Planner(traced, resolve_method(method), balance)
        planner.profiles = profiles
        for parts in counts:
            splits = Splits(planner, parts)
            best, exact = splits.planned(), splits.planned(slack=False)
            uneven = [splits.imbalance(cuts) for cuts in (best, splits.even(layers), splits.even(parameters))]
            entry = (*uneven, splits.bound()), splits.bytes(best), splits.bytes(exact)
            found.setdefault((method, balance), []).append(entry)
    return found


def cell(uneven: Sequence[float]) -> str:
    bound = f" (≥ {uneven[3]:.3f})" if uneven[3] > 1.005 else ""
    return " / ".join(f"{value:.3f}" for value in uneven[:3]) + bound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--methods", nargs="*", default=["bp", "scpl"])
    parser.add_argument("--balance", nargs="*", default=["flops", "activations"])
    parser.add_argument("--models", nargs="*", default=[*TORCHVISION, *TEXT])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    keys = [(method, balance) for method in options.methods for balance in options.balance]
    everything: dict[str, dict[tuple[str, str], list[Figures]]] = {}
    for name in options.models:
        try:
            everything[name] = figures(name, options.parts, keys)
        except (LocalizeError, ImportError) as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}\n", flush=True)
    for method, balance in keys:
        print(f"\n{method}, by {balance}:\n")
        print(f"| model | {' | '.join(f'K = {parts}' for parts in options.parts)} | bytes |")
        print("|---" * (len(options.parts) + 2) + "|")
        for name, found in everything.items():
            of = found[method, balance]
            share = sum(best for _, best, _ in of) / sum(exact for *_, exact in of)
            print(f"| {name} | {' | '.join(cell(uneven) for uneven, *_ in of)} | {share:.2f} |")
        medians = []
        for k in range(len(options.parts)):
            columns = zip(*(found[method, balance][k][0] for found in everything.values()), strict=True)
            medians.append(" / ".join(f"{statistics.median(column):.3f}" for column in list(columns)[:3]))
        print(f"| *median* | {' | '.join(medians)} | |", flush=True)


if __name__ == "__main__":
    main()
