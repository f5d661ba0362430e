"""``Part``: a contiguous piece of the user's model, and how parts are run one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from localize.signature import Call, CallSignature

Stream = dict[str, Tensor]
"""The values that travel upward between parts, by name."""


@dataclass(frozen=True)
class Program:
    """A straight-line function over a part's own modules. ``source`` is for reading."""

    run: Callable[..., Any]
    source: str
    members: tuple[str, ...] = ()  # paths of the modules, parameters and buffers it uses


@dataclass(frozen=True)
class Route:
    """How one part is run in one mode (train or eval).

    ``takes`` are the stream's values the part reads, ``gives`` those it makes, ``passes`` those that only travel
    through; ``gives`` and ``passes`` together cross the boundary above. ``primary`` is the value the head reads
    (None on the last part: the logits). On the last part ``whole`` returns the model's output, and ``hidden`` and
    ``classifier`` split it below the model's own classifier, where a method asks for that.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    passes: tuple[str, ...]
    primary: str | None
    whole: Program
    hidden: Program | None = None
    classifier: Program | None = None
    hidden_name: str = ""  # of the representation that ``hidden`` makes
    constant: frozenset[str] = frozenset()  # of what comes from below: values no gradient is wanted of, masks say


class Part(nn.Module):
    """A contiguous piece of the user's model, with the original parameter names and the original modules.

    ``part(*values)`` takes the values named in ``part.route.takes`` and returns those in ``part.route.gives``
    (one tensor where it is one); the last part returns the model's output.

    Args:
        number: counted from 1.
        routes: how it runs, by mode (True for train).
        members: modules, parameters and buffers of the user's model that the part uses, by path.
        constants: tensors that the capture found outside of parameters and buffers, by name.
    """

    def __init__(
        self,
        number: int,
        routes: dict[bool, Route],
        members: dict[str, nn.Module | Tensor],
        constants: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["_number"] = number
        self.__dict__["_routes"] = routes
        self.__dict__["_constants"] = tuple(constants or ())
        for path, member in members.items():
            _attach(self, path, member)
        for name, tensor in (constants or {}).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def route(self) -> Route:
        """The route of the part's current mode."""
        route: Route = self.__dict__["_routes"][self.training]
        return route

    @property
    def source_code(self) -> str:
        """The part's forward as generated Python, for reading."""
        return self.route.whole.source

    def forward(self, *values: Any) -> Any:
        result = self.route.whole.run(self, *values)
        if len(self.route.gives) == 1:
            return result[0]
        return result

    def run_hidden(self, *values: Tensor) -> Tensor:
        """On a last part that is split: the representation below the model's own classifier, (N, …)."""
        program = self.route.hidden
        assert program is not None, "this part has no classifier of its own"
        hidden: Tensor = program.run(self, *values)
        return hidden

    def run_classifier(self, hidden: Tensor) -> Tensor:
        """On a last part that is split: the model's logits from the representation."""
        program = self.route.classifier
        assert program is not None, "this part has no classifier of its own"
        logits: Tensor = program.run(self, hidden)
        return logits

    def below_classifier(self) -> Part:
        """A last part that is split, without its classifier: it gives the representation, and shares weights."""
        routes = {}
        for mode, route in self.__dict__["_routes"].items():
            assert route.hidden is not None, "this part has no classifier of its own"
            routes[mode] = replace(route, whole=route.hidden, hidden=None, classifier=None)
        paths = {path for route in routes.values() for path in route.whole.members}
        members = {path: _member(self, path) for path in paths}
        part = Part(self.__dict__["_number"], routes, members)
        set_own_mode(part, self.training)
        return part

    def take_over(self, model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Follows ``model`` after its tensors went through ``fn`` (a move, a cast): same tensors, same names."""
        for name, held in list(self.named_parameters()) + list(self.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            holder: Any = _member(self, owner) if owner else self
            if name in self.__dict__["_constants"]:
                moved = fn(held)  # to another device, but of the type it has: the model's own casts pass it by, too
                current = moved if moved.dtype == held.dtype else held.to(moved.device)
            elif isinstance(holder, _Namespace | Part):
                current = getattr(model.get_submodule(owner), leaf)
            else:
                continue  # the user's own module, already converted
            (holder._parameters if leaf in holder._parameters else holder._buffers)[leaf] = current

    def extra_repr(self) -> str:
        route = self.route
        return f"part {self.__dict__['_number']}: takes {list(route.takes)}, gives {list(route.gives)}"


class _Namespace(nn.Module):
    """Stands where the user's model has a container whose forward was captured."""


def set_own_mode(module: nn.Module, training: bool) -> None:
    """Sets the mode of parts below ``module``, and of nothing that is the user's: a frozen layer stays in eval."""
    for inner in module.modules():
        if isinstance(inner, Part | _Namespace):
            inner.training = training


def _attach(part: Part, path: str, member: nn.Module | Tensor) -> None:
    *owners, leaf = path.split(".")
    holder: nn.Module = part
    for name in owners:
        if name not in holder._modules:
            holder._modules[name] = _Namespace()
        holder = _member(holder, name)
    if isinstance(member, nn.Module):
        holder._modules[leaf] = member
    elif isinstance(member, nn.Parameter):
        holder._parameters[leaf] = member
    else:
        holder._buffers[leaf] = member


def _member(root: nn.Module, path: str) -> Any:
    """What ``root`` holds at ``path``; its modules first, for one may be called like an attribute of a Part."""
    value: Any = root
    for name in path.split("."):
        value = value.__getattr__(name) if isinstance(value, nn.Module) else getattr(value, name)
    return value


def advance(part: Part, stream: Stream, hidden_only: bool = False) -> tuple[Any, Stream]:
    """Runs one part on the stream: its hidden state (last part: the model's output) and the stream above it.

    ``hidden_only`` stops below the classifier of a last part that is split.
    """
    route = part.route
    values = [stream[name] for name in route.takes]
    if hidden_only and route.hidden is not None:
        return part.run_hidden(*values), {}
    result = part(*values)
    if route.primary is None:
        return result, {}
    made = (result,) if len(route.gives) == 1 else result
    above = dict(zip(route.gives, made, strict=True)) | {name: stream[name] for name in route.passes}
    return above[route.primary] if route.primary else result, above


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is put back afterwards."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def run_parts(parts: Iterable[nn.Module], signature: CallSignature, call: Call, hidden_only: bool = False) -> Any:
    """Parts one after another, gradients flowing: the top one's hidden state, or the model's output."""
    stream = signature.stream(call.args, call.kwargs)
    result: Any = None
    for part in parts:
        assert isinstance(part, Part)
        result, stream = advance(part, stream, hidden_only)
    return result


def kind_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model's first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()
