"""A Ray cluster of several nodes and an S3 server, both on loopback, one of each for all proofs.

Ray takes most of a minute to start on two busy cores, so nodes are shared: a test that kills one
adds it itself.
"""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from pyarrow.fs import S3FileSystem
from ray_nodes import KEYS, ROOT, Nodes, free_port
from required import missing


@pytest.fixture(scope="session")
def endpoint() -> str:
    """Where the S3 server is, once it runs."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="session")
def nodes(endpoint) -> Iterator[Nodes]:
    """One node with one CPU; tests add what they need."""
    made = Nodes(endpoint)
    yield made
    made.close()


@pytest.fixture(scope="session")
def s3(endpoint) -> Iterator[str]:
    """A real S3 server in a process of its own; yields its endpoint."""
    program = ROOT / ".venv-proofs" / "s3" / "bin" / "moto_server"
    if not program.exists():
        missing(f"moto's S3 server, {program.relative_to(ROOT)},")
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
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


@pytest.fixture(scope="session")
def store(s3) -> S3FileSystem:
    """The S3 server as pyarrow's file system, allowed to make buckets."""
    return S3FileSystem(
        endpoint_override=s3.removeprefix("http://"),
        scheme="http",
        access_key=KEYS["AWS_ACCESS_KEY_ID"],
        secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region=KEYS["AWS_DEFAULT_REGION"],
        allow_bucket_creation=True,
    )
