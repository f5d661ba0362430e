"""A generated module: its source, and how to make it and its inputs."""

from __future__ import annotations

import hashlib
import linecache
import random
import sys
import types
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 5  # tokens in a sequence
CLASSES = 3


@dataclass(frozen=True)
class InputSpec:
    """An input of the root: its kind (see ``snippets``; ``tokens`` are indices (N, T)) and how it is passed."""

    name: str
    kind: str
    width: int
    how: str = "tensor"  # or optional, omitted (both default to None), pair, dict (of tensors), mask (N)

    @property
    def parameter(self) -> str:
        return f"{self.name}=None" if self.how in ("optional", "omitted") else self.name

    @property
    def value(self) -> str:
        """The tensor in it."""
        return {"pair": f"{self.name}[0]", "dict": f"{self.name}['t']"}.get(self.how, self.name)

    @property
    def use(self) -> str:
        """The forward's first lines about it."""
        if self.how in ("optional", "omitted"):
            return f"if {self.name} is not None:\n    x = x + {self.name}"
        if self.how == "mask":
            axes = {"v": 1, "s": 2, "m": 3}[self.kind]
            return f"x = x * {self.name}.float().view(-1{', 1' * axes})"
        if self.how == "pair":
            return f"x = x - {self.name}[1]"
        return ""

    def make(self, batch: int, length: int, generator: torch.Generator) -> Any:
        if self.kind == "tokens":
            return torch.randint(0, 11, (batch, length), generator=generator)
        if self.how == "mask":
            return torch.rand(batch, generator=generator) > 0.3
        shape = {"v": (batch, self.width), "s": (batch, length, self.width), "m": (batch, self.width, 4, 4)}[self.kind]
        tensor = torch.randn(shape, generator=generator)
        if self.how == "pair":
            return tensor, torch.randn(shape, generator=generator)
        return {"t": tensor} if self.how == "dict" else tensor


@dataclass(frozen=True)
class Program:
    """Source of a module ``Net``, its inputs, and what to do with it."""

    source: str
    inputs: tuple[InputSpec, ...]
    by_keyword: bool = False
    input_grads: bool = False
    batch: int = 3
    parts: int = 2
    logits: bool = False  # the output is one tensor (N, CLASSES)

    @cached_property
    def namespace(self) -> dict[str, Any]:
        """The executed source. Its lines are known to tracebacks."""
        name = f"random_{hashlib.sha1(self.source.encode()).hexdigest()[:10]}"
        linecache.cache[f"{name}.py"] = (len(self.source), None, self.source.splitlines(True), f"{name}.py")
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(self.source, f"{name}.py", "exec"), module.__dict__)
        return module.__dict__

    def build(self) -> nn.Module:
        """The module, with the same weights every time."""
        seed_all(0)
        model: nn.Module = self.namespace["Net"]()
        return model

    def call(self, batch: int | None = None, seed: int = 0, length: int = LENGTH) -> dict[str, Any]:
        """Keyword arguments of one call, made anew every time."""
        generator = torch.Generator().manual_seed(seed)
        made = {s.name: s.make(batch or self.batch, length, generator) for s in self.inputs if s.how != "omitted"}
        if self.input_grads:
            for tensor in tensors_in(made):
                if tensor.is_floating_point():
                    tensor.requires_grad_()
        return made

    def example(self) -> Any:
        """What ``to_local`` is given."""
        call = self.call()
        return call if self.by_keyword else tuple(call.values())

    def works(self, training: bool = True, batch: int | None = None, length: int = LENGTH) -> bool:
        """Whether the module itself runs forward and backward, twice."""
        model = self.build().train(training)
        try:
            for seed in (0, 1):
                seed_all(seed)
                backward(model(**self.call(batch, seed, length)), seed)
        except (RuntimeError, ValueError, IndexError):
            return False
        return True


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def backward(output: Any, seed: int) -> None:
    """The gradient of a random weighting of all outputs that have one."""
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0
    for tensor in tensors_in(output):
        weight = torch.randn(tensor.shape, generator=generator)
        if tensor.requires_grad:
            total = total + (tensor * weight).sum()
    if isinstance(total, Tensor):
        total.backward()
