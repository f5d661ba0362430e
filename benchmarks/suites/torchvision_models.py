"""Every classification, segmentation and video model of torchvision, on the smallest inputs that each takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn
from torchvision.models import segmentation, video
from torchvision.models.video import mvit

from benchmarks.suites import Case

SIZES = {"inception_v3": 299, "maxvit_t": 224}  # images, squares of so many pixels; the others take 64
CLIPS = {"s3d": (16, 224), "mvit_v1_b": (8, 64), "mvit_v2_s": (8, 64)}  # frames and pixels; the others: 8 of 32
BATCH = 2
_OPTIONS = {"weights": None}


def names() -> list[str]:
    """The models' names: classification, then segmentation, then video."""
    groups = (torchvision.models, segmentation, video)
    return [name for group in groups for name in torchvision.models.list_models(module=group)]


def build(name: str) -> Case:
    """The model ``name`` with random weights and two samples."""
    torch.manual_seed(0)
    if name in torchvision.models.list_models(module=video):
        frames, size = CLIPS.get(name, (8, 32))
        with _mvit_of(frames, size):
            model = torchvision.models.get_model(name, **_OPTIONS)
        return Case(model, torch.randn(BATCH, 3, frames, size, size), torch.tensor([1, 7]), "classification")
    size = SIZES.get(name, 64)
    if name in torchvision.models.list_models(module=segmentation):
        model = torchvision.models.get_model(name, weights_backbone=None, **_OPTIONS)
        return Case(model, torch.randn(BATCH, 3, size, size), torch.randint(21, (BATCH, size, size)), "segmentation")
    options: dict[str, object] = dict(_OPTIONS)
    if name.startswith("vit_"):
        size = 2 * int(name.rpartition("_")[2])  # four patches
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # scipy's truncated normal takes a minute
    model = torchvision.models.get_model(name, **options)
    return Case(model, torch.randn(BATCH, 3, size, size), torch.tensor([1, 7]), "classification")


@contextmanager
def _mvit_of(frames: int, size: int) -> Iterator[None]:
    """Multiscale vision transformers are made for clips of one size, which torchvision fixes; here it is another."""
    made = mvit._mvit

    def smaller(**options: Any) -> nn.Module:
        return made(**{**options, "temporal_size": frames, "spatial_size": (size, size)})

    with mock.patch.object(mvit, "_mvit", smaller):
        yield
