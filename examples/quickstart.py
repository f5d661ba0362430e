"""Quickstart: a network for digits, trained by Associated Learning in four parts, and all its exits.

python examples/quickstart.py --epochs 10
"""

import argparse
from functools import partial

import torch
from model import build_model

from localize import Trainer, to_local
from localize.data import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="al")
parser.add_argument("--epochs", type=int, default=10)
arguments = parser.parse_args()

torch.manual_seed(0)
data = load_data("digits")
train, val = data.loaders(batch_size=64)

# 1. Cut the model into four parts of equal cost, each with a head of its own.
model = build_model()
local = to_local(model, data.example(), method=arguments.method, parts=4)
print(local.plan)

# 2. Train it: every part learns from its own loss, no gradient passes between parts.
trainer = Trainer(local, optimizer=partial(torch.optim.Adam, lr=2e-3))
trainer.fit(train, val, epochs=arguments.epochs)

# 3. One training run, several models: each exit is a network of its own, smaller than the next.
images, labels = next(iter(val))
for exit in local.exits:
    accuracy = (local.predict(images, exit=exit.number).argmax(1) == labels).float().mean()
    print(f"exit {exit.number}: {exit.parameters:,} parameters, accuracy {accuracy:.3f} on one batch")

# 4. The parameters are the model's own: `model` is trained, too, and knows nothing of localize.
assert local.to_standard() is model
