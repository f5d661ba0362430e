"""The algorithm of every method, once: what one part does with one batch.

    stream ─part→ hidden ─detach→ leaf ─head→ loss
      ▲               │                        │ 2. backward to the leaf
      │ 4. relay      ▼ 1. send up             ▼
    part below ◄─ 3. backward through the part ◄─ ∂loss/∂leaf (+ gradients from above, if losses reach that far)

``stage_step`` is a generator: it says what it wants to send or receive, and whoever runs it (one process with
all stages, or one process a stage) carries that out. Nothing else in the toolkit knows how a method learns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from localize.heads.base import Head, HeadOutput, Method, Target
from localize.part import Part, Stream, advance
from localize.runtime.messages import Action, Feedback, Message, Receive, Relay, Send, Side, Upward
from localize.runtime.routing import Flow, flows
from localize.task import Task

Half = Literal["part", "head"]


class Updater(Protocol):
    """What happens to gradients once they are complete."""

    def begin(self, stage: Stage, loss: Tensor | None) -> None:
        """Before the stage's first backward pass; ``loss`` is detached."""

    def ready(self, stage: Stage, half: Half) -> None:
        """The gradients of the stage's part, or of its head, are complete in ``.grad``."""


@dataclass
class Stage:
    """A part with its head, on a device.

    ``autocast`` makes the context that forward passes run in; ``scale`` multiplies a loss before its backward
    (float16); ``measure`` says of a head's logits and target what the report should keep.
    """

    part: Part
    head: Head | None
    method: Method
    task: Task
    number: int
    parts: int
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    scale: Callable[[Tensor], Tensor] | None = None
    measure: Callable[[Tensor, Target], Tensor] | None = None
    flows: list[Flow] = field(init=False)
    _weights: dict[Half, list[nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        self.flows = flows(self.method, self.number, self.parts)
        heads = [] if self.head is None else list(self.head.parameters())
        self._weights = {"part": list(self.part.parameters()), "head": heads}

    @property
    def is_last(self) -> bool:
        return self.number == self.parts

    @property
    def relays_down(self) -> bool:
        """Whether gradients of the values from below are wanted there."""
        return any(flow.down is not None for flow in self.flows)

    @property
    def learns_from_feedback(self) -> bool:
        return self.method.feedback == "loss" and not self.is_last and self.head is not None

    def parameters(self, half: Half) -> list[nn.Parameter]:
        """Trainable parameters of the part or of the head."""
        return [p for p in self._weights[half] if p.requires_grad]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as its backward pass wants it."""
        return loss if self.scale is None else self.scale(loss)


@dataclass
class Work:
    """What a stage keeps of a batch between forward and backward."""

    inputs: Stream  # leaves; those that gradients are wanted of require them
    outputs: Stream  # what crosses the boundary above, with its graph
    hidden: Tensor | None  # what the head read, with its graph
    leaf: Tensor | None
    head: HeadOutput | None
    target: Target  # for the part above


@dataclass(frozen=True)
class StageReport:
    """What a stage did, detached: its local loss, if any; the last part's logits; what ``Stage.measure`` gave."""

    loss: Tensor | None
    logits: Tensor | None
    measured: Tensor | None = None


def stage_step(
    stage: Stage, updater: Updater, scope: AbstractContextManager[object] | None = None
) -> Generator[Action, Message | None, StageReport]:
    """One batch through one stage. Activations leave upward before the first backward pass starts."""
    arrived = yield Receive(Side.BELOW)
    assert isinstance(arrived, Upward)
    with scope or nullcontext(), stage.autocast():
        work = forward(stage, arrived)
    report = report_of(stage, work.head, arrived.target)
    del arrived
    if not stage.is_last:
        yield Send(Side.ABOVE, departing(work))
    if not torch.is_grad_enabled():
        return report

    updater.begin(stage, report.loss)
    own = learn_head(stage, work)
    if stage.method.feedback == "loss" and stage.number > 1 and work.head and work.head.per_sample is not None:
        yield Send(Side.BELOW, Feedback(work.head.per_sample.detach()))

    below: dict[tuple[int, ...], Stream] = {}
    for flow in stage.flows:
        grads: Stream = {}
        if flow.from_above:
            relayed = yield Receive(Side.ABOVE)
            assert isinstance(relayed, Relay)
            grads = relayed.grads
        passed = pull(stage, work, grads, own if flow.own else None, flow)
        if flow.down is not None:
            below[flow.down] = add(below.get(flow.down, {}), passed)
            if flow is last_towards(stage.flows, flow.down):
                yield Send(Side.BELOW, Relay(below.pop(flow.down)))
    # The part's activations go now; a head that waits for feedback keeps only its own graph.
    work.inputs, work.outputs, work.hidden = {}, {}, None
    updater.ready(stage, "part")

    if stage.learns_from_feedback:
        feedback = yield Receive(Side.ABOVE)
        assert isinstance(feedback, Feedback)
        learn_from_feedback(stage, work, feedback.per_sample)
    updater.ready(stage, "head")
    return report


def forward(stage: Stage, arrived: Upward) -> Work:
    """Part, then head, on values cut off from the parts below."""
    learning = torch.is_grad_enabled()
    wanted, constant = learning and stage.relays_down, stage.part.route.constant
    inputs = {
        name: value.detach().requires_grad_(wanted and name not in constant and _has_gradients(value))
        for name, value in arrived.stream.items()
    }
    keeps = stage.method.splits_classifier and stage.part.route.hidden is not None
    result, outputs = advance(stage.part, inputs, hidden_only=keeps)
    if stage.head is None:
        return Work(inputs, outputs, None, None, None, arrived.target)
    hidden = stage.task.logits(result) if stage.is_last and not keeps else result
    assert isinstance(hidden, Tensor)
    learns = hidden.requires_grad and any(flow.own for flow in stage.flows)
    leaf = hidden.detach().requires_grad_(learning and learns)
    made = stage.head(leaf, arrived.target)
    target = arrived.target if made.target is None else made.target
    return Work(inputs, outputs, hidden, leaf, made, target)


def _has_gradients(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def report_of(stage: Stage, made: HeadOutput | None, target: Target) -> StageReport:
    """What is known after the forward pass; logits of lower parts are not kept, they would outlive the part."""
    if made is None:
        return StageReport(None, None)
    logits = None if made.logits is None else made.logits.detach()
    measured = stage.measure(logits, target) if stage.measure and logits is not None else None
    return StageReport(made.loss.detach(), logits if stage.is_last else None, measured)


def departing(work: Work) -> Upward:
    """What goes up: detached, so that nothing above keeps this part's graph alive."""
    return Upward({name: value.detach() for name, value in work.outputs.items()}, work.target)


def learn_head(stage: Stage, work: Work) -> Tensor | None:
    """The head's own backward pass: gradients of its weights and, returned, of the hidden state.

    A head that learns from feedback gets no gradient of this loss.
    """
    if work.head is None or not work.head.loss.requires_grad:
        return None
    loss = stage.scaled(work.head.loss)
    if stage.learns_from_feedback:
        if work.leaf is None or not work.leaf.requires_grad:
            return None
        return torch.autograd.grad(loss, work.leaf, retain_graph=True)[0]
    torch.autograd.backward(loss)
    # The graph is spent: keep the numbers only, so that the head's activations go before the part's backward.
    each = work.head.per_sample
    work.head = HeadOutput(work.head.loss.detach(), None if each is None else each.detach())
    leaf, work.leaf = work.leaf, None
    return leaf.grad if leaf is not None else None


def pull(stage: Stage, work: Work, grads: Stream, own: Tensor | None, flow: Flow) -> Stream:
    """One backward pass through the part: trains it if the flow says so; returns gradients for the part below."""
    taken = {name: work.inputs[name] for name in stage.part.route.takes}
    # What only travels through has no graph here. What is read here and travels on too is a root as well as a
    # leaf: the gradient from above is then summed first, in the order of an uncut backward pass.
    passed = {name: grad for name, grad in grads.items() if name in work.inputs and name not in taken}
    roots = [(work.outputs[name], grad) for name, grad in grads.items() if name not in passed]
    if own is not None and work.hidden is not None:
        roots.append((work.hidden, own))
    roots = [(value, grad) for value, grad in roots if value.requires_grad]
    if not roots:
        return passed
    values, cotangents = [value for value, _ in roots], [grad for _, grad in roots]
    leaves = {name: leaf for name, leaf in taken.items() if leaf.requires_grad and flow.down is not None}
    trained = stage.parameters("part") if flow.trains else []
    wanted = [*leaves.values(), *trained]
    if wanted:
        # All leaves of the graph, unless this flow only passes through or ends here. Named only then: re-entrant
        # checkpoints inside the part do not work where they are named.
        ends_here = flow.down is None and any(leaf.requires_grad for leaf in taken.values())
        named = None if flow.trains and not ends_here else wanted
        torch.autograd.backward(values, cotangents, retain_graph=flow is not stage.flows[-1], inputs=named)
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            passed[name], leaf.grad = leaf.grad, None
    return passed


def learn_from_feedback(stage: Stage, work: Work, feedback: Tensor) -> None:
    """Trains the head, and nothing but the head, from what the part above handed back."""
    assert stage.head is not None and work.head is not None
    weights = stage.parameters("head")
    if weights:
        with stage.autocast():
            loss = stage.scaled(stage.head.feedback_loss(work.head, feedback))
        torch.autograd.backward(loss, inputs=weights)
    work.head = work.leaf = None


def add(one: Stream, other: Stream) -> Stream:
    """Sums gradients name by name."""
    both = {name: one[name] + other[name] for name in one if name in other}
    return one | other | both


def last_towards(all_flows: Sequence[Flow], key: tuple[int, ...]) -> Flow:
    """The last flow that joins the flow ``key`` of the part below."""
    return [flow for flow in all_flows if flow.down == key][-1]
