"""What a data loader yields: inputs and target, whatever form they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from localize.errors import ConfigError

SplitBatch = Callable[[Any], tuple[Any, Any]]
_TARGET_NAMES = ("labels", "target")


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and target of ``(inputs, target)``, ``(x1, x2, …, target)`` or a dict with ``labels`` or ``target``.

    Raises:
        ConfigError: the batch has another form.
    """
    if isinstance(batch, Mapping):
        names = [name for name in _TARGET_NAMES if name in batch]
        if len(names) != 1 or len(batch) < 2:
            raise _unclear(batch)
        return {name: value for name, value in batch.items() if name != names[0]}, batch[names[0]]
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        # Collating turns a sample's tuple of inputs into a list.
        return tuple(inputs) if isinstance(inputs, list) else inputs, batch[-1]
    raise _unclear(batch)


def _unclear(batch: Any) -> ConfigError:
    found = type(batch).__name__
    if isinstance(batch, Mapping):
        found += f" with entries {', '.join(map(repr, batch))}"
    elif isinstance(batch, Tensor):
        found += f" of shape {tuple(batch.shape)}"
    elif isinstance(batch, list | tuple):
        found += f" of length {len(batch)}"
    return ConfigError(
        f"A batch is (inputs, target), or a dict with one of the entries 'labels' and 'target' beside the inputs; "
        f"the loader gave a {found}. Pass split_batch=lambda batch: (inputs, target)."
    )


def pairs(loader: Iterable[Any], split: SplitBatch) -> Iterator[tuple[Any, Any]]:
    """(inputs, target) of every batch.

    Raises:
        ConfigError: the loader yields nothing, or ``split`` returns no pair.
    """
    empty = True
    for batch in loader:
        empty = False
        pair = split(batch)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(
                f"split_batch must return (inputs, target); it returned a {type(pair).__name__}."
            )
        yield pair
    if empty:
        raise ConfigError(
            f"The loader ({type(loader).__name__}) is empty; it must yield batches anew every time it is iterated."
        )


def batch_size(inputs: Any, target: Any) -> int:
    """Samples in a batch."""
    for leaf in [*pytree.tree_leaves(target), *pytree.tree_leaves(inputs)]:
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    return 1


def length(loader: Any) -> int | None:
    """How many batches a loader has, where it says."""
    try:
        return len(loader)
    except TypeError:
        return None
