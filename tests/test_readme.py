"""What the README tells people to type works as it stands there.

A block of ``sh`` or ``python`` runs unless the line above its fence is ``<!-- test: skip (why) -->``.
Shell blocks run line by line in one copy of the examples, in order; ``make`` targets are CI's business.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(<!-- test: skip.*-->\n)?```(sh|python)\n(.*?)^```", re.M | re.S)
COMMANDS = {"localize": f"{sys.executable} -m localize", "torchrun": f"{sys.executable} -m torch.distributed.run"}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every block that is to run."""
    found = BLOCK.findall((ROOT / "README.md").read_text())
    return [(language, text) for skipped, language, text in found if not skipped]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", place / "examples")
    return place


def run(command: list[str] | str, folder: Path) -> None:
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_readme_shows_both_ways() -> None:
    assert {language for language, _ in blocks()} == {"sh", "python"}


@pytest.mark.parametrize("number", range(len(blocks())))
def test_block_runs(number: int, folder: Path) -> None:
    language, text = blocks()[number]
    if language == "python":
        (folder / f"block_{number}.py").write_text(text)
        run([sys.executable, f"block_{number}.py"], folder)
        return
    for line in text.replace("\\\n", " ").splitlines():
        command = line.partition("  #")[0].strip()
        if command and not command.startswith(("make", "pip", "git", "#")):
            name, _, rest = command.partition(" ")
            run(f"{COMMANDS[name]} {rest}", folder)
