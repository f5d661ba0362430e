"""One interface for every local-learning rule.

A *method* says which parts get a head, what each head's loss is, which parts that loss trains and what is
handed back to the part below. The stage (``runtime/step.py``) does the rest, the same way for all methods:

    hidden ─detach→ leaf ─head→ loss ─backward→ ∂loss/∂leaf ─route→ the parts the loss trains

Shapes: ``N`` batch, ``C`` channels or classes, ``H W`` space, ``T`` tokens, ``D`` features, ``K`` parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn

from localize.errors import MethodError, did_you_mean, problem_list
from localize.spec import TensorSpec
from localize.task import Task

Target = Any
"""What a head is trained towards: labels, or a tuple of tensors (AL: the code t_{k-1} and the labels)."""


@dataclass(frozen=True)
class HeadSite:
    """Where a head is built: on the hidden state of part ``number`` of ``parts`` (counted from 1).

    ``hidden`` describes the hidden state. On the last part it is the model's logits, or, for a method with
    ``splits_classifier``, the representation below ``classifier``: the model's own last layers as a callable,
    (N, …) → the model's output, whose weights belong to the part and not to the head. ``classifier`` is None
    on all other parts, and where the last part has no layers below its classifier. It is a module or a bound
    method of one, so that ``copy.deepcopy`` of part and head together keeps the two tied. ``output`` is the
    spec of the model's logits (``Task.logits``): heads that predict take their sizes from it.
    """

    number: int
    parts: int
    hidden: TensorSpec
    task: Task
    classifier: Callable[[Tensor], Any] | None = None
    output: TensorSpec | None = None

    @property
    def is_last(self) -> bool:
        return self.number == self.parts

    def error(self, method: str, problem: str, instead: str) -> MethodError:
        """The error that says why ``method`` cannot work here, and what does."""
        return MethodError(
            f"Method {method!r}, part {self.number} of {self.parts}, hidden state {self.hidden} "
            f"({self.hidden.layout}): {problem}. {instead}"
        )


@dataclass
class HeadOutput:
    """What a head makes of a hidden state and a target.

    ``loss`` is a scalar with a graph to the hidden state and the head's weights; ``per_sample`` (N) where the
    method needs it; ``logits`` (N, C) where the head predicts; ``target`` is what the part above is given
    (detached) where the method ``encodes_target``, else None: the same as this one was given.
    """

    loss: Tensor
    per_sample: Tensor | None = None
    logits: Tensor | None = None
    target: Target | None = None


class AcrossReplicas(Protocol):
    """What a head can ask of the other replicas of its part, each of which has a batch of its own."""

    def __call__(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Of each tensor (N, …) the rows of all replicas, (ΣN, …), in one order on all of them; N may differ.

        All replicas call this in the same order. Gradients flow back to the replica that a row is of, and are summed
        there over all replicas' losses: averaged over replicas, weights get the gradient of the mean of these losses.
        """


class Head(nn.Module):
    """Auxiliary network of one part. Subclasses implement ``forward`` and, if they predict, ``predictor``.

    ``replicas`` is there during a training step with several replicas, and None otherwise.
    """

    site: HeadSite
    replicas: AcrossReplicas | None = None

    def __init__(self, site: HeadSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, hidden: Tensor, target: Target) -> HeadOutput:
        """The part's local loss on ``hidden`` (a detached leaf during training)."""
        raise NotImplementedError

    def feedback_loss(self, output: HeadOutput, feedback: Tensor) -> Tensor:
        """With ``feedback``: the loss that trains this head, from what the part above handed back.

        ``feedback`` is detached. Only the head's own parameters receive this loss's gradient.
        """
        raise NotImplementedError

    def predictor(self) -> nn.Module | None:
        """A module hidden → logits (N, C) without training-only weights, sharing this head's own; or None."""
        return None

    def example_target(self, batch: int, device: torch.device | str) -> Target:
        """A target of the right kind for a dry run with ``batch`` samples (labels of class 0)."""
        return example_labels(self.site.task, self.site.output or self.site.hidden, batch, device)


class TaskHead(Head):
    """No parameters: the task's own loss on the model's output. The last part's head of most methods."""

    def __init__(self, site: HeadSite, per_sample: bool = False) -> None:
        super().__init__(site)
        self.per_sample = per_sample  # whether the part below wants to hear the loss of every sample

    def forward(self, hidden: Tensor, target: Target) -> HeadOutput:
        task = self.site.task
        each = task.per_sample(hidden, target) if self.per_sample else None
        return HeadOutput(task.loss(hidden, target), each, hidden)


class ExitHead(Head):
    """A network of its own, hidden → logits, trained by the task's loss: an exit.

    Args:
        site: where the head stands.
        net: hidden state → logits.
        per_sample: whether the loss of every sample is wanted too.
        weight: factor of the loss.
    """

    def __init__(self, site: HeadSite, net: nn.Module, per_sample: bool = False, weight: float = 1.0) -> None:
        super().__init__(site)
        self.net = net.to(site.hidden.dtype)
        self.per_sample = per_sample
        self.weight = weight

    def forward(self, hidden: Tensor, target: Target) -> HeadOutput:
        task = self.site.task
        logits: Tensor = self.net(hidden)
        each = task.per_sample(logits, target) if self.per_sample else None
        loss = task.loss(logits, target)
        return HeadOutput(loss if self.weight == 1.0 else self.weight * loss, each, logits)

    def predictor(self) -> nn.Module:
        return self.net


def example_labels(task: Task, hidden: TensorSpec, batch: int, device: torch.device | str) -> Tensor:
    """Targets of class 0, shaped for ``task``; ``hidden`` is the logits' spec, or one of the same layout."""
    axis = hidden.batch_axis or 0
    match task.kind:
        case "classification":
            return torch.zeros(batch, dtype=torch.int64, device=device)
        case "regression":
            return torch.zeros(_with_batch(hidden.features, batch, axis), device=device)
        case "causal_lm":
            return torch.zeros(_with_batch(hidden.features[:1], batch, axis), dtype=torch.int64, device=device)
        case _:
            return torch.zeros((batch, *hidden.features[1:]), dtype=torch.int64, device=device)


def _with_batch(features: tuple[int, ...], batch: int, axis: int) -> tuple[int, ...]:
    return (*features[:axis], batch, *features[axis:])


@dataclass(frozen=True)
class Method:
    """A local-learning rule. Fields are its options: the command line derives its flags from them."""

    name: ClassVar[str]
    summary: ClassVar[str] = ""  # one line, for the table of methods
    source: ClassVar[str] = ""  # paper and year
    feedback: ClassVar[Literal["loss", "grad"] | None] = None
    separate_head_optimizer: ClassVar[bool] = False  # heads get an optimizer of their own
    head_learning_rate: ClassVar[float | None] = None  # Adam's, where separate (None: as the part)
    reach = cast("int | None", 1)  # parts one loss trains, its own and those below; None: all. May be an option
    heads_below: ClassVar[bool] = True
    """Whether parts below the last get heads. A method without any also takes models whose samples cannot be told
    apart."""
    encodes_target: ClassVar[bool] = False
    """Whether heads make the target of the part above (``HeadOutput.target``), which then has to wait for them."""
    predicts: ClassVar[Literal["none", "exits", "path"]] = "none"
    """``none``: only the model's own output; ``exits``: heads 1..K-1 predict too; ``path``: every exit,
    the last one included, goes through the heads (AL)."""

    @property
    def splits_classifier(self) -> bool:
        """Whether the last part's head reads the representation below the model's own classifier."""
        return False

    def reach_in(self, parts: int) -> int:
        """The reach in a model of so many parts."""
        return parts if self.reach is None else min(self.reach, parts)

    def trains(self, number: int, parts: int) -> range:
        """The parts (from 1, ascending) that the loss of part ``number`` trains; empty for none.

        A head without parts in range still learns from its loss, on the detached hidden state.
        """
        return range(max(1, number - self.reach_in(parts) + 1), number + 1)

    def build_head(self, site: HeadSite) -> Head | None:
        """The head of the part at ``site``; None where the part has neither head nor loss.

        Raises:
            MethodError: the method cannot work on this hidden state or task; the message names one that can.
        """
        raise NotImplementedError

    def predictor(self, heads: Sequence[Head | None]) -> nn.Module | None:
        """Hidden state of part ``len(heads)`` → logits, from the heads up to there; None: no such exit."""
        head = heads[-1]
        return head.predictor() if head is not None else None

    def options(self) -> dict[str, Any]:
        """The options as plain data, for ``plan.json``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """The method with these options.

        Raises:
            MethodError: an option that the method does not have.
        """
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                listed = ", ".join(known) or "none"
                raise MethodError(
                    f"Method {cls.name!r} has no option {key!r}.{did_you_mean(key, known)} "
                    f"Its options: {listed}."
                )
        return cls(**options)

    def check(self, *problems: str | None) -> None:
        """Raises ``MethodError`` with all ``problems`` that are not None: what ``__post_init__`` calls."""
        found = [p for p in problems if p]
        if found:
            raise MethodError(problem_list(f"Method {self.name!r} cannot take these options", found))


def one_of(option: str, value: object, choices: Sequence[object]) -> str | None:
    """The problem with an option that has to be one of ``choices``; None where there is none."""
    if value in choices:
        return None
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    return f"{option}={value!r} is none of {', '.join(repr(c) for c in choices)}.{hint}"


def positive(option: str, value: object, whole: bool = False) -> str | None:
    """The problem with an option that has to be a positive number (an integer where ``whole``)."""
    kinds = int if whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf:
        return None
    return f"{option}={value!r} is not a positive {'integer' if whole else 'number'}."
