"""Observers that come and go while a pool runs, and the facts that everyone who looks at a pool shares."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support import until
from trio_workers import (
    Config,
    JobRecord,
    Payload,
    Pool,
    PythonPool,
    WorkerCrashed,
    WorkerEvent,
    open_pool,
    open_python_pool,
)
from trio_workers._watch import BOUNDS, describe_pool, describe_workers, watch_pool, why_not_ready
from trio_workers.child import Job
from trio_workers.testing import BadBoot, Crash, MemoryFactory


async def answer(job: Job) -> bytes:
    """Do as the body says."""
    if job.body == b"crash":
        raise Crash(3)
    if job.body == b"wait":
        await trio.sleep_forever()
    if job.body == b"nap":
        await trio.sleep(2)
    return job.body


def config(**more: object) -> Config:
    """Describe a pool of one worker inside this process."""
    return Config(**{"command": ["none"], "num_workers": 1, "factory": MemoryFactory(answer), **more})  # type: ignore[arg-type]


async def test_observers_come_and_go(autojump_clock: object) -> None:
    """An observer that is added hears of what comes, besides the first; one that is removed of nothing more."""
    first: list[str] = []
    second: list[str] = []
    records: list[JobRecord] = []

    def see(event: WorkerEvent, worker: object, context: object) -> None:
        second.append(event.name)

    async with open_pool(config(), observer=lambda event, *_: first.append(event.name)) as pool:
        pool.add_observer(see)
        pool.add_job_observer(records.append)
        await pool.exec(Payload(b"one"), label="one")
        await pool.reset()
        pool.remove_observer(see)
        pool.remove_job_observer(records.append)
        await pool.exec(Payload(b"two"))
        await pool.reset()
    assert first == ["CREATED", "CREATED", "DESTRUCT", "CREATED", "DESTRUCT", "DESTRUCT"]
    assert second == ["CREATED", "DESTRUCT"]
    assert [(record.label, record.outcome) for record in records] == [("one", "replied")]


async def test_the_last_job_observer_takes_the_cost_with_it(autojump_clock: object) -> None:
    """Without job observers nothing is called at a job's end, whether there never was one or none is left."""
    async with open_pool(config()) as pool:
        exchange = pool._core.exchange
        assert exchange.tell is None
        pool.add_job_observer(print)
        pool.add_job_observer(len)
        pool.remove_job_observer(print)
        assert exchange.tell is not None
        pool.remove_job_observer(len)
        assert exchange.tell is None


async def test_an_observer_that_is_none_is_refused(autojump_clock: object) -> None:
    """What can't be called, or is not there, is named."""

    async def late(*_: object) -> None:
        """Do nothing."""

    async with open_pool(config()) as pool:
        with pytest.raises(TypeError, match="observer must be callable, not NoneType"):
            pool.add_observer(None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="job_observer must be a plain function, not an async one"):
            pool.add_job_observer(late)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is not an observer of this pool"):
            pool.remove_observer(print)
        with pytest.raises(ValueError, match="is not a job observer of this pool"):
            pool.remove_job_observer(print)


async def test_a_raising_observer_keeps_no_other_from_hearing(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is called, whatever the one before did."""
    records: list[JobRecord] = []

    def fall(_: JobRecord) -> None:
        raise RuntimeError("fell")

    async with open_pool(config(), job_observer=fall) as pool:
        pool.add_job_observer(records.append)
        await pool.exec(Payload(b"one"))
    assert len(records) == 1
    assert "the job observer raised an exception" in caplog.text


async def test_facts_can_be_written_as_json(autojump_clock: object) -> None:
    """Facts of a pool and its workers are values that JSON can hold, and say what the statistics say."""
    async with open_pool(config(name="mill")) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.exec, Payload(b"nap"), label="a nap"))
        await until(lambda: pool.statistics().busy == 1)
        await trio.sleep(1)
        facts = json.loads(json.dumps(describe_pool(pool)))
        (worker,) = json.loads(json.dumps(describe_workers(pool)))
    assert (facts["pool"], facts["busy"], facts["idle"], facts["target"]) == ("mill", 1, 0, 1)
    assert (facts["accepting"], facts["closed"]) == (True, False)
    assert (worker["slot"], worker["status"], worker["jobs"]) == (0, "busy", 1)
    assert worker["job"] == {"label": "a nap", "age": pytest.approx(1.0, abs=0.1)}


async def test_deaths_are_remembered_by_slot(autojump_clock: object) -> None:
    """The last end of each slot's worker: the reason, and the words of its error."""
    async with open_pool(config()) as pool:
        watch = watch_pool(pool)
        assert watch is watch_pool(pool)
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"crash"))
        await until(lambda: pool.statistics().idle == 1)
        death = watch.last_death[0]
        assert death["error"] is not None
        assert "exited with status 3" in death["error"]
        assert list(watch.deaths) == [death]
        assert describe_workers(pool)[0]["last_death"] == death
        assert describe_workers(pool)[0]["restarts"] == 1


async def test_durations_fall_into_buckets(autojump_clock: object) -> None:
    """A job of two seconds, and one that waited for it, are counted where they belong."""
    async with open_pool(config()) as pool:
        watch = watch_pool(pool)
        watch.count_jobs(pool)
        watch.count_jobs(pool)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(pool.exec, Payload(b"nap"))
    two = BOUNDS.index(2.5)
    assert watch.run.counts[two] == 2
    assert watch.wait.counts[0] == 1
    assert watch.wait.counts[two] == 1
    assert watch.run.sum == pytest.approx(4.0, abs=0.1)
    assert watch.run.cumulative()[two] == (2.5, 2)
    assert watch.run.cumulative()[two - 1] == (1.0, 0)


async def test_readiness(autojump_clock: object) -> None:
    """Ready with all workers busy; not with a full queue, even one of no places, and not when closed."""
    async with open_pool(config(max_queue=0)) as pool, trio.open_nursery() as nursery:
        assert why_not_ready(pool) is None
        nursery.start_soon(pool.exec, Payload(b"nap"))
        await until(lambda: pool.statistics().busy == 1)
        assert why_not_ready(pool) == "the queue is full: 0 callers wait, and max_queue is 0"
    assert why_not_ready(pool) == "the pool is closed, or about to be"
    async with open_pool(config()) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.exec, Payload(b"nap"))
        await until(lambda: pool.statistics().busy == 1)
        assert why_not_ready(pool) is None


async def test_not_ready_while_no_worker_boots(autojump_clock: object) -> None:
    """Where every start fails and nothing serves, the reason is what the last one said."""
    broken = False

    async def boot(slot: int) -> None:
        if broken:
            raise BadBoot()

    async with open_pool(config(factory=MemoryFactory(answer, boot=boot))) as pool:
        watch_pool(pool)
        broken = True
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"crash"))
        await until(lambda: why_not_ready(pool) is not None)
        reason = why_not_ready(pool)
        assert reason is not None
        assert "there is no worker, and the last" in reason
        assert "the last said: " in reason


async def test_facts_of_real_processes(tmp_path: Path) -> None:
    """Of a process, memory and processor time are known; both kinds of pool have a config."""
    async with open_python_pool(1, name="functions") as pool:
        assert isinstance(pool, PythonPool)
        assert pool.config.name == "functions"
        await pool.run_sync(sum, range(100_000))
        (worker,) = describe_workers(pool)
        assert worker["pid"] == pool.workers[0].pid
        assert worker["uptime"] > 0
        if sys.platform == "linux":
            assert worker["memory"] is not None
            assert worker["memory"] > 1 << 20
            assert worker["cpu"] is not None
            assert worker["cpu"] >= 0


def test_only_a_pool_is_looked_at() -> None:
    """What is no pool is named."""
    with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not int"):
        watch_pool(3)  # type: ignore[arg-type]
    assert Pool is not PythonPool
