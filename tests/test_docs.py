"""The generated pages of docs/ are those that `make docs` writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import localize

ROOT = Path(localize.__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_up_to_date(generate: ModuleType) -> None:
    assert (DOCS / "methods.md").read_text() == generate.methods_page(), "run `make docs`"


def options(page: str) -> dict[str, list[str]]:
    """By command: the options listed, in order. How they are laid out depends on typer's version."""
    sections = re.split(r"^## (\w+)$", page, flags=re.MULTILINE)[1:]
    listed = re.compile(r"^  (?:-\w, )?(--[a-z-]+)", re.MULTILINE)
    return {name: listed.findall(text) for name, text in zip(sections[::2], sections[1::2], strict=True)}


def test_the_options_of_the_commands_are_up_to_date(generate: ModuleType) -> None:
    found = options((DOCS / "commands.md").read_text())
    assert found == options(generate.commands_page()), "run `make docs`"
    assert set(found) == set(generate.COMMANDS)
    assert "--parts" in found["convert"]
