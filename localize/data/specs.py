"""DATA specs: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``imagefolder:DIR``, ``csv:FILE``,
``text:FILE`` and ``file.py:name``; options follow as ``?name=value``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from localize.data.base import Data, split_dataset
from localize.data.tables import read_csv, read_text
from localize.data.vision import cifar10, digits, imagefolder, mnist_like
from localize.errors import ConfigError, did_you_mean
from localize.source import import_file
from localize.specstring import split_options

_NAMED = ("digits", "mnist", "fashion-mnist", "cifar10")
_FROM_PATH: dict[str, Callable[..., Data]] = {
    "imagefolder": imagefolder,
    "csv": read_csv,
    "text": read_text,
}
DATA_FORMS = "digits, mnist, fashion-mnist, cifar10, imagefolder:DIR, csv:FILE, text:FILE, file.py:name"
_DATA_NAMES = ("data", "make_data", "get_data", "load_data", "loaders", "make_loaders", "get_loaders")


def load_data(spec: str, data_dir: str | Path = "data", download: bool = False) -> Data:
    """The data set of a DATA spec.

    Args:
        spec: one of the forms above.
        data_dir: where the named data sets lie (``digits`` comes with the package).
        download: whether a missing named data set may be fetched.

    Raises:
        ConfigError: no such data set, or its files are missing, truncated or of another form.
    """
    body, options = split_options(spec)
    kind, colon, rest = body.partition(":")
    if body in _NAMED:
        return _named(body, Path(data_dir).expanduser(), download, options)
    if kind in _FROM_PATH:
        if not (colon and rest):
            raise ConfigError(f"{kind} needs a path: `{kind}:PATH`.")
        reader = _FROM_PATH[kind]
        _check_options(spec, reader, options)
        return reader(Path(rest).expanduser(), **options)
    file, _, name = body.rpartition(":") if not body.endswith(".py") else (body, "", "")
    if file.endswith(".py"):
        return _from_file(Path(file).expanduser(), name, options)
    raise ConfigError(
        f"Unknown data set {spec!r}.{did_you_mean(kind, (*_NAMED, *_FROM_PATH))} Data sets: {DATA_FORMS}."
    )


def _named(name: str, data_dir: Path, download: bool, options: dict[str, Any]) -> Data:
    if options:
        raise ConfigError(f"{name} takes no options ({', '.join(options)}).")
    if name == "digits":
        return digits()
    if name == "cifar10":
        return cifar10(data_dir, download)
    return mnist_like(name, data_dir, download)


def _check_options(spec: str, reader: Callable[..., Data], options: dict[str, Any]) -> None:
    known = list(inspect.signature(reader).parameters)[1:]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{spec!r}: no option {name!r}.{did_you_mean(name, known)} Options: {', '.join(known)}."
            )


def _from_file(path: Path, name: str, options: dict[str, Any]) -> Data:
    """A user's own: a pair (training, validation) of data sets or loaders, one data set, or a function."""
    if not path.is_file():
        raise ConfigError(f"No file {str(path)!r} for the data.")
    module = import_file(path)
    found = [name] if name else [n for n in _DATA_NAMES if hasattr(module, n)]
    if not found or not hasattr(module, found[0]):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(
            f"{path.name} has no {name or ' or '.join(_DATA_NAMES)}.{did_you_mean(name, public)} "
            f"Say which: `{path.name}:name`, a pair (training, validation) or a function that returns it."
        )
    value = getattr(module, found[0])
    where = f"{path.name}:{found[0]}"
    if callable(value) and not hasattr(value, "__getitem__") and not isinstance(value, DataLoader):
        try:
            value = value(**options)
        except Exception as error:
            raise ConfigError(f"{where} cannot be called: {type(error).__name__}: {error}") from error
    if isinstance(value, tuple | list) and len(value) == 2:
        train, val = value
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        train, val = split_dataset(value)
    else:
        raise ConfigError(
            f"{where} is a {type(value).__name__}; wanted is a pair (training, validation) of data sets or "
            "loaders, or one data set."
        )
    if not len(train):
        raise ConfigError(f"{where}: the training half is empty.")
    return Data(path.stem, train, val)
