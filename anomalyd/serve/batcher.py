"""Many single requests, few runs of the model.

    request ─┐                 ┌─> run([job, job, job]) ─> judge ─┐
    request ─┼─> bounded queue ┤   (a thread)         (another)   ├─> each its answer
    request ─┘                 └─ as soon as none runs, or full ──┘

While one batch runs the one before is judged and the next one gathers, so batches grow with the
load by themselves; `max_wait` adds a pause for company when nothing runs. A full batch need not
wait for the end of a run, where some CPUs are idle already. What would not be answered in time,
by the time that runs have taken lately, is refused before it waits, so that beyond capacity those
who are let in keep their latency. Where judging is the slower half the runs wait for it, and so
the queue stays the one place where anything piles up.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["BatchFailed", "Batcher", "Expired", "Late", "Pace", "QueueFull"]

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Outcome = Any  # of a run; only `judge` looks into it

logger = logging.getLogger(__name__)

# However slow a model is, as many images may wait.
FEWEST = 4

# Batches that have run and are not answered yet; beyond, no run starts.
UNJUDGED = 2

# A burst may wait for `longest`. From the first refusal on half of it counts, for as long as the
# model works for this share of the time: where it does not, something else holds the clients up.
STANDING = 0.9
MEMORY = 2  # times `longest`: after so long a run counts half in this share


class QueueFull(Exception):
    """No room for the jobs; the client may come again.

    Attributes:
        wait: seconds after which that has a chance, by estimate.
    """

    def __init__(self, wait: float = 0.0) -> None:
        super().__init__()
        self.wait = wait


class Late(QueueFull):
    """The jobs would have to wait for longer than they may, or make others wait."""


class Expired(Exception):
    """The job waited longer than its deadline and was never run."""


class BatchFailed(Exception):
    """The job failed when it was run; others are not affected."""


class Pace:
    """How long the model takes: the median of the last runs, apart for 1, 2-3, 4-7, ... jobs.

    The median, so that a machine that stalls for once refuses nobody; of the last few, so that
    one that has become slow is known soon.

    Args:
        most: jobs of the largest run.
    """

    LAST, FEWEST = 8, 3  # runs of a size that count, and that it takes to know it

    def __init__(self, most: int) -> None:
        self._most = most
        self._runs: dict[int, deque[float]] = {}  # bits of the number of jobs -> seconds a job
        self._each: dict[int, float] = {}

    def note(self, jobs: int, seconds: float) -> None:
        """A run of so many jobs took so long."""
        size = jobs.bit_length()
        runs = self._runs.setdefault(size, deque(maxlen=self.LAST))
        runs.append(seconds / jobs)
        if len(runs) >= self.FEWEST:
            self._each[size] = statistics.median(runs)

    def seconds(self, jobs: int) -> float:
        """How long so many jobs will take; 0 while that is not known."""
        full, rest = divmod(jobs, self._most)
        return full * self._run(self._most) + (self._run(rest) if rest else 0.0)

    def _run(self, jobs: int) -> float:
        each, size = self._each, jobs.bit_length()
        if not each:
            return 0.0
        # In company a job takes no longer than alone: so what was measured of smaller runs, too
        # long an estimate, lets larger ones in, which correct it.
        smaller = [seconds for known, seconds in each.items() if known <= size]
        return jobs * (min(smaller) if smaller else each[min(each)])


class _Waiting(NamedTuple, Generic[Job]):
    job: Job
    since: float
    until: float
    size: int


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


class _Ran(NamedTuple):
    outcome: Outcome | _Failure
    began: float
    ended: float


class Batcher(Generic[Job, Answer]):
    """Gathers jobs into batches and hands each its own answer.

    Belongs to the event loop that submits to it; only `run` and `judge` leave that loop's thread.

    Args:
        run: the costly half, from jobs to whatever `judge` takes; called in a thread.
        judge: from jobs and what their run gave to as many answers in the same order, while the
            next batch runs. Where either half raises for several jobs, each goes through both
            alone, so that one bad job fails alone.
        max_batch: most jobs in a batch.
        max_wait: how long a job waits for company while nothing runs, seconds.
        runs: most runs at one time; beside another one only a full batch is run.
        capacity: most jobs that wait; a further one is refused.
        most_bytes: most bytes that wait.
        longest: jobs that would make the run they join end later than this after the run before
            it began, by estimate, are refused, seconds; half of it counts after that while
            runs follow one another without a pause, so that a burst finds room, and a load that
            goes on finds a short queue (after "Fail at Scale", Maurer 2015).
        timeout: a job that has waited longer is not run, seconds; behind other work it is told so
            at once.
        size: bytes of a job.
        waited: called with each job's time in the queue, seconds.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], Outcome],
        judge: Callable[[list[Job], Outcome], Sequence[Answer]] = lambda jobs, answers: answers,
        *,
        max_batch: int,
        max_wait: float,
        runs: int = 1,
        capacity: int,
        timeout: float,
        longest: float = float("inf"),
        most_bytes: int = 1 << 62,
        size: Callable[[Job], int] = lambda job: 0,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._run = run
        self._judge = judge
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._runs = runs
        self._timeout = timeout
        self._longest = longest
        self._most_bytes = most_bytes
        self._size = size
        self._waited = waited
        self.capacity = capacity
        self.pace = Pace(max_batch)
        self._waiting: OrderedDict[asyncio.Future[Answer], _Waiting[Job]] = OrderedDict()
        self._bytes = 0
        self._timer: asyncio.Handle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._expires = 0.0  # when it fires: nothing that waits behind other work is due sooner
        self._closed = False
        self._running: list[float] = []  # seconds that each present run takes, by estimate
        self._unjudged = 0  # batches that have run and are not answered yet
        self._free_at = self._last_end = 0.0
        self._load = 0.0  # share of the time that something ran, from a refusal on, else 0
        self._places = threading.Semaphore(runs)  # the judging thread runs failed jobs again
        self._runner = ThreadPoolExecutor(runs, thread_name_prefix="score")
        self._judging = ThreadPoolExecutor(1, thread_name_prefix="judge")

    @property
    def depth(self) -> int:
        """Jobs that wait; those being run are not among them."""
        return len(self._waiting)

    @property
    def behind(self) -> bool:
        """Whether jobs wait that are not about to be run: other work comes first."""
        return bool(self._waiting) and self._timer is None

    @property
    def wait(self) -> float:
        """How long a job submitted now has to wait, by estimate, seconds."""
        ahead = self.pace.seconds(len(self._waiting)) if self._waiting else 0.0
        if self._running:
            ahead += max(0.0, self._free_at - time.perf_counter())
        return ahead

    def admit(self, jobs: int, timeout: float | None = None) -> None:
        """Refuse unless `jobs` more fit and time allows.

        Raises:
            QueueFull: they do not fit.
            Late: they would not be begun within `timeout` seconds, or their run would end later
                than the batcher's `longest`. Who came first for that run has waited since the run
                before it, and each who joins it makes it longer: so both runs count in full, of
                which a request's own images are one, for it knows what it asks for.
        """
        if not self._running and not self._waiting:
            if jobs > self.capacity:
                raise QueueFull
            return
        if len(self._waiting) + jobs > self.capacity:
            raise QueueFull(self.wait)
        both = sum(self._running) + self.pace.seconds(len(self._waiting) + 1)
        longest = self._longest / 2 if self._load else self._longest
        too_long = both > longest and both > 2 * self.pace.seconds(FEWEST)
        if too_long:
            self._load = self._load or 1.0
        if too_long or (timeout is not None and self.wait > timeout):
            raise Late(self.wait)

    def submit(self, job: Job, timeout: float | None = None) -> asyncio.Future[Answer]:
        """Queue a job; as `submit_all`."""
        return self.submit_all([job], timeout)[0]

    def submit_all(
        self, jobs: Sequence[Job], timeout: float | None = None
    ) -> list[asyncio.Future[Answer]]:
        """Queue jobs, all or none; a future holds its answer, or `Expired` or `BatchFailed`.

        Args:
            jobs: at least one.
            timeout: longest wait, seconds; None takes the batcher's.

        Raises:
            QueueFull: too many jobs or bytes wait already.
        """
        if len(self._waiting) + len(jobs) > self.capacity:
            raise QueueFull(self.wait)
        sizes = [self._size(job) for job in jobs]
        size = sum(sizes)
        if self._bytes + size > self._most_bytes:
            raise QueueFull(self.wait)
        self._bytes += size
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        until = now + (self._timeout if timeout is None else min(timeout, self._timeout))
        futures: list[asyncio.Future[Answer]] = []
        for job, size in zip(jobs, sizes, strict=True):
            future: asyncio.Future[Answer] = loop.create_future()
            self._waiting[future] = _Waiting(job, now, until, size)
            futures.append(future)
        self._wake(loop)
        if self.behind and (self._expiry is None or until < self._expires):
            self._expire_at(loop, until)
        return futures

    def drop(self, future: asyncio.Future[Answer]) -> None:
        """Forget a job whose client has gone; its room is free at once."""
        waiting = self._waiting.pop(future, None)
        if waiting is not None:
            self._bytes -= waiting.size
            self._none_expire()
        if not future.cancel() and not future.cancelled():
            future.exception()  # nobody will ask for it

    def close(self) -> None:
        """Wait for the batch that is being run; start no other."""
        if self._timer is not None:
            self._timer.cancel()
        if self._expiry is not None:
            self._expiry.cancel()
        self._closed = True
        self._runner.shutdown(cancel_futures=True)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a batch now if one is full, soon if one may still grow."""
        if self._closed or self._unjudged >= UNJUDGED:
            return
        while len(self._waiting) >= self._max_batch and len(self._running) < self._runs:
            self._start(loop)
        if not self._running and self._waiting and self._timer is None:
            # Even a pause of nothing lets every request that has already arrived join.
            self._timer = loop.call_later(self._max_wait, self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.perf_counter()
        futures, jobs = self._take(now)
        if jobs:
            takes = self.pace.seconds(len(jobs))
            self._running.append(takes)
            self._free_at = now + sum(self._running)
            running = loop.run_in_executor(self._runner, self._ran, jobs)
            running.add_done_callback(partial(self._free, loop, futures, jobs, takes))

    def _take(self, now: float) -> tuple[list[asyncio.Future[Answer]], list[Job]]:
        futures: list[asyncio.Future[Answer]] = []
        jobs: list[Job] = []
        while self._waiting and len(jobs) < self._max_batch:
            future, waiting = self._waiting.popitem(last=False)
            self._bytes -= waiting.size
            if future.done():
                continue
            if now > waiting.until:
                future.set_exception(Expired())
                continue
            self._waited(now - waiting.since)
            futures.append(future)
            jobs.append(waiting.job)
        self._none_expire()
        return futures, jobs

    def _expire_at(self, loop: asyncio.AbstractEventLoop, until: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expires = until
        self._expiry = loop.call_later(until - time.perf_counter(), self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell those whose time is over, and look again when the next one's is."""
        self._expiry = None
        now = time.perf_counter()
        for future, waiting in list(self._waiting.items()):
            if now > waiting.until:
                del self._waiting[future]
                self._bytes -= waiting.size
                if not future.done():
                    future.set_exception(Expired())
        if self._waiting:
            self._expire_at(loop, min(waiting.until for waiting in self._waiting.values()))

    def _none_expire(self) -> None:
        """Where nothing waits, no timer keeps the batcher, and with it a model, alive."""
        if self._expiry is not None and not self._waiting:
            self._expiry.cancel()
            self._expiry = None

    def _ran(self, jobs: list[Job]) -> _Ran:
        with self._places:
            began = time.perf_counter()
            try:
                outcome = self._run(jobs)
            except Exception as error:  # noqa: BLE001  # each job alone will show whose fault it is
                outcome = _Failure(error)
            return _Ran(outcome, began, time.perf_counter())

    def _free(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[Answer]],
        jobs: list[Job],
        takes: float,
        running: asyncio.Future[_Ran],
    ) -> None:
        """A run has ended: start the next one first, then have this one judged."""
        self._running.remove(takes)
        if running.cancelled():
            for future in futures:
                future.cancel()
            return
        outcome, began, ended = running.result()
        if ended > self._last_end:
            self._learn(len(jobs), began, ended)
        self._unjudged += 1
        self._wake(loop)
        judging = loop.run_in_executor(self._judging, self._judged, jobs, outcome)
        judging.add_done_callback(partial(self._answer, loop, futures))

    def _learn(self, jobs: int, began: float, ended: float) -> None:
        """What a run says of the model's pace, and of whether it has any rest."""
        passed = ended - self._last_end
        # Of two at one time each took what lies between their ends: they shared the CPUs.
        seconds = min(ended - began, passed)
        self.pace.note(jobs, seconds)
        self._last_end = ended
        if self._load:
            kept = 0.5 ** (passed / max(MEMORY * self._longest, 1e-9))
            self._load = kept * self._load + (1 - kept) * seconds / passed
            if self._load < STANDING:
                self._load = 0.0

    def _judged(self, jobs: list[Job], outcome: Outcome | _Failure) -> Sequence[Answer | _Failure]:
        try:
            if isinstance(outcome, _Failure):
                raise outcome.error
            answers = self._judge(jobs, outcome)
            if len(answers) != len(jobs):
                raise RuntimeError(f"{len(jobs)} jobs gave {len(answers)} answers")
        except Exception as error:  # noqa: BLE001  # as above
            if len(jobs) == 1:
                return [_Failure(error)]
            return [self._judged([job], self._ran([job]).outcome)[0] for job in jobs]
        return answers

    def _answer(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[Answer]],
        judging: asyncio.Future[Sequence[Answer | _Failure]],
    ) -> None:
        held_up = self._unjudged >= UNJUDGED
        self._unjudged -= 1
        if held_up:  # else what waits had better gather until a run ends
            self._wake(loop)
        failures = []
        for future, answer in zip(futures, judging.result(), strict=True):
            if isinstance(answer, _Failure):
                failures.append(answer.error)
            if future.done():
                continue
            if isinstance(answer, _Failure):
                future.set_exception(BatchFailed(str(answer.error)))
            else:
                future.set_result(answer)
        if failures:
            logger.error(
                "%d of a batch of %d images failed", len(failures), len(futures),
                exc_info=failures[0],
            )  # fmt: skip
