"""Which modules stay one call in a graph, and which are entered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)

_LARGE = 1 / 2  # of all parameters: a leaf of that size would leave little to cut
_STATEFUL = nn.modules.batchnorm._NormBase  # a user's kind of it counts batches in train mode only


class LeafPolicy:
    """A leaf is called as it is, so that its own flags, hooks and buffers stay live."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules())
        self._share = _shares(self._modules)
        self._guarding = {""}  # paths of modules whose decisions on values are checked at run time
        self.opaque: dict[str, str] = {}  # path → why a module that would be entered is kept whole
        self.guarded: dict[str, str] = {}  # file:line of a decision that is checked → what it read

    def is_leaf(self, module: nn.Module, path: str) -> bool:
        """Whether a module of the root's tree is one call."""
        if path == "":
            return False
        if path in self.opaque or isinstance(module, torch.jit.ScriptModule):
            return True
        if type(module) in _CONTAINERS:
            return bool(module._backward_hooks or module._backward_pre_hooks)
        if is_library(module) or isinstance(module, _STATEFUL):
            return True
        # Hooks on gradients are attached by the module's own call, which a graph of its insides does not make.
        return not module._modules or bool(module._backward_hooks or module._backward_pre_hooks)

    def guards(self, path: str) -> bool:
        """Whether what the module's Python reads from tensors is checked at run time, so that it can be entered."""
        return path in self._guarding

    def guard(self, path: str) -> bool:
        """Makes the module one that guards its decisions, if keeping it whole would swallow much of the model."""
        if self._share[path] <= _LARGE or path in self._guarding:
            return False
        self._guarding.add(path)
        return True

    def keep_whole(self, path: str, reason: str) -> bool:
        """Makes a module a leaf, and all others of its class: they do the same. False if nothing is new."""
        kind = type(self._modules[path])
        alike: Iterable[str] = [path]
        if kind not in _CONTAINERS:
            alike = [p for p, m in self._modules.items() if p and type(m) is kind]
        new = [p for p in alike if p not in self.opaque]
        self.opaque.update(dict.fromkeys(new, reason))
        return path in new


def _shares(modules: dict[str, nn.Module]) -> dict[str, float]:
    """Path → the module's share of all parameters."""
    counts = {path: sum(p.numel() for p in module.parameters()) for path, module in modules.items()}
    total = max(counts[""], 1)
    return {path: count / total for path, count in counts.items()}


def is_library(module: nn.Module) -> bool:
    """Whether a module's class is torch's own."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))
