"""Small models of every kind. Each test that takes a case from here runs on every method by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
BATCH = 8


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]  # without the batch
    tokens: bool = False
    parts: int = 3

    def inputs(self, batch: int = BATCH, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(0, 11, (batch, *self.input_shape), generator=g)
        return torch.randn(batch, *self.input_shape, generator=g)

    def targets(self, batch: int = BATCH, seed: int = 0) -> Tensor:
        return torch.randint(0, CLASSES, (batch,), generator=torch.Generator().manual_seed(seed + 100))

    def __str__(self) -> str:
        return self.name


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    )


def cnn() -> nn.Module:
    """Batch norm and in-place activations."""
    layers: list[nn.Module] = []
    for i, o in ((2, 8), (8, 8), (8, 12), (12, 12)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES))


class Residual(nn.Module):
    """Blocks with a skip, in-place addition and one activation module called twice."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            y += x
            return self.relu(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[self.Block(8) for _ in range(3)])
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1), 1))


class LongSkip(nn.Module):
    """The stem's output is used by every part: a value that crosses all boundaries, summed from many sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(5)])
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.tanh(self.stem(x))
        h = stem
        for layer in self.layers:
            h = torch.relu(layer(h)) + 0.5 * stem + h
        return self.head(h * stem)


class Dropouts(nn.Module):
    """Dropout as a module and as a function that is given ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.a(x)))
        x = F.dropout(torch.relu(self.b(x)), 0.2, self.training)
        return self.d(F.dropout(torch.relu(self.c(x)), p=0.2, training=self.training))


class Encoder(nn.Module):
    """Token ids, positions, transformer layers, mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 9, 8) * 0.1)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True) for _ in range(3)]
        )
        self.norm = nn.LayerNorm(8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return self.classifier(self.norm(h).mean(1))


class Dense(nn.Module):
    """Every layer reads all earlier ones, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(2 + 4 * i, 4, 3, padding=1) for i in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(2 + 4 * i) for i in range(4)])
        self.fc = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


class TrainOnlyBranch(nn.Module):
    """An auxiliary output in train mode only, as in GoogLeNet: two graphs over one parameter set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.aux, self.out = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.relu(self.a(x))
        aux = self.aux(h) if self.training else None
        h = torch.relu(self.c(torch.relu(self.b(h))))
        return (self.out(h), aux) if aux is not None else self.out(h)


class ShapeArithmetic(nn.Module):
    """Sizes read from tensors and computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 9, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)[:, : c // 2]
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.view(x.size(0), -1))))


class ChannelsLast(nn.Module):
    """(N, H, W, C) inside, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 8, 2, stride=2)
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(3)])
        self.mixers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + F.gelu(mixer(norm(x)))
        return self.head(x.mean((1, 2)))


IMAGE = (2, 6, 6)
CASES = [
    Case("mlp", mlp, (6,)),
    Case("cnn", cnn, IMAGE),
    Case("residual", Residual, IMAGE),
    Case("long_skip", LongSkip, (6,), parts=4),
    Case("dropouts", Dropouts, (6,)),
    Case("encoder", Encoder, (7,), tokens=True),
    Case("dense", Dense, IMAGE),
    Case("train_only_branch", TrainOnlyBranch, (6,)),
    Case("shapes", ShapeArithmetic, IMAGE),
    Case("channels_last", ChannelsLast, IMAGE),
]
BY_NAME = {case.name: case for case in CASES}


def build(case: Case, seed: int = 0) -> nn.Module:
    """A model of the case with weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.build()
