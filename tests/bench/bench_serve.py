"""The daemon under load, beside a bare reference and other servers on the same graph.

    python tests/bench/bench_serve.py [--only WORD] [--seconds 5]

    single    one image a request, 32 connections of wrk: the daemon against forty lines of
              starlette in turns, the same with two workers, then LitServe, MLServer and BentoML
    many      64 images a request as a binary tensor, against onnxruntime and statistics alone
    overload  an open-loop generator at three times what the PixelCNN bundle can score

Load and server share the machine's cores. Rows are those of bench.py.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line does

import numpy as np

from anomalyd.detect.detector import Detector
from anomalyd.detect.runtime import available_cpus

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "trained"
PEERS = Path(__file__).with_name("peers")
PEER_ENVIRONMENTS = ROOT / ".venv-proofs"
FIXTURE = ROOT / "tests" / "fixtures" / "images" / "boot.png"
VAE, PIXELCNN = "fashion-mnist-vae", "fashion-mnist-pixelcnn"
STARTING_SECONDS = 120
CONNECTIONS = 32
Row = tuple[str, str, str, bool | None]


def row(what: str, value: float, form: str, low: float | None = None, high: float | None = None):
    """One line of the table: the value, its target, and whether it is met."""
    target = "" if low is high is None else f">= {low:g}" if high is None else f"< {high:g}"
    met = None if not target else (value >= low if high is None else value < high)
    return what, form.format(value), target, met


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def is_ready(port: int, path: str = "/readyz") -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, path)[0] == 200
    return False


@contextlib.contextmanager
def server(
    command: Sequence[str], port: int, ready: Callable[[], bool], **options: object
) -> Iterator[float]:
    """A server that answers; gives the seconds until it did."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, start_new_session=True, **options
        )
        try:
            while not ready():
                late = time.perf_counter() - started > STARTING_SECONDS
                if process.poll() is not None or late:
                    said.seek(0)
                    raise SystemExit(f"did not start: {' '.join(command)}\n{said.read()[-3000:]}")
                time.sleep(0.01)
            yield time.perf_counter() - started
        finally:
            # The whole session: some servers have workers that outlive them.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def daemon(*bundles: str | Path, flags: Sequence[str] = ()) -> Iterator[tuple[int, float]]:
    """A daemon: its port and the seconds until it was ready."""
    port = free_port()
    command = [sys.executable, "-m", "anomalyd", "serve", *map(str, bundles)]
    command += ["--port", str(port), *flags]
    with server(command, port, lambda: is_ready(port), cwd=ROOT) as starting:
        yield port, starting


@dataclass(frozen=True)
class Load:
    """What wrk sends."""

    url: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """What wrk saw; the rate is that of requests answered with 200."""

    rate: float
    p50_ms: float
    p99_ms: float
    failures: int


def wrk(load: Load, seconds: float, connections: int = CONNECTIONS) -> Measured:
    """Requests over keep-alive connections, each sent when the one before was answered."""
    program = shutil.which("wrk")
    if program is None:
        raise SystemExit("needs wrk, from the Debian package wrk")
    with tempfile.NamedTemporaryFile() as body:
        body.write(load.body)
        body.flush()
        headers = ";".join(f"{name}={value}" for name, value in load.headers.items())
        whole = math.ceil(seconds)  # wrk knows no other
        command = [program, "-t1", f"-c{connections}", f"-d{whole}s", "--timeout", "30s"]
        done = subprocess.run(
            [*command, "-s", str(PEERS / "wrk.lua"), load.url],
            env=os.environ | {"BODY": body.name, "HEADERS": headers},
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return Measured(
        (found["requests"] - found["failures"]) / found["seconds"],
        found["p50_ms"],
        found["p99_ms"],
        found["failures"],
    )


def image_load(port: int, path: str) -> Load:
    return Load(
        f"http://127.0.0.1:{port}{path}", FIXTURE.read_bytes(), {"Content-Type": "image/png"}
    )


def json_load(port: int, path: str, content: object) -> Load:
    body = json.dumps(content).encode()
    return Load(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})


def peer_environment() -> dict[str, str]:
    return os.environ | {
        "BUNDLE": str(TRAINED / VAE),
        "THREADS": str(available_cpus()),
        "PEERS": str(PEERS),
        "PYTHONPATH": str(PEERS),
        "BENTOML_DO_NOT_TRACK": "True",
        "ORT_DISABLE_TELEMETRY": "1",
    }


@contextlib.contextmanager
def bare() -> Iterator[int]:
    """The bare reference, in this environment."""
    port = free_port()
    command = [sys.executable, str(PEERS / "bare.py")]
    environment = peer_environment() | {"PORT": str(port)}
    with server(command, port, lambda: is_ready_to_refuse(port), env=environment):
        yield port


def is_ready_to_refuse(port: int) -> bool:
    """Whether something answers at all; a peer has no /readyz."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, "/") is not None
    return False


def encoded_image() -> str:
    return base64.b64encode(FIXTURE.read_bytes()).decode()


@contextlib.contextmanager
def litserve() -> Iterator[Load]:
    port = free_port()
    command = [peer_program("litserve"), str(PEERS / "litserve_app.py")]
    environment = peer_environment() | {"PORT": str(port)}
    with server(command, port, lambda: is_ready(port, "/health"), env=environment):
        yield json_load(port, "/predict", {"image": encoded_image()})


@contextlib.contextmanager
def mlserver() -> Iterator[Load]:
    ports = [str(free_port()) for _ in range(3)]
    environment = peer_environment()
    environment |= {"MLSERVER_HOST": "127.0.0.1", "MLSERVER_PARALLEL_WORKERS": "0"}
    for name, number in zip(("HTTP", "GRPC", "METRICS"), ports, strict=True):
        environment[f"MLSERVER_{name}_PORT"] = number
    port = int(ports[0])
    command = [peer_program("mlserver", "mlserver"), "start", str(PEERS / "mlserver")]
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded_image()]}
    with tempfile.TemporaryDirectory() as folder:
        environment["MLSERVER_METRICS_DIR"] = folder
        ready = "/v2/models/graph/ready"
        with server(command, port, lambda: is_ready(port, ready), env=environment, cwd=folder):
            yield json_load(port, "/v2/models/graph/infer", {"inputs": [tensor]})


@contextlib.contextmanager
def bentoml() -> Iterator[Load]:
    port = free_port()
    command = [peer_program("bentoml", "bentoml"), "serve", "bentoml_app:Scorer"]
    with tempfile.TemporaryDirectory() as home:
        environment = peer_environment() | {"BENTOML_HOME": home}
        with server(
            [*command, "--port", str(port), "--host", "127.0.0.1"],
            port,
            lambda: is_ready(port),
            env=environment,
            cwd=PEERS,
        ):
            yield json_load(port, "/score", {"images": [encoded_image()]})


def peer_program(name: str, program: str = "python") -> str:
    path = PEER_ENVIRONMENTS / name / "bin" / program
    if not path.exists():
        raise SystemExit(f"needs the environment {path.parents[1]}: make bench makes it")
    return str(path)


def onnxruntime_alone(seconds: float) -> float:
    """Images a second that the graph scores in batches, nothing else done."""
    session = Detector.load(TRAINED / VAE).session
    images = np.random.default_rng(0).integers(0, 256, (1024, 28, 28, 1), np.uint8)
    session.run(images[:64])
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        session.run(images)
        n += len(images)
    return n / (time.perf_counter() - began)


def single(seconds: float) -> Iterator[Row]:
    """One image a request."""
    rounds = 5
    alone = onnxruntime_alone(min(seconds, 3))
    yield row(f"{VAE}: onnxruntime alone, images/s", alone, "{:,.0f}")
    with bare() as bare_port, daemon(TRAINED / VAE) as (port, _):
        loads = image_load(bare_port, "/score"), image_load(port, "/v1/score")
        for load in loads:
            wrk(load, 1)  # warm
        # In turns, so that what else the machine does meets both alike.
        pairs = [[wrk(load, seconds / 2) for load in loads] for _ in range(rounds)]
        metrics = get(port, "/metrics")[1]
    reference = statistics.median(one.rate for one, _ in pairs)
    rate = statistics.median(other.rate for _, other in pairs)
    ratio = statistics.median(other.rate / one.rate for one, other in pairs)
    yield row("the bare reference (starlette): requests/s", reference, "{:,.0f}")
    yield row("the bare reference against onnxruntime alone", reference / alone, "{:.2f}", low=0.2)
    yield row(f"daemon, {CONNECTIONS} connections: requests/s", rate, "{:,.0f}")
    yield row("daemon against the bare reference, median of 5 turns", ratio, "{:.2f}", low=0.9)
    p99 = statistics.median(one.p99_ms for one, _ in pairs)
    yield row("the bare reference: p99, ms", p99, "{:.1f}")
    p99 = statistics.median(other.p99_ms for _, other in pairs)
    yield row("daemon: p99, ms", p99, "{:.1f}", high=40)
    failures = sum(other.failures for _, other in pairs)
    yield row("daemon: failures", failures, "{}", high=1)
    yield row("daemon: images in a batch", mean_batch(metrics), "{:.1f}")
    with daemon(TRAINED / VAE, flags=["--workers", "2"]) as (port, _):
        load = image_load(port, "/v1/score")
        wrk(load, 1)
        two = wrk(load, seconds)
    yield row("daemon, --workers 2: requests/s", two.rate, "{:,.0f}")
    yield row("daemon, --workers 2: p99, ms", two.p99_ms, "{:.1f}")
    for name, peer in (("LitServe", litserve), ("MLServer", mlserver), ("BentoML", bentoml)):
        with peer() as load:
            wrk(load, 2)
            theirs = wrk(load, seconds)
        if theirs.failures:
            yield row(f"{name}: failures", theirs.failures, "{}", high=1)
        yield row(f"{name} on the same graph: requests/s", theirs.rate, "{:,.0f}")
        yield row(f"{name}: p99, ms", theirs.p99_ms, "{:.1f}")
        yield row(f"daemon against {name}", rate / theirs.rate, "{:.1f}")


def mean_batch(metrics: str) -> float:
    """Images per run of the model, from the exposition."""
    values = {"sum": 0.0, "count": 0.0}
    for line in metrics.splitlines():
        for name in values:
            if line.startswith(f"anomalyd_batch_size_{name}{{"):
                values[name] += float(line.rsplit(" ", 1)[1])
    return values["sum"] / max(values["count"], 1.0)


def many(seconds: float) -> Iterator[Row]:
    """64 images a request, as raw bytes behind the JSON."""
    rounds = 9
    detector = Detector.load(TRAINED / VAE)
    images = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 1), np.uint8)
    alpha = detector.alpha(None)
    tensor = {
        "name": "pixels",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.nbytes},
    }
    head = json.dumps({"parameters": {"binary_data_output": True}, "inputs": [tensor]}).encode()
    headers = {
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
    }

    def alone(seconds: float) -> float:
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            detector.columns(detector.session.run(images), alpha)
            n += len(images)
        return n / (time.perf_counter() - began)

    alone(0.5)
    # Four times 64 images wait longer than one that comes alone may.
    with daemon(TRAINED / VAE, flags=["--queue-wait", "10"]) as (port, _):
        url = f"http://127.0.0.1:{port}/v2/models/{VAE}/infer"
        load = Load(url, head + images.tobytes(), headers)
        wrk(load, 1, 4)
        pairs = [(alone(seconds / 2), wrk(load, seconds / 2, 4)) for _ in range(rounds)]
    ours = [64 * measured.rate for _, measured in pairs]
    yield row("64 images a request: images/s", statistics.median(ours), "{:,.0f}")
    yield row(
        "64 images a request against onnxruntime and statistics alone",
        statistics.median(rate / one for rate, (one, _) in zip(ours, pairs, strict=True)),
        "{:.2f}",
        low=0.85,
    )
    yield row("64 images a request: failures", sum(m.failures for _, m in pairs), "{}", high=1)


@dataclass(frozen=True)
class Answer:
    """One request of the open-loop generator; seconds from when it was due, `at` of its load."""

    status: int
    seconds: float
    retry_after: bool
    at: float


class OpenLoop:
    """Requests at times of its own, whatever the server does: a slow one is not spared."""

    def __init__(self, port: int, body: bytes) -> None:
        self._port = port
        self._request = (
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._rng = random.Random(0)
        self.answers: list[Answer] = []

    async def run(self, rate: float, seconds: float) -> list[Answer]:
        """Answers to requests that arrive as a Poisson process."""
        self.answers = []
        loop = asyncio.get_running_loop()
        tasks, due = [], (began := loop.time())
        while due < began + seconds:
            await asyncio.sleep(max(0.0, due - loop.time()))
            tasks.append(asyncio.create_task(self._ask(due, due - began)))
            due += self._rng.expovariate(rate)
        await asyncio.gather(*tasks)
        return self.answers

    async def _ask(self, due: float, at: float) -> None:
        loop = asyncio.get_running_loop()
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        status = int(head[9:12])
        self.answers.append(Answer(status, loop.time() - due, b"retry-after:" in head, at))
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


BURST = 0.5
"""Seconds of an overload after which it is no burst any more."""


def overload(seconds: float) -> Iterator[Row]:
    """Three times what the model can score, and half of it."""
    with daemon(TRAINED / PIXELCNN) as (port, _):
        # So few connections are never refused, and keep the model busy.
        capacity = wrk(image_load(port, "/v1/score"), seconds, 6).rate
        rounds = 4

        async def measure() -> tuple[list[Answer], list[Answer]]:
            generator = OpenLoop(port, FIXTURE.read_bytes())
            await generator.run(capacity / 2, 2)
            half, thrice = [], []
            # In turns, so that what else the machine does meets both alike.
            for _ in range(rounds):
                half += await generator.run(capacity / 2, seconds)
                await asyncio.sleep(1)
                thrice += await generator.run(3 * capacity, seconds)
                await asyncio.sleep(1)
            generator.close()
            return half, thrice

        half, thrice = asyncio.run(measure())
    accepted = [answer.seconds for answer in thrice if answer.status == 200]
    # A burst may wait longer than those who come when it turns out to be none.
    later = [a.seconds for a in thrice if a.status == 200 and a.at > BURST]
    refused = [answer for answer in thrice if answer.status in (429, 503)]
    other = [a for a in [*half, *thrice] if a.status not in (200, 429, 503)]
    calm = quantile([answer.seconds for answer in half if answer.status == 200], 0.99)
    busy = quantile(accepted, 0.99)
    yield row(f"{PIXELCNN}: capacity, requests/s", capacity, "{:.0f}")
    yield row("half of it: p99, ms", 1e3 * calm, "{:.0f}")
    turned_away = sum(answer.status != 200 for answer in half) / len(half)
    yield row("half of it: refused", turned_away, "{:.2%}")
    yield row("three times as much: p99 of the accepted, ms", 1e3 * busy, "{:.0f}")
    yield row(
        "three times as much: p99 of the accepted against half", busy / calm, "{:.2f}", high=2
    )
    went_on = quantile(later, 0.99)
    yield row(
        "three times as much, once it goes on: p99 of the accepted, ms", 1e3 * went_on, "{:.0f}"
    )
    yield row(
        "three times as much, once it goes on: that against half", went_on / calm, "{:.2f}", high=2
    )
    share = len(accepted) / (rounds * seconds) / capacity
    yield row("three times as much: accepted, of capacity", share, "{:.2f}")
    slowest = 1e3 * quantile([answer.seconds for answer in refused], 0.99)
    yield row("three times as much: p99 of the refusals, ms", slowest, "{:.0f}", high=50)
    without = sum(not answer.retry_after for answer in refused)
    yield row("refusals without Retry-After", without, "{}", high=1)
    yield row("answers of another kind", len(other), "{}", high=1)


PARTS = {"single": single, "many": many, "overload": overload}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", choices=["", *PARTS])
    parser.add_argument("--seconds", type=float, default=5.0)
    asked = parser.parse_args()
    print("| what | measured | target | met |\n|---|---|---|---|")
    broken = False
    for name, part in PARTS.items():
        if asked.only in ("", name):
            for what, value, target, met in part(asked.seconds):
                mark = "" if met is None else "yes" if met else "NO"
                print(f"| {what} | {value} | {target} | {mark} |", flush=True)
                broken |= met is False and what.startswith("the bare reference")
    if broken:
        raise SystemExit("the bare reference is too slow to compare with; is the machine busy?")


if __name__ == "__main__":
    main()
