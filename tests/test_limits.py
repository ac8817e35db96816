"""`Limits` and `max_executions`: who has had his time is replaced, and no capacity is lost by it.

The first half runs on workers in memory and a clock that jumps; the second, marked `faults`, on real processes.
"""

import functools
import itertools
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from tests.support import Floor, release
from tests.test_contract import TRANSPORTS, factory_of
from tests.test_faults import runs, until
from tests.test_pool_logic import ask, config, settle, work
from tests.test_reset import Callers, Release, at_rest, check_ledger, pids, start
from trio_workers import (
    Config,
    CurrentJob,
    JobTimeout,
    Limits,
    Payload,
    Restart,
    SpawnError,
    Worker,
    WorkerCrashed,
    WorkerError,
    WorkerEvent,
    WorkersError,
    WorkerState,
    _platform,
    open_pool,
    open_python_pool,
)
from trio_workers.child import STOP_REQUEST, Job
from trio_workers.testing import Crash

MIB: Final = 1 << 20


def limits(**changes: Any) -> Limits:
    """Limits without jitter."""
    return Limits(**{"jitter": 0.0, **changes})


async def keep_busy(pool: Any, text: str = "sleep 0.4") -> None:
    while True:
        await ask(pool, text)


# ttl


async def test_ttl(autojump_clock: MockClock) -> None:
    """Limits.ttl: workers of one age are replaced one after the other, each when its successor is ready."""
    floor, old = Floor(), Release("old", took=2)
    async with open_pool(old.config(limits=limits(ttl=100.0)), observer=floor) as pool:
        before = pids(pool)
        async with floor.watch(pool, every=0.5):
            await trio.sleep(99)
            assert pids(pool) == before
            await trio.sleep(8)
            assert not set(before) & set(pids(pool))
            assert at_rest(pool, 3)
        assert floor.lowest == 3
        assert floor.highest == 4
        assert floor.of("DESTRUCT") == ["ttl"] * 3
        assert pool.statistics().exits == {"ttl": 3}
        await trio.sleep(1000)
        assert pool.statistics().exits["ttl"] == pytest.approx(30, abs=3)
        assert floor.of("ERROR") == []


async def test_ttl_under_load(autojump_clock: MockClock) -> None:
    """Limits.ttl: 8 workers of one age under load: no moment has fewer than 8 ready or at work, no job is lost."""
    floor, old = Floor(), Release("old", took=3)
    async with (
        open_pool(old.config(num_workers=8, limits=limits(ttl=20.0)), observer=floor) as pool,
        trio.open_nursery() as nursery,
    ):
        for _ in range(20):
            nursery.start_soon(keep_busy, pool)
        async with floor.watch(pool, every=0.05):
            await trio.sleep(200)
        nursery.cancel_scope.cancel()
        assert floor.lowest == 8
        assert floor.highest <= 10  # one comes up while the last one is on its last job
        assert pool.statistics().exits["ttl"] > 40
        assert set(pool.statistics().jobs) == {"replied"}
    assert floor.of("ERROR") == []


async def test_ttl_does_not_end_a_job(autojump_clock: MockClock) -> None:
    """Limits.ttl: a job that runs for longer is finished; its worker goes after it, and after a lease."""
    old = Release("old")
    async with open_pool(old.config(num_workers=1, limits=limits(ttl=10.0))) as pool:
        before = pids(pool)
        assert await ask(pool, "sleep 50") == "old"
        await settle()
        assert at_rest(pool, 1)
        assert not set(before) & set(pids(pool))
        async with pool.lease() as worker:
            for _ in range(4):
                assert (await worker.exec(Payload(b"sleep 20"))).body == b"old"
        await worker.wait()
        assert pool.statistics().exits.keys() == {"ttl"}


async def test_ttl_with_boots_that_fail(autojump_clock: MockClock) -> None:
    """Limits.ttl: while no successor boots the old ones serve on, without a dip; the failures are told."""
    floor, old = Floor(), Release("old", took=1)
    async with (
        open_pool(old.config(limits=limits(ttl=10.0), restart=Restart(jitter=0.0)), observer=floor) as pool,
        trio.open_nursery() as nursery,
    ):
        before = pids(pool)
        for _ in range(6):
            nursery.start_soon(keep_busy, pool)
        async with floor.watch(pool, every=0.05):
            old.bad = lambda number: True
            await trio.sleep(60)
            assert set(before) <= set(pids(pool))
            failed = pool.statistics().failed_starts
            assert 3 <= failed == len(floor.of("ERROR")) < 3 * 12  # each slot waits longer from time to time
            assert all(isinstance(error, SpawnError) for error in floor.of("ERROR"))
            old.bad = lambda number: False
            await trio.sleep(80)
            assert not set(before) & set(pids(pool))
        assert floor.lowest == 3
        assert pool.statistics().failed_starts == failed
        assert set(pool.statistics().jobs) == {"replied"}
        nursery.cancel_scope.cancel()


async def test_ttl_shorter_than_a_boot(autojump_clock: MockClock) -> None:
    """Limits.ttl: however long boots take, the old ones serve until then."""
    floor, old = Floor(), Release("old", took=30)
    async with open_pool(old.config(limits=limits(ttl=5.0)), observer=floor) as pool:
        async with floor.watch(pool, every=0.5):
            for _ in range(100):
                assert await ask(pool, "sleep 4") == "old"
        assert floor.lowest == 3
        assert floor.highest <= 5
        assert pool.statistics().exits["ttl"] > 8


async def test_jitter_of_ttl(autojump_clock: MockClock) -> None:
    """Limits.jitter: each worker's ttl is drawn shorter by up to that share, never longer."""
    lived: list[float] = []
    born: dict[Worker, float] = {}

    def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        assert worker is not None
        if event is WorkerEvent.CREATED:
            born[worker] = trio.current_time()
        elif context == "ttl":
            lived.append(trio.current_time() - born[worker])

    cfg = config(work, num_workers=8, limits=Limits(ttl=100.0, jitter=0.5))
    async with open_pool(cfg, observer=observer):
        await trio.sleep(1000)
    assert len(lived) > 60
    assert 50 <= min(lived) < 60
    assert 90 < max(lived) <= 100
    assert len(set(lived)) > 60


# idle_ttl


async def test_idle_ttl(autojump_clock: MockClock) -> None:
    """Limits.idle_ttl: one that has worked and is idle for so long is replaced; one that is fresh is left alone."""
    floor, old = Floor(), Release("old", took=1)
    async with open_pool(old.config(limits=limits(idle_ttl=10.0)), observer=floor) as pool:
        before = pids(pool)
        async with floor.watch(pool, every=0.5):
            await trio.sleep(100)
            assert pids(pool) == before
            await ask(pool, "sleep 5")
            await trio.sleep(9)
            assert pids(pool) == before
            await trio.sleep(3)
            assert len(set(before) & set(pids(pool))) == 2
            await trio.sleep(100)
        assert floor.lowest == 3
        assert pool.statistics().exits == {"idle_ttl": 1}
        assert floor.of("DESTRUCT") == ["idle_ttl"]


async def test_idle_ttl_begins_anew(autojump_clock: MockClock) -> None:
    """Limits.idle_ttl: each job begins it anew; who is of use again before his successor has been asked for stays."""
    old = Release("old")
    async with open_pool(old.config(num_workers=1, limits=limits(idle_ttl=10.0))) as pool:
        for _ in range(20):
            await ask(pool, "sleep 1")
            await trio.sleep(9)
        assert pool.statistics().exits == {}
        await ask(pool, "sleep 100")
        assert pool.statistics().exits == {}


# exec_ttl


class Told:
    """An observer that keeps what it is told, and which worker was it."""

    def __init__(self) -> None:
        self.events: list[tuple[WorkerEvent, Worker | None, Any]] = []

    def __call__(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        self.events.append((event, worker, context))

    def of(self, kind: WorkerEvent) -> list[Any]:
        return [context for event, _, context in self.events if event is kind]


async def test_exec_ttl(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Limits.exec_ttl: a job that takes too long is JobTimeout, its worker is killed and replaced; no other is hurt."""
    caplog.set_level(logging.DEBUG, "trio_workers")
    told = Told()
    cfg = config(work, num_workers=2, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg, observer=told) as pool, trio.open_nursery() as nursery:
        other = start(nursery, ask, pool, "sleep 9")
        with pytest.raises(JobTimeout, match=r"exec_ttl \(10 s\)") as caught:
            await pool.exec(Payload(b"hang"), label="the report")
        error = caught.value
        assert trio.current_time() == 10
        victim = next(worker for event, worker, _ in told.events if event is WorkerEvent.DESTRUCT)
        assert victim is not None
        assert (error.pid, error.slot, error.started) == (victim.pid, victim.slot, True)
        assert "'the report'" in str(error)
        assert str(victim.pid) in str(error)
        assert isinstance(error, trio.TooSlowError)
        assert isinstance(error, WorkersError)
        assert not isinstance(error, WorkerError)
        await other.done.wait()
        assert other.error is None
        await settle()
        assert at_rest(pool, 2)
        assert victim.state.value is WorkerState.ERRORED
        with pytest.raises(WorkerError):
            await victim.wait()
        assert pool.statistics().exits == {"exec_ttl": 1}
        assert pool.statistics().jobs == {"job_timeout": 1, "replied": 1}
        assert [type(context) for context in told.of(WorkerEvent.ERROR)] == [JobTimeout]
        assert told.of(WorkerEvent.DESTRUCT) == ["exec_ttl"]
        records = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [record.__dict__["reason"] for record in records] == ["exec_ttl"]
        assert "'the report'" in records[0].getMessage()


async def test_exec_ttl_does_not_count_the_wait(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: it counts from the job's start, however long it waited; each job anew."""
    cfg = config(work, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        jobs = [start(nursery, ask, pool, "sleep 9") for _ in range(5)]
        for job in jobs:
            await job.done.wait()
            assert job.error is None
        assert trio.current_time() == 45
        assert pool.statistics().exits == {}


async def test_exec_ttl_of_a_stream(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: a stream's whole time counts, not that between its parts."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        for number in itertools.count():
            yield b"%d" % number
            await trio.sleep(1)

    cfg = config(handler, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg) as pool:
        got: list[bytes] = []
        with pytest.raises(JobTimeout) as caught:
            async with pool.stream(Payload(), label="endless") as parts:
                async for part in parts:
                    got.append(part.body)  # noqa: PERF401 - those that came before the error are wanted
        assert trio.current_time() == 10
        assert len(got) in (10, 11)
        assert caught.value.started is True
        assert "'endless'" in str(caught.value)
        await settle()
        assert at_rest(pool, 1)
        assert pool.statistics().jobs == {"job_timeout": 1}


async def test_exec_ttl_with_a_slow_consumer(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: it strikes while nobody asks for a part, too, and comes out of the next one."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        while True:
            yield b"part"
            await trio.sleep(1)

    cfg = config(handler, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg) as pool:
        with pytest.raises(JobTimeout):
            async with pool.stream(Payload()) as parts:
                assert (await anext(parts)).body == b"part"
                await trio.sleep(100)
                await settle()
                assert at_rest(pool, 1)
                async for _ in parts:
                    pass
        assert pool.statistics().exits == {"exec_ttl": 1}


async def test_exec_ttl_in_a_lease(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: it is about a job inside a lease, not about the lease, which may last."""
    cfg = config(work, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg) as pool:
        async with pool.lease() as worker:
            for _ in range(3):
                await trio.sleep(20)
                await worker.exec(Payload(b"sleep 9"))
            with pytest.raises(JobTimeout) as caught:
                await worker.exec(Payload(b"hang"), label="inside")
            assert (caught.value.pid, caught.value.slot) == (worker.pid, 0)
            assert "'inside'" in str(caught.value)
            with pytest.raises((WorkerError, trio.ClosedResourceError)):
                await worker.exec(Payload(b"more"))
        await settle()
        assert at_rest(pool, 1)
        assert await ask(pool) == "hello"


async def test_exec_ttl_in_a_map(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: of a map one job fails in its place, the others are answered."""
    cfg = config(work, num_workers=2, limits=limits(exec_ttl=10.0))
    texts = ["sleep 1", "hang", "sleep 2", "sleep 3"]
    async with (
        open_pool(cfg) as pool,
        pool.map((Payload(text.encode()) for text in texts), return_exceptions=True) as replies,
    ):
        got = [reply async for reply in replies]
    assert [type(reply) for reply in got] == [Payload, JobTimeout, Payload, Payload]


@pytest.mark.parametrize("order", range(8))
async def test_a_reply_in_the_same_moment(order: int, autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: whether the reply or the limit comes first in one moment, the job ends in one way."""
    cfg = config(work, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        job = start(nursery, ask, pool, "sleep 10")
        await trio.sleep(20)
        assert job.done.is_set()
        assert job.at == 10
        if job.error is None:
            assert pool.statistics().jobs == {"replied": 1}
        else:
            assert isinstance(job.error, JobTimeout)
            assert pool.statistics().jobs == {"job_timeout": 1}
        assert at_rest(pool, 1)


async def test_a_reply_that_lies_there(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: a reply that had come before the kill is delivered."""

    async def handler(job: Job) -> bytes:
        return b"reply"

    cfg = config(handler, limits=limits(exec_ttl=10.0))
    async with open_pool(cfg) as pool:
        async with pool.stream(Payload()) as parts:
            await trio.sleep(100)  # nobody has read it
            assert [part.body async for part in parts] == [b"reply"]
        await settle()
        assert at_rest(pool, 1)
        assert await ask(pool, "x") == "reply"


async def test_exec_ttl_of_one_that_asks_to_be_replaced(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: a job that is handed on has its whole time on the next worker."""
    asked: Counter[bytes] = Counter()

    async def handler(job: Job) -> bytes:
        asked[job.body] += 1
        await trio.sleep(6)
        return STOP_REQUEST if asked[job.body] < 3 else b"done"

    async with open_pool(config(handler, num_workers=2, limits=limits(exec_ttl=10.0))) as pool:
        assert await ask(pool, "x") == "done"
        assert trio.current_time() == 18
        assert pool.statistics().exits == {"stop request": 2}


async def test_exec_ttl_strikes_nobody_twice(autojump_clock: MockClock) -> None:
    """Limits.exec_ttl: a job whose worker died of itself before, and one that was cancelled, have their own endings."""

    async def handler(job: Job) -> bytes:
        if job.body == b"crash":
            await trio.sleep(9.9)
            raise Crash(3)
        await trio.sleep_forever()
        return b""

    async with open_pool(config(handler, num_workers=2, limits=limits(exec_ttl=10.0))) as pool:
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash")
        with trio.move_on_after(9.9):
            await ask(pool, "hang")
        await trio.sleep(100)
        assert pool.statistics().exits == {"crashed": 1, "cancelled": 1}
        assert at_rest(pool, 2)


# max_executions


@pytest.mark.parametrize("jitter", [0.0, 0.1])
async def test_max_executions_has_its_successor_ahead(jitter: float, autojump_clock: MockClock) -> None:
    """Max_executions: never one job more, and at a steady pace no job ever finds a worker less."""
    floor = Floor()
    begun: Counter[int] = Counter()
    took = 2.0

    async def boot(slot: int) -> None:
        await trio.sleep(took)

    async def handler(job: Job) -> bytes:
        await trio.sleep(0.5)
        return b""

    cfg = config(handler, boot=boot, num_workers=2, max_executions=20, limits=Limits(jitter=jitter))

    def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        floor(event, worker, context)
        if event is WorkerEvent.DESTRUCT and context == "max_executions":
            assert worker is not None
            begun[worker.state.num_execs] += 1

    async with open_pool(cfg, observer=observer) as pool, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(keep_busy, pool, "x")
        async with floor.watch(pool, every=0.05):
            await trio.sleep(300)
        nursery.cancel_scope.cancel()
        assert floor.lowest == 2
        assert max(begun) <= 20
        assert min(begun) >= (20 if not jitter else 18)
        assert begun.total() == pytest.approx(60, abs=8)
        assert pool.statistics().jobs["replied"] >= 2 * 300 / 0.5 - 4


async def test_max_executions_that_come_too_fast(autojump_clock: MockClock) -> None:
    """Max_executions: jobs that go faster than boots wait for them; still never one more, and none is lost."""
    begun: Counter[int] = Counter()

    async def boot(slot: int) -> None:
        await trio.sleep(5)

    def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.DESTRUCT and context == "max_executions":
            assert worker is not None
            begun[worker.state.num_execs] += 1

    cfg = config(work, boot=boot, num_workers=2, max_executions=3, limits=limits())
    async with open_pool(cfg, observer=observer) as pool, trio.open_nursery() as nursery:
        jobs = [start(nursery, ask, pool, "sleep 0.1") for _ in range(30)]
        for job in jobs:
            await job.done.wait()
            assert job.error is None
    assert begun.keys() == {3}
    assert begun.total() in (9, 10)


@pytest.mark.parametrize("limit", [1, 2, 5, 10])
async def test_small_max_executions_have_no_jitter(limit: int, autojump_clock: MockClock) -> None:
    """Limits.jitter: by default a bound of up to 10 jobs is that bound."""
    begun: Counter[int] = Counter()

    def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.DESTRUCT and context == "max_executions":
            assert worker is not None
            begun[worker.state.num_execs] += 1

    async with open_pool(config(work, max_executions=limit), observer=observer) as pool:
        for _ in range(10 * limit):
            await ask(pool)
    assert begun.keys() == {limit}


async def test_ttl_and_max_executions_together(autojump_clock: MockClock) -> None:
    """Limits: who is about to be spent and too old at once has one successor, not two."""
    floor, old = Floor(), Release("old", took=1)
    cfg = old.config(num_workers=2, max_executions=50, limits=limits(ttl=4.9))
    async with open_pool(cfg, observer=floor) as pool, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(keep_busy, pool)
        async with floor.watch(pool, every=0.05):
            await trio.sleep(100)
        nursery.cancel_scope.cancel()
        assert floor.lowest == 2
        assert floor.highest <= 4
        assert sum(floor.of("DESTRUCT").count(reason) for reason in ("ttl", "max_executions")) < 50


# memory, as it is decided


class Memory:
    """Stands in for the system: what each pid has, in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[int, int] = {}
        self.usual = 10
        self.passes = 0

        def resident_memory(worker: Worker) -> int | None:
            return None if worker.pid is None else self.of.get(worker.pid, self.usual) * MIB

        monkeypatch.setattr(Worker, "resident_memory", resident_memory)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


async def test_max_memory_takes_two_readings(memory: Memory, autojump_clock: MockClock) -> None:
    """Limits.max_memory: one reading above it is a peak; two in a row, and the worker is replaced."""
    floor = Floor()
    cfg = config(work, num_workers=2, limits=limits(max_memory=100 * MIB))
    async with open_pool(cfg, observer=floor) as pool:
        for _ in range(4):
            await ask(pool)
        first, second = pool.workers
        assert first.pid is not None
        await trio.sleep(1.5)
        assert pool.statistics().memory == {0: 10 * MIB, 1: 10 * MIB}
        for _ in range(3):
            memory.of[first.pid] = 200
            await trio.sleep(1)
            assert pool.statistics().memory[0] == 200 * MIB
            memory.of[first.pid] = 100
            await trio.sleep(1)
        assert pool.workers == (first, second)
        memory.of[first.pid] = 101
        async with floor.watch(pool, every=0.05):
            await trio.sleep(2)
        assert floor.lowest == 2
        assert first not in pool.workers
        assert second in pool.workers
        assert pool.statistics().exits == {"max_memory": 1}
        assert floor.of("DESTRUCT") == ["max_memory"]
        assert floor.of("ERROR") == []


async def test_max_memory_spares_the_job(memory: Memory, autojump_clock: MockClock) -> None:
    """Limits.max_memory: it never strikes under a job, however long that takes, nor in a lease."""
    cfg = config(work, limits=limits(max_memory=100 * MIB))
    async with open_pool(cfg) as pool:
        memory.usual = 200
        assert await ask(pool, "sleep 100") == "sleep 100"
        await settle()
        assert pool.statistics().exits == {"max_memory": 1}
        async with pool.lease() as worker:
            for _ in range(5):
                await worker.exec(Payload(b"sleep 10"))
            memory.usual = 10
        await worker.wait()
        await settle()
        assert at_rest(pool, 1)
        assert pool.statistics().exits == {"max_memory": 2}
        await trio.sleep(50)
        assert pool.statistics().exits == {"max_memory": 2}


async def test_large_from_birth(memory: Memory, autojump_clock: MockClock) -> None:
    """Limits.max_memory: a worker that is above it without a job is left alone: another would be no smaller."""
    cfg = config(work, num_workers=2, limits=limits(max_memory=100 * MIB))
    async with open_pool(cfg) as pool:
        memory.usual = 200
        await trio.sleep(1000)
        assert pool.statistics().exits == {}
        await ask(pool)
        await trio.sleep(1000)
        assert pool.statistics().exits == {"max_memory": 1}
        assert pool.statistics().starts == 3


async def test_max_memory_of_all_at_once(memory: Memory, autojump_clock: MockClock) -> None:
    """Limits.max_memory: of all workers at once, they are replaced one by one, and none is missing meanwhile."""
    floor, old = Floor(), Release("old", took=3)
    cfg = old.config(num_workers=8, limits=limits(max_memory=100 * MIB))
    async with open_pool(cfg, observer=floor) as pool, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(keep_busy, pool)
        await trio.sleep(5)
        for pid in pids(pool):
            assert pid is not None
            memory.of[pid] = 101
        async with floor.watch(pool, every=0.05):
            await trio.sleep(60)
        nursery.cancel_scope.cancel()
        assert floor.lowest == 8
        assert floor.highest <= 10
        assert pool.statistics().exits == {"max_memory": 8}


async def test_hard_memory(memory: Memory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Limits.hard_memory: a worker above it is killed, and its job is a WorkerError that says how much it was."""
    told = Told()
    cfg = config(work, num_workers=2, limits=limits(max_memory=100 * MIB, hard_memory=300 * MIB))
    async with open_pool(cfg, observer=told) as pool, trio.open_nursery() as nursery:
        other = start(nursery, ask, pool, "sleep 5")
        job = start(nursery, functools.partial(pool.exec, Payload(b"hang"), label="victim"))
        await settle()
        (victim,) = (worker for worker in pool.workers if worker.current == CurrentJob("victim", 0.0))
        assert victim.pid is not None
        memory.of[victim.pid] = 301
        for outcome in (job, other):
            await outcome.done.wait()
        error = job.error
        assert type(error) is WorkerError
        assert (error.phase, error.started, error.pid, error.slot) == ("memory", True, victim.pid, victim.slot)
        assert "301 MiB" in str(error)
        assert "hard_memory (300 MiB)" in str(error)
        assert other.error is None
        assert at_rest(pool, 2)
        assert pool.statistics().exits == {"hard_memory": 1}
        assert pool.statistics().jobs == {"memory": 1, "replied": 1}
        assert told.of(WorkerEvent.DESTRUCT) == ["hard_memory"]
        (context,) = told.of(WorkerEvent.ERROR)
        assert type(context) is WorkerError
        assert context.phase == "memory"
        (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
        assert "301 MiB" in record.getMessage()
        assert record.__dict__["reason"] == "hard_memory"


async def test_hard_memory_during_a_reset(memory: Memory, autojump_clock: MockClock) -> None:
    """Limits.hard_memory: workers from before a reset keep their bound, also where the new ones have none."""
    async with open_pool(config(work, limits=limits(hard_memory=300 * MIB))) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as worker:
            change = start(nursery, pool.reset, config(work))
            await settle()
            assert worker.pid is not None
            memory.of[worker.pid] = 301
            with pytest.raises(WorkerError) as caught:
                await worker.exec(Payload(b"hang"))
        assert caught.value.phase == "memory"
        await change.done.wait()
        assert change.error is None


async def test_hard_memory_of_an_idle_worker(memory: Memory, autojump_clock: MockClock) -> None:
    """Limits.hard_memory: an idle worker above it is killed as well; one that is too large from birth backs off."""
    cfg = config(work, limits=limits(hard_memory=300 * MIB), restart=Restart(jitter=0.0))
    async with open_pool(cfg) as pool:
        await ask(pool)
        memory.usual = 400
        await trio.sleep(1.5)
        assert pool.statistics().exits["hard_memory"] == 1
        await trio.sleep(300)
        # A second for each reading, and a pause that grows to 30 s.
        assert pool.statistics().exits["hard_memory"] < 25
        memory.usual = 10
        await trio.sleep(31)
        assert at_rest(pool, 1)


async def test_no_readings_without_a_bound(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Limits: where no bound is set to memory nobody reads it."""

    def resident_memory(worker: Worker) -> int | None:
        raise AssertionError("it was read")

    monkeypatch.setattr(Worker, "resident_memory", resident_memory)
    async with open_pool(config(work, limits=limits(ttl=1000.0))) as pool:
        await ask(pool, "sleep 10")
        assert pool.statistics().memory == {}


async def test_one_reading_a_second(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """Limits: all workers are read once a second, in one pass, whatever the jobs do."""
    read: list[tuple[float, int]] = []

    def resident_memory(worker: Worker) -> int | None:
        read.append((trio.current_time(), worker.slot))
        return MIB

    monkeypatch.setattr(Worker, "resident_memory", resident_memory)
    async with (
        open_pool(config(work, num_workers=3, limits=limits(max_memory=10 * MIB))) as pool,
        trio.open_nursery() as nursery,
    ):
        for _ in range(5):
            nursery.start_soon(keep_busy, pool, "sleep 0.07")
        await trio.sleep(10.5)
        nursery.cancel_scope.cancel()
    assert read == [(pytest.approx(second), slot) for second in range(1, 11) for slot in range(3)]


@pytest.mark.parametrize("field", ["max_memory", "hard_memory"])
async def test_without_psutil(field: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """Limits: where there is neither /proc nor psutil one sentence names the extra; nothing has been started."""
    monkeypatch.setattr(_platform, "HERE", _platform.Portable())
    monkeypatch.setitem(sys.modules, "psutil", None)
    old = Release("old")
    bounded = limits(**{field: 100 * MIB})
    with pytest.raises(RuntimeError, match=r"psutil.*trio_workers\[memory\]") as caught:
        async with open_pool(old.config(limits=bounded)):
            pytest.fail("it opened")
    assert "\n" not in str(caught.value)
    assert old.boots == 0
    async with open_pool(old.config()) as pool:
        cfg, before = pool.config, pids(pool)
        with pytest.raises(RuntimeError, match=r"trio_workers\[memory\]"):
            await pool.reset(old.config(limits=bounded))
        assert pool.config is cfg
        assert pids(pool) == before
        assert at_rest(pool, 3)
        assert await ask(pool) == "old"
        await pool.reset()
        assert at_rest(pool, 3)


async def test_without_psutil_in_a_pool_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits: likewise for functions."""
    monkeypatch.setattr(_platform, "HERE", _platform.Portable())
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(RuntimeError, match=r"trio_workers\[memory\]"):
        async with open_python_pool(1, limits=Limits(max_memory=MIB)):
            pytest.fail("it opened")


# real processes


def processes(name: str = "old", *ledger: Path, **fields: Any) -> Config:
    return release(name, *ledger, **fields)


@pytest.mark.faults
async def test_ttl_of_processes_under_load(tmp_path: Path) -> None:
    """Limits.ttl: 8 processes of one age under load: at no moment are fewer than 8 ready or at work; no job is lost."""
    floor, ledger = Floor(), tmp_path / "ledger"
    cfg = processes("old", ledger, num_workers=8, limits=limits(ttl=0.3))
    async with open_pool(cfg, observer=floor) as pool:
        callers = Callers(pool, 16, "sleep 0.01")
        async with callers(), floor.watch(pool):
            await until(lambda: pool.statistics().exits.get("ttl", 0) >= 20)
        assert floor.lowest == 8
    check_ledger(ledger, callers)
    assert floor.of("ERROR") == []


@pytest.mark.faults
async def test_idle_ttl_of_processes() -> None:
    """Limits.idle_ttl: a process that has worked and is idle is replaced, in the background."""
    floor = Floor()
    async with open_pool(processes(limits=limits(idle_ttl=0.1)), observer=floor) as pool:
        before = pids(pool)
        await pool.exec(Payload(b"say"))
        async with floor.watch(pool):
            await until(lambda: pool.statistics().exits == {"idle_ttl": 1})
        assert floor.lowest == 2
        assert len(set(before) & set(pids(pool))) == 1


@pytest.mark.faults
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_exec_ttl_of_processes(
    transport: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: MockClock
) -> None:
    """Limits.exec_ttl: a process that hangs in a job is killed; the error holds its last words, and so does the log."""
    told = Told()
    factory = factory_of(transport, tmp_path)
    async with (
        open_pool(processes(factory=factory, limits=limits(exec_ttl=60.0)), observer=told) as pool,
        trio.open_nursery() as nursery,
    ):
        other = start(nursery, pool.exec, Payload(b"sleep 0.1"))

        async def let_it_be_late() -> None:
            await other.done.wait()
            await until(lambda: any(one.process and one.process.stderr_tail for one in pool.workers))
            clock.jump(60.0)

        nursery.start_soon(let_it_be_late)
        with pytest.raises(JobTimeout) as caught:
            await pool.exec(Payload(b"hang"), label="the report")
        error = caught.value
        assert error.pid is not None
        assert not runs(error.pid)
        assert error.stderr == "hangs now"
        assert any("hangs now" in note for note in error.__notes__)
        assert error.started is (None if transport == "tcp" else True)
        assert other.error is None
        await until(lambda: at_rest(pool, 2))
        assert error.pid not in pids(pool)
        assert pool.statistics().exits == {"exec_ttl": 1}
        assert told.of(WorkerEvent.DESTRUCT) == ["exec_ttl"]
        (record,) = (record for record in caplog.records if "exec_ttl" in record.getMessage())
        assert record.levelno == logging.WARNING
        assert "hangs now" in record.getMessage()
        assert record.__dict__["pid"] == error.pid


@pytest.mark.faults
async def test_max_executions_of_processes_under_load(tmp_path: Path) -> None:
    """Max_executions: many jobs over two processes: none begins one more than it may, and every one is answered."""
    ledger = tmp_path / "ledger"
    cfg = processes("old", ledger, max_executions=20, limits=limits())
    async with open_pool(cfg) as pool:
        callers = Callers(pool, 8)
        async with callers():
            await callers.more(400)
        await until(lambda: pool.statistics().exits["max_executions"] >= 18)
    check_ledger(ledger, callers)
    begun = Counter(line.split()[1] for line in ledger.read_text().splitlines())
    assert max(begun.values()) == 20
    assert sum(count < 20 for count in begun.values()) <= 4  # those that were there when the pool was closed


@pytest.mark.faults
async def test_max_memory_of_processes() -> None:
    """Limits.max_memory: a process that has grown is replaced after its job, after two readings; the pool says so."""
    floor = Floor()
    cfg = processes(limits=limits(max_memory=64 * MIB))
    async with open_pool(cfg, observer=floor) as pool, trio.open_nursery() as nursery:
        async with floor.watch(pool):
            async with pool.lease() as worker:
                await worker.exec(Payload(b"grow 80"))
                slot = worker.slot
                await until(lambda: pool.statistics().memory.get(slot, 0) > 80 * MIB)
                job = start(nursery, worker.exec, Payload(b"sleep 1.2"))
                await job.done.wait()
                assert job.error is None
            await until(lambda: pool.statistics().exits == {"max_memory": 1})
            await worker.wait()
        assert floor.lowest == 2
        assert floor.of("ERROR") == []
        await until(lambda: at_rest(pool, 2))
        await until(lambda: 0 < pool.statistics().memory.get(slot, 0) < 64 * MIB)


@pytest.mark.faults
@pytest.mark.parametrize("system", ["native", "portable"])
async def test_hard_memory_of_processes(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits.hard_memory: a process above it is killed under its job, by /proc's word or by psutil's."""
    read: list[int] = []
    if system == "portable":
        here = _platform.Portable()
        by_psutil = here.resident_memory

        def resident_memory(pid: int) -> int | None:
            figure = by_psutil(pid)
            read.append(figure or 0)
            return figure

        monkeypatch.setattr(here, "resident_memory", resident_memory)
        monkeypatch.setattr(_platform, "HERE", here)
    told = Told()
    cfg = processes(limits=limits(hard_memory=64 * MIB))
    async with open_pool(cfg, observer=told) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as worker:
            other = start(nursery, pool.exec, Payload(b"sleep 0.2"))
            with pytest.raises(WorkerError) as caught:
                await worker.exec(Payload(b"hoard 80"), label="the report")
        error = caught.value
        assert type(error) is WorkerError
        assert (error.phase, error.returncode, error.pid) == ("memory", -9, worker.pid)
        assert error.started is (True if system == "native" else None)
        figure = re.search(r"used (\d+) MiB of memory, more than hard_memory \(64 MiB\)", str(error))
        assert figure is not None
        assert 64 <= int(figure[1]) < 200
        assert "'the report'" in str(error)
        await other.done.wait()
        assert other.error is None
        await until(lambda: at_rest(pool, 2))
        assert pool.statistics().exits == {"hard_memory": 1}
        assert pool.statistics().jobs["memory"] == 1
        assert [type(context) for context in told.of(WorkerEvent.ERROR)] == [WorkerError]
    assert bool(read) is (system == "portable")


@pytest.mark.faults
async def test_memory_of_a_process_that_is_gone() -> None:
    """Limits: a reading of a process that has ended is none, on both kinds of system."""
    for here in (_platform.HERE, _platform.Portable()):
        figure = here.resident_memory(os.getpid())
        assert figure is not None
        assert figure > MIB
        async with open_pool(processes(num_workers=1)) as pool:
            (worker,) = pool.workers
            assert worker.pid is not None
            assert (worker.resident_memory() or 0) > MIB
            pid = worker.pid
        assert here.resident_memory(pid) is None


@pytest.mark.faults
async def test_limits_of_functions() -> None:
    """Limits: a pool of functions has them, too."""
    fields: dict[str, Any] = {"boot_timeout": 30.0, "restart": Restart(initial=0.02)}
    async with open_python_pool(1, limits=limits(exec_ttl=3.0, ttl=1000.0), **fields) as pool:
        with pytest.raises(JobTimeout, match=r"time\.sleep") as caught:
            await pool.run_sync(time.sleep, 100)
        assert caught.value.started is True
        await until(lambda: at_rest(pool, 1))
        assert await pool.run_sync(len, "four") == 4
        assert pool.statistics().exits == {"exec_ttl": 1}
    async with open_python_pool(1, limits=limits(hard_memory=200 * MIB), **fields) as pool, pool.lease() as worker:
        with pytest.raises(WorkerError, match="hard_memory") as error:
            await worker.run_sync(_take_memory, 400 * MIB)
        assert error.value.phase == "memory"


def _take_memory(size: int) -> None:
    data = bytearray(b"x") * size
    time.sleep(100)
    del data
