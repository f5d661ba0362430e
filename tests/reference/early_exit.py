"""A classifier a part, each part trained by its own, by hand."""

import torch.nn.functional as F
from torch import Tensor


def step(parts, heads, x: Tensor, y: Tensor) -> list[Tensor]:
    """``heads``: hidden → logits for parts 1..K-1 (what stands at K is not used: the last part gives logits)."""
    losses = []
    hidden = x
    for k, part in enumerate(parts, start=1):
        hidden = part(hidden.detach())
        logits = hidden if k == len(parts) else heads[k - 1](hidden)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        losses.append(loss.detach())
    return losses
