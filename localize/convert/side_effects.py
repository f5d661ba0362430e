"""What a forward sets on modules: whether graphs, which do not set it, may still stand for the forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from localize.convert.attributes import Attributes
from localize.convert.obstacle import Obstacle, Remedy
from localize.convert.restore import ModelState
from localize.convert.sizes import plain
from localize.convert.writer import GraphWriter

_NUMBERS = (int, float, complex, str, bytes)


def check_side_effects(state: ModelState, entered: dict[int, str], writer: GraphWriter) -> set[str]:
    """Names of attributes that were set, harmlessly as far as can be told.

    Harmless is what nobody reads at the next call: a result kept to be looked at, a number that comes out the same
    again, a cache that is made anew. What a model sets up at its first call is told apart by running it once before.

    Args:
        state: of the model before the forward.
        entered: paths of the modules whose forward was recorded, by ``id``; leaves set what they like.
        writer: whose graph knows what was read.

    Raises:
        Obstacle: an attribute that matters at the next call.
    """
    found: set[str] = set()
    for module, name, old, new in state.reassigned():
        path = entered.get(id(module))
        if path is None:
            continue
        target = f"{path}.{name}" if path else name
        if not writer.context.remedies.settled:
            raise Obstacle(f"it sets its own attribute {name!r}", path, "its forward", Remedy.SETTLE)
        if _is_buffer(module, name, old, new) and new.is_set_to(old):
            continue  # ``self.buffer = self.buffer.to(x.device)``
        if _is_buffer(module, name, old, new):
            _rebind(writer.attributes, target, path, name, old, new)
        elif _is_harmless(old, new, writer.attributes):
            found.add(target)
        else:
            raise Obstacle(f"it sets its own attribute {name!r}, which the next call reads", path, "its forward")
    return found


def _rebind(attributes: Attributes, target: str, path: str, name: str, old: Tensor, new: Tensor) -> None:
    reason = f"it assigns its buffer {name!r}"
    if not attributes.is_rebound(target):
        raise Obstacle(reason, path, "its forward", Remedy.REBIND, target)
    if not attributes.rebind(target, old, new):
        raise Obstacle(reason, path, "its forward")


def _is_buffer(module: nn.Module, name: str, old: Any, new: Any) -> bool:
    return name in module._buffers and isinstance(old, Tensor) and isinstance(new, Tensor)


def _is_harmless(old: Any, new: Any, attributes: Attributes) -> bool:
    if isinstance(old, _NUMBERS) or isinstance(new, _NUMBERS):
        return type(old) is type(plain(new)) and bool(old == plain(new))
    return not isinstance(old, Tensor) or not attributes.has_read(old)
