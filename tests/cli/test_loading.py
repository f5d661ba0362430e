"""The small parsers between flags and the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.cli.loading import byte_size, cut_names, part_count, shaped
from localize.cli.optim import optimizer_factory, scheduler_factory
from localize.errors import ConfigError
from localize.hollow import lacks_values
from localize.spec import plain


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("3x32x32", (2, 3, 32, 32), torch.float32),
        ("3×8", (2, 3, 8), torch.float32),
        ("64:int64", (2, 64), torch.int64),
        ("1,8,8:float16", (2, 1, 8, 8), torch.float16),
    ],
)
def test_shapes(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    example = shaped(text)
    assert (tuple(example.shape), example.dtype) == (shape, dtype)


@pytest.mark.parametrize("text", ["", "3x", "0x3", "3x-1", "3x3:floaty", "three", "3:nn"])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="3x224x224"):
        shaped(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), ("8GB", 8 * 10**9), ("1.5MB", 1_500_000), ("2GiB", 2 * 2**30), ("512", 512), ("4k", 4000)],
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert byte_size(text) == size


def test_parts_and_cuts() -> None:
    assert (part_count("4"), part_count("auto")) == (4, "auto")
    assert cut_names(" a, b.c ,") == ["a", "b.c"]
    assert cut_names(None) is None
    with pytest.raises(ConfigError, match="'-1'"):
        part_count("-1")


def rates(name: str, epochs: int) -> list[float]:
    optimizer = optimizer_factory("sgd", 1.0)(nn.Linear(1, 1).parameters())
    factory = scheduler_factory(name, epochs)
    assert factory is not None
    scheduler = factory(optimizer)
    found = []
    for _ in range(epochs + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_run_from_the_rate_to_their_end() -> None:
    assert rates("linear", 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    cosine = rates("cosine", 4)
    assert (cosine[0], cosine[2], cosine[4]) == pytest.approx((1, 0.505, 0.01))
    assert scheduler_factory("constant", 4) is None


def test_optimizers_take_their_options() -> None:
    group = optimizer_factory("sgd", 0.1, 5e-4, 0.9)(nn.Linear(1, 1).parameters()).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (
        0.1,
        5e-4,
        0.9,
        True,
    )
    with pytest.raises(ConfigError, match="adam has none"):
        optimizer_factory("adam", 0.1, momentum=0.9)
    with pytest.raises(ConfigError, match="lr is nan"):
        optimizer_factory("adam", float("nan"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({1: (float("nan"), torch.tensor([1.5]))}, {"1": [None, [1.5]]}),
        (Path("a/b"), "a/b"),
        (torch.float32, "float32"),
        ([True, None, 3], [True, None, 3]),
    ],
)
def test_json_is_always_valid(value: Any, expected: Any) -> None:
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


IN_WANT_OF_VALUES: dict[str, Callable[[], object]] = {
    "a number": lambda: meta().item(),
    "a decision": lambda: bool(meta() > 0),
    "a copy": lambda: meta(3).cpu(),
    "a list": lambda: meta(3).tolist(),
    "NumPy": lambda: meta(3).numpy(),
    "a mask": lambda: meta(3)[meta(3) > 0],
    "no kernel": lambda: meta(3).unique(),
    "repeats": lambda: torch.repeat_interleave(meta(3), meta(3, dtype=torch.int64)),
    "lengths": lambda: nn.utils.rnn.pack_padded_sequence(meta(3, 2, 4), meta(2, dtype=torch.int64)),
    "a constant": lambda: torch.ones(3) + meta(3),
    "a buffer": lambda: F.batch_norm(meta(2, 3), torch.zeros(3), torch.ones(3)),
    "a layer": lambda: nn.LSTM(3, 4)(meta(2, 1, 3)),
    "several devices": lambda: _raised("Expected all tensors to be on the same device, but found at least two devices, "
                                       "meta and cpu!"),
}  # fmt: skip


def _raised(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize("call", IN_WANT_OF_VALUES.values(), ids=IN_WANT_OF_VALUES.keys())
def test_what_only_values_can_tell_is_no_misfit(call: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as caught:
        call()
    assert lacks_values(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.Linear(3, 2, device="meta")(meta(2, 5)),
        lambda: nn.Conv2d(3, 2, 3, device="meta")(meta(2, 5, 8, 8)),
        lambda: _raised("the metadata of this batch are not what the metaclass takes"),
        lambda: _raised("expected 3 channels, got a tensor on meta"),
    ],
)
def test_shapes_that_do_not_fit_are_told_without_values(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError) as caught:
        call()
    assert not lacks_values(caught.value)
