"""Calls and outputs as flat tensors and back, and the graph module that a traced model gives."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import ConfigError, TraceError
from localize.signature import Call, CallSignature
from tests.convert.recording import assert_same, capture, run_graph, runnable

Pair = namedtuple("Pair", "first second")


class Takes(nn.Module):
    def forward(self, x: Tensor, other: Any = None, *more: Tensor, scale: float = 1.0, **options: Any) -> Any:
        return x


def signature(*args: Any, **kwargs: Any) -> tuple[CallSignature, list[Tensor]]:
    return CallSignature.of(Takes(), args, kwargs)


X, Y, Z = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "one": ((X,), {}, ("x",)),
    "keyword": ((), {"x": X, "other": Y}, ("x", "other")),
    "keyword-order": ((), {"other": Y, "x": X}, ("x", "other")),
    "nested": ((X, {"a": Y, "b": [Z, 3]}), {}, ("x", "other_a", "other_b_0")),
    "named-tuple": ((X, Pair(Y, Z)), {}, ("x", "other_first", "other_second")),
    "variadic": ((X, Y, Z), {"scale": 2.0}, ("x", "other", "more_0")),
    "extra-keyword": ((X,), {"mask": Y}, ("x", "options_mask")),
}


@pytest.mark.parametrize("case", CALLS)
def test_flat_and_back(case: str) -> None:
    args, kwargs, names = CALLS[case]
    found, leaves = signature(*args, **kwargs)
    assert found.names == names
    assert all(a is b for a, b in zip(found.bind(args, kwargs), leaves, strict=True))
    again = found.unbind(leaves)
    assert all(a is b for a, b in zip(found.bind(*again), leaves, strict=True))
    assert list(found.stream(args, kwargs)) == list(names)


def test_positional_and_keyword_calls_are_the_same() -> None:
    found, _ = signature(X, Y)
    assert all(a is b for a, b in zip(found.bind((), {"other": Y, "x": X}), [X, Y], strict=True))


def test_defaults_may_be_left_out_or_given() -> None:
    """``model(x)`` and ``model(x, None)`` are one call; the second was once refused."""
    found, _ = signature(X)
    assert found.bind((X, None), {"scale": 1.0}) == [X]
    found, _ = signature(X, None)
    assert found.bind((X,), {}) == [X]


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((X, Y, Z), {}, "structure"),
        ((X, None), {}, "was a tensor"),
        ((X, Y), {"scale": 3.0}, "was 1.0 at capture and is 3.0"),
        ((), {}, "do not fit"),
    ],
)
def test_another_call_is_refused(args: Any, kwargs: Any, words: str) -> None:
    found, _ = signature(X, Y, scale=1.0)
    with pytest.raises(ConfigError, match=words):
        found.bind(args, kwargs)


def test_names_are_unique_identifiers() -> None:
    found, _ = signature(X, {"a b": Y, "a_b": Z})
    assert found.names == ("x", "other_a_b", "other_a_b_2")


def test_no_tensor() -> None:
    with pytest.raises(TraceError, match="no tensor"):
        signature(3)


def test_example_forms() -> None:
    assert Call.of({"x": X}) == Call.of(UserDict(x=X)) == Call((), {"x": X})
    assert Call.of((X, Y)) == Call((X, Y), {})
    assert Call.of(X) == Call.of(Call.of(X)) == Call((X,), {})


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0, *, input: Tensor | None = None) -> Any:
        x = self.layer(batch["x"]) * scale
        if input is not None:
            x = x + input
        return {"pair": Pair(x, [x.sum(1), None]), "size": x.size(0), "name": "ok"}


def test_structured_calls_and_outputs() -> None:
    model = Structured()

    def call(n: int) -> dict[str, Any]:
        return {
            "batch": {"x": torch.randn(n, 4), "unused": torch.randn(n)},
            "scale": 2.0,
            "input": torch.randn(4),
        }

    traced = capture(model, **call(2))
    assert_same(model, traced, **call(3))


def test_output_of_a_type_of_ones_own() -> None:
    """Opened by its attributes, and made anew; without tensors to be found in it, refused."""

    class Own:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Own:
            return Own(x * 2)

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return iter([x * 2])

    traced = capture(Gives(), X)
    found = run_graph(traced, [X], training=True)
    assert type(found) is Own
    assert torch.equal(found.x, X * 2)
    with pytest.raises(TraceError, match=r"returns a list_iterator that holds no tensor"):
        capture(Keeps(), X)


def test_runnable_leaves_the_users_modules_alone() -> None:
    """A buffer of a leaf module, read directly too, was once registered anew on it, as a persistent one."""

    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf, self.embed = Leaf(), nn.Embedding(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.leaf(self.embed(x)) * self.leaf.table, self.embed.weight)

    model = Reads()
    traced = capture(model, torch.tensor([1, 2]))
    before = list(model.state_dict())
    assert_same(model, traced, torch.tensor([3, 2, 1]))
    assert list(model.state_dict()) == before
    graph_module = runnable(traced, True)
    assert graph_module.leaf is model.leaf
    assert graph_module.embed is model.embed
