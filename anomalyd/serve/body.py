"""Request bodies: bounded in size, in time and all together; then split into images."""

from __future__ import annotations

import asyncio

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive, Scope

from anomalyd.serve.problems import ClientGone, Problem

__all__ = ["Bodies", "Intake", "boundary_of", "header", "split_multipart"]

# A client reads no answer before it has sent its body, and closing on it would reset the
# connection: a body that is refused is read on and thrown away, up to this many times the limit.
PATIENCE = 4


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header called `name` (lower case)."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


class Bodies:
    """The request bodies that are held in memory at one time.

    Args:
        limit: bytes of one body.
        total: bytes of all bodies together.
        timeout: time for one body to arrive, seconds.
    """

    def __init__(self, limit: int, total: int, timeout: float) -> None:
        self.limit = limit
        self.total = total
        self.timeout = timeout
        self.held = 0

    def intake(self) -> Intake:
        """A block within which one body is read and used."""
        return Intake(self)


class Intake:
    """One body, counted as held until the `with` block ends."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._held = 0

    def __enter__(self) -> Intake:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._release()

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request.

        Raises:
            Problem: 413 larger than the limit, 408 too slow, 503 no room at present.
            ClientGone: the connection was closed before the body was there.
        """
        if header(scope, b"expect") and _declared(scope) > self._bodies.limit:
            raise self._too_large()  # the client waits for leave to send, and gets none
        try:
            # For the whole body: a trickle of bytes does not prolong it.
            async with asyncio.timeout(self._bodies.timeout):
                return await self._collect(receive)
        except TimeoutError:
            detail = f"the body did not arrive within {self._bodies.timeout:g} s; send it faster"
            raise Problem(408, "slow_body", detail, close=True) from None

    async def _collect(self, receive: Receive) -> bytes:
        limit = self._bodies.limit
        chunks: list[bytes] = []
        size = 0
        more = True
        refused: Problem | None = None
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > PATIENCE * limit:
                raise self._too_large(close=True)
            if size > limit or refused is not None:
                continue
            try:
                self.hold(len(chunk))
                chunks.append(chunk)
            except Problem as problem:
                refused = problem
                self._release()
                chunks.clear()
        if size > limit:
            raise self._too_large()
        if refused is not None:
            raise refused
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def hold(self, size: int) -> None:
        """Count so many bytes more.

        Raises:
            Problem: 503 no room at present.
        """
        bodies = self._bodies
        if bodies.held + size > bodies.total:
            detail = f"{bodies.held} bytes of requests are held already; come again"
            raise Problem(503, "queue_full", detail)
        bodies.held += size
        self._held += size

    def _release(self) -> None:
        self._bodies.held -= self._held
        self._held = 0

    def _too_large(self, *, close: bool = False) -> Problem:
        limit = self._bodies.limit
        detail = f"the body is larger than {limit} bytes; send a smaller image, or fewer"
        return Problem(413, "too_many_bytes", detail, close=close)


def _declared(scope: Scope) -> int:
    length = header(scope, b"content-length")
    return int(length) if length is not None and length.isdigit() else 0


def boundary_of(content_type: bytes | None) -> bytes | None:
    """The boundary of a multipart body; None for every other type.

    Raises:
        Problem: 400 multipart without a boundary.
    """
    if content_type is None or content_type[:10].lower() != b"multipart/":
        return None
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Problem(400, "multipart", "multipart without a boundary in its Content-Type")
    return boundary


def split_multipart(body: bytes, boundary: bytes, most: int) -> list[bytes]:
    """The content of every part, be it a file or a field, in order.

    Raises:
        Problem: 400 not well-formed, 413 more than `most` parts.
    """
    parts: list[bytes] = []
    pieces: list[bytes] = []
    ended = False

    def on_part_data(data: bytes, start: int, end: int) -> None:
        pieces.append(data[start:end])

    def on_part_end() -> None:
        if len(parts) == most:
            detail = f"more than {most} images in one request; send several requests"
            raise Problem(413, "too_many_images", detail)
        parts.append(b"".join(pieces))
        pieces.clear()

    def on_end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {"on_part_data": on_part_data, "on_part_end": on_part_end, "on_end": on_end},
        )
        parser.write(body)
    except FormParserError as error:
        raise Problem(400, "multipart", f"not well-formed multipart: {error}") from error
    if not ended:
        raise Problem(400, "multipart", "the multipart body ends before its last boundary")
    return parts
