"""The log: lines for people, or JSON for machines, each with the request that it is about."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import count
from typing import NamedTuple

__all__ = ["Identity", "configure", "identified", "log_request"]

access_log = logging.getLogger("anomalyd.access")

# What a client may call its request; anything else would let it write into the log.
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_prefix = os.urandom(6).hex()
_serial = count(1)


class Identity(NamedTuple):
    """Which request something is about.

    Attributes:
        request_id: the client's `X-Request-ID`, or one made here.
        trace_id, span_id: of the caller's span, by `traceparent`.
    """

    request_id: str
    trace_id: str | None = None
    span_id: str | None = None

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> Identity:
        """The identity that headers (names in lower case) give a request.

        A `traceparent` that is not as W3C Trace Context says is as good as none.
        """
        request_id, trace_id, span_id = None, None, None
        for name, value in headers:
            if name == b"x-request-id":
                if REQUEST_ID.fullmatch(value):
                    request_id = value.decode("ascii")
            elif name == b"traceparent":
                trace_id, span_id = _trace(value)
        if request_id is None:
            request_id = f"{_prefix}-{next(_serial):x}"
        return cls(request_id, trace_id, span_id)

    @property
    def encoded(self) -> bytes:
        return self.request_id.encode("ascii")


identified: ContextVar[Identity | None] = ContextVar("identified", default=None)


def configure(*, as_json: bool, requests: bool) -> None:
    """Send the log to stderr.

    Args:
        as_json: one JSON object a line.
        requests: a line for every request, too.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if as_json else _Text("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    if requests:
        access_log.setLevel(logging.INFO)
    if as_json:
        logging.getLogger("anomalyd.serve").setLevel(logging.INFO)


def log_request(route: str, code: int | str, seconds: float) -> None:
    """A line for a request that is over, of which the rest is known here."""
    fields = {"route": route, "code": code, "seconds": round(seconds, 6)}
    access_log.info("request", extra={"fields": fields})


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        identity = identified.get()
        if identity is not None:
            fields["request_id"] = identity.request_id
        said = super().formatMessage(record)
        return said + "".join(f" {name}={value}" for name, value in fields.items())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        identity = identified.get()
        if identity is not None:
            line["request_id"] = identity.request_id
            if identity.trace_id is not None and identity.span_id is not None:
                line |= {"trace_id": identity.trace_id, "span_id": identity.span_id}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def _trace(value: bytes) -> tuple[str | None, str | None]:
    found = TRACEPARENT.fullmatch(value)
    if found is None:
        return None, None
    version, trace_id, span_id, more = found.groups()
    # Version ff is forbidden, version 00 has no further fields, all zeros mean none.
    bad = version == b"ff" or (version == b"00" and more) or not (trace_id.strip(b"0"))
    if bad or not span_id.strip(b"0"):
        return None, None
    return trace_id.decode(), span_id.decode()
