"""`--workers N`: one socket, N processes that serve on it, and one that owns all they share.

    supervisor   bundles on disk, which of them are served, the metrics put together, signals
    workers      each the models, a share of the CPUs and of the limits, and the socket

A change of what is served is made ready in every worker before any of them takes it. A worker
that ends, or answers nothing for half a minute and is ended, is started again, ever later; until
it serves, nobody says "ready". It reads what is on disk, so the others take that, too, before it
serves beside them; where there are no others, it serves what is good of it. What it counted until
the last scrape stays counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import AnomalydError, BundleError, UsageError
from anomalyd.serve import merging
from anomalyd.serve.control import in_thread
from anomalyd.serve.link import Gone, Link
from anomalyd.serve.models import Key
from anomalyd.serve.notify import notify, reloading, watchdog_seconds
from anomalyd.serve.repository import Repository
from anomalyd.serve.settings import ServeSettings

__all__ = ["Supervisor", "share"]

logger = logging.getLogger(__name__)

COLLECT_SECONDS = 2.0  # a worker that does not answer in time is told by what it last said
PING_SECONDS, HUNG_SECONDS = 5.0, 30.0  # a worker that answers nothing for so long is ended
RETRY_SECONDS = 5.0  # until a worker tries again to load what it could not
LAST_SECONDS = 10.0  # beyond the drain that was asked for, until a worker is ended
BACK_OFF = (0.2, 1.0, 5.0, 15.0, 30.0)  # seconds
FORGIVEN = 60.0  # seconds of service after which a worker's earlier ends are forgotten
MINE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS")


class Worker:
    """One process, from the supervisor's side."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.last: list[merging.Family] = []


class Supervisor:
    """Starts the workers, tells them what to serve, and starts them again.

    Args:
        settings: the daemon's.
        listener: the listening socket.
        announce: called once all workers serve, with the models' names.
    """

    def __init__(
        self,
        settings: ServeSettings,
        listener: socket.socket,
        announce: Callable[[Collection[str]], None],
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._announce = announce
        self._workers: list[Worker] = []  # those that serve what the table says
        self._coming: list[Worker] = []  # the one that everything is loaded into, where none does
        self._processes: set[asyncio.subprocess.Process] = set()
        self._table: dict[Key, Path] = {}
        self._staged: dict[Key, Path] = {}
        self._current: dict[str, str] = {}
        self._first: str | None = None  # was served alone at the start
        self._leaving: list[str] = []
        self._past: list[merging.Family] = []
        self._loads = {"success": 0, "failure": 0}
        self._started = False
        self._failure: AnomalydError | None = None
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._changes = asyncio.Lock()
        self._repository = Repository(settings, self, loaded=self._loaded)

    async def run(self) -> None:
        """Supervise until SIGTERM or SIGINT.

        Raises:
            AnomalydError: bundles that cannot be loaded at the start, workers that cannot start.
        """
        with self._signals():
            tasks = [self._keep() for _ in range(self._settings.workers)]
            keepers = [asyncio.ensure_future(task) for task in tasks]
            beating = asyncio.ensure_future(self._beat())
            while len(self._workers) < len(keepers) and not self._stopping.is_set():
                await asyncio.sleep(0.01)
            try:
                await self._until_stopped(self._changing(self._repository.start))
                if not self._stopping.is_set():
                    self._check_default()
                    self._first = next(iter(self._current)) if len(self._current) == 1 else None
                    self._started = True
                    await self._tell_state()
                    self._announce(sorted(self._current))
                    notify("READY=1")
                    await self._until_stopped(self._watch())
            finally:
                notify("STOPPING=1")
                self._stopping.set()
                self._signal_all(signal.SIGTERM)
                drain = self._settings.drain_delay + self._settings.drain_timeout
                await asyncio.wait(keepers, timeout=drain + LAST_SECONDS)
                self._signal_all(signal.SIGKILL)
                await asyncio.gather(*keepers)
                beating.cancel()
        if self._failure is not None:
            raise self._failure

    async def _beat(self) -> None:
        """Tell the service manager's watchdog that the event loop turns."""
        while (seconds := watchdog_seconds()) is not None:
            notify("WATCHDOG=1")
            await asyncio.sleep(seconds)

    # What the repository tells; from its own thread

    def load(self, key: Key, path: Path, settings: ServeSettings) -> None:
        self._from_thread(self._load(key, path))
        self._staged[key] = path

    def publish(
        self, keys: Collection[Key], current: Mapping[str, str], leaving: Collection[str] = ()
    ) -> None:
        staged, self._staged = self._staged, {}
        self._table = {key: staged.get(key) or self._table[key] for key in keys}
        self._current, self._leaving = dict(current), list(leaving)
        self._past = merging.of_versions(self._past, self._table)
        self._from_thread(self._publish())

    def _from_thread(self, work: Coroutine[Any, Any, None]) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result()

    async def _load(self, key: Key, path: Path) -> None:
        workers = self._workers or self._coming
        if not workers:
            raise BundleError(f"bundle {path}: no worker is there to load it")
        results = await asyncio.gather(
            *(worker.link.ask("load", key=key, path=str(path)) for worker in workers),
            return_exceptions=True,
        )
        if any(isinstance(result, BaseException) for result in results):
            await self._ask_all("discard", key=key)
        for result in results:
            if isinstance(result, Gone):
                raise BundleError(f"bundle {path}: a worker ended while it was loading it")
            if isinstance(result, BaseException):
                raise result

    async def _publish(self) -> None:
        await self._ask_all("publish", **self._published())
        await self._tell_state()

    def _published(self) -> dict[str, Any]:
        return {
            "keys": list(self._table),
            "current": self._current,
            "leaving": self._leaving,
        }

    async def _tell_state(self) -> None:
        await self._ask_all(
            "state",
            started=self._started,
            healthy=len(self._workers) == self._settings.workers,
            first=self._first,
            rows=self._repository.index(),
        )

    async def _ask_all(self, operation: str, **arguments: Any) -> None:
        async def one(worker: Worker) -> None:
            with contextlib.suppress(Gone):  # who is gone is told when he is started again
                await worker.link.ask(operation, **arguments)

        await asyncio.gather(*(one(worker) for worker in self._workers))

    # The workers

    async def _keep(self) -> None:
        """Start a worker, and again whenever it ends or could not be started."""
        ends = 0
        while not self._stopping.is_set():
            started = self._loop.time()
            try:
                end = f"ended with code {await self._one()}"
            except (OSError, RuntimeError) as error:
                # No descriptor, memory, process or thread is left; there may be one later.
                end = f"cannot be started: {error}"
            if self._stopping.is_set():
                return
            if not self._started:
                self._failure = AnomalydError(
                    f"the workers cannot serve: one {end}; its own lines, or ulimit -a, say why"
                )
                self._stopping.set()
                return
            ends = 0 if self._loop.time() - started > FORGIVEN else ends
            pause = BACK_OFF[min(ends, len(BACK_OFF) - 1)]
            ends += 1
            logger.error("a worker %s; it is started again in %g s", end, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _one(self) -> int:
        """Start a worker and stay with it until it ends; its exit code.

        Raises:
            OSError, RuntimeError: it cannot be started for want of something.
        """
        ours, theirs = socket.socketpair()
        worker = Worker(Link(self._handle))
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.callback(ours.close)
            environment = {name: v for name, v in os.environ.items() if name not in MINE}
            fds = (self._listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # or whatever lies in the current folder could be imported
                "-m",
                "anomalyd.serve.worker",
                *map(str, fds),
                pass_fds=fds,
                env=environment,
                start_new_session=True,  # a terminal's ^C is the supervisor's to pass on
            )
            unless_started.pop_all()
        self._processes.add(process)
        if self._stopping.is_set():
            self._signal_all(signal.SIGTERM)
        first = {"settings": share(self._settings), "early": not self._started}
        with contextlib.suppress(OSError):  # who has ended already reads nothing
            ours.sendall(msgspec.json.encode(first) + b"\n")
        ours.setblocking(False)
        linked = asyncio.ensure_future(worker.link.run(ours))
        tasks = [
            linked,
            asyncio.ensure_future(self._begin(worker)),
            asyncio.ensure_future(self._ping(worker, process)),
        ]
        code = await process.wait()
        self._processes.discard(process)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if worker in self._workers:
            self._workers.remove(worker)
        self._past = merging.merged([self._past, merging.counted(worker.last)])
        if self._started and not self._stopping.is_set():
            await self._tell_state()
        return code

    async def _begin(self, worker: Worker) -> None:
        """Bring a worker to what is served; it takes part from then on."""
        while True:
            await self._greet(worker)
            try:
                async with self._changes:
                    await self._load_all(worker)
                    if self._started:
                        await in_thread(self._repository.check_unchanged)
                        await worker.link.ask("publish", **self._published())
                    self._workers.append(worker)
                    if self._started:
                        await self._tell_state()
                    return
            except Gone:
                pass
            except (AnomalydError, OSError) as error:
                # The others serve what they loaded before.
                logger.error("a worker cannot serve: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _load_all(self, worker: Worker) -> None:
        """Load what is on disk now into a worker, and what is new of it into the others."""
        if self._started and not self._workers:
            self._coming = [worker]
            try:
                await in_thread(self._repository.restart)
            finally:
                self._coming = []
            return
        if self._started:
            await in_thread(self._repository.refresh)
        for key, path in self._table.items():
            await worker.link.ask("load", key=key, path=str(path))

    async def _greet(self, worker: Worker) -> None:
        """Wait for a worker's first answer; its start takes as long as it takes."""
        while True:
            try:
                await worker.link.ask("hello")
                return
            except Gone:
                await asyncio.sleep(0.05)

    async def _ping(self, worker: Worker, process: asyncio.subprocess.Process) -> None:
        """End a worker whose event loop has stopped; nobody else would, and all would wait."""
        await self._greet(worker)
        while True:
            await asyncio.sleep(PING_SECONDS)
            try:
                await asyncio.wait_for(worker.link.ask("hello"), HUNG_SECONDS)
            except TimeoutError:
                logger.error("a worker answers nothing for %g s and is ended", HUNG_SECONDS)
                process.kill()
            except Gone:
                return  # for good; and `wait_for` of Python 3.11 may have lost a cancellation here

    def _signal_all(self, number: int) -> None:
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    # What workers ask

    async def _handle(self, operation: str, given: dict[str, Any]) -> Any:
        match operation:
            case "collect":
                return await self._collect()
            case "load":
                await self._changing(
                    lambda: self._repository.load(given["name"], given["version"])
                )
            case "unload":
                await self._changing(
                    lambda: self._repository.unload(given["name"], given["version"])
                )
        return None

    async def _changing(self, change: Callable[[], None]) -> None:
        async with self._changes:  # no worker may be half way to what is served just now
            await in_thread(change)

    async def _collect(self) -> list[merging.Family]:
        async def one(worker: Worker) -> None:
            with contextlib.suppress(Gone, TimeoutError):
                worker.last = await asyncio.wait_for(worker.link.ask("collect"), COLLECT_SECONDS)

        await asyncio.gather(*(one(worker) for worker in self._workers))
        loads: merging.Family = {
            "name": "anomalyd_model_loads",
            "type": "counter",
            "documentation": "Bundles loaded: success, failure.",
            "samples": [
                ["anomalyd_model_loads_total", {"result": result}, float(count)]
                for result, count in self._loads.items()
            ],
        }
        alive: merging.Family = {
            "name": "anomalyd_workers",
            "type": "gauge",
            "documentation": "Processes that serve.",
            "samples": [["anomalyd_workers", {}, float(len(self._workers))]],
        }
        found = [self._past, *(worker.last for worker in self._workers), [loads, alive]]
        return merging.merged(found)

    def _loaded(self, good: bool) -> None:
        self._loads["success" if good else "failure"] += 1

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Any:
        handlers: dict[int, Callable[[], None]] = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGHUP: self._reload,
        }
        for number, handler in handlers.items():
            self._loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                self._loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self._stopping.is_set():  # asked for a second time: now
            self._signal_all(signal.SIGTERM)
            self._loop.call_later(LAST_SECONDS, self._signal_all, signal.SIGKILL)
        self._stopping.set()

    def _reload(self) -> None:
        self._reloading = asyncio.ensure_future(self._reloaded())

    async def _reloaded(self) -> None:
        reloading()
        for worker in list(self._workers):
            try:
                await worker.link.ask("tokens")
            except (AnomalydError, Gone) as error:
                logger.error("the tokens stay as they are: %s", error)
        await self._changing(self._repository.refresh)
        notify("READY=1")

    async def _watch(self) -> None:
        if not self._settings.watch:
            await self._stopping.wait()
        while not self._stopping.is_set():
            await asyncio.sleep(self._settings.watch)
            await self._changing(lambda: self._repository.refresh(settle=True))

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        if self._stopping.is_set():
            work.close()
            return
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if task.done():
            task.result()
        else:
            task.cancel()

    def _check_default(self) -> None:
        default = self._settings.default_model
        if default is not None and default not in self._current:
            there = ", ".join(sorted(self._current))
            raise UsageError(f"--default-model {default}: not served; there are {there}")


def share(settings: ServeSettings) -> dict[str, Any]:
    """A worker's settings: its share of the CPUs and of the limits, as plain values."""
    n = settings.workers
    mine = dataclasses.replace(
        settings,
        threads=settings.threads or max(1, available_cpus() // n),
        queue_images=max(settings.max_images, settings.queue_images // n),
        queue_bytes=max(1, settings.queue_bytes // n),
        # Beside a body there is room for what it unpacks to.
        max_inflight_bytes=max(2 * settings.max_body_bytes, settings.max_inflight_bytes // n),
    )
    plain = dataclasses.asdict(mine)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in plain.items()
        if value is not None
    }
