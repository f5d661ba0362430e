"""N-wise interlocking back-propagation (Gomez, Key et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead, one_of, positive
from localize.heads.layers import (
    AsMap,
    AverageTo,
    GlobalMean,
    check_hidden,
    conv_block,
    dense_logits,
    is_dense,
    is_map,
    linear_block,
    linear_exit,
    space,
    to_logits,
)

_DENSE = "Use head='linear' (or 'auto'), early_exit, joint or bp."


@dataclass(frozen=True)
class NWise(Method):
    """Every part has an auxiliary head with loss L_k; a loss reaches N parts back.

    ``gradient="furthest"`` (section 3.2, as released): part k is trained by one loss only, L_{min(k+N-1, K)},
    relayed down through the parts between; nearer losses pass through it without training it.
    ``gradient="sum"`` (section 3.1 read literally): part k takes the gradients of all losses in reach,
    L_k … L_{min(k+N-1, K)}. In both, head k is trained by L_k alone, on the detached hidden state.
    N = 1 is local learning; with ``"furthest"``, N >= K equals ``bp`` for the parts.

    Args:
        reach: N, how many parts a loss trains at most: its own and those below.
        gradient: which losses train a part.
        head: ``conv`` (appendix B.2: 3×3·128–BN–ReLU, 3×3·64–BN–ReLU, global average, Linear), ``linear``
            (appendix B.1: one Linear on the flattened map, pooled where it has more than 8192 values),
            ``mlp_sr`` (Belilovsky et al. 2019, DGL: pooled to a quarter of the size, three 1×1 convolutions,
            pooled to 2×2, three hidden layers of width 4C, Linear), ``auto``: ``conv`` on maps, else
            ``linear``.
    """

    reach: int = 2
    gradient: Literal["furthest", "sum"] = "furthest"
    head: Literal["auto", "conv", "linear", "mlp_sr"] = "auto"

    name: ClassVar[str] = "nwise"
    summary: ClassVar[str] = "interlocking back-propagation: each loss reaches N parts back"
    source: ClassVar[str] = "Gomez, Key et al. 2022"
    predicts: ClassVar[Literal["none", "exits", "path"]] = "exits"

    def __post_init__(self) -> None:
        self.check(
            positive("reach", self.reach, whole=True),
            one_of("gradient", self.gradient, ("furthest", "sum")),
            one_of("head", self.head, ("auto", "conv", "linear", "mlp_sr")),
        )

    def trains(self, number: int, parts: int) -> range:
        """``sum``: all parts in reach. ``furthest``: those for which no loss further up is in reach."""
        lowest = number - self.reach_in(parts) + 1
        if self.gradient == "sum" or number == parts:
            return range(max(1, lowest), number + 1)
        return range(lowest, lowest + 1) if lowest >= 1 else range(0)

    def build_head(self, site: HeadSite) -> Head:
        """The auxiliary network of a part below the last; on the last part the model's own output."""
        if site.is_last:
            return TaskHead(site)
        check_hidden(site, self.name)
        kind = self.head
        if kind == "auto":
            kind = "conv" if is_map(site.hidden) else "linear"
        if kind == "linear":
            return ExitHead(site, linear_exit(site, self.name, max_features=8192))
        if not is_map(site.hidden):
            instead = "Use nwise with head='linear' or 'auto'."
            raise site.error(self.name, f"head={kind!r} needs a map (N, C, H, W)", instead)
        return ExitHead(site, _conv(site, self.name) if kind == "conv" else _mlp_sr(site, self.name))


def _conv(site: HeadSite, method: str) -> nn.Module:
    axes = len(space(site.hidden))
    body = nn.Sequential(conv_block(axes, site.hidden.channels, 128), conv_block(axes, 128, 64))
    if is_dense(site):
        return dense_logits(site, method, body, 64)
    return nn.Sequential(AsMap(site.hidden), body, GlobalMean(), to_logits(site, method, 64))


def _mlp_sr(site: HeadSite, method: str) -> nn.Module:
    """DGL's MLP with spatial reduction, section 4.1 and its released ``auxillary_classifier2``."""
    if is_dense(site):
        raise site.error(method, "head='mlp_sr' makes one prediction a sample", _DENSE)
    channels, sizes = site.hidden.channels, space(site.hidden)
    axes = len(sizes)
    quarter = [math.ceil(size / 4) for size in sizes]
    small = [min(2, size) for size in quarter]
    width = channels * math.prod(small)
    return nn.Sequential(
        AsMap(site.hidden),
        AverageTo(sizes, quarter),
        *(conv_block(axes, channels, channels, kernel=1, bias=False) for _ in range(3)),
        AverageTo(quarter, small),
        nn.Flatten(),
        *(linear_block(width, width, norm=True) for _ in range(3)),
        to_logits(site, method, width),
    )
