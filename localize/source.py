"""Where a model comes from: a MODEL spec turned into an ``nn.Module``.

``file.py``, ``file.py:name``, ``package.module:name``, ``torchvision:resnet18``, ``timm:…`` and
``transformers:bert`` are known; each takes keyword arguments as ``?name=value&name=value``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from localize.errors import ConfigError, did_you_mean
from localize.libraries import LIBRARIES
from localize.specstring import split_options

FORMS = (
    "file.py, file.py:name, package.module:name, torchvision:NAME, timm:NAME, transformers:TYPE "
    "or an artefact folder"
)
_INSTANCES = ("model", "net")
_FACTORIES = ("build_model", "create_model", "get_model")
_EXAMPLE = "example_inputs"


@dataclass(frozen=True)
class Source:
    """A model, the spec it came from, a short name, and the example inputs its file offers (or None)."""

    spec: str
    name: str
    model: nn.Module
    example_inputs: Any = None


def load_source(spec: str, near: Path | None = None) -> nn.Module:
    """The model of a MODEL spec.

    Args:
        spec: one of the forms above.
        near: a folder (an artefact's) from which, and from whose parents, a relative file is also looked for.

    Raises:
        ConfigError: the spec, the file or the name does not lead to exactly one model.
    """
    return read_source(spec, near).model


def read_source(spec: str, near: Path | None = None) -> Source:
    """Like ``load_source``, with the name of the model and the example inputs its file offers."""
    body, options = split_options(spec)
    head, colon, rest = body.rpartition(":")
    library = body.partition(":")[0]
    if library in LIBRARIES and ":" in body:
        name = body.partition(":")[2]
        return Source(spec, name or library, LIBRARIES[library](name, options))
    if body.endswith(".py"):
        head, rest = body, ""
    elif not (colon and rest and head):
        raise ConfigError(f"No model at {spec!r}.{_near_miss(body)} A model is given as {FORMS}.")
    if head.endswith(".py"):
        path = find_file(head, near)
        if path is None:
            raise ConfigError(f"No file {head!r}.{_near_miss(head)}")
        module, stem = import_file(path), path.stem
    else:
        module, stem = import_module(head), head.rpartition(".")[2]
    model, name = _pick(module, rest, options, head)
    return Source(spec, name if rest else stem, model, _example_inputs(module, head))


def _near_miss(body: str) -> str:
    path = Path(body)
    if path.is_dir():
        return " This folder holds no plan.json, so it is no artefact."
    folder = path.parent if path.parent.is_dir() else Path()
    names = [p.name for p in folder.glob("*.py")] + [p.parent.name for p in folder.glob("*/plan.json")]
    return did_you_mean(path.name, names)


def find_file(name: str, near: Path | None = None) -> Path | None:
    """A file from here or, where ``near`` is given, from that folder or a parent of it; None where there is none."""
    path = Path(name).expanduser()
    places = [path]
    if near is not None and not path.is_absolute():
        near = near.resolve()
        places += [folder / path for folder in (near, *near.parents)]
    return next((place for place in places if place.is_file()), None)


def import_file(path: Path) -> ModuleType:
    """Runs a Python file as a module; its folder is importable while and after it runs, as for a script.

    Raises:
        ConfigError: the file raises; the message has the line.
    """
    path = path.resolve()
    name = f"_localize_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file.")
    _importable(path.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{path.name} cannot be imported: {_where(error, str(path))}") from error
    return module


def import_module(name: str) -> ModuleType:
    """Imports ``package.module``, the working directory included.

    Raises:
        ConfigError: there is no such module, or it raises.
    """
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(f"No module {name!r}. A model is given as {FORMS}.") from error
        raise ConfigError(f"Module {name!r} cannot be imported: {_where(error)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"Module {name!r} cannot be imported: {_where(error)}") from error


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _where(error: BaseException, path: str | None = None) -> str:
    """``line 3: ValueError: …``, with the innermost line of the user's file where it is known."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if path is None or f.filename == path]
    line = f"line {frames[-1].lineno}: " if path and frames else ""
    return f"{line}{type(error).__name__}: {error}"


def _pick(module: ModuleType, name: str, options: dict[str, Any], where: str) -> tuple[nn.Module, str]:
    """The model that ``name`` names in ``module``, or the only one there is."""
    if name:
        value: Any = module
        for step in name.split("."):
            if not hasattr(value, step):
                known = [n for n, _ in _candidates(module)]
                listed = f" Models there: {', '.join(known)}." if known else " No model is there."
                raise ConfigError(f"{where} has no name {name!r}.{did_you_mean(name, known)}{listed}")
            value = getattr(value, step)
        return _build(value, options, f"{where}:{name}"), name
    found = _only(module, where)
    return _build(getattr(module, found), options, f"{where}:{found}"), found


def _only(module: ModuleType, where: str) -> str:
    """The name of the one model in a module: by its usual name, else the only one defined there."""
    for usual in (_INSTANCES, _FACTORIES):
        names = [n for n in usual if _makes_model(getattr(module, n, None))]
        if names:
            return _unambiguous(module, names, where)
    candidates = list(_candidates(module))
    for wanted in (True, False):  # objects first: a file that ends in `resnet = Net(…)` has said which
        names = [n for n, value in candidates if isinstance(value, nn.Module) is wanted]
        if names:
            return _unambiguous(module, names, where)
    names = [
        n
        for n, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and _makes_model(value)
    ]
    if names:  # a function that says nothing of what it returns; building it will show
        return _unambiguous(module, names, where)
    unbuildable = [
        f"{n} needs {', '.join(_required_arguments(value))}"
        for n, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and _is_recipe(value)
    ]
    raise ConfigError(
        f"{where} holds no model: no nn.Module object, no nn.Module class without required arguments and no "
        f"function `-> nn.Module`{' (' + '; '.join(unbuildable) + ')' if unbuildable else ''}. "
        f"Define `model = …` or `def build_model()`, or say `{where}:name?argument=value`."
    )


def _unambiguous(module: ModuleType, names: list[str], where: str) -> str:
    if len({id(getattr(module, n)) for n in names}) == 1:
        return names[0]
    choices = " or ".join(f"`{where}:{n}`" for n in names)
    raise ConfigError(f"{where} holds {len(names)} candidate models: {', '.join(names)}; say {choices}.")


def _makes_model(value: Any) -> bool:
    """Whether a thing of a usual name is a model, or a function or class that makes one unasked."""
    recipe = inspect.isfunction(value) or inspect.isclass(value)
    return isinstance(value, nn.Module) or (recipe and not _required_arguments(value))


def _is_recipe(value: Any) -> bool:
    return (inspect.isclass(value) and issubclass(value, nn.Module)) or _returns_model(value)


def _candidates(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What in a module is a model or makes one without being told anything."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            if any(True for _ in value.parameters()):  # a loss is a module too
                yield name, value
        elif getattr(value, "__module__", None) != module.__name__ or _required_arguments(value):
            continue
        elif _is_recipe(value):
            yield name, value


def _returns_model(value: Any) -> bool:
    if not inspect.isfunction(value):
        return False
    try:
        returned = inspect.get_annotations(value, eval_str=True).get("return")
    except Exception:  # a name that only a type checker sees
        return str(value.__annotations__.get("return")).endswith("nn.Module")
    return inspect.isclass(returned) and issubclass(returned, nn.Module)


def _required_arguments(value: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _build(value: Any, options: dict[str, Any], where: str) -> nn.Module:
    if isinstance(value, nn.Module):
        if options:
            raise ConfigError(f"{where} is a model already; it takes no options ({', '.join(options)}).")
        return value
    if not callable(value):
        raise ConfigError(f"{where} is a {type(value).__name__}, not a model nor a function that makes one.")
    missing = [name for name in _required_arguments(value) if name not in options]
    if missing:
        example = "&".join(f"{name}=…" for name in missing)
        raise ConfigError(
            f"{where} needs arguments: {', '.join(missing)}. Pass them as `{where}?{example}`, or define "
            "`def build_model()` that needs none."
        )
    try:
        built = value(**options)
    except Exception as error:
        raise ConfigError(f"{where} cannot be built: {_where(error)}") from error
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{where} returned a {type(built).__name__}, not an nn.Module.")
    return built


def _example_inputs(module: ModuleType, where: str) -> Any:
    value = getattr(module, _EXAMPLE, None)
    if not inspect.isfunction(value):
        return value
    try:
        return value()
    except Exception as error:
        raise ConfigError(f"{where}:{_EXAMPLE} cannot be called: {_where(error)}") from error
