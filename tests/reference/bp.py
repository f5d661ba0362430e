"""End-to-end back-propagation, by hand."""

import torch.nn.functional as F
from torch import Tensor


def step(parts, x: Tensor, y: Tensor) -> list[Tensor]:
    """Leaves in every part the gradient of the one cross-entropy at the top."""
    hidden = x
    for part in parts:
        hidden = part(hidden)
    loss = F.cross_entropy(hidden, y)
    loss.backward()
    return [loss.detach()]
