"""The command ``localize``: subcommands, and errors as one line on stderr with exit status 2."""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from localize._version import __version__
from localize.cli import output
from localize.cli.convert import convert
from localize.cli.evaluate import evaluate
from localize.cli.flags import METHOD_FLAGS
from localize.cli.inspect import inspect
from localize.cli.methods import methods
from localize.cli.schedule import schedule
from localize.cli.train import train
from localize.errors import ConfigError, LocalizeError
from localize.source import import_file

EXPECTED, INTERRUPTED = 2, 130  # exit statuses
# typer's usage errors: click's ClickException, or typer's own copy of it, depending on typer's version
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="localize",
    help="Turn any PyTorch model into local-learning form and train it part by part.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings=METHOD_FLAGS)(convert)
app.command(context_settings=METHOD_FLAGS)(inspect)
app.command(context_settings=METHOD_FLAGS)(train)
app.command()(evaluate)
app.command(context_settings=METHOD_FLAGS)(schedule)
app.command()(methods)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.Output().text(f"localize {__version__}")
        raise typer.Exit


@app.callback()
def common(
    imports: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE", help="Run a Python file first: it may register methods."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,  # see main
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Turn any PyTorch model into local-learning form and train it part by part."""
    for file in imports or ():
        if not file.is_file():
            raise ConfigError(f"No file {str(file)!r} to import.")
        import_file(file)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    given = _common_first(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        with _short_warnings(), _logging(debug):
            status = app(args=given or ["--help"], prog_name="localize", standalone_mode=False)
    except LocalizeError as problem:
        if debug:
            raise
        output.error(str(problem))
        return EXPECTED
    except _UsageError as problem:
        output.error(_usage(problem))
        return EXPECTED
    except (KeyboardInterrupt, typer.Abort):
        output.error("interrupted.")
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _common_first(arguments: Sequence[str]) -> list[str]:
    """``--debug`` and ``--import FILE`` may stand anywhere; they belong to the command ``localize`` itself."""
    common: list[str] = []
    rest: list[str] = []
    tokens = iter(arguments)
    for token in tokens:
        if token == "--debug" or token.startswith("--import="):
            common.append(token)
        elif token == "--import":
            common += [token, *itertools.islice(tokens, 1)]
        else:
            rest.append(token)
    return common + rest


def _usage(problem: Any) -> str:
    """A usage error with the command to ask for help."""
    context = getattr(problem, "ctx", None)
    command = context.command_path if context is not None else "localize"
    return f"{problem.format_message().rstrip('.')}. See `{command} --help`."


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Python warnings as one line without the code that caused them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_more: output.warning(str(message))
        yield


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Log records on stderr: warnings, and with ``debug`` all that the package has to say."""
    handler, own = logging.StreamHandler(), logging.getLogger("localize")
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    before = own.level
    logging.getLogger().addHandler(handler)
    own.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        own.setLevel(before)
