"""Load on the daemon: single-image requests over keep-alive connections on loopback.

    python tests/bench/bench_serve.py trained/fashion-mnist-vae [IMAGE.png] [--connections 32]

The client is a bare asyncio protocol that writes one prepared request again and again; it needs
a core of its own to keep up. Prints requests/s, latency quantiles and the mean batch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FIXTURE = Path(__file__).parents[1] / "fixtures" / "images" / "boot.png"
STARTING_SECONDS = 60


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, until: float, done: asyncio.Future[None]) -> None:
        self.request = request
        self.until = until
        self.done = done
        self.latencies: list[float] = []
        self.failures = 0
        self.pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pending += data
        head, found, body = self.pending.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if not found or length is None or len(body) < int(length[1]):
            return
        now = time.perf_counter()
        self.latencies.append(now - self.asked)
        self.failures += not self.pending.startswith(b"HTTP/1.1 200")
        self.pending = b""
        if now < self.until:
            self.ask()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, request: bytes, connections: int, seconds: float) -> list[Client]:
    """Clients after `seconds` of load."""
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(connections):
        client = Client(request, time.perf_counter() + seconds, loop.create_future())
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        clients.append(client)
    await asyncio.wait_for(asyncio.gather(*(c.done for c in clients)), seconds + 30)
    return clients


@contextlib.contextmanager
def daemon(bundle: str) -> Iterator[tuple[int, float]]:
    """A daemon of one bundle: its port and the seconds until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.perf_counter()
    program = str(Path(sys.executable).with_name("anomalyd"))
    command = [program, "serve", bundle, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port):
            if process.poll() is not None or time.perf_counter() - started > STARTING_SECONDS:
                raise SystemExit(f"the daemon did not start: {' '.join(command)}")
            time.sleep(0.01)
        yield port, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def is_ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        return get(port, "/readyz")[0] == 200
    return False


def mean_batch(metrics: str) -> float:
    """Images per run of the model, from the exposition."""
    values = {
        name: float(re.search(rf"^anomalyd_batch_size_{name}{{.*}} (.*)$", metrics, re.M)[1])
        for name in ("sum", "count")
    }
    return values["sum"] / max(values["count"], 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("image", nargs="?", type=Path, default=FIXTURE)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--port", type=int, help="of a daemon that runs already")
    asked = parser.parse_args()
    body = asked.image.read_bytes()
    request = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )
    running = contextlib.nullcontext((asked.port, 0.0)) if asked.port else daemon(asked.bundle)
    with running as (port, starting):
        asyncio.run(load(port, request, asked.connections, min(1.0, asked.seconds)))  # warm
        clients = asyncio.run(load(port, request, asked.connections, asked.seconds))
        metrics = get(port, "/metrics")[1]
    latencies = sorted(latency for client in clients for latency in client.latencies)
    row = {
        "bundle": Path(asked.bundle).name,
        "connections": asked.connections,
        "requests_per_second": round(len(latencies) / asked.seconds, 1),
        "p50_ms": round(1e3 * latencies[len(latencies) // 2], 2),
        "p99_ms": round(1e3 * latencies[len(latencies) * 99 // 100], 2),
        "failures": sum(client.failures for client in clients),
        "mean_batch": round(mean_batch(metrics), 1),
        "ready_after_seconds": round(starting, 2),
        "cpus": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
