"""What Prometheus scrapes: base units, and labels whose values are known beforehand.

Labels are routes, status codes, model names and slugs from fixed sets, never anything that a
client chooses.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

__all__ = ["Metrics", "ModelMetrics"]

SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BITS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
P_VALUES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
# One image of vanishing likelihood must not drown the sum of all others.
MOST_BITS = 256.0


class Metrics:
    """All metrics of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "anomalyd_requests_total",
            "Requests answered.",
            ["route", "code"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "anomalyd_request_duration_seconds",
            "Time from the head of a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "anomalyd_stage_duration_seconds",
            "Time in one stage: decode and queue an image, infer a batch, render an answer.",
            ["model", "stage"],
            buckets=(0.0001, 0.00025, *SECONDS),
            registry=registry,
        )
        self.batch_images = Histogram(
            "anomalyd_batch_size",
            "Images scored in one run of the model.",
            ["model"],
            buckets=IMAGES,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "anomalyd_queue_depth",
            "Images waiting for the model.",
            ["model"],
            registry=registry,
        )
        self.queue_capacity = Gauge(
            "anomalyd_queue_capacity",
            "Images that may wait for the model.",
            ["model"],
            registry=registry,
        )
        self.inflight_bytes = Gauge(
            "anomalyd_inflight_body_bytes",
            "Request bodies held in memory.",
            registry=registry,
        )
        self.rejected = Counter(
            "anomalyd_rejected_total",
            "Requests refused to protect the daemon: queue_full, deadline, too_large, slow_body.",
            ["reason"],
            registry=registry,
        )
        self.images = Counter(
            "anomalyd_images_total",
            "Images judged: normal, outlier, rejected.",
            ["model", "verdict"],
            registry=registry,
        )
        self.decode_errors = Counter(
            "anomalyd_decode_errors_total",
            "Images that could not be scored.",
            ["reason"],
            registry=registry,
        )
        # promtool takes "bits" for bytes in a wrong unit, so the name says what the field says.
        self.bits_per_dim = Histogram(
            "anomalyd_bpd",
            "Bits per dimension, -log2 p(x) / (H W C), of each image, or its bound.",
            ["model"],
            buckets=BITS,
            registry=registry,
        )
        self.p_value = Histogram(
            "anomalyd_p_value",
            "Conformal p-value of each image; uniform on (0, 1] where images are normal.",
            ["model"],
            buckets=P_VALUES,
            registry=registry,
        )
        self.model_info = Gauge(
            "anomalyd_model_info",
            "1 for each model that is served.",
            ["model", "version", "kind", "likelihood", "provider"],
            registry=registry,
        )
        self.model_ready = Gauge(
            "anomalyd_model_ready",
            "1 while the model is verified, warm and taking requests.",
            ["model"],
            registry=registry,
        )
        self.model_load_seconds = Gauge(
            "anomalyd_model_load_duration_seconds",
            "Time it took to verify, load and warm the model.",
            ["model"],
            registry=registry,
        )
        self.model_created = Gauge(
            "anomalyd_model_created_timestamp_seconds",
            "When the model was made, as its manifest says, in Unix time.",
            ["model"],
            registry=registry,
        )
        build = Gauge(
            "anomalyd_build_info",
            "1, with the versions of what answers.",
            ["version", "python", "onnxruntime"],
            registry=registry,
        )
        build.labels(version("anomalyd"), platform.python_version(), _onnxruntime()).set(1)
        ProcessCollector(registry=registry)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that the Accept header asks for, with its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class ModelMetrics:
    """The metrics of one model, with their labels looked up once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        stage = metrics.stage_seconds
        self.decode_seconds = stage.labels(model, "decode")
        self.queue_seconds = stage.labels(model, "queue")
        self.infer_seconds = stage.labels(model, "infer")
        self.render_seconds = stage.labels(model, "render")
        self.batch_images = metrics.batch_images.labels(model)
        self.queue_depth = metrics.queue_depth.labels(model)
        self.queue_capacity = metrics.queue_capacity.labels(model)
        self.ready = metrics.model_ready.labels(model)
        self.load_seconds = metrics.model_load_seconds.labels(model)
        self.created = metrics.model_created.labels(model)
        self._verdicts = {
            verdict: metrics.images.labels(model, verdict)
            for verdict in ("normal", "outlier", "rejected")
        }
        self._bits_per_dim = metrics.bits_per_dim.labels(model)
        self._p_value = metrics.p_value.labels(model)

    def watch_queue(self, depth: Callable[[], int], capacity: int) -> None:
        """Report a queue: its depth is asked for at every scrape."""
        self.queue_depth.set_function(depth)
        self.queue_capacity.set(capacity)

    def judged(self, bits_per_dim: float, p_value: float, verdict: str) -> None:
        """Count one image's verdict."""
        self._verdicts[verdict].inc()
        self._bits_per_dim.observe(min(bits_per_dim, MOST_BITS))
        self._p_value.observe(p_value)


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
