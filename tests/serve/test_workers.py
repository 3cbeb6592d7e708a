"""Several processes on one socket: one repository, one set of metrics, one readiness."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from daemons import NORMAL
from hypothesis import given
from hypothesis import strategies as st
from test_server import running
from tiny import rewrite_manifest, tiny_bundle

from anomalyd.config import from_table
from anomalyd.serve import merging
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
        while daemon.ask("GET", "/v2/models/tiny/versions/2/ready")[0] != 200:
            time.sleep(0.05)
        time.sleep(0.1)
        answers = [daemon.ask("POST", "/v1/score", NORMAL)[1] for _ in range(10)]
        assert all(b'"version":"2"' in answer for answer in answers)

        before = children(daemon.popen.pid)
        os.kill(before[0], signal.SIGKILL)
        while before[0] in children(daemon.popen.pid):
            time.sleep(0.01)
        assert daemon.ask("POST", "/v1/score", NORMAL)[0] == 200
        while len(children(daemon.popen.pid)) < 2 or daemon.ask("GET", "/readyz")[0] != 200:
            assert daemon.ask("POST", "/v1/score", NORMAL)[0] == 200
            time.sleep(0.05)
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
    settings = ServeSettings(workers=4, queue_images=100, threads=3, tokens=Path("tokens"))
    mine = from_table(ServeSettings, share(settings), "test")
    assert (mine.queue_images, mine.threads, mine.tokens) == (25, 3, Path("tokens"))
    assert mine.queue_bytes == settings.queue_bytes // 4
    assert mine.max_inflight_bytes >= mine.max_body_bytes


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
