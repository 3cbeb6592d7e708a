"""The daemon: from settings to a process that serves until it is told to stop.

start:    bind -> verify, load and warm every bundle -> listen -> ready
SIGTERM:  not ready -> drain delay -> stop listening -> finish what is under way -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import prometheus_client
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from anomalyd.errors import AnomalydError
from anomalyd.serve.app import create_app
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Models, load_models
from anomalyd.serve.settings import ServeSettings

__all__ = ["main"]

logger = logging.getLogger(__name__)

BACKLOG = 1024
MOST_HEAD_BYTES = 64 << 10


def main(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        AnomalydError: an address that cannot be had, or what `load_models` refuses.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    # Bound before the models load, so that a port in use is known at once; nobody is let in yet.
    with bind(settings.host, settings.port) as listener:
        models = load_models(settings, Metrics())
        listen(listener)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(models, settings, listener))


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address, not listening yet.

    Raises:
        AnomalydError: the name does not resolve, the port is in use or not allowed.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise AnomalydError(f"--host {host}: {error.strerror}; name an address here") from error
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise AnomalydError(_unavailable(host, port, error)) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Let clients connect.

    Raises:
        AnomalydError: another process began to listen on the port in the meantime.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise AnomalydError(_unavailable(host, port, error)) from error


def _unavailable(host: str, port: int, error: OSError) -> str:
    return f"{host} port {port}: {error.strerror}; choose another with --port or --host"


async def _serve(models: Models, settings: ServeSettings, listener: socket.socket) -> None:
    config = uvicorn.Config(
        create_app(models, settings),
        http=_protocol(settings.body_timeout),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive,
        timeout_graceful_shutdown=settings.drain_timeout,
    )
    server = _Server(config, models, settings.drain_delay)
    try:
        await server.serve([listener])
    finally:
        models.close()


class _Server(uvicorn.Server):
    """A uvicorn server that says "not ready" before it stops, and then exits with 0."""

    def __init__(self, config: uvicorn.Config, models: Models, drain_delay: float) -> None:
        super().__init__(config)
        self._models = models
        self._drain_delay = drain_delay
        self._stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._models.ready = True
        for listener in sockets or []:
            _announce(self._models, listener)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, and the process would die of it.
        numbers = (signal.SIGTERM, signal.SIGINT)
        loop = asyncio.get_running_loop()

        def caught(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(self._stop, loop)

        before = {number: signal.signal(number, caught) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._stopping:
            self.should_exit = self.force_exit = True  # asked for a second time: now
            return
        self._stopping = True
        self._models.ready = False
        loop.call_later(self._drain_delay, setattr, self, "should_exit", True)


def _protocol(head_timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, with a bound on the time and the bytes of a request's head."""

    class Protocol(HttpToolsProtocol):
        _head_timer: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_done()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head_timer is not None:
                self._head_bytes += len(data)
                if self._head_bytes > MOST_HEAD_BYTES:
                    self._cut_off()

        def on_message_begin(self) -> None:
            self._expect_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_done()
            super().on_headers_complete()

        def _expect_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout, self._cut_off)

        def _head_done(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
                self._head_bytes = 0

        def _cut_off(self) -> None:
            self._head_done()
            self.transport.close()

    return Protocol


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _announce(models: Models, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    default = f", default {models.default}" if models.default else ""
    print(f"serving {models.names} on http://{shown}:{port}{default}", file=sys.stderr, flush=True)
