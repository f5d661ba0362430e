"""Associated Learning, by hand: one ``autograd.grad`` a loss and module."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Associated:
    """What stands beside part k: ``reduce`` s_k → vector, ``encoder`` g, ``decoder`` h, ``bridge`` b."""

    reduce: nn.Module
    encoder: nn.Module
    decoder: nn.Module
    bridge: nn.Module


def step(
    parts, heads: list[Associated], x: Tensor, y: Tensor, classes: int, classifier=None, target_gradient=False
) -> list[Tensor]:
    """L_A trains f_k and b_k (g_k too with ``target_gradient``), L_AE trains g_k and h_k.

    The last part gives the representation; ``classifier`` is trained by cross-entropy on its detached value.
    """
    losses = []
    s = x
    t = torch.zeros(len(y), classes, dtype=next(parts[0].parameters()).dtype)
    for i in range(len(y)):
        t[i, y[i]] = 1
    for k, (part, head) in enumerate(zip(parts, heads, strict=True), start=1):
        below = t.detach()
        s = part(s.detach())
        t = head.encoder(below)
        bridged = head.bridge(head.reduce(s))
        association = ((bridged - t) ** 2).sum() / bridged.numel()
        decoded = head.decoder(t)
        squares = (decoded - below) ** 2
        reconstruction = F.cross_entropy(decoded, y) if k == 1 else squares.sum() / below.numel()
        _add_gradient(association, part)
        _add_gradient(association, head.bridge)
        if target_gradient:
            _add_gradient(association, head.encoder)
        _add_gradient(reconstruction, head.encoder)
        _add_gradient(reconstruction, head.decoder)
        losses.append((association + reconstruction).detach())
    if classifier is not None:
        loss = F.cross_entropy(classifier(s.detach()), y)
        _add_gradient(loss, classifier)
        losses[-1] = losses[-1] + loss.detach()
    return losses


def predict(parts, heads: list[Associated], x: Tensor, exit: int) -> Tensor:
    """Logits of the path f_1 … f_exit, b_exit, h_exit … h_1."""
    for part in parts[:exit]:
        x = part(x)
    code = heads[exit - 1].bridge(heads[exit - 1].reduce(x))
    for k in range(exit, 0, -1):
        code = heads[k - 1].decoder(code)
    return code


def _add_gradient(loss: Tensor, module: nn.Module) -> None:
    weights = [p for p in module.parameters() if p.requires_grad]
    if not weights:
        return
    for weight, grad in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
        weight.grad = grad.clone() if weight.grad is None else weight.grad + grad
