"""A model of one's own: control flow, a skip across parts, several inputs, cuts chosen by name.

python examples/own_model.py --epochs 5
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from localize import Trainer, to_local
from localize.data import load_data


class TwoPaths(nn.Module):
    """A convolutional path and a dense one that meet at the end: the skip crosses every cut between them."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor, brightness: float = 1.0) -> Tensor:
        if brightness != 1.0:  # plain Python: it just runs while the model is recorded
            images = images * brightness
        side = self.dense(images)
        hidden = images
        for layer in (self.first, self.second, self.third):
            hidden = torch.relu(layer(hidden))
        return self.classifier(torch.cat([hidden.mean((2, 3)), side], dim=1))


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
arguments = parser.parse_args()

torch.manual_seed(0)
data = load_data("digits")
train, val = data.loaders(batch_size=64)

# Cut where you like: after these modules. Leave `cuts` out and say `parts=3` to have the parts balanced.
local = to_local(TwoPaths(), data.example(), method="nwise", cuts=["first", "second"])
print(local.plan)
for boundary in local.plan.boundaries:
    print(f"after {boundary.name}: {', '.join(boundary.crossing)} cross, {boundary.crossing_bytes:,} bytes")

Trainer(local, optimizer=partial(torch.optim.Adam, lr=2e-3)).fit(train, val, epochs=arguments.epochs)
images, labels = next(iter(val))
print(f"accuracy {(local.predict(images).argmax(1) == labels).float().mean():.3f} on one batch")

# Or train it with any loop that knows nothing of parts: one isolated loss a part, and a joint backward.
optimizer = torch.optim.Adam(local.parameters(), lr=1e-3)
images, labels = next(iter(train))
losses = local.train().losses(images, labels)
optimizer.zero_grad()
sum(losses).backward()
optimizer.step()
print("losses by part:", ", ".join(f"{float(loss):.3f}" for loss in losses))
