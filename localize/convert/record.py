"""Captures a model by running it: once in train and once in eval mode, eagerly, on the example.

The user's Python simply executes. What the recorder sees is written down as an ``fx.Graph`` over the original
modules and parameters; what it cannot see or write down keeps the module around it whole.

    record.py      trace(): the way in
    session.py     recordings until both modes succeed: obstacles and their remedies
    recording.py   one recording: the model runs once, watched
    patches.py     what is exchanged meanwhile
    recorder.py    sees calls: modules (module_calls.py), functions (function_calls.py), what Python reads (reads.py)
    writer.py      makes nodes of them: draft.py, operands.py, results.py, numbers.py, attributes.py, channels.py
    outcome.py     both modes' graphs become one traced model

``docs/capture.md`` tells what each mechanism is for and what a user sees of it.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import nn

from localize.convert.restore import lazy_parameters
from localize.convert.session import Session
from localize.convert.storages import storage_of
from localize.convert.traced import TracedModel
from localize.errors import ConfigError, TraceError
from localize.signature import CallSignature


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedModel:
    """Captures ``model`` on the example call ``model(*args, **kwargs)``. The model is as before afterwards.

    Raises:
        TraceError: the model cannot be captured; the message says where, why and what to do.
        ConfigError: the example does not fit the model's ``forward``.
    """
    _check(model)
    signature, leaves = CallSignature.of(model, args, kwargs)
    if not leaves[0].numel():
        raise ConfigError(f"Example input {signature.names[0]!r} is empty, {tuple(leaves[0].shape)}; pass 2 samples.")
    with closing(Session(model, signature, leaves)) as session:
        return session.capture()


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
    shared = _share_memory(model)
    if shared:
        raise TraceError(
            f"Parameters {shared[0]!r} and {shared[1]!r} share memory without being one parameter. Tie them as one, "
            f"model.{shared[1]} = model.{shared[0]}, or give one of them a copy."
        )
    if lazy:
        raise TraceError(
            f"Parameter {lazy[0]!r} has no shape yet. Run the model once on an example, then convert it."
        )


def _share_memory(model: nn.Module) -> tuple[str, str] | None:
    """The names of two parameters that begin at one place. (Views of one buffer, as RNNs have, begin apart.)"""
    seen: dict[tuple[int, int], str] = {}
    for name, parameter in model.named_parameters():
        storage = None if nn.parameter.is_lazy(parameter) else storage_of(parameter)
        if storage is None or not storage.nbytes():
            continue
        place = (int(storage._cdata), int(parameter.storage_offset()))
        if place in seen:
            return seen[place], name
        seen[place] = name
    return None
