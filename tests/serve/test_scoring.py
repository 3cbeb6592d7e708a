"""From images to verdicts, by requests that leave, give up, or ask for different things."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from daemons import fake_daemon
from tiny import draw, tiny_bundle

from anomalyd.detect.detector import Detector
from anomalyd.serve.batcher import Expired
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Job, _judge
from anomalyd.serve.problems import ClientGone
from anomalyd.serve.scoring import Asked, Scorer

FOUR = draw(4, seed=5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def slow(bundle):
    """A daemon whose model takes two images at a time and is held up."""
    daemon = fake_daemon(bundle, max_batch=2)
    daemon.session.open.clear()
    yield daemon
    daemon.models.close()


def judge(daemon, pixels, gone=None, **asked):
    """The model is asked; the task of it."""
    scorer = Scorer(daemon.settings, Metrics())
    model = daemon.models.find("tiny")
    asked = Asked(model.detector.alpha(None), **asked)
    return asyncio.ensure_future(scorer.judge(model, list(pixels), asked, gone))


async def until(holds):
    while not holds():
        await asyncio.sleep(0.001)


def test_who_leaves_a_large_request_frees_what_of_it_still_waits(slow):
    """Though nothing waited before it came: its own images wait behind one another."""

    async def scenario():
        left = asyncio.Event()
        request = judge(slow, np.concatenate([FOUR, FOUR]), left.wait)
        await until(lambda: slow.batcher.depth == 4)
        left.set()
        with pytest.raises(ClientGone):
            await request
        assert slow.batcher.depth == 0
        slow.session.open.set()

    before = slow.session.ran
    asyncio.run(scenario())
    slow.batcher.close()
    assert slow.session.ran == before + 4  # two runs of two that went on already


def test_who_leaves_behind_a_slow_run_is_not_scored(slow):
    """One image that waits for the next run, and its client has gone."""

    async def scenario():
        first = judge(slow, FOUR[:1])
        await until(lambda: slow.batcher._running and not slow.batcher.depth)
        left = asyncio.Event()
        second = judge(slow, FOUR[1:2], left.wait)
        await until(lambda: slow.batcher.depth == 1)
        left.set()
        with pytest.raises(ClientGone):
            await second
        assert slow.batcher.depth == 0
        slow.session.open.set()
        await first

    before = slow.session.ran
    asyncio.run(scenario())
    assert slow.session.ran == before + 1


def test_a_request_ends_as_soon_as_a_part_of_it_has_waited_too_long(slow):
    """And not when the images before that part have been scored."""

    async def scenario():
        request = judge(slow, np.concatenate([FOUR, FOUR]), timeout=0.3)
        with pytest.raises(Expired):
            await request
        assert slow.batcher.depth == 0
        assert slow.batcher._running
        slow.session.open.set()

    asyncio.run(scenario())


def test_each_alpha_is_asked_of_its_own_images(bundle):
    """However many alphas there are in a batch, every image is judged once."""
    judged = []

    class Noting(Detector):
        def judge(self, raw, *asked):
            judged.append(len(raw))
            return super().judge(raw, *asked)

    detector = Noting.load(bundle, device="cpu", threads=1)
    alphas = [0.5, 0.2, 0.5, 0.3]
    raw = detector.run(list(FOUR), nll_map=True)
    scored = _judge(
        detector, [Job(image, alpha) for image, alpha in zip(FOUR, alphas, strict=True)], raw
    )
    assert sorted(judged) == [1, 1, 2]
    for row, (alpha, one) in enumerate(zip(alphas, scored, strict=True)):
        assert one.verdict == Detector.judge(detector, raw, alpha)[row]
        assert (one.raw, one.row) == (raw, row)
