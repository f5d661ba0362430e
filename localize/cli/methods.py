"""``localize methods``: the local-learning rules there are, and the options of one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from localize.cli import flags
from localize.cli.method_options import option_rows
from localize.cli.output import Output
from localize.errors import LocalizeError
from localize.heads.base import Method
from localize.heads.registry import list_methods, method_class

_MANY = 1000  # parts: a window that still covers them all is "all"


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A method.", show_default=False),
    ] = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Lists the methods, or describes one with its options.

    \b
    localize methods
    localize methods scpl
    """
    out = Output.of(as_json, quiet)
    if name is not None:
        _describe(out, method_class(name))
        return
    rows = [_row(method_class(n)) for n in list_methods()]
    out.table(list(rows[0]), [list(row.values()) for row in rows])
    out.note("The options of one: localize methods NAME")
    out.result({"methods": rows}, brief="\n".join(row["name"] for row in rows))


def _row(cls: type[Method]) -> dict[str, Any]:
    return {
        "name": cls.name,
        "summary": cls.summary,
        "reach": _reach(cls),
        "feedback": cls.feedback or "none",
        "predicts": cls.predicts,
        "source": cls.source,
    }


def _reach(cls: type[Method]) -> str:
    """The reach with the default options: a number, or ``all``."""
    try:
        reach = cls().reach_in(_MANY)
    except (TypeError, LocalizeError):  # an option without a default
        return "option"
    return "all" if reach >= _MANY else str(reach)


def _describe(out: Output, cls: type[Method]) -> None:
    row = _row(cls)
    options = option_rows(cls)
    out.text(f"{cls.name}: {cls.summary}")
    for key in ("reach", "feedback", "predicts", "source"):
        out.text(f"  {key:<9} {row[key]}")
    if options:
        shown = [(flag, kind, str(default).lower()) for flag, kind, default in options]
        out.table(["option", "type", "default"], shown)
    else:
        out.text("  no options")
    listed = [{"flag": flag, "type": kind, "default": default} for flag, kind, default in options]
    out.result({**row, "options": listed}, brief="\n".join(flag for flag, _, _ in options))
