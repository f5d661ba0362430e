"""Side channels: what modules tell each other past their arguments, and what they write into."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import to_local
from localize.errors import TraceError
from tests.convert.found import Found
from tests.convert.recording import assert_same, assert_untouched, capture, state_of

LETTERS: dict[str, Tensor] = {}
X = torch.randn(3, 4)


class Keeper(nn.Linear):
    """A leaf that leaves a tensor of its own making somewhere."""

    def __init__(self, leave: Callable[[Any, Tensor], None]) -> None:
        super().__init__(4, 4)
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.leave(self, x.exp())
        return x


class Reader(nn.Linear):
    """A leaf that reads one."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__(4, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.read()


class Neighbours(nn.Module):
    """first → keeper → middle → reader → last; the reader reads what the keeper left."""

    def __init__(self, leave: Callable[[Any, Tensor], None], read: Callable[[Keeper], Callable[[], Tensor]]) -> None:
        super().__init__()
        self.first, self.keeper, self.middle = nn.Linear(4, 4), Keeper(leave), nn.Linear(4, 4)
        self.reader, self.last = Reader(read(self.keeper)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.keeper(torch.tanh(self.first(x))))))
        return self.last(torch.tanh(self.reader(x)))


def by_attribute() -> Neighbours:
    return Neighbours(lambda k, t: setattr(k, "kept", t), lambda k: lambda: k.kept)


def by_dict() -> Neighbours:
    return Neighbours(lambda k, t: k.__dict__.update(kept={"x": t}), lambda k: lambda: k.kept["x"])


def by_list() -> Neighbours:
    return Neighbours(lambda k, t: setattr(k, "kept", [t]), lambda k: lambda: k.kept[0])


def by_view() -> Neighbours:
    return Neighbours(lambda k, t: setattr(k, "kept", t), lambda k: lambda: k.kept[:1])


def by_object() -> Neighbours:
    box = types.SimpleNamespace(value=None)

    def leave(keeper: Any, tensor: Tensor) -> None:
        keeper.box = box
        box.value = tensor

    model = Neighbours(leave, lambda k: lambda: box.value)
    model.keeper.box = box
    return model


def by_closure() -> Neighbours:
    cell: list[Tensor] = []
    return Neighbours(lambda k, t: cell.__setitem__(slice(None), [t]), lambda k: lambda: cell[0])


def by_global() -> Neighbours:
    return Neighbours(lambda k, t: LETTERS.update(x=t), lambda k: lambda: LETTERS["x"])


@pytest.mark.parametrize("build", [by_attribute, by_dict, by_list, by_view, by_object])
def test_no_cut_between_leaves_that_share_a_tensor(build: Callable[[], Neighbours]) -> None:
    """A cut there would let gradients, which a local loss must not send that far, pass by."""
    model = build()
    found = Found(model, X)
    names = {name for point in found.all for name in (point.name, *point.aliases)}
    assert {"first", "reader"} <= names
    assert not {"keeper", "middle"} & names
    assert_same(model, found.traced, torch.randn(5, 4))


def test_all_cuts_where_nothing_is_shared() -> None:
    model = Neighbours(lambda k, t: None, lambda k: lambda: torch.ones(4))
    found = Found(model, X)
    names = {name for point in found.all for name in (point.name, *point.aliases)}
    assert {"first", "keeper", "middle", "reader"} <= names


def test_gradients_do_not_pass_a_side_channel_into_another_part() -> None:
    model = by_attribute()
    local = to_local(model, X, method="early_exit", parts=2)
    lower, upper = local.losses(X, torch.tensor([0, 1, 1]))
    for loss, part in ((lower, local.parts[1]), (upper, local.parts[0])):
        grads = torch.autograd.grad(loss, list(part.parameters()), allow_unused=True)
        assert all(grad is None for grad in grads)
    part_of = [next(i for i, p in enumerate(local.parts) if hasattr(p, name)) for name in ("keeper", "reader")]
    assert part_of[0] == part_of[1]


@pytest.mark.parametrize("build", [by_closure, by_global])
def test_what_is_left_outside_of_modules_is_refused(build: Callable[[], Neighbours]) -> None:
    with pytest.raises(TraceError, match=r"past its arguments, which was left for it outside"):
        capture(build(), X)


@pytest.mark.parametrize("build", [by_closure, by_global])
def test_or_keeps_the_block_around_whole(build: Callable[[], Neighbours]) -> None:
    block = build()
    block.last = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 2))
    traced = capture(model, X)
    assert [n.target for n in traced.train_graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert_same(model, traced, torch.randn(5, 4))


class RootReads(nn.Module):
    """The root's own forward reads what a leaf left, two layers later."""

    def __init__(self, leave: Callable[[Any, Tensor], None], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.first, self.keeper, self.last = nn.Linear(4, 4), Keeper(leave), nn.Linear(4, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.last(torch.tanh(self.keeper(self.first(x)))))
        return x * self.read(self.keeper)


@pytest.mark.parametrize(
    ("leave", "read"),
    [
        (lambda k, t: setattr(k, "kept", t), lambda k: k.kept),
        (lambda k, t: k.__dict__.update(kept={"x": t}), lambda k: k.kept["x"]),
    ],
    ids=["attribute", "dict"],
)
def test_the_root_reads_right_behind_the_leaf(leave: Any, read: Any) -> None:
    """By then another call may have left something else, and the keeper may be in another part."""
    model = RootReads(leave, read)
    traced = capture(model, X)
    nodes = list(traced.train_graph.nodes)
    place = next(i for i, n in enumerate(nodes) if str(n.target).startswith("left_"))
    assert nodes[place - 1].target == "keeper"
    assert nodes[place].meta["links"] == {nodes[place - 1]}
    assert_same(model, traced, torch.randn(5, 4))
    assert "keeper" not in {point.name for point in Found(model, X).all if point.position == place}


class Writes(nn.Module):
    """Writes into its own weights, as a norm constraint or a moving average does."""

    def __init__(self, write: Callable[[nn.Linear], None]) -> None:
        super().__init__()
        self.inside, self.write = nn.Linear(4, 4), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.inside)
        return self.inside(x)


def scaled(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(0.9)


def replaced(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 0.9


WRITES: dict[str, Callable[[nn.Linear], None]] = {
    "data.clamp_": lambda layer: setattr(layer, "seen", layer.weight.data.clamp_(-0.1, 0.1).shape),
    "no_grad mul_": scaled,
    "data =": replaced,
}


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True to a scalar")
def test_weights_that_a_forward_writes_are_put_back(case: str) -> None:
    """By the recording, and by all the library's other runs of the model."""
    def write(layer: nn.Linear) -> None:
        WRITES[case](layer)

    model = nn.Sequential(nn.Linear(4, 4), Writes(write), nn.Linear(4, 2))
    weight = model[1].inside.weight
    address = weight.data_ptr()
    capture(model, X)
    before = state_of(model)
    to_local(model, X, method="bp", parts=2)
    assert_untouched(model, before)
    assert weight.data_ptr() == address


def test_letter_boxes_are_put_back() -> None:
    """A tensor of the recording, left there, would keep its graph alive and be read as if it were the user's."""
    model = by_object()
    box, before = model.keeper.box, torch.zeros(1)
    box.value, box.more = before, 3
    capture(model, X)
    assert vars(box) == {"value": before, "more": 3}
    assert box.value is before
    model = by_attribute()
    capture(model, X)
    assert not hasattr(model.keeper, "kept")
