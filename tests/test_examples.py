"""Every example runs, on a tiny budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localize import to_local
from localize.source import read_source

ROOT = Path(__file__).parent.parent
BUDGET = {
    "quickstart.py": ["--epochs", "1"],
    "own_model.py": ["--epochs", "1"],
    "own_method.py": ["--epochs", "1"],
    "compare_methods.py": ["--epochs", "1", "--seeds", "2", "--methods", "al", "early_exit"],
    "several_ranks.py": ["--epochs", "1"],
}
SAYS = {
    "quickstart.py": "exit 4:",
    "own_model.py": "losses by part:",
    "own_method.py": "exit 4:",
    "compare_methods.py": "early_exit",
    "several_ranks.py": "sum of absolute weights",
}


def test_every_example_is_here() -> None:
    assert {file.name for file in (ROOT / "examples").glob("*.py")} == {*BUDGET, "model.py"}


def test_the_example_model_can_be_converted() -> None:
    source = read_source(str(ROOT / "examples" / "model.py"))
    local = to_local(source.model, source.example_inputs, method="al", parts=4)
    assert local(source.example_inputs).shape == (2, 10)


@pytest.mark.parametrize("name", BUDGET)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *BUDGET[name]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"
