"""Calls and outputs as flat lists of tensors, and back."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from localize import nest
from localize.errors import ConfigError, TraceError


@dataclass(frozen=True)
class OutputStructure:
    """How a flat tuple of leaves becomes the model's output again (tuples, dicts, named tuples, ModelOutput)."""

    spec: pytree.TreeSpec

    def restore(self, leaves: Sequence[Any]) -> Any:
        """The output in the model's own type."""
        return nest.unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Call:
    """Arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> Call:
        """``inputs`` as users pass them: a tuple is positional arguments, a mapping keyword ones, else one argument."""
        if isinstance(inputs, Call):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(tuple(inputs), {}) if type(inputs) is tuple else cls((inputs,), {})

    @classmethod
    def with_arguments(cls, forward: inspect.Signature, arguments: dict[str, Any]) -> Call:
        """The call that gives ``forward``'s parameters these values."""
        bound = inspect.BoundArguments(forward, OrderedDict(arguments))
        return cls(bound.args, bound.kwargs)


@dataclass(frozen=True)
class CallSignature:
    """How a call of the model becomes a flat list of tensors, whichever way its arguments are passed."""

    forward: inspect.Signature
    spec: pytree.TreeSpec
    constants: Mapping[int, Any]  # leaves that are not tensors, by position; part of the capture
    names: tuple[str, ...]  # one a tensor leaf: a valid identifier, unique
    positional: tuple[str, ...] = ()  # parameters that the example passes by position
    keywords: tuple[str, ...] = ()  # and by keyword; the others are left to their defaults

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallSignature, list[Tensor]]:
        """The signature that the example shows, and the example's tensor leaves.

        Raises:
            ConfigError: the arguments do not fit the model's ``forward``.
            TraceError: the example holds no tensor.
        """
        forward = inspect.signature(model.forward)
        arguments = _arguments(forward, args, kwargs)
        positional = tuple(forward.bind_partial(*args).arguments)
        keywords = tuple(name for name in forward.bind(*args, **kwargs).arguments if name not in positional)
        paths, spec = nest.flatten_with_path(arguments)
        names: list[str] = []
        for path, leaf in paths:
            if isinstance(leaf, Tensor):
                names.append(_unique(_identifier(path), names))
        if not names:
            raise TraceError("The example inputs hold no tensor; pass what the model's forward takes.")
        constants = {i: leaf for i, (_, leaf) in enumerate(paths) if not isinstance(leaf, Tensor)}
        signature = cls(forward, spec, constants, tuple(names), positional, keywords)
        return signature, [leaf for _, leaf in paths if isinstance(leaf, Tensor)]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensor leaves of a call, in the order of ``names``.

        Raises:
            ConfigError: the call's structure or a constant differs from the captured one.
        """
        leaves, spec = nest.flatten(_arguments(self.forward, args, kwargs))
        if spec != self.spec:
            raise ConfigError(
                f"The call has another structure than the captured example: {spec} instead of {self.spec}."
            )
        tensors: list[Tensor] = []
        for i, leaf in enumerate(leaves):
            if i not in self.constants:
                if not isinstance(leaf, Tensor):
                    name = self.names[len(tensors)]
                    raise ConfigError(f"Input {name!r} was a tensor at capture and is {leaf!r} now.")
                tensors.append(leaf)
            elif isinstance(leaf, Tensor) or leaf != self.constants[i]:
                raise ConfigError(
                    f"An input that is not a tensor was {self.constants[i]!r} at capture and is {leaf!r} now; "
                    "convert again with this value."
                )
        return tensors

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The tensor leaves of a call, by name: what the first part is given."""
        return dict(zip(self.names, self.bind(args, kwargs), strict=True))

    def unbind(self, leaves: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call (args, kwargs) whose tensor leaves are ``leaves``: the inverse of ``bind``."""
        tensors = iter(leaves)
        count = len(leaves) + len(self.constants)
        flat = [self.constants[i] if i in self.constants else next(tensors) for i in range(count)]
        return self._passed(nest.unflatten(flat, self.spec))

    def _passed(self, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call that passes the arguments the way the example does: wrappers of a forward may look at that."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name in self.positional:
            several = self.forward.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            args.extend(arguments[name] if several else [arguments[name]])
        for name in self.keywords:
            several = self.forward.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            kwargs.update(arguments[name] if several else {name: arguments[name]})
        return tuple(args), kwargs


def _arguments(forward: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = forward.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"The inputs do not fit the model's forward{forward}: {error}.") from error
    bound.apply_defaults()  # an option left out and its default given are the same call
    return dict(bound.arguments)


def _identifier(path: tuple[Any, ...]) -> str:
    text = "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
    text = "".join(c if c.isalnum() else "_" for c in text)
    return text if text.isidentifier() else f"input_{text}"


def _unique(name: str, taken: Sequence[str]) -> str:
    candidate, n = name, 1
    while candidate in taken:
        n += 1
        candidate = f"{name}_{n}"
    return candidate


def to_device(value: Any, device: torch.device) -> Any:
    """All tensors in ``value`` on ``device``; copies from pinned memory overlap with computing."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors among the leaves of a value."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def leaves_of(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists, dicts and registered containers, in order."""
    return nest.leaves_of(value)
