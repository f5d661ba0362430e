"""What every test can rely on."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # tiny models; several test processes may share the machine
