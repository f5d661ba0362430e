"""Inputs that the first layers of a model would take: the usual sizes, for a search that tries them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn

BATCH = 2  # the smallest batch that BatchNorm accepts in train mode
_IMAGE_SIZES = (32, 28, 224, 64, 8, 16, 96, 128, 256, 299, 384, 512, 227, 84, 48, 160, 192, 4)
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 4000, 8000, 16000)
_SEQUENCES = _LENGTHS[:2]  # lengths for layers that take any
_CLIP = 16  # frames

_NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3} | {
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}


@dataclass(frozen=True)
class Guess:
    """One tensor to try: its shape, which axis is the batch, and the layer that it is for.

    ``ids`` is the number of rows of an embedding where the tensor holds indices into it, else 0.
    """

    shape: tuple[int, ...]
    layer: str
    batch_axis: int = 0
    ids: int = 0

    @property
    def key(self) -> tuple[tuple[int, ...], int, int]:
        """What is the same for guesses that need not both be tried."""
        return self.shape, self.batch_axis, self.ids

    def blank(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros with ``batch`` samples, for a trial."""
        shape = tuple(batch if i == self.batch_axis else s for i, s in enumerate(self.shape))
        return torch.zeros(shape, dtype=torch.int64 if self.ids else dtype, device=device)

    def tensor(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
        """The tensor with values: standard normal, or indices in turn."""
        if self.ids:
            count = torch.Size(self.shape).numel()
            return torch.arange(count, device=device).remainder(self.ids).view(self.shape)
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def guesses(model: nn.Module, limit: int) -> list[Guess]:
    """At most ``limit`` different guesses: all for the first layer that is registered, then one for each other
    layer (a first layer may be registered late), then the rest."""
    by_layer = [found for name, layer in model.named_modules() if (found := list(_for_layer(name, layer)))]
    by_layer += [list(_for_parameter(name, p)) for name, p in _bare_parameters(model)]
    first, others = by_layer[:1], by_layer[1:]
    ordered = chain(*first, *(found[:1] for found in others), *(found[1:] for found in others))
    return list(islice(unique(ordered), limit))


def unique(found: Iterable[Guess]) -> Iterator[Guess]:
    """Each guess once."""
    seen = set()
    for guess in found:
        if guess.key not in seen:
            seen.add(guess.key)
            yield guess


def _for_layer(name: str, layer: nn.Module) -> Iterator[Guess]:
    origin = f"layer {name or 'the model itself'!r} ({type(layer).__name__})"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        for length in _LENGTHS[:7]:
            yield Guess((BATCH, length), origin, ids=layer.num_embeddings)
        yield Guess((_LENGTHS[0], BATCH), origin, batch_axis=1, ids=layer.num_embeddings)
        yield Guess((BATCH,), origin, ids=layer.num_embeddings)
        return
    width = _width_of_sequence(layer)
    if width is not None and not getattr(layer, "batch_first", True):
        yield from (Guess((length, BATCH, width), origin, batch_axis=1) for length in _SEQUENCES)
    for shape in _shapes(layer):
        yield Guess((BATCH, *shape), origin)


def _width_of_sequence(layer: nn.Module) -> int | None:
    """The features of a token, for layers over sequences (N, T, D), or (T, N, D) where not ``batch_first``."""
    if isinstance(layer, nn.RNNBase):
        return int(layer.input_size)
    return layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else None


def _shapes(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes without the batch that a layer takes, the most usual first."""
    width = _width_of_sequence(layer)
    if width is not None:
        yield from ((length, width) for length in _SEQUENCES)
    match layer:
        case nn.Linear() | nn.Bilinear():
            yield from _vectors(layer.in_features if isinstance(layer, nn.Linear) else layer.in1_features)
        case nn.RNNCellBase():
            yield from _vectors(layer.input_size)
        case nn.modules.conv._ConvNd():
            yield from _maps(layer.in_channels, len(layer.kernel_size))
        case nn.LayerNorm() | nn.RMSNorm():
            yield tuple(layer.normalized_shape)
            yield from ((length, *layer.normalized_shape) for length in _SEQUENCES)
        case nn.GroupNorm():
            yield from _maps(layer.num_channels, 2)
        case nn.modules.batchnorm._NormBase():
            axes = next((n for kind, n in _NORMS.items() if isinstance(layer, kind)), 2)
            if axes == 1:
                yield (layer.num_features,)
            yield from _maps(layer.num_features, axes)


def _vectors(width: int) -> Iterator[tuple[int, ...]]:
    if not width:  # a lazy layer, of which nothing is known yet
        return
    yield (width,)
    yield from ((length, width) for length in _SEQUENCES)
    yield (8, 8, width)


def _maps(channels: int, axes: int) -> Iterator[tuple[int, ...]]:
    if not channels:
        return
    match axes:
        case 1:
            yield from ((channels, length) for length in _LENGTHS)
        case 2:
            yield from ((channels, size, size) for size in _IMAGE_SIZES)
        case _:
            yield from ((channels, _CLIP, size, size) for size in (32, 112, 64, 224))
            yield from ((channels, size, size, size) for size in (32, 64, 8))


def _bare_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that no layer of torch.nn holds: a function is called with them."""
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}" if path else name, parameter


def _for_parameter(name: str, parameter: nn.Parameter) -> Iterator[Guess]:
    """What the functions of torch.nn.functional, and a matrix product, would take beside the parameter."""
    if isinstance(parameter, nn.UninitializedParameter):
        return
    origin, size = f"parameter {name!r} {tuple(parameter.shape)}", tuple(parameter.shape)
    match len(size):
        case 1:
            yield from (Guess((BATCH, *shape), origin) for shape in _vectors(size[0]))
        case 2:
            for width in dict.fromkeys((size[1], size[0])):
                yield from (Guess((BATCH, *shape), origin) for shape in _vectors(width))
            yield Guess((BATCH, _LENGTHS[0]), origin, ids=size[0])
        case 3 | 4 | 5:
            yield from (Guess((BATCH, *shape), origin) for shape in _maps(size[1], len(size) - 2))
