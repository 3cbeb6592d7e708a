"""A simulated Ray cluster, and drivers of it as processes that can be killed."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
VAE = ROOT / "trained" / "fashion-mnist-vae"
WHOLE = float(os.environ.get("ANOMALYD_SOAK_SECONDS", "0")) >= 600  # of `make soak`
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

    def __init__(self, endpoint: str) -> None:
        # Keys and endpoint belong to a node; they do not travel with a job.
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("simulated.py"))],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | KEYS | {"AWS_ENDPOINT_URL": endpoint},
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

    def close(self) -> None:
        """All of it is shut down."""
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def _wish(self, text: str) -> str:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "the simulated cluster did not start"
        return line


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


def png(pixels) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
