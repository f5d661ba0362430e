"""Any value as flat leaves and back: types, order, attributes, and what holds no tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localize import nest

Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    one: Any
    two: Any = None
    label: str = "r"


@dataclass(frozen=True, slots=True)
class Slots:
    one: Any
    two: Any = 3


class HalfSlots(Slots):  # fields in slots, and a __dict__ beside them
    def __init__(self, one: Any, two: Any) -> None:
        super().__init__(one, two)
        object.__setattr__(self, "later", self.one)


class Ordered(OrderedDict[str, Any]):
    """Like a ``ModelOutput``: what it holds are items and attributes."""

    def __init__(self, *pairs: Any, **more: Any) -> None:
        super().__init__(*pairs, **more)
        for name, item in self.items():
            object.__setattr__(self, str(name), item)

    def __setitem__(self, key: str, value: Any) -> None:
        assert isinstance(key, str)
        super().__setitem__(key, value)


class Listed(list[Any]):
    pass


class Counted(defaultdict[str, Any]):
    pass


class Cache:
    """Like a cache of keys and values: lists of tensors beside settings."""

    def __init__(self, keys: Any, seen: Any = 0) -> None:
        self.seen, self.keys, self.names = seen, keys, ["a", "b"]
        self.last = seen


PLAIN = st.one_of(st.integers(-3, 3), st.none(), st.booleans(), st.text(max_size=2), st.floats(allow_nan=False))
TENSORS = st.integers(0, 3).map(lambda n: torch.arange(float(n)))
NAMES = st.sampled_from(["a", "b", "c_d", "z"])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(Listed),
        st.dictionaries(NAMES, inner, max_size=3),
        st.dictionaries(NAMES, inner, max_size=3).map(Ordered),
        st.dictionaries(NAMES, inner, max_size=3).map(lambda d: Counted(int, d)),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, inner),
        st.builds(Slots, inner, inner),
        st.builds(HalfSlots, inner, inner),
        st.builds(Cache, inner, inner),
        st.lists(st.integers(0, 4), max_size=3).map(torch.Size),
    )


VALUES = st.recursive(st.one_of(PLAIN, TENSORS), containers, max_leaves=12)


def assert_equal(one: Any, two: Any) -> None:
    """Same types, same order, same attributes, and the very same tensors."""
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert one is two
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    elif not hasattr(one, "__dict__") and not isinstance(one, Slots):
        assert one == two
    if isinstance(one, defaultdict):
        assert one.default_factory is two.default_factory
    if isinstance(one, Slots):
        assert_equal((one.one, one.two), (two.one, two.two))
    if hasattr(one, "__dict__"):
        assert list(vars(one)) == list(vars(two))
        for name in vars(one):
            assert_equal(vars(one)[name], vars(two)[name])


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_there_and_back(value: Any) -> None:
    leaves, spec = nest.flatten(value)
    assert_equal(value, nest.unflatten(leaves, spec))
    again, other = nest.flatten(value)
    assert spec == other
    assert nest.Rebuild(spec) == nest.Rebuild(other)
    assert hash(nest.Rebuild(spec)) == hash(nest.Rebuild(other))
    assert all(a is b for a, b in zip(leaves, again, strict=True))
    paths, same = nest.flatten_with_path(value)
    assert same == spec
    assert all(a is b for (_, a), b in zip(paths, leaves, strict=True))


@settings(max_examples=80, deadline=None)
@given(VALUES)
def test_every_tensor_is_a_leaf(value: Any) -> None:
    """Other tensors put in their place come out there; the value itself is not touched."""
    leaves, spec = nest.flatten(value)
    before = list(leaves)
    marks = [torch.full((1,), float(i)) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
    made = nest.unflatten(marks, spec)
    found = nest.leaves_of(made)
    assert [id(leaf) for leaf in found if isinstance(leaf, Tensor)] == [id(m) for m in marks if isinstance(m, Tensor)]
    assert all(a is b for a, b in zip(nest.leaves_of(value), before, strict=True))


def test_paths_name_attributes_and_keys() -> None:
    x = torch.ones(1)
    paths = [path for path, _ in nest.flatten_with_path({"out": Record(x, Ordered(a=x))})[0]]
    assert [str(key) for key in paths[0]] == ["['out']", ".one"]
    assert [[str(key) for key in path] for path in paths[1:]] == [
        ["['out']", ".two", ".a"], ["['out']", ".two", "['a']"],
    ]  # fmt: skip


def test_attributes_keep_their_order() -> None:
    """Those with tensors once came behind all others, so that a printed dataclass was another one."""
    value = Cache(torch.ones(2))
    value.more, value.end = torch.zeros(1), "x"
    made = nest.unflatten(*nest.flatten(value))
    assert list(vars(made)) == ["seen", "keys", "names", "last", "more", "end"]


def test_items_keep_their_order() -> None:
    value = Ordered(b=1, a=torch.ones(1), c="x")
    made = nest.unflatten(*nest.flatten(value))
    assert list(made.items()) == list(value.items())
    assert list(vars(made)) == ["b", "a", "c"]


def test_sizes_come_back_as_sizes() -> None:
    """In an output, in a dataclass with tensors and in one without; a tuple where placeholders take their place."""
    size, x = torch.Size([2, 3]), torch.ones(1)
    leaves, spec = nest.flatten({"size": size, "record": Record(x, size)})
    assert leaves == [2, 3, x]
    made = nest.unflatten([4, 5, x], spec)
    assert type(made["size"]) is torch.Size
    assert made["size"] == (4, 5)
    assert type(made["record"].two) is torch.Size
    assert nest.unflatten([None, None, x], spec)["size"] == (None, None)


def test_no_init_is_run() -> None:
    @dataclass
    class Strict:
        x: Tensor
        made: list[int] = field(default_factory=list)

        def __post_init__(self) -> None:
            self.made.append(1)
            assert self.x.dim() == 1

    made = nest.unflatten([torch.ones(2, 2)], nest.flatten(Strict(torch.ones(1)))[1])
    assert made.made == [1]
    assert made.x.shape == (2, 2)


def test_containers_without_tensors_are_copied_and_objects_shared() -> None:
    """What is made again must not write into what it was made from: its lists, dicts and sets are its own."""
    shared = object()
    value = Record(torch.ones(1), {"names": ["a"]}, label="x")
    value.seen, value.kept = [1, 2], shared
    leaves, spec = nest.flatten(value)
    first, second = nest.unflatten(leaves, spec), nest.unflatten(leaves, spec)
    first.seen.append(3)
    first.two["more"] = 1
    assert value.seen == second.seen == [1, 2]
    assert value.two == second.two == {"names": ["a"]}
    assert first.kept is second.kept is shared


def test_cycles_end() -> None:
    """An object inside of itself is not opened again: that reference stays as it is."""
    outer, inner = Cache([torch.ones(1)]), Cache([torch.zeros(2)])
    outer.inner, inner.owner, outer.me = inner, outer, outer
    leaves, spec = nest.flatten(outer)
    assert [leaf.shape for leaf in leaves] == [(1,), (2,)]
    made = nest.unflatten([x + 1 for x in leaves], spec)
    assert made is not outer
    assert made.keys[0] == 2
    assert made.inner is not inner
    assert made.me is outer
    assert spec == nest.flatten(outer)[1]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Record(torch.ones(1), 1), Record(torch.ones(1), 2)),
        (Record(torch.ones(1)), Record(torch.ones(1), torch.ones(1))),
        (Record(torch.ones(1)), Record(None, torch.ones(1))),
        (Record(torch.ones(1)), Slots(torch.ones(1))),
        (Ordered(a=torch.ones(1), b=1), Ordered(b=1, a=torch.ones(1))),
        (Ordered(a=torch.ones(1), b=1), Ordered(a=torch.ones(1), b=2)),
        (Listed([torch.ones(1), 1]), Listed([torch.ones(1), 2])),
        (torch.Size([1, 2]), torch.Size([1])),
    ],
)
def test_other_structures_are_not_equal(one: Any, two: Any) -> None:
    first, second = nest.flatten(one)[1], nest.flatten(two)[1]
    assert first != second
    assert nest.Rebuild(first) != nest.Rebuild(second)


def test_only_what_holds_tensors_is_opened() -> None:
    assert nest.is_openable(Cache(torch.ones(1)))
    assert nest.is_openable(Cache([[torch.ones(1)]]))
    for value in (Cache(3), torch.ones(1), torch.nn.Linear(1, 1), Cache, "x", object()):
        assert not nest.is_openable(value)
    plain = Cache(3)
    assert nest.leaves_of(plain) == [plain]
    assert nest.leaf({"a": Record(torch.ones(1), torch.zeros(1))}, 1) == 0


def test_arrays_without_one_truth_do_not_break_equality() -> None:
    numpy = pytest.importorskip("numpy")
    value = Record(torch.ones(1), numpy.arange(3))
    assert nest.flatten(value)[1] == nest.flatten(value)[1]
    assert nest.flatten(value)[1] != nest.flatten(copy.deepcopy(value))[1]
