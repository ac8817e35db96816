"""Observers that go while they are called, and whose context variables a pool's own tasks have."""

import contextvars
import logging
import os
from collections.abc import Iterator
from typing import Final

import pytest
import trio

from trio_workers import Config, JobRecord, Payload, WorkerCrashed, open_pool, open_python_pool
from trio_workers.child import Job
from trio_workers.testing import Crash, MemoryFactory

REQUEST: Final = contextvars.ContextVar("REQUEST", default="none")


async def answer(job: Job) -> bytes:
    """Do as the body says."""
    if job.body == b"crash":
        raise Crash(3)
    return job.body


def config(**more: object) -> Config:
    """Describe a pool of one worker inside this process."""
    return Config(**{"command": ["none"], "num_workers": 1, "factory": MemoryFactory(answer), **more})  # type: ignore[arg-type]


async def test_a_job_observer_that_goes_at_the_first_call_of_a_chunk() -> None:
    """Functions go in chunks, and each call is told of: the last observer may go in the middle of one."""
    seen: list[JobRecord] = []
    async with open_python_pool(1) as pool:

        def once(record: JobRecord) -> None:
            seen.append(record)
            if len(seen) == 100:
                pool.remove_job_observer(once)

        pool.add_job_observer(once)
        async with pool.map(abs, range(3000)) as results:
            assert [result async for result in results] == list(range(3000))
    assert len(seen) == 100


@pytest.mark.parametrize("of_jobs", [False, True])
async def test_what_was_removed_is_called_no_more(of_jobs: bool, autojump_clock: object) -> None:
    """Not even for what is being told at that moment: the observer may have closed what it writes to."""
    told: list[str] = []
    async with open_pool(config()) as pool:

        def first(*_: object) -> None:
            told.append("first")
            if of_jobs:
                pool.remove_job_observer(second)
            else:
                pool.remove_observer(second)

        def second(*_: object) -> None:
            told.append("second")

        def third(*_: object) -> None:
            told.append("third")

        for observer in (first, second, third):
            if of_jobs:
                pool.add_job_observer(observer)
            else:
                pool.add_observer(observer)
        if of_jobs:
            await pool.exec(Payload(b"one"))
            pool.remove_job_observer(first)
        else:
            pool.workers[0]._owner.retire(pool.workers[0], "stopped")
            pool.remove_observer(first)
        assert told == ["first", "third"]


async def test_what_comes_while_it_is_told_hears_of_the_next(autojump_clock: object) -> None:
    """One that is added by another is not called for what that one is being told."""
    told: list[str] = []
    async with open_pool(config()) as pool:

        def first(record: JobRecord) -> None:
            pool.remove_job_observer(first)
            pool.add_job_observer(second)

        def second(record: JobRecord) -> None:
            told.append(str(record.label))

        pool.add_job_observer(first)
        await pool.exec(Payload(b""), label="one")
        await pool.exec(Payload(b""), label="two")
    assert told == ["two"]


@pytest.fixture
def contexts() -> Iterator[list[str]]:
    """The value of the context variable for each record of the pool's log."""
    seen: list[str] = []

    def look(record: logging.LogRecord) -> bool:
        seen.append(f"{record.name.rpartition('.')[2]}: {REQUEST.get()}")
        return True

    loggers = [logging.getLogger(f"trio_workers.{name}") for name in ("worker", "supervision")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addFilter(look)
        logger.setLevel(logging.DEBUG)
    yield seen
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeFilter(look)
        logger.setLevel(level)


async def test_a_worker_has_the_context_of_its_pool_and_of_no_request(contexts: list[str]) -> None:
    """Whoever calls reset or resize, or has the job after which a worker is replaced: its log is not that caller's."""
    token = REQUEST.set("the pool's")
    async with open_python_pool(1, max_executions=3) as pool, trio.open_nursery() as nursery:
        REQUEST.reset(token)

        async def request(name: str, kind: str) -> None:
            REQUEST.set(name)
            if kind == "reset":
                await pool.reset()
            elif kind == "resize":
                await pool.resize(2)
                await pool.resize(1)
            elif kind == "crash":
                with pytest.raises(WorkerCrashed):
                    await pool.run_sync(os._exit, 3)
            else:
                await pool.run_sync(print, "a line")

        for number, kind in enumerate(["print", "reset", "print", "resize", "crash", *(9 * ["print"])]):
            async with trio.open_nursery() as one:
                one.start_soon(request, f"request {number}", kind)
        nursery.cancel_scope.cancel()
    assert {line for line in contexts if "worker" in line} == {"worker: the pool's"}
    assert {line for line in contexts if "supervision" in line} == {"supervision: the pool's"}
    assert REQUEST.get() == "none"


async def test_a_process_for_one_job_has_the_context_of_its_pool_too(contexts: list[str]) -> None:
    """With `debug` a process is started for each job; its log is the pool's all the same."""
    async with open_python_pool(1, debug=True) as pool:
        token = REQUEST.set("a request")
        await pool.run_sync(print, "a line")
        REQUEST.reset(token)
    assert {line for line in contexts if "worker" in line} == {"worker: none"}
