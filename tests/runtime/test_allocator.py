"""Freed memory is kept: taking it again asks the system for nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from localize.runtime.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
if kept is False:
    print(-1); sys.exit()
def take(): return [torch.ones(2**22 * (i + 1)) for i in range(3)]  # 16, 32 and 48 MB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    take()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(6)))  # a hole too small may cost some, now and then
"""


def faults(kept: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, kept], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.slow
def test_pages_are_taken_from_the_system_once() -> None:
    kept = faults("kept")
    if kept < 0:
        pytest.skip("this C library has no mallopt, or refuses")
    assert kept < 100 < 4000 < faults("as it is")
