"""Building blocks of heads: checks of a hidden state, small networks, the last layer to the logits.

All sizes are taken from a ``TensorSpec``, the batch size never: a head works on any batch, and on other image
sizes and token counts than the example's.

Shape legend: ``N`` batch, ``C`` channels or classes, ``H W`` space, ``T`` tokens, ``D`` features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from localize.heads.base import HeadSite
from localize.heads.pooling import AsMap, PooledVector, TokenPool, is_map, space
from localize.spec import TensorSpec

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
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


class Shaped(nn.Module):
    """(N, D) → (N, *shape)."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, vector: Tensor) -> Tensor:
        return vector.reshape(vector.shape[0], *self.shape)


class BatchTo(nn.Module):
    """(N, …) → the batch on ``axis``."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, output: Tensor) -> Tensor:
        return output.movedim(0, self.axis)

    def extra_repr(self) -> str:
        return str(self.axis)


def as_output(site: HeadSite) -> list[nn.Module]:
    """What brings predictions (N, …) into the form of the model's output: nothing, or one module."""
    return [BatchTo(site.output.batch_axis)] if site.output is not None and site.output.batch_axis else []


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
    return nn.Sequential(linear, Shaped(site.output.features), *as_output(site))


def check_batch_first(site: HeadSite, method: str, why: str) -> None:
    """Raises ``MethodError`` where the model's output has its batch on another axis than the first."""
    if site.output is not None and site.output.batch_axis:
        problem = f"{why}, and the model's output {site.output} has the batch on axis {site.output.batch_axis}"
        raise site.error(method, problem, "Use nwise, early_exit, joint or bp.")


def is_dense(site: HeadSite) -> bool:
    """Whether the task predicts at every token or pixel."""
    return site.task.kind in ("causal_lm", "segmentation")


class AsTokens(AsMap):
    """Tokens with the batch in front, and maps (N, C, L) as tokens: (N, T, D)."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = super().forward(hidden)
        return hidden if self.spec.layout == "tokens" else hidden.movedim(1, -1)


def dense_logits(site: HeadSite, method: str, body: nn.Module | None = None, width: int = 0) -> nn.Sequential:
    """The head of a task that predicts at every token or pixel.

    ``causal_lm``: a Linear a token, (N, T, D) → (N, T, C). ``segmentation``: a 1×1 convolution, interpolated
    to the size of the model's output. ``body`` comes before, on (N, C, *space) or (N, T, D), ``width`` wide.

    Raises:
        MethodError: the hidden state has no tokens (pixels), or others than the model's output.
    """
    spec, classes = site.hidden, output_features(site, method)
    middle = [] if body is None else [body]
    width = width or spec.channels
    if site.output is None:
        raise site.error(method, "the size of the model's output is unknown", _NO_HEADS)
    if site.task.kind == "causal_lm":
        _check_tokens(site, site.output, method)
        return nn.Sequential(AsTokens(spec), *middle, nn.Linear(width, classes), *as_output(site))
    sizes = site.output.features[1:]
    if not is_map(spec) or len(space(spec)) != len(sizes):
        problem = f"a segmentation head needs a map (N, C, H, W), as the output {site.output} is"
        raise site.error(method, problem, _NO_HEADS)
    last = convolution(len(sizes), width, classes, kernel=1)
    return nn.Sequential(AsMap(spec), *middle, last, Resize(sizes))


def _check_tokens(site: HeadSite, output: TensorSpec, method: str) -> None:
    """Raises ``MethodError`` where the hidden state does not hold the tokens that the model predicts."""
    spec = site.hidden
    if spec.layout != "tokens" and not (is_map(spec) and len(space(spec)) == 1):
        raise site.error(method, "a language model's head needs tokens (N, T, D)", _NO_HEADS)
    here = spec.features[0] if spec.layout == "tokens" else space(spec)[0]
    if here != output.features[0]:
        problem = f"it has {here} tokens, and the model's output {output} has {output.features[0]}"
        raise site.error(method, problem, _NO_HEADS)


def linear_exit(
    site: HeadSite, method: str, max_features: int | None = 1, width: int = 0, token_pool: TokenPool = "auto"
) -> nn.Module:
    """Hidden → logits by a single Linear on the reduced hidden state (a Linear a token, a 1×1 convolution).

    Args:
        site: where the head stands.
        method: its method's name, for messages.
        max_features: see ``PooledVector``; 1 is the global average.
        width: size of one hidden layer with ReLU before the Linear; 0 for none.
        token_pool: how tokens become a vector, where one prediction is made of them.

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
    reduce = PooledVector(site.hidden, max_features, token_pool)
    if not width:
        return nn.Sequential(reduce, to_logits(site, method, reduce.out_features))
    hidden = linear_block(reduce.out_features, width)
    return nn.Sequential(reduce, hidden, to_logits(site, method, width))
