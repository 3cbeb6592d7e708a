"""Hours of mixed traffic, reloads and restarts: shortened here, whole with `make soak`."""

from __future__ import annotations

import collections
import hashlib
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from harness import CALM, IMAGES, ROOT, TRAINED, VAE, daemon
from hostile import attacks

SECONDS = float(os.environ.get("ANOMALYD_SOAK_SECONDS", "60"))
WHOLE = SECONDS >= 600
RELOADS = 1000 if WHOLE else 50
RESTARTS = 20 if WHOLE else 3
STALLS = 75  # three seconds, in which the daemon has a quarter of the time
BOOT = (IMAGES / "boot.png").read_bytes()
# Where overload is not what is proven, a machine that is busy with other things refuses nobody.
PATIENCE = 10
PAUSE = 0.01  # so that the load is bounded, and others have the machine too


class Traffic:
    """Clients in threads, each asking again as soon as it was answered and has paused."""

    def __init__(self, clients: int, ask, pause: float = PAUSE) -> None:
        self.statuses: collections.Counter[object] = collections.Counter()
        self._ask = ask
        self._pause = pause
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(clients)
        ]

    def _run(self, number: int) -> None:
        for status in self._ask(number):
            self.statuses[status] += 1
            if self._stopped.wait(self._pause):
                return

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def keep_asking(port: int, requests):
    """The statuses of requests over one connection that is kept while it may be, for ever."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        while True:
            method, path, body, headers = next(requests)
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                yield f"{type(error).__name__}: {error}"
                continue
            refused = response.status == 503
            if refused and response.headers["Retry-After"] is None:
                yield "503 without Retry-After"
            else:
                yield response.status
    finally:
        connection.close()


def scoring():
    while True:
        yield "POST", "/v1/score", BOOT, {"Content-Type": "image/png"}


def tensors(images: int, seed: int):
    """Random images as a binary tensor, and as a plain one."""
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 28, 28, 1), np.uint8)
    tensor = {"name": "pixels", "shape": list(pixels.shape), "datatype": "UINT8"}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": pixels.nbytes}}]})
    length = {"Inference-Header-Content-Length": str(len(head))}
    plain = json.dumps({"inputs": [tensor | {"data": pixels.ravel().tolist()}]}).encode()
    infer = f"/v2/models/{VAE}/infer"
    return ("POST", infer, head.encode() + pixels.tobytes(), length), ("POST", infer, plain, {})


def mixed(seed: int):
    """What an installation sees: single images, maps, tensors, forms, scrapes, probes."""
    rng = random.Random(seed)
    binary, plain = tensors(16, seed)
    part = b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n'
    form = (part + BOOT + b"\r\n") * 8 + b"--b--\r\n"
    kinds = (
        ("POST", "/v1/score", BOOT, {}),
        ("POST", "/v1/score?heatmap=1&explain=1", BOOT, {}),
        ("POST", "/v1/score", form, {"Content-Type": "multipart/form-data; boundary=b"}),
        binary,
        plain,
        ("GET", "/metrics", None, {}),
        ("GET", f"/v2/models/{VAE}", None, {}),
        ("GET", "/readyz", None, {}),
    )
    weights = (10, 1, 2, 2, 1, 1, 1, 1)
    while True:
        yield rng.choices(kinds, weights)[0]


def hostile(port: int, number: int):
    """The worst status of each attack, for ever."""
    sent = attacks(BOOT)
    place = number * 7
    while True:
        answered = sent[place % len(sent)](port)
        place += 1
        yield max(answered, default=0)


def test_soak(record_property):
    """Good and hostile traffic for the whole time: every good request is answered with 200 or
    with 503 and Retry-After, no hostile one with a 5xx but 503; memory is flat within 5 %."""
    with daemon(TRAINED / VAE, body_timeout=5) as running:
        # The largest runs first: the arena of onnxruntime grows with the largest one yet, and
        # those of four clients at once are so rare that it may come late in a minute.
        full = itertools.repeat(tensors(64, 0)[0])
        with Traffic(4, lambda _: keep_asking(running.port, full)):
            time.sleep(3)
        memory = []
        good = Traffic(4, lambda number: keep_asking(running.port, mixed(number)))
        bad = Traffic(2, lambda number: hostile(running.port, number), pause=5 * PAUSE)
        with good, bad:
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                time.sleep(min(1.0, SECONDS / 100))
                memory.append(running.metric("process_resident_memory_bytes"))
        assert running.score(BOOT)["outlier"] is False
        code, said = running.stop()

    third = len(memory) // 3  # of which the first warms up
    growth = statistics.median(memory[-third:]) / statistics.median(memory[third : 2 * third])
    shown = dict(good.statuses), dict(bad.statuses)
    record_property(
        "measured",
        f"{SECONDS:.0f} s, {good.statuses.total():,} good and {bad.statuses.total():,} hostile "
        f"requests, memory {memory[-1] / 2**20:.0f} MiB, last third against middle {growth:.3f}",
    )
    assert set(good.statuses) <= {200, 503}, shown
    assert good.statuses[200] > 0
    assert not {status for status in bad.statuses if status >= 500} - {503}, shown
    assert growth <= 1.05, " ".join(f"{each / 2**20:.0f}" for each in memory)
    assert (code, "Traceback" in said) == (0, False), said[-3000:]


def test_stalls(record_property):
    """A daemon that is held up again and again, as on a machine that others load, serves all its
    clients once that ends: what runs took then is not held against who comes later."""
    with (
        daemon(TRAINED / VAE) as running,
        Traffic(16, lambda number: keep_asking(running.port, scoring()), pause=0) as traffic,
    ):
        for _ in range(STALLS):
            running.process.send_signal(signal.SIGSTOP)
            time.sleep(0.03)
            running.process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        time.sleep(1)
        before = traffic.statuses.copy()
        time.sleep(3)
        after = traffic.statuses - before
    record_property("measured", f"{after[200]:,} of {after.total():,} requests answered after it")
    assert set(traffic.statuses) <= {200, 503}, dict(traffic.statuses)
    assert after[503] <= after.total() / 10, dict(after)


def test_reloads(tmp_path, record_property):
    """Hot reloads under traffic: each loads the bundle anew, and no request fails."""
    bundle = tmp_path / "models" / VAE
    shutil.copytree(TRAINED / VAE, bundle)
    token = "a" * 64
    digest = hashlib.sha256(token.encode()).hexdigest()
    (tmp_path / "tokens").write_text(
        f"camera score {digest[::-1]}\noperator score,admin {digest}\n"
    )
    bearer = {"Authorization": f"Bearer {token}"}

    def authorised():
        for method, path, body, headers in scoring():
            yield method, path, body, headers | bearer

    settings = {"tokens": tmp_path / "tokens", "repository_api": True, "queue_wait": PATIENCE}
    with daemon(tmp_path / "models", **settings) as running:
        with Traffic(4, lambda number: keep_asking(running.port, authorised())) as traffic:
            started = time.monotonic()
            for number in range(RELOADS):
                # A new state of the files is a new bundle, though they say the same.
                os.utime(bundle / "manifest.json", (number, number))
                status, answer = running.ask(
                    "POST", f"/v2/repository/models/{VAE}/load", b"{}", bearer
                )
                assert status == 200, answer
            seconds = time.monotonic() - started
        text = running.ask("GET", "/metrics", headers=bearer)[1].decode()
        code, said = running.stop()

    loads = [line for line in text.splitlines() if line.startswith("anomalyd_model_loads_total{")]
    counted = {line.split('"')[1]: float(line.split()[-1]) for line in loads}
    record_property(
        "measured",
        f"{RELOADS} reloads in {seconds:.0f} s under {traffic.statuses.total():,} requests",
    )
    assert set(traffic.statuses) == {200}, dict(traffic.statuses)
    assert counted.get("success", 0) >= RELOADS, loads
    assert (code, "Traceback" in said) == (0, False), said[-3000:]


def handed(listener: socket.socket, manager: str) -> subprocess.Popen[str]:
    """A daemon that inherits a listening socket, as systemd hands one over."""
    # LISTEN_PID must be the daemon's own, which only the shell that becomes it can say.
    script = 'exec 3<&"$1"; shift; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
    program = [
        sys.executable,
        "-m",
        "anomalyd",
        "serve",
        str(TRAINED / VAE),
        "--drain-delay",
        "0.5",
        "--queue-wait",
        str(PATIENCE),
    ]
    return subprocess.Popen(
        ["bash", "-c", script, "bash", str(listener.fileno()), *program],
        pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | CALM | {"NOTIFY_SOCKET": manager},
    )


@pytest.mark.by("sd_listen_fds protocol")
def test_rolling_restart(tmp_path, record_property):
    """One listening socket is handed from daemon to daemon: the next is ready, the one before
    gets SIGTERM and exits with 0, and no request fails."""
    address = str(tmp_path / "notify")
    with (
        socket.socket() as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(address)
        manager.settimeout(120)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        port = listener.getsockname()[1]

        def ready() -> None:
            while "READY=1" not in manager.recv(4096).decode():
                pass

        serving = handed(listener, address)
        codes, said = [], ""
        try:
            ready()
            with Traffic(4, lambda number: keep_asking(port, scoring())) as traffic:
                for _ in range(RESTARTS):
                    leaving, serving = serving, handed(listener, address)
                    ready()
                    leaving.send_signal(signal.SIGTERM)
                    said += leaving.communicate(timeout=60)[1]
                    codes.append(leaving.returncode)
                time.sleep(0.5)
        finally:
            serving.send_signal(signal.SIGTERM)
            said += serving.communicate(timeout=60)[1]

    record_property("measured", f"{RESTARTS} restarts under {traffic.statuses.total():,} requests")
    assert codes == [0] * RESTARTS
    assert set(traffic.statuses) == {200}, dict(traffic.statuses)
    assert "Traceback" not in said, said[-3000:]
