from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from localize import ConfigError, LocalModel
from localize.runtime import checkpoint, precision
from localize.runtime.run import Run
from localize.runtime.sequential import stages_of
from tests.runtime.helpers import converted, loader, tensors, trainer

CPU = torch.device("cpu")
START = 128.0


def dtypes_seen(local: LocalModel, name: str) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the linear layers' outputs and of the parameters' gradients."""
    outputs: set[torch.dtype] = set()
    gradients: set[torch.dtype] = set()
    for module in local.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: outputs.add(out.dtype))
    for parameter in local.parameters():
        parameter.register_hook(lambda grad: gradients.add(grad.dtype))
    trainer(local, precision=name).fit(loader(), epochs=1)
    return outputs, gradients


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_layers_compute_in_the_precision_and_weights_stay_float32(name: str, dtype: torch.dtype) -> None:
    local = converted("nwise")
    outputs, gradients = dtypes_seen(local, name)
    assert outputs == {dtype}
    assert gradients == {torch.float32}
    assert {p.dtype for p in local.parameters()} == {torch.float32}


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"precision=.bf61. is none of 'fp32', 'bf16', 'fp16'\. Did you mean .bf16."
    ):
        trainer(converted(), precision="bf61")


@pytest.mark.parametrize(
    ("method", "shared"), [("early_exit", False), ("lct", False), ("bp", True), ("joint", True)]
)
def test_losses_that_reach_several_parts_share_a_scale(method: str, shared: bool) -> None:
    scalers = precision.install("fp16", stages_of(converted(method)), CPU)
    assert list(scalers) == [1, 2, 3]
    assert len({id(scaler) for scaler in scalers.values()}) == (1 if shared else 3)
    assert precision.install("bf16", stages_of(converted(method)), CPU) == {}


@pytest.fixture
def low_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale at which nothing overflows by itself; the usual one is found by overflowing once or twice."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=START))


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize("method", ["bp", "joint", "nwise", "lct", "early_exit", "scpl", "al"])
def test_scaled_losses_leave_unscaled_gradients(method: str) -> None:
    """Loss scaling only moves the gradients' exponent, so float16 stays close to float32."""
    moved = []
    for name in ("fp32", "fp16"):
        local = converted(method, dropout=0.0)
        before = tensors(local)
        sgd = partial(torch.optim.SGD, lr=0.1)
        trainer(local, optimizer=sgd, head_optimizer=sgd, precision=name).fit(loader(), epochs=1)
        after = tensors(local)
        moved.append(
            torch.cat([(after[n] - before[n]).flatten() for n in before if after[n].is_floating_point()])
        )
    assert moved[0].norm() > 0
    assert (moved[1] - moved[0]).norm() < 0.1 * moved[0].norm()


def overflow_once(local: LocalModel, part: int) -> None:
    """Makes the first gradient of one weight of ``part`` infinite."""
    calls = []

    def burst(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad + float("inf") if len(calls) == 1 else grad

    next(local.parts[part - 1].parameters()).register_hook(burst)


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize(("method", "halved"), [("early_exit", [2]), ("bp", [1, 2, 3])])
def test_an_overflow_skips_one_update_and_halves_the_scale(method: str, halved: list[int]) -> None:
    local = converted(method)
    overflow_once(local, 2)
    run = Run(local, trainer(local, precision="fp16").options, CPU)
    before = tensors(local)
    inputs, target = next(iter(loader()))
    run.step(inputs, target)
    assert run.updater.skipped == [2]
    assert run.state.tally.skipped == [0, 1, 0]
    scales = {number: scaler.get_scale() for number, scaler in enumerate(run.state.scalers, 1) if scaler}
    assert scales == {n: START / 2 if n in halved else START for n in (1, 2, 3)}
    after = tensors(local)
    moved = {
        n
        for n, p in enumerate(local.parts, 1)
        for name, _ in p.named_parameters()
        if differs(before, after, name)
    }
    assert moved == {1, 3}
    run.step(inputs, target)
    assert run.updater.skipped == []


def differs(before: dict[str, Tensor], after: dict[str, Tensor], name: str) -> bool:
    return not torch.equal(before[name], after[name])


def test_an_optimizer_whose_parameters_got_no_gradient_is_no_trouble_for_a_scaler() -> None:
    """GradScaler refuses to step an optimizer without gradients; a part without loss would have stopped training."""
    local = converted("early_exit")
    for parameter in local.parts[0].parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for parameter in local.heads[0].parameters():  # type: ignore[union-attr]
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    trainer(local, precision="fp16").fit(loader(), epochs=1)


@pytest.mark.usefixtures("low_scale")
def test_loss_scales_are_resumed(tmp_path: Path) -> None:
    local = converted()
    overflow_once(local, 2)
    trainer(local, tmp_path, precision="fp16").fit(loader(), epochs=1)
    again = converted()
    run = Run(again, trainer(again, tmp_path, precision="fp16").options, CPU)
    run.resume()
    assert [scaler.get_scale() for scaler in run.state.scalers if scaler] == [START, START / 2, START]
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert saved.trainer["optimizers"][1]["scaler"]["_growth_tracker"] == 3
