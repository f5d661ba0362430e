"""The algorithm of every method, once: what one part does with one batch.

                 1. send up
                      ▲
    stream ─part→ hidden ─detach→ leaf ─head→ loss
      ▲                                        │ 2. backward to the leaf
      │ 4. relay                               ▼
    part below ◄─ 3. backward through the part ◄─ ∂loss/∂leaf (+ gradients from above, if losses reach that far)

``stage_step`` is a generator: it says what it wants to send or receive, and whoever runs it (one process with
all stages, or one process a stage) carries that out. Nothing else in the toolkit knows how a method learns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localize.errors import MethodError
from localize.heads.base import HeadOutput, Target
from localize.part import Stream, advance
from localize.runtime.messages import Action, Begin, Feedback, Message, Receive, Relay, Send, Side, Upward
from localize.runtime.routing import Flow
from localize.runtime.stage import Stage, StageReport, Updater


@dataclass
class Work:
    """What a stage keeps of a micro-batch between forward and backward."""

    inputs: Stream  # leaves; those that gradients are wanted of require them
    outputs: Stream  # what crosses the boundary above, with its graph
    hidden: Tensor | None  # what the head reads, with its graph
    below: dict[tuple[int, ...], Stream] = field(default_factory=dict)  # gradients to be handed down, by flow there


@dataclass
class Lesson:
    """What a stage keeps of its head: it sees the whole batch at once."""

    leaf: Tensor | None = None  # the hidden state, cut off from the part
    made: HeadOutput | None = None
    sizes: list[int] = field(default_factory=list)  # of the micro-batches, along ``axis``
    axis: int = 0


Scope = Callable[[Stage, int], AbstractContextManager[object]]
"""What a stage's forward passes run in, by micro-batch (from 0), and, called with ``HEAD``, its head's."""

HEAD = -1


def anywhere(stage: Stage, micro: int) -> AbstractContextManager[object]:
    return nullcontext()


def stage_step(
    stage: Stage, updater: Updater, scope: Scope = anywhere, microbatches: int = 1
) -> Generator[Action, Message | None, StageReport]:
    """One batch, in so many micro-batches, through one stage. Activations leave upward before anything else is done.

    Only heads that make the target of the part above come first. All micro-batches go forward, then the head learns
    from the whole batch, then the micro-batches go backward, the last one first.
    """
    works: list[Work] = []
    target: Target = None
    for micro in range(microbatches):
        arrived = yield Receive(Side.BELOW)
        assert isinstance(arrived, Upward)
        yield Begin("forward", _number(micro, microbatches))
        if micro == 0:  # it travels with the first one
            target = arrived.target
        with scope(stage, micro), stage.autocast():
            works.append(forward(stage, arrived.stream))
        del arrived
        if not stage.is_last and not stage.encodes_target:
            yield Send(Side.ABOVE, departing(works, micro, target))
    if stage.head is not None:
        yield Begin("head")
    with scope(stage, HEAD), stage.autocast():
        lesson = attend(stage, works, target)
    report = report_of(stage, lesson.made, target)
    if not stage.is_last and stage.encodes_target:
        if lesson.made is not None and lesson.made.target is not None:
            target = lesson.made.target
        for micro in range(microbatches):
            yield Send(Side.ABOVE, departing(works, micro, target))
    if torch.is_grad_enabled():
        yield from learn(stage, updater, works, lesson, report.loss)
    return report


def learn(
    stage: Stage, updater: Updater, works: list[Work], lesson: Lesson, loss: Tensor | None
) -> Generator[Action, Message | None]:
    """The backward passes of a batch: the head's, then the part's, and what comes from above and goes down."""
    updater.begin(stage, loss)
    own = learn_head(stage, lesson)
    per_sample = None if lesson.made is None else lesson.made.per_sample
    if stage.method.feedback == "loss" and stage.number > 1 and per_sample is not None:
        yield Send(Side.BELOW, Feedback(per_sample.detach()))
    shares = [own] * len(works) if own is None or len(works) == 1 else own.split(lesson.sizes, lesson.axis)
    del own
    for flow in stage.flows:
        for micro, work in reversed(list(enumerate(works))):
            share, grads = shares[micro], Stream()
            if flow.from_above:
                relayed = yield Receive(Side.ABOVE)
                assert isinstance(relayed, Relay)
                grads = relayed.grads
            yield Begin("backward", _number(micro, len(works)))
            passed = pull(stage, work, grads, share if flow.own else None, flow)
            if flow is stage.flows[-1]:  # the activations go now
                work.inputs, work.outputs, work.hidden = {}, {}, None
            if flow.down is not None:
                work.below[flow.down] = add(work.below.get(flow.down, {}), passed)
                if flow is last_towards(stage.flows, flow.down):
                    yield Send(Side.BELOW, Relay(work.below.pop(flow.down)))
    updater.ready(stage, "part")

    if stage.learns_from_feedback:  # the head keeps its own graph until then
        feedback = yield Receive(Side.ABOVE)
        assert isinstance(feedback, Feedback)
        yield Begin("head")
        learn_from_feedback(stage, lesson, feedback.per_sample)
    updater.ready(stage, "head")


def _number(micro: int, of: int) -> int | None:
    return None if of == 1 else micro + 1


def forward(stage: Stage, stream: Stream) -> Work:
    """The part, on values cut off from the parts below."""
    wanted, constant = torch.is_grad_enabled() and stage.relays_down, stage.part.route.constant
    inputs = {
        name: value.detach().requires_grad_(wanted and name not in constant and _has_gradients(value))
        for name, value in stream.items()
    }
    result, outputs = advance(stage.part, inputs, hidden_only=stage.keeps_classifier)
    if stage.head is None:
        return Work(inputs, outputs, None)
    hidden = stage.task.logits(result) if stage.is_last and not stage.keeps_classifier else result
    assert isinstance(hidden, Tensor)
    return Work(inputs, outputs, hidden)


def attend(stage: Stage, works: Sequence[Work], target: Target) -> Lesson:
    """The head, on the hidden state of the whole batch, cut off from the part."""
    if stage.head is None:
        return Lesson()
    hidden = [work.hidden for work in works if work.hidden is not None]
    axis = stage.head.site.hidden.batch_axis or 0
    learns = hidden[0].requires_grad and any(flow.own for flow in stage.flows)
    whole = hidden[0].detach() if len(hidden) == 1 else torch.cat([each.detach() for each in hidden], axis)
    leaf = whole.requires_grad_(torch.is_grad_enabled() and learns)
    made = stage.head(leaf, target)
    if made.target is not None and not stage.encodes_target:
        kind = type(stage.method).__name__
        raise MethodError(
            f"The head of part {stage.number} of {stage.parts} makes a target for the part above, which was sent the "
            f"old one before that; set `encodes_target = True` in class {kind}."
        )
    return Lesson(leaf, made, [each.shape[axis] for each in hidden if each.dim()], axis)


def _has_gradients(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def report_of(stage: Stage, made: HeadOutput | None, target: Target) -> StageReport:
    """What is known after the forward pass; logits of lower parts are not kept, they would outlive the part."""
    if made is None:
        return StageReport(None, None)
    logits = None if made.logits is None else made.logits.detach()
    measured = stage.measure(logits, target) if stage.measure and logits is not None else None
    return StageReport(made.loss.detach(), logits if stage.is_last else None, measured)


def departing(works: Sequence[Work], micro: int, target: Target) -> Upward:
    """What goes up of a micro-batch: detached, so that nothing above keeps this part's graph alive."""
    stream = {name: value.detach() for name, value in works[micro].outputs.items()}
    return Upward(stream, target if micro == 0 else None)


def learn_head(stage: Stage, lesson: Lesson) -> Tensor | None:
    """The head's own backward pass: gradients of its weights and, returned, of the hidden state.

    A head that learns from feedback gets no gradient of this loss.
    """
    if lesson.made is None or not lesson.made.loss.requires_grad:
        return None
    loss = stage.scaled(lesson.made.loss)
    if stage.learns_from_feedback:
        if lesson.leaf is None or not lesson.leaf.requires_grad:
            return None
        return torch.autograd.grad(loss, lesson.leaf, retain_graph=True)[0]
    torch.autograd.backward(loss)
    # The graph is spent: keep the numbers only, so that the head's activations go before the part's backward.
    each = lesson.made.per_sample
    lesson.made = HeadOutput(lesson.made.loss.detach(), None if each is None else each.detach())
    leaf, lesson.leaf = lesson.leaf, None
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


def learn_from_feedback(stage: Stage, lesson: Lesson, feedback: Tensor) -> None:
    """Trains the head, and nothing but the head, from what the part above handed back."""
    assert stage.head is not None and lesson.made is not None
    weights = stage.parameters("head")
    if weights:
        with stage.autocast():
            loss = stage.scaled(stage.head.feedback_loss(lesson.made, feedback))
        torch.autograd.backward(loss, inputs=weights)
    lesson.made = lesson.leaf = None


def add(one: Stream, other: Stream) -> Stream:
    """Sums gradients name by name."""
    both = {name: one[name] + other[name] for name in one if name in other}
    return one | other | both


def last_towards(all_flows: Sequence[Flow], key: tuple[int, ...]) -> Flow:
    """The last flow that joins the flow ``key`` of the part below."""
    return [flow for flow in all_flows if flow.down == key][-1]
