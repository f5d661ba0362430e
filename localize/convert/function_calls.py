"""Calls of torch's functions, and of functions with a backward of their own: one node each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointFunction

from localize.convert.changes import changed, versions
from localize.convert.context import Context
from localize.convert.functions import (
    GRADIENTS,
    OWN_STATE,
    RANDOM,
    SPLITTERS,
    autograd_function,
    graph_call,
    in_place,
    signature_with_flag,
    sized_by_values,
    tensors_of,
)
from localize.convert.numbers import Origin
from localize.convert.obstacle import user_location
from localize.convert.sizes import check_count, plain
from localize.convert.writer import GraphWriter

Call = Callable[..., Any]
Pause = Callable[[], AbstractContextManager[None]]


class FunctionCalls:
    """Runs functions and writes them down."""

    def __init__(self, context: Context, writer: GraphWriter, pause: Pause) -> None:
        self._context, self._writer, self._pause = context, writer, pause
        self._flags: dict[str, fx.Node] = {}

    def call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """``func(*args, **kwargs)``; ``name`` is the function's. Nobody listens meanwhile."""
        if func in GRADIENTS:
            raise self._writer.obstacle("gradients are computed in the forward")
        before = versions((args, kwargs))
        self._context.audit.drew = False
        result = func(*plain(args), **plain(kwargs))
        random = name in RANDOM or self._context.audit.drew
        written = [*in_place(name, args, kwargs), *(() if name in OWN_STATE else changed(before))]
        splits = name in SPLITTERS and isinstance(result, tuple | list)
        if splits and self._is_dynamic(args):
            self._writer.check_decision("Python goes through as many tensors as values fit a condition")
        if not splits and not written and name != "_assert" and next(tensors_of(result), None) is None:
            if result is not None and name.endswith("hook") and before:
                raise self._writer.obstacle(f"a hook is put on a tensor ({name})")
            return result
        if name == "_assert" and not before:
            return result
        nodes, named_nodes = self._arguments(func, args, kwargs)
        op, target, nodes = graph_call(func, name, nodes)
        node = self._writer.call(op, target, nodes, named_nodes)
        if random:
            self._writer.origins[node] = Origin.DATA
            node.meta["random"] = True
        if sized_by_values(name, args, kwargs) or self._as_many(args, result):
            node.meta["dynamic"] = True
        if splits:
            self._writer.create("call_function", check_count, (node, len(result), user_location()))
        return self._writer.bind_call(result, node, written)

    def apply(self, call: Call, kind: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """``kind.apply(*args, **kwargs)``, which ``call`` does: one node, with its own backward."""
        if kind is CheckpointFunction:  # (function, preserve_rng_state, *its arguments)
            return args[0](*args[2:])
        nodes = self._writer.argument(args), self._writer.argument(kwargs)
        before = versions((args, kwargs))
        with self._pause():
            result = call(*plain(args), **plain(kwargs))
            node = self._writer.call("call_function", autograd_function(kind), *nodes)
            return self._writer.bind_call(result, node, changed(before))

    def _is_dynamic(self, args: Any) -> bool:
        """Whether the first argument is a tensor whose size depends on values."""
        maker = self._writer.maker(args[0]) if args and isinstance(args[0], Tensor) else None
        return maker is not None and bool(maker.meta.get("dynamic"))

    def _as_many(self, args: Any, result: Any) -> bool:
        """Whether a result has as many rows as an argument whose size depends on values."""
        first = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(first, Tensor) or not first.dim():
            return False
        for tensor in tensors_of(args):
            maker = self._writer.maker(tensor)
            if maker is not None and maker.meta.get("dynamic") and tensor.shape[:1] == first.shape[:1]:
                return True
        return False

    def _arguments(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call's graph arguments. A ``training`` flag that is the module's own stays live."""
        signature = signature_with_flag(func)
        if signature is not None:
            bound = signature.bind(*args, **kwargs)
            owner = self._context.modules[self._writer.scope]
            if bound.arguments.get("training") is owner.training:
                bound.arguments = {name: self._writer.argument(v) for name, v in bound.arguments.items()}
                bound.arguments["training"] = self._flag(owner)
                self._context.settings.flag_used(owner)
                return bound.args, bound.kwargs
        return self._writer.argument(args), self._writer.argument(kwargs)

    def _flag(self, owner: nn.Module) -> fx.Node:
        """The node that gives the flag of the module whose forward runs."""
        scope = self._writer.scope
        if scope not in self._flags:
            self._flags[scope] = self._writer.create("call_module", self._context.extras.flag(owner))
        return self._flags[scope]
