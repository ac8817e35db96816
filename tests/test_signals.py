"""A pool that is turned by signals."""

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import trio

from tests.support import until
from trio_workers import Config, Pool, open_pool, open_python_pool, serve_signals
from trio_workers.child import Job
from trio_workers.testing import BadBoot, MemoryFactory


class Boots:
    """Boots that wait or fail as the test says."""

    def __init__(self) -> None:
        self.broken = False
        self.held: trio.Event | None = None

    async def boot(self, slot: int) -> None:
        """Boot, or not."""
        if self.held is not None:
            await self.held.wait()
        if self.broken:
            raise BadBoot


@pytest.fixture
def boots() -> Boots:
    return Boots()


@contextlib.asynccontextmanager
async def served(boots: Boots, **more: Any) -> AsyncIterator[Pool]:
    """A pool that hears signals."""

    async def answer(job: Job) -> bytes:
        return job.body

    config = {"command": ["none"], "num_workers": 2, "factory": MemoryFactory(answer, boot=boots.boot), **more}
    async with open_pool(Config(**config)) as pool, trio.open_nursery() as nursery:
        await nursery.start(serve_signals, pool)
        yield pool
        nursery.cancel_scope.cancel()


def send(number: signal.Signals) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of it."""
    return [record.getMessage() for record in caplog.records if record.name == "trio_workers.control"]


async def test_hangup_resets(boots: Boots, caplog: pytest.LogCaptureFixture) -> None:
    """SIGHUP replaces every worker, and the log says when that is done."""
    caplog.set_level(logging.INFO, "trio_workers.control")
    async with served(boots) as pool:
        before = set(pool.workers)
        send(signal.SIGHUP)
        await until(lambda: len(said(caplog)) == 2)
        assert not before & set(pool.workers)
        assert pool.statistics().exits == {"reset": 2}
    assert said(caplog) == ["pool: SIGHUP: replacing all workers", "pool: SIGHUP: all workers are replaced"]


async def test_one_more_and_one_less(boots: Boots, caplog: pytest.LogCaptureFixture) -> None:
    """SIGTTIN adds a worker, SIGTTOU takes one, and never the last."""
    caplog.set_level(logging.INFO, "trio_workers.control")
    async with served(boots) as pool:
        send(signal.SIGTTIN)
        await until(lambda: pool.statistics().idle == 3)
        for left in (2, 1):
            send(signal.SIGTTOU)
            await until(lambda left=left: len(pool.workers) == left)  # type: ignore[misc]
        send(signal.SIGTTOU)
        await until(lambda: len(said(caplog)) == 4)
        assert pool.config.num_workers == len(pool.workers) == 1
    assert said(caplog) == [
        "pool: SIGTTIN: from 2 to 3 workers",
        "pool: SIGTTOU: from 3 to 2 workers",
        "pool: SIGTTOU: from 2 to 1 workers",
        "pool: SIGTTOU: the last worker stays",
    ]


async def test_hangups_during_a_reset_are_one_more(boots: Boots, caplog: pytest.LogCaptureFixture) -> None:
    """Five that come while one is under way make one more reset after it, and no worker is older than the last."""
    caplog.set_level(logging.INFO, "trio_workers.control")
    async with served(boots) as pool:
        boots.held = trio.Event()
        send(signal.SIGHUP)
        await until(lambda: pool.statistics().starting)
        for _ in range(5):
            send(signal.SIGHUP)
            await trio.sleep(0.01)
        boots.held.set()
        await until(lambda: len(said(caplog)) == 4)
        assert pool.statistics().exits == {"reset": 4}


async def test_sizes_during_a_reset(boots: Boots) -> None:
    """A worker more is there at once, however long a reset takes."""
    async with served(boots) as pool:
        boots.held = trio.Event()
        send(signal.SIGHUP)
        await until(lambda: pool.statistics().starting)
        for size in (3, 4):
            send(signal.SIGTTIN)
            await until(lambda size=size: pool.config.num_workers == size)  # type: ignore[misc]
        send(signal.SIGTTOU)
        await until(lambda: pool.config.num_workers == 3)
        boots.held.set()
        await until(lambda: pool.statistics().idle == 3 == len(pool.workers))
        assert pool.statistics().exits["reset"] == 2


@pytest.mark.parametrize(
    ("number", "what"), [(signal.SIGHUP, "SIGHUP: the reset failed"), (signal.SIGTTIN, "SIGTTIN: the resize failed")]
)
async def test_what_fails_is_a_warning(
    boots: Boots, caplog: pytest.LogCaptureFixture, number: signal.Signals, what: str
) -> None:
    """The error is in the log, the pool is as it was, and the next signal is heard."""
    async with served(boots) as pool:
        before = pool.workers
        boots.broken = True
        send(number)
        await until(lambda: what in caplog.text)
        (warning,) = [record for record in caplog.records if record.name == "trio_workers.control"]
        assert warning.levelno == logging.WARNING
        assert "exited with status 1 before it was ready" in warning.getMessage()
        await until(lambda: pool.statistics().idle == 2 == len(pool.workers))
        assert pool.workers == before
        boots.broken = False
        send(signal.SIGHUP)
        await until(lambda: not set(before) & set(pool.workers))


async def test_after_the_pools_end(boots: Boots, caplog: pytest.LogCaptureFixture) -> None:
    """A closed pool can't be turned: that is a warning, and ends nothing around it."""

    async def answer(job: Job) -> bytes:
        return job.body

    async with trio.open_nursery() as nursery:
        async with open_pool(Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))) as pool:
            await nursery.start(serve_signals, pool)
        for number in (signal.SIGHUP, signal.SIGTTIN):
            send(number)
            await until(lambda number=number: number.name in caplog.text)  # type: ignore[misc]
        nursery.cancel_scope.cancel()
    assert said(caplog) == [
        "pool: SIGHUP: no reset, for the pool is closed",
        "pool: SIGTTIN: no resize, for the pool is closed",
    ]


async def test_handlers_are_given_back(boots: Boots) -> None:
    """What the signals did before they do again, whether a change is under way or not."""
    numbers = (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU)
    before = [signal.getsignal(number) for number in numbers]
    async with served(boots) as pool:
        assert all(signal.getsignal(number) not in before for number in numbers)
        boots.held = trio.Event()
        send(signal.SIGHUP)
        await until(lambda: pool.statistics().starting)
        boots.held.set()
    assert [signal.getsignal(number) for number in numbers] == before


async def test_a_python_pool() -> None:
    """Pools of functions hear them too; on real processes."""
    async with open_python_pool(1) as pool, trio.open_nursery() as nursery:
        await nursery.start(serve_signals, pool)
        (first,) = pool.workers
        send(signal.SIGHUP)
        await until(lambda: first not in pool.workers)
        send(signal.SIGTTIN)
        await until(lambda: pool.statistics().idle == 2)
        nursery.cancel_scope.cancel()


def test_only_in_the_main_thread() -> None:
    """Elsewhere it says why not, before anything is changed."""

    async def try_it() -> None:
        async with open_python_pool(1) as pool:
            with pytest.raises(RuntimeError, match="serve_signals must run in the main thread"):
                await serve_signals(pool)

    async def main() -> None:
        await trio.to_thread.run_sync(partial(trio.run, try_it))

    trio.run(main)


async def test_what_is_no_pool_is_refused() -> None:
    """It is named."""
    with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not int"):
        await serve_signals(3)  # type: ignore[arg-type]
