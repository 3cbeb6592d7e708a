"""What Prometheus' own linter says."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest

from anomalyd.detect.detector import Verdict
from anomalyd.serve.metrics import Metrics, ModelMetrics


def verdict(bits_per_dim, **changes):
    given = {"label": "shirt", "rejected": False, **changes}
    return Verdict(bits_per_dim, "exact", 1.0, "nll", 0.5, 0.01, False, **given)


@pytest.fixture
def exposition():
    """Every metric with a value, in the text format."""
    metrics = Metrics()
    model = ModelMetrics(metrics, "tiny", "1", ["shirt"])
    model.judged(verdict(2.5))
    model.judged(verdict(2.5, label=None, rejected=True, reason="novel"))
    model.answered()
    model.watch_queue(lambda: 3, 512)
    model.ready.set(1)
    model.load_seconds.set(0.2)
    model.created.set(1.79e9)
    model.batch_images.observe(4)
    model.decode_seconds.observe(0.001)
    metrics.requests.labels("/v1/score", "200").inc()
    metrics.request_seconds.labels("/v1/score").observe(0.01)
    metrics.rejected.labels("queue_full").inc()
    metrics.decode_errors.labels("corrupt").inc()
    metrics.model_info.labels("tiny", "1", "density", "exact", "CPUExecutionProvider").set(1)
    return metrics.expose("text/plain")[0].decode()


def test_promtool_finds_nothing(exposition):
    """`promtool check metrics` is silent (Debian package: prometheus)."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, from the Debian package prometheus")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=exposition, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_metric_has_help_and_our_prefix(exposition):
    """Ours are anomalyd_*, the process's own process_*."""
    names = {line.split()[2] for line in exposition.splitlines() if line.startswith("# TYPE")}
    helped = {line.split()[2] for line in exposition.splitlines() if line.startswith("# HELP")}
    assert names == helped
    assert all(name.startswith(("anomalyd_", "process_")) for name in names)
    assert "process_resident_memory_bytes" in names


def test_two_daemons_do_not_share_metrics():
    """Each has a registry of its own; nothing is registered globally."""
    first, second = Metrics(), Metrics()
    first.requests.labels("/", "200").inc()
    assert b'code="200"' not in second.expose("")[0]


def test_openmetrics_is_negotiated():
    """The Accept header chooses the format."""
    body, content_type = Metrics().expose("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_one_hopeless_image_does_not_drown_the_mean():
    """Bits per dimension are counted up to a bound."""
    metrics = Metrics()
    ModelMetrics(metrics, "tiny", "1", ["shirt"]).judged(verdict(1.7e308))
    assert b'anomalyd_bpd_sum{model="tiny",version="1"} 256.0' in metrics.expose("")[0]


def test_classes_are_counted():
    """Labels given and refused, by the classes and two reasons; outliers are outliers first."""
    metrics = Metrics()
    model = ModelMetrics(metrics, "tiny", "1", ["shirt", "boot"])
    model.judged(verdict(2.5))
    for reason, outlier in (("novel", True), ("ambiguous", False), ("novel", True)):
        refused = verdict(2.5, label=None, rejected=True, reason=reason)
        model.judged(replace(refused, outlier=outlier))

    text = metrics.expose("")[0].decode()
    assert 'anomalyd_labels_total{label="shirt",model="tiny",version="1"} 1.0' in text
    assert 'anomalyd_labels_total{label="boot",model="tiny",version="1"} 0.0' in text
    assert 'anomalyd_label_rejections_total{model="tiny",reason="novel",version="1"} 2.0' in text
    assert 'anomalyd_images_total{model="tiny",verdict="outlier",version="1"} 2.0' in text
    assert 'anomalyd_images_total{model="tiny",verdict="rejected",version="1"} 1.0' in text


def test_a_version_that_is_gone_leaves_no_series():
    """A thousand reloads leave as many series as one."""
    metrics = Metrics()
    before = len(metrics.samples())
    for version in map(str, range(50)):
        model = ModelMetrics(metrics, "tiny", version, ["shirt"])
        model.judged(verdict(2.5))
        metrics.model_info.labels("tiny", version, "density", "exact", "CPU").set(1)
        metrics.forget("tiny", version)
    assert len(metrics.samples()) == before
