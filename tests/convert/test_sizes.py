"""Sizes carry their provenance: right at other shapes, or a clear error."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn

from localize.convert.sizes import RecordedInt, plain, sized_builtins
from localize.errors import TraceError
from tests.convert.recording import assert_same, capture, run_graph


class Sink:
    """Notes what is emitted."""

    def __init__(self) -> None:
        self.graph, self.is_open = fx.Graph(), True
        self.guards: list[tuple[int, str, int, bool]] = []

    def emit_size(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, tuple(plain(a) for a in args))

    def emit_guard(self, value: RecordedInt, comparison: str, other: int, outcome: bool) -> None:
        self.guards.append((value.plain, comparison, int.__int__(other), outcome))


@pytest.fixture
def sink() -> Sink:
    return Sink()


def recorded(value: int, sink: Sink) -> RecordedInt:
    return RecordedInt(value, sink, sink.graph.placeholder("n"))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "mod", "lshift", "and_", "xor"])
@pytest.mark.parametrize("reflected", [False, True])
def test_arithmetic_emits(name: str, reflected: bool, sink: Sink) -> None:
    function = getattr(operator, name)
    n = recorded(6, sink)
    result = function(20, n) if reflected else function(n, 4)
    assert result == (function(20, 6) if reflected else function(6, 4))
    assert isinstance(result, RecordedInt)
    assert result.graph_node.target is function
    assert result.graph_node.args == ((20, 6) if reflected else (6, 4))


def test_comparisons_guard(sink: Sink) -> None:
    n = recorded(6, sink)
    assert n > 5
    assert n != 7
    assert n >= 3
    assert n
    assert sink.guards == [(6, "gt", 5, True), (6, "ne", 7, True), (6, "ge", 3, True), (6, "ne", 0, True)]


@pytest.mark.parametrize(
    "read",
    [int, float, math.sqrt, lambda n: n / 2, lambda n: n * 0.5, lambda n: n**-1, lambda n: [0] * n],
)
def test_leaving_the_integers_pins(read: Callable[[Any], Any], sink: Sink) -> None:
    result = read(recorded(6, sink))
    assert result == read(6)
    assert not isinstance(result, RecordedInt)
    assert set(sink.guards) == {(6, "eq", 6, True)}


LEAVING: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "index": (lambda n: list("abcdefgh")[n], "g"),
    "slice": (lambda n: list("abcdefgh")[n:], ["g", "h"]),
    "tuple": (lambda n: ("a",) * n, ("a",) * 6),
    "text": (lambda n: "ab" * n, "ab" * 6),
    "float": (lambda n: 0.5 * n, 3.0),
    "float minus": (lambda n: 0.5 - n, -5.5),
    "true": (lambda n: n / 4, 1.5),
    "reflected": (lambda n: 3 / n, 0.5),
    "hash": (hash, 6),
    "key": (lambda n: {6: "x"}.get(n), "x"),
    "set": (lambda n: n in {5, 6}, True),
    "f-string": (lambda n: f"{n:03d}|{n}", "006|6"),
    "percent": (lambda n: "%d" % n, "6"),  # noqa: UP031
    "str": (str, "6"),
    "gcd": (lambda n: math.gcd(n, 4), 2),
    "comb": (lambda n: math.comb(n, 2), 15),
    "range": (lambda n: list(range(n)), [0, 1, 2, 3, 4, 5]),
    "zeros": (lambda n: numpy.zeros(n).shape, (6,)),
    "islice": (lambda n: list(itertools.islice("abcdefgh", n)), list("abcdef")),
    "complex": (complex, 6 + 0j),
    "bits": (lambda n: n.bit_length(), 3),
    "power": (lambda n: 2.0**n, 64.0),
}


@pytest.mark.parametrize("case", LEAVING)
def test_whatever_wants_a_plain_number_pins(case: str, sink: Sink) -> None:
    """As a subclass of ``int`` it gave itself away without a word to C code: another size was silently wrong."""
    read, expected = LEAVING[case]
    found = read(recorded(6, sink))
    assert found == expected
    assert (6, "eq", 6, True) in sink.guards


def test_asking_what_it_is_pins_nothing(sink: Sink) -> None:
    n = recorded(6, sink)
    assert isinstance(n, int)
    assert isinstance(n, torch.SymInt)
    assert type(n) is RecordedInt
    assert not isinstance(n, float | bool | Tensor)
    assert [n, n] == [n, n]
    assert not hasattr(n, "__torch_function__")
    assert not hasattr(n, "shape")
    with pytest.raises(AttributeError, match="has no attribute 'shape'"):
        _ = n.shape
    assert sink.guards == []


def test_is_an_integer(sink: Sink) -> None:
    n = recorded(6, sink)
    assert isinstance(n, int)
    assert math.ceil(n) is n
    assert round(n) is n
    assert f"{n} {n!r}" == "6 6"
    assert type(copy.deepcopy(n)) is int
    assert {6: "x"}[n] == "x"
    assert divmod(n, 4) == (1, 2)
    assert type(-n) is RecordedInt


def test_closed_sink_makes_ordinary_integers(sink: Sink) -> None:
    n = recorded(6, sink)
    sink.is_open = False
    assert type(n + 1) is int
    assert type(-n) is int
    assert n == 6
    assert sink.guards == []


def test_range_and_len_respect_sizes(sink: Sink) -> None:
    with sized_builtins():
        steps = range(recorded(3, sink))
        assert isinstance(steps, range)
        assert len([1, 2]) == 2
        assert len(torch.ones(4, 2)) == 4
    assert list(steps) == [0, 1, 2]
    assert sink.guards == [(3, "eq", 3, True)]
    assert type(steps) is range


class Model(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.layer(x))


FLEXIBLE: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(x.shape[0], x.size(1) * x.size(2)),
    "unpack": lambda x: x.reshape([x.size()[0] * x.size()[1], -1]),
    "len": lambda x: x.reshape(len(x), -1),
    "numel": lambda x: x.view(x.numel() // 4, 4),
    "product": lambda x: x.view(math.prod(x.shape[:2]), 4),
    "sum": lambda x: x.new_zeros(sum(x.shape)) + x.sum(),
    "max": lambda x: x.view(max(x.shape[0] * x.shape[1], 1), 4),
    "arange": lambda x: x + torch.arange(x.size(1)).unsqueeze(1),
    "slice": lambda x: x[:, : x.shape[1] // 2],
    "negative": lambda x: x[:, -(x.shape[1] - 1) :],
    "scale": lambda x: x / x.size(0),
    "root": lambda x: x / math.sqrt(x.size(-1)),
    "equal": lambda x: x if x.shape == (x + 1).shape else -x,
    "factory": lambda x: torch.zeros(x.shape) + x,
    "mask": lambda x: x.masked_fill(torch.ones(x.size(1), x.size(1)).triu(1).bool()[:, :1], 0.0),
    "ceil": lambda x: x[: math.ceil(x.shape[0])],
    "isinstance": lambda x: x.reshape(x.shape[0] if isinstance(x.shape[0], int) else -1, -1),
    "norm": lambda x: nn.LayerNorm(x.shape[-1], elementwise_affine=False)(x),
    "half": lambda x: x[:, x.shape[1] // 2 :].flatten(0, 1),
    "empty": lambda x: x if x.shape[0] else -x,
    "minimum": lambda x: x[:, : min(x.shape[1], 100)],
    "new": lambda x: x + x.new_zeros(1, x.size(1), 4),
    "expand": lambda x: x + torch.ones(4).expand(x.shape[0], x.shape[1], 4),
}


@pytest.mark.parametrize("case", FLEXIBLE)
def test_right_at_other_shapes(case: str) -> None:
    model = Model(FLEXIBLE[case])
    traced = capture(model, torch.randn(2, 6, 4))
    for shape in ((2, 6, 4), (3, 6, 4), (5, 8, 4)):
        assert_same(model, traced, torch.randn(shape))


SPECIALISED: dict[str, Callable[[Tensor], Tensor]] = {
    "branch": lambda x: x if x.shape[1] > 5 else -x,
    "loop": lambda x: sum((x[:, t] for t in range(x.size(1))), torch.zeros(4)),
    "int": lambda x: x[:, : int(x.shape[1] * 0.5)],
    "iterate": lambda x: sum((row for row in x.transpose(0, 1)), torch.zeros(4)),
    "unbind": lambda x: sum(x.unbind(1), torch.zeros(4)),
    "split": lambda x: sum(x.split(2, dim=1), torch.zeros(2, 4)),
    "repeat": lambda x: sum([x] * x.size(1)),
    "dictionary": lambda x: x * {6: 1.0}.get(x.size(1), 2.0),
    "constant": lambda x: x * torch.ones(x.size(1), 4).sum().item(),
    "list index": lambda x: x * [1, 2, 3, 4, 5, 6, 7][x.size(1)],
    "list slice": lambda x: x * sum([1, 2, 3, 4, 5, 6, 7][: x.size(1)]),
    "float left": lambda x: x * (0.5 * x.size(1)),
    "set": lambda x: x * (2 if x.size(1) in {6, 7} else 3),
    "text": lambda x: x * len("a" * x.size(1)),
    "f-string": lambda x: x * float(f"1.{x.size(1)}"),
    "gcd": lambda x: x * math.gcd(x.size(1), 12),
    "range": lambda x: x * sum(range(x.size(1))),
    "numel": lambda x: x * x.shape[1:].numel(),
}


@pytest.mark.parametrize("case", SPECIALISED)
def test_specialised_sizes_raise(case: str) -> None:
    """Other batch sizes work; another length would be silently wrong and raises, naming the line."""
    model = Model(SPECIALISED[case])
    traced = capture(model, torch.randn(2, 6, 4))
    assert_same(model, traced, torch.randn(3, 6, 4))
    with pytest.raises(TraceError, match=r"test_sizes.py:\d+.*Re-convert"):
        run_graph(traced, [torch.randn(2, 4, 4)], training=True)


def test_unused_sizes_leave_no_nodes() -> None:
    traced = capture(Model(lambda x: x.view(x.shape[0], -1)), torch.randn(2, 6, 4))
    assert [n.op for n in traced.train_graph.nodes] == [
        "placeholder",
        "call_module",
        *["call_method"] * 2,
        "output",
    ]


def test_leaf_modules_get_plain_integers() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            assert type(n) is int
            return x.view(n, -1)

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.takes = nn.Linear(4, 4), Takes()

        def forward(self, x: Tensor) -> Tensor:
            return self.takes(self.layer(x), x.size(0))

    model = Gives()
    assert_same(model, capture(model, torch.randn(2, 6, 4)), torch.randn(3, 6, 4))


def test_integers_that_leaves_return_stay_live() -> None:
    class Measures(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
            return x * 2, x.size(0), x.size(1)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.measures = nn.Linear(4, 4), Measures()

        def forward(self, x: Tensor) -> Tensor:
            x, n, t = self.measures(self.layer(x))
            return x.view(n * t, 4)

    model = Uses()
    assert_same(model, capture(model, torch.randn(2, 6, 4)), torch.randn(3, 5, 4))


def test_einops_is_told_that_sizes_are_symbols(sink: Sink) -> None:
    """It caches by shape: the second recording got the first one's sizes, and every size was pinned."""
    namespace: dict[str, Any] = {"__name__": "einops.einops"}
    exec("def lookup(cache, size): return cache[size]", namespace)
    with pytest.raises(TypeError, match="symbolic"):
        namespace["lookup"]({6: 1}, recorded(6, sink))


def test_devices_are_read_at_run_time() -> None:
    """A part may run on another device than the example did."""
    model = Model(lambda x: x + torch.arange(4.0, device=x.device))
    traced = capture(model, torch.randn(2, 6, 4))
    arange = next(n for n in traced.train_graph.nodes if n.name == "arange")
    assert arange.kwargs["device"].args[1] == "device"
    assert_same(model, traced, torch.randn(3, 6, 4))
    model.to("meta")
    assert run_graph(traced, [torch.randn(2, 6, 4, device="meta")], training=True).is_meta
