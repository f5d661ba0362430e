"""`train_step` of SCPL against a hand-written loop of the paper's algorithm 2 on the same parts, interleaved.

    python benchmarks/overhead.py [--steps 40] [--threads 1]

The loop detaches each input, makes one loss a part and steps one optimizer a part; cross-entropy trains the
classifier on the detached last representation. Both do the same arithmetic on copies of one model; the losses of
both are compared, and the ratio is taken pair by pair (its median is the figure).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from localize import to_local
from localize.heads.scpl import supervised_contrastive_loss


def resnet18_cifar() -> nn.Module:
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def by_hand(parts, heads, optimizers, x, y):
    """Algorithm 2: what a paper's script would do."""
    losses = []
    hidden = x
    for k, (part, head, optimizer) in enumerate(zip(parts, heads, optimizers, strict=True), 1):
        last = k == len(parts)
        optimizer.zero_grad()
        hidden = part.run_hidden(hidden.detach()) if last else part(hidden.detach())
        loss = supervised_contrastive_loss(head.projector(head.reduce(hidden)), y)
        if last:
            loss = loss + F.cross_entropy(part.run_classifier(hidden.detach()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=16, help="of the images")
    parser.add_argument("--drop-grads", action="store_true", help="train_step(keep_grads=False)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.batch_size, 3, options.size, options.size)
    y = torch.randint(0, 10, (options.batch_size,))
    local = to_local(resnet18_cifar(), x[:2], method="scpl", cuts=["layer1", "layer2", "layer3"])
    other = copy.deepcopy(local)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1e-3)

    mine, theirs = local.optimizers(adam), other.optimizers(adam)
    parts, heads = list(other.parts), other.heads
    ratios, fast, slow = [], [], []
    for step in range(options.steps + 3):
        order = (0, 1) if step % 2 else (1, 0)
        seconds = [0.0, 0.0]
        for which in order:
            start = time.perf_counter()
            if which == 0:
                ours = local.train_step(x, y, mine, keep_grads=not options.drop_grads).losses
            else:
                reference = by_hand(parts, heads, theirs, x, y)
            seconds[which] = time.perf_counter() - start
        assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, reference, strict=True)), (ours, reference)
        if step >= 3:
            fast.append(seconds[0])
            slow.append(seconds[1])
            ratios.append(seconds[0] / seconds[1])
    same = all(torch.equal(p, q) for p, q in zip(local.parameters(), other.parameters(), strict=True))
    ours_ms, theirs_ms = 1e3 * statistics.median(fast), 1e3 * statistics.median(slow)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"train_step {ours_ms:.1f} ms, by hand {theirs_ms:.1f} ms (medians)")
    print(f"ratio {statistics.median(ratios):.3f} (median of {len(ratios)} pairs; quartiles {low:.3f} to {high:.3f})")
    print(f"weights after {options.steps + 3} steps equal bit for bit: {same}")


if __name__ == "__main__":
    main()
