"""What the storm found of jobs that lie ahead of their turn, each so that it does not come back."""

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from tests.test_pool_logic import ask, config, settle, work
from tests.test_stream_relay import StreamFactory
from trio_workers import (
    Config,
    Factory,
    JobError,
    Payload,
    PipeFactory,
    Pool,
    WorkerCrashed,
    _roster,
    open_pool,
    open_python_pool,
)
from trio_workers._conversation import Event
from trio_workers._relay import Line
from trio_workers.child import STOP_REQUEST, Job

WORKER: Final = """
import signal
import time
from trio_workers.child import serve

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

def handle(job):
    do, _, path = job.body.partition(b" ")
    if path:
        open(path, "w")
    if do == b"wait":
        signal.sigwait([signal.SIGUSR1])
    elif do == b"hang":
        time.sleep(1000)
    return job.body

serve(handle)
"""


def ahead(handler: Any, **fields: Any) -> Config:
    """A pool of one worker in memory, in whose line jobs may lie."""
    return config(handler, read_ahead=8, **fields)


def start_cancellable(nursery: trio.Nursery, pool: Pool, text: str) -> trio.CancelScope:
    """Hand in a job whose caller can be cancelled."""
    scope = trio.CancelScope()

    async def call() -> None:
        with scope:
            await ask(pool, text)

    nursery.start_soon(call)
    return scope


@pytest.mark.parametrize(
    "factory", [PipeFactory(), PipeFactory("socketpair"), StreamFactory()], ids=["pipe", "socketpair", "stream"]
)
async def test_cancel_in_a_line_makes_nobody_deaf(factory: Factory) -> None:
    """A job that is cancelled in a line wakes the one in front, which goes on to wait for its reply."""
    cfg = Config(command=[sys.executable, "-c", WORKER], num_workers=1, read_ahead=8, factory=factory)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        nursery.start_soon(ask, pool, "wait")
        await until(pool, waiting=0)
        scope = start_cancellable(nursery, pool, "left")
        await until(pool, waiting=1)
        nursery.start_soon(ask, pool, "last")
        await until(pool, waiting=2)
        scope.cancel()
        await settle()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGUSR1)
    assert worker.state.num_execs == 3


async def until(pool: Pool, *, waiting: int) -> None:
    """Wait until there is a job in front, and so many behind it."""
    while (now := pool.statistics()).waiting != waiting or not now.busy:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("destroy_timeout", [0.0, 1.0, 10.0])
async def test_nobody_is_killed_for_a_cancelled_job(destroy_timeout: float, autojump_clock: MockClock) -> None:
    """Its time counts from its turn on, and is never so short that a quick job would not come to its end."""
    async with open_pool(ahead(work, destroy_timeout=destroy_timeout)) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        nursery.start_soon(ask, pool, "sleep 3")
        await settle()
        scope = start_cancellable(nursery, pool, "sleep 0.4")
        await settle()
        nursery.start_soon(ask, pool, "sleep 1")
        await settle()
        scope.cancel()
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(2)
        trio.lowlevel.remove_instrument(steps)
        assert steps.count < 100, "somebody is awake all the time"
        await trio.sleep(3)
        assert pool.workers == (worker,)
        assert worker.state.num_execs == 3
        assert pool.statistics().jobs == {"cancelled": 1, "replied": 2}


class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def test_cancelled_job_that_hangs(autojump_clock: MockClock) -> None:
    """What does not come to its end within `destroy_timeout` of its turn is killed after all; others are handed on."""
    async with open_pool(ahead(work, destroy_timeout=2.0)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        scope = start_cancellable(nursery, pool, "hang")
        await settle()
        scope.cancel()
        await trio.sleep(5 + 1.9)
        assert pool.statistics().busy == 1
        await trio.sleep(0.2)
        assert pool.statistics().exits == {"cancelled": 1}


async def stream(job: Job) -> AsyncIterator[bytes]:
    """Answer in parts, after a while, all at once."""
    await trio.sleep(1)
    for number in range(3):
        yield b"part %d" % number


async def test_written_ahead_and_late(autojump_clock: MockClock) -> None:
    """What has been written may be run at any moment: `allocate_timeout` does not end its wait, its reply does."""
    async with open_pool(ahead(work, allocate_timeout=1.0)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 3")
        await settle()
        assert await ask(pool, "late") == "late"
        assert trio.current_time() == 3


async def test_answer_of_a_job_that_was_left_is_nobody_elses(autojump_clock: MockClock) -> None:
    """A worker is killed in the middle of a stream; the job behind has its own answer, which had come as well."""

    def handle(job: Job) -> Any:
        return stream(job) if job.body == b"parts" else work(job)

    async def ask_wrongly() -> None:
        with pytest.raises(JobError, match="streams its reply"):
            await ask(pool, "parts")

    async with open_pool(ahead(handle, destroy_timeout=0.0)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask_wrongly)
        await settle()
        assert await ask(pool, "mine") == "mine"
        await trio.sleep(1)
        assert pool.statistics().exits == {"cancelled": 1}


async def test_job_behind_one_that_was_left_may_not_have_begun(tmp_path: Path, mock_clock: MockClock) -> None:
    """A worker that has read all it was given is killed for a job that was left: nobody knows of those behind."""
    waits, hangs = tmp_path / "waits", tmp_path / "hangs"
    cfg = Config(command=[sys.executable, "-c", WORKER], num_workers=1, read_ahead=8, destroy_timeout=0.1)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:

        async def lose() -> None:
            with pytest.raises(WorkerCrashed, match="Nobody can know") as caught:
                await ask(pool, "lost")
            assert caught.value.started is None

        (worker,) = pool.workers
        nursery.start_soon(ask, pool, f"wait {waits}")
        while not waits.exists():  # it has read that one alone, and so will read the two behind it in one piece
            await trio.lowlevel.checkpoint()
        scope = start_cancellable(nursery, pool, f"hang {hangs}")
        await until(pool, waiting=1)
        nursery.start_soon(lose)
        await until(pool, waiting=2)
        await settle()  # what has been lent is written at the end of a pass
        scope.cancel()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGUSR1)
        while not hangs.exists() or "replied" not in pool.statistics().jobs:
            await trio.lowlevel.checkpoint()
        mock_clock.rate = 1.0  # time stood still until now


async def test_stop_request_comes_before_what_was_written_already(autojump_clock: MockClock) -> None:
    """A worker that asks to be replaced still has jobs in its line: they have its answers, however large."""

    async def handle(job: Job) -> Any:
        await trio.sleep(1)
        if job.body == b"stop" and pool.statistics().starts == 1:
            return STOP_REQUEST
        return 3 * 65536 * job.body

    answers: list[bytes] = []

    async def call(text: bytes) -> None:
        answers.append((await pool.exec(Payload(text))).body[: len(text)])

    async with open_pool(ahead(handle)) as pool, trio.open_nursery() as nursery:
        for text in (b"first", b"stop", b"second", b"third"):
            nursery.start_soon(call, text)
            await settle()
        await trio.sleep(4.5)
        assert answers == [b"first", b"second", b"third"]
        assert pool.statistics().exits == {"stop request": 1}
        await trio.sleep(1)
        assert answers[3:] == [b"stop"]


async def test_cancelled_in_a_line_while_another_worker_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of a line because its caller goes is given to nobody, however free: it has never begun."""
    monkeypatch.setattr(_roster, "PATIENCE", 100.0)  # or it would be out of the line soon anyway
    async with open_python_pool(num_workers=2) as pool:
        async with pool.lease() as one, pool.lease() as other:
            await one.run_sync(abs, -1)  # so it is seen how quick they are
            await other.run_sync(abs, -1)
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                await pool.run_sync(time.sleep, 10)

        async with trio.open_nursery() as nursery:
            async with pool.lease():
                nursery.start_soon(pool.run_sync, time.sleep, 3)
                await settle()
                nursery.start_soon(call)
                await settle()
                assert (pool.statistics().busy, pool.statistics().waiting) == (1, 1)
            assert (pool.statistics().idle, pool.statistics().waiting) == (1, 1), "it is in the line of the other"
            scope.cancel()
        assert pool.statistics().exits == {}
        assert pool.statistics().jobs["cancelled"] == 1


async def test_answer_that_was_read_beside_writing(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has written the rest of his job has its answer and no other, when others look at the line in that moment."""
    scopes: list[trio.CancelScope] = []
    answers: dict[str, str] = {}
    read = Line.read

    def read_and_cancel(self: Line) -> Event | None:
        event = read(self)
        while event is not None and scopes:
            scopes.pop().cancel()
        return event

    async def call(text: str) -> None:
        answers[text] = await ask(pool, text)

    monkeypatch.setattr(Line, "read", read_and_cancel)
    texts = ("sleep 1", "sleep 2" + 150 * " ", "one", "two", "sleep 3")
    for _ in range(20):  # whose turn is next, the reader's or that of who was cancelled, is chance
        answers.clear()
        async with open_pool(ahead(work, capacity=100)) as pool, trio.open_nursery() as nursery:
            for number, text in enumerate(texts):
                nursery.start_soon(call, text)
                await settle()
                if number == 1:
                    await trio.sleep(1.5)  # the rest of it is written by its own task, which goes on to wait for both
            scope = start_cancellable(nursery, pool, "left")
            await settle()
            scopes.append(scope)
        assert answers == {text: text for text in texts}
