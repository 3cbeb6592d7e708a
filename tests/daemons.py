"""Daemons to ask without a network: over tiny bundles, and over sessions that can be held up."""

from __future__ import annotations

import asyncio
import io
import threading

import httpx
import numpy as np
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tiny import SIDE, draw

from anomalyd.detect.detector import Detector
from anomalyd.detect.runtime import Raw
from anomalyd.serve.app import create_app
from anomalyd.serve.control import Local
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Models, make_model
from anomalyd.serve.scoring import Scorer
from anomalyd.serve.settings import ServeSettings

BRIGHT = np.full((SIDE, SIDE, 1), 255, np.uint8)


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, kind, **options)
    return stream.getvalue()


NORMAL = encoded(draw(1, seed=7)[0])
OUTLIER = encoded(BRIGHT)
COLOUR = encoded(np.zeros((9, 9, 3), np.uint8))
JPEG = encoded(np.zeros((16, 16), np.uint8), "JPEG")
RANGE = st.integers(0, 30)


class Daemon:
    """An application and its models, asked without a network."""

    def __init__(self, models, settings, control=None, access=None, events=None):
        self.models = models
        self.settings = settings
        self.control = control or Local(settings, models)
        scorer = Scorer(settings, models.metrics, events)
        self.app = create_app(models, settings, self.control, scorer=scorer, access=access)

    async def send(self, method, path, **request):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://daemon") as client:
            return await client.request(method, path, **request)

    def ask(self, method, path, **request):
        return asyncio.run(self.send(method, path, **request))

    def score(self, body, path="/v1/score", **request):
        return self.ask("POST", path, content=body, **request)

    def metric(self, name, **labels):
        """The value of one sample in /metrics; None where there is none."""
        text = self.ask("GET", "/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return None


def load(settings):
    """The models that the settings name, and who loaded them."""
    models = Models(default=settings.default_model, metrics=Metrics())
    control = Local(settings, models)
    control.start()
    models.ready = True
    return models, control


def serve(*paths, access=None, **changes):
    settings = ServeSettings(bundles=tuple(map(str, paths)), threads=1, **changes)
    models, control = load(settings)
    return Daemon(models, settings, control, access)


class FakeDetector(Detector):
    """The tiny detector whose session can be held up or made to fail."""

    @classmethod
    def around(cls, path):
        detector = Detector.load(path, device="cpu", threads=1)
        detector.session = FakeSession(detector.session)
        return detector


class FakeSession:
    provider = "Fake"

    def __init__(self, session):
        self.session = session
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.broken = False
        self.floor = None
        self.ran = 0

    def run(self, images, *, nll_map=False, **_):
        self.reached.set()
        assert self.open.wait(10)
        self.ran += len(images)
        if self.broken:
            raise RuntimeError("the device is on fire")
        raw = self.session.run(images, nll_map=nll_map)
        if self.floor is not None:
            return Raw(np.full_like(raw.log_likelihood, self.floor), raw.statistics, raw.nll_map)
        return raw

    def rest(self, images):
        self.session.rest(images)


def fake_daemon(bundle, **changes):
    """A daemon over a FakeSession."""
    settings = ServeSettings(**{"request_timeout": 5.0, "queue_wait": 60.0, **changes})
    metrics = Metrics()
    model = make_model(FakeDetector.around(bundle), settings, metrics)
    models = Models([model], metrics=metrics)
    models.started = models.ready = True
    daemon = Daemon(models, settings)
    daemon.session = model.detector.session
    daemon.batcher = model.batcher
    return daemon


def check_problem(response, status, reason=None):
    """The answer is problem details of this status and reason."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    content = response.json()
    assert content["status"] == status
    assert content["title"]
    assert content["detail"]
    assert "\n" not in content["detail"]
    if reason is not None:
        assert content["reason"] == reason
