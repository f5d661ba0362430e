"""The same script in one process or in several, a part each, with the same weights at the end.

python examples/several_ranks.py
torchrun --nproc-per-node 2 examples/several_ranks.py
"""

import argparse
import os
from functools import partial

import torch
from model import build_model

from localize import Trainer, to_local
from localize.data import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="scpl")
parser.add_argument("--epochs", type=int, default=3)
arguments = parser.parse_args()

# Every process builds the same model: it needs the same seed before it does.
torch.manual_seed(0)
data = load_data("digits")
train, val = data.loaders(batch_size=64)
local = to_local(build_model(), data.example(), method=arguments.method, parts=2)

# Every process makes the same calls. Only the first reads data; scores are the same on all.
trainer = Trainer(
    local,
    optimizer=partial(torch.optim.Adam, lr=2e-3),
    executor="distributed" if "RANK" in os.environ else "sequential",
)
trainer.fit(train, val, epochs=arguments.epochs)
scores = trainer.evaluate(val)

# The first process has all weights again, and so it is the one that saves or shows something.
if os.environ.get("RANK", "0") == "0":
    checksum = sum(float(p.detach().double().abs().sum()) for p in local.parameters())
    print(f"accuracy {scores['accuracy']:.4f}, sum of absolute weights {checksum:.9f}")
