"""The models that are served: loaded, verified and warm before the first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalyd.detect.bundle import find_bundles, read_bundle
from anomalyd.detect.detector import Detector, Verdict
from anomalyd.detect.runtime import Raw
from anomalyd.errors import BundleError, UsageError
from anomalyd.serve.batcher import Batcher
from anomalyd.serve.metrics import Metrics, ModelMetrics
from anomalyd.serve.problems import Problem
from anomalyd.serve.settings import ServeSettings

__all__ = ["Job", "Model", "Models", "Scored", "load_models"]

logger = logging.getLogger(__name__)

REMEDY = (
    "name a bundle, or a folder of bundles, "
    "or make one with: anomalyd train DATA --model NAME --out PATH"
)


class Job(NamedTuple):
    """One image to score: pixels uint8 (H, W, C) as the bundle takes them."""

    pixels: NDArray[np.uint8]
    alpha: float
    nll_map: bool = False


class Scored(NamedTuple):
    """One image's verdict, and where its raw scores stand in its batch."""

    verdict: Verdict
    raw: Raw
    row: int


@dataclass(frozen=True)
class Model:
    """One bundle behind its batcher."""

    detector: Detector
    batcher: Batcher[Job, Scored]
    metrics: ModelMetrics

    @property
    def name(self) -> str:
        return self.detector.manifest.name

    @property
    def version(self) -> str:
        return self.detector.manifest.version

    @property
    def has_map(self) -> bool:
        """Whether the graph has a per-pixel map."""
        return "nll_map" in self.detector.manifest.outputs

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/models` says about it."""
        manifest = self.detector.manifest
        return {
            "name": manifest.name,
            "version": manifest.version,
            "kind": manifest.kind,
            "likelihood": manifest.likelihood,
            "score_name": manifest.score_name,
            "image": manifest.image,
            "classes": manifest.classes,
            "statistics": manifest.statistics,
            "heatmap": self.has_map,
            "default_alpha": manifest.default_alpha,
            "guarantee": manifest.guarantee,
            "calibration_n": manifest.calibration_n,
            "bits_per_dim": manifest.bits_per_dim,
            "parameters": manifest.parameters,
            "created": manifest.created,
            "licence": manifest.licence,
        }


class Models:
    """The models by name, the default one, and whether they take requests.

    Raises:
        UsageError: two models of one name, or a default that is not among them.
    """

    def __init__(
        self, models: Sequence[Model], *, default: str | None = None, metrics: Metrics
    ) -> None:
        self.by_name = {model.name: model for model in models}
        self.metrics = metrics
        self.names = ", ".join(sorted(self.by_name))
        if default is None and len(models) == 1:
            default = models[0].name
        if default is not None and default not in self.by_name:
            raise UsageError(f"--default-model {default}: not served; there are {self.names}")
        self.default = default
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether to send requests here; false from the moment that shutdown is asked for."""
        return self._ready and bool(self.by_name)

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._ready = ready
        for model in self.by_name.values():
            model.metrics.ready.set(ready)

    def find(self, name: str | None) -> Model:
        """The model called `name`, the default one for None.

        Raises:
            Problem: 404 no such model, 400 no default among several.
        """
        if name is None:
            name = self.default
            if name is None:
                detail = f"there is no default model; use /v1/models/NAME/score with {self.names}"
                raise Problem(400, "no_default_model", detail)
        model = self.by_name.get(name)
        if model is None:
            raise Problem(404, "unknown_model", f"no such model; there are {self.names}")
        return model

    def close(self) -> None:
        """Finish the batches that are being run."""
        for model in self.by_name.values():
            model.batcher.close()


def load_models(settings: ServeSettings, metrics: Metrics) -> Models:
    """Every density that the settings name, one after the other.

    Raises:
        BundleError: nothing there, a bundle that is broken, or one that is named and no density.
        UsageError: two bundles of one name, or an unknown default.
    """
    models: dict[str, Model] = {}
    origins: dict[str, Path] = {}
    others = []
    for path, named in _bundles(settings.bundles).items():
        started = time.perf_counter()
        bundle = read_bundle(path)
        if bundle.manifest.kind != "density" and not named:
            others.append(f"{path} ({bundle.manifest.kind})")
            continue
        detector = Detector.start(bundle, device=settings.device, threads=settings.threads)
        name = detector.manifest.name
        if name in models:
            raise UsageError(f"two bundles are called {name}: {origins[name]} and {path}")
        models[name] = make_model(detector, settings, metrics)
        origins[name] = path
        models[name].metrics.load_seconds.set(time.perf_counter() - started)
    if others:
        logger.warning("not served, for they have no density: %s", ", ".join(others))
    if not models:
        raise BundleError(f"{', '.join(settings.bundles)}: no density there; {REMEDY}")
    return Models(list(models.values()), default=settings.default_model, metrics=metrics)


def make_model(detector: Detector, settings: ServeSettings, metrics: Metrics) -> Model:
    """A loaded detector behind a batcher, run once."""
    manifest = detector.manifest
    observed = ModelMetrics(metrics, manifest.name)
    infer_seconds = observed.infer_seconds
    batch_images = observed.batch_images

    def run(jobs: list[Job]) -> list[Scored]:
        started = time.perf_counter()
        answers = _score(detector, jobs)
        infer_seconds.observe(time.perf_counter() - started)
        batch_images.observe(len(jobs))
        return answers

    _score(detector, [Job(_blank(detector), detector.alpha(None))])  # warm, and not counted
    batcher = Batcher(
        run,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait,
        capacity=settings.queue_images,
        timeout=settings.request_timeout,
        waited=observed.queue_seconds.observe,
    )
    observed.watch_queue(lambda: batcher.depth, batcher.capacity)
    observed.created.set(datetime.fromisoformat(manifest.created).timestamp())
    metrics.model_info.labels(
        manifest.name,
        manifest.version,
        manifest.kind,
        manifest.likelihood,
        detector.session.provider,
    ).set(1)
    return Model(detector, batcher, observed)


def _score(detector: Detector, jobs: list[Job]) -> list[Scored]:
    images = [job.pixels for job in jobs]
    raw = detector.run(images, nll_map=any(job.nll_map for job in jobs))
    judged = {alpha: detector.judge(raw, alpha) for alpha in {job.alpha for job in jobs}}
    return [Scored(judged[job.alpha][row], raw, row) for row, job in enumerate(jobs)]


def _blank(detector: Detector) -> NDArray[np.uint8]:
    spec = detector.spec
    size = spec.height * spec.shrink, spec.width * spec.shrink
    return np.zeros((*size, spec.channels), np.uint8)


def _bundles(given: Sequence[str]) -> dict[Path, bool]:
    """The bundles there are, and of each whether it was named itself."""
    named: dict[Path, bool] = {}
    for text in given:
        found = find_bundles(text)
        if not found:
            raise BundleError(f"{text}: no bundle there; {REMEDY}")
        for path in found:
            place = path.resolve()
            named[place] = named.get(place, False) or path == Path(text)
    return named
