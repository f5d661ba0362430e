"""Builds the head of every part, and says beforehand what a head would cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from localize.convert.flops import FlopCounter
from localize.convert.restore import preserved
from localize.convert.timing import Times, measure_head, reason
from localize.errors import MethodError
from localize.heads.base import Head, HeadSite, Method
from localize.hollow import HollowBuild
from localize.part import Part
from localize.spec import Cost, TensorSpec
from localize.task import Task

_log = logging.getLogger(__name__)
ALIKE = 0.1  # heads whose costs differ by so much, relative to the smaller, are timed once
LARGEST = 2**30  # bytes of a head that is timed: planning must not need much more memory than the model


def graft(
    method: Method,
    parts: Sequence[Part],
    hidden: Sequence[TensorSpec],
    logits: TensorSpec,
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Head | None]:
    """One head a part, built from the spec of what it reads (the last: the logits or the representation).

    Raises:
        MethodError: the method cannot work on one of the hidden states; all such parts are named at once.
    """
    heads: list[Head | None] = []
    problems: list[str] = []
    for number, (part, spec) in enumerate(zip(parts, hidden, strict=True), 1):
        classifier = (
            part.run_classifier if part.route.classifier is not None and method.splits_classifier else None
        )
        try:
            heads.append(_built(method, HeadSite(number, len(parts), spec, task, classifier, logits), device, dtype))
        except MethodError as error:
            problems.append(str(error))
    if problems:
        raise MethodError("\n".join(dict.fromkeys(problems)))
    return heads


def _built(method: Method, site: HeadSite, device: torch.device, dtype: torch.dtype) -> Head | None:
    if device.type != "meta":
        head = method.build_head(site)
        return head.to(device=device, dtype=dtype) if head is not None else None
    with torch.device("cpu"), HollowBuild():  # its buffers are made once, and have their values
        head = method.build_head(site)
    return head.to(dtype=dtype) if head is not None else None


class _PlannedSite(HeadSite):
    """Where a head would be built."""

    def error(self, method: str, problem: str, instead: str) -> MethodError:
        return MethodError(
            f"Method {method!r}, hidden state {self.hidden} ({self.hidden.layout}): {problem}. {instead}"
        )


@dataclass(frozen=True)
class HeadTiming:
    """How heads are timed, beside a model whose own cost is ``model``, with its times.

    Where ``device`` is None (models without data, or too large to run) and for heads of more than ``LARGEST`` bytes of
    weights and activations, milliseconds are those of the model for as many FLOPs: an estimate, and a poor one for
    a head of other layers than the model's.
    """

    model: Cost
    device: torch.device | None
    dtype: torch.dtype

    def times(self, cost: Cost, method: Method, site: HeadSite) -> Times:
        """Milliseconds of the head of a site; ``cost`` is that of its dry run. Nothing random is drawn.

        Runs on ``device``, as ``measure_head`` does.
        """
        since = ""
        if self.device is not None and cost.param_bytes + cost.saved_bytes <= LARGEST:
            try:
                return self._measured(method, site, self.device)
            except Exception as error:  # no room, or no kernel for it: the method has taken the site before
                _log.debug("The head on %s cannot be timed.", site.hidden, exc_info=True)
                since = reason(error)
        share = cost.flops / max(self.model.flops, 1)
        return Times(share * (self.model.forward_ms or 0.0), share * (self.model.backward_ms or 0.0), since)

    def _measured(self, method: Method, site: HeadSite, device: torch.device) -> Times:
        with preserved(), torch.enable_grad():
            head = method.build_head(site)
            return Times(0.0, 0.0) if head is None else measure_head(head.to(device, self.dtype), device)


@dataclass
class HeadCosts:
    """What the head of a method costs on a hidden state, by a dry run on the meta device; equal sites run once.

    ``classifier`` stands in for the model's own where the method reads the representation below it: its cost is
    the part's, not the head's. With ``timing``, heads have times too. To keep planning short those are taken once for
    all heads that are alike, whatever number their part may come to have: on hidden states of one layout, with sizes,
    FLOPs, weights and activations that differ by ``ALIKE`` at most. Times are in proportion to FLOPs among these.
    """

    method: Method
    task: Task
    logits: TensorSpec
    classifier: Callable[[Tensor], Any] | None = None
    timing: HeadTiming | None = None
    estimated: dict[TensorSpec, str] = field(default_factory=dict)  # hidden states on which none could be timed: why
    _known: dict[tuple[TensorSpec, int, int], Cost] = field(default_factory=dict)
    _timed: list[tuple[HeadSite, Cost, Times]] = field(default_factory=list)

    def of(self, spec: TensorSpec, number: int, parts: int) -> Cost:
        """Cost of the head that part ``number`` of ``parts`` gets on ``spec``; zero where it gets none.

        Raises:
            MethodError: the method cannot work on such a hidden state. The message names no part: while one
                plans, their numbers are made up.
        """
        key = (spec, number, parts)
        if key not in self._known:
            classifier = self.classifier if number == parts else None
            site = _PlannedSite(number, parts, spec, self.task, classifier, self.logits)
            cost = _dry_run(self.method, site)
            if self.timing is not None:
                times = self._times(self.timing, cost, site) if cost is not None else Times(0.0, 0.0)
                if times.since:
                    self.estimated[spec] = times.since
                cost = replace(cost or Cost(), forward_ms=times.forward_ms, backward_ms=times.backward_ms)
            self._known[key] = cost or Cost()
        return self._known[key]

    def _times(self, timing: HeadTiming, cost: Cost, site: HeadSite) -> Times:
        for other, known, times in self._timed:
            if other.is_last == site.is_last and _alike(other.hidden, known, site.hidden, cost):
                share = cost.flops / known.flops if known.flops else 1.0
                return Times(share * times.forward_ms, share * times.backward_ms, times.since)
        times = timing.times(cost, self.method, site)
        self._timed.append((site, cost, times))
        return times


def _alike(one: TensorSpec, its: Cost, other: TensorSpec, others: Cost) -> bool:
    """Whether two heads, on these hidden states and of these costs, are alike for all that they take of time."""
    pairs = (
        (one.nbytes, other.nbytes),
        (its.flops, others.flops),
        (its.param_bytes, others.param_bytes),
        (its.saved_bytes, others.saved_bytes),
    )
    kinds = (one.layout, one.dtype) == (other.layout, other.dtype)
    return kinds and all(abs(a - b) <= ALIKE * min(a, b) for a, b in pairs)


def _dry_run(method: Method, site: HeadSite) -> Cost | None:
    with torch.device("meta"):
        head = method.build_head(site)
    if head is None:
        return None
    axis = site.hidden.batch_axis or 0
    batch = site.hidden.shape[axis] if site.hidden.shape else 1
    hidden = torch.empty(site.hidden.shape, dtype=site.hidden.dtype, device="meta", requires_grad=True)
    weights = {p.untyped_storage()._cdata for p in head.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata != hidden.untyped_storage()._cdata:
            saved[storage._cdata] = storage.nbytes()
        kept.append(storage)
        return tensor

    kept: list[Any] = []  # alive until the end: a freed storage's address could come again
    with FlopCounter() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target = head.example_target(batch, "meta")
        head(hidden, target)
    size = sum(p.numel() * p.element_size() for p in head.parameters())
    return Cost(counter.flops, size, sum(saved.values()))
