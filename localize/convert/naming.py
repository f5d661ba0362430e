"""Names of tensors, and of the places between the nodes of a graph: the modules that end there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn


def parameter_names(root: nn.Module) -> dict[int, str]:
    """The one name of every parameter object, by ``id``: a tied parameter has several paths but one name."""
    return {id(parameter): name for name, parameter in root.named_parameters()}


def registered_names(root: nn.Module) -> dict[int, str]:
    """The names of all parameters and buffers, by ``id``."""
    return {id(buffer): name for name, buffer in root.named_buffers()} | parameter_names(root)


def place_names(nodes: Sequence[tuple[str, str, bool]]) -> list[tuple[str, ...]]:
    """All names of the place after each node; the first is canonical. All names are unique.

    A place is named by the outermost module that ends there, then the inner ones, with ``#2`` when a module
    ends a second time; a node that ends no module gives its own name.

    Args:
        nodes: (node name, path of the module it belongs to, whether it is that module's one call), in order.
    """
    endings = Counter[str]()
    modules = {prefix for _, path, _ in nodes for prefix in _prefixes(path)}
    places: list[tuple[str, ...]] = []
    for i, (node, path, is_call) in enumerate(nodes):
        following = nodes[i + 1][1] if i + 1 < len(nodes) else ""
        continued = set(_prefixes(following)) - ({path} if is_call else set())
        ended = [module for module in _prefixes(path) if module not in continued]
        endings.update(ended)
        names = [module if endings[module] == 1 else f"{module}#{endings[module]}" for module in ended]
        if not is_call:
            names.append(node if node not in modules else f"{node}()")
        places.append(tuple(names))
    return places


def _prefixes(path: str) -> list[str]:
    """``a.b.c`` → ``[a, a.b, a.b.c]``."""
    names = path.split(".") if path else []
    return [".".join(names[: i + 1]) for i in range(len(names))]
