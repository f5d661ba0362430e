"""Straight-line code of a part: compiled once, pickled as its source."""

from __future__ import annotations

import importlib
import keyword
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import ModuleType
from typing import Any

from torch import fx, nn

from localize.part import Part

_serial = count()

# A module of the user's may be called `route`, say, which a Part has an attribute for: it is looked up apart.
_OWN_NAME = re.compile(
    rf"\bself\.({'|'.join(sorted({*vars(Part), '_number', '_routes', '_constants'} - set(vars(nn.Module))))})\b"
)


class Code:
    """A function of (the part that holds its members, *values), made from source.

    Args:
        source: defines ``forward``.
        names: what the source refers to.
        title: for tracebacks.
        then: applied to the result.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, Any],
        title: str,
        then: Callable[[Sequence[Any]], Any] | None = None,
    ) -> None:
        self.source, self.names, self.title, self.then = source, dict(names), title, then
        filename = f"<localize {title} #{next(_serial)}>"
        # Registered so that a traceback through a part shows the line.
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        namespace = dict(names)
        exec(compile(source, filename, "exec"), namespace)
        self._forward = namespace["forward"]

    @classmethod
    def of(cls, graph: fx.Graph, title: str, then: Callable[[Sequence[Any]], Any] | None = None) -> Code:
        """The code of a graph."""
        code = graph.python_code("self")
        source = _OWN_NAME.sub(r'self.__getattr__("\1")', _without_keywords(code.src, graph)).strip() + "\n"
        return cls(source, code.globals, title, then)

    def __call__(self, part: nn.Module, *values: Any) -> Any:
        result = self._forward(part, *values)
        return result if self.then is None else self.then(result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return self  # it holds no state

    def __reduce__(self) -> tuple[Any, ...]:
        names = {
            name: _ModuleNamed(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in self.names.items()
        }
        return _restored, (self.source, names, self.title, self.then)


def _without_keywords(source: str, graph: fx.Graph) -> str:
    """``source`` with ``self.scales.in``, which is no Python, as ``getattr(self.scales, "in")``."""
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    for target in targets:
        if any(map(keyword.iskeyword, target.split("."))):
            wrong, right = _spelled(target, str.isidentifier), _spelled(target, _is_attribute)
            source = re.sub(rf"(?<![\w.]){re.escape(wrong)}(?![\w.])", right.replace("\\", r"\\"), source)
    return source


def _spelled(target: str, is_attribute: Callable[[str], bool]) -> str:
    text = "self"
    for name in target.split("."):
        text = f"{text}.{name}" if is_attribute(name) else f'getattr({text}, "{name}")'
    return text


def _is_attribute(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


@dataclass(frozen=True)
class _ModuleNamed:
    """A module in a pickle, which cannot hold modules."""

    name: str


def _restored(source: str, names: Mapping[str, Any], title: str, then: Any) -> Code:
    found = {
        name: importlib.import_module(value.name) if isinstance(value, _ModuleNamed) else value
        for name, value in names.items()
    }
    return Code(source, found, title, then)
