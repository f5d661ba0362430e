"""Buffers by name, as a forward pass may leave them: other tensors, of another shape, views of one another, or None.

Here a buffer is a *place*: a module and an attribute. What is there is told by a *layout*, plain data, so that another
process, or a later one, can make the same of the values (``filling.py``): for each buffer, None or

    dtype, shape        "float32", [8, 10]
    stride, offset      in its memory, in elements
    tied                names of the buffers in the same memory, as far as the process knows
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize.model import LocalModel
from localize.weights import fill, memory, named_tensors, roots

Layout = dict[str, Any] | None


@dataclass(frozen=True)
class Place:
    """Where a buffer is: in a module of the user's, and in the parts' stand-ins of modules that were looked into.

    ``saved``: whether a ``state_dict`` has it.
    """

    holders: list[tuple[nn.Module, str]]
    saved: bool

    @property
    def tensor(self) -> Tensor | None:
        """What is there now."""
        module, leaf = self.holders[0]
        return module._buffers[leaf] if leaf in module._buffers else None  # a scripted module's table has no ``get``

    def bind(self, tensor: Tensor | None) -> None:
        """Puts another tensor there."""
        for module, leaf in self.holders:
            module._buffers[leaf] = tensor


def places(local: LocalModel) -> dict[str, Place]:
    """All buffers of the model, of appended parts and heads, each once; not those that are no plain tensors."""
    found: dict[str, Place] = {}
    at: dict[tuple[int, str], Place] = {}
    by_path: dict[str, Place] = {}
    inside: set[int] = set()
    for prefix, root in roots(local):
        for path, module in root.named_modules(prefix=prefix, remove_duplicate=False):
            inside.add(id(module))
            for leaf, buffer in module._buffers.items():
                if buffer is None or _is_plain(buffer):
                    name, key = f"{path}.{leaf}" if path else leaf, (id(module), leaf)
                    if key not in at:
                        at[key] = found[name] = Place([(module, leaf)], leaf not in module._non_persistent_buffers_set)
                    by_path[name] = at[key]
    for part in local.parts:
        for path, module in part.named_modules():
            for leaf, buffer in module._buffers.items() if id(module) not in inside else ():
                place = by_path.get(f"{path}.{leaf}" if path else leaf)
                if place is not None and place.tensor is buffer:
                    place.holders.append((module, leaf))
    return found


def others(local: LocalModel, known: Mapping[str, Place]) -> dict[str, Tensor]:
    """What ``named_tensors`` has beside the buffers of ``places``: parameters, as a rule."""
    buffers = {id(place.tensor) for place in known.values()}
    return {name: tensor for name, tensor in named_tensors(local).items() if id(tensor) not in buffers}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided


def laid_out(values: Tensor, stride: Iterable[int]) -> Tensor:
    """The same values with these strides."""
    if values.stride() == tuple(stride):
        return values
    result = torch.empty_strided(values.shape, tuple(stride), dtype=values.dtype, device=values.device)
    fill(result, values)
    return result


def layouts(known: Mapping[str, Place], names: Collection[str]) -> dict[str, Layout]:
    """What lies in the places of these names."""
    together: dict[int, list[str]] = {}
    for name, place in known.items():
        if place.tensor is not None:
            together.setdefault(memory(place.tensor), []).append(name)
    return {name: _layout_of(name, known[name].tensor, together) for name in names}


def _layout_of(name: str, tensor: Tensor | None, together: Mapping[int, list[str]]) -> Layout:
    """What a buffer is like; ``together`` has all buffers by memory."""
    if tensor is None:
        return None
    return {
        "dtype": dtype_name(tensor),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "tied": [other for other in together[memory(tensor)] if other != name],
    }


def dtype_name(tensor: Tensor) -> str:
    """As in ``torch.float32``, without ``torch``."""
    return str(tensor.dtype).removeprefix("torch.")
