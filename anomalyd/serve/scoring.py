"""The one way from an image in a request to its verdict: `/v1`, `/v2` and gRPC all go it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from anomalyd.detect.bayes import Labelling
from anomalyd.detect.detector import DEFAULT
from anomalyd.detect.heatmap import heatmap_png
from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import ImageError, TooManyPixels
from anomalyd.images import Limits, to_pixels
from anomalyd.serve.models import Job, Model, Scored
from anomalyd.serve.problems import ClientGone, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.serve.events import Events
    from anomalyd.serve.metrics import Metrics
    from anomalyd.serve.settings import ServeSettings

    Pixels = NDArray[np.uint8]
    Image = bytes | memoryview | Pixels

__all__ = ["Asked", "Scorer"]

T = TypeVar("T")

# Who waits for longer is watched: whether he is still there, and whether his request has failed.
PATIENCE = 0.05
# A small image decodes in less time than it takes to reach another thread.
INLINE_BYTES = 16 << 10
INLINE_PIXELS = 128 * 128


class Asked(NamedTuple):
    """What a request asks of every image.

    Attributes:
        alpha: rate of false alarms to decide at, from `Detector.alpha`.
        labelling: how labels are given, from `Detector.labelling`.
        heatmap: the per-pixel map, too.
        explain: each statistic with its unadjusted p-value, too.
        timeout: longest wait in the queue, seconds; None takes the daemon's.
    """

    alpha: float
    labelling: Labelling = DEFAULT
    heatmap: bool = False
    explain: bool = False
    timeout: float | None = None


class Scorer:
    """Decodes in a bounded pool, queues, and counts what comes out."""

    def __init__(
        self, settings: ServeSettings, metrics: Metrics, events: Events | None = None
    ) -> None:
        self._metrics = metrics
        self._events = events
        self._most_bytes = settings.queue_bytes
        self._limits = Limits(settings.max_body_bytes, settings.max_pixels)
        self._small = Limits(INLINE_BYTES, min(INLINE_PIXELS, settings.max_pixels))
        cpus = max(1, available_cpus() // settings.workers)
        self._pool = ThreadPoolExecutor(cpus, thread_name_prefix="decode")
        self._at_a_time = 2 * cpus  # images of one request that are decoded together

    async def decode(
        self, model: Model, images: Sequence[Image], timeout: float | None = None
    ) -> list[Pixels | ImageError]:
        """Pixels of each image as the model takes them, or why there are none.

        Raises:
            QueueFull: the model could not be asked in time, so nothing was decoded.
            Problem: 413 the images of this request alone, or their pixels, are more than may wait.
        """
        if len(images) > model.batcher.capacity:
            detail = (
                f"{len(images)} images in one request, and at most {model.batcher.capacity} may "
                "wait for a model; send fewer at one time"
            )
            raise Problem(413, "too_many_images", detail)
        model.batcher.admit(len(images), timeout)
        decoded: list[Pixels | ImageError] = []
        size = 0
        step = self._at_a_time
        for start in range(0, len(images), step):
            if start:
                await asyncio.sleep(0)  # others get their turn between small images
            for pixels in await self._decoded(model, images[start : start + step]):
                decoded.append(pixels)
                size += 0 if isinstance(pixels, ImageError) else pixels.nbytes
            if size > self._most_bytes:
                detail = (
                    f"the images of one request have {size} bytes of pixels or more; at most "
                    f"{self._most_bytes} may wait for a model: send fewer at one time"
                )
                raise Problem(413, "too_many_pixels", detail)
        return decoded

    async def judge(
        self,
        model: Model,
        pixels: Sequence[Pixels],
        asked: Asked,
        gone: Callable[[], Awaitable[Any]] | None = None,
    ) -> list[Scored]:
        """The verdict on each image, in order.

        Args:
            model: who judges.
            pixels: from `decode`.
            asked: how.
            gone: called where the answer takes a while; returns when the client has left.

        Raises:
            QueueFull, Expired, BatchFailed: as the batcher says; what waited is dropped.
            ClientGone: there is nobody to answer any more; likewise.
        """
        if not pixels:
            return []
        batcher = model.batcher
        jobs = [Job(image, asked.alpha, asked.labelling, asked.heatmap) for image in pixels]
        futures = batcher.submit_all(jobs, asked.timeout)
        # Only who has to wait is worth watching: most are answered at once.
        watch = _Watch(futures, gone) if batcher.behind else None
        try:
            scored = [await future for future in futures]  # no callback each
        except BaseException:
            for future in futures:
                batcher.drop(future)
            raise
        finally:
            if watch is not None:
                watch.end()
        for image, (verdict, _, _) in zip(pixels, scored, strict=True):
            model.metrics.judged(verdict)
            if verdict.outlier and self._events is not None:
                self._events.outlier(model.key, verdict, image)
        return scored

    async def picture(self, pixels: Pixels, scored: Scored) -> bytes | None:
        """The image beside its map as a PNG; None where there is no map."""
        if scored.raw.nll_map is None:
            return None
        return await self.offload(heatmap_png, pixels, scored.raw.nll_map[scored.row])

    def offload(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """What the function will give, called in the bounded pool."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def _decoded(
        self, model: Model, images: Sequence[Image]
    ) -> Sequence[Pixels | ImageError]:
        """Small images here and now, which costs no task; others side by side in the pool."""
        decoded = [self._decode_small(model, image) for image in images]
        now = time.perf_counter()
        large = {
            place: self.offload(self._decode, model, images[place], self._limits, now)
            for place, pixels in enumerate(decoded)
            if pixels is None
        }
        for place, decoding in large.items():
            decoded[place] = await decoding
        return cast("list[Pixels | ImageError]", decoded)

    def _decode_small(self, model: Model, image: Image) -> Pixels | ImageError | None:
        if not isinstance(image, np.ndarray) and len(image) > INLINE_BYTES:
            return None
        return self._decode(model, image, self._small, time.perf_counter())

    def _decode(
        self, model: Model, image: Image, limits: Limits, since: float
    ) -> Pixels | ImageError | None:
        """In whichever thread; None where the image is not as small as it looked."""
        try:
            decoded: Pixels | ImageError = to_pixels(image, model.detector.spec, limits)
        except ImageError as error:
            if limits is self._small and isinstance(error, TooManyPixels):
                return None  # said by the header alone; nothing was decoded yet
            self._metrics.decode_errors.labels(error.reason).inc()
            decoded = error
        model.metrics.decode_seconds.observe(time.perf_counter() - since)
        return decoded


class _Watch:
    """Ends a request that takes a while once a part of it has failed, or nobody waits for it."""

    def __init__(
        self,
        futures: Sequence[asyncio.Future[Scored]],
        gone: Callable[[], Awaitable[Any]] | None,
    ) -> None:
        self._futures = futures
        self._gone = gone
        self._left: asyncio.Future[Any] | None = None
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._begin)

    def end(self) -> None:
        self._timer.cancel()
        if self._left is not None:
            self._left.cancel()

    def _begin(self) -> None:
        for future in self._futures:
            future.add_done_callback(self._done)
        if self._gone is not None:
            self._left = asyncio.ensure_future(self._gone())
            self._left.add_done_callback(lambda left: self._fail(ClientGone()))

    def _done(self, future: asyncio.Future[Scored]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        for future in self._futures:
            if not future.done():
                future.set_exception(error)
