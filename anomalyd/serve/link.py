"""Questions and answers between the supervisor and a worker: a line of JSON each, both ways."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import msgspec

from anomalyd.errors import AnomalydError, BundleError
from anomalyd.serve.problems import Problem

__all__ = ["Gone", "Link"]

logger = logging.getLogger(__name__)

LONGEST = 64 << 20  # bytes of a line

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Gone(Exception):
    """The other side is there no more."""


class Link:
    """One end of a connection.

    Args:
        handle: answers what the other side asks: by operation and arguments.
    """

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._serial = count()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, connection: socket.socket) -> None:
        """Answer and take answers until the other side is gone."""
        reader, self._writer = await asyncio.open_connection(sock=connection, limit=LONGEST)
        try:
            while line := await reader.readline():
                message = msgspec.json.decode(line)
                if "reply" in message:
                    self._answered(message)
                else:
                    task = asyncio.ensure_future(self._answer(message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (ConnectionError, ValueError):
            pass
        finally:
            self._writer.close()
            self._writer = None
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(Gone())

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """What the other side answers.

        Raises:
            Gone: it is there no more.
            Problem, AnomalydError: what it raised.
        """
        serial = next(self._serial)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[serial] = future
        try:
            self._send({"ask": operation, "serial": serial, "with": arguments})
            return await future
        finally:
            del self._asked[serial]

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is None:
            raise Gone
        self._writer.write(msgspec.json.encode(message) + b"\n")

    def _answered(self, message: dict[str, Any]) -> None:
        future = self._asked.get(message["reply"])
        if future is None or future.done():
            return
        match message.get("error"):
            case None:
                future.set_result(message.get("value"))
            case {"status": status, "reason": reason, "detail": detail}:
                future.set_exception(Problem(status, reason, detail))
            case detail:
                future.set_exception(BundleError(str(detail)))

    async def _answer(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"reply": message["serial"]}
        try:
            answer["value"] = await self._handle(message["ask"], message["with"])
        except Problem as error:
            answer["error"] = {
                "status": error.status,
                "reason": error.reason,
                "detail": str(error),
            }
        except (AnomalydError, Gone) as error:
            answer["error"] = str(error) or "the other side is gone"
        except Exception as error:  # an answer all the same: who asked waits for it
            logger.exception("%s failed", message["ask"])
            answer["error"] = repr(error)
        try:
            self._send(answer)
        except Gone:
            return
