"""A method of one's own in one file: similarity matching, registered from outside the package.

Every part learns from its prediction and from how alike its samples look: two images of one class should
have similar hidden states (Nøkland and Eidnes, "Training neural networks with local error signals", 2019).

    python examples/own_method.py --epochs 10
    localize methods simmatch --import examples/own_method.py
    localize train examples/model.py --import examples/own_method.py --method simmatch --share 0.5 --parts 4
"""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from model import build_model
from torch import Tensor

from localize import Trainer, register_method, to_local
from localize.data import load_data
from localize.heads.base import ExitHead, HeadOutput, HeadSite, Method, TaskHead
from localize.heads.layers import linear_exit


def similarity(rows: Tensor) -> Tensor:
    """Cosine similarity of all pairs of rows, means removed: (N, D) → (N, N)."""
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return rows @ rows.T


class SimilarityHead(ExitHead):
    """A linear classifier, and the distance between the hidden states' similarities and the labels'."""

    share: float

    def forward(self, hidden: Tensor, target: Tensor) -> HeadOutput:
        predicted = super().forward(hidden, target)
        features = hidden.std((2, 3)) if hidden.dim() == 4 else hidden.flatten(1)
        wanted = similarity(F.one_hot(target, self.site.task.num_classes).float())
        alike = F.mse_loss(similarity(features), wanted)
        loss = (1 - self.share) * predicted.loss + self.share * alike
        return HeadOutput(loss, logits=predicted.logits)


@register_method
@dataclass(frozen=True)
class SimilarityMatching(Method):
    share: float = 0.9  # of the similarity loss; the rest is cross-entropy

    name: ClassVar[str] = "simmatch"
    summary: ClassVar[str] = "similarity matching beside a linear classifier, each part on its own"
    source: ClassVar[str] = "Nøkland and Eidnes 2019"
    predicts: ClassVar[str] = "exits"

    def build_head(self, site: HeadSite) -> ExitHead | TaskHead:
        if site.is_last:
            return TaskHead(site)
        head = SimilarityHead(site, linear_exit(site, self.name))
        head.share = self.share
        return head


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    data = load_data("digits")
    train, val = data.loaders(batch_size=64)
    local = to_local(build_model(), data.example(), method=SimilarityMatching(share=0.5), parts=4)
    Trainer(local, optimizer=partial(torch.optim.Adam, lr=2e-3)).fit(train, val, epochs=epochs)
    images, labels = next(iter(val))
    for exit in local.exits:
        accuracy = (local.predict(images, exit=exit.number).argmax(1) == labels).float().mean()
        print(f"exit {exit.number}: accuracy {accuracy:.3f} on one batch")
