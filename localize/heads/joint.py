"""Early exits trained jointly: all exits' losses, back-propagated end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead, one_of, positive
from localize.heads.layers import linear_exit
from localize.heads.pooling import TOKEN_POOLS, TokenPool


@dataclass(frozen=True)
class Joint(Method):
    """Deep supervision: one model trained by the sum of all exits' losses,

        L = L_K + w · Σ_{k<K} L_k,

    each of which reaches all parts below it (reach K): part k is trained by L_k … L_K. The heads are those of
    ``early_exit``. LCT's Table IV compares with it.

    Args:
        hidden: width of one hidden layer (Linear–ReLU) in each classifier; 0 for none.
        exit_weight: w, the weight of the exits below the last.
        token_pool: how tokens become a vector: ``mean``, the ``first`` (a class token), the ``last``; ``auto``: the
            final state where a recurrent layer made them, else the mean.
    """

    hidden: int = 0
    exit_weight: float = 1.0
    token_pool: TokenPool = "auto"

    name: ClassVar[str] = "joint"
    summary: ClassVar[str] = "all exits' losses summed and back-propagated end to end"
    source: ClassVar[str] = "Teerapittayanon et al. 2016 (BranchyNet)"
    reach = None
    predicts: ClassVar[Literal["none", "exits", "path"]] = "exits"

    def __post_init__(self) -> None:
        self.check(
            positive("hidden", self.hidden, whole=True) if self.hidden != 0 else None,
            positive("exit_weight", self.exit_weight),
            one_of("token_pool", self.token_pool, TOKEN_POOLS),
        )

    def build_head(self, site: HeadSite) -> Head:
        """A linear classifier on the averaged hidden state; on the last part the model's own output."""
        if site.is_last:
            return TaskHead(site)
        net = linear_exit(site, self.name, width=self.hidden, token_pool=self.token_pool)
        return ExitHead(site, net, weight=self.exit_weight)
