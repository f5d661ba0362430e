"""What a receiver knows of a message before it comes, and so can hold its header against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localize.errors import WireError, problem_list
from localize.heads.base import Method
from localize.part import Part
from localize.runtime.packing import Packed
from localize.runtime.routing import flows
from localize.runtime.wire import Edge, Header, Kind, Type, place
from localize.spec import TensorSpec

Shape = tuple[torch.dtype, tuple[int, ...]]
_BATCHES = {Kind.DATA: True, Kind.EVAL: False}  # by kind: whether the part is in train mode


@dataclass
class Upwards:
    """What the part above a boundary expects: the values that cross, batch after batch.

    Sizes may change from batch to batch (a ragged last one, longer texts); names, dtypes and numbers of axes may not,
    nor the channels of the value that the plan describes.

    Args:
        edge: from the part below to the part that receives.
        names: the values that cross, by mode (True for train).
        step: the number, from 0, of the first training batch.
        primary: name and spec of the value that the head below reads, where known: one for both modes.
    """

    edge: Edge
    names: Mapping[bool, tuple[str, ...]]
    step: int
    primary: tuple[str, TensorSpec] | None = None
    _seen: dict[tuple[Kind, str], tuple[torch.dtype, int]] = field(default_factory=dict)
    _evaluated: int = 0
    _pieces: int = 0  # of the current training batch that have come

    def check(self, header: Header) -> None:
        """Raises ``WireError`` where a header is not the next one."""
        if header.kind not in _BATCHES:
            self._evaluated = 0
            return
        training = header.kind is Kind.DATA
        problems = _about(header, self.edge, Type.UPWARD, self.step if training else self._evaluated)
        values = [spec for spec in header.tensors if not spec.name.startswith("target ")]
        problems += _names(values, self.names[training])
        for spec in values:
            problems += self._spec(header.kind, spec)
        _raise(header, self.edge, problems)
        if training:
            self._pieces += 1
            if self._pieces == header.note.get("microbatches", 1):
                self.step, self._pieces = self.step + 1, 0
        else:
            self._evaluated += 1

    def _spec(self, kind: Kind, spec: Packed) -> list[str]:
        dtype, axes = self._seen.setdefault((kind, spec.name), (spec.dtype, len(spec.shape)))
        if (dtype, axes) != (spec.dtype, len(spec.shape)):
            return [f"expected {spec.name} as {_kind(dtype)} with {axes} axes, as before, found {spec}"]
        if self.primary is None or self.primary[0] != spec.name:
            return []
        plan = self.primary[1]
        if plan.layout == "other":
            return []
        found = TensorSpec(spec.shape, spec.dtype, plan.batch_axis, plan.layout)
        if len(spec.shape) != len(plan.shape) or found.channels != plan.channels:
            return [f"expected {spec.name} of shape {plan} with {plan.channels} channels, found {spec}"]
        return []


@dataclass
class Downwards:
    """What the part below a boundary expects: gradients of what it sent, or the loss of every sample."""

    edge: Edge
    types: Sequence[Type]  # of the messages of one batch, in order; gradients come once a micro-batch
    step: int
    sent: dict[int, list[dict[str, Shape]]] = field(default_factory=dict)  # by step: what went up, piece by piece

    _count: int = 0

    def sends(self, step: int, stream: Mapping[str, Tensor]) -> None:
        """What goes up with a batch."""
        shapes = {name: (value.dtype, tuple(value.shape)) for name, value in stream.items()}
        self.sent.setdefault(step, []).append(shapes)

    def check(self, header: Header) -> None:
        """Raises ``WireError`` where a header is not the next one."""
        if header.kind is not Kind.DATA:
            return
        if not self.types:
            found = f"expected nothing but the end, found {header.type.name.lower()}"
            raise WireError(problem_list(place(header.step, self.edge), [found]))
        pieces = self.sent.get(header.step) or [{}]
        messages = [(each, i) for each in self.types for i in reversed(range(len(pieces) if each is Type.RELAY else 1))]
        wanted, piece = messages[self._count]
        sent = pieces[piece]
        problems = _about(header, self.edge, wanted, self.step)
        if wanted is Type.RELAY:
            for spec in header.tensors:
                if spec.name not in sent:
                    problems.append(f"expected gradients of {', '.join(sent) or 'nothing'}, found one of {spec.name}")
                elif sent[spec.name] != (spec.dtype, spec.shape):
                    dtype, shape = sent[spec.name]
                    problems.append(f"expected the gradient of {spec.name} {_kind(dtype)} {shape}, found {spec}")
        elif [(spec.name, len(spec.shape)) for spec in header.tensors] != [("per_sample", 1)]:
            found = ", ".join(map(str, header.tensors)) or "nothing"
            problems.append(f"expected per_sample with one axis, found {found}")
        _raise(header, self.edge, problems)
        self._count += 1
        if self._count == len(messages):
            self.sent.pop(self.step, None)
            self.step, self._count = self.step + 1, 0


def messages_down(method: Method, number: int, parts: int) -> list[Type]:
    """What part ``number`` hands down in one training batch, in order: gradients (RELAY) once for each micro-batch."""
    down = {flow.down for flow in flows(method, number, parts) if flow.down is not None}
    return [Type.FEEDBACK] * (method.feedback == "loss") + [Type.RELAY] * len(down)


def crossing_into(part: Part) -> dict[bool, tuple[str, ...]]:
    """The values that a part takes or lets through, by mode (True for train)."""
    routes = part.__dict__["_routes"]
    return {mode: tuple(dict.fromkeys((*route.takes, *route.passes))) for mode, route in routes.items()}


def _about(header: Header, edge: Edge, kind: Type, step: int) -> list[str]:
    problems = []
    if header.edge != edge:
        problems.append(f"expected a message of {edge}, found one of {header.edge}")
    if header.type is not kind:
        problems.append(f"expected {kind.name.lower()}, found {header.type.name.lower()}")
    if header.step != step:
        problems.append(f"expected step {step + 1}, found step {header.step + 1}")
    return problems


def _names(values: Iterable[Packed], wanted: Iterable[str]) -> list[str]:
    found, expected = {spec.name for spec in values}, set(wanted)
    if found == expected:
        return []
    return [f"expected the values {', '.join(sorted(expected))}, found {', '.join(sorted(found)) or 'none'}"]


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raise(header: Header, edge: Edge, problems: list[str]) -> None:
    if problems:
        raise WireError(problem_list(place(header.step, edge), problems))
