"""Guards on values that Python took a decision on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from localize.errors import TraceError


@fx.node.has_side_effect
def check_value(tensor: Tensor, reader: str, expected: Any, where: str) -> None:
    """Guard node: ``tensor.reader()`` must give what it gave when the program was recorded.

    Raises:
        TraceError: it does not.
    """
    found = getattr(tensor, reader)()
    if found != expected:
        raise TraceError(
            f"The captured program took a decision at {where} on a value that was {expected} at capture and is "
            f"{found} now. Re-convert with inputs of this kind."
        )
