"""Building blocks of heads: reductions of a hidden state, small networks, the last layer to the logits.

All sizes are taken from a ``TensorSpec``, the batch size never: a head works on any batch, and on other image
sizes and token counts than the example's.

Shape legend: ``N`` batch, ``C`` channels or classes, ``H W`` space, ``T`` tokens, ``D`` features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.heads.base import HeadSite
from localize.spec import TensorSpec

MAX_FEATURES = 8192  # a flattened map larger than this would make the head larger than the model
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_RESIZE = {1: "linear", 2: "bilinear", 3: "trilinear"}
_NO_HEADS = "Cut elsewhere (cuts=), or use method 'bp', which needs no head here."


def check_hidden(site: HeadSite, method: str) -> None:
    """Raises ``MethodError`` where no head can stand on the hidden state."""
    hidden = site.hidden
    if not hidden.dtype.is_floating_point:
        raise site.error(method, f"it is {hidden.dtype}, and a head needs floating-point values", _NO_HEADS)
    if hidden.batch_axis is None:
        raise site.error(method, "no axis is the batch, so samples cannot be told apart", _NO_HEADS)
    if not hidden.features:
        raise site.error(method, "one number a sample is too little for a head", _NO_HEADS)


def is_map(spec: TensorSpec) -> bool:
    """Whether the hidden state is a map with 1 to 3 axes of space."""
    return spec.layout in ("map", "map_last") and len(spec.features) - 1 in _CONV


def space(spec: TensorSpec) -> tuple[int, ...]:
    """Sizes of a map's axes of space."""
    return spec.features[1:] if spec.layout == "map" else spec.features[:-1]


def as_map(hidden: Tensor, spec: TensorSpec) -> Tensor:
    """A map of either layout as (N, C, *space); anything else with its batch axis in front."""
    if spec.batch_axis:
        hidden = hidden.movedim(spec.batch_axis, 0)
    return hidden.movedim(-1, 1) if spec.layout == "map_last" else hidden


class AsMap(nn.Module):
    """``as_map`` as a module."""

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, hidden: Tensor) -> Tensor:
        return as_map(hidden, self.spec)


class Shaped(nn.Module):
    """(N, D) → (N, *shape)."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, vector: Tensor) -> Tensor:
        return vector.reshape(vector.shape[0], *self.shape)


def pool_sizes(channels: int, sizes: Sequence[int], max_features: int | None) -> tuple[int, ...]:
    """The space a map is pooled to: the largest ``s`` with ``channels · Π min(s, size) <= max_features``.

    The map's own sizes where it fits already or ``max_features`` is None; at least 1 an axis.
    """
    if max_features is None:
        return tuple(sizes)
    best = tuple(1 for _ in sizes)
    for s in range(2, max(sizes, default=1) + 1):
        candidate = tuple(min(s, size) for size in sizes)
        if channels * math.prod(candidate) > max_features:
            break
        best = candidate
    return best


def averaging(old: int, new: int) -> Tensor:
    """The (old, new) matrix of adaptive average pooling: window j is ⌊j·old/new⌋ to ⌈(j+1)·old/new⌉."""
    weights = torch.zeros(old, new)
    for j in range(new):
        start, stop = j * old // new, -(-(j + 1) * old // new)
        weights[start:stop, j] = 1 / (stop - start)
    return weights


class AverageTo(nn.Module):
    """Adaptive average pooling (N, C, *old) → (N, C, *new).

    An axis at a time: blocks by ``mean`` where the sizes divide, else by a matrix. Unlike PyTorch's adaptive
    pooling this keeps nothing for the backward pass, and is deterministic on GPUs. Maps of another size than
    ``old`` take PyTorch's.
    """

    def __init__(self, old: Sequence[int], new: Sequence[int]) -> None:
        super().__init__()
        self.old, self.new = tuple(old), tuple(new)
        for axis, (o, n) in enumerate(zip(old, new, strict=True)):
            self.register_buffer(f"weights_{axis}", averaging(o, n) if o % n else None, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        if tuple(hidden.shape[2:]) != self.old:
            pooled: Tensor = _ADAPTIVE[len(self.new)](hidden, self.new)  # type: ignore[arg-type]
            return pooled
        for axis in reversed(range(len(self.old))):
            if self.old[axis] == self.new[axis]:
                continue
            weights: Tensor | None = getattr(self, f"weights_{axis}")
            if weights is None:
                hidden = hidden.unflatten(axis + 2, (self.new[axis], -1)).mean(axis + 3)
            else:
                rows = hidden.movedim(axis + 2, -1)  # as a matrix: a batched product would expand the weights
                flat = rows.reshape(-1, self.old[axis]) @ weights
                hidden = flat.unflatten(0, rows.shape[:-1]).movedim(-1, axis + 2)
        return hidden

    def extra_repr(self) -> str:
        return f"{self.old} -> {self.new}"


class PoolTo(AverageTo):
    """Averages a map (N, C, *sizes) to the largest size with at most ``max_features`` values a sample."""

    def __init__(self, channels: int, sizes: Sequence[int], max_features: int | None = MAX_FEATURES) -> None:
        super().__init__(sizes, pool_sizes(channels, sizes, max_features))
        self.out_features = channels * math.prod(self.new)


class GlobalMean(nn.Module):
    """(N, C, *space) → (N, C)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(tuple(range(2, hidden.dim()))) if hidden.dim() > 2 else hidden


class PooledVector(nn.Module):
    """Any hidden state → (N, ``out_features``).

    A vector as it is; tokens by their mean over T; a map pooled to at most ``max_features`` values and
    flattened; anything else flattened, and averaged to ``max_features`` values if it has more.
    ``max_features=None`` never pools a map; 1 gives the global average.
    """

    def __init__(self, spec: TensorSpec, max_features: int | None = MAX_FEATURES) -> None:
        super().__init__()
        self.spec = spec
        self.pool: PoolTo | None = None
        count = math.prod(spec.features)
        if spec.layout == "tokens" or spec.layout == "vector":
            self.out_features = spec.channels
        elif is_map(spec):
            self.pool = PoolTo(spec.channels, space(spec), max_features)
            self.out_features = self.pool.out_features
        else:
            self.out_features = min(count, max(max_features or count, MAX_FEATURES))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = as_map(hidden, self.spec)
        if self.pool is not None:
            hidden = self.pool(hidden)
        if self.spec.layout == "tokens":
            return hidden.mean(1)
        hidden = hidden.flatten(1)
        if hidden.shape[1] == self.out_features:
            return hidden
        return F.adaptive_avg_pool1d(hidden.unsqueeze(1), self.out_features).squeeze(1)

    def extra_repr(self) -> str:
        return f"{self.spec} -> {self.out_features}"


def convolution(axes: int, inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> nn.Module:
    """A convolution over ``axes`` axes of space that keeps their sizes."""
    return _CONV[axes](inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def conv_block(axes: int, inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> nn.Sequential:
    """Convolution–BatchNorm–ReLU."""
    return nn.Sequential(convolution(axes, inputs, outputs, kernel, bias), _NORM[axes](outputs), nn.ReLU())


def linear_block(inputs: int, outputs: int, norm: bool = False) -> nn.Sequential:
    """Linear(–BatchNorm)–ReLU."""
    layers: list[nn.Module] = [nn.Linear(inputs, outputs)]
    if norm:
        layers.append(nn.BatchNorm1d(outputs))
    return nn.Sequential(*layers, nn.ReLU())


class Resize(nn.Module):
    """Interpolates logits (N, C, *space) to ``sizes``."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)

    def forward(self, logits: Tensor) -> Tensor:
        if tuple(logits.shape[2:]) == self.sizes:
            return logits
        return F.interpolate(logits, self.sizes, mode=_RESIZE[len(self.sizes)], align_corners=False)


def output_features(site: HeadSite, method: str) -> int:
    """How many numbers a prediction has: C, or for regression the size of the model's output.

    Raises:
        MethodError: the site does not tell.
    """
    task, output = site.task, site.output
    if task.has_classes:
        if task.num_classes is not None:
            return task.num_classes
        if output is not None:
            return output.shape[-1 if task.kind == "causal_lm" else 1]
        raise site.error(method, "the number of classes is unknown", "Pass task=Task(kind, num_classes=…).")
    if output is not None:
        return math.prod(output.features)
    raise site.error(method, "the size of the regression output is unknown", _NO_HEADS)


def to_logits(site: HeadSite, method: str, inputs: int) -> nn.Module:
    """(N, ``inputs``) → logits (N, C), or for regression a prediction of the output's shape: one Linear."""
    linear = nn.Linear(inputs, output_features(site, method))
    if site.task.has_classes or site.output is None:
        return linear
    return nn.Sequential(linear, Shaped(site.output.features))


def is_dense(site: HeadSite) -> bool:
    """Whether the task predicts at every token or pixel."""
    return site.task.kind in ("causal_lm", "segmentation")


def dense_logits(site: HeadSite, method: str, body: nn.Module | None = None, width: int = 0) -> nn.Sequential:
    """The head of a task that predicts at every token or pixel.

    ``causal_lm``: a Linear a token, (N, T, D) → (N, T, C). ``segmentation``: a 1×1 convolution, interpolated
    to the size of the model's output. ``body`` comes before, on (N, C, *space) or (N, T, D), ``width`` wide.

    Raises:
        MethodError: the hidden state has no tokens (pixels), or the output's size is unknown.
    """
    spec, classes = site.hidden, output_features(site, method)
    middle = [] if body is None else [body]
    width = width or spec.channels
    if site.task.kind == "causal_lm":
        if spec.layout != "tokens":
            raise site.error(method, "a language model's head needs tokens (N, T, D)", _NO_HEADS)
        return nn.Sequential(AsMap(spec), *middle, nn.Linear(width, classes))
    if not is_map(spec):
        raise site.error(method, "a segmentation head needs a map (N, C, H, W)", _NO_HEADS)
    if site.output is None:
        raise site.error(method, "the size of the model's output is unknown", _NO_HEADS)
    last = convolution(len(space(spec)), width, classes, kernel=1)
    return nn.Sequential(AsMap(spec), *middle, last, Resize(site.output.features[1:]))


def linear_exit(site: HeadSite, method: str, max_features: int | None = 1, width: int = 0) -> nn.Module:
    """Hidden → logits by a single Linear on the reduced hidden state (a Linear a token, a 1×1 convolution).

    Args:
        site: where the head stands.
        method: its method's name, for messages.
        max_features: see ``PooledVector``; 1 is the global average.
        width: size of one hidden layer with ReLU before the Linear; 0 for none.

    Raises:
        MethodError: the hidden state or the task does not fit.
    """
    check_hidden(site, method)
    if is_dense(site):
        if not width or (site.task.kind == "segmentation" and not is_map(site.hidden)):
            return dense_logits(site, method)
        if site.task.kind == "causal_lm":
            return dense_logits(site, method, linear_block(site.hidden.channels, width), width)
        axes = len(space(site.hidden))
        body = nn.Sequential(convolution(axes, site.hidden.channels, width, kernel=1), nn.ReLU())
        return dense_logits(site, method, body, width)
    reduce = PooledVector(site.hidden, max_features)
    if not width:
        return nn.Sequential(reduce, to_logits(site, method, reduce.out_features))
    hidden = linear_block(reduce.out_features, width)
    return nn.Sequential(reduce, hidden, to_logits(site, method, width))
