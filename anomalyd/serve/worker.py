"""One of several processes that serve on one socket, as the supervisor tells it.

Started as: python -m anomalyd.serve.worker LISTENER CONTROL, both the numbers of open sockets.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import prometheus_client

from anomalyd.config import from_table
from anomalyd.errors import AnomalydError
from anomalyd.serve import logs, merging
from anomalyd.serve.access import Access
from anomalyd.serve.control import check_allowed, in_thread
from anomalyd.serve.link import Gone, Link
from anomalyd.serve.metrics import Metrics, Samples
from anomalyd.serve.models import Key, Models
from anomalyd.serve.problems import Problem
from anomalyd.serve.server import serve
from anomalyd.serve.settings import ServeSettings

__all__ = ["main"]


class Remote:
    """The repository and the metrics, which the supervisor owns."""

    def __init__(
        self,
        settings: ServeSettings,
        models: Models,
        access: Access | None,
        connection: socket.socket,
    ) -> None:
        self._settings = settings
        self._models = models
        self._access = access
        self._connection = connection
        self._link = Link(self._handle)
        self._rows: list[dict[str, Any]] = []
        self._served = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def started(self) -> None:
        self._running = asyncio.ensure_future(self._run())
        await self._served.wait()

    async def _run(self) -> None:
        await self._link.run(self._connection)
        os.kill(os.getpid(), signal.SIGTERM)  # an orphan serves nobody

    async def refresh(self, *, settle: bool = False) -> None:
        """The supervisor looks; whoever signals a worker means him."""

    def index(self) -> list[dict[str, Any]]:
        return self._rows

    async def load(self, name: str, version: str | None) -> None:
        await self._change("load", name, version)

    async def unload(self, name: str, version: str | None) -> None:
        await self._change("unload", name, version)

    async def samples(self) -> Samples:
        return merging.samples(await self._collected())

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        return merging.exposition(await self._collected(), accept)

    async def _change(self, operation: str, name: str, version: str | None) -> None:
        check_allowed(self._settings)
        await self._asked(operation, name=name, version=version)

    async def _collected(self) -> list[merging.Family]:
        found: list[merging.Family] = await self._asked("collect")
        return found

    async def _asked(self, operation: str, **arguments: Any) -> Any:
        try:
            return await self._link.ask(operation, **arguments)
        except Gone:
            raise Problem(503, "loading", "the daemon is shutting down") from None

    async def _handle(self, operation: str, given: dict[str, Any]) -> Any:
        models = self._models
        match operation:
            case "load":
                key, path = Key(*given["key"]), Path(given["path"])
                await in_thread(lambda: models.load(key, path, self._settings))
            case "discard":
                models.discard(Key(*given["key"]))
            case "publish":
                keys = [Key(*key) for key in given["keys"]]
                models.publish(keys, given["current"], given["leaving"])
            case "state":
                models.started, models.healthy = given["started"], given["healthy"]
                models.first = given["first"]  # a worker that comes late has not seen the start
                self._rows = given["rows"]
                if models.started:
                    self._served.set()
            case "collect":
                return merging.families(models.metrics.registry)
            case "tokens" if self._access is not None:
                self._access.reload()
        return None


def main(listener: int, control: int) -> None:
    """Serve on an open socket until told to stop."""
    connection = socket.socket(fileno=control)
    with connection.makefile("rb", buffering=0) as stream:
        # Not buffered: what comes after the first line is the link's.
        given = msgspec.json.decode(stream.readline())
    connection.setblocking(False)
    settings = from_table(ServeSettings, given["settings"], "supervisor")
    logs.configure(as_json=settings.log_format == "json", requests=settings.log_requests)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    access = None if settings.tokens is None else Access(settings.tokens)
    models = Models(default=settings.default_model, metrics=Metrics())
    owner = Remote(settings, models, access, connection)
    with socket.socket(fileno=listener) as shared:
        serve(settings, shared, models, owner, access, early=given["early"], announce=False)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except AnomalydError as error:
        print(f"anomalyd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
