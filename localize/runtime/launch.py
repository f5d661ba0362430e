"""Starts the ranks of a command on this machine; several machines are torchrun's business."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from localize.errors import PlacementError

_log = logging.getLogger(__name__)


def launch(command: Sequence[str], processes: int, max_restarts: int = 0) -> int:
    """Runs ``python -m command`` in so many processes that find each other; returns the exit status.

    A process that dies takes the others with it; up to ``max_restarts`` times all are started anew, and go on from
    the last checkpoint where there is one. The status is that of the first process that failed, or 128 and the signal
    that ended this one.

    Raises:
        PlacementError: fewer than one process.
    """
    if processes < 1:
        raise PlacementError(f"{processes} processes cannot train anything; it takes at least 1.")
    # Otherwise each process would take all cores; torchrun does the same.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a broken connection is told in our own words
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # likewise
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has said why
            return failure.exitcode
        _log.error("rank %d was ended by %s, and the others with it", rank, signal.Signals(-failure.exitcode).name)
        return 128 - failure.exitcode
    except SignalException as error:  # this process was told to end (Ctrl-C, say), and has ended the others
        return 128 + error.sigval
    return 0
