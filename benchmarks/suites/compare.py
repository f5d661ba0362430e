"""What a run of a model leaves behind, flat and by name, and whether two such runs are the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from localize.signature import Call

Observed = dict[str, Any]
CLOSE = 1e-6  # of the largest magnitude: equal up to the order of additions
_SEED = 3
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def same(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """``yes``: equal bit for bit. ``close: …``: within ``CLOSE``. ``WRONG: …``: anything else."""
    missing = [key for key in expected if key not in found] + [key for key in found if key not in expected]
    if missing:
        return f"WRONG: {missing[0]} is on one side only"
    worst = ""
    for key, value in expected.items():
        verdict = _same_value(value, found[key])
        if verdict.startswith("WRONG"):
            return verdict.format(key)
        worst = worst or verdict.format(key)
    return worst or "yes"


def _same_value(one: Any, other: Any) -> str:
    """The empty text where both are equal, else ``close`` or ``WRONG`` with ``{}`` in the value's place."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        alike = type(one) is type(other) and one == other
        return "" if alike else f"WRONG: {{}} is {_brief(other)} instead of {_brief(one)}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"WRONG: {{}} is {_brief(other)} instead of {_brief(one)}"
    both_nan = one.isnan() & other.isnan()
    if bool(((one == other) | both_nan).all()):
        return ""
    if not (one.is_floating_point() or one.is_complex()):
        return f"WRONG: {{}} has {int((one != other).sum())} other values of {one.numel()}"
    gap = (one - other).abs()[~both_nan].max().item()
    scale = one.abs()[~both_nan].max().item()
    kind = "close" if gap <= CLOSE * scale else "WRONG"
    return f"{kind}: {{}} differs by up to {gap:.2g}, its largest value is {scale:.2g}"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return repr(value)[:60]


def flatten(name: str, value: Any, seen: frozenset[int] = frozenset()) -> Observed:
    """The leaves of a model's output, by path: through containers, dataclasses and plain objects such as caches."""
    if isinstance(value, Tensor):
        return {name: value.detach().clone()}
    if value is None or isinstance(value, _PLAIN):
        return {name: value}
    if id(value) in seen:
        return {name: "<itself>"}
    seen = seen | {id(value)}
    result: Observed = {f"type of {name}": type(value).__qualname__}
    for key, item in _entries(value):
        result.update(flatten(f"{name}.{key}", item, seen))
    return result


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return list(vars(value).items()) if hasattr(value, "__dict__") else []


def seeded() -> None:
    """Every generator that a forward may draw from starts anew."""
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    numpy.random.seed(_SEED)


def observe(run: Callable[..., Any], owner: nn.Module, inputs: Any, gradients: bool = True) -> Observed:
    """Runs once, under a seed, on copies of ``inputs``: the output, ``owner``'s gradients, its buffers afterwards.

    Args:
        run: called as the model is; its output hangs on ``owner``'s parameters.
        owner: the model whose parameters and buffers are read.
        inputs: as a ``Case`` has them.
        gradients: backpropagate a fixed random weighting of all floating-point outputs.
    """
    call = Call.of(pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), inputs))
    seeded()
    with torch.set_grad_enabled(gradients):
        output = run(*call.args, **call.kwargs)
    found = flatten("output", output)
    if gradients:
        owner.zero_grad(set_to_none=True)
        total = _weighted(output)
        if total is not None:
            total.backward()  # type: ignore[no-untyped-call]
        found.update({f"gradient of {name}": parameter.grad for name, parameter in owner.named_parameters()})
        owner.zero_grad(set_to_none=True)
    found.update({f"buffer {name}": buffer.detach().clone() for name, buffer in owner.named_buffers()})
    return found


def _weighted(output: Any) -> Tensor | None:
    """A sum of everything that a gradient can come from, each element with its own weight; None if there is none."""
    generator = torch.Generator().manual_seed(_SEED)
    total = None
    for tensor in differentiable(output):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        weights = torch.randn(real.shape, generator=generator).to(real.dtype)
        term = (real * weights).sum()
        total = term if total is None else total + term
    return total


def differentiable(value: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """The tensors of an output that carry a gradient, in the order of ``flatten``."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if id(value) in seen:
        return []
    seen = seen | {id(value)}
    return [tensor for _, item in _entries(value) for tensor in differentiable(item, seen)]


def finite(observed: Mapping[str, Any]) -> bool:
    """Whether all outputs are finite: nothing is shown by comparing NaN with NaN."""
    outputs = [v for k, v in observed.items() if k.startswith("output") and isinstance(v, Tensor)]
    return all(bool(torch.isfinite(v).all()) for v in outputs if v.is_floating_point())


def other_batch(inputs: Any) -> Any:
    """``inputs`` with the first sample twice, in all tensors whose first axis is as long as the first tensor's."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = leaves[0].shape[0] if leaves else 0

    def larger(leaf: Tensor) -> Tensor:
        if not leaf.dim() or leaf.shape[0] != batch:
            return leaf
        return torch.cat([leaf[:1], leaf])

    return pytree.tree_map_only(Tensor, larger, inputs)
