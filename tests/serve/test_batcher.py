"""The micro-batcher under adversarial timing."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalyd.serve.batcher import Batcher, BatchFailed, Expired, QueueFull


class Worker:
    """Answers job n with (n, the batch it came in); notes its batches; fails on poison."""

    def __init__(self, delays=(), poison=()):
        self.batches = []
        self.delays = list(delays)
        self.poison = set(poison)
        self.running = threading.Lock()

    def __call__(self, jobs):
        assert self.running.acquire(blocking=False), "two batches at one time"
        try:
            self.batches.append(jobs)
            if self.delays:
                time.sleep(self.delays.pop())
            if self.poison & set(jobs):
                raise ValueError("poison")
            return [(job, tuple(jobs)) for job in jobs]
        finally:
            self.running.release()


class Gate(Worker):
    """A worker that waits until the gate is opened."""

    def __init__(self, **changes):
        super().__init__(**changes)
        self.open = threading.Event()

    def __call__(self, jobs):
        assert self.open.wait(10)
        return super().__call__(jobs)


def batcher_of(worker, *, max_batch=4, max_wait=0.0, capacity=1000, timeout=10.0, **changes):
    return Batcher(
        worker,
        max_batch=max_batch,
        max_wait=max_wait,
        capacity=capacity,
        timeout=timeout,
        **changes,
    )


async def busy(batcher):
    """Return once the worker has taken everything that waited."""
    while batcher.depth:
        await asyncio.sleep(0.001)


pauses = st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.0005, 0.002]), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    pauses=pauses,
    delays=st.lists(st.sampled_from([0.0, 0.001, 0.003]), max_size=20),
    poison=st.sets(st.integers(0, 39), max_size=3),
    gone=st.sets(st.integers(0, 39), max_size=5),
    max_batch=st.integers(1, 8),
    max_wait=st.sampled_from([0.0, 0.001]),
)
def test_each_answer_belongs_to_its_request(pauses, delays, poison, gone, max_batch, max_wait):
    """Whatever the timing, failures and departures, a client gets its own answer or error."""
    worker = Worker(delays, poison)

    async def client(batcher, job, pause):
        await asyncio.sleep(pause)
        future = batcher.submit(job)
        if job in gone:
            batcher.drop(future)
            return None
        try:
            return await future
        except BatchFailed:
            return "failed"

    async def scenario():
        batcher = batcher_of(worker, max_batch=max_batch, max_wait=max_wait)
        answers = await asyncio.gather(
            *(client(batcher, job, pause) for job, pause in enumerate(pauses))
        )
        assert batcher.depth == 0
        batcher.close()
        return answers

    answers = asyncio.run(scenario())
    for job, answer in enumerate(answers):
        batch = next((batch for batch in worker.batches if job in batch), [])
        if job in gone:
            assert answer is None
        elif poison & set(batch):
            assert answer == "failed"
        else:
            assert answer == (job, tuple(batch))
    ran = [job for batch in worker.batches for job in batch]
    assert len(set(ran)) == len(ran)
    assert all(len(batch) <= max_batch for batch in worker.batches)


def test_a_failing_batch_fails_only_its_own_jobs(caplog):
    """The batch after a failed one is answered."""
    worker = Gate(poison={1})

    async def scenario():
        batcher = batcher_of(worker, max_batch=2)
        futures = [batcher.submit(job) for job in range(4)]
        worker.open.set()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        batcher.close()
        return answers

    answers = asyncio.run(scenario())
    assert [type(answer) for answer in answers] == [BatchFailed, BatchFailed, tuple, tuple]
    assert "a batch of 2 images failed" in caplog.text


def test_a_worker_that_loses_an_answer_fails_its_batch():
    """Fewer answers than jobs never shift answers to the wrong client."""

    async def scenario():
        batcher = batcher_of(lambda jobs: jobs[1:])
        with pytest.raises(BatchFailed, match="2 jobs gave 1 answers"):
            await asyncio.gather(batcher.submit(1), batcher.submit(2))
        batcher.close()

    asyncio.run(scenario())


@given(capacity=st.integers(1, 9), asked=st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_the_queue_is_bounded(capacity, asked):
    """Exactly `capacity` jobs wait beside the batch that is being run; the rest are refused."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, capacity=capacity)
        futures = [batcher.submit("first")]
        await busy(batcher)
        refused = 0
        for job in range(asked):
            try:
                futures.append(batcher.submit(job))
            except QueueFull:
                refused += 1
            assert batcher.depth <= capacity
        worker.open.set()
        await asyncio.gather(*futures)
        batcher.close()
        return refused

    assert asyncio.run(scenario()) == max(0, asked - capacity)


def test_admission_counts_images():
    """A request of many is refused as a whole when not all of it fits."""

    async def scenario():
        batcher = batcher_of(Worker(), capacity=3)
        batcher.admit(3)
        with pytest.raises(QueueFull):
            batcher.admit(4)
        batcher.close()

    asyncio.run(scenario())


def test_work_of_clients_that_left_is_not_run():
    """A dropped job frees its room at once and never reaches the model."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, capacity=1)
        first = batcher.submit("first")
        await busy(batcher)
        batcher.drop(batcher.submit("gone"))
        last = batcher.submit("last")
        worker.open.set()
        await asyncio.gather(first, last)
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [["first"], ["last"]]


def test_work_past_its_deadline_is_not_run():
    """A job that waited longer than the timeout gets Expired, and no run is spent on it."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, timeout=0.01)
        first = batcher.submit("first")
        await busy(batcher)
        late = batcher.submit("late")
        await asyncio.sleep(0.03)
        worker.open.set()
        await first
        with pytest.raises(Expired):
            await late
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [["first"]]


def test_a_lone_job_waits_for_company():
    """Jobs that come within max_wait of the first share its batch."""
    worker = Worker()

    async def scenario():
        batcher = batcher_of(worker, max_wait=0.2)
        first = batcher.submit(1)
        await asyncio.sleep(0.02)
        await asyncio.gather(first, batcher.submit(2))
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [[1, 2]]


def test_a_full_batch_does_not_wait():
    """max_wait ends as soon as the batch is full."""

    async def scenario():
        batcher = batcher_of(Worker(), max_batch=2, max_wait=10.0)
        await asyncio.wait_for(asyncio.gather(batcher.submit(1), batcher.submit(2)), 5)
        batcher.close()

    asyncio.run(scenario())


def test_waiting_times_are_reported():
    """Each job's time in the queue is told once, in seconds."""
    waits = []

    async def scenario():
        batcher = batcher_of(Worker(), waited=waits.append)
        await asyncio.gather(*(batcher.submit(job) for job in range(6)))
        batcher.close()

    asyncio.run(scenario())
    assert len(waits) == 6
    assert all(0 <= wait < 10 for wait in waits)


def test_close_waits_for_the_batch_under_way():
    """Closing leaves no thread behind, and starts no further batch."""
    worker = Worker(delays=[0.05])

    async def scenario():
        batcher = batcher_of(worker, max_batch=1)
        batcher.submit("first")
        await busy(batcher)
        batcher.submit("never")
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [["first"]]
