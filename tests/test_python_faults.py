"""Python functions that end their process, hang, are cancelled, outlive their pool, or write where they must not.

What the caller gets, what becomes of the worker, that the pool heals, and that nothing is left.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import contextlib
import gc
import logging
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing

from tests import python_pool_jobs as jobs
from tests.test_faults import Told, runs, stopped, until
from tests.test_parent import wait
from tests.test_python_pool import all_idle, check, lines, noted, open_pool
from trio_workers import (
    PythonPool,
    RelayError,
    Restart,
    Worker,
    WorkerCrashed,
    WorkerError,
    WorkerEvent,
    WorkerState,
)

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and the kernel's life line"),
]

ROOT: Final = Path(__file__).parent.parent

NEVER: Final = Restart(initial=1000.0, maximum=1000.0, give_up_after=1)
"""A pool that ever backed off would stand still."""


async def heals(pool: PythonPool, *gone: Worker) -> None:
    """All workers are there again, none of them is one of these, and jobs get their own results."""
    await until(lambda: all_idle(pool))
    assert not set(gone) & set(pool.workers)
    for number in range(3):
        assert await pool.run_sync(jobs.square, number) == number**2
    check(pool)


async def gone(*pids: int | str | None) -> None:
    """Wait until none of these processes runs any more."""
    await until(lambda: not any(runs(int(pid)) for pid in pids if pid is not None))


@contextlib.asynccontextmanager
async def running(pool: PythonPool, function: Callable[..., object], *args: object) -> AsyncIterator[trio.CancelScope]:
    """A job that runs inside the block, is cancelled at its end, and was not cancelled in vain."""
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await pool.run_sync(function, *args)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield scope
        scope.cancel()
    assert scope.cancelled_caught


# ends under a job

ENDS: Final[dict[str, tuple[Callable[..., object], tuple[Any, ...], int, str]]] = {
    "exit 0": (jobs.say_and_exit, ("last words", 0), 0, "last words"),
    "exit 3": (jobs.say_and_exit, ("last words", 3), 3, "last words"),
    "abort": (os.abort, (), -signal.SIGABRT, "Fatal Python error: Aborted"),
    "segfault": (jobs.segfault, (), -signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
    "segfault in a thread": (jobs.segfault_in_a_thread, (), -signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
    "segfault without stderr": (jobs.segfault_without_stderr, (), -signal.SIGSEGV, "in segfault"),
    "killed": (jobs.kill_self, (signal.SIGKILL,), -signal.SIGKILL, ""),
    "terminated": (jobs.kill_self, (signal.SIGTERM,), -signal.SIGTERM, ""),
}


@pytest.mark.parametrize("end", ENDS)
async def test_crash(end: str) -> None:
    """Point 6: a crash is its caller's error, with the code, the function's name and the last lines of stderr."""
    function, args, returncode, words = ENDS[end]
    told = Told()
    async with open_pool(observer=told, restart=NEVER) as pool:
        (worker,) = pool.workers
        with pytest.raises(WorkerCrashed) as caught:
            await pool.run_sync(function, *args)
        error = caught.value
        assert error.returncode == returncode
        assert error.signal == (-returncode if returncode < 0 else None)
        assert (error.pid, error.slot) == (worker.pid, 0)
        assert (error.phase, error.started) == ("running", True)
        assert repr(f"{function.__module__}.{function.__name__}") in str(error)
        assert words in error.stderr
        assert words in "".join(getattr(error, "__notes__", []))
        assert worker.state.value is WorkerState.ERRORED
        await heals(pool, worker)
        assert pool.statistics().jobs == {"crashed": 1, "replied": 3}
    assert len(told.errors) == 1
    assert isinstance(told.errors[0], WorkerCrashed)


async def test_last_lines() -> None:
    """Point 6: the error shows the last lines of a flood, stdout's among them."""
    async with open_pool() as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.run_sync(jobs.flood_and_exit, 3000)
        assert caught.value.stderr.splitlines() == [f"line {number}" for number in range(2980, 3000)]
        await heals(pool)


async def test_where_it_crashed() -> None:
    """Point 6: a segfault's error shows by faulthandler's text where the function was."""
    async with open_pool() as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.run_sync(jobs.segfault)
        assert "python_pool_jobs.py" in caught.value.stderr
        assert "in segfault" in caught.value.stderr


async def test_killed_from_outside(note: Path) -> None:
    """Point 6: SIGKILL of somebody else's (the out-of-memory killer's too) is one caller's error, and says so."""
    async with open_pool(2) as pool, trio.open_nursery() as nursery:
        caught: list[WorkerCrashed] = []

        async def call() -> None:
            with pytest.raises(WorkerCrashed) as error:
                await pool.run_sync(jobs.hang, str(note))
            caught.append(error.value)

        nursery.start_soon(call)
        (pid,) = await noted(note)
        os.kill(int(pid), signal.SIGKILL)
        await until(lambda: caught)
        assert caught[0].signal == signal.SIGKILL
        assert caught[0].pid == int(pid)
        assert "out-of-memory killer" in str(caught[0])
        assert "'tests.python_pool_jobs.hang'" in str(caught[0])
        await heals(pool)
        assert pool.statistics().exits == {"crashed": 1}


async def test_ten_in_a_row() -> None:
    """Point 6: ten crashes in a row are ten errors and ten replacements: no back-off, no giving up."""
    told = Told()
    async with open_pool(restart=NEVER, observer=told) as pool:
        for number in range(10):
            with pytest.raises(WorkerCrashed) as caught:
                await pool.run_sync(jobs.kill_self if number % 2 else os._exit, 9)
            assert caught.value.returncode == (-9 if number % 2 else 9)
        await heals(pool)
        now = pool.statistics()
        assert now.restarts == {0: 10}
        assert now.exits == {"crashed": 10}
        assert now.failed_starts == 0
        assert now.jobs == {"crashed": 10, "replied": 3}
    assert len(told.errors) == 10


async def test_crashes_on_all_workers() -> None:
    """Point 6: crashes on every worker at once, again and again, are each one caller's, and no other's."""
    errors: list[int] = []
    results: list[int] = []

    async def call(number: int) -> None:
        if number % 3:
            results.append(await pool.run_sync(jobs.square, number))
            assert results[-1] == number**2
        else:
            with pytest.raises(WorkerCrashed) as caught:
                await pool.run_sync(os._exit, number)
            assert caught.value.returncode == number
            errors.append(number)

    async with open_pool(3, restart=NEVER) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(call, number)
        assert sorted(errors) == list(range(0, 30, 3))
        assert sorted(results) == [number**2 for number in range(30) if number % 3]
        await heals(pool)
        assert pool.statistics().exits == {"crashed": 10}


async def test_crash_while_idle() -> None:
    """Point 6: a worker that dies between two jobs costs nobody a job; the event tells of it."""
    told = Told()
    async with open_pool(observer=told) as pool:
        for number in range(4):
            assert await pool.run_sync(jobs.square, number) == number**2
            (worker,) = pool.workers
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            if number % 2:
                await worker.ended.wait()  # else the next job may be the first to notice
            assert await pool.run_sync(jobs.square, number) == number**2
            assert worker not in pool.workers
        assert pool.statistics().jobs == {"replied": 8}
    phases = [error.phase for error in told.errors if isinstance(error, WorkerCrashed)]
    assert len(phases) == 4
    assert set(phases) <= {"idle", "writing"}
    assert phases[1] == phases[3] == "idle"


async def test_crash_before_the_job_was_read() -> None:
    """Point 6: a job that a dying worker has not even read goes to its replacement, and runs once."""
    async with open_pool() as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        assert worker.pid is not None
        results: list[int] = []

        async def call() -> None:
            results.append(await pool.run_sync(os.getpid))

        os.kill(worker.pid, signal.SIGSTOP)
        await until(lambda: stopped(worker.pid or 0))
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        assert worker.state.value is WorkerState.WORKING
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: results)
        assert results != [worker.pid]


async def test_crash_while_streaming(go: Path) -> None:
    """Point 6: a crash in the middle of a stream comes behind the parts that were sent."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        found: list[int] = []
        with pytest.raises(WorkerCrashed) as caught:
            async with pool.stream(jobs.count_and_crash, 5, 6, str(go)) as parts:
                async for part in parts:
                    found.append(part)
                    if part == 2:
                        go.touch()
        assert found == [0, 1, 2, 3, 4]
        error = caught.value
        assert (error.phase, error.returncode, error.started) == ("streaming", 6, True)
        assert "'tests.python_pool_jobs.count_and_crash'" in str(error)
        await heals(pool, worker)
        with pytest.raises(WorkerCrashed):
            async with pool.stream(jobs.count_and_crash, 0, 6, str(go)) as parts:
                await anext(parts)
        await heals(pool)


async def test_crash_after_a_stream_was_left(go: Path) -> None:
    """Point 6: a generator that crashes after its consumer has gone is nobody's error; the worker is replaced."""
    go.touch()
    async with open_pool(2) as pool:
        for _ in range(5):
            async with pool.stream(jobs.count_and_crash, 3, 6, str(go)) as parts:
                assert await anext(parts) == 0
            assert await pool.run_sync(jobs.square, 3) == 9
        await heals(pool)


async def test_crash_while_leased() -> None:
    """Point 6: a crash in a lease is its holder's; the lease is never moved, and the pool heals behind it."""
    async with open_pool(2) as pool:
        async with pool.lease() as worker:
            first = pool.workers[worker.slot]
            await worker.run_sync(jobs.keep, "name", "value")
            with pytest.raises(WorkerCrashed) as caught:
                await worker.run_sync(jobs.say_and_exit, "last words", 5)
            error = caught.value
            assert (error.phase, error.returncode, error.started) == ("leased", 5, True)
            assert (error.pid, error.slot, error.stderr) == (worker.pid, worker.slot, "last words")
            with pytest.raises(WorkerCrashed) as again:
                await worker.run_sync(jobs.recall, "name")
            assert again.value.started is False
            assert again.value.pid == worker.pid
            with pytest.raises(WorkerCrashed):
                async with worker.stream(jobs.count, 3):
                    pass
            for _ in range(4):
                assert await pool.run_sync(jobs.recall, "name") is None
        await heals(pool, first)
        assert pool.statistics().exits == {"crashed": 1}


# cancels


async def test_cancel_before(note: Path) -> None:
    """Point 6: a job that is cancelled before it begins never runs; nothing is lost by it."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.run_sync(jobs.note, str(note), "never")
        with trio.CancelScope() as scope:
            scope.cancel()
            async with pool.stream(jobs.flood, str(note), 1):
                raise AssertionError
        await heals(pool)
        assert pool.workers == (worker,)
        assert not note.exists()


@pytest.mark.parametrize(
    "function", [jobs.hang, jobs.spin_in_c, jobs.pause_in_c, jobs.deaf, jobs.match_for_ever, jobs.sum_for_ever]
)
async def test_cancel_while_it_runs(function: Callable[..., object], note: Path) -> None:
    """Point 6: whatever a job is at, also in C with the interpreter's lock held, a cancel ends it, and its worker."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        async with running(pool, function, str(note)):
            assert await noted(note) == [str(worker.pid)]
        with pytest.raises(WorkerError) as caught:
            await worker.wait()
        assert caught.value.signal == signal.SIGKILL
        await heals(pool, worker)
        assert pool.statistics().exits == {"cancelled": 1}
        assert pool.statistics().jobs == {"cancelled": 1, "replied": 3}


async def test_cancel_of_a_stopped_worker(note: Path) -> None:
    """Point 6: a job that stopped its own process is cancelled like any other."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        assert worker.pid is not None
        pid = worker.pid
        async with running(pool, jobs.kill_self, signal.SIGSTOP):
            await until(lambda: stopped(pid))
        await gone(pid)
        await heals(pool, worker)


async def test_cancel_after(note: Path) -> None:
    """Point 6: a cancel that comes when the whole result is already there is a cancel, and keeps the worker."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        line = worker.line
        assert line is not None
        for number in range(5):
            go = note.with_name(f"go{number}")
            async with running(pool, jobs.stay, str(note), str(go)) as scope:
                await noted(note, number + 1)
                go.touch()
                wait(line.relay.has_input)  # blocks: the caller's task must not get its turn
                scope.cancel()
        await heals(pool)
        assert pool.workers == (worker,)
        assert pool.statistics().jobs == {"cancelled": 5, "replied": 3}


async def test_cancel_in_the_queue(note: Path, go: Path) -> None:
    """Point 6: a job that waits leaves the queue when it is cancelled; it never runs; the others keep their order."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        scopes = [trio.CancelScope() for _ in range(4)]

        async def call(number: int) -> None:
            with scopes[number]:
                await pool.run_sync(jobs.note, str(note), number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.stay, str(note), str(go))
            await noted(note)
            for number in range(4):
                nursery.start_soon(call, number)
                await trio.testing.wait_all_tasks_blocked()
            scopes[1].cancel()
            scopes[2].cancel()
            await until(lambda: pool.statistics().waiting == 2)
            go.touch()
        assert lines(note) == [str(worker.pid), "0", "3"]
        assert pool.workers == (worker,)
        assert pool.statistics().jobs == {"cancelled": 2, "replied": 3}


async def test_cancel_while_an_argument_is_written(note: Path) -> None:
    """Point 6: a cancel in the middle of a large argument ends the worker, which never began the job."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        pid = worker.pid
        await until(lambda: stopped(pid))
        async with running(pool, jobs.note, str(note), "x" * (20 << 20)):
            await trio.testing.wait_all_tasks_blocked()
            assert worker.line is not None
            assert not worker.line.whole
        await gone(worker.pid)
        await heals(pool, worker)
        assert not note.exists()


async def test_crash_while_an_argument_is_written() -> None:
    """Point 6: a worker that dies in the middle of a large argument never began the job: its replacement runs it."""
    async with open_pool() as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        assert worker.pid is not None
        pid = worker.pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: stopped(pid))
        sizes: list[int] = []

        async def call() -> None:
            sizes.append(await pool.run_sync(jobs.size_of, "x" * (20 << 20)))

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: sizes)
        assert sizes == [20 << 20]
        await heals(pool, worker)


async def read_half(worker: Worker, note: Path, go: Path) -> None:
    """Let the result of `give_text` come in, and stop the worker in the middle of it."""
    line = worker.line
    assert line is not None
    assert worker.pid is not None
    pid = worker.pid
    await noted(note)
    go.touch()
    wait(line.relay.has_input)  # blocks: nobody reads, so only as much as the socket holds is sent
    os.kill(pid, signal.SIGSTOP)
    wait(lambda: stopped(pid))
    await trio.testing.wait_all_tasks_blocked()
    assert line.conversation.pending
    assert worker.current is not None


async def test_cancel_while_a_result_is_read(note: Path, go: Path) -> None:
    """Point 6: a cancel in the middle of a large result ends the worker; the half of it reaches nobody."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        async with running(pool, jobs.give_text, 64 << 20, str(note), str(go)):
            await read_half(worker, note, go)
        await heals(pool, worker)
        assert pool.statistics().exits == {"cancelled": 1}
    del worker
    gc.collect()  # which must have nothing to say of the half


async def test_crash_while_a_result_is_read(note: Path, go: Path) -> None:
    """Point 6: a worker that dies in the middle of a large result is a WorkerCrashed; the half of it reaches nobody."""
    async with open_pool() as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        caught: list[WorkerError] = []

        async def call() -> None:
            with pytest.raises(WorkerCrashed) as error:
                await pool.run_sync(jobs.give_text, 64 << 20, str(note), str(go))
            caught.append(error.value)

        nursery.start_soon(call)
        await read_half(worker, note, go)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: caught)
        assert (caught[0].signal, caught[0].phase) == (signal.SIGKILL, "running")
        await heals(pool, worker)


async def test_cancel_at_any_moment(note: Path) -> None:
    """Point 6: wherever cancels and crashes strike, each caller that is left gets its own result."""
    chance = random.Random(0)
    results: dict[int, object] = {}

    async def call(number: int, passes: int) -> None:
        with trio.CancelScope() as scope:

            async def cancel() -> None:
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                if passes >= 0:
                    nursery.start_soon(cancel)
                results[number] = await pool.run_sync(jobs.echo, number)
                nursery.cancel_scope.cancel()

    async def crash() -> None:
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(os._exit, 1)

    async with open_pool(2, restart=NEVER) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(call, number, chance.choice([-1, -1, chance.randrange(12)]))
                if number % 15 == 7:
                    nursery.start_soon(crash)
        assert all(number == result for number, result in results.items())
        await heals(pool)
        now = pool.statistics()
        assert now.jobs["crashed"] == 4
        assert now.jobs["replied"] >= len(results)


@pytest.mark.parametrize("function", [jobs.hang_with_child, jobs.spin_in_c_with_child])
async def test_cancel_takes_children_too(function: Callable[..., object], note: Path) -> None:
    """Point 6: a cancelled job's own child processes die with it."""
    children = note.with_name("children")
    async with open_pool() as pool:
        async with running(pool, function, str(note), str(children)):
            await noted(note)
            (child,) = await noted(children)
            assert runs(int(child))
        await gone(child)
        await heals(pool)


async def test_cancel_of_a_job_with_a_pool(note: Path) -> None:
    """Points 6 and 9: a cancelled job's own pool, and the pool of a job in that, die with it."""
    async with open_pool() as pool:
        async with running(pool, jobs.nested_pids, str(note), 2):
            pids = await noted(note, 3)
            await noted(Path(f"{note}.deepest"))
            assert all(runs(int(pid)) for pid in pids)
        await gone(*pids)
        await heals(pool)


# what a job writes where it must not


@pytest.mark.parametrize(
    "data",
    [
        b"text\n",
        b"T",
        b"\x9dwT\n",
        b"\x9dwT\n" + bytes(100),
        bytes(10_000),
        b"\x9dwT\n" + b"\x11" + bytes(11) + b"\xff" * 12,
        b"\x9dwT\n" + b"\x01" + bytes(23),
        os.urandom(100_000),
    ],
    ids=["text", "letter", "magic", "zeros behind magic", "zeros", "sizes", "kind", "noise"],
)
async def test_garbage_on_the_relay(data: bytes) -> None:
    """Point 6: what a job writes to its worker's relay is that job's error alone, and its worker's end."""
    told = Told()
    async with open_pool(observer=told) as pool:
        (worker,) = pool.workers
        with pytest.raises(RelayError) as caught:
            await pool.run_sync(jobs.write_to_relay, data)
        error = caught.value
        assert "'tests.python_pool_jobs.write_to_relay'" in str(error)
        assert "broke the protocol" in str(error)
        assert (error.pid, error.slot, error.phase) == (worker.pid, 0, "running")
        await heals(pool, worker)
        with pytest.raises(WorkerError):
            await pool.run_sync(jobs.write_to_relay_and_exit, data)
        await heals(pool)
        assert pool.statistics().jobs["replied"] == 6
    assert isinstance(told.errors[0], RelayError)


async def test_advice_for_garbage() -> None:
    """Point 1: stdout is no relay here, so no error sends the reader to look there."""
    async with open_pool() as pool:
        with pytest.raises(RelayError) as caught:
            await pool.run_sync(jobs.write_to_relay, b"Hello")
        assert "Hello" in str(caught.value)
        assert "stdout" not in str(caught.value)


async def test_garbage_between_jobs(note: Path, go: Path) -> None:
    """Point 6: what a thread that a job left writes to the relay between two jobs costs the worker, and no caller."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        await pool.run_sync(jobs.write_to_relay_later, b"Hello", str(go), str(note))
        go.touch()
        await noted(note)
        assert await pool.run_sync(jobs.square, 3) == 9
        await heals(pool, worker)
        assert pool.statistics().jobs == {"replied": 5}


async def test_closed_relay() -> None:
    """Point 6: a job that closes its worker's relay is a WorkerCrashed, and nobody else's trouble."""
    async with open_pool() as pool:
        with pytest.raises(WorkerCrashed, match="closed its relay") as caught:
            await pool.run_sync(jobs.close_relay)
        assert "'tests.python_pool_jobs.close_relay'" in str(caught.value)
        await heals(pool)
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(os.closerange, 3, 1000)
        await heals(pool)


async def test_two_answers() -> None:
    """Point 6: a second answer to a job never becomes the answer of the next one."""
    async with open_pool() as pool:
        for number in range(5):
            assert await pool.run_sync(jobs.forge_answer, "forged") in ("forged", "true")
            with contextlib.suppress(RelayError):
                assert await pool.run_sync(jobs.square, number) == number**2
            await heals(pool)


async def test_second_answer_in_the_next_job(go: Path) -> None:
    """Point 6: a second answer that comes while the next job is under way is known by its id, and refused.

    The next job may be an error, or run on the worker's replacement where it was not read yet.
    """
    async with open_pool() as pool:
        (worker,) = pool.workers
        assert await pool.run_sync(jobs.forge_answer, "forged", str(go)) == "forged"
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                try:
                    assert await pool.run_sync(jobs.square, 3) == 9
                except RelayError as error:
                    assert "it answered job" in str(error)

            nursery.start_soon(call)
            await until(lambda: worker.current is not None)
            go.touch()
        await heals(pool, worker)


# the soft stop


async def test_soft_stop(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Point 6: a worker that is stopped runs its exit handlers, and what was written and not flushed is there."""
    kept = note.with_name("kept")
    async with open_pool() as pool:
        (worker,) = pool.workers
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "first")
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "last")
        await pool.run_sync(jobs.at_exit, jobs.print_unfinished, "said at exit")
        await pool.run_sync(jobs.keep_open, str(kept), "never closed by the job")
    assert lines(note) == ["last", "first"]
    assert lines(kept) == ["never closed by the job"]
    assert worker.state.value is WorkerState.STOPPED
    await worker.wait()
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [(record.name, record.getMessage().rpartition(": ")[2]) for record in said] == [
        ("trio_workers.worker", "said at exit")
    ]


@pytest.mark.parametrize("leave", [jobs.leave_thread, jobs.leave_executor_thread, jobs.leave_daemon_thread])
async def test_soft_stop_with_a_thread(
    leave: Callable[[str], None], note: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Point 6: a thread that a job left running, daemon or not, does not keep a worker from its soft end."""
    started, kept = note.with_name("started"), note.with_name("kept")
    async with open_pool(destroy_timeout=30.0) as pool:
        (worker,) = pool.workers
        await pool.run_sync(leave, str(started))
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "exit")
        await pool.run_sync(jobs.at_exit, jobs.print_unfinished, "said at exit")
        await pool.run_sync(jobs.keep_open, str(kept), "text")
    assert worker.state.value is WorkerState.STOPPED
    assert lines(note) == ["exit"]
    assert lines(kept) == ["text"]
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage().rpartition(": ")[2] for record in said] == ["said at exit"]


async def test_soft_stop_of_each_kind(note: Path) -> None:
    """Point 6: a worker that has served its time, or is stopped by its owner, ends as softly as at the end."""
    async with open_pool(max_executions=1) as pool:
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "served")
        assert await noted(note) == ["served"]
        await until(lambda: all_idle(pool))
    async with open_pool() as pool:
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "stopped")
        await pool.workers[0].stop()
        assert lines(note) == ["served", "stopped"]


async def test_exit_handler_that_fails(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Point 6: an exit handler that raises is seen in the log, and the others run."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "ran")
        await pool.run_sync(jobs.at_exit, jobs.fail, "at exit")
    assert worker.state.value is WorkerState.STOPPED
    assert lines(note) == ["ran"]
    assert any("ValueError: at exit" in record.getMessage() for record in caplog.records)


async def test_exit_handler_that_hangs(
    note: Path, caplog: pytest.LogCaptureFixture, clock: trio.testing.MockClock
) -> None:
    """Point 6: what does not end within `destroy_timeout` is killed, and a warning tells."""

    async def let_the_time_pass() -> None:
        await noted(note)
        clock.jump(30.0)

    async with trio.open_nursery() as nursery, open_pool(2, destroy_timeout=30.0) as pool, pool.lease() as leased:
        await leased.run_sync(jobs.at_exit, jobs.hang, str(note))
        workers = pool.workers
        nursery.start_soon(let_the_time_pass)
    hung, other = workers[leased.slot], workers[1 - leased.slot]
    assert lines(note) == [str(hung.pid)]
    assert hung.state.value is WorkerState.ERRORED
    with pytest.raises(WorkerError) as caught:
        await hung.wait()
    assert caught.value.signal == signal.SIGKILL
    assert other.pid is not None
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(str(hung.pid) in line and "did not stop within destroy_timeout (30 s)" in line for line in said)


async def test_no_time_to_stop(note: Path) -> None:
    """Point 6: with a `destroy_timeout` of 0 workers are killed at once."""
    async with open_pool(destroy_timeout=0) as pool:
        (worker,) = pool.workers
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "never")
    assert not note.exists()
    assert worker.state.value is WorkerState.ERRORED


async def test_stopped_worker_is_killed() -> None:
    """Point 6: a worker that can't hear the stop is killed after `destroy_timeout`."""
    async with open_pool(destroy_timeout=0.2) as pool:
        (worker,) = pool.workers
        assert worker.pid is not None
        pid = worker.pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: stopped(pid))
    assert not runs(pid)


async def test_what_a_job_leaves_in_its_group(note: Path) -> None:
    """Point 6: programs that a job started and left die with the worker: stopped, crashed, killed or replaced."""
    async with open_pool(max_executions=3) as pool:
        for number in range(3):
            assert runs(await pool.run_sync(jobs.start_child, str(note))), number
        await gone(*await noted(note, 3))
        await pool.run_sync(jobs.start_child, str(note))
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(os._exit, 0)
        await gone(*lines(note))
        await pool.run_sync(jobs.start_child, str(note))
        await pool.workers[0].kill()
        await gone(*lines(note))
        await pool.run_sync(jobs.start_child, str(note))
        assert runs(int(lines(note)[-1]))
    assert len(lines(note)) == 6
    await gone(*lines(note))


# the block is left by an error


@pytest.mark.parametrize("how", ["error", "cancel"])
async def test_left_at_once(how: str, note: Path) -> None:
    """Point 6: left by an exception or a cancel the workers are killed at once; others' jobs hear that it is closed."""
    told = Told()
    scope = trio.CancelScope()
    outcomes: list[type[BaseException]] = []
    exits, started, waits = note.with_name("exits"), note.with_name("started"), note.with_name("waits")

    async def call(function: Callable[..., object], *args: object) -> None:
        try:
            await pool.run_sync(function, *args)
        except trio.ClosedResourceError as error:
            outcomes.append(type(error))

    async def stream() -> None:
        found: list[int] = []
        with pytest.raises(trio.ClosedResourceError):
            async with pool.stream(jobs.count_and_hang, 1, str(started)) as parts:
                async for part in parts:
                    found.append(part)  # noqa: PERF401 - what came before the error
        assert found == [0]

    async with trio.open_nursery() as nursery:
        with scope, contextlib.suppress(KeyError):
            async with open_pool(3, destroy_timeout=1000.0, observer=told) as pool:
                workers = pool.workers
                for worker in workers:
                    async with pool.lease() as leased:
                        await leased.run_sync(jobs.at_exit, jobs.note, str(exits), worker.slot)
                nursery.start_soon(call, jobs.hang, str(started))
                nursery.start_soon(call, jobs.deaf, str(started))
                nursery.start_soon(stream)
                await noted(started, 3)
                nursery.start_soon(call, jobs.note, str(waits), "never")
                await until(lambda: pool.statistics().waiting == 1)
                if how == "error":
                    raise KeyError("mine")
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert pool.workers == ()
        await gone(*(worker.pid for worker in workers))
    assert outcomes == [trio.ClosedResourceError] * 3
    assert not exits.exists()
    assert not waits.exists()
    assert scope.cancelled_caught == (how == "cancel")
    assert [event for event, _, _ in told.events].count(WorkerEvent.DESTRUCT) == 3


async def test_left_while_opening(note: Path) -> None:
    """Point 6: a cancel while workers start leaves none of them."""
    async with trio.open_nursery() as nursery:

        async def open_and_wait() -> None:
            async with open_pool(3, initializer=jobs.hang, initargs=(str(note),)):
                raise AssertionError

        nursery.start_soon(open_and_wait)
        pids = await noted(note, 3)
        nursery.cancel_scope.cancel()
    await gone(*pids)


async def test_left_while_stopping(note: Path) -> None:
    """Point 6: a cancel while workers have their time to stop ends that time."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await noted(note)
                scope.cancel()

            async with open_pool(destroy_timeout=1000.0) as pool:
                (worker,) = pool.workers
                await pool.run_sync(jobs.at_exit, jobs.hang, str(note))
                nursery.start_soon(cancel)
    assert scope.cancelled_caught
    await gone(worker.pid)


# the process of the pool is killed

PROGRAM: Final = """\
import os, sys
import trio
from tests import python_pool_jobs as jobs
from trio_workers import *

async def main(note):
{}

if __name__ == "__main__":
    trio.run(main, sys.argv[1])
"""


class Program:
    """A program that opens Python pools, in a process of its own; it and its workers note their pids."""

    def __init__(self, directory: Path, source: str, *flags: str) -> None:
        self.note = directory / "program_note"
        file = directory / "program.py"
        file.write_text(PROGRAM.format(textwrap.indent(textwrap.dedent(source), "    ")), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *flags, str(file), str(self.note)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, count: int) -> list[int]:
        """Wait for as many pids, and return them."""
        wait(lambda: len(lines(self.note)) >= count or self.process.poll() is not None)
        found = [int(line) for line in lines(self.note)]
        assert len(found) == count, self.process.communicate()
        return found

    def end(self) -> tuple[int, str, str]:
        """Wait for its end, and return status, stdout and stderr."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program; at the end of the test nothing of it is left, or the test fails."""
    programs: list[Program] = []

    def begin(source: str, *flags: str) -> Program:
        programs.append(Program(tmp_path, source, *flags))
        return programs[-1]

    yield begin
    left: list[int] = []
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
        program.process.communicate()
        left += [int(line) for line in lines(program.note)]
    try:
        wait(lambda: not any(map(runs, left)), 5)
    finally:
        for pid in filter(runs, left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


KILLED: Final[dict[str, tuple[str, int]]] = {
    "spins in C": ("nursery.start_soon(pool.run_sync, jobs.spin_in_c, note)", 1),
    "waits in C": ("nursery.start_soon(pool.run_sync, jobs.pause_in_c, note)", 1),
    "deaf": ("nursery.start_soon(pool.run_sync, jobs.deaf, note)", 1),
    "has a child": ("nursery.start_soon(pool.run_sync, jobs.hang_with_child, note, note)", 2),
    "spins, has a child": ("nursery.start_soon(pool.run_sync, jobs.spin_in_c_with_child, note, note)", 2),
    "left a child": ("await pool.run_sync(jobs.start_child, note); await pool.run_sync(jobs.note_pid, note)", 2),
    "left a thread": ("await pool.run_sync(jobs.leave_thread, note)", 1),
    "has pools": ("nursery.start_soon(pool.run_sync, jobs.nested_pids, note, 2)", 3),
    "idle": ("await pool.run_sync(jobs.note_pid, note)", 1),
}


@pytest.mark.parametrize("what", KILLED)
def test_pool_killed(what: str, start: Callable[..., Program]) -> None:
    """Point 6: SIGKILL of the pool's process: each worker is gone, whatever it is at, and each child of one."""
    source, count = KILLED[what]
    program = start(f"""
        async with open_python_pool(1) as pool, trio.open_nursery() as nursery:
            {source}
            await trio.sleep_forever()
        """)
    pids = program.pids(count)
    assert all(map(runs, pids))
    program.process.kill()
    assert program.end()[0] == -signal.SIGKILL
    wait(lambda: not any(map(runs, pids)), 10)


def test_pool_killed_while_opening(start: Callable[..., Program]) -> None:
    """Point 6: SIGKILL of the pool's process while workers are in their initializer."""
    program = start("""
        async with open_python_pool(2, initializer=jobs.spin_in_c, initargs=(note,)):
            pass
        """)
    pids = program.pids(2)
    program.process.kill()
    program.end()
    wait(lambda: not any(map(runs, pids)), 10)


async def test_no_thread_watches() -> None:
    """Done when: nothing in the child watches its parent: an idle worker has one thread."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        assert len(os.listdir(f"/proc/{pid}/task")) == 1


@pytest.mark.parametrize("flags", [(), ("-X", "dev"), ("-b", "-b")])
def test_quiet_end(flags: tuple[str, ...], start: Callable[..., Program]) -> None:
    """Point 6: a soft stop says nothing, also where Python is told to warn of everything."""
    program = start(
        """
        import logging
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        async with open_python_pool(2) as pool:
            for number in range(4):
                assert await pool.run_sync(jobs.square, number) == number ** 2
            async with pool.stream(jobs.count, 3) as parts:
                assert [part async for part in parts] == [0, 1, 2]
        """,
        *flags,
    )
    status, out, err = program.end()
    assert (status, out, err) == (0, "", "")


def test_writable_pipe_of_the_program(start: Callable[..., Program]) -> None:
    """Point 6: whoever reads a killed program's stdout and stderr sees their end: no worker holds them."""
    program = start("""
        async with open_python_pool(1) as pool:
            await pool.run_sync(jobs.start_child, note)
            sys.stdout.close()
            os.close(1)
            os.close(2)
            await pool.run_sync(jobs.note_pid, note)
            await trio.sleep_forever()
        """)
    program.pids(2)
    for stream in (program.process.stdout, program.process.stderr):
        assert stream is not None
        readable, _, _ = select.select([stream], [], [], 30)
        assert readable
        assert stream.read() == ""
