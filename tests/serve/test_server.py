"""The daemon as a process: start, listen, drain, exit; and what it does not import."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from daemons import load
from tiny import rewrite_manifest, tiny_autoencoder, tiny_bundle, tiny_classifier

from anomalyd.errors import AnomalydError, BundleError, UsageError
from anomalyd.serve import server
from anomalyd.serve.settings import ServeSettings

START = """
import sys
exec(sys.argv[3])
from anomalyd.serve.server import main
from anomalyd.serve.settings import ServeSettings
main(ServeSettings(**{'bundles': (sys.argv[1],), 'port': 0, 'threads': 1} | eval(sys.argv[2])))
"""
CALM = {"OMP_NUM_THREADS": "1"}


class Process:
    """A daemon on a free port of the loopback."""

    def __init__(self, bundle, scheme="http", before="", **changes):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", START, str(bundle), repr(changes), before],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | CALM,
        )
        self.said = self.popen.stderr.readline()
        found = re.search(rf"{scheme}://127\.0\.0\.1:(\d+)", self.said)
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


def until(daemon, true, seconds=60.0):
    """Ask again and again, of a daemon that lives; it is no measure of speed."""
    last = time.monotonic() + seconds
    while not true():
        assert daemon.popen.poll() is None, daemon.popen.stderr.read()
        assert time.monotonic() < last, f"not true within {seconds} s"
        time.sleep(0.01)


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
        until(daemon, lambda: not answers(daemon))
        slow.send(image[10:])
        with contextlib.closing(slow):
            assert slow.getresponse().status == 200
        assert daemon.popen.wait(20) == 0


@pytest.mark.parametrize("path", ["/v1/score", "/nothing"])
def test_who_is_asked_to_stop_twice_answers_at_once(bundle, path):
    """A request under way is refused in order, be it in the middle of its body."""
    with running(bundle) as daemon:
        slow = daemon.connect()
        slow.putrequest("POST", path)
        slow.putheader("Content-Length", "9")
        slow.endheaders(b"abc")
        assert daemon.ask("GET", "/livez")[0] == 200
        daemon.popen.send_signal(signal.SIGTERM)
        until(daemon, lambda: not answers(daemon))
        daemon.popen.send_signal(signal.SIGTERM)
        with contextlib.closing(slow):
            response = slow.getresponse()
            assert response.status == (503 if path == "/v1/score" else 404)
            assert response.getheader("connection") == "close"
        assert daemon.popen.wait(20) == 0
        assert "Traceback" not in daemon.popen.stderr.read()


def test_sighup_reads_bundles_again(tmp_path, fixture_data):
    """A new version is served without a restart, and the old one until then."""
    image = (fixture_data / "images" / "boot.png").read_bytes()
    path = tiny_bundle(tmp_path)
    with running(tmp_path) as daemon:
        assert b'"version":"1"' in daemon.ask("POST", "/v1/score", image)[1]
        rewrite_manifest(path, version="2")
        daemon.popen.send_signal(signal.SIGHUP)
        until(daemon, lambda: b'"version":"2"' in daemon.ask("POST", "/v1/score", image)[1])
        assert daemon.stop() == (0, "")


def test_watching_finds_new_bundles(tmp_path):
    """Without a signal, once they are whole and at rest."""
    tiny_bundle(tmp_path)
    with running(tmp_path, watch=0.05) as daemon:
        tiny_bundle(tmp_path, name="second")
        until(daemon, lambda: daemon.ask("GET", "/v2/models/second/ready")[0] == 200)
        assert daemon.stop()[0] == 0


SLOW_LOAD = """
import sys, time
from anomalyd.serve import models, server
from anomalyd.serve.settings import ServeSettings
models.Models.load = lambda *args: time.sleep(600)
server.main(ServeSettings(bundles=(sys.argv[1],), port=int(sys.argv[2]), threads=1))
"""


def test_sigterm_while_bundles_load_ends_with_0(bundle):
    """Live but neither started nor ready; then gone at once, whatever the load is at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    popen = subprocess.Popen(
        [sys.executable, "-c", SLOW_LOAD, str(bundle), str(port)], env=os.environ | CALM
    )
    try:
        found = {}
        while found.get("/livez") != 200:
            for path in ("/livez", "/startupz", "/readyz", "/v2/health/ready"):
                with contextlib.suppress(ConnectionError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                    connection.request("GET", path)
                    found[path] = connection.getresponse().status
                    connection.close()
            assert popen.poll() is None
        assert set(found.values()) == {200, 503}
        assert found["/startupz"] == found["/readyz"] == 503
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(20) == 0
    finally:
        popen.kill()
        popen.wait()


FAILS = """
import sys
from anomalyd.serve import models, server
from anomalyd.serve.settings import ServeSettings
def load(*args):
    raise OSError("the disk is on fire")
from anomalyd.serve import repository
repository.scan = load
server.main(ServeSettings(bundles=(sys.argv[1],), port=0, threads=1))
"""


def test_a_start_that_fails_in_an_unknown_way_ends_the_daemon(bundle):
    """It must not say that it serves, and stay."""
    done = subprocess.run(
        [sys.executable, "-c", FAILS, str(bundle)],
        capture_output=True,
        text=True,
        env=os.environ | CALM,
        timeout=60,
    )
    assert done.returncode == 1
    assert "the models cannot be loaded: OSError('the disk is on fire')" in done.stderr
    assert "serving" not in done.stderr


def test_who_waits_for_leave_and_is_refused_is_cut_off(bundle):
    """What he sends then would be taken for the next request."""
    with running(bundle, max_body_bytes=10) as daemon:
        address = ("127.0.0.1", daemon.port)
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(
                b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
                b"Expect: 100-continue\r\n\r\n"
            )
            said = b""
            while piece := client.recv(1000):
                said += piece
            assert said.startswith(b"HTTP/1.1 413 ")
            assert b"connection: close" in said.lower()


def test_a_bundle_that_cannot_be_loaded_ends_the_start(tmp_path):
    """With exit code 1 and one line, although clients were let in already."""
    path = tiny_bundle(tmp_path)
    (path / "model.onnx").write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-m", "anomalyd", "serve", str(path), "--port", "0"],
        capture_output=True,
        text=True,
        env=os.environ | CALM,
        timeout=60,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "model.onnx has 1 bytes" in done.stderr


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_systemd_is_told(tmp_path, monkeypatch):
    """READY, RELOADING and STOPPING, in that order, over the socket of the service manager."""
    tiny_bundle(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with running(tmp_path) as daemon:
            assert manager.recv(999).startswith(b"READY=1\nSTATUS=serving tiny")
            daemon.popen.send_signal(signal.SIGHUP)
            assert manager.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(999).startswith(b"READY=1")
            assert daemon.stop() == (0, "")
            assert manager.recv(999) == b"STOPPING=1"


HANDED = """
import os, sys
os.dup2(int(sys.argv[2]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
from anomalyd.serve.server import main
from anomalyd.serve.settings import ServeSettings
main(ServeSettings(bundles=(sys.argv[1],), threads=1, drain_delay=0.1))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs inherited sockets")
def test_a_rolling_restart_over_one_socket_fails_no_request(bundle, fixture_data):
    """Whoever holds the listening socket starts the next daemon before it stops the last one."""
    image = (fixture_data / "images" / "boot.png").read_bytes()
    statuses, stop = [], threading.Event()

    with server.bind("127.0.0.1", 0) as listener:
        server.listen(listener)
        port = listener.getsockname()[1]

        def start():
            command = [sys.executable, "-c", HANDED, str(bundle), str(listener.fileno())]
            popen = subprocess.Popen(
                command,
                pass_fds=[listener.fileno()],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | CALM,
            )
            assert popen.stderr.readline().startswith("serving tiny")
            return popen

        def client():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            while not stop.is_set():
                connection.request("POST", "/v1/score", image)
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
                if response.getheader("connection") == "close":
                    connection.close()
                time.sleep(0.003)
            connection.close()

        running_one = start()
        threads = [threading.Thread(target=client) for _ in range(2)]
        for thread in threads:
            thread.start()
        codes = []
        for _ in range(2):
            following = start()
            running_one.send_signal(signal.SIGTERM)
            codes.append(running_one.wait(30))
            running_one.stderr.close()
            running_one = following
        stop.set()
        for thread in threads:
            thread.join(30)
        running_one.send_signal(signal.SIGTERM)
        codes.append(running_one.wait(30))
        running_one.stderr.close()
    assert codes == [0, 0, 0]
    assert set(statuses) == {200}
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost -keyout {folder}/key -out {folder}/cert",
        shell=True,
        check=True,
        capture_output=True,
    )
    return folder / "cert", folder / "key"


def test_https(bundle, certificate):
    """With a certificate the daemon speaks TLS, and nothing else."""
    cert, key = certificate
    with running(bundle, tls_cert=str(cert), tls_key=str(key), scheme="https") as daemon:
        context = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("localhost", daemon.port, context=context)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            daemon.ask("GET", "/readyz")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tls_cert": "cert"}, "give both"),
        ({"tls_cert": "none", "tls_key": "none"}, "--tls-cert none: no such file"),
        ({"tls_cert": __file__, "tls_key": __file__}, "no certificate and its unencrypted key"),
        ({"tokens": "none"}, "--tokens none: cannot be read"),
        ({"repository_api": True}, "--repository-api: whoever may load models needs a token"),
    ],
)
def test_settings_that_cannot_be_meant_are_one_line(changes, said):
    """Before anything is bound or loaded."""
    paths = {name: Path(value) for name, value in changes.items() if value is not True}
    with pytest.raises(UsageError, match=said):
        server.check(ServeSettings(**{**changes, **paths}))


def test_a_body_must_fit_into_all_of_them():
    """Or it would be told to come again for ever."""
    with pytest.raises(UsageError, match="max-inflight-bytes"):
        server.check(ServeSettings(max_body_bytes=2, max_inflight_bytes=1))


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
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 503)
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


def test_a_wish_for_another_protocol_is_ignored(bundle, fixture_data):
    """Its request is served as it is, and its body is no request of its own."""
    image = (fixture_data / "images" / "boot.png").read_bytes()
    wish = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    within = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(bundle) as daemon:
        for headers in (wish, wish | {"Connection": "Upgrade, close"}):
            with contextlib.closing(daemon.connect()) as client:
                for body, status in ((within, 415), (image, 200)):
                    client.request("POST", "/v1/score", body, headers)
                    response = client.getresponse()
                    assert (response.status, bool(response.read())) == (status, True)
        with contextlib.closing(daemon.connect()) as client:
            client.request("CONNECT", "/v1/score", within)  # is such a wish and nothing else
            response = client.getresponse()
            assert (response.status, response.getheader("connection")) == (400, "close")
        code, said = daemon.stop()
        assert code == 0
        assert "pgrade" not in said


def test_a_body_that_nobody_reads_is_bounded(bundle):
    """A refusal waits for a small body to end and keeps the connection; any other ends it."""
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\n"
    with running(bundle, body_timeout=0.5, max_body_bytes=100_000) as daemon:
        with contextlib.closing(daemon.connect()) as client:
            client.connect()
            connection = client.sock
            for size in (9, 50_000):
                client.request("POST", "/nothing", b"x" * size)
                response = client.getresponse()
                assert (response.status, bool(response.read())) == (404, True)
                assert client.sock is connection
        address = ("127.0.0.1", daemon.port)
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(head + b"Content-Length: 9\r\n\r\nabc")
            said = b"".join(iter(lambda: client.recv(1000), b""))
            assert said.startswith(b"HTTP/1.1 404 ")
            assert said.lower().count(b"connection: close") == 1
        with socket.create_connection(address, timeout=10) as client:
            start = head + b"Transfer-Encoding: chunked\r\n\r\n"
            assert is_cut_off(client, start, b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert daemon.stop() == (0, "")


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


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "a" * 64])
def test_a_host_that_does_not_exist_is_one_line(host):
    """A name that does not resolve, or cannot be one, is named."""
    with pytest.raises(AnomalydError, match=rf"--host {re.escape(host)}: .*; name an address"):
        server.bind(host, 0)


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
