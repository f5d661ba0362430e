"""Undoing whatever a trial run of a model leaves behind."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from localize.random_state import RandomState
from localize.weights import fill

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
_TABLES = ("_parameters", "_buffers", "_modules")  # of nn.Module: what is registered


_WRITTEN = WeakTensorKeyDictionary()  # parameters that some forward was seen to write into


class ModelState:
    """A snapshot of everything a forward may change on models.

    Parameters' values are copied only where a forward is known to write into them (a moving average, a weight
    norm); the recording, which comes first, finds that out with ``keep_written``.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.modules = list(dict.fromkeys(module for model in models for module in model.modules()))
        self.attributes = [dict(vars(module)) for module in self.modules]
        self.contents = [_contents(attributes) for attributes in self.attributes]
        self.objects = [(thing, dict(vars(thing))) for thing in _plain_objects(self.attributes)]
        self.training = [module.training for module in self.modules]
        parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
        own = {id(t): t for model in models for t in model.buffers()} | _held(self.attributes)
        own |= {key: p for key, p in parameters.items() if p in _WRITTEN}
        self.values = [(tensor, tensor.detach().clone()) for tensor in own.values()]
        self.data = [(tensor, tensor.data) for tensor in (*own.values(), *parameters.values())]
        self.grads = [(parameter, parameter.grad) for parameter in parameters.values()]
        self._writable: dict[int, Tensor] | None = None

    def keep_written(self, tensor: Any) -> None:
        """``tensor`` is about to be written into: if that is a parameter, its value is kept."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return
        if self._writable is None:
            self._writable = {p.untyped_storage()._cdata: p for p, _ in self.grads if p.layout is torch.strided}
        parameter = self._writable.get(tensor.untyped_storage()._cdata)
        if parameter is not None and parameter not in _WRITTEN:
            _WRITTEN[parameter] = True
            self.values.append((parameter, parameter.detach().clone()))

    def restore(self) -> None:
        """Puts everything back, values in place."""
        for module, attributes, contents in zip(self.modules, self.attributes, self.contents, strict=True):
            _restore_attributes(module, attributes, contents)
        for module, flag in zip(self.modules, self.training, strict=True):
            if module.training is not flag:
                module.training = flag
        for thing, attributes in self.objects:
            now = vars(thing)
            if now.keys() != attributes.keys() or any(now[name] is not value for name, value in attributes.items()):
                now.clear()
                now.update(attributes)
        for tensor, data in self.data:
            if tensor.layout is torch.strided and _address(tensor) != _address(data):  # its .data was exchanged
                tensor.data = data
        with torch.no_grad():
            for tensor, value in self.values:
                fill(tensor, value)
        for parameter, grad in self.grads:
            if parameter.grad is not grad:
                parameter.grad = grad

    def reassigned(self) -> Iterator[tuple[nn.Module, str, Any, Any]]:
        """(module, name, then, now) of the attributes that hold another object now than at the snapshot."""
        for module, attributes, contents in zip(self.modules, self.attributes, self.contents, strict=True):
            now = vars(module)
            for name in attributes.keys() | now.keys():
                if name != "training" and now.get(name) is not attributes.get(name):
                    yield module, name, attributes.get(name), now.get(name)
            for name in ("_parameters", "_buffers"):
                table = now.get(name, {})
                for key, old in contents.get(name, {}).items():
                    if table.get(key) is not old:
                        yield module, key, old, table.get(key)


def _held(attributes: Iterable[dict[str, Any]]) -> dict[int, Tensor]:
    """The tensors among plain attributes, and one level down in lists, tuples and dicts, by ``id``."""
    found: dict[int, Tensor] = {}
    for table in attributes:
        for name, value in table.items():
            if name in _TABLES:
                continue
            items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
            found.update((id(item), item) for item in items if isinstance(item, Tensor))
    return found


def _plain_objects(attributes: Iterable[dict[str, Any]]) -> list[Any]:
    """Objects with attributes of their own that modules refer to: what several may use as a letter box."""
    kinds = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)
    found = {
        id(value): value
        for table in attributes
        for value in table.values()
        if type(getattr(value, "__dict__", None)) is dict and not isinstance(value, kinds)
    }
    return list(found.values())


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Shallow copies of plain containers: a forward may append to a list or fill a cache."""
    return {name: value.copy() for name, value in attributes.items() if type(value) in _CONTAINERS and value}


def _restore_attributes(module: nn.Module, attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in attributes]:
        del now[name]
    for name, value in attributes.items():
        if now.get(name) is not value:
            now[name] = value
        if type(value) in _CONTAINERS and not _same_items(value, contents.get(name)):
            value.clear()
            if name in contents:
                add = value.extend if isinstance(value, list | deque) else value.update
                add(contents[name])


def _same_items(value: Any, copy: Any) -> bool:
    """Whether a container holds the very objects of its copy (an empty one has no copy)."""
    if copy is None:
        return not value
    if len(value) != len(copy):
        return False
    if isinstance(value, dict):
        return all(key in value and value[key] is item for key, item in copy.items())
    if isinstance(value, list | deque):
        return all(a is b for a, b in zip(value, copy, strict=True))
    return bool(value == copy)


@contextmanager
def preserved(*models: nn.Module, training: bool | None = None) -> Iterator[ModelState]:
    """Whatever happens inside, the models and all random generators are as before afterwards.

    ``training`` puts the models in one mode for the while. Values of buffers are kept for fake runs too: an
    operator on real tensors only (a counter of batches) is executed even there.
    """
    state, generators = ModelState(*models), RandomState()
    try:
        if training is not None:
            for model in models:
                model.train(training)
        yield state
    finally:
        state.restore()
        generators.restore()


def lazy_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that get their shape from the first forward only."""
    return [name for name, value in _tensors(model) if nn.parameter.is_lazy(value)]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
