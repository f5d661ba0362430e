"""Methods from outside the package, in an artefact: the file that makes one known is written down with its name."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from localize.heads.base import Method
from localize.heads.registry import get_method, list_methods
from localize.source import find_file, import_file

_log = logging.getLogger(__name__)


def describe_method(method: Method) -> dict[str, Any]:
    """Name, options and, where the class is from a file of the user's own, that file (from here, if below here)."""
    described = {"name": method.name, "options": method.options()}
    file, here = _file_of(type(method)), Path.cwd()
    if file is not None:
        described["file"] = (file.relative_to(here) if file.is_relative_to(here) else file).as_posix()
    return described


def known_method(name: str, options: dict[str, Any], file: str | None, near: Path) -> Method:
    """The method ``name``; ``file``, from here or from ``near`` and its parents, is imported where nobody knows it.

    Raises:
        MethodError: nobody knows it then either, or the options are not its own.
        ConfigError: the file raises.
    """
    path = find_file(file, near) if file is not None and name not in list_methods() else None
    if path is not None:
        _log.debug("importing %s for the method %r", path, name)
        import_file(path)
    return get_method(name, **options)


def _file_of(cls: type[Method]) -> Path | None:
    module = sys.modules.get(cls.__module__)
    name = None if module is None or module.__package__ else getattr(module, "__file__", None)
    return Path(name).resolve() if name else None
