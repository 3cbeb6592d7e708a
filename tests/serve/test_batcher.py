"""The micro-batcher under adversarial timing."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalyd.serve.batcher import Batcher, BatchFailed, Expired, Late, Pace, QueueFull


class Worker:
    """Answers job n with (n, the batch it came in); notes its batches; fails on poison."""

    def __init__(self, delays=(), poison=(), runs=1):
        self.batches = []
        self.delays = deque(delays)
        self.poison = set(poison)
        self.running = threading.Semaphore(runs)

    def __call__(self, jobs):
        assert self.running.acquire(blocking=False), "too many batches at one time"
        try:
            self.batches.append(jobs)
            with contextlib.suppress(IndexError):
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


def know(batcher, seconds):
    """Make runs of one job known to take so long."""
    for _ in range(Pace.FEWEST):
        batcher.pace.note(1, seconds)


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
    runs=st.integers(1, 3),
    late=st.booleans(),
)
def test_each_answer_belongs_to_its_request(
    pauses, delays, poison, gone, max_batch, max_wait, runs, late
):
    """Whatever the timing, failures in either half and departures, a client gets its own answer
    or error."""
    worker = Worker(delays, set() if late else poison, runs)
    judged = Worker(delays, poison if late else ())

    def judge(jobs, answers):
        judged(jobs)
        return answers

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
        batcher = batcher_of(
            worker, judge=judge, max_batch=max_batch, max_wait=max_wait, runs=runs
        )
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
        elif job in poison:
            assert answer == "failed"
        elif poison & set(batch):
            assert answer == (job, (job,))
        else:
            assert answer == (job, tuple(batch))
    first = [set(batch) for batch in worker.batches]
    for i, batch in enumerate(first):
        # A job runs again only alone, and only where its batch was poisoned.
        assert all(not batch & before or len(batch) == 1 for before in first[:i])
        assert all(before & poison for before in first[:i] if batch & before)
    assert all(len(batch) <= max_batch for batch in worker.batches)


def test_the_next_batch_runs_while_one_is_judged():
    """Judging one batch holds up no other: the second has run before the first is answered."""
    second_ran = threading.Event()

    def run(jobs):
        if 1 in jobs:
            second_ran.set()
        return jobs

    def judge(jobs, ran):
        assert second_ran.wait(10)
        return ran

    async def scenario():
        batcher = batcher_of(run, judge=judge, max_batch=1)
        answers = await asyncio.gather(batcher.submit(0), batcher.submit(1))
        batcher.close()
        return answers

    assert asyncio.run(scenario()) == [0, 1]


def test_runs_wait_for_judging_that_is_slower():
    """What has run and is not judged is bounded, so that the queue fills, and refuses."""
    worker, judging = Worker(), threading.Event()

    def judge(jobs, ran):
        assert judging.wait(10)
        return ran

    async def scenario():
        batcher = batcher_of(worker, judge=judge, max_batch=1, capacity=3)
        futures = []
        for job in range(2):
            futures.append(batcher.submit(job))
            await busy(batcher)
        while batcher._running:
            await asyncio.sleep(0.001)
        futures += batcher.submit_all([2, 3, 4])
        await asyncio.sleep(0.05)  # time in which others could run
        with pytest.raises(QueueFull):
            batcher.admit(1)
        assert worker.batches == [[0], [1]]
        judging.set()
        await asyncio.gather(*futures)
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [[0], [1], [2], [3], [4]]


def test_a_full_batch_runs_beside_another():
    """As soon as it is full, and no third one; what does not fill a batch waits for its turn."""
    worker = Gate(runs=2)

    async def scenario():
        batcher = batcher_of(worker, max_batch=2, runs=2)
        futures = [batcher.submit(0)]
        await busy(batcher)
        futures += batcher.submit_all([1, 2, 3, 4, 5])
        await asyncio.sleep(0)
        assert batcher.depth == 3
        worker.open.set()
        await asyncio.gather(*futures)
        batcher.close()

    asyncio.run(scenario())
    assert sorted(worker.batches) == [[0], [1, 2], [3, 4], [5]]


def test_two_runs_at_one_time_do_not_seem_slow():
    """Sharing the CPUs, both take twice as long, and as many are done in that time."""
    both, took = threading.Barrier(2), []

    def run(jobs):
        began = time.perf_counter()
        both.wait(10)
        time.sleep(0.1)
        both.wait(10)
        took.append(time.perf_counter() - began)
        return jobs

    async def scenario():
        batcher = batcher_of(run, max_batch=1, runs=2)
        await asyncio.gather(*(batcher.submit(job) for job in range(8)))
        batcher.close()
        return batcher.pace.seconds(1)

    assert asyncio.run(scenario()) < 0.75 * statistics.median(took)  # a half, and some for hands


def test_a_bad_job_fails_alone(caplog):
    """The others of its batch are run again, each by itself; later batches never notice."""
    worker = Gate(poison={1})

    async def scenario():
        batcher = batcher_of(worker, max_batch=2)
        futures = [batcher.submit(job) for job in range(4)]
        worker.open.set()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        batcher.close()
        return answers

    answers = asyncio.run(scenario())
    assert [type(answer) for answer in answers] == [tuple, BatchFailed, tuple, tuple]
    assert "1 of a batch of 2 images failed" in caplog.text


def test_a_worker_that_loses_an_answer_fails_its_batch():
    """Fewer answers than jobs never shift answers to the wrong client."""

    async def scenario():
        batcher = batcher_of(lambda jobs: jobs[1:])
        with pytest.raises(BatchFailed, match="1 jobs gave 0 answers"):
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


def test_who_waits_behind_other_work_is_told_when_his_time_is_over():
    """However long the present run still takes; each by his own deadline, and its room is free."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, timeout=60.0, most_bytes=9, size=len)
        first = batcher.submit("first")
        await busy(batcher)
        patient, late, later = (
            batcher.submit(job, timeout)
            for job, timeout in (("abc", None), ("def", 0.02), ("ghi", 0.04))
        )
        for hasty in (late, later):
            with pytest.raises(Expired):
                await hasty
        assert batcher.depth == 1
        last = batcher.submit("jklmno")
        worker.open.set()
        await asyncio.gather(first, patient, last)
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [["first"], ["abc"], ["jklmno"]]


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


def test_a_poisoned_run_is_retried_without_mixing_answers():
    """Every good job of a poisoned batch gets the answer of its own run."""
    worker = Gate(poison={2, 5})

    async def scenario():
        batcher = batcher_of(worker, max_batch=8)
        futures = batcher.submit_all(list(range(8)))
        worker.open.set()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        batcher.close()
        return answers

    answers = asyncio.run(scenario())
    for job, answer in enumerate(answers):
        if job in (2, 5):
            assert isinstance(answer, BatchFailed)
        else:
            assert answer == (job, (job,))


def test_bytes_are_bounded():
    """Jobs of more bytes than may wait are refused, all or none, and their room comes back."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, most_bytes=10, size=len)
        first = batcher.submit("a" * 9)
        await busy(batcher)
        waiting = batcher.submit_all(["bbbb", "cccc"])
        with pytest.raises(QueueFull):
            batcher.submit_all(["dd", "e"])
        batcher.drop(waiting[0])
        last = batcher.submit("dddddd")
        worker.open.set()
        await asyncio.gather(first, waiting[1], last)
        assert batcher.depth == 0
        batcher.submit("x" * 10)
        batcher.close()

    asyncio.run(scenario())


def test_who_would_be_answered_too_late_is_refused_at_once():
    """By the pace of earlier runs: the present run and the next one, with him, end in time."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=16, longest=6.1)
        know(batcher, 0.6)
        futures = [batcher.submit(0)]
        await busy(batcher)
        for job in range(9):  # 0.6 of the present run, 5.4 of the next
            batcher.admit(1)
            futures.append(batcher.submit(job))
        with pytest.raises(Late) as caught:
            batcher.admit(1)
        assert 5.4 < caught.value.wait <= 6.0
        worker.open.set()
        await asyncio.gather(*futures)
        batcher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("memory", "room"), [(1e9, 9), (0, 19)], ids=["goes on", "pauses"])
def test_a_load_that_goes_on_finds_half_the_room_of_a_burst(monkeypatch, memory, room):
    """From the first refusal on the next run may end half as late, until the model has a rest."""
    monkeypatch.setattr("anomalyd.serve.batcher.MEMORY", memory)
    worker = Gate()

    def admitted(batcher):
        futures = []
        with contextlib.suppress(Late):
            while True:
                batcher.admit(1)
                futures.append(batcher.submit(0))
        return futures

    async def scenario():
        batcher = batcher_of(worker, max_batch=32, longest=20.5)
        worker.open.set()
        await batcher.submit(0)
        for expected in (19, room):  # beside the one of the present run
            batcher.pace = Pace(32)  # the runs of this test take no time
            know(batcher, 1.0)
            await asyncio.sleep(0.1)
            worker.open.clear()
            first = batcher.submit(0)
            await busy(batcher)
            waiting = admitted(batcher)
            assert len(waiting) == expected
            worker.open.set()
            await asyncio.gather(first, *waiting)
        batcher.close()

    asyncio.run(scenario())


def test_who_comes_later_does_not_delay_those_who_wait():
    """When the present run is nearly over, as few may join the next one as when it began."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=16, longest=0.95)
        know(batcher, 0.1)
        futures = batcher.submit_all([0, 1])
        await busy(batcher)
        futures += batcher.submit_all(range(2, 9))  # 0.2 and 0.7
        await asyncio.sleep(0.2)
        assert batcher.wait < 0.75
        with pytest.raises(Late):
            batcher.admit(1)
        worker.open.set()
        await asyncio.gather(*futures)
        batcher.close()

    asyncio.run(scenario())


def test_a_client_who_will_not_wait_is_refused_at_once():
    """A deadline of one's own counts to the time that a run begins."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, longest=60.0)
        know(batcher, 0.6)
        futures = [batcher.submit(0)]
        await busy(batcher)
        batcher.admit(1, timeout=1.0)
        with pytest.raises(Late):
            batcher.admit(1, timeout=0.1)
        worker.open.set()
        await asyncio.gather(*futures)
        batcher.close()

    asyncio.run(scenario())


def test_a_slow_model_has_room_for_a_few():
    """Where one run takes longer than anybody may wait, four jobs may wait all the same."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, longest=0.1)
        know(batcher, 50.0)
        futures = [batcher.submit(0)]
        await busy(batcher)
        for job in range(3):
            batcher.admit(1)
            futures.append(batcher.submit(job))
        worker.open.set()
        await asyncio.gather(*futures)
        batcher.close()

    asyncio.run(scenario())


def test_an_idle_model_lets_everything_in():
    """Before anything waits no estimate refuses anybody, however slow the model has been."""

    async def scenario():
        batcher = batcher_of(Worker(), longest=0.1, capacity=64)
        know(batcher, 100.0)
        batcher.admit(64)
        with pytest.raises(QueueFull):
            batcher.admit(65)
        batcher.close()

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(1e-4, 10)), min_size=1, max_size=40))
def test_the_pace_stays_within_what_was_measured(runs):
    """An estimate a job lies between the fastest and the slowest that a job ever took, or is 0."""
    pace = Pace(32)
    for jobs, seconds in runs:
        pace.note(jobs, seconds)
    each = [seconds / jobs for jobs, seconds in runs]
    for jobs in (1, 2, 7, 32, 33, 100):
        estimate = pace.seconds(jobs) / jobs
        assert estimate == 0 or min(each) * 0.999 <= estimate <= max(each) * 1.001


def test_large_runs_that_were_slow_once_are_not_held_against_what_comes():
    """When small runs are quick again, large ones are let in again; nothing else would show it."""
    pace = Pace(32)
    for jobs, seconds in ((1, 0.1), (32, 3.2), (1, 0.001)):
        for _ in range(Pace.LAST):
            pace.note(jobs, seconds)
    assert pace.seconds(1) == 0.001
    assert pace.seconds(32) == 0.032


def test_a_run_that_was_held_up_changes_nothing():
    """Nor does the very first one say anything; a machine that has become slow is known soon."""
    pace = Pace(4)
    pace.note(1, 10.0)
    assert pace.seconds(1) == 0
    for seconds in (0.001, 0.001, 10.0):
        pace.note(1, seconds)
        pace.note(1, 0.001)
    assert pace.seconds(1) == 0.001
    for _ in range(Pace.LAST):
        pace.note(1, 0.5)
    assert pace.seconds(1) == 0.5


def test_a_deadline_of_one_s_own_is_kept():
    """A job with a shorter timeout than the batcher's is not run after it."""
    worker = Gate()

    async def scenario():
        batcher = batcher_of(worker, max_batch=1, timeout=60.0)
        first = batcher.submit("first")
        await busy(batcher)
        late, patient = batcher.submit("late", 0.01), batcher.submit("patient")
        await asyncio.sleep(0.03)
        worker.open.set()
        await asyncio.gather(first, patient)
        with pytest.raises(Expired):
            await late
        batcher.close()

    asyncio.run(scenario())
    assert worker.batches == [["first"], ["patient"]]
