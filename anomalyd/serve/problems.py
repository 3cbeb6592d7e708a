"""RFC 9457 problem details: the one shape of every error outside `/v2`.

Reference: "Problem Details for HTTP APIs" (Nottingham, Wilde, Dalal, 2023),
https://www.rfc-editor.org/rfc/rfc9457
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

__all__ = ["ClientGone", "Problem", "problem_response"]

RETRY_SECONDS = 1


class Problem(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status.
        reason: a slug from a fixed set; programs may branch on it, metrics count it.
        close: the connection cannot go on, because its body was not read to the end.
    """

    def __init__(self, status: int, reason: str, detail: str, *, close: bool = False) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.close = close


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def problem_response(
    status: int,
    detail: str,
    *,
    reason: str | None = None,
    close: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Problem details as an HTTP answer; 503 carries Retry-After."""
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if reason is not None:
        content["reason"] = reason
    extra = dict(headers or {})
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        extra["Retry-After"] = str(RETRY_SECONDS)
    if close:
        extra["Connection"] = "close"
    return Response(
        msgspec.json.encode(content),
        status,
        headers=extra,
        media_type="application/problem+json",
    )
