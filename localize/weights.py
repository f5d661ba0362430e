"""All weights of a model by name, and what tells one model from another."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from localize.errors import CheckpointError, problem_list
from localize.model import LocalModel

Shape = tuple[int, ...]


def roots(local: LocalModel) -> list[tuple[str, nn.Module]]:
    """What all tensors are in, with the path that comes before their names."""
    found: list[tuple[str, nn.Module]] = [("", local.to_standard())]
    found += [(f"appended.{number}", module) for number, module in enumerate(local.appended, 1)]
    return found + [(f"heads.{number}", head) for number, head in enumerate(local.heads, 1) if head is not None]


def named_tensors(local: LocalModel) -> dict[str, Tensor]:
    """Parameters and buffers by original name, those of heads as ``heads.K.…``. A tied tensor has one name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, root in roots(local):
        for name, tensor in _saved(path, root):
            if path or id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor
    return tensors


def _saved(path: str, root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in root.state_dict(prefix=f"{path}." if path else "", keep_vars=True).items():
        if isinstance(value, Tensor):  # modules may save other things beside
            yield name, value


def weights_of(local: LocalModel) -> dict[str, Tensor]:
    """The values of ``named_tensors``."""
    return {name: tensor.detach() for name, tensor in named_tensors(local).items()}


def memory(tensor: Tensor) -> int:
    """The same number for tensors in the same memory, and no others that are there now."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def sharing(tensors: Collection[Tensor]) -> list[Tensor]:
    """Those in the same memory as another one of them."""
    counts = Counter(memory(tensor) for tensor in tensors if not tensor.is_meta)
    return [tensor for tensor in tensors if not tensor.is_meta and counts[memory(tensor)] > 1]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own: safetensors refuses what shares any."""
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in taken:
            value = value.clone()
        elif value.nbytes:
            taken.add(storage.data_ptr())
        result[name] = value
    return result


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copies values into a tensor of their shape, whose elements may be one in memory, as ``expand`` makes them."""
    tensor = tensor.detach()
    for axis, stride in enumerate(tensor.stride() if tensor.layout is torch.strided else ()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor, values = tensor.narrow(axis, 0, 1), values.narrow(axis, 0, 1)
    tensor.copy_(values)


def frozen(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that is not trained."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def freeze(local: LocalModel, names: Collection[str], where: str) -> None:
    """Freezes the parameters of these names, of heads and appended parts too, and no others.

    Raises:
        CheckpointError: the model has no such parameters.
    """
    tensors = named_tensors(local)
    unknown = [name for name in names if name not in tensors]
    if unknown:
        raise CheckpointError(f"{where} freezes {unknown[:3]}, which the model does not have; convert it again.")
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in names)


def check_fits(own: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Compares names and shapes of the model's tensors with those of what is to go into them.

    Raises:
        CheckpointError: they differ; everything that does not fit is listed at once.
    """
    problems = [f"{name} is missing" for name in own if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in own]
    problems += [
        f"{name} has shape {found[name]}, the model's is {own[name]}"
        for name in own
        if name in found and own[name] != found[name]
    ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointError(problem_list(f"The weights in {where} are of another model or plan", shown))


def put_weights(local: LocalModel, tensors: dict[str, Tensor], where: str) -> None:
    """Copies ``tensors`` into a model; the inverse of ``weights_of``.

    Raises:
        CheckpointError: names or shapes differ; everything that does not fit is listed at once.
    """
    own = weights_of(local)
    shapes, found = ({name: tuple(t.shape) for name, t in each.items()} for each in (own, tensors))
    check_fits(shapes, found, where)
    with torch.no_grad():
        for name, tensor in own.items():
            fill(tensor, tensors[name])


def _all_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every name of every parameter: the same whether tied ones became copies or not."""
    return list(model.named_parameters(remove_duplicate=False))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one model from another: its class and the names and shapes of its parameters."""
    shapes = "\n".join(f"{name} {tuple(p.shape)}" for name, p in _all_names(model))
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(shapes.encode()).hexdigest(),
    }
