from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from localize import ConfigError, LocalizeError, PlacementError, TaskError, to_local
from localize.runtime import checkpoint
from localize.runtime.progress import ProgressBar
from localize.runtime.run import Run
from localize.runtime.state import parameter_names
from tests.runtime.helpers import (
    BATCHES,
    CLASSES,
    Breaking,
    Interruption,
    assert_same,
    converted,
    data,
    loader,
    model,
    tensors,
    timeless,
    trainer,
)
from tests.runtime.rebound import WIDTH, Average

METHODS = ("bp", "scpl", "al", "nwise", "lct", "early_exit", "joint")

# -------------------------------------------------------------------- what training does


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str) -> None:
    rows = trainer(converted(method, dropout=0.0), scheduler=None).fit(loader(), epochs=12)
    first, last = (sum(loss for loss in row["train_loss"] if loss is not None) for row in (rows[0], rows[-1]))
    assert last < 0.9 * first


@pytest.mark.parametrize("method", METHODS)
def test_fit_is_train_step_in_a_loop(method: str) -> None:
    """Without random layers and in a fixed order, to the last bit."""
    by_hand = converted(method, dropout=0.0).train()
    optimizers = by_hand.optimizers(partial(torch.optim.Adam, lr=1e-2))
    for _ in range(2):
        for inputs, target in loader(shuffle=False):
            by_hand.train_step(inputs, target, optimizers)
    local = converted(method, dropout=0.0)
    trainer(local, scheduler=None).fit(loader(shuffle=False), epochs=2)
    assert_same(tensors(by_hand), tensors(local))


def test_gradients_are_dropped_and_the_users_model_is_trained() -> None:
    local = converted()
    before = {name: p.clone() for name, p in local.to_standard().named_parameters()}
    trainer(local).fit(loader(), epochs=1)
    assert all(p.grad is None for p in local.parameters())
    assert all(not torch.equal(before[name], p) for name, p in local.to_standard().named_parameters())


def test_heads_can_have_an_optimizer_of_their_own() -> None:
    local = converted()
    heads = {name: t for name, t in tensors(local).items() if name.startswith("heads.")}
    frozen = partial(torch.optim.SGD, lr=0.0)
    rows = trainer(local, head_optimizer=frozen).fit(loader(), epochs=1)
    assert rows[0]["lr"] == [0.01, 0.0, 0.01, 0.0, 0.01]
    after = tensors(local)
    assert all(torch.equal(heads[name], after[name]) for name in heads if "weight" in name)


def test_clipping_bounds_the_gradient_of_every_part() -> None:
    local = converted(dropout=0.0)
    before = tensors(local)
    trainer(local, optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=None, clip_grad_norm=1e-3).fit(
        [next(iter(loader()))], epochs=1
    )
    after = tensors(local)
    for part, head in zip(local.parts, local.heads, strict=True):
        modules = [m for m in (part, head) if m is not None]
        names = [parameter_names(local)[id(p)] for m in modules for p in m.parameters()]
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names])
        assert moved.norm() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (partial(StepLR, step_size=1, gamma=0.5), [0.01, 0.005, 0.0025]),
        (lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=1e9), [0.01, 0.001, 0.0001]),
    ],
    ids=["StepLR", "ReduceLROnPlateau"],
)
def test_schedules_step_once_an_epoch(factory: Any, expected: list[float]) -> None:
    rows = trainer(converted(), scheduler=factory).fit(loader(), loader(), epochs=3)
    assert [row["lr"][0] for row in rows] == pytest.approx(expected)


# -------------------------------------------------------------------- batches


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x) + extra))))


def two_inputs() -> Any:
    torch.manual_seed(0)
    return to_local(
        TwoInputs(), (torch.randn(4, 5), torch.randn(4, 8)), method="early_exit", parts=2, verify=False
    )


def test_batches_come_in_many_forms() -> None:
    x, extra = torch.randn(6, 5), torch.randn(6, 8)
    target = torch.arange(6) % CLASSES
    forms: list[Any] = [
        (x, extra, target),
        [x, extra, target],
        ((x, extra), target),
        ([x, extra], target),  # what default_collate makes of ((x, extra), target)
        {"x": x, "extra": extra, "labels": target},
        {"target": target, "extra": extra, "x": x},
    ]
    results = []
    for form in forms:
        local = two_inputs()
        trainer(local).fit([form], epochs=1)
        results.append(tensors(local))
        assert trainer(local).evaluate([form])["samples"] == 6
    for other in results[1:]:
        assert_same(results[0], other)


def test_split_batch_takes_what_no_rule_knows() -> None:
    batch = {"image": torch.randn(6, 5), "class": torch.zeros(6, dtype=torch.int64), "path": ["a"] * 6}
    split = lambda batch: (batch["image"], batch["class"])  # noqa: E731
    trainer(converted(), split_batch=split).fit([batch], [batch], epochs=1)
    with pytest.raises(ConfigError, match=r"dict with entries 'image', 'class', 'path'.*Pass split_batch"):
        trainer(converted()).fit([batch], epochs=1)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.randn(6, 5), r"Tensor of shape \(6, 5\)"),
        ((torch.randn(6, 5),), "tuple of length 1"),
        ({"labels": torch.zeros(6)}, "dict with entries 'labels'"),
        ("text", "gave a str"),
    ],
)
def test_a_batch_of_another_form_is_described(batch: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        trainer(converted()).fit([batch], epochs=1)


def test_loaders_that_are_empty_or_used_up_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"Epoch 1.*loader \(list\) is empty"):
        trainer(converted()).fit([], epochs=1)
    with pytest.raises(
        ConfigError, match=r"Epoch 2.*loader \(generator\) is empty; it must yield batches anew"
    ):
        trainer(converted()).fit((batch for batch in loader()), epochs=2)
    with pytest.raises(ConfigError, match="is empty"):
        trainer(converted()).evaluate([])


def test_a_target_out_of_range_names_epoch_and_batch() -> None:
    batches = list(loader())
    batches[2] = (batches[2][0], batches[2][1] + CLASSES)
    with pytest.raises(TaskError, match=r"Epoch 1, batch 3 \(step 3\): classification: targets go from"):
        trainer(converted()).fit(batches, epochs=1)


def test_errors_of_the_model_say_where_they_happened() -> None:
    local = converted()

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("mine")

    list(local.parts[1].modules())[-1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="mine") as caught:
        trainer(local).fit(loader(), epochs=1)
    notes = " ".join(caught.value.__notes__)
    assert "part 2 of 3" in notes
    assert "epoch 1, batch 1 (step 1)" in notes


# -------------------------------------------------------------------- losses that are not finite


def poisoned(at: int) -> list[Any]:
    batches = list(loader(shuffle=False))
    inputs, target = batches[at - 1]
    batches[at - 1] = (torch.full_like(inputs, float("nan")), target)
    return batches


def test_a_loss_that_is_not_finite_names_part_and_batch_and_the_checkpoint_stays(tmp_path: Path) -> None:
    local = converted()
    clean = list(loader(shuffle=False))
    trainer(local, tmp_path).fit(clean, epochs=1)
    before = tensors(local)
    with pytest.raises(LocalizeError, match=r"Epoch 2, batch 3 \(step 7\): The loss of part 1 of 3 is nan"):
        trainer(local, tmp_path).fit(poisoned(3), epochs=2, resume=True)
    again = converted()
    run = Run(again, trainer(again, tmp_path).options, torch.device("cpu"))
    run.resume()
    assert_same(before, tensors(again))


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path: Path) -> None:
    """The loss is finite, its gradient is not: nothing notices until the next loss, or the next checkpoint."""
    local = converted()
    calls: list[int] = []

    def burst(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad * float("nan") if len(calls) == 4 else grad

    next(local.parts[1].parameters()).register_hook(burst)
    with pytest.raises(LocalizeError, match="After step 4, weights of part 2 of 3 are not finite"):
        trainer(local, tmp_path, checkpoint_every=1).fit(loader(), epochs=1)
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert saved.about["step"] == 3


@pytest.mark.parametrize("method", ["early_exit", "bp", "lct", "nwise"])
def test_skip_leaves_no_trace_of_a_bad_batch(method: str) -> None:
    """Not even in the running statistics, which no optimizer step writes."""
    local = converted(method)
    rows = trainer(local, on_nonfinite="skip").fit(poisoned(3), loader(), epochs=1)
    assert rows[0]["skipped"] == [1, 1, 1]
    assert all(loss is None or math.isfinite(loss) for loss in rows[0]["train_loss"])
    assert all(tensor.isfinite().all() for tensor in tensors(local).values() if tensor.is_floating_point())
    assert math.isfinite(rows[0]["val_loss"][3])
    counted = {int(t) for name, t in tensors(local).items() if name.endswith("num_batches_tracked")}
    assert counted == {BATCHES - 1}


def test_skip_puts_back_buffers_that_are_other_tensors() -> None:
    """A module that gives its buffer a new tensor once kept that of the bad batch, and every later batch was bad."""

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, WIDTH), Average(), nn.ReLU(), nn.Linear(WIDTH, CLASSES))

    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 6), torch.randint(0, CLASSES, (8,))
    bad = inputs.clone()
    bad[0] = math.nan
    local = to_local(Net(), inputs, method="early_exit", parts=2)
    average = next(module for module in local.to_standard().modules() if isinstance(module, Average))
    seen: list[dict[str, Tensor]] = []
    objects: list[Tensor] = []

    def look(step: int, reports: object) -> None:
        seen.append({name: buffer.clone() for name, buffer in average.named_buffers()})
        objects.append(average.mean)

    batches = [(inputs, targets), (bad, targets), (inputs, targets)]
    rows = trainer(local, on_nonfinite="skip", on_step=look).fit(batches, epochs=1)
    assert rows[0]["skipped"] == [1, 1]
    assert all(loss is not None and math.isfinite(loss) for loss in rows[0]["train_loss"])
    assert_same(seen[0], seen[1])
    assert objects[0] is objects[1] is not objects[2]
    assert all(buffer.isfinite().all() for buffer in average.buffers())
    assert not torch.equal(seen[1]["mean"], seen[2]["mean"])


def test_skip_lets_the_other_parts_learn() -> None:
    local = converted(dropout=0.0)
    next(local.parts[1].parameters()).register_hook(lambda grad: grad * float("nan"))
    before = tensors(local)
    rows = trainer(local, on_nonfinite="skip").fit(loader(), epochs=1)
    assert rows[0]["skipped"] == [0, BATCHES, 0]
    after = tensors(local)
    moved = [
        any(not torch.equal(before[n], after[n]) for n, _ in part.named_parameters()) for part in local.parts
    ]
    assert moved == [True, False, True]


# -------------------------------------------------------------------- interrupted and resumed


def resumed_equals_whole(
    tmp_path: Path,
    at: int,
    method: str = "early_exit",
    epochs: int = 3,
    every: int | None = 3,
    **options: Any,
) -> None:
    whole = converted(method)
    expected = trainer(whole, **options)
    expected.fit(loader(), loader(), epochs=epochs)
    cut = trainer(converted(method), tmp_path, checkpoint_every=every, **options)
    with pytest.raises(Interruption):
        cut.fit(Breaking(loader(), at), loader(), epochs=epochs)
    torch.manual_seed(99)
    local = converted(method)
    for tensor in tensors(local).values():
        tensor.zero_()
    again = trainer(local, tmp_path, checkpoint_every=every, **options)
    again.fit(loader(), loader(), epochs=epochs, resume=True)
    assert_same(tensors(whole), tensors(local))
    assert timeless(again.history) == timeless(expected.history)


@pytest.mark.parametrize("at", [1, 4, 5, 8, 10, 12])
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(tmp_path: Path, at: int) -> None:
    resumed_equals_whole(tmp_path, at)


@pytest.mark.parametrize(
    ("precision", "method"),
    [("fp32", method) for method in METHODS]
    + [(p, m) for p in ("bf16", "fp16") for m in ("bp", "al", "lct")],
)
def test_every_method_and_precision_is_resumed_to_the_bit(
    tmp_path: Path, method: str, precision: str
) -> None:
    resumed_equals_whole(tmp_path, 7, method, epochs=2, precision=precision)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)},
        {
            "optimizer": partial(torch.optim.AdamW, lr=0.01),
            "head_optimizer": partial(torch.optim.RMSprop, lr=0.01),
        },
        {"scheduler": partial(OneCycleLR, max_lr=0.05, total_steps=5)},
        {"scheduler": lambda o: ReduceLROnPlateau(o, patience=0, threshold=1e9)},
        {"clip_grad_norm": 0.1},
        {"on_nonfinite": "skip"},
        {"every": None},
        {"every": 1},
    ],
    ids=lambda options: " ".join(options),
)
def test_whatever_the_options_a_run_is_resumed_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    resumed_equals_whole(tmp_path, 7, **options)


def test_optimizer_state_is_resumed_to_the_bit(tmp_path: Path) -> None:
    def state_after(folder: Path) -> dict[str, Tensor]:
        saved = checkpoint.load(folder)
        assert saved is not None
        return saved.optimizer

    trainer(converted(), tmp_path / "whole").fit(loader(), epochs=2)
    trainer(converted(), tmp_path / "cut").fit(loader(), epochs=1)
    trainer(converted(), tmp_path / "cut").fit(loader(), epochs=2, resume=True)
    assert_same(state_after(tmp_path / "whole"), state_after(tmp_path / "cut"))


@pytest.mark.parametrize("at", [2, 6])
def test_an_interruption_from_a_callback(tmp_path: Path, at: int) -> None:
    def stop(step: int, reports: Any) -> None:
        if step == at:
            raise Interruption

    whole, local = converted(), converted()
    trainer(whole).fit(loader(), epochs=2)
    with pytest.raises(Interruption):
        trainer(converted(), tmp_path, checkpoint_every=2, on_step=stop).fit(loader(), epochs=2)
    assert checkpoint.load(tmp_path).about["step"] == at, "the step's checkpoint is there"  # type: ignore[union-attr]
    trainer(local, tmp_path, checkpoint_every=2).fit(loader(), epochs=2, resume=True)
    assert_same(tensors(whole), tensors(local))


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws from torch's ambient numbers for each sample, as random crops do."""

    def __init__(self) -> None:
        self.inner = data()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        x, y = self.inner[index]
        return x + 0.1 * torch.randn(5), y


def test_augmentation_goes_on_where_it_was(tmp_path: Path) -> None:
    def augmented() -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=6, shuffle=True)

    whole, local = converted(), converted()
    trainer(whole).fit(augmented(), epochs=2)
    with pytest.raises(Interruption):
        trainer(converted(), tmp_path, checkpoint_every=1).fit(Breaking(augmented(), 7), epochs=2)
    trainer(local, tmp_path).fit(augmented(), epochs=2, resume=True)
    assert_same(tensors(whole), tensors(local))


def test_resume_starts_anew_where_there_is_nothing_and_returns_where_all_is_done(tmp_path: Path) -> None:
    local = converted()
    first = trainer(local, tmp_path).fit(loader(), epochs=2, resume=True)
    before = tensors(local)
    again = trainer(local, tmp_path)
    assert timeless(again.fit(loader(), epochs=1, resume=True)) == timeless(first)
    assert timeless(again.history) == timeless(first)
    assert_same(before, tensors(local))
    assert [row["epoch"] for row in again.fit(loader(), epochs=3, resume=True)] == [1, 2, 3]


def test_a_shorter_loader_than_before_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        trainer(converted(), tmp_path, checkpoint_every=3).fit(Breaking(loader(), 4), epochs=1)
    with pytest.raises(LocalizeError, match=r"after batch 3 of epoch 1, and the loader has 1 batches only"):
        trainer(converted(), tmp_path).fit([next(iter(loader()))], epochs=1, resume=True)


# -------------------------------------------------------------------- options


def test_all_bad_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(
            converted(),
            optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
            precision="fp8",
            executor="sequental",
            clip_grad_norm=-1.0,
            on_nonfinite="ignore",
            checkpoint_every=0,
            seed=-1,
        )
    message = str(caught.value)
    expected = (
        "optimizer must be a callable that makes one, such as partial(torch.optim.Adam, lr=1e-3); got a Adam",
        "precision='fp8' is none of 'fp32', 'bf16', 'fp16'",
        "executor='sequental' is none of 'sequential', 'distributed'. Did you mean 'sequential'?",
        "clip_grad_norm=-1.0",
        "on_nonfinite='ignore'",
        "checkpoint_every=0",
        "checkpoint_every needs checkpoint_dir",
        "seed=-1",
    )
    assert [line for line in expected if line not in message] == []


def test_the_distributed_executor_says_how_to_start_it() -> None:
    with pytest.raises(PlacementError, match=r"torchrun --nproc-per-node K script\.py"):
        trainer(converted(), executor="distributed")


def test_fit_checks_its_arguments() -> None:
    with pytest.raises(ConfigError, match="epochs=0 is not an integer of at least 1"):
        trainer(converted()).fit(loader(), epochs=0)
    with pytest.raises(ConfigError, match="resume=True needs checkpoint_dir"):
        trainer(converted()).fit(loader(), resume=True)


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="device='cuda:7' cannot be used here"):
        trainer(converted(), device="cuda:7")


def test_nothing_to_train() -> None:
    local = converted()
    local.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        trainer(local).fit(loader(), epochs=1)


def test_parts_without_weights_to_train_are_left_out() -> None:
    local = converted()
    for module in (local.parts[0], local.heads[0]):
        assert module is not None
        module.requires_grad_(False)
    rows = trainer(local).fit(loader(), epochs=1)
    assert len(rows[0]["lr"]) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_parts_train_the_same(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and run without code generation, so that the test needs no compiler and rounds alike."""
    compiled: list[nn.Module] = []

    def compile_(self: nn.Module, **options: Any) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    results = []
    for compile in (False, True):
        local = converted(dropout=0.0, parts=2)
        trainer(local, compile=compile, precision=precision).fit(loader(), epochs=1)
        results.append(tensors(local))
    assert compiled == [*local.parts, *(head for head in local.heads if head is not None)]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=2e-2, atol=2e-2)


# -------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_scores_every_exit(method: str) -> None:
    local = converted(method)
    scores = trainer(local).evaluate(loader())
    inputs, target = data().tensors
    assert scores["samples"] == 22
    assert list(scores["exits"]) == [exit.number for exit in local.exits]
    for number, score in scores["exits"].items():
        logits = local.predict(inputs, exit=number)
        assert score["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
        assert score["accuracy"] == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert (scores["loss"], scores["accuracy"]) == tuple(scores["exits"][3].values())
    assert local.training


def test_ignored_targets_do_not_count() -> None:
    local = converted()
    inputs, target = (t.clone() for t in data().tensors)
    target[:5] = -100
    scores = trainer(local).evaluate(DataLoader(TensorDataset(inputs, target), batch_size=4))
    logits = local.predict(inputs)
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx((logits.argmax(1) == target)[5:].float().mean().item())


def test_regression_has_no_accuracy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    local = to_local(net, torch.randn(4, 5), method="early_exit", parts=2, task="regression", verify=False)
    batches = [(torch.randn(6, 5), torch.randn(6, 1)) for _ in range(3)]
    rows = trainer(local).fit(batches, batches, epochs=1)
    assert rows[0]["train_accuracy"] == rows[0]["val_accuracy"] == {}
    assert trainer(local).evaluate(batches)["accuracy"] is None
    assert rows[0]["val_loss"][2] > 0


def test_training_accuracy_counts_what_the_heads_predicted() -> None:
    local = converted(dropout=0.0)
    hits = {1: 0, 2: 0, 3: 0}
    batches = list(loader(shuffle=False))
    current: Iterator[Any] = iter(batches)
    target: list[Tensor] = []

    def count(number: int) -> Any:
        def hook(head: nn.Module, args: Any, output: Any) -> None:
            if number == 1:
                target[:] = [next(current)[1]]
            hits[number] += int((output.logits.argmax(1) == target[0]).sum())

        return hook

    for number, head in enumerate(local.heads, 1):
        assert head is not None
        head.register_forward_hook(count(number))
    row = trainer(local).fit(batches, epochs=1)[0]
    assert row["train_accuracy"] == pytest.approx({n: hit / 22 for n, hit in hits.items()})


# -------------------------------------------------------------------- progress


def test_the_bar_shows_epoch_and_one_loss_a_part() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with ProgressBar(2, None, console) as bar:
        bar.start_epoch(1, 4)
        bar.advance([torch.tensor(1.5), None, torch.tensor(0.25)])
        bar.end_epoch("done")
    assert "epoch 1/2" in text.getvalue()
    assert "1/4" in text.getvalue()
    assert "loss 1.500 – 0.250" in text.getvalue()
    assert "done" in text.getvalue()


@pytest.mark.parametrize("show", [None, False])
def test_nothing_is_drawn_where_nobody_watches(show: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    trainer(converted(), progress=show).fit(loader(), loader(), epochs=1)
    assert capfd.readouterr() == ("", "")


def test_a_bar_that_is_asked_for_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    trainer(converted(), progress=True).fit(loader(), loader(), epochs=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "val accuracy" in err


def test_the_model_of_these_tests_has_what_resuming_could_lose() -> None:
    kinds = {type(module) for module in model().modules()}
    assert {nn.BatchNorm1d, nn.Dropout} <= kinds


@pytest.mark.parametrize(
    ("name", "what"), [("a.bin", r"a trace is a \.json file, a picture one of"), ("a", r"a trace is a \.json file")]
)
def test_a_trace_that_cannot_be_is_told_before_training(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        trainer(converted(), trace=name)


def test_a_trace_that_cannot_be_written_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    rows = trainer(converted(), trace=tmp_path / "file" / "a.json").fit(loader())
    assert len(rows) == 1
    assert "The trace cannot be written" in caplog.text


def test_a_finished_run_that_goes_on_leaves_its_trace(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    trainer(converted(), tmp_path / "ck", trace=file).fit(loader())
    before = file.read_bytes()
    trainer(converted(), tmp_path / "ck", trace=file).fit(loader(), resume=True)
    assert file.read_bytes() == before
