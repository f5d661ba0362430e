"""Libraries that ask whether they are being traced, and then take the way that is right for every input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MASKS = ("transformers/masking_utils.py", "transformers/modeling_attn_mask_utils.py")


def chooses_mask(where: str) -> bool:
    """Whether ``file:line`` is where transformers looks at an attention mask to see if it can be left out."""
    return where.startswith(_MASKS)


@contextmanager
def traced(pretend: bool, listens: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, transformers finds that it is traced whenever it asks about a tensor: masks are always built."""
    asked = [
        module
        for name, module in list(sys.modules.items())
        if pretend and name.startswith("transformers.") and "is_tracing" in vars(module)
    ]
    originals = [(module, vars(module)["is_tracing"]) for module in asked]

    def answer(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor=None: (tensor is not None and listens()) or original(tensor)

    for module, original in originals:
        vars(module)["is_tracing"] = answer(original)
    try:
        yield
    finally:
        for module, original in originals:
            vars(module)["is_tracing"] = original
