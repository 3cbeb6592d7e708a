"""What a request handler may ask of whoever owns the repository and the metrics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from anomalyd.serve.problems import Problem
from anomalyd.serve.repository import Repository

if TYPE_CHECKING:
    from anomalyd.serve.metrics import Samples
    from anomalyd.serve.models import Models
    from anomalyd.serve.settings import ServeSettings

__all__ = ["Control", "Local", "check_allowed", "in_thread", "left_running"]

THREAD = "change of what is served"


class Control(Protocol):
    """The repository and the metrics, in this process or in the supervisor's."""

    def index(self) -> list[dict[str, Any]]:
        """Name, version, state and reason of every version that there is."""

    async def load(self, name: str, version: str | None) -> None:
        """Load what is new of a model, and serve `version` of it, or the newest, from now on.

        Raises:
            Problem: 403 not allowed here, 404 no such model or version, 400 a bad bundle.
        """

    async def unload(self, name: str, version: str | None) -> None:
        """Serve a version of a model, or all of it, no more, until it is loaded again.

        Raises:
            Problem: 403 not allowed here, 404 no such model or version.
        """

    async def samples(self) -> Samples:
        """The value of every sample of the metrics now."""

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that the Accept header asks for, with its content type."""


class Local:
    """The repository and the metrics of a daemon that is one process."""

    def __init__(self, settings: ServeSettings, models: Models) -> None:
        self._settings = settings
        self._models = models
        loads = models.metrics.loads
        self._repository = Repository(
            settings,
            models,
            loaded=lambda good: loads.labels("success" if good else "failure").inc(),
        )

    def start(self) -> None:
        """Load everything for the first time.

        Raises:
            AnomalydError: as `Repository.start`, or an unknown default model.
        """
        self._repository.start()
        self._models.check_default()
        self._models.started = True

    async def started(self) -> None:
        """The same in a thread."""
        await in_thread(self.start)

    async def refresh(self, *, settle: bool = False) -> None:
        """Serve what is on disk now."""
        await in_thread(lambda: self._repository.refresh(settle=settle))

    def index(self) -> list[dict[str, Any]]:
        return self._repository.index()

    async def load(self, name: str, version: str | None) -> None:
        check_allowed(self._settings)
        await in_thread(lambda: self._repository.load(name, version))

    async def unload(self, name: str, version: str | None) -> None:
        check_allowed(self._settings)
        await in_thread(lambda: self._repository.unload(name, version))

    async def samples(self) -> Samples:
        return self._models.metrics.samples()

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        return self._models.metrics.expose(accept)


def check_allowed(settings: ServeSettings) -> None:
    """Refuse to change what is served, unless that was asked for at the start.

    Raises:
        Problem: 403 it was not.
    """
    if not settings.repository_api:
        detail = "loading and unloading are off; the daemon must run with --repository-api"
        raise Problem(403, "forbidden", detail)


async def in_thread(function: Callable[[], None]) -> None:
    """Call a function in a thread that the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            function()
        except BaseException as failure:  # noqa: BLE001  # handed over whole
            error = failure
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    await done


def left_running() -> bool:
    """Whether a function that was called so is at work still, and nobody waits for it."""
    return any(thread.name == THREAD for thread in threading.enumerate())
