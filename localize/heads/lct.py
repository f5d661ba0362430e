"""Local critic training (Lee, Hsieh & Lee 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from localize.heads.base import ExitHead, Head, HeadOutput, HeadSite, Method, TaskHead, one_of
from localize.heads.layers import (
    check_batch_first,
    check_hidden,
    convolution,
    is_dense,
    linear_exit,
    output_features,
    to_logits,
)
from localize.heads.pooling import (
    MAX_FEATURES,
    TOKEN_POOLS,
    AsMap,
    GlobalMean,
    PoolTo,
    TokenPool,
    is_map,
    space,
)

_WIDTH = 128  # channels of the critic's convolution
# "auto" flattens as the paper does up to CIFAR-10's largest critic: 32·32 positions, 32·32·128·10 weights.
_SMALL_MAP, _SMALL_LINEAR = 32 * 32, 2**21


class Critic(ExitHead):
    """c_k: estimates what the loss will be at the top, from hidden state k."""

    def __init__(self, site: HeadSite, net: nn.Module) -> None:
        super().__init__(site, net, per_sample=True)

    def feedback_loss(self, output: HeadOutput, feedback: Tensor) -> Tensor:
        """Equation 5: mean over samples of |ℓ_{k+1} − ℓ_k|, ``feedback`` being ℓ_{k+1} (N), detached."""
        if output.per_sample is None:
            raise ValueError("a critic's output holds the loss of every sample")
        return (feedback.detach() - output.per_sample).abs().mean()


@dataclass(frozen=True)
class LCT(Method):
    """Part k < K is trained by the loss its critic predicts, and the critic by the loss further up.

        ℓ_k = CE(c_k(h_k), y) a sample,   ℓ_K = CE(model output, y)     (equation 1)
        part k:    ∂ mean(ℓ_k) / ∂h_k                                   (equation 2)
        critic k:  mean over samples of |ℓ_{k+1} − ℓ_k|, ℓ_{k+1} fixed  (equation 5)

    A critic never learns from labels but through ℓ_{k+1}, which part k + 1 hands back (feedback "loss"). All
    gradients are taken at the old weights. Critics have an optimizer of their own, Adam at 1e-4.

    Args:
        critic: ``conv`` (CIFAR: 3×3 convolution to 128 channels without bias, ReLU, flatten, Linear),
            ``imagenet`` (3×3→64, 3×3→64, 1×1→classes, averaged), ``linear`` (averaged, Linear; a Linear a
            token for ``causal_lm``), ``auto``: ``conv`` on maps, else ``linear``.
        pool: ``flatten`` is the paper's ``conv`` critic; ``auto`` too up to 32×32 positions and 2²¹ weights in
            its Linear, beyond that the map is first averaged so that 8192 values remain to flatten.
        token_pool: how tokens become a vector: ``mean``, the ``first`` (a class token), the ``last``; ``auto``: the
            final state where a recurrent layer made them, else the mean.
    """

    critic: Literal["auto", "conv", "imagenet", "linear"] = "auto"
    pool: Literal["auto", "flatten"] = "auto"
    token_pool: TokenPool = "auto"

    name: ClassVar[str] = "lct"
    summary: ClassVar[str] = "local critic training: a critic a part estimates the final loss"
    source: ClassVar[str] = "Lee, Hsieh & Lee 2021"
    feedback: ClassVar[Literal["loss", "grad"] | None] = "loss"
    separate_head_optimizer: ClassVar[bool] = True
    head_learning_rate: ClassVar[float | None] = 1e-4
    predicts: ClassVar[Literal["none", "exits", "path"]] = "exits"

    def __post_init__(self) -> None:
        self.check(
            one_of("critic", self.critic, ("auto", "conv", "imagenet", "linear")),
            one_of("pool", self.pool, ("auto", "flatten")),
            one_of("token_pool", self.token_pool, TOKEN_POOLS),
        )

    def build_head(self, site: HeadSite) -> Head:
        """The critic of a part below the last; on the last part the model's own output, a loss a sample."""
        if site.task.loss_fn is not None and site.parts > 1:
            raise site.error(
                self.name,
                "critics compare losses sample by sample, and a custom loss gives one number a batch",
                "Leave `loss` out, or use nwise, early_exit, joint or bp.",
            )
        if site.parts > 1:
            check_batch_first(site, self.name, "critics compare losses sample by sample")
        if site.is_last:
            return TaskHead(site, per_sample=site.parts > 1)
        check_hidden(site, self.name)
        kind = self.critic
        if kind == "auto":
            kind = "conv" if is_map(site.hidden) and not is_dense(site) else "linear"
        if kind == "linear":
            return Critic(site, linear_exit(site, self.name, token_pool=self.token_pool))
        if not is_map(site.hidden) or is_dense(site):
            problem = f"critic={kind!r} makes one prediction a sample, from a map (N, C, H, W)"
            raise site.error(self.name, problem, "Use lct with critic='linear' or 'auto'.")
        return Critic(site, self._conv(site) if kind == "conv" else _imagenet(site, self.name))

    def _conv(self, site: HeadSite) -> nn.Module:
        channels, sizes = site.hidden.channels, space(site.hidden)
        weights = _WIDTH * math.prod(sizes) * output_features(site, self.name)
        small = math.prod(sizes) <= _SMALL_MAP and weights <= _SMALL_LINEAR
        whole = small or self.pool == "flatten"
        pool = PoolTo(_WIDTH, sizes, None if whole else MAX_FEATURES)
        return nn.Sequential(
            AsMap(site.hidden),
            pool,
            convolution(len(sizes), channels, _WIDTH, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            to_logits(site, self.name, pool.out_features),
        )


def _imagenet(site: HeadSite, method: str) -> nn.Module:
    """Section V: two convolutions with ReLU, and one to the classes, averaged.

    The 1×1 convolution and the average commute, so the average comes first: the same function for less.
    """
    axes = len(space(site.hidden))
    return nn.Sequential(
        AsMap(site.hidden),
        nn.Sequential(convolution(axes, site.hidden.channels, 64), nn.ReLU()),
        nn.Sequential(convolution(axes, 64, 64), nn.ReLU()),
        GlobalMean(),
        to_logits(site, method, 64),
    )
