"""Which losses train which part, and how their gradients travel: plain data, derived from the method alone.

A loss of part j trains the parts ``method.trains(j, K)``. Its gradient starts at hidden state j and is relayed down
until the lowest of them. At part k, losses that train the same set of parts below (and at) k share one way:
their gradients are added and go through the part once. Two-wise with K = 4 (``furthest``):

    part    1        2        3        4
    L2    train <─ relay                       L2 trains part 1 only, so it passes through part 2
    L3             train <─ relay
    L4                      train <─ train     the last loss trains the last two parts
"""

from __future__ import annotations

from dataclasses import dataclass

from localize.heads.base import Method


@dataclass(frozen=True)
class Flow:
    """Gradients that pass through part k together.

    ``losses`` are the parts whose losses are in it; ``own``: part k's own loss is among them; ``from_above``:
    gradients arrive from part k+1; ``trains``: they train part k; ``down``: the key of the flow they join below
    part k, None where they end.
    """

    losses: tuple[int, ...]
    own: bool
    from_above: bool
    trains: bool
    down: tuple[int, ...] | None


def flows(method: Method, number: int, parts: int) -> list[Flow]:
    """The flows through part ``number`` of ``parts``, in the order in which their gradients become known."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for loss in range(number, parts + 1):
        trained = tuple(p for p in method.trains(loss, parts) if p <= number)
        if trained:
            groups.setdefault(trained, []).append(loss)
    result = []
    for trained, losses in groups.items():
        below = tuple(p for p in trained if p < number)
        result.append(
            Flow(tuple(losses), number in losses, losses[-1] > number, number in trained, below or None)
        )
    return sorted(result, key=lambda flow: flow.losses[-1])


def last_loss(method: Method, number: int, parts: int) -> int | None:
    """The highest part whose loss trains part ``number``; None where nothing does."""
    training = [j for j in range(1, parts + 1) if number in method.trains(j, parts)]
    return max(training, default=None)
