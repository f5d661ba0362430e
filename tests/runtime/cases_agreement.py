"""What the ranks of ``test_agreement.py`` do. Each function runs in every rank's process."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import StepLR

from localize.runtime import agreement
from tests.runtime import helpers
from tests.runtime.cases import made, rank

torch.set_num_threads(1)


def tried(options: dict[str, Any], epochs: int = 1, resume: bool = False) -> dict[str, str] | None:
    """Trains with these options; what it raised."""
    local, loader = made("mixed", "early_exit", 2)
    agreement.PATIENCE_S = 0.5
    try:
        helpers.trainer(local, **(options | {"executor": "distributed", "progress": False})).fit(
            loader, epochs=epochs, resume=resume
        )
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return None


def _options(what: str, folder: str) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {
        "trace": {"trace": f"{folder}/trace.json"},
        "checkpoint_dir": {"checkpoint_dir": Path(folder) / "a"},
        "clip_grad_norm": {"clip_grad_norm": 0.5},
        "on_nonfinite": {"on_nonfinite": "skip"},
        "optimizer": {"optimizer": partial(torch.optim.Adam, lr=0.02)},
        "optimizer class": {"optimizer": torch.optim.SGD},
        "head_optimizer": {"head_optimizer": partial(torch.optim.Adam, lr=0.01)},
        "scheduler": {"scheduler": partial(StepLR, step_size=2, gamma=0.5)},
        "no scheduler": {"scheduler": None},
    }
    return options[what]


def one_has(what: str, on: int, folder: str) -> dict[str, str] | None:
    """One rank is given something that the other one is not."""
    return tried(_options(what, folder) if rank() == on else {})


def may_differ(folder: str) -> dict[str, str] | None:
    """What each rank may have of its own."""
    own, factor = rank(), 0.9 if rank() else 0.8
    return tried(
        {
            "log_dir": Path(folder) / "log" if own == 0 else None,
            "trace": f"{folder}/trace-{own}.json",
            "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01 * factor),
            "scheduler": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: factor),
        }
    )


def folders(base: str, own: bool, resume: bool = False) -> dict[str, str] | None:
    """Each rank has a folder of its own, or all the same."""
    return tried({"checkpoint_dir": Path(base) / (str(rank()) if own else "all")}, resume=resume)


def unwritable(base: str) -> dict[str, str] | None:
    """The folder is a link to nowhere."""
    return tried({"checkpoint_dir": Path(base) / "link"})


def other_microbatches(folder: str) -> list[str]:
    """Two epochs, the second one with other micro-batches; what was logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("localize").addHandler(handler)
    for epochs, microbatches in ((1, 2), (2, 1)):
        options = {"checkpoint_dir": Path(folder), "microbatches": microbatches}
        found = tried(options, epochs=epochs, resume=True)
        assert found is None, found
    return records
