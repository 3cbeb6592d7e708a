"""What Prometheus scrapes: base units, and labels whose values are known beforehand.

Labels are routes, status codes, model names and slugs from fixed sets, never anything that a
client chooses.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase

if TYPE_CHECKING:
    from anomalyd.detect.detector import Verdict

__all__ = ["Metrics", "ModelMetrics", "Samples"]

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
"""Name and labels of each sample -> its value."""

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
            "Time in one stage: decode and queue an image, infer and judge a batch, render.",
            ["model", "version", "stage"],
            buckets=(0.0001, 0.00025, *SECONDS),
            registry=registry,
        )
        self.batch_images = Histogram(
            "anomalyd_batch_size",
            "Images scored in one run of the model.",
            ["model", "version"],
            buckets=IMAGES,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "anomalyd_queue_depth",
            "Images waiting for the model.",
            ["model", "version"],
            registry=registry,
        )
        self.queue_capacity = Gauge(
            "anomalyd_queue_capacity",
            "Images that may wait for the model.",
            ["model", "version"],
            registry=registry,
        )
        self.ready = Gauge(
            "anomalyd_ready",
            "1 while requests are welcome, as /readyz says.",
            registry=registry,
        )
        self.inflight_bytes = Gauge(
            "anomalyd_inflight_body_bytes",
            "Request bodies held in memory.",
            registry=registry,
        )
        self.rejected = Counter(
            "anomalyd_rejected_total",
            "Requests refused to protect the daemon or its models, by reason.",
            ["reason"],
            registry=registry,
        )
        self.images = Counter(
            "anomalyd_images_total",
            "Images judged: outlier, else rejected where they get no class, else normal.",
            ["model", "version", "verdict"],
            registry=registry,
        )
        self.labels = Counter(
            "anomalyd_labels_total",
            "Images given a class.",
            ["model", "version", "label"],
            registry=registry,
        )
        self.label_rejections = Counter(
            "anomalyd_label_rejections_total",
            "Images given no class: novel (fits none), ambiguous (fits several).",
            ["model", "version", "reason"],
            registry=registry,
        )
        self.inferences = Counter(
            "anomalyd_inference_requests_total",
            "Scoring requests that reached a model: success, fail.",
            ["model", "version", "outcome"],
            registry=registry,
        )
        self.last_inference = Gauge(
            "anomalyd_last_inference_timestamp_seconds",
            "When the model last answered a request, Unix time; 0 never.",
            ["model", "version"],
            registry=registry,
        )
        self.loads = Counter(
            "anomalyd_model_loads_total",
            "Bundles loaded: success, failure.",
            ["result"],
            registry=registry,
        )
        self.events = Counter(
            "anomalyd_events_total",
            "Outlier events: written, dropped because too many waited, failed to be written.",
            ["outcome"],
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
            ["model", "version"],
            buckets=BITS,
            registry=registry,
        )
        self.p_value = Histogram(
            "anomalyd_p_value",
            "Conformal p-value of each image; uniform on (0, 1] where images are normal.",
            ["model", "version"],
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
            ["model", "version"],
            registry=registry,
        )
        self.model_load_seconds = Gauge(
            "anomalyd_model_load_duration_seconds",
            "Time it took to verify, load and warm the model.",
            ["model", "version"],
            registry=registry,
        )
        self.model_created = Gauge(
            "anomalyd_model_created_timestamp_seconds",
            "When the model was created, as its manifest says, in Unix time.",
            ["model", "version"],
            registry=registry,
        )
        self.model_alpha = Gauge(
            "anomalyd_model_alpha",
            "The rate of false alarms that the model decides at where a request names none.",
            ["model", "version"],
            registry=registry,
        )
        self.calibration_images = Gauge(
            "anomalyd_model_calibration_images",
            "Normal images that p-values are ranks among; with classes those of the rarest.",
            ["model", "version"],
            registry=registry,
        )
        self._by_version: tuple[MetricWrapperBase, ...] = (
            self.stage_seconds,
            self.batch_images,
            self.queue_depth,
            self.queue_capacity,
            self.images,
            self.labels,
            self.label_rejections,
            self.inferences,
            self.last_inference,
            self.bits_per_dim,
            self.p_value,
            self.model_info,
            self.model_ready,
            self.model_load_seconds,
            self.model_created,
            self.model_alpha,
            self.calibration_images,
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

    def samples(self) -> Samples:
        """The value of every sample now."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.registry.collect()
            for sample in family.samples
        }

    def forget(self, model: str, version: str) -> None:
        """Drop every series of a version that is served no more."""
        for metric in self._by_version:
            metric.remove_by_labels({"model": model, "version": version})


class ModelMetrics:
    """The metrics of one version of a model, with their labels looked up once.

    Args:
        metrics: the daemon's.
        model: the model's name.
        version: its version.
        classes: the classes that it may give an image.
    """

    def __init__(
        self, metrics: Metrics, model: str, version: str, classes: Sequence[str] = ()
    ) -> None:
        names = (model, version)
        stage = metrics.stage_seconds
        self.decode_seconds = stage.labels(*names, "decode")
        self.queue_seconds = stage.labels(*names, "queue")
        self.infer_seconds = stage.labels(*names, "infer")
        self.judge_seconds = stage.labels(*names, "judge")
        self.render_seconds = stage.labels(*names, "render")
        self.batch_images = metrics.batch_images.labels(*names)
        self.queue_depth = metrics.queue_depth.labels(*names)
        self.queue_capacity = metrics.queue_capacity.labels(*names)
        self.ready = metrics.model_ready.labels(*names)
        self.load_seconds = metrics.model_load_seconds.labels(*names)
        self.created = metrics.model_created.labels(*names)
        self.alpha = metrics.model_alpha.labels(*names)
        self.calibration_images = metrics.calibration_images.labels(*names)
        self._succeeded = metrics.inferences.labels(*names, "success")
        self._answered_at = 0.0
        # A function of self alone: what is served may still be let go.
        metrics.last_inference.labels(*names).set_function(lambda: self._answered_at)
        self.failed = metrics.inferences.labels(*names, "fail")
        self._verdicts = {
            verdict: metrics.images.labels(*names, verdict)
            for verdict in ("normal", "outlier", "rejected")
        }
        self._bits_per_dim = metrics.bits_per_dim.labels(*names)
        self._p_value = metrics.p_value.labels(*names)
        self._labels = {name: metrics.labels.labels(*names, name) for name in classes}
        self._rejections = {
            reason: metrics.label_rejections.labels(*names, reason)
            for reason in (("novel", "ambiguous") if classes else ())
        }

    def watch_queue(self, depth: Callable[[], int], capacity: int) -> None:
        """Report a queue: its depth is asked for at every scrape."""
        self.queue_depth.set_function(depth)
        self.queue_capacity.set(capacity)

    def answered(self) -> None:
        """Count a request that was answered."""
        self._succeeded.inc()
        self._answered_at = time.time()

    def judged(self, verdict: Verdict) -> None:
        """Count one image's verdict."""
        outcome = "rejected" if verdict.rejected else "normal"
        self._verdicts["outlier" if verdict.outlier else outcome].inc()
        self._bits_per_dim.observe(min(verdict.bits_per_dim, MOST_BITS))
        self._p_value.observe(verdict.p_value)
        if verdict.label is not None:
            self._labels[verdict.label].inc()
        if verdict.reason is not None:
            self._rejections[verdict.reason].inc()


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
