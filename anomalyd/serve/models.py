"""The models that are served: what requests see, swapped as a whole under their feet."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalyd.detect.bayes import Labelling
from anomalyd.detect.detector import DEFAULT, Detector, Verdict
from anomalyd.detect.runtime import Raw
from anomalyd.errors import UsageError
from anomalyd.serve.batcher import Batcher
from anomalyd.serve.metrics import Metrics, ModelMetrics
from anomalyd.serve.problems import Problem
from anomalyd.serve.settings import ServeSettings

__all__ = ["Job", "Key", "Model", "Models", "Scored", "by_age", "make_model", "newest"]


logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """One version of one model."""

    name: str
    version: str


class Job(NamedTuple):
    """One image to score: pixels uint8 (H, W, C) as the bundle takes them."""

    pixels: NDArray[np.uint8]
    alpha: float
    labelling: Labelling = DEFAULT
    nll_map: bool = False


class Scored(NamedTuple):
    """One image's verdict, and where its raw scores stand in its batch."""

    verdict: Verdict
    raw: Raw
    row: int


@dataclass(frozen=True, eq=False)
class Model:
    """One bundle behind its batcher.

    Who swaps it for another only lets go of it: it lives, and its thread with it, until the last
    request that found it is answered.
    """

    name: str
    version: str
    detector: Detector
    batcher: Batcher[Job, Scored]
    metrics: ModelMetrics

    @property
    def key(self) -> Key:
        return Key(self.name, self.version)

    @property
    def has_map(self) -> bool:
        """Whether the graph has a per-pixel map."""
        return "nll_map" in self.detector.manifest.outputs

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/models` says about it."""
        manifest = self.detector.manifest
        return {
            "name": self.name,
            "version": self.version,
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
    """The models by name and version, and whether they take requests.

    What is served changes in one assignment, `publish`; a request keeps the model it found.

    Args:
        models: what is served from the start.
        default: the model that is meant where none is named; None takes `first`, while that is
            served.
        metrics: the daemon's.

    Attributes:
        by_name: the current version of each model.
        first: the model that was served alone at the start, if one was.
        started: whether every configured model has been loaded once.
        accepting: false before that and from the moment that shutdown is asked for.
        healthy: whether all workers are alive.
        stopping: whether connections are to be given up.

    Raises:
        UsageError: a default that is not among the models.
    """

    def __init__(
        self, models: Sequence[Model] = (), *, default: str | None = None, metrics: Metrics
    ) -> None:
        self.metrics = metrics
        self._default = default
        self.by_name: dict[str, Model] = {}
        self.first: str | None = None
        self.started = False
        self.healthy = True
        self.stopping = False
        self._accepting = False
        self._staged: dict[Key, Model] = {}
        self._by_key: dict[Key, Model] = {}
        self._leaving: frozenset[str] = frozenset()
        metrics.ready.set_function(lambda: self.ready)
        if models:
            self._staged = {model.key: model for model in models}
            self.publish(list(self._staged), newest(self._staged))
            self.check_default()

    @property
    def default(self) -> str | None:
        """The model that is meant where none is named."""
        return self._default or (self.first if self.first in self.by_name else None)

    @property
    def names(self) -> str:
        """The models' names, for messages."""
        return ", ".join(sorted(self.by_name)) or "none"

    @property
    def ready(self) -> bool:
        """Whether to send requests here."""
        return self._accepting and self.healthy and bool(self.by_name)

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._accepting = ready
        self._report()

    def check_default(self) -> None:
        """Refuse a default that is not served.

        Raises:
            UsageError: it is not.
        """
        if self._default is not None and self._default not in self.by_name:
            raise UsageError(
                f"--default-model {self._default}: not served; there are {self.names}"
            )

    def find(self, name: str | None, version: str | None = None) -> Model:
        """The model called `name`, the default one for None; its current version for None.

        Raises:
            Problem: 404 no such model or version, 400 no default among several, 503 none yet.
        """
        if name is None:
            name = self.default
            if name is None:
                if not self.started:
                    raise Problem(503, "loading", "the models are being loaded; come again")
                detail = f"there is no default model; use /v1/models/NAME/score with {self.names}"
                raise Problem(400, "no_default_model", detail)
        model = self.by_name.get(name)
        if model is not None and (version is None or version == model.version):
            return model
        if not self.started:
            raise Problem(503, "loading", "the models are being loaded; come again")
        if model is None:
            raise Problem(404, "unknown_model", f"no such model; there are {self.names}")
        found = self._by_key.get(Key(name, str(version)))
        if found is None:
            there = ", ".join(self.versions(name))
            raise Problem(404, "unknown_version", f"no such version of {name}; there are {there}")
        return found

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are served, the oldest first."""
        return sorted((key.version for key in self._by_key if key.name == name), key=by_age)

    def all(self) -> list[Model]:
        """Every version of every model."""
        return list(self._by_key.values())

    def is_ready(self, model: Model) -> bool:
        """Whether to send requests for this model here."""
        return self._accepting and model.name not in self._leaving

    # What the repository does; in a thread of its own.

    def load(self, key: Key, path: Path, settings: ServeSettings) -> None:
        """Load, verify, check and warm a bundle; it waits to be published.

        Raises:
            BundleError: what is wrong with it.
            UsageError: a device that is not here.
        """
        started = time.perf_counter()
        detector = Detector.load(path, device=settings.device, threads=settings.threads)
        model = make_model(detector, settings, self.metrics, key=key)
        model.metrics.load_seconds.set(time.perf_counter() - started)
        self._staged[key] = model

    def discard(self, key: Key) -> None:
        """Forget what was loaded and is not to be published."""
        self._staged.pop(key, None)

    def publish(
        self,
        keys: Collection[Key],
        current: Mapping[str, str],
        leaving: Collection[str] = (),
    ) -> None:
        """Serve these versions from now on, those just loaded in the place of their like.

        Args:
            keys: all that is to be served; loaded before.
            current: model -> the version that is meant where none is named.
            leaving: models that will soon be served no more; already not ready.
        """
        staged, self._staged = self._staged, {}
        before = self._by_key
        after = {key: staged.get(key) or before[key] for key in keys}
        self._leaving = frozenset(leaving)
        self._by_key = after
        self.by_name = {
            name: after[Key(name, version)] for name, version in sorted(current.items())
        }
        if not self.started:
            self.first = next(iter(self.by_name)) if len(self.by_name) == 1 else None
        for key in before.keys() - after.keys():
            self.metrics.forget(*key)
            logger.info("let go", extra={"fields": key._asdict()})
        for key, model in after.items():
            if model is not before.get(key):
                _announce(model, self.metrics)
                logger.info("loaded", extra={"fields": key._asdict()})
        self._report()

    def _report(self) -> None:
        for model in self._by_key.values():
            model.metrics.ready.set(self.is_ready(model))

    def close(self) -> None:
        """Finish the batches that are being run."""
        for model in self._by_key.values():
            model.batcher.close()


def make_model(
    detector: Detector,
    settings: ServeSettings,
    metrics: Metrics,
    *,
    key: Key | None = None,
) -> Model:
    """A loaded detector behind a batcher, run once."""
    manifest = detector.manifest
    key = key or Key(manifest.name, manifest.version)
    observed = ModelMetrics(metrics, *key, manifest.classes or ())
    infer_seconds, judge_seconds = observed.infer_seconds, observed.judge_seconds
    batch_images = observed.batch_images

    def run(jobs: list[Job]) -> Raw:
        started = time.perf_counter()
        raw = _run(detector, jobs)
        infer_seconds.observe(time.perf_counter() - started)
        batch_images.observe(len(jobs))
        return raw

    def judge(jobs: list[Job], raw: Raw) -> list[Scored]:
        started = time.perf_counter()
        answers = _judge(detector, jobs, raw)
        judge_seconds.observe(time.perf_counter() - started)
        return answers

    batcher = Batcher(
        run,
        judge,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait,
        runs=min(2, settings.max_batch),  # who asks for one image at a time gets it
        capacity=settings.queue_images,
        most_bytes=settings.queue_bytes,
        longest=settings.queue_wait,
        timeout=settings.request_timeout,
        size=_size,
        waited=observed.queue_seconds.observe,
    )
    blank = [Job(_blank(detector), detector.alpha(None))]
    _judge(detector, blank, _run(detector, blank))  # warm, and not counted
    detector.session.rest(detector.bundle.golden.images[:1])
    return Model(*key, detector, batcher, observed)


def by_age(version: str) -> list[tuple[bool, int, str]]:
    """A sorting key by which version 10 is newer than version 9."""
    parts = re.split(r"(\d+)", version)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def newest(keys: Collection[Key]) -> dict[str, str]:
    """Model -> its newest version."""
    return {key.name: key.version for key in sorted(keys, key=lambda key: by_age(key.version))}


def _announce(model: Model, metrics: Metrics) -> None:
    manifest, batcher = model.detector.manifest, model.batcher
    model.metrics.watch_queue(lambda: batcher.depth, batcher.capacity)
    model.metrics.alpha.set(model.detector.alpha(None))
    model.metrics.calibration_images.set(model.detector.calibrated_on)
    model.metrics.created.set(datetime.fromisoformat(manifest.created).timestamp())
    metrics.model_info.remove_by_labels({"model": model.name, "version": model.version})
    metrics.model_info.labels(
        *model.key, manifest.kind, manifest.likelihood, model.detector.session.provider
    ).set(1)


def _run(detector: Detector, jobs: list[Job]) -> Raw:
    return detector.run([job.pixels for job in jobs], nll_map=any(job.nll_map for job in jobs))


def _judge(detector: Detector, jobs: list[Job], raw: Raw) -> list[Scored]:
    asked: dict[tuple[float, Labelling], list[int]] = {}
    for row, job in enumerate(jobs):
        asked.setdefault((job.alpha, job.labelling), []).append(row)
    scores = replace(raw, nll_map=None)  # no verdict rests on the map
    verdicts: dict[int, Verdict] = {}
    for each, rows in asked.items():
        own = scores if len(rows) == len(jobs) else scores[np.array(rows)]
        verdicts.update(zip(rows, detector.judge(own, *each), strict=True))
    return [Scored(verdicts[row], raw, row) for row in range(len(jobs))]


def _size(job: Job) -> int:
    return job.pixels.nbytes


def _blank(detector: Detector) -> NDArray[np.uint8]:
    spec = detector.spec
    size = spec.height * spec.shrink, spec.width * spec.shrink
    return np.zeros((*size, spec.channels), np.uint8)
