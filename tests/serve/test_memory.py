"""Memory that is free again is the system's again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# A large block and then many smaller ones, as unpacking leaves them, in a thread of its own.
BURST = """
import threading
from anomalyd.serve.memory import give_back

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096

def burst():
    large = b"x" * (31 << 20)
    del large
    small = [b"x" * (2 << 20) for _ in range(20)]
    small.clear()

if {bounded}:
    give_back()
before = resident()
thread = threading.Thread(target=burst)
thread.start()
thread.join()
print((resident() - before) >> 20)
"""


def kept(bounded: bool) -> int:
    """MiB that a process holds after a burst, above what it held before."""
    done = subprocess.run(
        [sys.executable, "-c", BURST.format(bounded=bounded)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the bounds are glibc's")
def test_a_burst_leaves_nothing_behind():
    """The daemon's bounds give back the 40 MiB that glibc's own keep."""
    assert kept(bounded=True) < 10 < kept(bounded=False)
