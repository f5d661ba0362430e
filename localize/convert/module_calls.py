"""Calls of modules: entered, so that what is inside is recorded call by call, or one node of the graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from localize.convert.changes import changed, versions
from localize.convert.checkpointing import is_checkpointed
from localize.convert.context import Context
from localize.convert.function_calls import Call, Pause
from localize.convert.functions import tensors_of
from localize.convert.sizes import RecordedInt, pinned, plain
from localize.convert.writer import GraphWriter
from localize.random_state import RandomState


class ModuleCalls:
    """Runs modules, and enters them or writes them down."""

    def __init__(self, context: Context, writer: GraphWriter, pause: Pause) -> None:
        root = context.root
        self.entered: dict[int, str] = {}  # modules whose insides were recorded: id → path
        self.innermost: str | None = None  # path of the module where an exception came from
        self._context, self._writer, self._pause = context, writer, pause
        self._paths = {id(module): path for path, module in context.modules.items()}
        self._registered = {id(t) for t in (*root.parameters(), *root.buffers())}
        self._random = RandomState() if context.remedies.watch_random else None

    def call(self, call: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``module(*args, **kwargs)``, which ``call`` does."""
        path = self._paths.get(id(module))
        self._check_random()
        checkpointed = path is not None and is_checkpointed(module)
        if path is not None and not checkpointed and not self._context.policy.is_leaf(module, path):
            return self._enter(call, module, path, args, kwargs)
        if path is None:
            self._check_new(module)
            _pin_attributes(module)
        elif not self._has_own_weights(module):
            raise self._writer.obstacle(f"the weights of {path!r} are replaced for a call (functional_call)")
        target = path if path is not None else self._context.extras.module(module)
        return self._call_leaf(call, module, target, args, kwargs, checkpointed)

    def _enter(
        self, call: Call, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.entered[id(module)] = path
        self._writer.scopes.append(path)
        try:
            result = call(module, *args, **kwargs)
            self._check_random()
            return result
        except Exception:
            self.innermost = path if self.innermost is None else self.innermost
            raise
        finally:
            self._writer.scopes.pop()

    def _call_leaf(
        self,
        call: Call,
        module: nn.Module,
        target: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        checkpointed: bool,
    ) -> Any:
        nodes, named_nodes = self._writer.argument(args), self._writer.argument(kwargs)
        before = versions((args, kwargs))
        with self._pause():
            with self._context.audit.leaf(tensors_of((args, kwargs))) as watch:
                result = call(module, *plain(args), **plain(kwargs))
            if self._random is not None:  # what a leaf draws is its own business
                self._random = RandomState()
            node = self._writer.call_leaf(target, nodes, named_nodes, checkpointed)
            written = changed(before)
            if getattr(module, "inplace", False) is True:
                written += [t for t in args[:1] if isinstance(t, Tensor)]
            return self._writer.bind_leaf(result, node, module, watch, written)

    def _has_own_weights(self, module: nn.Module) -> bool:
        """Whether all that a module holds was registered in the model before."""
        return all(id(t) in self._registered for t in (*module.parameters(), *module.buffers()))

    def _check_new(self, module: nn.Module) -> None:
        """A module outside of the tree may have weights only if it was there before, in a plain list for instance."""
        if not self._has_own_weights(module) and not self._context.constants.holds_module(module):
            kind = type(module).__name__
            raise self._writer.obstacle(f"a {kind} with weights is made or copied in the forward, anew at every call")

    def _check_random(self) -> None:
        """Stops where Python's or NumPy's random numbers were drawn since the last leaf."""
        if self._random is not None and self._random.drawn_in_python():
            raise self._writer.obstacle(
                "random numbers of Python or NumPy are drawn, which a graph would repeat"
            )


def _pin_attributes(module: nn.Module) -> None:
    """A module that was made in the forward may have been given sizes, which it keeps as they are."""
    for name, value in list(vars(module).items()):
        if isinstance(value, RecordedInt):
            vars(module)[name] = pinned(value)
        elif isinstance(value, tuple | list) and any(isinstance(item, RecordedInt) for item in value):
            vars(module)[name] = type(value)([pinned(item) for item in value])
