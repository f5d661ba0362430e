"""``benchmarks/gpu.py`` runs as a miniature without a GPU, so that it runs at once where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--models", "gpt", "texts", "--steps", "2", "--warmup", "1"]
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options, "--json", str(file)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = {(r["model"], r["precision"], r["variant"]): r for r in json.loads(file.read_text())["rows"]}
    every = [
        "bp",
        "bp, checkpointed",
        *(f"{m}{c}" for m in ("scpl", "early_exit", "al") for c in ("", ", check")),
    ]
    for precision in ("bf16", "fp32"):
        for variant in every:
            assert rows["texts", precision, variant]["step_ms"] > 0
        for method in ("scpl", "al"):  # they learn from one target a text, and so not a language model
            assert "the task is causal_lm" in rows["gpt", precision, method]["skipped"]
        assert rows["gpt", precision, "early_exit"]["running_ms"] > 0
    assert len([line for line in run.stdout.splitlines() if line.startswith("| ")]) == len(rows) + 1


def test_a_spent_time_limit_is_told() -> None:
    options = ["--device", "cpu", "--tiny", "--models", "gpt", "--precisions", "fp32", "--limit-s", "0"]
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("time limit") == 4
