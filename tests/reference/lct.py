"""Local critic training, by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor


def step(parts, heads, x: Tensor, y: Tensor) -> list[Tensor]:
    """Part k < K follows its critic's loss, critic k follows |ℓ_{k+1} − ℓ_k|; all at the old weights.

    ``heads``: critics, hidden → logits, for parts 1..K-1.
    """
    last = len(parts)
    each = {}  # losses of the samples, by part number, with their graphs
    carried = x
    for k in range(1, last + 1):
        hidden = parts[k - 1](carried.detach())
        leaf = hidden.detach().requires_grad_()
        logits = leaf if k == last else heads[k - 1](leaf)
        each[k] = F.cross_entropy(logits, y, reduction="none")
        # Equation 2, for part k alone: the critic's weights take nothing from cross-entropy.
        (delta,) = torch.autograd.grad(each[k].mean(), leaf, retain_graph=True)
        hidden.backward(delta)
        carried = hidden
    for k in range(1, last):
        # Equation 5, for critic k alone.
        loss = (each[k + 1].detach() - each[k]).abs().mean()
        weights = list(heads[k - 1].parameters())
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = grad.clone() if weight.grad is None else weight.grad + grad
    return [each[k].detach().mean() for k in range(1, last + 1)]
