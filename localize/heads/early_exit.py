"""Early exits trained locally: a classifier a part, each part learns from its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead, one_of, positive
from localize.heads.layers import linear_exit
from localize.heads.pooling import TOKEN_POOLS, TokenPool


@dataclass(frozen=True)
class EarlyExit(Method):
    """Greedy local learning with the smallest heads: the loss of part k is the task's loss of

        ŷ_k = W_k · mean_space(h_k) + c_k

    and trains part k alone (reach 1). The baseline of SCPL's Table 7.
    Tokens are averaged over T (or see ``token_pool``), and classified one by one where the task is ``causal_lm``.

    Args:
        hidden: width of one hidden layer (Linear–ReLU) in each classifier; 0 for none.
        token_pool: how tokens become a vector: ``mean``, the ``first`` (a class token), the ``last``; ``auto``: the
            final state where a recurrent layer made them, else the mean.
    """

    hidden: int = 0
    token_pool: TokenPool = "auto"

    name: ClassVar[str] = "early_exit"
    summary: ClassVar[str] = "a classifier on every part, each part trained by its own"
    source: ClassVar[str] = "Teerapittayanon et al. 2016; Belilovsky et al. 2019"
    predicts: ClassVar[Literal["none", "exits", "path"]] = "exits"

    def __post_init__(self) -> None:
        self.check(
            positive("hidden", self.hidden, whole=True) if self.hidden != 0 else None,
            one_of("token_pool", self.token_pool, TOKEN_POOLS),
        )

    def build_head(self, site: HeadSite) -> Head:
        """A linear classifier on the averaged hidden state; on the last part the model's own output."""
        if site.is_last:
            return TaskHead(site)
        return ExitHead(site, linear_exit(site, self.name, width=self.hidden, token_pool=self.token_pool))
