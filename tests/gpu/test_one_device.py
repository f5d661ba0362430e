"""Several parts on one GPU: what the CPU computes, and the memory of a part at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localize import LocalModel, to_local
from localize.runtime import transport
from localize.runtime.carriers import DeviceMemory, HostMemory
from localize.runtime.lanes import CudaLane
from localize.runtime.messages import Upward
from localize.runtime.wire import Edge, Envelope, Kind, decode, decode_header, outline
from localize.weights import weights_of
from tests import zoo
from tests.runtime import cases, helpers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
GPU = torch.device("cuda")
SGD = partial(torch.optim.SGD, lr=0.01)
STEPS = 5


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def made(model: str, method: str, parts: int = 4) -> tuple[LocalModel, list[Any]]:
    """A model without dropout, which draws other numbers on a GPU, and some batches."""
    local, _ = cases.made(model, method, parts)
    for module in local.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    case = cases.MIXED if model == "mixed" else zoo.BY_NAME[model]
    inputs, targets = case.inputs(8 * STEPS), case.targets(8 * STEPS)
    return local, list(zip(inputs.split(8), targets.split(8), strict=True))


def trained(
    model: str, method: str, device: str, precision: str = "fp32"
) -> tuple[LocalModel, dict[str, Any], Any]:
    local, batches = made(model, method, 2 if model == "cnn" else 4)
    trainer = helpers.trainer(
        local,
        optimizer=SGD,
        head_optimizer=SGD,
        scheduler=None,
        progress=False,
        device=device,
        precision=precision,
    )
    (row,) = trainer.fit(batches)
    return local, row, trainer.evaluate(batches)


@pytest.mark.parametrize("method", ["scpl", "al", "early_exit", "lct", "nwise", "bp"])
@pytest.mark.parametrize("model", ["mixed", "cnn"])
def test_a_gpu_computes_what_the_cpu_computes(model: str, method: str) -> None:
    """Losses, weights and scores after some steps, up to the rounding of other kernels."""
    here, row, scores = trained(model, method, "cpu")
    there, gpu_row, gpu_scores = trained(model, method, "cuda")
    assert all(tensor.device.type == "cuda" for tensor in weights_of(there).values())
    torch.testing.assert_close(gpu_row["train_loss"], row["train_loss"], rtol=1e-3, atol=1e-4)
    assert gpu_scores["loss"] == pytest.approx(scores["loss"], rel=1e-3)
    expected = weights_of(here)
    for name, tensor in weights_of(there).items():
        torch.testing.assert_close(
            tensor.cpu(), expected[name], rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", ["scpl", "al", "early_exit"])
def test_bf16_is_close_to_fp32(method: str) -> None:
    _, row, _ = trained("mixed", method, "cuda")
    local, half, _ = trained("mixed", method, "cuda", "bf16")
    assert all(p.dtype is torch.float32 for p in local.parameters())
    torch.testing.assert_close(half["train_loss"], row["train_loss"], rtol=0.05, atol=0.02)
    assert half["train_loss"] != row["train_loss"]


# ------------------------------------------------------------------ memory


def tower() -> nn.Sequential:
    """Sixteen layers, each of which keeps as much for its backward pass; weights are small beside that."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    for _ in range(15):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def peak_bytes(method: str, parts: int) -> int:
    """What a step takes at most beyond what is there before and after it."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 3, 96, 96, device=GPU), torch.randint(0, 10, (32,), device=GPU)
    local = to_local(tower().to(GPU), inputs[:2], method=method, parts=parts, verify=False)
    optimizers = local.optimizers(SGD)
    for _ in range(2):  # the first one takes workspaces
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        local.train_step(inputs, targets, optimizers, keep_grads=False)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_parts_memory_is_free_when_the_next_one_starts() -> None:
    """A layer keeps one map: 16 in all, 9 of the larger of two parts, 5 of the largest of four (benchmarks/memory.py
    counts as much). What a convolution takes for its own work comes on top, and is the same for all."""
    maps = 32 * 32 * 96 * 96 * 4
    whole, two, four = peak_bytes("bp", 4), peak_bytes("early_exit", 2), peak_bytes("early_exit", 4)
    assert whole - two > 6 * maps
    assert two - four > 3 * maps
    assert whole - peak_bytes("scpl", 4) > 9 * maps


# ------------------------------------------------------------------ streams


class _Loop:
    """A group whose two ends are here: what is sent waits on the device, in the order of the streams."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def rank(self) -> int:
        return 0

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Loop:
        self.held.append(tensors[0].clone())
        return self

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Loop:
        tensors[0].copy_(self.held.pop(0))
        return self

    def wait(self) -> None:
        return None


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_carrier_on_a_lane(kind: str) -> None:
    """The computation is far behind when a message is packed, and spoils its tensor at once; no bit changes."""
    device, group = torch.device("cuda", torch.cuda.current_device()), _Loop()
    ends: list[Any] = [
        HostMemory(device, CudaLane(device))
        if kind == "host"
        else DeviceMemory(device, CudaLane(device), group)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    frames: list[Tensor] = []
    kept, large = [], torch.ones(4096, 4096, device=device)
    for step in range(30):
        for _ in range(5):
            large = large @ large / 4096
        value = large[: step + 1] * step
        lines = outline(Envelope(Kind.DATA, step, Edge(1, 2), Upward({"x": value, "t": value.t()}, None)))
        load = ends[0].pack(lines)
        value.zero_()
        ends[0].send(ends[0].ready(load), lambda frame: frames.append(frame.clone()))
        header = decode_header(lines.header, lines.rest, "here")
        payload = ends[1].receive(header, lambda buffer: buffer.copy_(frames.pop(0)))
        ends[1].take(payload)
        message = decode(header, payload).message
        assert isinstance(message, Upward)
        del payload
        kept.append((step, message.stream["x"] + 0, message.stream["t"].sum()))
        del message  # the computation may not have read it yet
    for step, x, total in kept:
        assert x.shape == (step + 1, 4096)
        assert bool((x == step).all())
        assert float(total) == step * x.numel()


def test_a_rank_names_its_gpu() -> None:
    own, indexed = (
        transport.seat(GPU)["gpu"],
        transport.seat(torch.device("cuda", torch.cuda.current_device()))["gpu"],
    )
    assert own is None or len(own) > 8
    assert own == indexed
    others = [transport.seat(torch.device("cuda", i))["gpu"] for i in range(torch.cuda.device_count())]
    assert own is None or len(set(others)) == len(others)


# ------------------------------------------------------------------ traces


def test_a_trace_of_a_gpu_run(tmp_path: Path) -> None:
    local, batches = made("mixed", "early_exit")
    file = tmp_path / "trace.json"
    helpers.trainer(local, progress=False, device="cuda", trace=file).fit(batches)
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    for part in range(1, 5):
        kinds = {event["cat"] for event in events if event["tid"] == part}
        assert {"forward", "backward", "update"} <= kinds
        assert {event["args"]["batch"] for event in events if event["tid"] == part} == set(
            range(1, STEPS + 1)
        )
