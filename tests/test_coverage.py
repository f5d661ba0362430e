"""A fast sample of the coverage benchmark, and whether its comparisons would notice a wrong conversion."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.suites import Case, checks, table, torchvision_models
from benchmarks.suites.compare import flatten, observe, other_batch, same
from localize import TraceError, list_methods, to_local


class Net(nn.Module):
    """Five layers, with batch norm's buffers and dropout's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
        )
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.layers(x)))


def build() -> Case:
    torch.manual_seed(0)
    return Case(Net(), torch.randn(2, 4), torch.tensor([0, 2]), "classification")


def row_of(make: Any, parts: int = 3) -> dict[str, Any]:
    row: dict[str, Any] = {"model": "net"}
    checks.check(make, parts, row.__setitem__)
    return row


def steps_of(make: Any, parts: int, methods: Sequence[str] | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"model": "net"}
    checks.check_steps(make, parts, row.__setitem__, methods)
    return row


# -------------------------------------------------------------------- the sample


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large"])
def test_torchvision(name: str) -> None:
    row = row_of(lambda: torchvision_models.build(name), parts=4)
    assert table.right(row), row
    assert row["split"] == "yes"


def test_torchvision_with_every_method() -> None:
    row = steps_of(lambda: torchvision_models.build("squeezenet1_1"), parts=4)
    assert table.trained(row)
    assert set(row["step"]) == set(list_methods())
    assert set(row["step"].values()) == {"yes"}


@pytest.mark.parametrize("name", ["test_vit", "starnet_s050"])
def test_timm(name: str) -> None:
    pytest.importorskip("timm")
    module = importlib.import_module("benchmarks.suites.timm_models")
    row = row_of(lambda: module.build(name), parts=4)
    assert table.right(row), row
    assert row["split"] == "yes"


@pytest.mark.parametrize("name", ["bert-classification", "vit-classification"])
def test_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    module = importlib.import_module("benchmarks.suites.transformers_models")
    row = row_of(lambda: module.build(name), parts=2)
    assert table.right(row), row
    assert row["split"] == "yes"


# -------------------------------------------------------------------- would it notice?


def test_a_right_conversion_is_called_right() -> None:
    row = row_of(build)
    assert table.right(row), row
    assert not table.wrong(row)
    assert table.trained(steps_of(build, 3, ["scpl", "joint"]))


def spoil_output(local: nn.Module) -> None:
    forward = local.forward
    local.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01  # type: ignore[method-assign]


def spoil_gradient(local: nn.Module) -> None:
    forward = local.forward

    def detached(x: Tensor) -> Tensor:
        output = forward(x)
        return output.detach() + 0.5 * (output - output.detach())

    local.forward = detached  # type: ignore[method-assign]


def spoil_buffers(local: nn.Module) -> None:
    local.register_forward_hook(lambda module, *_: module.to_standard().layers[1].num_batches_tracked.add_(1))


def spoil_mode(local: nn.Module) -> None:
    """Dropout goes on in eval mode."""
    norm = local.to_standard().layers[2]
    norm.eval = lambda: norm
    norm.train = lambda mode=True: norm


def spoil_batch(local: nn.Module) -> None:
    forward = local.forward
    local.forward = lambda x: forward(x[:2]) if len(x) > 2 else forward(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "column"),
    [
        (spoil_output, "train"),
        (spoil_gradient, "train"),
        (spoil_buffers, "train"),
        (spoil_mode, "eval"),
        (spoil_batch, "batch"),
    ],
)
def test_a_wrong_conversion_is_called_wrong(monkeypatch: pytest.MonkeyPatch, spoil: Any, column: str) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        local = to_local(*args, **kwargs)
        if kwargs["method"].name == "bp":
            spoil(local)
        return local

    monkeypatch.setattr(checks, "to_local", wrong)
    row = row_of(build)
    assert row[column].startswith("WRONG"), row
    assert table.wrong(row)
    assert not table.right(row)
    assert "**WRONG" in table.line(row, rivals=False)


def test_a_loss_that_reaches_too_far_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(*args: Any, **kwargs: Any) -> Any:
        local = to_local(*args, **kwargs)
        local.losses = lambda inputs, target: [local(inputs).sum()] * len(local.parts)  # type: ignore[method-assign]
        return local

    monkeypatch.setattr(checks, "to_local", joined)
    assert checks.step(build(), "early_exit", 2).startswith("WRONG: loss 1 reaches part 2")


def test_a_wrong_step_makes_the_row_wrong() -> None:
    row = {"model": "m", "captured": "yes", "train": "yes", "eval": "yes", "batch": "yes", "split": "yes"}
    assert table.right(row)
    steps = {"bp": "yes", "nwise": "WRONG: part 1 has no gradient"}
    assert table.wrong(row | {"step": steps})
    assert not table.right(row | {"step": steps})
    lopsided = row | {"imbalance": 3.7}
    assert "lopsided (3.7)" in table.line(lopsided, rivals=False)
    assert "1 above 1.5, of 1 measured" in " ".join(table.summary([lopsided, row], 4, rivals=False))


def test_what_differs_by_rounding_is_close_and_not_right() -> None:
    one = {"output": torch.tensor([1.0, 100.0])}
    assert same(one, {"output": torch.tensor([1.0, 100.0])}) == "yes"
    assert same(one, {"output": torch.tensor([1.00001, 100.0])}).startswith("close: output")
    assert same(one, {"output": torch.tensor([1.001, 100.0])}).startswith("WRONG: output")
    assert same(one, {"output": torch.tensor([1.0, 100.0]).double()}).startswith("WRONG")
    assert same(one, {}).startswith("WRONG")
    assert same({"g": None}, {"g": torch.zeros(2)}).startswith("WRONG: g")
    assert same({"n": torch.tensor([1, 2])}, {"n": torch.tensor([1, 3])}).startswith("WRONG: n")


def test_nan_equals_nan_but_shows_nothing() -> None:
    nan = {"output": torch.tensor([float("nan"), 1.0])}
    assert same(nan, {"output": torch.tensor([float("nan"), 1.0])}) == "yes"
    assert same(nan, {"output": torch.tensor([0.0, 1.0])}).startswith("WRONG")

    def broken() -> Case:
        case = build()
        case.model.last.weight.data.fill_(float("nan"))
        return case

    assert not table.right(row_of(broken))


def test_outputs_are_compared_through_containers_and_objects() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = [torch.ones(2)]
            self.owner = self

    leaves = flatten("output", {"logits": torch.zeros(1), "cache": Cache(), "pair": (None, 3)})
    assert set(leaves) >= {"output.logits", "output.cache.keys.0", "output.pair.0", "output.pair.1"}
    assert same(flatten("o", (1, 2)), flatten("o", [1, 2])).startswith("WRONG: type of o")


def test_an_input_changed_in_place_does_not_reach_the_next_run() -> None:
    class InPlace(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    model, x = InPlace(3, 3), torch.zeros(2, 3)
    assert same(observe(model, model, x), observe(model, model, x)) == "yes"
    assert not x.any()


def test_the_other_batch_has_one_sample_more() -> None:
    inputs = {"x": torch.arange(4).view(2, 2), "mask": torch.ones(2, 5), "table": torch.ones(7, 2), "flag": True}
    found = other_batch(inputs)
    assert found["x"].tolist() == [[0, 1], [0, 1], [2, 3]]
    assert found["mask"].shape == (3, 5)
    assert found["table"].shape == (7, 2)
    assert found["flag"] is True


# -------------------------------------------------------------------- refusals


class Choosing(nn.Module):
    """Python takes a decision on values, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x if x.sum().item() > 0 else -x)


@pytest.mark.parametrize(("pattern", "right"), [("values", True), ("another reason", False), (None, False)])
def test_a_refusal_is_right_only_where_it_is_expected(
    monkeypatch: pytest.MonkeyPatch, pattern: str | None, right: bool
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TraceError("Python depends on a tensor's values (item)")

    monkeypatch.setattr(checks, "to_local", refuse)
    row = row_of(lambda: Case(Choosing(), torch.randn(2, 4), torch.tensor([0, 1]), refused=pattern))
    assert row["captured"].startswith("refused, rightly" if right else "refused: TraceError")
    assert table.right(row) is right
    assert not table.wrong(row)


def test_fewer_parts_than_asked_for_are_told() -> None:
    def small() -> Case:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return Case(model, torch.randn(2, 4), torch.tensor([0, 2]), "classification")

    row = row_of(small, parts=4)
    assert row["split"] == "2 parts"
    assert table.right(row)
