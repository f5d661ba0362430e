"""A model without data for a while: its shapes, FLOPs and saved bytes can be had for little.

    on_meta   meta tensors in place of the model's own: what the kernels of torch's core say, three times as
              fast as fake tensors; for models on the CPU, where both say the same
    on_fake   fake tensors: they know the device that they stand for and so which kernel would run there
    for_real  the tensors themselves

Each gives the function that turns a tensor into what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

StandIn = Callable[[Tensor], Tensor]

_PLAIN_TYPES = (Tensor, nn.Parameter)
_PLAIN_DTYPES = (torch.float32, torch.float64)
_NORMS = (
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_group_norm.default,
    torch.ops.aten.native_batch_norm.default,
)

# On the meta device they take another kernel than on the CPU, which keeps other tensors for its backward.
_DEVICE_DEPENDENT = frozenset(
    {F.scaled_dot_product_attention, F.multi_head_attention_forward, F.embedding_bag, torch.embedding_bag}
    | {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
    | {Tensor.is_cpu.__get__, Tensor.is_cuda.__get__, Tensor.is_meta.__get__}  # type: ignore[attr-defined]
)


class NotOnMeta(Exception):
    """What runs on the meta device is not what would run on the model's own."""


class _Refusing(TorchFunctionMode):
    """Calls of functions that do something else on the meta device raise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DEVICE_DEPENDENT:
            raise NotOnMeta(f"{getattr(func, '__name__', func)} depends on the device.")
        return func(*args, **(kwargs or {}))


class _AsOnCpu(TorchDispatchMode):
    """What kernels on the CPU give beside their result, where those on the meta device give something else."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NORMS and args[0].dtype not in _PLAIN_DTYPES:
            raise NotOnMeta("The type of the statistics that a normalisation keeps depends on the device.")
        if func is torch.ops.aten.native_batch_norm.default:
            # What the kernel gives, without the decomposition that stands for it on meta: it takes as long as all
            # other layers of a ResNet together. No statistics of the batch in eval mode.
            x, training = args[0], args[5]
            channels = x.shape[1] if training else 0
            return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)
        if func is torch.ops.aten.relu.default:  # a decomposition too, and the most frequent one
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _MetaTwins:
    """One meta tensor for every tensor, however often it is met. The originals must outlive this object."""

    def __init__(self) -> None:
        self._twins: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Shape, strides, type and ``requires_grad`` of ``tensor``.

        Raises:
            NotOnMeta: the tensor is of a kind whose kernels differ there.
        """
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = _meta_twin(tensor)
        return self._twins[id(tensor)]


def _meta_twin(tensor: Tensor) -> Tensor:
    plain = type(tensor) in _PLAIN_TYPES and tensor.layout == torch.strided and tensor.is_contiguous()
    if not plain or tensor.device.type != "cpu" or not tensor.is_leaf:
        raise NotOnMeta(f"{type(tensor).__name__} on {tensor.device}, strides {tensor.stride()}")
    if tensor.dtype not in _PLAIN_DTYPES and (tensor.is_floating_point() or tensor.is_complex()):
        raise NotOnMeta(f"{tensor.dtype}")
    twin = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


@contextmanager
def on_meta(modules: Sequence[nn.Module]) -> Iterator[StandIn]:
    """While it lasts, the modules' parameters and buffers are meta tensors and new tensors are made there.

    Nothing is copied. The modules' own tables are laid aside, never written to, and put back whatever happens.

    Raises:
        NotOnMeta: on entering, or while it lasts: the costs there would not be the model's.
    """
    if torch.is_autocast_enabled("cpu"):
        raise NotOnMeta("Autocasting looks at the device.")
    twins = _MetaTwins()
    every = dict.fromkeys(module for top in modules for module in top.modules())
    aside = [(module, name, vars(module)[name]) for module in every for name in ("_parameters", "_buffers")]
    try:
        for module, name, table in aside:
            vars(module)[name] = {key: t if t is None else twins.of(t) for key, t in table.items()}
        with torch.device("meta"), _Refusing(), _AsOnCpu():  # type: ignore[no-untyped-call, unused-ignore]
            yield twins.of
    finally:
        for module, name, table in aside:
            vars(module)[name] = table


@contextmanager
def on_fake(_: Sequence[nn.Module]) -> Iterator[StandIn]:
    """While it lasts, operators make fake tensors; those that meet a real tensor make a fake of it first."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode.from_tensor


@contextmanager
def for_real(_: Sequence[nn.Module]) -> Iterator[StandIn]:
    """The model as it is."""
    yield lambda tensor: tensor
