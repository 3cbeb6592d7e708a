"""The HTTP surface.

POST /v1/score                  one image, or many as multipart, by the default model
POST /v1/models/NAME/score      by that model
GET  /v1/models                 what is served
     /v2/...                    the Open Inference Protocol, in rest.py
GET  /livez /readyz /startupz /metrics      for machines
GET  /openapi.json              this, described
GET  /                          a page to drop an image on
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalyd.detect.bayes import named_priors
from anomalyd.errors import ImageError
from anomalyd.serve.access import ADMIN, SCORE, Access
from anomalyd.serve.body import Bodies, boundary_of, header, split_multipart
from anomalyd.serve.control import Control
from anomalyd.serve.logs import Identity, identified, log_request
from anomalyd.serve.models import Model, Models
from anomalyd.serve.openapi import OPENAPI
from anomalyd.serve.problems import ClientGone, Problem, problem_response, told
from anomalyd.serve.rest import oip_routes
from anomalyd.serve.scoring import Asked, Scorer
from anomalyd.serve.settings import ServeSettings

__all__ = ["create_app"]

CLIENT_GONE = 499  # counted, never sent
# Asked by orchestrators and browsers, which have no token; they tell nothing of the models.
OPEN = {"/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready", "/"}
ADMINISTRATION = ("/v2/repository/models/",)
NUMBERS, SWITCHES, PRIOR = ("alpha", "label_alpha", "reject_cost"), ("heatmap", "explain"), "prior"
TRUTHS = {"1": True, "true": True, "0": False, "false": False}
CLOSE = (b"connection", b"close")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def create_app(
    models: Models,
    settings: ServeSettings,
    control: Control,
    *,
    scorer: Scorer | None = None,
    access: Access | None = None,
) -> ASGIApp:
    """The ASGI application that serves `models`.

    Args:
        models: what is served.
        settings: the daemon's.
        control: who owns the repository and the metrics.
        scorer: shared with gRPC where that is served as well.
        access: who may do what; None lets everybody in.
    """
    bodies = Bodies(settings.max_body_bytes, settings.max_inflight_bytes, settings.body_timeout)
    models.metrics.inflight_bytes.set_function(lambda: bodies.held)
    scorer = scorer or Scorer(settings, models.metrics)
    score = Score(models, scorer, bodies, settings)
    router = Router(
        [
            Route("/v1/score", score, methods=["POST"]),
            Route("/v1/models/{name}/score", score, methods=["POST"]),
            Route("/v1/models", partial(list_models, models)),
            Route("/livez", live),
            Route("/readyz", partial(ready, models)),
            Route("/startupz", partial(started, models)),
            Route("/metrics", partial(scrape, control)),
            Route("/openapi.json", openapi),
            Route("/", page),
            *oip_routes(models, scorer, bodies, control, settings),
        ],
        redirect_slashes=False,
    )
    return Edge(router, models, access, bodies, log_requests=settings.log_requests)


class Score:
    """Scores the images in a request's body; an ASGI application, because it is the hot path."""

    def __init__(
        self, models: Models, scorer: Scorer, bodies: Bodies, settings: ServeSettings
    ) -> None:
        self._models = models
        self._scorer = scorer
        self._bodies = bodies
        self._max_images = settings.max_images

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = self._models.find(scope["path_params"].get("name"))
        asked = parse_query(scope["query_string"], model)
        try:
            body = await self._score(model, asked, scope, receive)
        except Exception:
            model.metrics.failed.inc()
            raise
        model.metrics.answered()
        await _send_json(send, body)

    async def _score(self, model: Model, asked: Asked, scope: Scope, receive: Receive) -> bytes:
        with self._bodies.intake() as intake:
            images = self._split(scope, await intake.read(scope, receive))
            decoded = await self._scorer.decode(model, images)
            del images
        if len(decoded) == 1 and isinstance(decoded[0], ImageError):
            raise decoded[0]
        pixels = [image for image in decoded if not isinstance(image, ImageError)]
        scored = iter(await self._scorer.judge(model, pixels, asked, receive))
        started = time.perf_counter()
        results: list[dict[str, Any]] = []
        for index, image in enumerate(decoded):
            if isinstance(image, ImageError):
                results.append({"index": index, "error": str(image)})
                continue
            one = next(scored)
            result = {"index": index, **one.verdict.to_dict()}
            if asked.explain:
                result["explain"] = model.detector.explain(one.raw, one.row)
            if asked.heatmap and (png := await self._scorer.picture(image, one)) is not None:
                result["heatmap"] = base64.b64encode(png).decode("ascii")
            results.append(result)
        body = msgspec.json.encode(
            {"model": model.name, "version": model.version, "results": results}
        )
        model.metrics.render_seconds.observe(time.perf_counter() - started)
        return body

    def _split(self, scope: Scope, body: bytes) -> list[bytes]:
        boundary = boundary_of(header(scope, b"content-type"))
        if boundary is None:
            return [body]
        images = split_multipart(body, boundary, self._max_images)
        if not images:
            raise Problem(400, "empty", "the multipart body holds no image")
        return images


def parse_query(query: bytes, model: Model) -> Asked:
    """What a query asks of every image; `prior` may come several times, the others once.

    Raises:
        Problem: 400 an unknown or repeated parameter, a bad value, no map in this bundle.
        AlphaUnreachable: an alpha that the calibration set is too small for.
        UsageError: a level out of range, or of labels where the bundle gives none.
    """
    if not query:
        return Asked(model.detector.alpha(None))
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    priors = [value for name, value in pairs if name == PRIOR]
    pairs = [pair for pair in pairs if pair[0] != PRIOR]
    given = dict(pairs)
    for name in given:
        if name not in (*NUMBERS, *SWITCHES):
            there = ", ".join((*NUMBERS, PRIOR, *SWITCHES))
            detail = f"unknown parameter {name[:40]!r}; there are {there}"
            raise Problem(400, "parameter", detail)
    if len(given) < len(pairs):
        raise Problem(400, "parameter", "a parameter is given twice; give each once")
    alpha, label_alpha, reject_cost = (
        _number(name, given[name]) if name in given else None for name in NUMBERS
    )
    asked = Asked(
        model.detector.alpha(alpha),
        model.detector.labelling(label_alpha, reject_cost, named_priors(priors)),
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
    """Every configured model loaded, verified and warm, the workers alive, nobody stopping."""
    return _json({"ready": models.ready}, 200 if models.ready else 503)


async def started(models: Models, request: Request) -> Response:
    """Whether the first load is over; true from then on."""
    return _json({"started": models.started}, 200 if models.started else 503)


async def scrape(control: Control, request: Request) -> Response:
    body, content_type = await control.exposition(request.headers.get("accept", ""))
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
    """Around everything: who asks, under which id, how it ended and how long it took.

    Exceptions become answers; the label of a request is its route's pattern, never its path.
    """

    def __init__(
        self,
        router: Router,
        models: Models,
        access: Access | None,
        bodies: Bodies,
        *,
        log_requests: bool,
    ) -> None:
        self.router = router
        self._models = models
        self._metrics = models.metrics
        self._access = access
        self._bodies = bodies
        self._log_requests = log_requests
        # Looked up once: a label's child is found by hashing its values.
        self._counted: dict[tuple[str, int], Callable[[], None]] = {}
        self._timed: dict[str, Callable[[float], None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        identity = Identity.of(scope["headers"])
        identified.set(identity)
        code = 0
        given = dict(scope["headers"])
        # Who waits for leave to send his body and is refused may send it or the next request.
        unsent = b"expect" in given
        unread = b"transfer-encoding" in given or given.get(b"content-length", b"0") != b"0"

        async def receiving() -> Message:
            nonlocal unsent, unread
            unsent = False  # to receive is to give leave
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def noting(message: Message) -> None:
            nonlocal code
            if not code:
                headers = message["headers"]
                headers.append((b"x-request-id", identity.encoded))
                closing = CLOSE in headers
                if unread and not unsent and not closing:
                    await self._read_on(receiving)
                if (self._models.stopping or unread) and not closing:
                    headers.append(CLOSE)  # the next request is to go elsewhere
                code = message["status"]
            await send(message)

        scope["app"] = self  # the router then raises for what it does not find
        scope["request_id"] = identity.request_id
        try:
            if self._access is not None:
                self._admit(self._access, scope)
            await self.router(scope, receiving if unread else receive, noting)
        except ClientGone:
            code = CLIENT_GONE
        except asyncio.CancelledError:  # by the end of the daemon alone
            if not code:
                detail = "the daemon is shutting down; come again"
                problem = Problem(503, "loading", detail, close=True)
                await self._refuse(problem, scope, receive, noting)
        except Exception as error:  # the last line of defence: answer and go on
            if code:
                raise  # half an answer is out; the server closes the connection
            await self._refuse(error, scope, receive, noting)
        finally:
            matched = scope.get("route")
            route = "unmatched" if matched is None else matched.path
            seconds = time.perf_counter() - started
            code = code or CLIENT_GONE
            self._count(route, code, seconds)
            if self._log_requests:
                log_request(route, code, seconds)

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        problem = told(error, self._metrics)
        response = problem_response(problem, oip=scope["path"].startswith("/v2"))
        await response(scope, receive, send)

    async def _read_on(self, receive: Receive) -> None:
        """Throw away what nobody has read of a body, within the bounds of one that is read.

        Its client reads no answer before it has sent it, and where the connection is closed on
        it, it may see none. At the end of the daemon it is answered at once.
        """
        size = 0
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(self._bodies.timeout):
                while size <= self._bodies.limit:
                    message = await receive()
                    if not message.get("more_body", False):
                        return
                    size += len(message["body"])

    def _count(self, route: str, code: int, seconds: float) -> None:
        count = self._counted.get((route, code))
        if count is None:
            count = self._counted[route, code] = self._metrics.requests.labels(
                route, str(code)
            ).inc
            self._timed[route] = self._metrics.request_seconds.labels(route).observe
        count()
        self._timed[route](seconds)

    def _admit(self, access: Access, scope: Scope) -> None:
        path: str = scope["path"]
        if path not in OPEN:
            needed = ADMIN if path.startswith(ADMINISTRATION) else SCORE
            access.check(header(scope, b"authorization"), needed)
