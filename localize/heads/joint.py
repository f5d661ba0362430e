"""Early exits trained jointly: all exits' losses, back-propagated end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from localize.heads.base import ExitHead, Head, HeadSite, Method, TaskHead, positive
from localize.heads.layers import linear_exit


@dataclass(frozen=True)
class Joint(Method):
    """Deep supervision: one model trained by the sum of all exits' losses,

        L = L_K + w · Σ_{k<K} L_k,

    each of which reaches all parts below it (reach K): part k is trained by L_k … L_K. The heads are those of
    ``early_exit``. LCT's Table IV compares with it.

    Args:
        hidden: width of one hidden layer (Linear–ReLU) in each classifier; 0 for none.
        exit_weight: w, the weight of the exits below the last.
    """

    hidden: int = 0
    exit_weight: float = 1.0

    name: ClassVar[str] = "joint"
    summary: ClassVar[str] = "all exits' losses summed and back-propagated end to end"
    source: ClassVar[str] = "Teerapittayanon et al. 2016 (BranchyNet)"
    reach = None
    predicts: ClassVar[Literal["none", "exits", "path"]] = "exits"

    def __post_init__(self) -> None:
        self.check(
            positive("hidden", self.hidden, whole=True) if self.hidden != 0 else None,
            positive("exit_weight", self.exit_weight),
        )

    def build_head(self, site: HeadSite) -> Head:
        """A linear classifier on the averaged hidden state; on the last part the model's own output."""
        if site.is_last:
            return TaskHead(site)
        return ExitHead(site, linear_exit(site, self.name, width=self.hidden), weight=self.exit_weight)
