"""Supervised Contrastive Parallel Learning, by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.1, normalizer: str = "reference"
) -> Tensor:
    """The loss as a double loop over anchors and positives. embeddings (N, D), labels (N)."""
    n = len(labels)
    z = [row / row.square().sum().sqrt() for row in embeddings]
    s = [[(z[i] * z[j]).sum() / temperature for j in range(n)] for i in range(n)]
    total = embeddings.sum() * 0
    for i in range(n):
        positives = [p for p in range(n) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        row_maximum = max(s[i][a].item() for a in range(n) if a != i)
        denominator = sum(torch.exp(s[i][a] - row_maximum) for a in range(n) if a != i)
        anchor = embeddings.sum() * 0
        for p in positives:
            anchor = anchor + (s[i][p] - row_maximum) - torch.log(denominator)
        count = len(positives) + 1 if normalizer == "reference" else len(positives)
        total = total - anchor / count
    return total / n


def step(
    parts,
    projections,
    x: Tensor,
    y: Tensor,
    classifier=None,
    temperature: float = 0.1,
    normalizer: str = "reference",
    classifier_gradient: str = "detached",
) -> list[Tensor]:
    """The last part gives the representation, ``classifier`` its logits; without one, logits and no contrast.

    ``projections``: hidden → embeddings (N, D), one a part.
    """
    losses = []
    hidden = x
    for k, part in enumerate(parts, start=1):
        hidden = part(hidden.detach())
        if k == len(parts) and classifier is None:
            loss = F.cross_entropy(hidden, y)
        else:
            loss = contrastive_loss(projections[k - 1](hidden), y, temperature, normalizer)
        if k == len(parts) and classifier is not None:
            below = hidden.detach() if classifier_gradient == "detached" else hidden
            loss = loss + F.cross_entropy(classifier(below), y)
        loss.backward()
        losses.append(loss.detach())
    return losses
