"""Many single requests, few runs of the model.

    request ─┐                 ┌─> one worker thread ─> run([job, job, job]) ─┐
    request ─┼─> bounded queue ┤      (the event loop goes on meanwhile)      ├─> each its answer
    request ─┘                 └─ as soon as the worker is free, or full ─────┘

While the worker runs one batch the next one gathers, so batches grow with the load by
themselves; `max_wait` adds a pause for company when the worker is idle.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

__all__ = ["BatchFailed", "Batcher", "Expired", "QueueFull"]

Job = TypeVar("Job")
Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """No room for the job; the client may come again."""


class Expired(Exception):
    """The job waited longer than its deadline and was never run."""


class BatchFailed(Exception):
    """The run that the job was part of failed; other batches are not affected."""


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Job]):
    job: Job
    since: float


class Batcher(Generic[Job, Answer]):
    """Gathers jobs into batches and hands each its own answer.

    Belongs to the event loop that submits to it; only `run` leaves that loop's thread.

    Args:
        run: from jobs to as many answers in the same order; called in one thread, one at a time.
        max_batch: most jobs in a batch.
        max_wait: how long a job waits for company while the worker is idle, seconds.
        capacity: most jobs that wait; a further one is refused.
        timeout: a job that has waited longer is not run, seconds.
        waited: called with each job's time in the queue, seconds.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], Sequence[Answer]],
        *,
        max_batch: int,
        max_wait: float,
        capacity: int,
        timeout: float,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._timeout = timeout
        self._waited = waited
        self.capacity = capacity
        self._waiting: OrderedDict[asyncio.Future[Answer], _Waiting[Job]] = OrderedDict()
        self._timer: asyncio.Handle | None = None
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")

    @property
    def depth(self) -> int:
        """Jobs that wait; those being run are not among them."""
        return len(self._waiting)

    @property
    def backlogged(self) -> bool:
        """Whether a job submitted now has to wait for more than the next batch."""
        return len(self._waiting) >= self._max_batch

    def admit(self, jobs: int) -> None:
        """Refuse unless `jobs` more fit.

        Raises:
            QueueFull: they do not.
        """
        if len(self._waiting) + jobs > self.capacity:
            raise QueueFull

    def submit(self, job: Job) -> asyncio.Future[Answer]:
        """Queue a job; the future holds its answer, or `Expired` or `BatchFailed`.

        Raises:
            QueueFull: the queue holds `capacity` jobs.
        """
        self.admit(1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting[future] = _Waiting(job, loop.time())
        if not self._busy:
            self._wake(loop)
        return future

    def drop(self, future: asyncio.Future[Answer]) -> None:
        """Forget a job whose client has gone; its room is free at once."""
        self._waiting.pop(future, None)
        future.cancel()

    def close(self) -> None:
        """Wait for the batch that is being run; start no other."""
        if self._timer is not None:
            self._timer.cancel()
        self._busy = True
        self._thread.shutdown(cancel_futures=True)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a batch now if one is full, soon if one may still grow."""
        if len(self._waiting) >= self._max_batch:
            self._start(loop)
        elif self._timer is None and self._waiting:
            # Even a pause of nothing lets every request that has already arrived join.
            self._timer = loop.call_later(self._max_wait, self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        futures, jobs = self._take(loop.time())
        if jobs:
            self._busy = True
            running = loop.run_in_executor(self._thread, self._run_checked, jobs)
            running.add_done_callback(partial(self._finish, loop, futures))

    def _take(self, now: float) -> tuple[list[asyncio.Future[Answer]], list[Job]]:
        futures: list[asyncio.Future[Answer]] = []
        jobs: list[Job] = []
        while self._waiting and len(jobs) < self._max_batch:
            future, waiting = self._waiting.popitem(last=False)
            if future.done():
                continue
            waited = now - waiting.since
            if waited > self._timeout:
                future.set_exception(Expired())
                continue
            self._waited(waited)
            futures.append(future)
            jobs.append(waiting.job)
        return futures, jobs

    def _run_checked(self, jobs: list[Job]) -> Sequence[Answer]:
        answers = self._run(jobs)
        if len(answers) != len(jobs):
            raise RuntimeError(f"{len(jobs)} jobs gave {len(answers)} answers")
        return answers

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[Answer]],
        running: asyncio.Future[Sequence[Answer]],
    ) -> None:
        self._busy = False
        if running.cancelled():
            error: BaseException | None = asyncio.CancelledError()
        else:
            error = running.exception()
        if error is None:
            for future, answer in zip(futures, running.result(), strict=True):
                if not future.done():
                    future.set_result(answer)
        else:
            logger.error("a batch of %d images failed", len(futures), exc_info=error)
            for future in futures:
                if not future.done():
                    future.set_exception(BatchFailed(str(error)))
        self._wake(loop)
