"""The rules that keep the package easy to change: who imports whom, how long files are, who prints."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "localize"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 300
LONGEST_FUNCTION = 50  # lines of its body: signatures (typer's are long) and docstrings do not count
LONGEST_EXAMPLE = 80

# A room may import from rooms of the layers below it, and from itself: bottom first.
LAYERS = (
    {"errors", "_version", "nest", "random_state"},
    {"spec", "task", "specstring", "signature"},
    {"heads.base", "libraries", "part"},
    {"heads.pooling"},
    {"heads.layers", "heads.registry", "model", "source"},
    {"heads", "weights", "own_methods", "hollow"},  # heads: one file a method
    {"planfile"},
    {"stored"},
    {"artifact"},
    {"convert", "runtime"},  # never each other
    {"api", "data"},
    {""},  # the package itself
    {"cli"},
    {"__main__"},
)
LAYER_OF = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
# ``task`` beside what DESIGN.md lists: a head's loss is the task's, and ``Task`` has a file of its own beside ``spec``.
METHOD_MAY_IMPORT = {"heads.base", "heads.layers", "heads.pooling", "spec", "task", "errors"}
WRITES = re.compile(r"print|(rich|(self\.)?_?console)\.print|sys\.std(out|err)(\.write)?")
OPTIONAL = {"torchvision", "timm", "transformers", "matplotlib", "sklearn"}


def module_of(file: Path) -> str:
    """``convert.split`` for localize/convert/split.py; the empty string for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of the table that a module of the package is in."""
    return module if module in LAYER_OF else module.partition(".")[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module, ``from localize import x`` as ``localize.x`` where x is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                inner = ROOT / f"{base}.{alias.name}".replace(".", "/")
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield (f"{base}.{alias.name}" if is_module else base), node


def own_imports(file: Path) -> Iterator[tuple[str, int]]:
    for name, node in imports(ast.parse(file.read_text())):
        if name == "localize" or name.startswith("localize."):
            yield name.removeprefix("localize").removeprefix("."), node.lineno


def by_path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_imports_go_one_way(file: Path) -> None:
    module = module_of(file)
    room = room_of(module)
    assert room in LAYER_OF, f"{module} is in no layer: give it a place in LAYERS"
    wrong = [
        f"line {line}: {module or 'localize'} imports {name or 'localize'}"
        for name, line in own_imports(file)
        if room_of(name) != room and LAYER_OF[room_of(name)] >= LAYER_OF[room]
    ]
    assert not wrong


@pytest.mark.parametrize(
    "file", [f for f in FILES if room_of(module_of(f)) == "heads" and f.stem != "__init__"], ids=by_path
)
def test_a_method_imports_only_the_interface_and_the_building_blocks(file: Path) -> None:
    assert {name for name, _ in own_imports(file)} <= METHOD_MAY_IMPORT


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_no_import_inside_a_function(file: Path) -> None:
    tree = ast.parse(file.read_text())
    functions = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    inside = [
        f"line {node.lineno}: {name}"
        for function in functions
        for name, node in imports(function)
        if name.partition(".")[0] not in OPTIONAL
    ]
    assert not inside


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_only_the_output_file_prints(file: Path) -> None:
    """``runtime/progress.py`` is no exception to this rule: its bar is drawn by rich's ``Progress``, on stderr."""
    if by_path(file) == "localize/cli/output.py":
        return
    tree = ast.parse(file.read_text())
    printing = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and WRITES.fullmatch(ast.unparse(node))
    ]
    printing += [
        f"line {node.lineno}: {name}.{alias.name}"
        for name, node in imports(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if WRITES.fullmatch(f"{name}.{alias.name}")
    ]
    assert not printing, "use logging, or cli/output.py"


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_files_stay_short(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: two rooms with clearer names?"


@pytest.mark.parametrize("file", FILES, ids=by_path)
def test_functions_stay_short(file: Path) -> None:
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > LONGEST_FUNCTION:
                found[f"{node.name}, line {node.lineno}"] = lines
    assert not found, "a part of it has a name of its own"


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=by_path)
def test_examples_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_EXAMPLE


def test_no_machine_paths_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine_path = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/|index-" + "url")
    found = [
        name
        for name in listed.stdout.splitlines()
        if (ROOT / name).suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", "")
        and (ROOT / name).is_file()
        and machine_path.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert not found
