"""Refusals, and the one shape of every error: RFC 9457 problem details, `{"error"}` on `/v2`.

Reference: "Problem Details for HTTP APIs" (Nottingham, Wilde, Dalal, 2023),
https://www.rfc-editor.org/rfc/rfc9457
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from anomalyd.errors import AlphaUnreachable, AnomalydError, ImageError, UsageError
from anomalyd.serve.batcher import BatchFailed, Expired, Late, QueueFull

if TYPE_CHECKING:
    from anomalyd.serve.metrics import Metrics

__all__ = ["ClientGone", "Problem", "as_problem", "problem_response", "told"]

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
REJECTIONS = {
    "queue_full": "queue_full",
    "deadline": "deadline",
    "loading": "not_ready",
    "slow_body": "slow_body",
    "too_many_bytes": "too_large",
    "too_many_images": "too_large",
    "too_many_pixels": "too_large",
    "unauthorized": "unauthorized",
    "forbidden": "unauthorized",
}


class Problem(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status.
        reason: a slug from a fixed set; programs may branch on it, metrics count it.
        close: the connection cannot go on, because its body was not read to the end.
        wait: seconds after which to come again, where that may help.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        reason: str | None,
        detail: str,
        *,
        close: bool = False,
        wait: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.close = close
        self.wait = wait
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def as_problem(error: Exception) -> Problem:
    """What a client is told of an error; 500 for those that are not its own."""
    match error:
        case Problem():
            return error
        case Late():
            detail = f"an image has to wait {error.wait:.2g} s for this model now; come again"
            return Problem(503, "deadline", detail, wait=error.wait)
        case QueueFull():
            detail = "as many images as may wait are waiting for this model; come again"
            return Problem(503, "queue_full", detail, wait=error.wait)
        case Expired():
            return Problem(503, "deadline", "the image waited too long for this model; come again")
        case ImageError():
            return Problem(error.status, error.reason, str(error))
        case AlphaUnreachable():
            return Problem(400, "alpha", str(error))
        case UsageError():
            return Problem(400, "parameter", str(error))
        case AnomalydError():
            return Problem(400, None, str(error))
        case HTTPException():
            return Problem(error.status_code, None, error.detail, headers=error.headers)
    return Problem(500, None, "the daemon failed on this request; its log says more")


def told(error: Exception, metrics: Metrics) -> Problem:
    """As `as_problem`; refusals are counted, and what is no client's fault is logged."""
    problem = as_problem(error)
    if problem.reason in REJECTIONS:
        metrics.rejected.labels(REJECTIONS[problem.reason]).inc()
    if problem.status == 500 and not isinstance(error, BatchFailed | HTTPException):
        logger.error("a request failed", exc_info=error)  # a batch's log the batcher wrote
    return problem


def problem_response(problem: Problem, *, oip: bool = False) -> Response:
    """The problem as an HTTP answer; 503 carries Retry-After.

    Args:
        problem: what is refused.
        oip: in the shape of the Open Inference Protocol.
    """
    status, detail = problem.status, str(problem)
    if oip:
        content: dict[str, Any] = {"error": detail}
    else:
        content = {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
        }
        if problem.reason is not None:
            content["reason"] = problem.reason
    extra = problem.headers
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        extra["Retry-After"] = str(max(RETRY_SECONDS, math.ceil(problem.wait)))
    if problem.close:
        extra["Connection"] = "close"
    media_type = "application/json" if oip else "application/problem+json"
    return Response(msgspec.json.encode(content), status, headers=extra, media_type=media_type)
