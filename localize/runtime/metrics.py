"""Losses and hits, summed where they are computed: adding up a batch waits for no device, reading an epoch does.

What does wait in each step is the check of ``on_nonfinite``, see ``OptimizerSteps``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from localize.model import LocalModel
from localize.runtime.batches import SplitBatch, batch_size, pairs
from localize.runtime.precision import Autocast
from localize.runtime.stage import StageReport
from localize.signature import tensors_of, to_device
from localize.task import Task


def _sums(count: int, device: torch.device) -> Tensor:
    wide = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
    return torch.zeros(count, dtype=wide, device=device)


class Tally:
    """Training losses and hits of an epoch so far, part by part. Losses that are not finite are left out."""

    def __init__(self, parts: int, device: torch.device) -> None:
        self.loss = _sums(parts, device)
        self.weight = _sums(parts, device)
        self.hits = torch.zeros(parts, 2, dtype=torch.int64, device=device)
        self.measured = [False] * parts  # which parts have a loss at all
        self.skipped = [0] * parts
        self.samples = 0
        self.seconds = 0.0

    def add(self, reports: Sequence[StageReport], samples: int, skipped: Sequence[int]) -> None:
        """One batch; ``skipped`` are the parts whose update was left out."""
        none = self.loss.new_full((), torch.nan)  # of parts without a loss, and of those of other ranks
        values = torch.stack([none if r.loss is None else r.loss.to(self.loss.dtype) for r in reports])
        finite = values.isfinite()
        self.loss += torch.where(finite, values, 0.0) * samples
        self.weight += finite * samples
        for i, report in enumerate(reports):
            self.measured[i] = report.loss is not None
            if report.measured is not None:
                self.hits[i] += report.measured
        for number in set(skipped):
            self.skipped[number - 1] += 1
        self.samples += samples

    def losses(self) -> list[float | None]:
        """The mean a part; None where the part has no loss of its own."""
        means = (self.loss / self.weight).tolist()
        return [mean if there else None for mean, there in zip(means, self.measured, strict=True)]

    def accuracies(self) -> dict[int, float]:
        """By exit, where the head predicts while training."""
        return {n: hit / all_ for n, (hit, all_) in enumerate(self.hits.tolist(), 1) if all_}

    def state(self) -> dict[str, Any]:
        """Plain data and tensors: what a checkpoint in the middle of an epoch keeps."""
        tensors = {name: getattr(self, name).cpu() for name in ("loss", "weight", "hits")}
        plain = {
            "measured": self.measured,
            "skipped": self.skipped,
            "samples": self.samples,
            "seconds": self.seconds,
        }
        return tensors | {name: list(v) if isinstance(v, list) else v for name, v in plain.items()}

    def load(self, state: dict[str, Any], numbers: Collection[int] | None = None) -> None:
        """The inverse of ``state``; for another number of parts, per-part sums start anew.

        ``numbers`` are the parts (from 1) that are counted here, where others are counted elsewhere.
        """
        same = len(state["measured"]) == len(self.measured)
        for name in ("loss", "weight", "hits"):
            if same:
                getattr(self, name).copy_(state[name])
        if same:
            self.measured, self.skipped = list(state["measured"]), list(state["skipped"])
        self.samples, self.seconds = state["samples"], state["seconds"]
        everyone = range(1, len(self.measured) + 1)
        for i in (number - 1 for number in everyone if numbers is not None and number not in numbers):
            self.loss[i], self.weight[i], self.hits[i] = 0.0, 0.0, 0
            self.measured[i], self.skipped[i] = False, 0

    def plain(self) -> dict[str, Any]:
        """``state`` as plain data."""
        return {key: v.tolist() if isinstance(v, Tensor) else v for key, v in self.state().items()}

    def join(self, others: Sequence[dict[str, Any]]) -> Tally:
        """One tally of all parts, from what ``plain`` gave where each of them was counted; the first one's clock."""
        total = Tally(len(self.measured), torch.device("cpu"))
        for name in ("loss", "weight", "hits"):
            total_of: Tensor = getattr(total, name)
            for other in others:
                total_of += torch.tensor(other[name], dtype=total_of.dtype)
        total.measured = [any(column) for column in zip(*(o["measured"] for o in others), strict=True)]
        total.skipped = [sum(column) for column in zip(*(o["skipped"] for o in others), strict=True)]
        total.samples, total.seconds = others[0]["samples"], others[0]["seconds"]
        return total


def evaluate(
    local: LocalModel, loader: Iterable[Any], split: SplitBatch, device: torch.device, autocast: Autocast
) -> dict[str, Any]:
    """Loss and accuracy of every exit: ``{"loss", "accuracy", "samples", "exits": {1: {"loss", "accuracy"}, …}}``.

    The outer two are the last exit's. Losses are means over targets (over samples with a custom loss);
    ``accuracy`` is None for regression.

    Raises:
        ConfigError: the loader is empty or its batches have an unknown form.
        TaskError: a target does not fit the task.
    """
    sums: dict[int, Tensor] = {}  # by exit; see scores_of
    samples = 0
    for inputs, target in pairs(loader, split):
        local.check_target(target, tensors_of(inputs))
        inputs, target = to_device(inputs, device), to_device(target, device)
        size = batch_size(inputs, target)
        samples += size
        with autocast():
            predictions = local.predict_all(inputs)
        for number, logits in predictions.items():
            with torch.no_grad():
                scores = scores_of(local.task, logits, target, size)
            sums[number] = scores if number not in sums else sums[number] + scores
    return summary({number: values.tolist() for number, values in sums.items()}, samples)


def summary(sums: dict[int, list[float]], samples: int) -> dict[str, Any]:
    """What ``evaluate`` returns, from the sums of ``scores_of`` over all batches, by exit."""
    exits: dict[int, dict[str, float | None]] = {}
    for number, (loss, weight, hit, targets) in sums.items():
        exits[number] = {
            "loss": loss / weight if weight else None,
            "accuracy": hit / targets if targets else None,
        }
    last = exits[max(exits)]
    return {"loss": last["loss"], "accuracy": last["accuracy"], "samples": samples, "exits": exits}


def scores_of(task: Task, logits: Tensor, target: Any, samples: int) -> Tensor:
    """Of one batch: loss × weight, weight, hits and targets, (4)."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    result = _sums(4, logits.device)
    result[2:] = task.hits(logits, target)
    # A mean over targets that are not ignored counts as often as there are such targets.
    result[1] = result[3] if task.has_classes and task.loss_fn is None else samples
    loss = task.loss(logits, target).to(result.dtype)
    result[0] = torch.where(result[1] > 0, loss * result[1], 0.0)
    return result
