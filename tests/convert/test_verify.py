"""Every kind of difference between the parts and the model is found, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from localize import to_local
from localize.convert.compare import close, equal, gradients_differ, outputs_differ, tensors_differ
from localize.convert.verify import verify
from localize.errors import TraceError
from localize.part import Part
from tests.convert.recording import assert_untouched, state_of

X = torch.randn(3, 8, 4)
Change = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Does something else once it is captured: ``change`` works on the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))
        self.change: list[Change] = []
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.change:
            x = self.change[0](self, x)
        return self.last(torch.tanh(self.first(x)))


def parts_of(model: nn.Module, x: Tensor = X) -> tuple[list[Part], Any]:
    local = to_local(model, x, method="bp", parts=2, verify=False)
    return [part for part in local.parts if isinstance(part, Part)], local.signature


def verified(change: Change | None, x: Tensor = X, exact: bool = True) -> tuple[str, ...]:
    model = Model()
    parts, signature = parts_of(model, x)
    if change is not None:
        model.change.append(change)
    before = state_of(model)
    try:
        return verify(model, parts, signature, [x], exact=exact)
    finally:
        assert_untouched(model, before)


def scaled(model: Model, x: Tensor) -> Tensor:
    return x * 1.001


def at_second_call(model: Model, x: Tensor) -> Tensor:
    model.calls.append(1)
    return x * (1 if len(model.calls) % 2 else 2)


def written(model: Model, x: Tensor) -> Tensor:
    y = x.clone()
    x.add_(1)
    return y


def buffered(model: Model, x: Tensor) -> Tensor:
    model.seen += 1
    return x




class Same(torch.autograd.Function):
    """The same value with another gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.01


def other_gradient(model: Model, x: Tensor) -> Tensor:
    return x + (Same.apply(model.last.bias) - model.last.bias).sum()


def only_shorter(model: Model, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] == X.shape[1] // 2 else x


def only_in_eval(model: Model, x: Tensor) -> Tensor:
    return x if model.training else x * 2


def only_larger(model: Model, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] != X.shape[0] else x


DIFFERENCES: dict[str, tuple[Change, str]] = {
    "output": (scaled, r"in train mode, on inputs \(3, 8, 4\), output 0 differs by up to"),
    "second call": (at_second_call, r"output 0 differs by up to \S+ at the second call"),
    "written input": (written, r"of the inputs after the call, output 0 differs"),
    "buffer": (buffered, r"buffer 'seen' is another one afterwards"),
    "gradient": (other_gradient, r"the gradient of parameter 'last.bias' differs by up to"),
    "eval mode": (only_in_eval, r"in eval mode"),
    "other lengths": (only_shorter, r"in eval mode, on inputs \(\d+, 4, 4\), output 0 differs"),
    "other batch": (only_larger, r"in eval mode, on inputs \([^3], \d, 4\), output 0 differs"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_every_kind_of_difference_is_found(case: str) -> None:
    change, words = DIFFERENCES[case]
    with pytest.raises(TraceError, match=rf"The captured model is not the model: .*{words}"):
        verified(change)


def test_nothing_to_say_where_all_is_the_same() -> None:
    assert verified(None) == ()
    assert verified(None, torch.randn(3, 4)) == ()


def test_a_missing_gradient_is_found() -> None:
    def detached(model: Model, x: Tensor) -> Tensor:
        return x + (model.seen * model.first.bias.detach()).sum() * 0 + (0 * model.last.bias.sum())

    assert verified(detached) == ()  # zero times a parameter: a gradient on both sides

    class Frozen(Model):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.last(hidden.detach() if self.change else hidden)

    model = Frozen()
    parts, signature = parts_of(model)
    model.change.append(scaled)
    with pytest.raises(TraceError, match=r"parameter 'first\.(weight|bias)' has a gradient"):
        verify(model, parts, signature, [X])


def test_a_model_that_takes_no_other_batch_is_noted() -> None:
    def stubborn(model: Model, x: Tensor) -> Tensor:
        if x.shape[0] != 3:
            raise ValueError("three, please")
        return x

    assert verified(stubborn) == ("the model takes no other batch size: only the example's was compared",)


def test_lengths_that_the_parts_refuse_are_noted() -> None:
    class Fixed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[1] == 8 else -x)

    model = Fixed()
    parts, signature = parts_of(model)
    (note,) = verify(model, parts, signature, [X])
    assert note.startswith("only for sizes like the example's: The captured program was specialised at tests/convert")


def test_a_batch_that_the_parts_refuse_is_an_error() -> None:
    class Fixed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[0] == 3 else -x)

    model = Fixed()
    parts, signature = parts_of(model, torch.randn(3, 4))
    with pytest.raises(TraceError, match="specialised at"):
        verify(model, parts, signature, [torch.randn(3, 4)])


def test_another_way_to_the_same_result_is_equal_up_to_rounding() -> None:
    """Where a library was told to take its general way."""
    def rounding(model: Model, x: Tensor) -> Tensor:
        return x * (1 + 1e-6)

    assert verified(rounding, exact=False) == ()
    with pytest.raises(TraceError, match="output 0 differs"):
        verified(rounding)
    with pytest.raises(TraceError, match="output 0 differs"):
        verified(scaled, exact=False)


def test_the_models_own_failure_on_the_example_is_not_hidden() -> None:
    def fails(model: Model, x: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(TraceError, match=r"fails when it is called.*ValueError: no"):
        verified(fails)


class Named(NamedTuple):
    x: Tensor
    y: Any = None


ONE = torch.tensor([1.0, float("nan"), -2.0])
UNEQUAL: list[tuple[Any, Any, str]] = [
    (ONE, (ONE,), "is a tuple instead of a Tensor"),
    ((ONE,), (ONE, ONE), "2 entries instead of 1"),
    (ONE, ONE + 1, "output 0 differs by up to"),
    (ONE, ONE[:2], "is (2,) torch.float32 instead of (3,) torch.float32"),
    (ONE, ONE.double(), "torch.float64 instead"),
    (Named(ONE, 1), Named(ONE, 2), "output 1 is 2 instead of 1"),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs in 1 of 2 entries"),
]


@pytest.mark.parametrize(("one", "other", "words"), UNEQUAL)
def test_unequal_outputs(one: Any, other: Any, words: str) -> None:
    assert words in str(outputs_differ(one, other))


def test_equal_outputs() -> None:
    values: Sequence[Any] = (ONE, Named(ONE, float("nan")), {"a": ONE, "b": [None, 2]}, torch.eye(2).to_sparse())
    for value in values:
        assert outputs_differ(value, value) is None
    assert equal(ONE, ONE.clone())
    assert not equal(ONE, ONE.double())
    assert outputs_differ(torch.ones(2), torch.ones(2) + 1e-6, 1e-4) is None
    assert close(torch.tensor([1e4, 1.0]), torch.tensor([1e4, 1.5]), 1e-4)
    assert not close(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.5]), 1e-4)
    assert not close(torch.tensor([1]), torch.tensor([2]), 1.0)


def test_tensors_and_gradients_by_name() -> None:
    assert tensors_differ({"a": ONE}, {"a": ONE}, "buffer") is None
    assert tensors_differ({"a": ONE}, {}, "buffer") == "buffer 'a' is another one afterwards"
    assert gradients_differ({"a": None}, {"a": None}) is None
    assert gradients_differ({"a": None}, {"a": ONE}) == "parameter 'a' has a gradient"
    assert gradients_differ({"a": ONE}, {"a": None}) == "parameter 'a' has no gradient"
    assert "by up to 1" in str(gradients_differ({"a": torch.ones(1)}, {"a": torch.zeros(1)}))
