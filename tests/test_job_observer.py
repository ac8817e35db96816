"""Knowing what goes on: the records of jobs, labels, and what every log record about a worker carries."""

import functools
import itertools
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests import python_pool_jobs as jobs
from tests.support import release
from tests.test_faults import puppets, tell, until
from tests.test_pool_logic import ask, config, settle, work
from tests.test_reset import Release, start
from trio_workers import (
    AllocateTimeout,
    JobError,
    JobRecord,
    JobTimeout,
    Limits,
    Payload,
    QueueFull,
    RelayError,
    Restart,
    RestartLimitExceeded,
    SpawnError,
    WorkerCrashed,
    WorkerError,
    WorkersError,
    open_pool,
    open_python_pool,
)
from trio_workers.child import STOP_REQUEST, Job
from trio_workers.testing import BadBoot, Crash


class Records:
    """A job observer that keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[JobRecord] = []

    def __call__(self, record: JobRecord) -> None:
        self.all.append(record)

    @property
    def last(self) -> JobRecord:
        return self.all[-1]

    def check(self, pool: Any) -> None:
        """Exactly one record for each job, and its times in their order."""
        assert Counter(record.outcome for record in self.all) == Counter(pool.statistics().jobs)
        for record in self.all:
            assert type(record) is JobRecord
            assert record.queued <= record.ended
            assert (record.slot is None) == (record.pid is None) or record.outcome == "boot_failed"
            if record.started is not None:
                assert record.queued <= record.started <= record.ended
                assert record.slot is not None


# what a record says


async def test_fields(autojump_clock: MockClock) -> None:
    """Job observer: label, worker and times of a job, on the clock of trio, from the very first moment."""
    told = Records()
    async with open_pool(config(work), job_observer=told) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        first = start(nursery, functools.partial(pool.exec, Payload(b"sleep 5"), label="first"))
        await settle()
        second = start(nursery, functools.partial(pool.exec, Payload(b"sleep 2")))
        await first.done.wait()
        await second.done.wait()
        await trio.sleep(3)
        await ask(pool)
        assert told.all == [
            JobRecord(label="first", slot=0, pid=worker.pid, queued=0.0, started=0.0, ended=5.0, outcome="replied"),
            JobRecord(label=None, slot=0, pid=worker.pid, queued=0.0, started=5.0, ended=7.0, outcome="replied"),
            JobRecord(label=None, slot=0, pid=worker.pid, queued=10.0, started=10.0, ended=10.0, outcome="replied"),
        ]
        told.check(pool)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            told.last.outcome = "lost"  # type: ignore[misc]
        assert "first" in repr(told.all[0])
    assert len(told.all) == 3


async def test_it_is_told_before_the_caller_goes_on(autojump_clock: MockClock) -> None:
    """Job observer: it is called at the job's end, in the trio thread, when the numbers of the pool are right."""
    seen: list[int] = []

    def observe(record: JobRecord) -> None:
        assert trio.lowlevel.in_trio_run()
        seen.append(pool.statistics().jobs["replied"])

    async with open_pool(config(work), job_observer=observe) as pool:
        for number in range(1, 4):
            await ask(pool)
            assert seen[-1] == number == len(seen)


async def test_every_outcome(autojump_clock: MockClock) -> None:
    """Job observer: each way for a job to end has its record, with a worker only where it had one."""
    told = Records()
    cfg = config(work, max_queue=1, allocate_timeout=5.0, limits=Limits(exec_ttl=20.0))

    async def expect(error: type[BaseException], text: str) -> None:
        with pytest.raises(error):
            await ask(pool, text)

    async with open_pool(cfg, job_observer=told) as pool, trio.open_nursery() as nursery:
        await ask(pool, "hello")
        assert told.last.outcome == "replied"
        await expect(JobError, "fail")
        assert (told.last.outcome, told.last.slot) == ("failed", 0)
        await expect(WorkerCrashed, "crash 3")
        assert (told.last.outcome, told.last.slot) == ("crashed", 0)
        assert told.last.pid is not None
        await expect(JobTimeout, "hang")
        assert (told.last.outcome, told.last.slot) == ("job_timeout", 0)
        assert told.last.started is not None
        assert told.last.ended - told.last.started == 20
        await expect(WorkerError, "stop")
        assert told.last.outcome == "retired"
        with trio.move_on_after(1):
            await ask(pool, "hang")
        assert (told.last.outcome, told.last.slot) == ("cancelled", 0)
        nursery.start_soon(ask, pool, "sleep 7")
        await settle()
        late = start(nursery, ask, pool)
        await settle()
        await expect(QueueFull, "x")
        assert (told.last.outcome, told.last.slot, told.last.pid, told.last.started) == ("queue_full", None, None, None)
        assert told.last.queued == told.last.ended == trio.current_time()
        await late.done.wait()
        assert isinstance(late.error, AllocateTimeout)
        assert (told.last.outcome, told.last.slot, told.last.started) == ("allocate_timeout", None, None)
        assert told.last.ended - told.last.queued == 5
        with trio.move_on_after(1):
            await ask(pool)
        assert (told.last.outcome, told.last.slot, told.last.started) == ("cancelled", None, None)
        await trio.sleep(5)
        told.check(pool)
    with pytest.raises(trio.ClosedResourceError):
        await ask(pool)
    assert (told.last.outcome, told.last.slot) == ("closed", None)
    told.check(pool)
    assert {record.outcome for record in told.all} == {
        "replied",
        "failed",
        "crashed",
        "job_timeout",
        "retired",
        "cancelled",
        "queue_full",
        "allocate_timeout",
        "closed",
    }


async def test_a_job_that_goes_on_to_another_worker(autojump_clock: MockClock) -> None:
    """Job observer: one record for it all: since when it waited, and the worker that it ended on."""
    told = Records()
    asked = 0

    async def handler(job: Job) -> bytes:
        nonlocal asked
        asked += 1
        await trio.sleep(1)
        return STOP_REQUEST if asked <= 2 else b"done"

    async def boot(slot: int) -> None:
        await trio.sleep(2)

    async with open_pool(config(handler, boot=boot, num_workers=1), job_observer=told) as pool:
        begun = trio.current_time()
        first = pool.workers[0].pid
        assert await ask(pool, "x") == "done"
        (record,) = told.all
        assert record.queued == begun
        assert record.started == record.ended - 1
        assert record.started > begun + 2
        assert record.pid == pool.workers[0].pid != first


async def test_streams_leases_and_maps(autojump_clock: MockClock) -> None:
    """Job observer: a stream is one job, whichever way it is left; a lease is none, but for the jobs in it."""
    told = Records()

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        if job.body == b"crash":
            raise Crash(1)
        for number in range(3):
            yield b"%d" % number
            await trio.sleep(1)
        if job.body == b"fail":
            raise ValueError("mine")

    async with open_pool(config(handler), job_observer=told) as pool:
        async with pool.stream(Payload(), label="whole") as parts:
            assert len([part async for part in parts]) == 3
        assert (told.last.label, told.last.outcome, len(told.all)) == ("whole", "replied", 1)
        assert told.last.started is not None
        assert told.last.ended - told.last.started == 3
        async with pool.stream(Payload(), label="left") as parts:
            await anext(parts)
        assert (told.last.label, told.last.outcome, len(told.all)) == ("left", "replied", 2)
        with pytest.raises(JobError, match="mine"):
            async with pool.stream(Payload(b"fail")) as parts:
                assert len([part async for part in parts]) == 3
        assert (told.last.outcome, len(told.all)) == ("failed", 3)
        with trio.move_on_after(1.5):
            async with pool.stream(Payload()) as parts:
                async for _ in parts:
                    pass
        assert (told.last.outcome, len(told.all)) == ("cancelled", 4)
        with pytest.raises(WorkerCrashed):
            async with pool.stream(Payload(b"crash")) as parts:
                await anext(parts)
        assert (told.last.outcome, len(told.all)) == ("crashed", 5)
        async with pool.stream(Payload(), label="killed") as parts:
            await anext(parts)
            (worker,) = pool.workers
            await worker.kill()
        assert (told.last.label, told.last.outcome, len(told.all)) == ("killed", "crashed", 6)
        told.check(pool)
    told.all.clear()
    async with open_pool(config(work, allocate_timeout=5.0), job_observer=told) as pool:
        async with pool.lease(label="mine") as worker:
            assert told.all == []
            await worker.exec(Payload(b"x"), label="inside")
            assert (told.last.label, told.last.slot, told.last.outcome) == ("inside", 0, "replied")
            with pytest.raises(AllocateTimeout):
                async with pool.lease(label="another"):
                    pytest.fail("it was got")
            assert (told.last.label, told.last.slot, told.last.outcome) == ("another", None, "allocate_timeout")
        assert len(told.all) == 2
        async with pool.map(Payload(b"%d" % number) for number in range(5)) as replies:
            assert len([reply async for reply in replies]) == 5
        assert len(told.all) == 7
        told.check(pool)


async def test_with_debug(autojump_clock: MockClock) -> None:
    """Job observer: a job whose process did not boot has its record, too."""
    told = Records()
    old = Release("old", took=2, bad=lambda number: number == 1)
    async with open_pool(old.config(debug=True), job_observer=told) as pool:
        with pytest.raises(SpawnError):
            await ask(pool)
        assert (told.last.outcome, told.last.started, told.last.slot) == ("boot_failed", None, 0)
        assert told.last.ended - told.last.queued == 2
        await ask(pool)
        assert (told.last.outcome, told.last.slot) == ("replied", 0)
        assert told.last.started == told.last.queued + 2
        told.check(pool)


async def test_a_mixed_load(autojump_clock: MockClock) -> None:
    """Job observer: one record for each of many jobs with crashes, cancels and time limits; the sums agree."""
    told = Records()
    rng = random.Random(5)
    ended = 0
    boots = itertools.count()

    async def boot(slot: int) -> None:
        await trio.sleep(0.2)
        if next(boots) > 4 and rng.random() < 0.2:
            raise BadBoot("now and then")

    cfg = config(
        work,
        boot=boot,
        num_workers=4,
        max_workers=6,
        max_queue=12,
        allocate_timeout=3.0,
        max_executions=7,
        limits=Limits(exec_ttl=2.0, ttl=20.0),
    )

    async def call(number: int) -> None:
        nonlocal ended
        texts = ("say", "sleep 0.3", "sleep 1", "fail x", "crash 3", "stop", "hang", "crash -9")
        text = rng.choice(texts)
        scope = trio.move_on_after(rng.choice((0.1, 0.7, 1.5, math.inf, math.inf, math.inf)))
        try:
            with scope:
                if number % 5 == 0:
                    async with pool.stream(Payload(text.encode()), label=f"{number}") as parts:
                        async for _ in parts:
                            pass
                elif number % 7 == 0:
                    async with pool.lease() as worker:
                        await worker.exec(Payload(text.encode()), label=f"{number}")
                else:
                    await pool.exec(Payload(text.encode()), label=f"{number}")
        except (WorkersError, trio.ClosedResourceError):
            pass
        ended += 1

    async with open_pool(cfg, job_observer=told) as pool, trio.open_nursery() as nursery:
        for number in range(600):
            nursery.start_soon(call, number)
            await trio.sleep(rng.random() * 0.3)
            if number % 100 == 50:
                start(nursery, pool.reset)  # which may fail: now and then a boot does
    assert ended == 600
    told.check(pool)
    labels = Counter(record.label for record in told.all if record.label is not None)
    assert set(labels.values()) == {1}
    assert set(pool.statistics().jobs) >= {"replied", "failed", "crashed", "cancelled", "job_timeout", "retired"}
    # Each that was not a job of a lease, or was one that got its lease, has a record of its own.
    assert sum(record.label is None for record in told.all) + len(labels) == len(told.all) >= 590


async def test_left_by_an_error(autojump_clock: MockClock) -> None:
    """Job observer: jobs of others that end with the block are told as closed."""
    told = Records()
    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="mine"):
            async with open_pool(config(work), job_observer=told) as pool:
                for _ in range(3):
                    start(nursery, ask, pool, "hang")
                await settle()
                raise ValueError("mine")
        await settle()
        assert [record.outcome for record in told.all] == ["closed"] * 3
        told.check(pool)


# an observer that misbehaves


async def test_one_that_raises(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Job observer: one that raises is logged, with the worker it was about, and does no harm."""

    def observe(record: JobRecord) -> None:
        raise ValueError(f"on {record.outcome}")

    async with open_pool(config(work, name="mine"), job_observer=observe) as pool:
        (worker,) = pool.workers
        assert await ask(pool) == "hello"
        with pytest.raises(JobError):
            await ask(pool, "fail")
        assert await ask(pool) == "hello"
        assert pool.workers == (worker,)
        assert pool.statistics().jobs == {"replied": 2, "failed": 1}
        raised = [record for record in caplog.records if record.exc_info]
        assert len(raised) == 3
        for record, outcome in zip(raised, ("replied", "failed", "replied"), strict=True):
            assert record.levelno == logging.ERROR
            assert "job observer" in record.getMessage()
            assert record.exc_info is not None
            assert str(record.exc_info[1]) == f"on {outcome}"
            about = record.__dict__
            assert (about["pool"], about["slot"], about["pid"], about["reason"]) == ("mine", 0, worker.pid, outcome)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_one_that_is_interrupted(error: type[BaseException], autojump_clock: MockClock) -> None:
    """Job observer: an interrupt in it leaves the block as itself."""

    def observe(record: JobRecord) -> None:
        raise error

    with pytest.raises(error):
        async with open_pool(config(work), job_observer=observe) as pool:
            await ask(pool)
            await trio.sleep_forever()


async def _async_observer(record: JobRecord) -> None: ...


@pytest.mark.parametrize("wrong", [1, "observer", [], _async_observer], ids=["int", "str", "list", "async"])
def test_one_that_cannot_be_called(wrong: Any) -> None:
    """Bad input: what can't be called in the middle of a change is a TypeError that names job_observer."""
    for opener in (
        lambda: open_pool(config(work), job_observer=wrong),
        lambda: open_python_pool(1, job_observer=wrong),
    ):
        with pytest.raises(TypeError, match="job_observer"):
            opener()


def test_the_other_observer_is_named(autojump_clock: MockClock) -> None:
    """Bad input: the error of one is not taken for that of the other."""
    wrong: Any = _async_observer
    with pytest.raises(TypeError, match=r"^observer must"):
        open_pool(config(work), observer=wrong)


# real processes, and functions


@pytest.mark.faults
async def test_of_processes() -> None:
    """Job observer: with real processes, garbage and too much memory included."""
    told = Records()
    limits = Limits(hard_memory=64 << 20)
    begun = trio.current_time()
    async with open_pool(puppets(limits=limits), job_observer=told) as pool:
        assert await tell(pool, "reply(b'x')") == b"x"
        assert (told.last.pid, told.last.outcome) == (pool.workers[0].pid, "replied")
        with pytest.raises(RelayError):
            await tell(pool, "raw(b'hello, I am garbage'); time.sleep(100)")
        assert told.last.outcome == "relay_error"
        with pytest.raises(WorkerCrashed):
            await tell(pool, "os._exit(3)")
        assert told.last.outcome == "crashed"
        with pytest.raises(WorkerError) as caught:
            await tell(pool, "held = bytearray(b'x') * (80 << 20); time.sleep(100)")
        assert caught.value.phase == "memory"
        assert (told.last.outcome, told.last.pid) == ("memory", caught.value.pid)
        assert begun <= told.all[0].queued
        assert told.last.ended <= trio.current_time()
        told.check(pool)


@pytest.mark.faults
async def test_labels_of_functions() -> None:
    """Job observer, labels: a function is called by its qualified name where nothing else is said."""
    told = Records()
    async with open_python_pool(1, job_observer=told, boot_timeout=30.0) as pool:
        await pool.run_sync(os.getpid)
        assert told.last.label == "posix.getpid"
        await pool.run_sync(jobs.echo, 1)
        assert told.last.label == "tests.python_pool_jobs.echo"
        assert told.last.pid == pool.workers[0].pid
        await pool.run_sync(functools.partial(jobs.add, 1, plus=2))
        assert told.last.label == "tests.python_pool_jobs.add"
        await pool.run_sync(jobs.echo, 1, label="mine")
        assert told.last.label == "mine"
        async with pool.stream(jobs.count, 2) as parts:
            assert [part async for part in parts] == [0, 1]
        assert told.last.label == "tests.python_pool_jobs.count"
        async with pool.map(jobs.square, range(3)) as results:
            assert [result async for result in results] == [0, 1, 4]
        assert told.last.label == "tests.python_pool_jobs.square"
        async with pool.lease() as worker:
            with pytest.raises(ValueError, match="x"):
                await worker.run_sync(jobs.fail, "x")
        assert (told.last.label, told.last.outcome) == ("tests.python_pool_jobs.fail", "failed")
        told.check(pool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, time.sleep, 100)
            await until(lambda: pool.workers[0].current)
            current = pool.workers[0].current
            assert current is not None
            assert current.label == "time.sleep"
            assert current.started <= trio.current_time()
            nursery.cancel_scope.cancel()
        assert (told.last.label, told.last.outcome) == ("time.sleep", "cancelled")


# the log


class Log(logging.Handler):
    """Keeps every record of the pool and its supervision."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def about(self, reason: str) -> list[tuple[int, int | None, int | None]]:
        """Level, slot and pid of every record with that reason."""
        return [
            (record.levelno, record.__dict__["slot"], record.__dict__["pid"])
            for record in self.records
            if record.__dict__["reason"] == reason
        ]

    def text(self, reason: str) -> str:
        return "\n".join(record.getMessage() for record in self.records if record.__dict__["reason"] == reason)


@pytest.fixture
def log() -> Iterator[Log]:
    """Every record of both loggers; each carries pool, slot, pid and reason."""
    handler = Log()
    loggers = [logging.getLogger(f"trio_workers.{name}") for name in ("pool", "supervision")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert handler.records
    for record in handler.records:
        about = record.__dict__
        assert about["pool"] == "mine", record
        assert about["slot"] is None or isinstance(about["slot"], int), record
        assert about["pid"] is None or isinstance(about["pid"], int), record
        assert isinstance(about["reason"], str), record


async def test_planned_ends_are_logged_for_debugging_only(log: Log, autojump_clock: MockClock) -> None:
    """Log: a planned retirement is DEBUG, with its reason; nothing else is said of it."""
    old = Release("old", took=0.1)
    limits = Limits(ttl=100.0, idle_ttl=20.0, jitter=0.0)
    cfg = old.config(name="mine", num_workers=2, max_workers=3, max_executions=4, limits=limits)
    async with open_pool(cfg) as pool:
        await pool.reset()
        await pool.resize(3)
        await pool.resize(2)
        for _ in range(10):
            await ask(pool)
        await trio.sleep(25)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask, pool, "sleep 5")
        await trio.sleep(200)
        await pool.workers[0].stop()
        assert set(pool.statistics().exits) == {
            "reset",
            "resize",
            "max_executions",
            "ttl",
            "idle_ttl",
            "shrink",
            "stopped",
        }
    assert {record.levelno for record in log.records} == {logging.DEBUG}
    for reason, count in pool.statistics().exits.items():
        assert len(log.about(reason)) >= count
        assert reason in log.text(reason)
    assert log.about("closing")


async def test_unexpected_deaths_are_warnings(log: Log, autojump_clock: MockClock) -> None:
    """Log: a death that nobody planned is one WARNING with the last of its stderr; so are limits that kill."""
    old = Release("old")

    async def handler(job: Job) -> Any:
        if job.body == b"bad boot":
            raise BadBoot("a broken wheel")
        return await work(job)

    cfg = config(handler, boot=old.boot, name="mine", limits=Limits(exec_ttl=5.0), restart=Restart(jitter=0.0))
    async with open_pool(cfg) as pool:
        dead = pool.workers[0].pid
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 7")
        assert (logging.WARNING, 0, dead) in log.about("crashed")
        assert "last words" in log.text("crashed")
        assert "status 7" in log.text("crashed")
        await settle()
        dead = pool.workers[0].pid
        with pytest.raises(JobTimeout):
            await ask(pool, "hang")
        assert (logging.WARNING, 0, dead) in log.about("exec_ttl")
        await settle()
        with pytest.raises(WorkerCrashed):
            await ask(pool, "bad boot")
        await trio.sleep(10)
        warnings = [record for record in log.records if record.levelno == logging.WARNING]
        assert len(warnings) == 4
        assert "a broken wheel" in warnings[2].getMessage()
        assert "a broken wheel" in warnings[3].getMessage()
        assert "before it was ready" in warnings[3].getMessage()
    assert not [record for record in log.records if record.levelno > logging.WARNING]


async def test_giving_up_is_an_error(log: Log, autojump_clock: MockClock) -> None:
    """Log: giving up is one ERROR, and each failed boot before it a WARNING."""
    old = Release("old")
    restart = Restart(jitter=0.0, give_up_after=3)
    with pytest.raises(RestartLimitExceeded):
        async with open_pool(old.config(name="mine", num_workers=1, restart=restart)) as pool:
            old.bad = lambda number: True
            await pool.workers[0].kill()
            await trio.sleep_forever()
    assert [record.levelno for record in log.records if record.levelno > logging.DEBUG] == [
        *[logging.WARNING] * 3,
        logging.ERROR,
    ]
    assert [level for level, _, _ in log.about("gave up")] == [logging.ERROR]
    assert "3 failed boots" in log.text("gave up")


async def test_a_failed_reset_is_logged(log: Log, autojump_clock: MockClock) -> None:
    """Log: the boot that a reset failed for is a WARNING with its stderr, and so is what it means for the pool."""
    old, new = Release("old"), Release("new", bad=lambda number: True)
    async with open_pool(old.config(name="mine")) as pool:
        with pytest.raises(SpawnError):
            await pool.reset(new.config(name="mine"))
    warnings = [record for record in log.records if record.levelno > logging.DEBUG]
    assert [record.levelno for record in warnings] == [logging.WARNING] * 2
    assert "new is broken" in warnings[0].getMessage()
    assert "goes back to what it was" in warnings[1].getMessage()


@pytest.mark.faults
async def test_the_log_of_processes(log: Log) -> None:
    """Log: the same of real processes: every record tells of which pool, slot and process it is, and why."""
    cfg = release("old", name="mine", destroy_timeout=0.2)
    async with open_pool(cfg) as pool:
        first, second = pool.workers
        await pool.reset()
        assert {(logging.DEBUG, worker.slot, worker.pid) for worker in (first, second)} <= set(log.about("reset"))
        victim = pool.workers[0]
        assert victim.pid is not None
        os.kill(victim.pid, 9)
        await until(lambda: pool.statistics().exits.get("crashed") == 1 and pool.statistics().idle == 2)
        assert (logging.WARNING, 0, victim.pid) in log.about("crashed")
        with trio.move_on_after(0.05):
            await pool.exec(Payload(b"hang"))
        await until(lambda: pool.statistics().exits.get("cancelled") == 1 and pool.statistics().idle == 2)
        assert [level for level, _, _ in log.about("cancelled")].count(logging.INFO) == 1
        with pytest.raises(SpawnError):
            await pool.reset(attrs.evolve(cfg, command=["/no/such/program"]))
        assert "/no/such/program" in "\n".join(
            record.getMessage() for record in log.records if record.levelno == logging.WARNING
        )


def test_a_record_needs_no_pool() -> None:
    """Job observer: its record is plain data, which can be made and compared by whoever tests an observer."""
    fields: dict[str, Any] = {
        "label": None, "slot": None, "pid": None, "queued": 1.0, "started": None, "ended": 2.0, "outcome": "closed",
    }  # fmt: skip
    assert JobRecord(**fields) == JobRecord(**fields)
    with pytest.raises(TypeError):
        JobRecord(*fields.values())  # type: ignore[misc]
    assert [field.name for field in attrs.fields(JobRecord)] == list(fields)
