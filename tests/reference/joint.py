"""All exits' losses summed and back-propagated end to end, by hand."""

import torch.nn.functional as F
from torch import Tensor


def step(parts, heads, x: Tensor, y: Tensor, exit_weight: float = 1.0) -> list[Tensor]:
    """``heads``: hidden → logits for parts 1..K-1."""
    losses = []
    hidden = x
    for k, part in enumerate(parts, start=1):
        hidden = part(hidden)
        if k < len(parts):
            losses.append(exit_weight * F.cross_entropy(heads[k - 1](hidden), y))
        else:
            losses.append(F.cross_entropy(hidden, y))
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    total.backward()
    return [loss.detach() for loss in losses]
