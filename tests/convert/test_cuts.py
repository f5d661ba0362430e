"""Where a graph may be cut and what crosses there, worked out by hand on tiny graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import to_local
from localize.convert.cuts import choose_cuts, classifier_cut
from localize.errors import CutError
from tests import zoo
from tests.convert.found import Found, chain
from tests.convert.test_profile import Folded


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Linear(width, width), nn.Linear(width, width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.two(self.relu(self.one(x))))


# ------------------------------------------------------------------------------------------ liveness


def test_what_crosses_in_a_residual_block() -> None:
    found = Found(nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)), torch.randn(2, 4))
    crossing = {point.name: point.crossing for point in found.all}
    skip = found.at("0").primary
    assert crossing["0"] == (skip,)
    assert crossing["1.one"] == (skip, found.at("1.one").primary)
    assert crossing["1.relu"] == (skip, found.at("1.relu").primary)
    assert crossing["1.two"] == (skip, found.at("1.two").primary)
    assert len(crossing["add"]) == 1
    assert len(crossing["1"]) == 1
    assert found.at("1.relu").crossing_bytes == 2 * found.at("1").crossing_bytes == 2 * (2 * 4 * 4)


def test_a_module_called_twice_ends_twice() -> None:
    found = Found(nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)), torch.randn(2, 4))
    assert found.at("1").aliases == ("1.relu#2",)
    assert found.at("1.relu").position < found.at("1").position


def test_outer_modules_give_the_name() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = Found(nn.Sequential(nn.Sequential(nn.Linear(4, 4), inner), nn.Linear(4, 2)), torch.randn(2, 4))
    assert found.names(found.best) == ["0.0", "0"]
    assert found.at("0").aliases == ("0.1", "0.1.1")


def test_no_cut_below_a_change_in_place() -> None:
    found = chain(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert found.names(found.all) == ["0", "2"]


def test_no_cut_between_a_view_and_a_change_in_place() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            view = h[:, :2]
            g = self.b(h)
            view.zero_()
            return self.c(g + h)

    found = Found(Model(), torch.randn(2, 4))
    assert "a" not in found.names(found.all)
    assert "b" not in found.names(found.all)
    assert "add" in found.names(found.all)


class SizesAbove(nn.Module):
    """Uses, above, a size of ``source``: of the input, or of a value that crosses anyway."""

    def __init__(self, of_input: bool) -> None:
        super().__init__()
        self.a, self.b, self.of_input = nn.Linear(4, 6), nn.Linear(6, 2), of_input

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        n = (x if self.of_input else h).shape[0]
        return self.b(F.relu(h).view(n, 6))


@pytest.mark.parametrize("of_input", [True, False])
def test_sizes_do_not_cross_but_their_tensor_does(of_input: bool) -> None:
    found = Found(SizesAbove(of_input), torch.randn(2, 4))
    a, relu = found.at("a"), found.at("relu")
    if of_input:
        assert a.crossing == ("x", "a")
        assert a.primary == "a"
        assert len(relu.crossing) == 2
    else:
        assert a.crossing == ("a",)
        assert relu.crossing == ("a", "relu")
    best = found.best[0]
    assert len(best.crossing) == 1  # after the view nothing else is needed


def test_masks_cross_and_heads_do_not_read_them() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            mask = ids > 0
            h = self.a(self.embed(ids)) * mask.unsqueeze(-1)
            return self.b(h * mask.unsqueeze(-1))

    found = Found(Masked(), torch.randint(0, 9, (2, 5)))
    point = found.at("a")
    assert set(point.crossing) > {point.primary}
    assert point.spec.dtype == torch.float32


def test_tuples_do_not_cross() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.b = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.rnn(self.a(x))[0])

    found = Found(Model(), torch.randn(2, 3, 4))
    assert "rnn" not in found.names(found.all)
    assert found.names(found.all)[0] == "a"
    assert len(found.best) == 2
    assert len(found.best[1].crossing) == 1


def test_parameters_on_both_sides() -> None:
    found = chain(nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh())
    assert found.names(found.all) == ["1", "2"]
    assert found.names(found.best) == ["2"]
    assert chain(nn.Linear(4, 2)).all == []


def test_heads_read_before_dropout() -> None:
    found = chain(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))
    assert found.names(found.all) == ["0", "1", "2"]
    assert found.names(found.best) == ["1"]


def test_heads_do_not_read_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
            self.b = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))

    found = Found(Gated(), torch.randn(2, 3, 18, 18))
    assert found.names(found.best) == ["a", "mul"]


def test_heads_do_not_read_samples_folded_with_tokens() -> None:
    found = Found(Folded(), torch.randn(2, 3, 4))
    assert found.names(found.best) == ["a", "reshape_1"]
    assert "b" not in found.names(found.all)


def test_modes_with_different_graphs_share_names() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if self.training:
                h = torch.tanh(h) + 0.1
            return self.c(self.b(h))

    found = Found(Branches(), torch.randn(2, 4))
    assert found.names(found.cuts[True]) == found.names(found.cuts[False])
    assert "b" in found.names(found.best)


# ------------------------------------------------------------------------------------------ names of a person


def test_chosen_names() -> None:
    found = Found(nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)), torch.randn(2, 4))
    chosen = choose_cuts(["1.relu#2", "0"], found.all)
    assert [found.all[i].name for i in chosen] == ["0", "1"]


def test_all_wrong_names_are_told_at_once() -> None:
    found = Found(nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)), torch.randn(2, 4))
    with pytest.raises(CutError) as error:
        choose_cuts(["1.relus", "nowhere_at_all", "1", "1.relu#2"], found.all)
    message = str(error.value)
    assert "'1.relus'. Did you mean '1.relu'?" in message
    assert "'nowhere_at_all'" in message
    assert "'1' and '1.relu#2' are one place" in message
    assert "Cut points are 0, " in message


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_names_are_unique_and_cuts_in_order(case: zoo.Case) -> None:
    found = Found(case.build(), case.inputs())
    names = [name for point in found.all for name in (point.name, *point.aliases)]
    assert len(names) == len(set(names))
    assert [p.position for p in found.best] == sorted({p.position for p in found.best})
    assert all(p.primary in p.crossing for p in found.all)
    assert set(found.names(found.best)) <= set(found.names(found.all))


# ------------------------------------------------------------------------------------------ the classifier


def classifier_name(found: Found) -> str | None:
    point = classifier_cut(found.traced, found.best)
    return point.name if point is not None else None


def test_classifier_of_a_chain_is_its_last_layer() -> None:
    assert (
        classifier_name(chain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))) == "3"
    )
    assert classifier_name(chain(nn.Linear(4, 4), nn.Linear(4, 2))) == "0"
    assert classifier_name(chain(nn.Linear(4, 2))) is None


class Backbone(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {"body": nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), "top": classifier}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net["top"](torch.tanh(self.net["body"](x)))


def test_classifier_is_the_outermost_suffix() -> None:
    top = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = Found(Backbone(top), torch.randn(2, 4))
    assert classifier_name(found) == "tanh"


def test_a_classifier_that_is_most_of_the_model_is_looked_into() -> None:
    top = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    assert classifier_name(Found(Backbone(top), torch.randn(2, 4))) == "net.top.4"


def test_the_place_below_the_classifier_survives_thinning() -> None:
    # The classifier pools first, so that the leanest gap is inside it.
    top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), top)
    found = Found(model, torch.randn(2, 3, 8, 8))
    assert classifier_name(found) == "3"
    assert "4.1" in found.names(found.best)


class OneMore(nn.Module):
    """Train mode multiplies once more, so that the same node name means another place in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)]), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.training:
            x = x * self.scale
        for layer in self.layers[1:]:
            x = layer(x) * 2
        return x


def test_cuts_mean_the_same_place_in_both_modes() -> None:
    """A cut after `mul` was one place in train mode and another in eval mode, where a value was missing then."""
    model, x = OneMore(), torch.randn(3, 4)
    found = Found(model, x)
    for mode in (True, False):
        positions = [point.position for point in found.cuts[mode]]
        assert positions == sorted(set(positions))
    for parts in (2, 3, 4):
        local = to_local(model, x, method="bp", parts=parts, task="regression")
        for training in (True, False):
            local.train(training)
            assert torch.equal(local(x), model(x))
