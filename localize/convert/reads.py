"""What Python reads from tensors while a model is recorded: properties, sizes, values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from localize.convert.context import Context
from localize.convert.functions import tensors_of
from localize.convert.leaves import is_library
from localize.convert.numbers import Origin
from localize.convert.obstacle import Remedy, user_location
from localize.convert.quirks import chooses_mask
from localize.convert.sizes import plain, recorded
from localize.convert.values import check_value, is_guardable
from localize.convert.writer import GraphWriter

KINDS = frozenset({"dim", "ndimension", "is_floating_point", "is_complex"})
"""What Python asks of a tensor's kind, to choose its way."""

_HARMLESS_SETS = frozenset({"requires_grad"})


class Reads:
    """Answers what Python asks of a tensor, and notes in the graph what has to be noted."""

    def __init__(self, context: Context, writer: GraphWriter) -> None:
        self._context, self._writer = context, writer
        self._kinds: set[tuple[fx.Node, str]] = set()  # what is checked already

    def access(self, func: Any, name: str, args: Any) -> Any:
        """A property of a tensor is read or set."""
        attribute = getattr(getattr(func, "__self__", None), "__name__", None) or _property_name(func)
        tensor = args[0]
        if name == "__set__":
            if attribute in _HARMLESS_SETS:  # on a value: whether autograd follows it does not change what it holds
                return func(*args)
            raise self._writer.obstacle(f"the attribute {attribute!r} of a tensor is set")
        value = func(*args)
        if attribute == "shape":
            return self._writer.numbers.sizes(tensor, "size", value)
        if attribute == "dtype" and tensor.is_floating_point():
            self._context.settings.reads_dtype = True
        if attribute == "ndim":
            return self.kind("dim", tensor)
        if attribute == "device":
            return self._writer.numbers.device(tensor, value)
        if not isinstance(value, Tensor) or value is tensor:
            return value
        node = self._writer.create("call_function", getattr, (self._writer.node_of(tensor), attribute))
        return self._writer.bind(value, node)

    def kind(self, name: str, tensor: Tensor) -> Any:
        """``x.dim()`` and the like: the same at every call, as a rule, and checked for the exception."""
        value, node = getattr(tensor, name)(), self._writer.maker(tensor)
        if node is not None and (node, name) not in self._kinds:
            self._kinds.add((node, name))
            self._writer.create("call_function", check_value, (name, value, user_location(), node))
        return value

    def size(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """``x.size()``, ``x.stride(0)``, ``x.numel()``."""
        value = func(*plain(args), **plain(kwargs))
        if not isinstance(value, int):
            return self._writer.numbers.sizes(args[0], name, value)
        axis = [int(a) if isinstance(a, int) else a for a in plain((*args[1:], *kwargs.values()))]
        return self._writer.numbers.size(args[0], name, value, *axis)

    def value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Values leave the graph: harmless where they are constant, guarded where they follow from sizes."""
        nodes = [self._writer.node_of(tensor) for tensor in tensors_of((args, kwargs))]
        origin = max((self._writer.origins[node] for node in nodes), default=Origin.CONSTANT)
        value = func(*plain(args), **plain(kwargs))
        if origin is Origin.CONSTANT:
            return value
        if name == "item" and type(value) is int and not any(_is_random(node) for node in nodes):
            node = self._writer.create("call_method", name, (nodes[0],))
            node.meta["number"] = True
            return recorded(value, self._writer.numbers, node)
        can_guard = is_guardable(value) and hasattr(Tensor, name) and name != "__format__"
        if origin is Origin.SIZE and isinstance(value, bool | int | float):
            return self._guarded(value, name, args, kwargs)
        if can_guard and not any(_is_random(node) for node in nodes) and self._guards_here(name):
            self._context.policy.guarded.setdefault(user_location(), name)
            return self._guarded(value, name, args, kwargs)
        if any(_is_random(node) for node in nodes):
            raise self._writer.obstacle("Python decides on random numbers, which a graph would repeat")
        remedy = Remedy.GUARD if can_guard else Remedy.WHOLE
        raise self._writer.obstacle(f"Python depends on a tensor's values ({name})", remedy)

    def _guards_here(self, name: str) -> bool:
        """Whether a decision on values is checked at run time instead of being kept in one piece."""
        if chooses_mask(user_location()):
            raise self._writer.obstacle("a mask is looked at", Remedy.GENERAL)
        # torch's own containers only look at masks, to choose a kernel; the masks are the same at every call.
        by_torch = name == "__bool__" and is_library(self._context.modules[self._writer.scope])
        return by_torch or self._context.policy.guards(self._writer.scope)

    def _guarded(self, value: Any, name: str, args: Any, kwargs: Any) -> Any:
        nodes, named_nodes = self._writer.argument(args), self._writer.argument(kwargs)
        self._writer.create("call_function", check_value, (name, value, user_location(), *nodes), named_nodes)
        return value


def _is_random(node: fx.Node, depth: int = 6) -> bool:
    """Whether a value is made of random numbers, and of no input or weight, a few steps back."""
    if node.meta.get("random"):
        return not any(source.op in ("placeholder", "get_attr", "call_module") for source in node.all_input_nodes)
    sources = node.all_input_nodes
    return bool(sources) and depth > 0 and all(_is_random(source, depth - 1) for source in sources)


def _property_name(func: Any) -> str:
    """``Tensor.T`` is a descriptor with a name; a Python property has it on its getter."""
    return str(getattr(getattr(func.__self__, "fget", None), "__name__", ""))
