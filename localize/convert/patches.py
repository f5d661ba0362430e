"""What is exchanged while a model is recorded, so that the recorder sees its calls; all of it is put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from localize.convert.context import Context
from localize.convert.quirks import traced
from localize.convert.recorder import Recorder
from localize.convert.refusals import refused
from localize.convert.sizes import sized_builtins
from localize.convert.writer import GraphWriter

_patching = threading.RLock()


@contextmanager
def watched(recorder: Recorder, context: Context, writer: GraphWriter) -> Iterator[None]:
    """While it lasts, the recorder and all that helps it see what this thread does."""

    def listens() -> bool:
        return recorder.listens

    with ExitStack() as stack:
        stack.enter_context(context.audit)
        stack.enter_context(_patched(recorder))
        stack.enter_context(writer.regions.noticed(listens))
        stack.enter_context(traced(context.remedies.general, listens))
        stack.enter_context(context.settings.noticed(listens))
        stack.enter_context(refused(listens, writer.obstacle))
        stack.enter_context(recorder)
        yield


@contextmanager
def _patched(recorder: Recorder) -> Iterator[None]:
    """While it lasts, module calls and autograd functions of this thread pass by the recorder."""
    with _patching, sized_builtins():
        call = nn.Module.__call__
        apply = vars(torch.autograd.Function)["apply"]

        def recorded_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (
                recorder.modules.call(call, module, args, kwargs)
                if recorder.listens
                else call(module, *args, **kwargs)
            )

        def recorded_apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            original = apply.__get__(None, kind)
            return (
                recorder.functions.apply(original, kind, args, kwargs)
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
