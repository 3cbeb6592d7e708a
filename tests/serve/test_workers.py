"""Several processes on one socket: one repository, one set of metrics, one readiness."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from pathlib import Path

import pytest
from daemons import NORMAL
from hypothesis import given
from hypothesis import strategies as st
from test_server import running, until
from tiny import rewrite_manifest, tiny_bundle

from anomalyd.config import from_table
from anomalyd.errors import AnomalydError
from anomalyd.serve import merging, supervisor
from anomalyd.serve.link import Gone, Link
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Key
from anomalyd.serve.settings import ServeSettings
from anomalyd.serve.supervisor import share

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs inherited sockets")


def value(daemon, sample):
    """Of one line of /metrics."""
    text = daemon.ask("GET", "/metrics")[1].decode()
    for line in text.splitlines():
        if line.startswith(sample + " "):
            return float(line.rpartition(" ")[2])
    return None


def children(pid):
    """Processes that this one started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_workers_serve_as_one(tmp_path):
    """Counts add up, a new version is everywhere or nowhere, a dead worker comes back."""
    path = tiny_bundle(tmp_path)
    with running(tmp_path, workers=2) as daemon:
        assert daemon.said.startswith("serving tiny on http://")
        assert value(daemon, "anomalyd_workers") == 2
        for _ in range(20):
            assert daemon.ask("POST", "/v1/score", NORMAL)[0] == 200
        images = 'anomalyd_images_total{model="tiny",verdict="normal",version="1"}'
        assert value(daemon, images) == 20
        assert value(daemon, 'anomalyd_model_ready{model="tiny",version="1"}') == 1

        rewrite_manifest(path, version="2")
        daemon.popen.send_signal(signal.SIGHUP)
        ready = "/v2/models/tiny/versions/2/ready"
        until(daemon, lambda: daemon.ask("GET", ready)[0] == 200)
        until(daemon, lambda: b'"version":"2"' in daemon.ask("POST", "/v1/score", NORMAL)[1])
        answers = [daemon.ask("POST", "/v1/score", NORMAL)[1] for _ in range(10)]
        assert all(b'"version":"2"' in answer for answer in answers)

        before = children(daemon.popen.pid)
        os.kill(before[0], signal.SIGKILL)
        until(daemon, lambda: before[0] not in children(daemon.popen.pid))
        assert daemon.ask("POST", "/v1/score", NORMAL)[0] == 200

        def back():
            assert daemon.ask("POST", "/v1/score", NORMAL)[0] == 200
            return len(children(daemon.popen.pid)) == 2 and daemon.ask("GET", "/readyz")[0] == 200

        until(daemon, back)
        code, said = daemon.stop()
        assert code == 0
        assert "a worker ended with code -9" in said


def test_a_bad_bundle_ends_the_start_of_all(tmp_path):
    """One line, exit code 1, and no process is left."""
    import subprocess
    import sys

    path = tiny_bundle(tmp_path)
    (path / "model.onnx").write_bytes(b"x")
    done = subprocess.run(
        [sys.executable, "-m", "anomalyd", "serve", str(path), "--port", "0", "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "model.onnx has 1 bytes" in done.stderr.splitlines()[-1]


def test_a_worker_s_share():
    """CPUs and limits are divided; what is left travels as it is."""
    settings = ServeSettings(workers=4, queue_images=1000, threads=3, tokens=Path("tokens"))
    mine = from_table(ServeSettings, share(settings), "test")
    assert (mine.queue_images, mine.threads, mine.tokens) == (250, 3, Path("tokens"))
    assert mine.queue_bytes == settings.queue_bytes // 4


@given(st.integers(1, 256))
def test_a_share_takes_whatever_one_process_takes(workers):
    """The largest request, and what it unpacks to, fits into each worker's share."""
    mine = from_table(ServeSettings, share(ServeSettings(workers=workers)), "test")
    assert mine.queue_images >= mine.max_images
    assert mine.max_inflight_bytes >= 2 * mine.max_body_bytes


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_counts_of_processes_add_up(counts):
    """Counters and histograms are summed, ready is so only where all are, info stays 1."""
    processes = []
    for count in counts:
        metrics = Metrics()
        for _ in range(count):
            metrics.requests.labels("/v1/score", "200").inc()
            metrics.request_seconds.labels("/v1/score").observe(0.2)
        metrics.model_ready.labels("tiny", "1").set(count > 0)
        metrics.model_info.labels("tiny", "1", "density", "exact", "CPU").set(1)
        processes.append(merging.families(metrics.registry))
    found = merging.samples(merging.merged(processes))

    def of(name, **labels):
        return found.get((name, frozenset(labels.items())), 0)

    total = sum(counts)
    assert of("anomalyd_requests_total", route="/v1/score", code="200") == total
    seconds = "anomalyd_request_duration_seconds"
    assert of(f"{seconds}_bucket", route="/v1/score", le="0.25") == total
    assert of(f"{seconds}_sum", route="/v1/score") == pytest.approx(0.2 * total)
    assert of("anomalyd_model_ready", model="tiny", version="1") == (min(counts) > 0)


def test_what_is_served_no_more_is_counted_no_more():
    """A version that is gone leaves no series of a worker that has ended either."""
    metrics = Metrics()
    for version in ("1", "2"):
        metrics.images.labels("tiny", version, "normal").inc()
    metrics.requests.labels("/v1/score", "200").inc()
    past = merging.counted(merging.families(metrics.registry))
    found = merging.samples(merging.of_versions(past, [Key("tiny", "2")]))
    versions = {dict(labels).get("version") for name, labels in found if "images" in name}
    assert versions == {"2"}
    assert (
        "anomalyd_requests_total",
        frozenset({("route", "/v1/score"), ("code", "200")}),
    ) in found


def test_the_exposition_is_the_same_text():
    """What one process alone would say, it says through the supervisor, too."""
    metrics = Metrics()
    metrics.requests.labels("/v1/score", "200").inc()
    found = merging.families(metrics.registry)
    body, content_type = merging.exposition(merging.merged([found]), "text/plain")
    own, own_type = metrics.expose("text/plain")
    assert content_type == own_type

    def stable(text):
        return [line for line in text.decode().splitlines() if "process_" not in line]

    assert stable(body) == stable(own)
    open_metrics = merging.exposition(found, "application/openmetrics-text; version=1.0.0")
    assert open_metrics[0].endswith(b"# EOF\n")


SUMS = {
    "anomalyd_inflight_body_bytes",
    "anomalyd_queue_capacity",
    "anomalyd_queue_depth",
    "process_cpu_seconds",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
}


def test_of_every_gauge_it_is_known_how_processes_add_up():
    """A new one that nobody thought of would be summed, be it a time or a share."""
    found = merging.families(Metrics().registry)
    gauges = {family["name"] for family in found if family["type"] == "gauge"}
    assert gauges <= merging.LARGEST | merging.SMALLEST | SUMS


def test_a_question_that_fails_in_an_unknown_way_is_answered():
    """Whoever waits for the answer would wait for ever."""

    async def handle(operation, given):
        raise RuntimeError("the disk is on fire")

    async def scenario():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        near, far = Link(handle), Link(handle)
        running = [asyncio.ensure_future(near.run(ours)), asyncio.ensure_future(far.run(theirs))]
        await asyncio.sleep(0.05)
        with pytest.raises(AnomalydError, match="the disk is on fire"):
            await asyncio.wait_for(near.ask("load"), 20)
        for task in running:
            task.cancel()
        await asyncio.wait(running)

    asyncio.run(scenario())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_worker_that_comes_back_serves_what_the_others_do(tmp_path):
    """It reads what is on disk; so do they then, and where it cannot it waits until it can."""
    path = tiny_bundle(tmp_path)
    manifest = (path / "manifest.json").read_bytes()
    with running(tmp_path, workers=2) as daemon:
        rewrite_manifest(path, default_alpha=0.3)
        os.kill(children(daemon.popen.pid)[0], signal.SIGKILL)
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 503)
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 200)
        answers = [daemon.ask("POST", "/v1/score", NORMAL)[1] for _ in range(12)]
        assert all(b'"alpha":0.3' in answer for answer in answers)

        (path / "manifest.json").write_bytes(b"{}")
        os.kill(children(daemon.popen.pid)[0], signal.SIGKILL)
        index = "/v2/repository/index"
        until(daemon, lambda: b"was refused" in daemon.ask("POST", index)[1])
        assert daemon.ask("GET", "/readyz")[0] == 503
        assert b'"alpha":0.3' in daemon.ask("POST", "/v1/score", NORMAL)[1]
        (path / "manifest.json").write_bytes(manifest)
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 200)
        answers = [daemon.ask("POST", "/v1/score", NORMAL)[1] for _ in range(12)]
        assert not any(b'"alpha":0.3' in answer for answer in answers)
        assert daemon.stop()[0] == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_when_all_workers_end_the_next_serve_what_is_on_disk(tmp_path):
    """What was changed for the better is taken, and what was changed for the worse left out."""
    good, bad = (tiny_bundle(tmp_path, name=name) for name in ("good", "bad"))
    with running(tmp_path, workers=2) as daemon:
        rewrite_manifest(good, default_alpha=0.3)
        (bad / "model.onnx").write_bytes(b"x")
        ended = children(daemon.popen.pid)
        for pid in ended:
            os.kill(pid, signal.SIGKILL)
        until(daemon, lambda: not set(ended) & set(children(daemon.popen.pid)))
        until(daemon, lambda: is_ready(daemon))
        answers = [daemon.ask("POST", "/v1/models/good/score", NORMAL)[1] for _ in range(12)]
        assert all(b'"alpha":0.3' in answer for answer in answers)
        assert b"model.onnx has 1 bytes" in daemon.ask("POST", "/v2/repository/index")[1]
        assert daemon.stop()[0] == 0


def is_ready(daemon):
    """Also of a daemon that lets nobody in yet."""
    try:
        return daemon.ask("GET", "/readyz")[0] == 200
    except (ConnectionError, TimeoutError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_all_workers_have_the_same_default_model(tmp_path):
    """The one that was served alone at the start, also in a worker that comes after the second."""
    tiny_bundle(tmp_path)
    with running(tmp_path, workers=2) as daemon:
        tiny_bundle(tmp_path, name="second")
        daemon.popen.send_signal(signal.SIGHUP)
        until(daemon, lambda: daemon.ask("GET", "/v2/models/second/ready")[0] == 200)
        os.kill(children(daemon.popen.pid)[0], signal.SIGKILL)
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 503)
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 200)
        answers = [daemon.ask("GET", "/v1/models")[1] for _ in range(20)]
        assert all(b'"default":"tiny"' in answer for answer in answers)
        assert daemon.stop()[0] == 0


def test_a_worker_that_cannot_be_started_is_tried_again(tmp_path, monkeypatch, caplog):
    """Where the system has no descriptor or process left for it, there may be one later."""
    refusals = [OSError(errno.EMFILE, "Too many open files"), BlockingIOError("no more processes")]
    sockets = []

    def noted():
        pair = socketpair()
        sockets.extend(pair)
        return pair

    async def start(*command, **options):
        if refusals:
            raise refusals.pop()
        owner._stopping.set()
        raise OSError("the end of the test")

    async def kept():
        nonlocal owner
        settings = ServeSettings(bundles=(str(tmp_path),), workers=2)
        with socket.socket() as listener:
            owner = supervisor.Supervisor(settings, listener, announce=print)
            owner._started = True
            await owner._keep()

    owner, socketpair = None, socket.socketpair
    monkeypatch.setattr(socket, "socketpair", noted)
    monkeypatch.setattr(supervisor, "BACK_OFF", (0.0,))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    asyncio.run(kept())
    assert len(sockets) >= 2 * 3
    assert all(each.fileno() == -1 for each in sockets)
    assert "a worker cannot be started: no more processes" in caplog.text
    assert "a worker cannot be started: [Errno 24] Too many open files" in caplog.text


HUNG = """
import sys
from anomalyd.serve import supervisor
supervisor.PING_SECONDS, supervisor.HUNG_SECONDS = 0.2, 5.0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_worker_that_hangs_is_replaced(tmp_path):
    """Stopped in the middle of whatever it does, it would hold up all the others for ever."""
    tiny_bundle(tmp_path)
    with running(tmp_path, before=HUNG, workers=2) as daemon:
        hung = children(daemon.popen.pid)[0]
        os.kill(hung, signal.SIGSTOP)
        until(daemon, lambda: hung not in children(daemon.popen.pid))
        until(daemon, lambda: len(children(daemon.popen.pid)) == 2)
        until(daemon, lambda: daemon.ask("GET", "/readyz")[0] == 200)
        code, said = daemon.stop()
        assert code == 0
        assert "a worker answers nothing" in said


def test_nobody_asks_after_a_worker_that_is_gone(tmp_path, monkeypatch):
    """The asking ends by itself, also where its cancellation is lost: the supervisor waits for it.

    Python 3.11's `wait_for` loses one that comes together with the answer.
    """
    monkeypatch.setattr(supervisor, "PING_SECONDS", 0.0)

    class Leaving:
        asked = 0

        async def ask(self, operation):
            self.asked += 1
            if self.asked > 2:
                raise Gone

    async def asked():
        with socket.socket() as listener:
            settings = ServeSettings(bundles=(str(tmp_path),), workers=2)
            owner = supervisor.Supervisor(settings, listener, announce=print)
            link = Leaving()
            await asyncio.wait_for(owner._ping(supervisor.Worker(link), process=None), 10)
            return link.asked

    assert asyncio.run(asked()) == 3


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_the_supervisor_feeds_the_watchdog(tmp_path, monkeypatch):
    """Or the service manager would end it while its workers serve."""
    tiny_bundle(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        with running(tmp_path, workers=2) as daemon:
            said = [manager.recv(999) for _ in range(30)]  # the first ten waited to be read
            assert said[-3:] == [b"WATCHDOG=1"] * 3
            assert daemon.stop()[0] == 0
