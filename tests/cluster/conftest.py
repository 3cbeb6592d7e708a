"""A Ray cluster of several nodes and an S3 server, both on loopback, one of each for all proofs.

Ray takes most of a minute to start on two busy cores, so nodes are shared: a test that kills one
adds it itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
VAE = ROOT / "trained" / "fashion-mnist-vae"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # where simulated.py listens
KEYS = {
    "AWS_ACCESS_KEY_ID": "proof",
    "AWS_SECRET_ACCESS_KEY": "proof",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """A simulated cluster, in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("simulated.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()

    def add(self, cpus: int = 1) -> str:
        """One more node; returns its number."""
        return self._wish(f"add {cpus}")

    def kill(self, node: str) -> None:
        """As if its machine had lost power."""
        self._wish(f"kill {node}")

    def _wish(self, text: str) -> str:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "the simulated cluster did not start"
        return line


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """One node with one CPU; tests add what they need."""
    made = Nodes()
    yield made
    made.process.stdin.close()
    made.process.wait(60)
    made.process.stdout.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A real S3 server in a process of its own; yields its endpoint."""
    program = ROOT / ".venv" / "s3" / "bin" / "moto_server"
    program = Path(os.environ.get("ANOMALYD_MOTO", program))
    if not program.exists():
        pytest.skip(f"needs moto's S3 server at {program}: see tests/cluster/requirements.txt")
    port = free_port()
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield endpoint
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


# Smaller parts than any user has: several of them from some hundred images.
DRIVER = """
import sys
from anomalyd.scale import plan
plan.LEAST = int(sys.argv[1])
from anomalyd.cli import main
sys.exit(main(sys.argv[2:]))
"""


def start(*arguments, size: int = 50, **environment: str) -> subprocess.Popen[str]:
    """`anomalyd ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(size), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | LOOPBACK | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, size: int = 50, **environment: str) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    process = start(*arguments, size=size, **environment)
    _, said = process.communicate(timeout=600)
    return process.returncode, said


def rows_of(folder: Path) -> list[dict]:
    """The rows of all parts, in the order of their names."""
    return [row for path in parts_of(folder) for row in pq.read_table(path).to_pylist()]


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until a run has written so many parts."""
    while len(parts_of(folder)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
