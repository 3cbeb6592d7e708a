"""The daemon as a process: start, listen, drain, exit; and what it does not import."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from daemons import load
from tiny import tiny_autoencoder, tiny_bundle, tiny_classifier

from anomalyd.errors import AnomalydError, BundleError, UsageError
from anomalyd.serve import server
from anomalyd.serve.settings import ServeSettings

START = """
import sys
from anomalyd.serve.server import main
from anomalyd.serve.settings import ServeSettings
main(ServeSettings(bundles=(sys.argv[1],), port=0, threads=1, **eval(sys.argv[2])))
"""
CALM = {"OMP_NUM_THREADS": "1"}


class Process:
    """A daemon on a free port of the loopback."""

    def __init__(self, bundle, **changes):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", START, str(bundle), repr(changes)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | CALM,
        )
        self.said = self.popen.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said)
        assert found, self.said + self.popen.stderr.read()
        self.port = int(found[1])

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def ask(self, method, path, body=None):
        connection = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def stop(self):
        """The exit code after SIGTERM, and everything that was printed since the start."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(20), self.popen.stderr.read()


@contextlib.contextmanager
def running(bundle, **changes):
    process = Process(bundle, **changes)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait()
        process.popen.stderr.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles"))


def test_a_daemon_serves_and_stops(bundle, fixture_data):
    """It says where it is, answers over the network, and SIGTERM ends it with 0 and in silence."""
    image = (fixture_data / "images" / "boot.png").read_bytes()
    with running(bundle) as daemon:
        assert daemon.said.startswith("serving tiny on http://127.0.0.1:")
        assert daemon.ask("GET", "/readyz")[0] == 200
        assert daemon.ask("POST", "/v1/score", image)[0] == 200
        assert daemon.ask("POST", "/v1/score", image[:60])[0] == 422
        assert b"_created{" not in daemon.ask("GET", "/metrics")[1]
        assert daemon.stop() == (0, "")


def test_a_request_under_way_is_finished(bundle, fixture_data):
    """After SIGTERM nobody new is let in, and who was in gets an answer; then 0."""
    image = (fixture_data / "images" / "boot.png").read_bytes()
    with running(bundle) as daemon:
        slow = daemon.connect()
        slow.putrequest("POST", "/v1/score")
        slow.putheader("Content-Length", str(len(image)))
        slow.endheaders(image[:10])
        assert daemon.ask("GET", "/livez")[0] == 200
        daemon.popen.send_signal(signal.SIGTERM)
        while answers(daemon):
            time.sleep(0.01)
        slow.send(image[10:])
        with contextlib.closing(slow):
            assert slow.getresponse().status == 200
        assert daemon.popen.wait(20) == 0


def answers(daemon):
    """Whether new connections are still let in."""
    try:
        return daemon.ask("GET", "/livez")[0] == 200
    except ConnectionError:
        return False


def test_a_drain_delay_serves_on_while_not_ready(bundle, fixture_data):
    """Balancers see 503 on /readyz before requests are refused; a second SIGTERM ends the wait."""
    image = (fixture_data / "images" / "boot.png").read_bytes()
    with running(bundle, drain_delay=60.0) as daemon:
        daemon.popen.send_signal(signal.SIGTERM)
        while daemon.ask("GET", "/readyz")[0] != 503:
            time.sleep(0.01)
        assert daemon.ask("POST", "/v1/score", image)[0] == 200
        assert daemon.stop() == (0, "")


def test_slow_clients_are_cut_off(bundle):
    """A head or a body that does not come is given up; others are served meanwhile."""
    with running(bundle, body_timeout=0.3) as daemon:
        mute = socket.create_connection(("127.0.0.1", daemon.port), timeout=10)
        slow = socket.create_connection(("127.0.0.1", daemon.port), timeout=10)
        slow.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
        assert daemon.ask("GET", "/livez")[0] == 200
        with mute, slow:
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
            assert mute.recv(1000) == b""


def test_an_endless_head_is_cut_off(bundle):
    """Header bytes are bounded."""
    with running(bundle) as daemon:
        address = ("127.0.0.1", daemon.port)
        with socket.create_connection(address, timeout=10) as client:
            assert is_cut_off(client, b"GET / HTTP/1.1\r\nX: ", b"x" * 10_000)
        assert daemon.ask("GET", "/livez")[0] == 200


def is_cut_off(client, start, more):
    """Whether the other side hangs up on an endless stream."""
    client.sendall(start)
    try:
        for _ in range(1000):
            client.sendall(more)
            time.sleep(0.001)
    except ConnectionError:
        return True
    return False


def test_many_clients_each_get_their_own_answer(bundle):
    """Under concurrent load over the network no answer is swapped."""
    from daemons import encoded
    from tiny import draw

    images = [encoded(image) for image in draw(40, seed=11)]
    answers = {}
    with running(bundle) as daemon:
        alone = [daemon.ask("POST", "/v1/score", image)[1] for image in images]

        def client(mine):
            answers[mine] = [daemon.ask("POST", "/v1/score", images[i])[1] for i in mine]

        threads = [threading.Thread(target=client, args=(range(i, 40, 8),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(got == [alone[i] for i in mine] for mine, got in answers.items())
    assert len(answers) == 8


def test_a_port_in_use_is_one_line():
    """It is known before any model is loaded, and says what to do."""
    with server.bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(AnomalydError, match=f"port {port}: .*; choose another with --port"):
            server.bind("127.0.0.1", port)


def test_a_host_that_does_not_exist_is_one_line():
    """A name that does not resolve is named."""
    with pytest.raises(AnomalydError, match=r"--host no\.such\.host\.invalid: "):
        server.bind("no.such.host.invalid", 0)


def test_no_bundle_is_one_line(tmp_path):
    """A folder without bundles says how to make one."""
    with pytest.raises(BundleError, match="anomalyd train"):
        load(ServeSettings(bundles=(str(tmp_path),)))


def test_what_has_no_density_is_passed_over_in_a_folder(tmp_path, caplog):
    """One line of the log names what is not served, and why; the densities are."""
    places = [tiny_bundle(tmp_path), tiny_classifier(tmp_path), tiny_autoencoder(tmp_path)]
    models, _ = load(ServeSettings(bundles=(str(tmp_path),), threads=1))
    assert models.names == "tiny"
    models.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"not served, for they have no density: {places[2]} (autoencoder), "
        f"{places[1]} (classifier)"
    )


def test_what_has_no_density_cannot_be_asked_for(tmp_path):
    """A bundle that is named itself is an error, be it in a folder that is named as well."""
    places = [tiny_bundle(tmp_path), tiny_classifier(tmp_path)]
    for bundles in (places, [tmp_path, places[1]]):
        with pytest.raises(BundleError, match="classifier, which has no density to score by"):
            load(ServeSettings(bundles=tuple(map(str, bundles)), threads=1))


def test_a_folder_without_any_density_is_one_line(tmp_path):
    """A daemon that could answer nothing does not start."""
    tiny_classifier(tmp_path)
    with pytest.raises(BundleError, match=r"no density there; .*anomalyd train"):
        load(ServeSettings(bundles=(str(tmp_path),)))


def test_an_unknown_default_model_is_one_line(bundle):
    """It names those there are."""
    settings = ServeSettings(bundles=(str(bundle),), default_model="huge", threads=1)
    with pytest.raises(UsageError, match="huge: not served; there are tiny"):
        load(settings)


HEAVY = {
    "torch",
    "onnx",
    "onnxscript",
    "scipy",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "ray",
    "pandas",
}
LOAD = """
import sys
from anomalyd.serve.app import create_app
from anomalyd.serve.control import Local
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Models
import anomalyd.serve.server
from anomalyd.serve.settings import ServeSettings
settings = ServeSettings(bundles=(sys.argv[1],), threads=1)
models = Models(metrics=Metrics())
control = Local(settings, models)
control.start()
create_app(models, settings, control)
"""


def imported(code, *args):
    """Top-level packages in sys.modules after `code`."""
    code += "\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | CALM
    )
    return set(done.stdout.split())


def test_the_serving_process_imports_no_training_package(bundle):
    """A daemon with a model loaded holds no torch, nor anything else of the extras."""
    assert not imported(LOAD, bundle) & HEAVY


def test_the_import_check_can_fail(bundle):
    """The same check sees a heavy package when there is one."""
    assert imported("import sys, onnx") & HEAVY
