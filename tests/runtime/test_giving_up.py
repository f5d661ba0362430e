"""After a failure every rank ends in an orderly way, and knows why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.several import Several

ROOT = Path(__file__).parent.parent.parent
CASES = "tests.runtime.cases_giving_up:"


@pytest.mark.parametrize(
    ("method", "on", "replicas"), [("early_exit", 0, 1), ("bp", 1, 1), ("lct", 2, 1), ("scpl", 1, 2)]
)
def test_no_thread_is_left_waiting(several: Several, method: str, on: int, replicas: int) -> None:
    """One that woke up while Python ended took the process down with SIGABRT."""
    ranks = 4 if replicas == 2 else 3
    found = several.results(f"{CASES}threads_left", ranks, method=method, on=on, replicas=replicas)
    assert [each["kind"] for each in found] == ["Interruption" if rank == on else "Stopped" for rank in range(ranks)]
    assert found[on]["during"], "the test must see the threads while they wait"
    assert [each["after"] for each in found] == [[]] * ranks


def test_who_looks_late_learns_the_first_cause(several: Several) -> None:
    """Without a launcher the first rank keeps the store: it stays until the others have read there why it failed."""
    found = several.results(f"{CASES}looks_late", 3)
    assert found[0]["kind"] == "Interruption"
    for rank in (1, 2):
        assert found[rank]["kind"] == "Stopped"
        assert "because of rank 0 (part 1 of 3)" in found[rank]["text"]
        assert "something broke" in found[rank]["text"]


def test_a_rank_that_is_gone_is_not_waited_for(several: Several) -> None:
    found = several.run("tests.runtime.cases:fails", 3, method="bp", parts=3, at=4, on=1, how="kill")
    assert [answer["status"] for answer in found] == [0, -9, 0]
    assert all("the process is gone" in found[rank]["result"]["text"] for rank in (0, 2))
    assert all(found[rank]["seconds"] < 9 for rank in (0, 2)), "the first rank would stay 10 s for one that comes"


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [("no words", "Unprintable", "Unprintable: an error whose message cannot be made"),
     ("no stop", "OSError", "Interruption: something broke"),
     ("Ctrl-C", "KeyboardInterrupt", "Interruption: something broke")],
)  # fmt: skip
def test_whatever_else_goes_wrong_no_thread_is_left(several: Several, how: str, kind: str, said: str) -> None:
    first, second = several.results(f"{CASES}gives_up_badly", 2, how=how)
    assert first["kind"] == "Stopped"
    assert said in first["said"]
    assert second["kind"] == kind
    assert first["after"] == second["after"] == []


def test_all_ranks_know_that_they_cannot_start_again(several: Several, tmp_path: Path) -> None:
    """Where one of them had not come as far as the others, it alone began anew, and waited for them."""
    first, second = several.results(f"{CASES}starts_anew", 2, folder=str(tmp_path))
    assert first == ["Stopped", "PlacementError"]
    assert second == ["CheckpointError", "PlacementError"]


def test_the_launcher_says_who_was_killed(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"
    )
    program = "import sys; from localize.runtime.launch import launch; sys.exit(launch(['killed'], 2))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 128 + 9
    assert "rank 1 was ended by SIGKILL, and the others with it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_processes_end_with_a_status_of_their_own(attempt: int) -> None:
    """Real interpreters, since forked ranks leave without ending theirs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    program = "from tests.runtime.cases_giving_up import breaks; breaks()"
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ | shared | {"RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]  # fmt: skip
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1, 1], errors
