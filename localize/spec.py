"""Frozen values that travel between the layers of the toolkit.

Shape legend: ``N`` batch, ``C`` channels or classes, ``H W`` space, ``T`` tokens, ``D`` features, ``K`` parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from localize.errors import ConfigError

Balance = Literal["flops", "memory", "activations", "params", "time"]
BALANCES: tuple[str, ...] = ("flops", "memory", "activations", "params", "time")

Layout = Literal["vector", "map", "map_last", "tokens", "other"]
"""How a hidden state is laid out, the batch axis apart: ``vector`` (D), ``map`` (C, *space),
``map_last`` (*space, C), ``tokens`` (T, D), ``other``."""

Final = Literal["last", "both"]
"""Where tokens that a recurrent layer made hold its final state: at the ``last`` one, or, of two directions, at
``both`` ends: the first half of the features at the last token, the second half at the first."""

_LAYOUTS: dict[int, Layout] = {2: "vector", 3: "tokens", 4: "map"}


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and layout of a value; the batch axis is found by running two batch sizes."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    batch_axis: int | None = 0
    layout: Layout = "other"
    final: Final | None = None  # of tokens from a recurrent layer

    @classmethod
    def of(cls, tensor: Tensor, batch_axis: int | None = 0) -> TensorSpec:
        """The spec of a tensor whose layout its number of axes tells."""
        axis = batch_axis if tensor.dim() else None
        return cls(tuple(tensor.shape), tensor.dtype, axis, _LAYOUTS.get(tensor.dim(), "other"))

    @property
    def nbytes(self) -> int:
        """Bytes of the value at the batch size of the example."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def features(self) -> tuple[int, ...]:
        """The shape without the batch axis."""
        return tuple(s for i, s in enumerate(self.shape) if i != self.batch_axis)

    @property
    def channels(self) -> int:
        """Size of the feature axis: C of a map, D of tokens or a vector."""
        if not self.features:
            return 1
        return self.features[0] if self.layout == "map" else self.features[-1]

    def __str__(self) -> str:
        return "×".join("N" if i == self.batch_axis else str(s) for i, s in enumerate(self.shape))


def indices_of(tensor: Tensor) -> tuple[float, ...] | None:
    """The values of an integer or boolean tensor, as plain numbers; None for floating-point or large ones."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta or tensor.numel() > _MOST_INDICES:
        return None
    return tuple(tensor.flatten().tolist())


_MOST_INDICES = 100_000


@dataclass(frozen=True)
class Cost:
    """What a node, a part or a head costs, at the example's batch size."""

    flops: float = 0.0  # forward floating-point operations
    param_bytes: int = 0
    saved_bytes: int = 0  # kept for the backward pass, parameters excluded, shared storage counted once
    forward_ms: float | None = None  # milliseconds of the forward pass, where measured
    backward_ms: float | None = None  # those of the backward pass
    frozen_bytes: int = 0  # of the parameters: those that do not train, without gradients and optimizer state

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.param_bytes + other.param_bytes,
            self.saved_bytes + other.saved_bytes,
            known_sum((self.forward_ms, other.forward_ms)),
            known_sum((self.backward_ms, other.backward_ms)),
            self.frozen_bytes + other.frozen_bytes,
        )

    def of(self, balance: str, optimizer_states: int = 2) -> float:
        """The one number that ``balance`` looks at.

        ``memory`` counts parameters, and of those that train gradients and ``optimizer_states`` copies (Adam: 2),
        beside saved bytes; ``time`` forward and backward milliseconds.
        """
        match balance:
            case "flops":
                return self.flops
            case "params":
                return self.param_bytes
            case "activations":
                return self.saved_bytes
            case "memory":
                trained = self.param_bytes - self.frozen_bytes
                return self.param_bytes + trained * (1 + optimizer_states) + self.saved_bytes
            case "time":
                if self.forward_ms is None:
                    raise ConfigError("balance='time' needs measured times; profile with measure_time=True.")
                return self.forward_ms + (self.backward_ms or 0.0)
        raise ConfigError(f"Unknown balance {balance!r}; one of {', '.join(BALANCES)}.")


def known_sum(values: Iterable[float | None]) -> float | None:
    """The sum of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


@dataclass(frozen=True)
class CutPoint:
    """A place where the model may be cut: after ``position`` nodes of the graph."""

    position: int  # nodes[:position] lie below the cut
    name: str  # module path (or node name) after which one cuts; unique among the model's cut points
    primary: str  # name of the value a head would read
    crossing: tuple[str, ...]  # names of all values that cross, the primary included
    spec: TensorSpec  # of the primary
    crossing_bytes: int  # of all of them, at the example's batch size
    aliases: tuple[str, ...] = ()  # further names of the same place: the other modules that end there


@dataclass(frozen=True)
class Boundary:
    """A chosen cut point, between part ``number`` and part ``number + 1`` (parts are counted from 1).

    Fields are those of ``CutPoint``; ``crossing_bytes`` counts all values that cross, for the whole example batch.
    """

    number: int
    name: str
    primary: str
    crossing: tuple[str, ...]
    spec: TensorSpec
    crossing_bytes: int


@dataclass(frozen=True)
class PartCost:
    """Cost of part ``number`` and of the head grafted on it."""

    number: int
    first: str  # first and last module of the part, for reading
    last: str
    part: Cost
    head: Cost

    @property
    def total(self) -> Cost:
        return self.part + self.head


@dataclass(frozen=True)
class Plan:
    """Where a model is cut, why, and what every part costs. Prints as a table."""

    model: str
    method: str
    balance: str
    cuts: tuple[str, ...]
    boundaries: tuple[Boundary, ...]
    parts: tuple[PartCost, ...]
    inputs: tuple[TensorSpec, ...] = ()
    indices: tuple[tuple[float, ...] | None, ...] = ()  # the values of integer inputs, which must fit the model
    representation: TensorSpec | None = None  # below the model's own classifier, where it is told from the rest
    notes: tuple[str, ...] = ()
    tied: str = "colocate"  # or ``untie``: tied parameters became copies

    @property
    def batch_axis(self) -> int:
        """The axis of the inputs that is the batch: 1 where the first is time."""
        return next((spec.batch_axis for spec in self.inputs if spec.batch_axis is not None), 0)

    @property
    def has_batch(self) -> bool:
        """Whether some input holds the samples one by one; a graph network's do not."""
        return not self.inputs or any(spec.batch_axis is not None for spec in self.inputs)

    @property
    def imbalance(self) -> float:
        """Largest part over the mean part in the balanced quantity, heads included; 1.0 is perfect."""
        if len(self.parts) == 1:
            return 1.0
        costs = [p.total.of(self.balance) for p in self.parts]
        mean = sum(costs) / len(costs)
        return max(costs) / mean if mean else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what ``plan.json`` and ``--json`` show."""
        result = asdict(self)
        result["imbalance"] = self.imbalance
        return cast(dict[str, Any], plain(result))

    def __str__(self) -> str:
        timed = self.balance == "time"
        head = f"{'part':>4}  {'from':<28} {'to':<28} {'MFLOPs':>10} {'params MB':>10} {'saved MB':>9} {'head MB':>8}"
        rows = [f"{self.model}: {self.method}, {len(self.parts)} parts by {self.balance}, "
                f"imbalance {self.imbalance:.3f} (max/mean)", f"{head} {'ms':>9}" if timed else head]
        for p in self.parts:
            rows.append(
                f"{p.number:>4}  {p.first:<28.28} {p.last:<28.28} {p.total.flops / 1e6:>10.2f} "
                f"{p.part.param_bytes / 1e6:>10.3f} {p.total.saved_bytes / 1e6:>9.3f} {p.head.param_bytes / 1e6:>8.3f}"
                + (f" {p.total.of(self.balance):>9.3f}" if timed else "")
            )
        return "\n".join(rows + [f"note: {n}" for n in self.notes])


@dataclass(frozen=True)
class StepResult:
    """What one training step did. Losses are detached scalars, part 1 first."""

    losses: tuple[Tensor, ...]
    logits: Tensor | None = None  # of the last part, detached, where the method makes any

    @property
    def loss(self) -> float:
        """The sum over parts."""
        return float(sum(float(x) for x in self.losses))


def plain(value: Any) -> Any:
    """Plain data for JSON: tensors as numbers, dtypes and paths as text, what is not a finite number as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.as_posix() if isinstance(value, Path) else str(value)
