"""Each mended bug, with a test that tells its story."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localize import ConfigError, TaskError, TraceError, get_method, list_methods, to_local
from localize.convert.compare import outputs_differ
from localize.heads.base import Method, TaskHead


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def mlp(inputs: int = 8, outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, outputs),
    )  # fmt: skip


X, Y = torch.randn(6, 8), torch.randint(0, 3, (6,))


@pytest.mark.parametrize("method", list_methods())
def test_balance_by_time_counts_heads_too(method):
    """Heads were not timed, and every method that has some was refused."""
    local = to_local(mlp(), X, method=method, balance="time", parts=3)
    assert local.plan.imbalance >= 1.0


def test_a_converted_model_can_be_freed():
    """The profile's hooks held the model through a cycle that the collector cannot see."""
    model = mlp()
    local = to_local(model, X, method="bp", parts=3)
    alive = weakref.ref(model)
    del model, local
    gc.collect()
    assert alive() is None


class Counting(nn.Module):
    """Warms up over its first calls, by a number it keeps on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.c(F.relu(self.b(F.relu(self.a(x))))) * min(1.0, self.calls / 10)


class Averaging(Counting):
    """Keeps a running mean in a buffer that it binds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        h = F.relu(self.b(F.relu(self.a(x))))
        if self.training:
            self.mean = self.mean * 0.9 + h.mean().detach()
        return self.c(h)


def test_counts_of_the_root_are_refused():
    """They were frozen at their first value, without a word."""
    with pytest.raises(TraceError, match=r"sets its own attribute 'calls'"):
        to_local(Counting(), X, method="bp", parts=2)


def test_buffers_that_the_root_binds_anew_are_followed():
    """They kept their first value."""
    model, twin = Averaging(), Averaging()
    twin.load_state_dict(model.state_dict())
    local = to_local(model, X, method="bp", parts=2)
    for _ in range(3):
        assert torch.equal(local(X), twin(X))
        assert torch.equal(model.mean, twin.mean)
    assert model.mean != 0


class Remembering(Counting):
    """Leaves its last hidden state on itself, for somebody to look at."""

    def forward(self, x):
        self.seen = F.relu(self.b(F.relu(self.a(x))))
        return self.c(self.seen)


def test_what_the_root_only_leaves_behind_does_no_harm():
    to_local(Remembering(), X, method="bp", parts=2)


def test_the_search_for_inputs_is_silent(caplog):
    """Every size that did not fit was logged with a traceback."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(576, 20), nn.ReLU(), nn.Linear(20, 10)
    )
    with caplog.at_level(logging.DEBUG):
        local = to_local(model, method="bp", parts=2)
    assert not [r for r in caplog.records if not r.name.startswith("localize")]
    assert "inferred" in str(local.plan)


def test_appended_parts_stack_and_move():
    """Only one could be appended, and it stayed behind when the model moved."""
    local = to_local(mlp(), X, method="al", parts=2)
    for _ in range(2):
        local.append_part(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    assert [e.number for e in local.exits] == [1, 2, 3, 4]
    local.double()
    assert local(X.double()).dtype == torch.float64
    local.train_step(X.double(), Y, local.optimizers(sgd))


class Packed(nn.Module):
    """Reads lengths, which must not be zero."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 8, batch_first=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.rnn(packed)[1][-1]

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.reader = nn.Embedding(11, 8), self.Reader()
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids, lengths):
        return self.out(torch.relu(self.hidden(self.reader(self.embed(ids), lengths))))


def test_an_artefact_keeps_indices_and_lengths(tmp_path):
    """It was loaded with zeros for inputs, which this model cannot take."""
    import localize

    inputs = (torch.randint(0, 11, (4, 6)), torch.tensor([6, 5, 3, 2]))
    local = to_local(Packed(), inputs, method="early_exit", parts=2)
    local.save(tmp_path / "a")
    again = localize.load(tmp_path / "a", Packed())
    assert torch.equal(again.predict(inputs), local.predict(inputs))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        self.out = nn.Linear(8, 3)

    def forward(self, ids, padding):
        h = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return self.out(h.masked_fill(padding[:, :, None], 0).sum(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_an_encoder_with_a_padding_mask_is_compared_without_its_fused_path():
    padding = torch.arange(6)[None] >= torch.tensor([[6], [4], [3], [5]])
    local = to_local(Padded(), (torch.randint(0, 11, (4, 6)), padding), method="early_exit", parts=2)
    assert len(local.parts) == 2


@pytest.mark.parametrize("method", [m for m in list_methods() if m != "scpl"])
@pytest.mark.parametrize("squeeze", [False, True])
def test_regression_with_one_number_a_sample(method, squeeze):
    """(N, 1) against (N) was broadcast to (N, N); AL could not take (N) at all."""
    model = nn.Sequential(*mlp(outputs=1), *([nn.Flatten(0)] if squeeze else []))
    target = torch.randn(6)
    local = to_local(model, X, method=method, parts=2)
    losses = local.losses(X, target)
    if method in ("bp", "early_exit", "nwise", "lct"):
        assert torch.allclose(losses[-1].detach(), F.mse_loss(model(X).flatten(), target))
    local.train_step(X, target, local.optimizers(sgd))


class TimeFirst(nn.Module):
    """nn.LSTM's own order: (T, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.out = nn.LSTM(8, 12), nn.GRU(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h, _ = self.lstm(x)
        _, h = self.gru(h)
        return self.out(h[-1])


@pytest.mark.parametrize("steps", [6, 5])
def test_the_batch_may_be_the_second_axis_of_the_inputs(steps):
    """With as many steps as samples, heads averaged over samples. The axis was taken to be the first."""
    x, target = torch.randn(steps, 6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    local = to_local(TimeFirst(), x, method="lct", parts=2)
    assert local.plan.batch_axis == 1
    assert local.plan.boundaries[0].spec.batch_axis == 1
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    one = local.heads[0](local.parts[0](x), target).per_sample
    other = local.heads[0](local.parts[0](x[:, order]), target[order]).per_sample
    torch.testing.assert_close(one[order], other)
    if steps == 5:
        with pytest.raises(TaskError, match="5 or 6 samples"):
            local.losses(x, torch.zeros(8, dtype=torch.int64))
    assert len(local.losses(x, target)) == 2


class Averaged(nn.Module):
    """No logits a sample: nothing for a head to do, whichever axis the batch is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).mean((0, 1))[None])


def test_models_that_mix_the_batch_are_told():
    with pytest.raises(ConfigError, match=r"The batch of the inputs \(6, 6, 8\) cannot be found"):
        to_local(Averaged(), torch.randn(6, 6, 8), method="early_exit", parts=2)
    to_local(Averaged(), torch.randn(6, 6, 8), method="bp", parts=2)


@dataclass(frozen=True)
class Headless(Method):
    name = "headless"
    reach = None
    heads_below = False

    def build_head(self, site):
        return TaskHead(site) if site.is_last else None


def test_headless_methods_of_ones_own_take_what_bp_takes():
    """The exception was made for the name 'bp'."""
    to_local(Averaged(), torch.randn(6, 6, 8), method=Headless(), parts=2)


class Named(nn.Module):
    """Submodules and parameters with names that parts use themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.run_hidden, self.take_over = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self._routes, self.source_code = nn.Linear(16, 16), nn.Linear(16, 3)
        self._number = nn.Parameter(torch.ones(16))

    def forward(self, input):
        h = self.take_over(torch.relu(self.run_hidden(torch.relu(self.route(input)))))
        return self.source_code(torch.relu(self._routes(h)) * self._number)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("method", ["bp", "scpl", "al"])
def test_no_name_of_a_submodule_is_taken(parts, method):
    model = Named()
    local = to_local(model, X, method=method, parts=parts)
    names = sorted(n.split(".", 1)[1] for n, _ in local.parts.named_parameters())
    assert names == sorted(n for n, _ in model.named_parameters())
    local.train_step(X, Y, local.optimizers(sgd))
    local.double()
    assert {id(p) for p in local.parts.parameters()} == {id(p) for p in model.parameters()}
    local.train_step(X.double(), Y, local.optimizers(sgd))


def test_a_loss_of_one_s_own_rescues_an_unusual_output():
    model = nn.Sequential(*mlp(outputs=16), nn.Unflatten(1, (2, 2, 2, 2)))
    local = to_local(model, X, method="bp", parts=2, loss=lambda output, target: output.mean())
    assert local.losses(X, Y)[-1].isfinite()


def test_nan_is_not_zero_to_the_comparison():
    assert outputs_differ(torch.tensor([float("nan")]), torch.tensor([0.0])) is not None
    assert outputs_differ(torch.tensor([float("inf")]), torch.tensor([3.4028234663852886e38])) is not None
    assert outputs_differ(torch.tensor([float("nan")]), torch.tensor([float("nan")])) is None


BAD_TARGETS = {
    "too few": (Y[:3], "6 samples need as many targets"),
    "a column": (Y[:, None], "int64 with 1 axes"),
    "int32": (Y.int(), "int64 with 1 axes"),
    "a list": ([0, 1, 2, 0, 1, 2], "must be a tensor"),
    "out of range": (Y + 3, "has 3 classes"),
    "negative": (Y - 3, "has 3 classes"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
@pytest.mark.parametrize("method", ["bp", "scpl", "al"])
def test_bad_targets_are_told_before_anything_is_updated(case, method):
    target, message = BAD_TARGETS[case]
    local = to_local(mlp(), X, method=method, parts=2)
    before = [p.clone() for p in local.parameters()]
    with pytest.raises(TaskError, match=message):
        local.train_step(X, target, local.optimizers(sgd))
    assert all(torch.equal(p, q) for p, q in zip(before, local.parameters(), strict=True))


def test_soft_targets_train_where_the_loss_can_use_them():
    local = to_local(mlp(), X, method="early_exit", parts=2)
    local.train_step(X, torch.softmax(torch.randn(6, 3), 1), local.optimizers(sgd))


def test_a_task_with_other_classes_than_the_model_is_told():
    from localize import Task

    with pytest.raises(TaskError, match="The task has 7 classes"):
        to_local(mlp(), X, method="bp", task=Task("classification", 7))
    with pytest.raises(TaskError, match="must be callable"):
        to_local(mlp(), X, method="bp", loss=3)


def test_one_optimizer_over_the_whole_model_may_hold_parameters_nobody_uses():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Spare()
    local = to_local(model, X, method="bp", parts=2)
    local.train_step(X, Y, [sgd(model.parameters())])


def test_a_step_without_gradients_is_told():
    local = to_local(mlp(), X, method="bp", parts=2)
    with torch.no_grad(), pytest.raises(ConfigError, match="switched off"):
        local.train_step(X, Y, local.optimizers(sgd))


def test_errors_name_no_part_that_is_not_there():
    """Planning asked for the head of a made-up part 2 of 3."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    with pytest.raises(Exception, match="scpl") as caught:
        to_local(model, X, method=get_method("scpl"), parts=2)
    assert "of 3" not in str(caught.value)
