"""A method's options as flags: `--temperature 0.1` for a field `temperature: float`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from localize.cli.method_options import choose_method, option_rows, option_types, type_name
from localize.errors import LocalizeError, MethodError
from localize.heads import registry
from localize.heads.registry import list_methods, method_class
from localize.source import import_file

OWN = """
from dataclasses import dataclass
from typing import ClassVar, Literal
from localize import register_method
from localize.heads.base import Method

@register_method
@dataclass(frozen=True)
class Own(Method):
    scale: float = 1.0
    width: int | None = None
    keep: bool = True
    mode: Literal["sum", "furthest"] = "sum"
    note: str = ""
    name: ClassVar[str] = "own_options"
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("own") / "own_options.py"
    path.write_text(OWN)
    import_file(path)
    yield "own_options"
    registry._registered.pop("own_options")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], {}),
        (["--scale", "0.5"], {"scale": 0.5}),
        (["--scale=0.5", "--width", "3"], {"scale": 0.5, "width": 3}),
        (["--scale", "-1"], {"scale": -1.0}),
        (["--width", "none"], {"width": None}),
        (["--no-keep"], {"keep": False}),
        (["--keep", "false", "--mode", "furthest"], {"keep": False, "mode": "furthest"}),
        (["--keep", "--note=a=b"], {"keep": True, "note": "a=b"}),
    ],
)
def test_flags_become_options(own: str, tokens: list[str], expected: dict[str, Any]) -> None:
    defaults = {"scale": 1.0, "width": None, "keep": True, "mode": "sum", "note": ""}
    method, arguments = choose_method(own, ["model.py", *tokens])
    assert method.options() == defaults | expected
    assert arguments == ["model.py"]
    before, _ = choose_method(own, [*tokens, "model.py"])
    assert before.options() == method.options()


def test_pairs_become_options(own: str) -> None:
    method, _ = choose_method(own, options=["scale=2", "mode=furthest"])
    assert (method.options()["scale"], method.options()["mode"]) == (2.0, "furthest")


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (
            ["--scael", "1"],
            [],
            "No such option: --scael. Did you mean '--scale'.*Options of method 'own_options'",
        ),
        (["-x"], [], "No such option: -x"),
        (["--scale"], [], r"--scale needs a value \(float\)"),
        (["--scale", "--width"], [], "--scale needs a value"),
        (["--scale", "wide"], [], "scale='wide' is not float"),
        (["--mode", "most"], [], r"mode='most' is not sum \| furthest"),
        (["--width", "1.5"], [], r"width='1.5' is not int \| none"),
        (["--keep=maybe"], [], r"keep='maybe' is not true \| false"),
        ([], ["scale"], "--option takes NAME=VALUE"),
        ([], ["scael=1"], "has no option 'scael'. Did you mean 'scale'"),
    ],
)
def test_bad_options_are_one_error(own: str, tokens: list[str], options: list[str], message: str) -> None:
    with pytest.raises(LocalizeError, match=message):
        choose_method(own, tokens, options)


def test_unknown_method() -> None:
    with pytest.raises(MethodError, match=r"Unknown method 'scpll'\. Did you mean 'scpl'"):
        choose_method("scpll")


@pytest.mark.parametrize("name", list_methods())
def test_every_option_of_every_method_is_a_flag_of_a_known_type(name: str) -> None:
    cls = method_class(name)
    for (flag, kind, default), hint in zip(option_rows(cls), option_types(cls).values(), strict=True):
        assert kind == type_name(hint)
        assert "typing" not in kind
        if default is not None and default != "required":
            key = flag.removeprefix("--").replace("-", "_")
            method, _ = choose_method(name, [f"{flag}={default}"])
            assert method.options()[key] == default
