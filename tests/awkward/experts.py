"""Mixtures of experts: who computes what depends on values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.awkward.base import C, D, block, root


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(4)])


@block()
class ExpertsByWhere(Experts):
    """Top-k routing with ``torch.where`` per expert and ``index_add_``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


@block()
class ExpertsByCounts(Experts):
    """Sorted rows are split by ``.tolist()`` of the counts; empty experts are left out."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=4).tolist()
        pieces = x[order].split(counts)
        done = [expert(rows) for expert, rows in zip(self.experts, pieces, strict=True) if rows.shape[0]]
        return torch.empty_like(x).index_copy(0, order, torch.cat(done)) * weights[:, None]


@block()
class ExpertsHit(Experts):
    """Only the experts that were hit run: ``for i in mask.nonzero()``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        mask = nn.functional.one_hot(chosen, 4).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for i in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, rows = torch.where(mask[i[0]])
            out.index_add_(0, rows, self.experts[int(i[0])](x[rows]) * weights[rows, place, None])
        return out


@root()
class ExpertsAtRoot(Experts):
    """Dense routing in the root, all experts run; the load is returned beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        scores = self.gate(x).softmax(-1)
        mixed = torch.einsum("ned,ne->nd", torch.stack([expert(x) for expert in self.experts], 1), scores)
        return self.last(mixed), (scores.mean(0) * scores.argmax(-1).bincount(minlength=4)).sum()


@root(refused="value|nonzero|fails", guarded="value|specialised")
class RowsPerExpertAtRoot(ExpertsAtRoot):
    """The root itself leaves out experts that nobody chose."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.relu(self.first(x))
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if rows.numel() == 0:
                continue
            out = out.index_add(0, rows, expert(x[rows]))
        return self.last(out)


@root()
class BatchedExperts(nn.Module):
    """All experts in one parameter, used by gather and ``bmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(D, D), nn.Linear(D, 4), nn.Linear(D, C)
        self.weights = nn.Parameter(torch.randn(4, D, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        scores, chosen = self.gate(x).softmax(-1).max(-1)
        x = torch.bmm(x[:, None], self.weights[chosen]).squeeze(1) * scores[:, None]
        return self.last(torch.relu(x))
