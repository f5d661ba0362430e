"""A small residual network for digits: what a file for `localize convert` may look like.

It classifies images with one channel, 8×8 as well as 28×28, and has six blocks to cut between.

    localize convert examples/model.py --method al --parts 4
"""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut; halves the image when ``stride`` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallNet(nn.Module):
    """Stem, six blocks of growing width, global average, classifier. (N, 1, H, W) → (N, classes)."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            Block(width, width),
            Block(width, width),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 2 * width),
            Block(2 * width, 4 * width, stride=2),
            Block(4 * width, 4 * width),
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks(self.stem(images))
        return self.classifier(hidden.mean((2, 3)))


def build_model() -> nn.Module:
    return SmallNet()


example_inputs = torch.zeros(2, 1, 8, 8)
