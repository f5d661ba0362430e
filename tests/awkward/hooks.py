"""Autograd functions and hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.awkward.base import D, Layers, block, root


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(D, D), nn.Linear(D, D)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.strength * grads[0], None


@root()
class GradientReversal(Layers):
    """An autograd function that takes a number and turns the gradient round, as domain adversaries do."""

    strength = 0.7

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.last(torch.relu(self.b(_Reversal.apply(x, self.strength))) + self.c(x))


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, *, mode: str = "round") -> tuple[Tensor, Tensor]:
        steps = 2**bits - 1
        codes = torch.round(x.clamp(0, 1) * steps)
        ctx.mark_non_differentiable(codes)
        return codes / steps, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


@block()
class StraightThrough(Inner):
    """An autograd function with two outputs, differentiable once."""

    def forward(self, x: Tensor) -> Tensor:
        values, codes = _Quantise.apply(self.linear(x), 3)
        return self.other(values) + codes * 0.01


class _Context(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight * 0.5, (grads[0] * x).sum(0)


@root()
class FunctionOfParameter(Layers):
    """An autograd function on a parameter of the root, with ``setup_context``."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((D,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(_Context.apply(torch.relu(self.a(x)), self.gain))))


@block()
class TensorHookInBlock(Inner):
    """``register_hook`` on a hidden tensor scales its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 0.1)
        return self.other(torch.relu(y))


@root(refused="hook")
class TensorHookAtRoot(Layers):
    """``register_hook`` in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 0.1)
        return self.last(torch.relu(self.b(torch.relu(x))))


def _scale_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5


def _shift_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.25,)


def _shrink_gradient(module: nn.Module, grads_in: Any, grads_out: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grads_in)


def _damp_gradient(module: nn.Module, grads_out: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grads_out)


class _Plain(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.linear(x)))


@block()
class HooksOnLeaf(_Plain):
    """Forward, pre-forward and gradient hooks on an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.register_forward_hook(_scale_output)
        self.linear.register_forward_pre_hook(_shift_input)
        self.other.register_full_backward_hook(_shrink_gradient)
        self.other.register_full_backward_pre_hook(_damp_gradient)


@block()
class HooksOnBlock(_Plain):
    """Forward, pre-forward and gradient hooks on the block."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(_scale_output)
        self.register_forward_pre_hook(_shift_input)
        self.register_full_backward_hook(_shrink_gradient)


@root()
class ForwardHooksOnRoot(Layers):
    """Forward and pre-forward hooks on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(_scale_output)
        self.register_forward_pre_hook(_shift_input)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))))


@root(refused="hooks on its gradients")
class GradientHookOnRoot(Layers):
    """A gradient hook on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_pre_hook(_damp_gradient)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))))


@root()
class ParameterHook(Layers):
    """A gradient hook on a parameter, which outlives the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight.register_hook(lambda grad: grad * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.b(torch.relu(self.a(x)))))
