"""N-wise interlocking back-propagation (Gomez, Key et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead, one_of, positive
from localize.heads.layers import (
    check_hidden,
    conv_block,
    dense_logits,
    is_dense,
    linear_block,
    linear_exit,
    to_logits,
)
from localize.heads.pooling import (
    TOKEN_POOLS,
    AsMap,
    AverageTo,
    GlobalMean,
    PooledVector,
    TokenPool,
    is_map,
    space,
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
            pooled to 2×2, three hidden layers of width 4C, Linear), ``transformer`` (appendix B.3: two
            transformer blocks and an output matrix, for tokens), ``auto``: ``conv`` on maps, else ``linear``.
        token_pool: how tokens become a vector: ``mean``, the ``first`` (a class token), the ``last``; ``auto``: the
            final state where a recurrent layer made them, else the mean.
    """

    reach: int = 2
    gradient: Literal["furthest", "sum"] = "furthest"
    head: Literal["auto", "conv", "linear", "mlp_sr", "transformer"] = "auto"
    token_pool: TokenPool = "auto"

    name: ClassVar[str] = "nwise"
    summary: ClassVar[str] = "interlocking back-propagation: each loss reaches N parts back"
    source: ClassVar[str] = "Gomez, Key et al. 2022"
    predicts: ClassVar[Literal["none", "exits", "path"]] = "exits"

    def __post_init__(self) -> None:
        self.check(
            positive("reach", self.reach, whole=True),
            one_of("gradient", self.gradient, ("furthest", "sum")),
            one_of("head", self.head, ("auto", "conv", "linear", "mlp_sr", "transformer")),
            one_of("token_pool", self.token_pool, TOKEN_POOLS),
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
            kind = "conv" if is_map(site.hidden) and site.task.kind != "causal_lm" else "linear"
        if kind == "linear":
            net = linear_exit(site, self.name, max_features=8192, token_pool=self.token_pool)
            return ExitHead(site, net)
        if kind == "transformer":
            return ExitHead(site, self._transformer(site))
        if not is_map(site.hidden) or site.task.kind == "causal_lm":
            instead = "Use nwise with head='linear' or 'auto'."
            problem = f"head={kind!r} needs a map (N, C, H, W), and a task that predicts no tokens"
            raise site.error(self.name, problem, instead)
        return ExitHead(site, _conv(site, self.name) if kind == "conv" else _mlp_sr(site, self.name))

    def _transformer(self, site: HeadSite) -> nn.Module:
        spec, each = site.hidden, site.task.kind == "causal_lm"
        if spec.layout != "tokens" or site.task.kind == "segmentation":
            problem = "head='transformer' needs tokens (N, T, D), and a prediction for each or one for all"
            raise site.error(self.name, problem, "Use nwise with head='linear' or 'auto'.")
        body = TransformerBlocks(spec.channels, causal=each)
        if each:
            return dense_logits(site, self.name, body)
        in_front = replace(spec, shape=(1, *spec.features), batch_axis=0)
        reduce = PooledVector(in_front, token_pool=self.token_pool)
        return nn.Sequential(AsMap(spec), body, reduce, to_logits(site, self.name, spec.channels))


class TransformerBlocks(nn.Module):
    """Two transformer blocks, (N, T, D) → (N, T, D).

    Appendix B.3 says 4 heads; fewer where 4 do not divide the width. No dropout, and feed-forward layers of 4D,
    as the blocks of the papers' time have.

    Args:
        width: D.
        causal: a token does not look at those after it: what it predicts.
    """

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        heads = next(n for n in (4, 3, 2, 1) if width % n == 0)
        self.causal = causal
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool, device=tokens.device).triu(1) if self.causal else None
        for block in self.blocks:
            tokens = block(tokens, src_mask=mask, is_causal=self.causal)
        return tokens


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
