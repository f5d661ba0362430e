"""Sees every module call and every torch function while a model runs, and writes them down as a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from localize.convert.checkpointing import is_checkpointed
from localize.convert.functions import (
    GRADIENTS,
    OWN_STATE,
    RANDOM,
    SPLITTERS,
    VALUE_READERS,
    autograd_function,
    graph_call,
    in_place,
    signature_with_flag,
    sized_by_values,
    tensors_of,
)
from localize.convert.leaves import LeafPolicy
from localize.convert.numbers import Origin
from localize.convert.obstacle import user_location
from localize.convert.reads import Reads
from localize.convert.restore import RandomState
from localize.convert.settings import Settings
from localize.convert.sizes import RecordedInt, check_count, pinned, plain
from localize.convert.writer import GraphWriter

Call = Callable[..., Any]


class Recorder(TorchFunctionMode):
    """Active between ``__enter__`` and ``__exit__``, in the thread that made it."""

    def __init__(
        self,
        root: nn.Module,
        writer: GraphWriter,
        policy: LeafPolicy,
        settings: Settings,
        watch_random: bool = False,
    ) -> None:
        super().__init__()
        self.entered: dict[int, str] = {}  # modules whose insides were recorded: id → path
        self.innermost: str | None = None  # where an exception came from
        self._writer, self._policy = writer, policy
        self._modules = dict(root.named_modules())
        self._paths = {id(module): path for path, module in self._modules.items()}
        self._settings = settings
        self._reads = Reads(writer, policy, settings, self._modules.__getitem__)
        self._registered = {id(t) for t in (*root.parameters(), *root.buffers())}
        self._thread = threading.get_ident()
        self._paused = False
        self._flags: dict[str, fx.Node] = {}
        self._random = RandomState() if watch_random else None

    @property
    def listens(self) -> bool:
        """Whether a call made now is part of the graph."""
        return self._writer.is_open and not self._paused and threading.get_ident() == self._thread

    @contextmanager
    def _pause(self) -> Iterator[None]:
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

    # -- modules

    def call_module(
        self, call: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module call: entered, or one node."""
        path = self._paths.get(id(module))
        self.check_random()
        checkpointed = path is not None and is_checkpointed(module)
        if path is not None and not checkpointed and not self._policy.is_leaf(module, path):
            return self._enter(call, module, path, args, kwargs)
        if path is None:
            self._check_new(module)
            _pin_attributes(module)
        elif any(id(t) not in self._registered for t in (*module.parameters(), *module.buffers())):
            raise self._writer.obstacle(f"the weights of {path!r} are replaced for a call (functional_call)")
        target = path if path is not None else self._writer.extras.module(module)
        nodes, named_nodes = self._writer.argument(args), self._writer.argument(kwargs)
        versions = _versions((args, kwargs))
        with self._pause():
            with self._writer.audit.leaf(tensors_of((args, kwargs))) as watch:
                result = call(module, *plain(args), **plain(kwargs))
            if self._random is not None:
                self._random = RandomState()
            node = self._writer.call_leaf(target, module, nodes, named_nodes, checkpointed)
            self._writer.link(node, watch)
            changed = _changed(versions)
            if getattr(module, "inplace", False) is True:
                changed += [t for t in args[:1] if isinstance(t, Tensor)]
            result = self._record_result(node, result, changed)
            self._writer.rebind_objects(node)
            return result

    def _check_new(self, module: nn.Module) -> None:
        """A module outside of the tree may have weights only if it was there before, in a plain list for instance."""
        new = any(id(t) not in self._registered for t in (*module.parameters(), *module.buffers()))
        if new and not self._writer.knows_module(module):
            kind = type(module).__name__
            raise self._writer.obstacle(f"a {kind} with weights is made or copied in the forward, anew at every call")

    def _enter(
        self, call: Call, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.entered[id(module)] = path
        self._writer.scopes.append(path)
        try:
            result = call(module, *args, **kwargs)
            self.check_random()
            return result
        except Exception:
            self.innermost = path if self.innermost is None else self.innermost
            raise
        finally:
            self._writer.scopes.pop()

    def check_random(self) -> None:
        """Stops where Python's or NumPy's random numbers were drawn since the last leaf."""
        if self._random is not None and self._random.drawn_in_python():
            raise self._writer.obstacle(
                "random numbers of Python or NumPy are drawn, which a graph would repeat"
            )

    # -- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            with self._pause():
                return self._reads.access(func, name, args)
        with self._pause():
            if name in VALUE_READERS:
                return self._reads.value(func, name, args, kwargs)
            if name in ("size", "stride", "numel", "nelement") and args and isinstance(args[0], Tensor):
                return self._reads.size(func, name, args, kwargs)
            return self._call_function(func, name, args, kwargs)

    def call_autograd(self, call: Call, kind: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """``kind.apply(...)``: one node, with its own backward."""
        if kind is CheckpointFunction:  # (function, preserve_rng_state, *its arguments)
            return args[0](*args[2:])
        nodes = self._writer.argument(args), self._writer.argument(kwargs)
        versions = _versions((args, kwargs))
        with self._pause():
            result = call(*plain(args), **plain(kwargs))
            node = self._writer.call("call_function", autograd_function(kind), *nodes)
            return self._record_result(node, result, _changed(versions))

    def _call_function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if func in GRADIENTS:
            raise self._writer.obstacle("gradients are computed in the forward")
        versions = _versions((args, kwargs))
        result = func(*plain(args), **plain(kwargs))
        changed = [*in_place(name, args, kwargs), *(() if name in OWN_STATE else _changed(versions))]
        if not changed and name != "_assert" and next(tensors_of(result), None) is None:
            if result is not None and name.endswith("hook") and versions:
                raise self._writer.obstacle(f"a hook is put on a tensor ({name})")
            return result
        if name == "_assert" and not versions:
            return result
        nodes, named_nodes = self._arguments(func, args, kwargs)
        op, target, nodes = graph_call(func, name, nodes)
        node = self._writer.call(op, target, nodes, named_nodes)
        if name in RANDOM:
            self._writer.origins[node] = Origin.DATA
        if sized_by_values(name, args, kwargs) or self._as_many(args, result):
            node.meta["dynamic"] = True
        if name in SPLITTERS:
            if node.meta.get("dynamic"):
                self._writer.check_decision("Python goes through as many tensors as values fit a condition")
            self._writer.create("call_function", check_count, (node, len(result), user_location()))
        return self._record_result(node, result, changed)

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

    def _record_result(self, node: fx.Node, result: Any, changed: list[Tensor]) -> Any:
        """Binds what a call gave, and notes what it changed."""
        if not self._writer.regions.account_for_state():
            raise self._writer.obstacle("autocast is switched inside the forward, and not by torch.autocast")
        if changed and not torch.is_grad_enabled() and any(t.requires_grad for t in changed):
            raise self._writer.obstacle("a tensor that needs a gradient is changed in place under no_grad")
        result = self._writer.bind(result, node, in_place=bool(changed))
        self._writer.mark_mutated(node, changed)
        return result

    def _arguments(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call's graph arguments. A ``training`` flag that is the module's own stays live."""
        signature = signature_with_flag(func)
        if signature is not None:
            bound = signature.bind(*args, **kwargs)
            owner = self._modules[self._writer.scope]
            if bound.arguments.get("training") is owner.training:
                bound.arguments = {name: self._writer.argument(v) for name, v in bound.arguments.items()}
                bound.arguments["training"] = self._flag(owner)
                self._settings.flag_used(owner)
                return bound.args, bound.kwargs
        return self._writer.argument(args), self._writer.argument(kwargs)

    def _flag(self, owner: nn.Module) -> fx.Node:
        scope = self._writer.scope
        if scope not in self._flags:
            self._flags[scope] = self._writer.create("call_module", self._writer.extras.flag(owner))
        return self._flags[scope]


def _pin_attributes(module: nn.Module) -> None:
    """A module that was made in the forward may have been given sizes, which it keeps as they are."""
    for name, value in list(vars(module).items()):
        if isinstance(value, RecordedInt):
            vars(module)[name] = pinned(value)
        elif isinstance(value, tuple | list) and any(isinstance(item, RecordedInt) for item in value):
            vars(module)[name] = type(value)([pinned(item) for item in value])


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """Tensors with their count of in-place changes."""
    return [(t, -1 if t.is_inference() else t._version) for t in tensors_of(value)]


def _changed(versions: list[tuple[Tensor, int]]) -> list[Tensor]:
    return [t for t, version in versions if version >= 0 and t._version != version]
