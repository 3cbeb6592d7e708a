"""What the proofs share: tools of others, environments of their own, and a daemon to prove."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from required import missing

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "trained"
IMAGES = ROOT / "tests" / "fixtures" / "images"
DEPLOY = ROOT / "deploy"
CLIENTS = Path(__file__).with_name("clients")
ENVIRONMENTS = ROOT / ".venv-proofs"
VAE, CLASSES = "fashion-mnist-vae", "fashion-mnist-conditional"
PATHS = (IMAGES / "boot.png", IMAGES / "noisy-shirt.png")
STARTING_SECONDS = 120
CALM = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def tool(name: str) -> str:
    """The path of a program from Debian."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        missing(name)
    return path


def environment(name: str, program: str = "python") -> str:
    """A program of one of the environments in environments/."""
    path = ENVIRONMENTS / name / "bin" / program
    if not path.exists():
        missing(f"the environment {path.parents[1]}")
    return str(path)


def as_root() -> None:
    """Skip, or fail, without the rights to make namespaces."""
    if os.geteuid() != 0:
        missing("root")


def run(
    *command: str | Path, status: int | None = 0, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A command that must end with `status`; its output is in the failure."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=None if "input" in options else subprocess.DEVNULL,
        **options,
    )
    said = f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    assert status is None or done.returncode == status, said
    return done


def client(environment_name: str, script: str, *arguments: str | Path, **options: Any) -> Any:
    """What a script of clients/ prints, as JSON, run in an environment of its own."""
    done = run(environment(environment_name), CLIENTS / script, *arguments, **options)
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Daemon:
    """A daemon that runs, and how to ask it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        log: Path,
        port: int,
        grpc_port: int | None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.process = process
        self.log = log
        self.port = port
        self.grpc_port = grpc_port
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
        self._tls = tls

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        if self._tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=60, context=self._tls
            )
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body, dict(headers or {}))
                response = connection.getresponse()
                return response.status, response.read()
            except TimeoutError:
                self.process.send_signal(signal.SIGABRT)  # it says where its threads are
                self.process.wait(60)
                raise AssertionError(f"{method} {path}: no answer\n{self.said[-6000:]}") from None

    def score(self, image: bytes, model: str | None = None) -> dict[str, Any]:
        """The one result of an image by the daemon's own API."""
        path = "/v1/score" if model is None else f"/v1/models/{model}/score"
        status, answer = self.ask("POST", path, image)
        assert status == 200, answer
        result: dict[str, Any] = json.loads(answer)["results"][0]
        return result

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 where there is none."""
        text = self.ask("GET", "/metrics")[1].decode()
        lines = [line for line in text.splitlines() if line.split("{")[0].split()[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    @property
    def said(self) -> str:
        """What it has written to stderr so far."""
        return self.log.read_text(encoding="utf-8")

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask("GET", "/readyz")[0] == 200
        return False

    def wait(self) -> None:
        """Return when it is ready."""
        started = time.monotonic()
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - started > STARTING_SECONDS:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"the daemon did not start: {self.said}")
            time.sleep(0.05)

    def stop(self) -> tuple[int, str]:
        """Its exit code after SIGTERM, and what it said."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60), self.said


@contextlib.contextmanager
def daemon(
    *bundles: str | Path,
    grpc: bool = False,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> Iterator[Daemon]:
    """A daemon on free ports of the loopback, ready; stopped in the end."""
    port, grpc_port = free_port(), free_port() if grpc else None
    # From the root of the repository, so that what is proven is what stands there.
    command = [sys.executable, "-m", "anomalyd", "serve", *map(str, bundles)]
    command += ["--port", str(port)]
    if grpc_port is not None:
        command += ["--grpc-port", str(grpc_port)]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    with tempfile.TemporaryDirectory() as folder:
        # A file: it takes all that hostile traffic makes the daemon say, where a pipe that nobody
        # reads would stop it.
        log = Path(folder) / "stderr"
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                command, stderr=stream, cwd=ROOT, env=os.environ | CALM | dict(environment or {})
            )
        running = Daemon(process, log, port, grpc_port, tls)
        try:
            if wait:
                running.wait()
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Tensors hold what the daemon's own API said."""
    names = ("score", "bits_per_dim", "p_value", "outlier")
    assert set(names) <= set(found), found
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def same_classes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """So do those of a model with classes."""
    same(found, expected)
    if "label" not in expected:  # the bundle has classes, and decides between none
        assert "label" not in found
        return
    posteriors = [list(row.values()) for row in expected["posterior"]]
    assert found["label"] == [label or "" for label in expected["label"]]
    assert found["posterior"] == [pytest.approx(row, abs=1e-5) for row in posteriors]
