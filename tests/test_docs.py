"""The generated pages of docs/ are those that `make docs` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import localize

ROOT = Path(localize.__file__).parent.parent


def test_the_table_of_methods_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "methods.md").read_text() == generate.methods_page(), "run `make docs`"
