"""Sees every module call and every torch function while a model runs, and has them written down.

What is seen goes to one of three: ``module_calls.py`` (a module: entered, or one node), ``function_calls.py`` (a torch
function: one node) and ``reads.py`` (what Python asks of a tensor: its shape, its type, its values).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from localize.convert.context import Context
from localize.convert.function_calls import FunctionCalls
from localize.convert.functions import VALUE_READERS
from localize.convert.module_calls import ModuleCalls
from localize.convert.reads import KINDS, Reads
from localize.convert.writer import GraphWriter

_SIZE_READERS = ("size", "stride", "numel", "nelement")


class Recorder(TorchFunctionMode):
    """Active between ``__enter__`` and ``__exit__``, in the thread that made it."""

    def __init__(self, context: Context, writer: GraphWriter) -> None:
        super().__init__()
        self.modules = ModuleCalls(context, writer, self.pause)
        self.functions = FunctionCalls(context, writer, self.pause)
        self._reads = Reads(context, writer)
        self._writer = writer
        self._thread = threading.get_ident()
        self._paused = False

    @property
    def listens(self) -> bool:
        """Whether a call made now is part of the graph."""
        return self._writer.is_open and not self._paused and threading.get_ident() == self._thread

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside is one node. It runs as if nobody looked: some modules choose faster ways then."""
        on_top = torch.overrides._get_current_function_mode() is self
        self._paused = True
        if on_top:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if on_top:
                self.__enter__()  # type: ignore[no-untyped-call]
            self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        with self.pause():
            if name in ("__get__", "__set__"):
                return self._reads.access(func, name, args)
            if name in VALUE_READERS:
                return self._reads.value(func, name, args, kwargs)
            if name in KINDS and args and isinstance(args[0], Tensor):
                return self._reads.kind(name, args[0])
            if name in _SIZE_READERS and args and isinstance(args[0], Tensor):
                return self._reads.size(func, name, args, kwargs)
            return self.functions.call(func, name, args, kwargs)
