"""Runs functions in several processes that find each other as under torchrun, without starting Python each time.

One process imports everything once and computes nothing; it forks the ranks of each case. So a case costs
milliseconds, and what a case breaks is gone with its processes.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent


class Several:
    """The process that forks."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.several"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def run(self, case: str, ranks: int, timeout: float = 60.0, **arguments: Any) -> list[dict[str, Any]]:
        """What ``module:function`` did on each rank: ``status``, ``result`` or ``error`` and ``trace``, ``seconds``.

        ``status`` is the exit status of the process; negative: killed by that signal.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"case": case, "ranks": ranks, "timeout": timeout, "arguments": arguments}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return answer

    def results(self, case: str, ranks: int, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """What the function returned on each rank; fails where it raised."""
        answers = self.run(case, ranks, timeout, **arguments)
        broken = [a for a in answers if a["status"] != 0]
        assert not broken, "\n".join(f"status {a['status']}: {a.get('trace', '')}" for a in broken)
        return [a["result"] for a in answers]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(order: dict[str, Any], rank: int, port: int, pipe: int) -> None:
    ranks = order["ranks"]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    os.dup2(2, 1)  # stdout is the answer's
    # After a fork torch makes its thread pool anew at the first such call; two threads at once trip over each other.
    torch.set_num_threads(1)
    module, _, name = order["case"].partition(":")
    started, status = time.monotonic(), 0
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**order["arguments"])}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        status = 1
    answer["seconds"] = time.monotonic() - started
    os.write(pipe, json.dumps(answer).encode())
    os._exit(status)


def _serve(order: dict[str, Any]) -> list[dict[str, Any]]:
    port = _free_port()
    children: list[tuple[int, int]] = []
    for rank in range(order["ranks"]):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _rank(order, rank, port, writing)
        os.close(writing)
        children.append((pid, reading))
    end = time.monotonic() + order["timeout"]
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for pid, _ in children:
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid, _ in children:
                if pid not in statuses:
                    os.kill(pid, signal.SIGALRM)  # its status then tells of the time limit
        time.sleep(0.005)
    answers = []
    for pid, reading in children:
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        answers.append({**(json.loads(text) if text else {}), "status": statuses[pid]})
    return answers


if __name__ == "__main__":
    # What the first conversion imports, no case has to; no backward pass runs here, which a fork would not survive.
    importlib.import_module("tests.runtime.cases").made("mixed", "bp", 2)
    for line in sys.stdin:
        answer = json.dumps(_serve(json.loads(line)))
        os.write(1, answer.encode() + b"\n")
