"""The HTTP surface.

POST /v1/score                  one image, or many as multipart, by the default model
POST /v1/models/NAME/score      by that model
GET  /v1/models                 what is served
GET  /livez /readyz /metrics    for machines
GET  /openapi.json              this, described
GET  /                          a page to drop an image on
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalyd.detect.heatmap import heatmap_png
from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import AlphaUnreachable, ImageError, TooManyPixels, UsageError
from anomalyd.images import ImageSpec, Limits, to_pixels
from anomalyd.serve.batcher import BatchFailed, Expired, QueueFull
from anomalyd.serve.body import Bodies, boundary_of, header, split_multipart
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Job, Model, Models, Scored
from anomalyd.serve.openapi import OPENAPI
from anomalyd.serve.problems import ClientGone, Problem, problem_response
from anomalyd.serve.settings import ServeSettings

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Pixels = NDArray[np.uint8]

# A small image decodes in less time than it takes to reach another thread.
INLINE_BYTES = 16 << 10
INLINE_PIXELS = 128 * 128

CLIENT_GONE = 499  # counted, never sent
REJECTIONS = {
    "queue_full": "queue_full",
    "deadline": "deadline",
    "slow_body": "slow_body",
    "too_many_bytes": "too_large",
    "too_many_images": "too_large",
}
TRUTHS = {"1": True, "true": True, "0": False, "false": False}
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def create_app(models: Models, settings: ServeSettings) -> ASGIApp:
    """The ASGI application that serves `models`."""
    bodies = Bodies(settings.max_body_bytes, settings.max_inflight_bytes, settings.body_timeout)
    models.metrics.inflight_bytes.set_function(lambda: bodies.held)
    score = Score(models, settings, bodies)
    router = Router(
        [
            Route("/v1/score", score, methods=["POST"]),
            Route("/v1/models/{name}/score", score, methods=["POST"]),
            Route("/v1/models", partial(list_models, models)),
            Route("/livez", live),
            Route("/readyz", partial(ready, models)),
            Route("/metrics", partial(scrape, models.metrics)),
            Route("/openapi.json", openapi),
            Route("/", page),
        ],
        redirect_slashes=False,
    )
    return Edge(router, models.metrics)


@dataclass(frozen=True)
class Asked:
    """The query of a scoring request."""

    alpha: float
    heatmap: bool = False
    explain: bool = False


class Score:
    """Scores the images in a request's body; an ASGI application, because it is the hot path."""

    def __init__(self, models: Models, settings: ServeSettings, bodies: Bodies) -> None:
        self._models = models
        self._bodies = bodies
        self._max_images = settings.max_images
        self._limits = Limits(settings.max_body_bytes, settings.max_pixels)
        self._inline = Limits(INLINE_BYTES, min(INLINE_PIXELS, settings.max_pixels))
        self._pool = ThreadPoolExecutor(available_cpus(), thread_name_prefix="decode")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = self._models.find(scope["path_params"].get("name"))
        asked = parse_query(scope["query_string"], model)
        with self._bodies.intake() as intake:
            images = self._split(scope, await intake.read(scope, receive))
            model.batcher.admit(len(images))  # before the work of decoding
            decoded = await _each([self._decode(image, model) for image in images])
            del images
        if len(decoded) == 1 and isinstance(decoded[0], ImageError):
            raise decoded[0]
        jobs = [
            Job(pixels, asked.alpha, asked.heatmap)
            for pixels in decoded
            if not isinstance(pixels, ImageError)
        ]
        scored = iter(await self._score(model, jobs, receive))
        started = time.perf_counter()
        results = [
            {"index": index, "error": str(image)}
            if isinstance(image, ImageError)
            else await self._result(model, index, image, next(scored), asked)
            for index, image in enumerate(decoded)
        ]
        answer = {"model": model.name, "version": model.version, "results": results}
        body = msgspec.json.encode(answer)
        model.metrics.render_seconds.observe(time.perf_counter() - started)
        await _send_json(send, body)

    def _split(self, scope: Scope, body: bytes) -> list[bytes]:
        boundary = boundary_of(header(scope, b"content-type"))
        if boundary is None:
            return [body]
        images = split_multipart(body, boundary, self._max_images)
        if not images:
            raise Problem(400, "empty", "the multipart body holds no image")
        return images

    async def _decode(self, data: bytes, model: Model) -> Pixels | ImageError:
        """Pixels of one image, or why there are none."""
        started = time.perf_counter()
        try:
            return await self._pixels(data, model.detector.spec)
        except ImageError as error:
            self._models.metrics.decode_errors.labels(error.reason).inc()
            return error
        finally:
            model.metrics.decode_seconds.observe(time.perf_counter() - started)

    async def _pixels(self, data: bytes, spec: ImageSpec) -> Pixels:
        if len(data) <= INLINE_BYTES:
            try:
                return to_pixels(data, spec, self._inline)
            except TooManyPixels:
                pass  # said by the header alone; nothing was decoded yet
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, to_pixels, data, spec, self._limits)

    async def _score(self, model: Model, jobs: list[Job], receive: Receive) -> list[Scored]:
        if not jobs:
            return []
        batcher = model.batcher
        batcher.admit(len(jobs))
        watched = batcher.backlogged
        futures = [batcher.submit(job) for job in jobs]
        if watched:
            # Only a client that has to wait is worth watching: most are answered at once.
            await _answered_or_gone(futures, receive, batcher.drop)
        scored = await _each(futures)
        for verdict, _, _ in scored:
            outcome = "outlier" if verdict.outlier else "normal"
            model.metrics.judged(
                verdict.bits_per_dim,
                verdict.p_value,
                "rejected" if verdict.rejected else outcome,
            )
        return scored

    async def _result(
        self, model: Model, index: int, pixels: Pixels, scored: Scored, asked: Asked
    ) -> dict[str, Any]:
        verdict, raw, row = scored
        result = {"index": index, **verdict.to_dict()}
        if asked.explain:
            result["explain"] = model.detector.explain(raw, row)
        if asked.heatmap and raw.nll_map is not None:
            loop = asyncio.get_running_loop()
            png = await loop.run_in_executor(self._pool, heatmap_png, pixels, raw.nll_map[row])
            result["heatmap"] = base64.b64encode(png).decode("ascii")
        return result


async def _each(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """What all of them give, in order; a lone one costs no task."""
    if len(awaitables) == 1:
        return [await awaitables[0]]
    return await asyncio.gather(*awaitables)


async def _answered_or_gone(
    futures: Sequence[asyncio.Future[Scored]],
    receive: Receive,
    drop: Callable[[asyncio.Future[Scored]], None],
) -> None:
    """Wait until all futures are done; drop them all when the client closes its connection."""
    gone = asyncio.ensure_future(receive())
    answered = asyncio.ensure_future(asyncio.wait(futures))
    try:
        await asyncio.wait({gone, answered}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        answered.cancel()
    if not all(future.done() for future in futures):
        for future in futures:
            drop(future)
        raise ClientGone


def parse_query(query: bytes, model: Model) -> Asked:
    """The parameters `alpha`, `heatmap` and `explain`.

    Raises:
        Problem: 400 an unknown or repeated parameter, a bad value, no map in this bundle.
        AlphaUnreachable: an alpha that the calibration set is too small for.
    """
    if not query:
        return Asked(model.detector.alpha(None))
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    given = dict(pairs)
    for name in given:
        if name not in ("alpha", "heatmap", "explain"):
            detail = f"unknown parameter {name[:40]!r}; there are alpha, heatmap, explain"
            raise Problem(400, "parameter", detail)
    if len(given) < len(pairs):
        raise Problem(400, "parameter", "a parameter is given twice; give each once")
    asked = Asked(
        model.detector.alpha(_number("alpha", given["alpha"]) if "alpha" in given else None),
        _truth("heatmap", given.get("heatmap", "0")),
        _truth("explain", given.get("explain", "0")),
    )
    if asked.heatmap and not model.has_map:
        raise Problem(400, "no_map", f"the bundle {model.name} has no per-pixel map")
    return asked


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        detail = f"{name} must be a number, not {text[:40]!r}"
        raise Problem(400, "parameter", detail) from None


def _truth(name: str, text: str) -> bool:
    if text not in TRUTHS:
        raise Problem(400, "parameter", f"{name} must be 1 or 0, not {text[:40]!r}")
    return TRUTHS[text]


async def _send_json(send: Send, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def list_models(models: Models, request: Request) -> Response:
    described = [model.describe() for model in models.by_name.values()]
    return _json({"default": models.default, "models": described})


async def live(request: Request) -> Response:
    """The event loop turns; nothing else is asked."""
    return _json({"live": True})


async def ready(models: Models, request: Request) -> Response:
    return _json({"ready": models.ready}, 200 if models.ready else 503)


async def scrape(metrics: Metrics, request: Request) -> Response:
    body, content_type = metrics.expose(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})


async def openapi(request: Request) -> Response:
    return _json(OPENAPI)


async def page(request: Request) -> Response:
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(_page(), headers=headers, media_type="text/html")


@cache
def _page() -> bytes:
    return resources.files("anomalyd.serve").joinpath("page.html").read_bytes()


class Edge:
    """Around everything: turns exceptions into problem details, counts and times each request.

    The label is the route's pattern, never the path.
    """

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self.router = router
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        code = 0

        async def noting(message: Message) -> None:
            nonlocal code
            if not code:
                code = message["status"]
            await send(message)

        scope["app"] = self  # the router then raises for what it does not find
        try:
            await self.router(scope, receive, noting)
        except ClientGone:
            code = CLIENT_GONE
        except Exception as error:  # the last line of defence: answer and go on
            if code:
                raise  # half an answer is out; the server closes the connection
            await self._problem(error)(scope, receive, noting)
        finally:
            matched = scope.get("route")
            route = "unmatched" if matched is None else matched.path
            self._metrics.requests.labels(route, str(code or CLIENT_GONE)).inc()
            seconds = time.perf_counter() - started
            self._metrics.request_seconds.labels(route).observe(seconds)

    def _problem(self, error: Exception) -> Response:
        if isinstance(error, Problem):
            if error.reason in REJECTIONS:
                self._metrics.rejected.labels(REJECTIONS[error.reason]).inc()
            return problem_response(
                error.status, str(error), reason=error.reason, close=error.close
            )
        if isinstance(error, QueueFull):
            detail = "as many images as may wait are waiting for this model; come again"
            return self._problem(Problem(503, "queue_full", detail))
        if isinstance(error, Expired):
            detail = "the image waited too long for this model; come again"
            return self._problem(Problem(503, "deadline", detail))
        if isinstance(error, ImageError):
            return problem_response(error.status, str(error), reason=error.reason)
        if isinstance(error, AlphaUnreachable | UsageError):
            return problem_response(400, str(error), reason="alpha")
        if isinstance(error, HTTPException):
            return problem_response(error.status_code, error.detail, headers=error.headers)
        if not isinstance(error, BatchFailed):  # which the batcher has logged
            logger.error("a request failed", exc_info=error)
        return problem_response(500, "the daemon failed on this request; its log says more")
