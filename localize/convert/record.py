"""Captures a model by running it: once in train and once in eval mode, eagerly, on the example.

The user's Python simply executes. What the recorder sees is written down as an ``fx.Graph`` over the original
modules and parameters; what it cannot see or write down keeps the module around it whole.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from localize import nest
from localize.convert.audit import Audit
from localize.convert.constants import Constants
from localize.convert.leaves import LeafPolicy
from localize.convert.modes import Extras, merge_aliases, same_graph
from localize.convert.obstacle import Obstacle, Remedy, describe_scope
from localize.convert.quirks import traced
from localize.convert.recorder import Recorder
from localize.convert.refusals import refused
from localize.convert.restore import RandomState, lazy_parameters, preserved
from localize.convert.settings import Settings, check_of
from localize.convert.side_effects import SideEffects
from localize.convert.sizes import RecordedInt, sized_builtins
from localize.convert.traced import TracedModel
from localize.convert.writer import GraphWriter
from localize.errors import LocalizeError, TraceError
from localize.signature import CallSignature, OutputStructure

MAX_RESTARTS = 100

_patching = threading.RLock()


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedModel:
    """Captures ``model`` on the example call ``model(*args, **kwargs)``. The model is as before afterwards.

    Raises:
        TraceError: the model cannot be captured; the message says where, why and what to do.
        ConfigError: the example does not fit the model's ``forward``.
    """
    _check(model)
    signature, leaves = CallSignature.of(model, args, kwargs)
    with closing(_Session(model, signature, leaves)) as session:
        while True:
            try:
                train, evaluation = session.record(training=True), session.record(training=False)
            except Obstacle as obstacle:
                session.give_way(obstacle)
            else:
                return session.result(train, evaluation)


def _check(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "The model is scripted: its insides cannot be recorded. Convert the model before torch.jit."
        )
    lazy = lazy_parameters(model)
    if model._backward_hooks or model._backward_pre_hooks:
        raise TraceError(
            "The model itself has hooks on its gradients (register_full_backward_hook), which parts do not pass by as "
            "a whole. Remove them, or put them on the submodules that they are meant for."
        )
    if lazy:
        raise TraceError(
            f"Parameter {lazy[0]!r} has no shape yet. Run the model once on an example, then convert it."
        )


@dataclass(frozen=True)
class _Recording:
    graph: fx.Graph
    output: OutputStructure
    settings: Settings


class _Session:
    """The recordings of one model, until both modes succeed under one leaf policy."""

    def __init__(self, model: nn.Module, signature: CallSignature, leaves: list[Tensor]) -> None:
        self._model, self._signature, self._leaves = model, signature, leaves
        self._policy = LeafPolicy(model)
        self._extras = Extras(model)
        self._storage_numbers = itertools.count()
        self._watch_random = False
        self._rebound: set[str] = set()  # buffers that the forward gives new values by assignment
        self._reassigned: set[str] = set()  # attributes that the forward sets, and graphs do not
        self._side_effects = SideEffects()
        self._general = False  # libraries are told that they are traced
        self._restarts = 0
        self._settled = ExitStack()
        self._original = {id(module): dict(vars(module)) for module in model.modules()}

    def record(self, training: bool) -> _Recording:
        """Runs the model once in one mode. Whatever happens, the model is as before."""
        with ExitStack() as stack:
            state = stack.enter_context(preserved(self._model, training=training))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            inputs = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in self._leaves]
            constants = Constants(state.modules, state.attributes)
            audit = Audit(state, (*self._model.parameters(), *self._model.buffers()))
            writer = GraphWriter(
                self._model,
                self._extras,
                constants,
                audit,
                self._storage_numbers,
                self._policy.guards,
                frozenset(self._rebound),
            )
            stack.callback(writer.close)
            for name, tensor in zip(self._signature.names, inputs, strict=True):
                writer.placeholder(name, tensor)
            settings = Settings()
            output, recorder = self._run(writer, inputs, training, settings)
            self._reassigned |= self._side_effects.check(state, recorder.entered, writer)
            leaves, spec = nest.flatten(output)
            _check_output(leaves)
            return _Recording(writer.finish(leaves), OutputStructure(spec), settings)

    def _run(
        self, writer: GraphWriter, inputs: list[Tensor], training: bool, settings: Settings
    ) -> tuple[Any, Recorder]:
        args, kwargs = self._signature.unbind(inputs)
        recorder = Recorder(self._model, writer, self._policy, settings, self._watch_random)
        generators = RandomState()
        try:
            with ExitStack() as stack:
                stack.enter_context(writer.audit)
                stack.enter_context(_patched(recorder))
                stack.enter_context(writer.regions.noticed(lambda: recorder.listens))
                stack.enter_context(traced(self._general, lambda: recorder.listens))
                stack.enter_context(settings.noticed(lambda: recorder.listens))
                stack.enter_context(refused(lambda: recorder.listens, writer.obstacle))
                stack.enter_context(recorder)
                output = self._model(*args, **kwargs)
        except LocalizeError:
            raise
        except Exception as error:
            self._blame(error, recorder.innermost or "", training)
        if generators.drawn_in_python() and not self._watch_random:
            self._watch_random = True  # somewhere: inside a leaf, where it is none of our business, or not
            raise Obstacle("random numbers of Python or NumPy are drawn", "", "the forward", Remedy.WATCH)
        return output, recorder

    def _blame(self, error: Exception, scope: str, training: bool) -> None:
        """The forward failed: is it the model, or does it fail only because it was watched?

        Raises:
            TraceError: the model itself fails.
            Obstacle: it does not.
        """
        mode = "train" if training else "eval"
        inputs = [leaf.detach().clone() for leaf in self._leaves]
        args, kwargs = self._signature.unbind(inputs)
        try:
            with preserved(self._model, training=training), torch.enable_grad():
                self._model(*args, **kwargs)
        except Exception as own:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in self._leaves)
            raise TraceError(
                f"The model's own forward fails in {mode} mode on the example ({shapes}), in {describe_scope(scope)}: "
                f"{type(own).__name__}: {own} Pass example_inputs that the model takes in both modes "
                "(a batch of at least 2 for batch normalisation)."
            ) from own
        raise Obstacle(
            f"it fails while it is recorded ({type(error).__name__}: {error})", scope, "its forward"
        ) from error

    def give_way(self, obstacle: Obstacle) -> None:
        """Applies the obstacle's remedy; where there is none, makes the module in the way a leaf.

        Raises:
            TraceError: it is the root itself, or nothing helps.
        """
        self._restarts += 1
        if self._restarts > MAX_RESTARTS or not (self._remedied(obstacle) or self._kept_whole(obstacle)):
            raise TraceError(f"The model cannot be captured. {_explain(obstacle)}") from obstacle

    def _remedied(self, obstacle: Obstacle) -> bool:
        """Whether something else than keeping the module whole was done."""
        match obstacle.remedy:
            case Remedy.WATCH:
                return True
            case Remedy.GUARD:
                return self._policy.guard(obstacle.scope)
            case Remedy.GENERAL if not self._general:
                self._general = True
                return True
            case Remedy.SETTLE if not self._side_effects.settled:
                self._settle()
                return True
            case Remedy.REBIND:
                self._rebound.add(obstacle.name)
                return True
        return False

    def _kept_whole(self, obstacle: Obstacle) -> bool:
        return obstacle.scope != "" and self._policy.keep_whole(obstacle.scope, str(obstacle))

    def _settle(self) -> None:
        """Runs the model once, so that what it sets up at its first call is there; undone after the session."""
        self._side_effects.settled = True
        self._settled.enter_context(preserved(self._model))
        args, kwargs = self._signature.unbind([leaf.detach().clone() for leaf in self._leaves])
        for training in (True, False):
            self._model.train(training)
            with torch.inference_mode(False), torch.enable_grad():
                self._model(*args, **kwargs)

    def close(self) -> None:
        """Puts the model back as it was before the session."""
        self._settled.close()

    def result(self, train: _Recording, evaluation: _Recording) -> TracedModel:
        """One graph where both modes do the same."""
        agree = train.output == evaluation.output and same_graph(train.graph, evaluation.graph)
        if agree:
            merge_aliases(train.graph, evaluation.graph)
            self._check_settings(train.graph, [train.settings, evaluation.settings], None)
            evaluation = train
        else:
            self._check_settings(train.graph, [train.settings], True)
            self._check_settings(evaluation.graph, [evaluation.settings], False)
        graphs = (train.graph, evaluation.graph)
        used = {
            str(node.target)
            for graph in graphs
            for node in graph.nodes
            if node.op in ("call_module", "get_attr")
        }
        return TracedModel(
            root=self._model,
            train_graph=train.graph,
            eval_graph=evaluation.graph,
            signature=self._signature,
            outputs={True: train.output, False: evaluation.output},
            example=tuple(self._leaves),
            extras={name: value for name, value in self._extras.values.items() if name in used},
            notes=self._notes(agree),
            rerouted=self._general,
        )

    def _check_settings(self, graph: fx.Graph, settings: list[Settings], mode: bool | None) -> None:
        """Puts a check of the settings that recordings read in front of a graph."""
        check = check_of(self._model, settings, self._original, mode)
        if check is not None:
            first = next(node for node in graph.nodes if node.op != "placeholder")
            with graph.inserting_before(first):
                node = graph.call_module(self._extras.check(check))
            node.meta.update(scope="", storages=frozenset(), mutates=frozenset())

    def _notes(self, agree: bool) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for path, reason in self._policy.opaque.items():
            reasons.setdefault(reason, []).append(path)
        notes = [f"kept whole: {', '.join(paths)} ({reason})" for reason, paths in reasons.items()]
        notes += [
            f"decides on values at {where} ({reader}): checked at every call"
            for where, reader in self._policy.guarded.items()
        ]
        if self._reassigned:
            notes.append(f"sets {', '.join(sorted(self._reassigned))}: parts do not, and no call was seen to need it")
        if self._general:
            notes.append("attention masks are always built, which is right for every batch")
        return notes if agree else [*notes, "train and eval mode do different things: two graphs"]


def _explain(obstacle: Obstacle) -> str:
    advice = "Put these lines into an nn.Module of their own: it is then kept whole. Or convert the modules around."
    return f"{obstacle}. {advice}"


def _check_output(leaves: list[Any]) -> None:
    allowed = (
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
    for leaf in leaves:
        if not isinstance(leaf, allowed):
            kind = type(leaf).__name__
            raise TraceError(
                f"The model returns a {kind} that holds no tensor that can be found. Return tensors, tuples, lists, "
                "dicts, dataclasses or plain objects with tensors as attributes."
            )


@contextmanager
def _patched(recorder: Recorder) -> Iterator[None]:
    """While it lasts, module calls and autograd functions of this thread pass by the recorder."""
    with _patching, sized_builtins():
        call = nn.Module.__call__
        apply = vars(torch.autograd.Function)["apply"]

        def recorded_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (
                recorder.call_module(call, module, args, kwargs)
                if recorder.listens
                else call(module, *args, **kwargs)
            )

        def recorded_apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            original = apply.__get__(None, kind)
            return (
                recorder.call_autograd(original, kind, args, kwargs)
                if recorder.listens
                else original(*args, **kwargs)
            )

        nn.Module.__call__ = recorded_call  # type: ignore[method-assign]
        torch.autograd.Function.apply = classmethod(recorded_apply)
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply
