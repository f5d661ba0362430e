"""N-wise interlocking back-propagation, by hand: one ``autograd.grad`` a loss and part."""

import torch
import torch.nn.functional as F
from torch import Tensor


def step(parts, heads, x: Tensor, y: Tensor, reach: int = 2, gradient: str = "furthest") -> list[Tensor]:
    """Part k takes the gradient of L_min(k+N-1, K) (``furthest``), or of L_k … L_min(k+N-1, K) (``sum``).

    Head k takes the gradient of L_k. ``heads``: hidden → logits for parts 1..K-1.
    """
    last = len(parts)
    losses = {}  # by part number; the graph goes all the way down, and autograd.grad picks what is wanted
    hidden = x
    for k in range(1, last + 1):
        hidden = parts[k - 1](hidden)
        logits = hidden if k == last else heads[k - 1](hidden)
        losses[k] = F.cross_entropy(logits, y)
    for k in range(1, last + 1):
        furthest = min(k + reach - 1, last)
        nearest = furthest if gradient == "furthest" else k
        for j in range(nearest, furthest + 1):
            _add_gradient(losses[j], parts[k - 1])
        if k < last:
            _add_gradient(losses[k], heads[k - 1])
    return [losses[k].detach() for k in range(1, last + 1)]


def _add_gradient(loss: Tensor, module) -> None:
    weights = [p for p in module.parameters() if p.requires_grad]
    if not weights:
        return
    for weight, grad in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
        weight.grad = grad.clone() if weight.grad is None else weight.grad + grad
