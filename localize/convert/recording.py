"""One recording: the model runs once, in one mode, and becomes a graph. Afterwards it is as before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localize import nest
from localize.convert.context import Context, Subject
from localize.convert.obstacle import Obstacle, Remedy, describe_scope
from localize.convert.patches import watched
from localize.convert.recorder import Recorder
from localize.convert.restore import preserved
from localize.convert.settings import Settings
from localize.convert.side_effects import check_side_effects
from localize.convert.sizes import RecordedInt
from localize.convert.writer import GraphWriter
from localize.errors import LocalizeError, TraceError
from localize.random_state import RandomState
from localize.signature import CallSignature, OutputStructure

_RETURNABLE = (
    Tensor,
    RecordedInt,
    int,
    float,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)


@dataclass(frozen=True)
class Example:
    """The call that the model is recorded on."""

    signature: CallSignature
    leaves: list[Tensor]

    def call(self, model: nn.Module) -> Any:
        """Runs the model on copies, so that it may write into its inputs."""
        args, kwargs = self.signature.unbind([leaf.detach().clone() for leaf in self.leaves])
        return model(*args, **kwargs)


@dataclass(frozen=True)
class Recording:
    """What one run in one mode gave."""

    graph: fx.Graph
    output: OutputStructure
    settings: Settings


def record(subject: Subject, example: Example, training: bool) -> Recording:
    """Runs the model once in one mode.

    Raises:
        Obstacle: something in it cannot be recorded as things stand.
        TraceError: the model itself fails, or gives what nobody can use.
    """
    with ExitStack() as stack:
        state = stack.enter_context(preserved(subject.root, training=training))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        context = Context.before(subject, state)
        copied: Callable[[Tensor], Tensor] = Tensor.clone
        if subject.remedies.fake:
            copied = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True)).from_tensor
        inputs = [copied(leaf.detach()).requires_grad_(leaf.requires_grad) for leaf in example.leaves]
        writer = GraphWriter(context)
        stack.callback(writer.close)
        for name, tensor in zip(example.signature.names, inputs, strict=True):
            writer.placeholder(name, tensor)
        recorder = Recorder(context, writer)
        try:
            output = _run(recorder, context, writer, example.signature.unbind(inputs))
        except LocalizeError:
            raise
        except Exception as error:
            if is_out_of_memory(error) and not subject.remedies.fake:
                raise Obstacle("it is too large to run on the example", "", "its forward", Remedy.FAKE) from error
            _blame(error, recorder.modules.innermost or "", subject.root, example, training)
        entered = recorder.modules.entered
        subject.reassigned.update(check_side_effects(state, entered, writer))
        if not subject.remedies.settled:  # what a model hooks on by itself, at its first call, is its own business
            subject.hooked.update(path for path in entered.values() if has_hooks(context.modules[path]))
        leaves, spec = nest.flatten(output)
        _check_output(leaves)
        return Recording(writer.finish(leaves), OutputStructure(spec), context.settings)


def _run(recorder: Recorder, context: Context, writer: GraphWriter, call: tuple[Any, Any]) -> Any:
    """What the model gives for the call while it is watched."""
    args, kwargs = call
    generators = RandomState()
    with watched(recorder, context, writer):
        output = context.root(*args, **kwargs)
    if generators.drawn_in_python() and not context.remedies.watch_random:
        # Somewhere: inside a leaf, where it is none of our business, or not.
        raise Obstacle("random numbers of Python or NumPy are drawn", "", "the forward", Remedy.WATCH)
    return output


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called around a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _blame(error: Exception, scope: str, model: nn.Module, example: Example, training: bool) -> NoReturn:
    """The forward failed: is it the model, or does it fail only because it was watched?

    Raises:
        TraceError: the model itself fails.
        Obstacle: it does not.
    """
    mode = "train" if training else "eval"
    try:
        with preserved(model, training=training), torch.enable_grad():
            example.call(model)
    except Exception as own:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in example.leaves)
        raise TraceError(
            f"The model's own forward fails in {mode} mode on the example ({shapes}), in {describe_scope(scope)}: "
            f"{type(own).__name__}: {str(own).rstrip('.')}. Pass example_inputs that the model takes in both modes "
            "(a batch of at least 2 for batch normalisation)."
        ) from own
    raise Obstacle(
        f"it fails while it is recorded ({type(error).__name__}: {error})", scope, "its forward"
    ) from error


def _check_output(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, _RETURNABLE):
            kind = type(leaf).__name__
            raise TraceError(
                f"The model returns a {kind} that holds no tensor that can be found. Return tensors, tuples, lists, "
                "dicts, dataclasses or plain objects with tensors as attributes."
            )
