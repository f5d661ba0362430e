"""Example inputs for a model that came without any: what the model says of itself, else a search.

The search tries the usual sizes for the first layer under fake tensors, so nothing is computed and nothing of
the model changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localize.convert.restore import preserved
from localize.errors import ConfigError

BATCH = 2  # the smallest batch that BatchNorm accepts in train mode
_IMAGE_SIZES = (32, 28, 224, 64, 8, 16, 96, 128, 256, 299, 384, 512)
_LIBRARY_SIZES = (224, 299, *_IMAGE_SIZES)  # torchvision's and timm's models are made for ImageNet
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Inferred:
    """Example inputs and where they come from, for the report."""

    inputs: Any
    note: str


def infer_example(model: nn.Module) -> Inferred:
    """Example inputs for ``model``.

    Raises:
        ConfigError: nothing fits; the message says what to pass.
    """
    for inferred in _declared(model):
        return inferred
    tried: list[str] = []
    for candidate, origin in _candidates(model):
        tried.append(str(tuple(candidate.shape)))
        if _fits(model, candidate):
            return Inferred(candidate, f"example inputs {tuple(candidate.shape)} inferred from {origin}")
    some = f" Tried inputs of shape {', '.join(dict.fromkeys(tried[:12]))}." if tried else ""
    raise ConfigError(
        f"Cannot guess what {type(model).__name__} takes.{some} Pass example_inputs=: a tensor, a tuple of positional "
        "or a dict of keyword arguments for the model's forward, with a batch of 2 or more "
        "(command line: --input-shape 3x32x32)."
    )


def _declared(model: nn.Module) -> Iterator[Inferred]:
    """What the model says of itself: Lightning, timm and transformers each have a place for it."""
    array = getattr(model, "example_input_array", None)
    if array is not None:
        yield Inferred(array, "example inputs from example_input_array")
    for attribute in ("default_cfg", "pretrained_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if size:
            yield Inferred(torch.randn(BATCH, *size), f"example inputs of size {tuple(size)} from {attribute}")
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict):
        yield Inferred(dict(dummy), "example inputs from dummy_inputs")


def _candidates(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Inputs for the first layers of the model, the usual sizes first. A first layer may be registered late."""
    library = type(model).__module__.startswith(("torchvision.", "timm."))
    for name, layer in model.named_modules():
        origin = f"layer {name or 'the model itself'!r} ({type(layer).__name__})"
        for shape in _shapes_for(layer, _LIBRARY_SIZES if library else _IMAGE_SIZES):
            yield torch.randn(shape), origin
        if isinstance(layer, nn.Embedding):
            for length in _LENGTHS:
                yield torch.arange(BATCH * length).remainder(layer.num_embeddings).view(BATCH, length), origin


def _shapes_for(layer: nn.Module, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    match layer:
        case nn.Linear():
            yield (BATCH, layer.in_features)
            yield from ((BATCH, length, layer.in_features) for length in _LENGTHS[:2])
        case nn.Conv1d():
            yield from ((BATCH, layer.in_channels, length) for length in _LENGTHS)
        case nn.Conv2d():
            yield from ((BATCH, layer.in_channels, size, size) for size in dict.fromkeys(sizes))
        case nn.Conv3d():
            yield from ((BATCH, layer.in_channels, 16, size, size) for size in (32, 112, 64))
        case nn.RNNBase():
            yield from ((BATCH, length, layer.input_size) for length in _LENGTHS[:2])


def _fits(model: nn.Module, candidate: Tensor) -> bool:
    """Whether the model's forward takes ``candidate``, on fake tensors and in eval mode."""
    with preserved(model, training=False), torch.no_grad(), _silent("torch._subclasses.fake_tensor"):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                model(mode.from_tensor(candidate))
        except Exception:
            return False
    return True


@contextmanager
def _silent(logger_name: str) -> Iterator[None]:
    """Keeps a library from logging the failures that a search is made of."""
    logger = logging.getLogger(logger_name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
