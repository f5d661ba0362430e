"""Several ranks on one GPU (or on as many as there are) compute what one process computes there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def on_ranks(case: str, ranks: int, timeout: float = 240.0, **arguments: Any) -> list[Any]:
    """What a function of ``cases.py`` returned on each rank; fails where it raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.gpu.cases", case, json.dumps(arguments)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        written = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    answers = [
        json.loads(out.splitlines()[-1]) if out.strip() else {"trace": error} for out, error in written
    ]
    broken = [answer["trace"] for answer in answers if "trace" in answer]
    assert not broken, "\n".join(broken)
    return [answer["result"] for answer in answers]


def test_many_messages_arrive_as_they_were_sent() -> None:
    """On the CPU: that the test below, which needs a GPU, tells the truth."""
    _, found = on_ranks("many_messages", 2, device="cpu", count=40)
    assert found > 40


@CUDA
@pytest.mark.gpu
def test_many_messages_arrive_as_they_were_sent_from_a_gpu() -> None:
    """Copies on side streams, reused buffers, tensors that are spoilt, and memory that is taken again at once."""
    _, found = on_ranks("many_messages", 2, device="cuda:0", count=400)
    assert found > 400


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["scpl", "al", "early_exit", "lct", "bp"])
def test_ranks_that_share_a_gpu_are_one_process(tmp_path: Path, method: str, precision: str) -> None:
    first, second = on_ranks(
        "same_as_sequential", 2, device="cuda:0", method=method, folder=str(tmp_path), precision=precision
    )
    assert first == second
    assert first[2] == 0  # nccl has no use for two ranks on one GPU


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize(("method", "groups"), [("early_exit", 1), ("bp", 2)])
def test_payloads_go_from_gpu_to_gpu(tmp_path: Path, method: str, groups: int) -> None:
    """Through nccl; what comes out is what one of the two (of one kind) computes."""
    first, second = on_ranks(
        "same_as_sequential", 2, device="cuda", own_device=True, method=method, folder=str(tmp_path)
    )
    assert first == second
    assert first[2] == groups
