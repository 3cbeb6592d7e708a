"""The daemon: from settings to a process that serves until it is told to stop.

start:    listen -> verify, load and warm every bundle -> ready
SIGHUP:   read tokens and bundles again
SIGTERM:  not ready -> drain delay -> stop listening -> finish what is under way -> flush -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httptools
import prometheus_client
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from anomalyd.errors import AnomalydError, UsageError
from anomalyd.serve import logs
from anomalyd.serve.access import ADMIN, Access
from anomalyd.serve.app import create_app
from anomalyd.serve.control import Control, Local, left_running
from anomalyd.serve.events import Events
from anomalyd.serve.memory import give_back
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Models
from anomalyd.serve.notify import inherited, notify, reloading, watchdog_seconds
from anomalyd.serve.scoring import Scorer
from anomalyd.serve.settings import ServeSettings

if TYPE_CHECKING:
    from pathlib import Path

    from anomalyd.serve.rpc import Rpc

__all__ = ["Owner", "bind", "check", "main", "serve"]

logger = logging.getLogger(__name__)

BACKLOG = 1024
MOST_HEAD_BYTES = 64 << 10
REPORT_SECONDS = 0.5  # until the health service of gRPC says what /readyz says
LINGER_SECONDS = 1.0  # for requests that are on their way on connections about to be closed
FLUSH_SECONDS = 5.0


class Owner(Control, Protocol):
    """Who owns what is served, as the process that serves it sees him."""

    async def started(self) -> None:
        """Return once everything is loaded.

        Raises:
            AnomalydError: why that cannot be.
        """

    async def refresh(self, *, settle: bool = False) -> None:
        """Serve what is on disk now."""


def main(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        AnomalydError: an address that cannot be had, or bundles that cannot be loaded.
        UsageError: settings that contradict one another.
    """
    logs.configure(as_json=settings.log_format == "json", requests=settings.log_requests)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    access = check(settings)
    if access is None and not _loopback(settings.host):
        logger.warning("--host %s without --tokens: whoever reaches it may ask", settings.host)
    handed = inherited()
    with handed or bind(settings.host, settings.port) as listener:
        if handed is None:
            listen(listener)
        if settings.workers > 1:
            asyncio.run(_supervise(settings, listener))
            return
        models = Models(default=settings.default_model, metrics=Metrics())
        serve(
            settings,
            listener,
            models,
            Local(settings, models),
            access,
            # Who shares a socket must not let anybody in whom others could serve already.
            early=handed is None,
        )


def check(settings: ServeSettings) -> Access | None:
    """Refuse settings that contradict one another; the tokens, where there are any.

    Raises:
        UsageError: what is wrong and how to mend it.
    """
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise UsageError("--tls-cert and --tls-key: give both, or none for plain HTTP")
    if settings.tls_cert is not None and settings.tls_key is not None:
        _check_pair(settings.tls_cert, settings.tls_key)
    if settings.max_body_bytes > settings.max_inflight_bytes:
        raise UsageError(
            f"--max-body-bytes {settings.max_body_bytes}: a body must fit into "
            f"--max-inflight-bytes, which is {settings.max_inflight_bytes}; raise that as well"
        )
    access = None if settings.tokens is None else Access(settings.tokens)
    if settings.grpc_port is not None:
        from anomalyd.serve import rpc  # noqa: F401  # says which extra is missing
    if settings.grpc_port == 0 and settings.workers > 1:
        raise UsageError("--grpc-port 0: several workers must share one port; name it")
    if settings.repository_api and (access is None or not access.grants(ADMIN)):
        raise UsageError(
            "--repository-api: whoever may load models needs a token; give --tokens a file "
            "with one of the scope admin"
        )
    return access


def _check_pair(cert: Path, key: Path) -> None:
    for flag, file in (("--tls-cert", cert), ("--tls-key", key)):
        if not os.access(file, os.R_OK):
            raise UsageError(f"{flag} {file}: no such file, or it may not be read")
    try:
        # The empty password: who asked for one would wait at a terminal that is not there.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except OSError as error:
        raise UsageError(
            f"--tls-cert {cert}, --tls-key {key}: no certificate and its unencrypted key, in PEM "
            f"({error.strerror or error})"
        ) from None


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


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
    except (OSError, UnicodeError) as error:  # the latter of what no name can look like
        why = error.strerror if isinstance(error, OSError) else "no host name"
        raise AnomalydError(f"--host {host}: {why}; name an address here") from error
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


def serve(
    settings: ServeSettings,
    listener: socket.socket,
    models: Models,
    owner: Owner,
    access: Access | None,
    *,
    early: bool,
    announce: bool = True,
) -> None:
    """Serve on a listening socket until SIGTERM or SIGINT.

    Args:
        settings: the daemon's.
        listener: the socket.
        models: what requests see; filled by the owner.
        owner: who loads them.
        access: who may do what.
        early: let clients in before the models are loaded, to answer probes.
        announce: say where, and tell the service manager.

    Raises:
        AnomalydError: why nothing can be served.
    """
    give_back()
    events = None if settings.events is None else Events(settings.events, models.metrics)
    scorer = Scorer(settings, models.metrics, events)
    daemon = _Daemon(settings, models, owner, access, scorer, announce)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        server = runner.run(_run(daemon, listener, early=early))
    models.close()
    if events is not None:
        events.close(FLUSH_SECONDS)
    failure = server.failure
    if left_running():
        # A bundle is being loaded, in a thread that nothing can stop and no end of the
        # interpreter survives.
        if failure is not None:
            print(f"anomalyd: {failure}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(0 if failure is None else failure.exit_code)
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class _Daemon:
    settings: ServeSettings
    models: Models
    owner: Owner
    access: Access | None
    scorer: Scorer
    announce: bool


async def _run(daemon: _Daemon, listener: socket.socket, *, early: bool) -> _Server:
    settings = daemon.settings
    app = create_app(
        daemon.models, settings, daemon.owner, scorer=daemon.scorer, access=daemon.access
    )
    config = uvicorn.Config(
        app,
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
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    server = _Server(config, daemon, early=early)
    await server.serve([listener])
    return server


class _Server(uvicorn.Server):
    """A uvicorn server that says "not ready" before it stops, and then exits with 0.

    Attributes:
        failure: why nothing could be served.
    """

    def __init__(self, config: uvicorn.Config, daemon: _Daemon, *, early: bool) -> None:
        super().__init__(config)
        self.failure: AnomalydError | None = None
        self._daemon = daemon
        self._early = early
        self._rpc: Rpc | None = None
        self._told = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._early:
            await super().startup(sockets)
        loading = self._background(self._load())
        stopping = self._background(self._told_to_stop())
        if not self._early:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if self.should_exit:
                return
            await super().startup(sockets)
            self._ready(sockets)
        else:
            loading.add_done_callback(lambda _: self._ready(sockets))
        await self._start_rpc()
        seconds = watchdog_seconds()
        if seconds is not None:
            self._background(self._every(seconds, self._watchdog))

    async def _start_rpc(self) -> None:
        daemon = self._daemon
        if daemon.settings.grpc_port is None:
            return
        from anomalyd.serve.rpc import Rpc

        self._rpc = Rpc(daemon.models, daemon.scorer, daemon.owner, daemon.settings, daemon.access)
        try:
            port = await self._rpc.start()
        except AnomalydError as error:
            self.failure = error
            self.should_exit = True
        else:
            logger.info("gRPC", extra={"fields": {"port": port}})
            self._background(self._every(REPORT_SECONDS, self._rpc.report))

    async def _load(self) -> None:
        try:
            await self._daemon.owner.started()
        except AnomalydError as error:
            self.failure = error
            self.should_exit = True
        except Exception as error:
            logger.exception("the models cannot be loaded")
            self.failure = AnomalydError(f"the models cannot be loaded: {error!r}")
            self.should_exit = True

    def _ready(self, sockets: list[socket.socket] | None) -> None:
        if self.should_exit or self._told.is_set():
            return
        self._daemon.models.ready = True
        if not self._daemon.announce:
            return
        for listener in sockets or []:
            models = self._daemon.models
            _announce(self._daemon.settings, listener, models.by_name, models.default)
        notify("READY=1", f"STATUS=serving {self._daemon.models.names}")
        if self._daemon.settings.watch:
            self._background(self._every(self._daemon.settings.watch, self._look))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.gather(self._stop_http(sockets), self._stop_rpc())
        for task in self._tasks:
            task.cancel()

    async def _stop_http(self, sockets: list[socket.socket] | None) -> None:
        # Every answer now says "close", so whoever is at work goes away by himself.
        waited = 0.0
        while self.server_state.connections and waited < LINGER_SECONDS and not self.force_exit:
            await asyncio.sleep(0.05)
            waited += 0.05
        await super().shutdown(sockets)

    async def _stop_rpc(self) -> None:
        if self._rpc is not None:
            await self._rpc.stop(self._daemon.settings.drain_timeout, lambda: self.force_exit)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, and the process would die of it.
        handlers: dict[int, Callable[[], None]] = {signal.SIGTERM: self._stop}
        handlers[signal.SIGINT] = self._stop
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._reload
        loop = asyncio.get_running_loop()

        def caught(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(handlers[number])

        before = {number: signal.signal(number, caught) for number in handlers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        if self._told.is_set():
            self.should_exit = self.force_exit = True  # asked for a second time: now
            return
        self._told.set()

    async def _told_to_stop(self) -> None:
        await self._told.wait()
        if self._daemon.announce:
            notify("STOPPING=1")
        models = self._daemon.models
        models.ready = False
        if models.started:
            models.stopping = True
            delay = self._daemon.settings.drain_delay
            asyncio.get_running_loop().call_later(delay, setattr, self, "should_exit", True)
        else:  # nobody has been sent here yet
            self.should_exit = True

    def _reload(self) -> None:
        self._background(self._reloaded())

    async def _reloaded(self) -> None:
        reloading()
        if self._daemon.access is not None:
            try:
                self._daemon.access.reload()
            except UsageError as error:
                logger.error("the tokens stay as they are: %s", error)
        await self._daemon.owner.refresh()
        notify("READY=1", f"STATUS=serving {self._daemon.models.names}")

    async def _look(self) -> None:
        await self._daemon.owner.refresh(settle=True)

    async def _watchdog(self) -> None:
        notify("WATCHDOG=1")

    async def _every(self, seconds: float, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            await act()

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the daemon ended", exc_info=error)


def _protocol(head_timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, with a bound on the time and the bytes of a request's head.

    Who asks for another protocol (`Upgrade: h2c`) is answered in this one, as RFC 9110, 7.8
    allows. The parser would take his body for the next request; so another one is given his
    head without that wish, and then what follows.
    """

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
            self._unset_keepalive_if_required()
            try:
                self._feed(data)
            except httptools.HttpParserError:
                said = "Invalid HTTP request received."
                self.logger.warning(said)
                self.send_400_response(said)
                return
            if self._head_timer is not None:
                self._head_bytes += len(data)
                if self._head_bytes > MOST_HEAD_BYTES:
                    self._cut_off()

        def on_message_begin(self) -> None:
            self._expect_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_done()
            if not self.parser.should_upgrade():
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def _feed(self, data: bytes) -> None:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    head = self._plain_head()
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    self.parser.feed_data(head)
                    data = data[upgrade.args[0] :]

        def _plain_head(self) -> bytes:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                raise httptools.HttpParserError("CONNECT is another protocol by itself")
            lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
            lines += [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
            return b"\r\n".join([*lines, b"", b""])

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


async def _supervise(settings: ServeSettings, listener: socket.socket) -> None:
    from anomalyd.serve.supervisor import Supervisor

    def announce(names: Collection[str]) -> None:
        only = next(iter(names)) if len(names) == 1 else None
        _announce(settings, listener, names, settings.default_model or only)

    await Supervisor(settings, listener, announce).run()


def _announce(
    settings: ServeSettings, listener: socket.socket, names: Collection[str], default: str | None
) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    where = f"{'http' if settings.tls_cert is None else 'https'}://{shown}:{port}"
    if settings.log_format == "json":
        fields = {"models": list(names), "url": where, "default": default}
        logger.info("serving", extra={"fields": fields})
        return
    said = f"serving {', '.join(names)} on {where}" + (f", default {default}" if default else "")
    print(said, file=sys.stderr, flush=True)
