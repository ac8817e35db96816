"""`open_python_pool` as its users see it: calls, streams, leases, labels, events, statistics, initializers, parameters.

The functions that run in workers are in `python_pool_jobs.py`.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import contextlib
import functools
import gc
import inspect
import logging
import operator
import os
import pickle
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests import python_pool_jobs as jobs
from tests.test_faults import Told, runs, until
from trio_workers import (
    AllocateTimeout,
    JobError,
    Lease,
    Parts,
    Payload,
    PythonPool,
    PythonWorker,
    QueueFull,
    RemoteTraceback,
    Restart,
    SpawnError,
    Worker,
    WorkerCrashed,
    WorkerEvent,
    WorkerState,
    open_python_pool,
)


def open_pool(num_workers: int | None = 1, **changes: Any) -> AbstractAsyncContextManager[PythonPool]:
    """A pool with limits that a loaded machine does not reach."""
    fields: dict[str, Any] = {"allocate_timeout": 30.0, "boot_timeout": 30.0, "restart": Restart(initial=0.02)}
    return open_python_pool(num_workers, **{**fields, **changes})


def check(pool: PythonPool) -> None:
    """What holds of a pool at every moment."""
    now = pool.statistics()
    assert now.idle + now.busy + now.starting + now.leased + now.stopping == len(pool.workers)
    assert now.starts == len(pool.workers) + sum(now.exits.values())


def all_idle(pool: PythonPool) -> bool:
    now = pool.statistics()
    return now.idle == now.target == len(pool.workers)


def lines(path: Path) -> list[str]:
    """What jobs have noted so far."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


async def noted(path: Path, count: int = 1) -> list[str]:
    """Wait until jobs have noted as many lines as this."""
    await until(lambda: len(lines(path)) >= count)
    return lines(path)


@contextlib.asynccontextmanager
async def staying(pool: PythonPool, note: Path, go: Path, **keywords: Any) -> AsyncIterator[None]:
    """A job that runs inside the block, and is waited for."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pool.run_sync, jobs.stay, str(note), str(go), **keywords))
        await noted(note)
        yield
        go.touch()


# run_sync


async def test_run_sync() -> None:
    """Names: whatever can be called and pickled runs, with its arguments, and keywords through partial."""
    async with open_pool() as pool:
        assert await pool.run_sync(jobs.echo, "text") == "text"
        assert await pool.run_sync(jobs.add) == 0
        assert await pool.run_sync(jobs.add, 1, 2, 3) == 6
        assert await pool.run_sync(functools.partial(jobs.add, 1, plus=10), 2) == 13
        assert await pool.run_sync(jobs.partial_add, 3) == 6
        assert await pool.run_sync(divmod, 17, 5) == (3, 2)
        assert await pool.run_sync(str.upper, "text") == "TEXT"
        assert await pool.run_sync("text".upper) == "TEXT"
        assert await pool.run_sync(operator.itemgetter(1), "text") == "e"
        assert await pool.run_sync(complex, "1+2j") == 1 + 2j
        assert await pool.run_sync(jobs.Adder(), 1) == 2
        assert await pool.run_sync(jobs.Adder().method, 1) == 3
        assert await pool.run_sync(os.getpid) == pool.workers[0].pid
        assert pool.statistics().jobs == {"replied": 13}


async def test_many_callers() -> None:
    """Names: callers at once get their own results, and jobs begin in the order in which they came."""
    results: dict[int, int] = {}

    async def call(number: int) -> None:
        results[number] = await pool.run_sync(jobs.square, number)

    async with open_pool(2) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(call, number)
        assert results == {number: number**2 for number in range(64)}
        assert sum(worker.state.num_execs for worker in pool.workers) == 64


async def test_order_of_callers(note: Path, go: Path) -> None:
    """Names: same roster as `open_pool`: who came first is served first."""
    async with open_pool() as pool, staying(pool, note, go):
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(pool.run_sync, jobs.note, str(note), number)
                await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().waiting == 10
            assert pool.statistics().longest_wait > 0
            go.touch()
        assert lines(note)[1:] == [str(number) for number in range(10)]


async def test_error_costs_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    """Point 4, as seen from here: a job's exception is its caller's alone; the worker stays, no event tells of it."""
    told = Told()
    async with open_pool(observer=told) as pool:
        pid = await pool.run_sync(os.getpid)
        with pytest.raises(ValueError, match=r"^text$") as caught:
            await pool.run_sync(jobs.fail, "text")
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in fail" in str(caught.value.__cause__)
        assert await pool.run_sync(os.getpid) == pid
        assert pool.statistics().jobs == {"replied": 2, "failed": 1}
        assert [event for event, _, _ in told.events] == [WorkerEvent.CREATED]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_checkpoints() -> None:
    """Habit: each public async function is a checkpoint, where it returns and where it raises."""
    async with open_pool() as pool:
        with trio.testing.assert_checkpoints():
            await pool.run_sync(jobs.echo, 1)
        with trio.testing.assert_checkpoints(), pytest.raises(ValueError, match="text"):
            await pool.run_sync(jobs.fail, "text")
        lease = pool.lease()
        with trio.testing.assert_checkpoints():
            worker = await lease.__aenter__()
        with trio.testing.assert_checkpoints():
            await worker.run_sync(jobs.echo, 1)
        await lease.__aexit__(None, None, None)
        stream = pool.stream(jobs.count, 2)
        with trio.testing.assert_checkpoints():
            parts = await stream.__aenter__()
        for number in range(2):
            with trio.testing.assert_checkpoints():
                assert await anext(parts) == number
        for _ in range(2):
            with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
                await anext(parts)
        await stream.__aexit__(None, None, None)


class Interrupting:
    """An argument whose pickling is ended by what is no Exception."""

    def __reduce__(self) -> Any:
        raise SystemExit(5)


async def test_pickling_that_is_interrupted() -> None:
    """Point 5: an argument that breaks its own pickling off leaves nothing behind for the next call."""
    async with open_pool() as pool:
        for function, args in [
            (jobs.echo, (bytes(1 << 20), Interrupting())),
            (jobs.echo, ([pickle.PickleBuffer(bytearray(1 << 20)), Interrupting()],)),
        ]:
            with pytest.raises(SystemExit):
                await pool.run_sync(function, *args)
            with pytest.raises(SystemExit):
                pool.stream(function, *args)
            assert await pool.run_sync(jobs.size_of, bytes(2 << 20)) == 2 << 20


async def test_buffers_and_the_garbage_collector() -> None:
    """Point 5: large buffers may be part of garbage that only the collector finds, on either side."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        for size in (1 << 16, 1 << 20):
            for _ in range(3):
                result = await pool.run_sync(jobs.give_buffer, size)
                assert bytes(result[0]) == bytes(size)
                result[0][:4] = b"mine"
                result.append(result)
                del result
                gc.collect()
                # The collector finds the worker's garbage after the job, or inside the next one.
                assert await pool.run_sync(jobs.tie, [pickle.PickleBuffer(bytearray(size))]) == worker.pid
                assert await pool.run_sync(gc.collect) >= 0
        assert pool.workers == (worker,)


# labels


@pytest.mark.parametrize(
    ("wrap", "label", "expected"),
    [
        (None, None, "tests.python_pool_jobs.stay"),
        (functools.partial, None, "tests.python_pool_jobs.stay"),
        (None, "mine", "mine"),
        (functools.partial, "mine", "mine"),
    ],
)
async def test_label_of_current(
    wrap: Callable[..., Any] | None, label: str | None, expected: str, note: Path, go: Path
) -> None:
    """Names: `Worker.current` has the label, by default the function's qualified name."""
    function = jobs.stay if wrap is None else wrap(wrap(jobs.stay))
    async with open_pool() as pool:
        (worker,) = pool.workers
        assert worker.current is None
        async with trio.open_nursery() as nursery:
            before = trio.current_time()
            nursery.start_soon(functools.partial(pool.run_sync, function, str(note), str(go), label=label))
            await noted(note)
            assert worker.current is not None
            assert worker.current.label == expected
            assert before <= worker.current.started <= trio.current_time()
            go.touch()
        assert worker.current is None


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (os._exit, "'posix._exit'"),
        (functools.partial(jobs.say_and_exit, "x"), "'tests.python_pool_jobs.say_and_exit'"),
    ],
)
async def test_default_label_in_errors(function: Callable[[int], object], expected: str) -> None:
    """Names: an error names the function where nobody gave a label; builtins and partials have names too."""
    async with open_pool() as pool:
        with pytest.raises(WorkerCrashed, match=expected):
            await pool.run_sync(function, 3)
        with pytest.raises(WorkerCrashed, match="'mine'") as caught:
            await pool.run_sync(function, 3, label="mine")
        assert expected not in str(caught.value)


async def test_label_of_object() -> None:
    """Names: what has no qualified name is called by its type."""
    async with open_pool(allocate_timeout=0.01) as pool, pool.lease():
        for function, expected in [
            (jobs.Adder(), "'Adder'"),
            (jobs.Adder().method, "'tests.python_pool_jobs.Adder.method'"),
            (jobs.Adder, "'tests.python_pool_jobs.Adder'"),
        ]:
            with pytest.raises(AllocateTimeout, match=expected):
                await pool.run_sync(function, 1)


@pytest.mark.parametrize("label", [None, "mine"])
async def test_label_in_log(label: str | None, note: Path, go: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names: the log names the job for which a worker was killed."""
    caplog.set_level(logging.INFO, "trio_workers")
    async with open_pool() as pool, trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pool.run_sync, jobs.stay, str(note), str(go), label=label))
        await noted(note)
        nursery.cancel_scope.cancel()
    expected = "tests.python_pool_jobs.stay" if label is None else label
    assert any(f"the job {expected!r} was cancelled" in record.getMessage() for record in caplog.records)


async def test_label_of_stream_and_lease(note: Path) -> None:
    """Names: streams and leases have labels too; a job in a lease shows its own."""
    async with open_pool() as pool:
        (worker,) = pool.workers

        def current() -> str | None:
            assert worker.current is not None
            return worker.current.label

        async with pool.stream(jobs.count, 5):
            assert current() == "tests.python_pool_jobs.count"
        await until(lambda: all_idle(pool))
        async with pool.stream(jobs.count, 5, label="counting"):
            assert current() == "counting"
        await until(lambda: all_idle(pool))
        async with pool.lease(label="model") as leased:
            assert current() == "model"
            async with leased.stream(jobs.count, 1, label="inner") as parts:
                assert current() == "inner"
                assert [part async for part in parts] == [0]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leased.run_sync, jobs.stay, str(note), f"{note}.go")
                await noted(note)
                assert current() == "tests.python_pool_jobs.stay"
                Path(f"{note}.go").touch()
            assert current() == "model"
        async with pool.lease():
            assert current() is None


# streams


@pytest.mark.parametrize("function", [jobs.count, jobs.give_list, jobs.give_iterator])
@pytest.mark.parametrize("number", [0, 1, 1000])
async def test_stream(function: Callable[[int], Any], number: int) -> None:
    """Names: a generator function's parts come in order; so do the items of whatever else is iterable."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        async with pool.stream(function, number) as parts:
            assert [part async for part in parts] == list(range(number))
            with pytest.raises(StopAsyncIteration):
                await anext(parts)
        assert await pool.run_sync(os.getpid) == pid
        assert pool.statistics().jobs == {"replied": 3}


async def test_stream_is_lazy(note: Path, go: Path) -> None:
    """Names: a part is there as soon as it was yielded, long before the next."""
    async with open_pool() as pool, pool.stream(jobs.count_and_stay, 3, str(note), str(go)) as parts:
        for number in range(3):
            assert await anext(parts) == number
        assert await noted(note) == [str(pool.workers[0].pid)]
        go.touch()
        assert [part async for part in parts] == [pool.workers[0].pid]


async def test_stream_error() -> None:
    """Point 4: the error of a generator comes behind its parts, as itself; the worker stays."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        found: list[int] = []
        with pytest.raises(ValueError, match="after 3") as caught:
            async with pool.stream(jobs.count_and_fail, 3) as parts:
                async for part in parts:
                    found.append(part)  # noqa: PERF401 - what came before the error
        assert found == [0, 1, 2]
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        async with pool.stream(jobs.count_and_fail, 0) as parts:
            with pytest.raises(ValueError, match="after 0"):
                await anext(parts)
            with pytest.raises(StopAsyncIteration):
                await anext(parts)
        assert await pool.run_sync(os.getpid) == pid
        assert pool.statistics().jobs == {"replied": 2, "failed": 2}


async def test_stream_of_no_iterable() -> None:
    """Names: a function that returns no iterable can't be streamed; a generator can't be run: both say what to do."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        async with pool.stream(jobs.square, 3) as parts:
            with pytest.raises(JobError, match=r"stream\(\) takes a generator function.*square returned int"):
                await anext(parts)
        with pytest.raises(TypeError, match=r"count is a generator: .*stream\(\)"):
            await pool.run_sync(jobs.count, 3)
        with pytest.raises(JobError, match=r"(?s)part of the stream of .*part_without_pickle.*lock"):
            async with pool.stream(jobs.part_without_pickle, 2) as parts:
                assert [await anext(parts), await anext(parts)] == [0, 1]
                await anext(parts)
        assert await pool.run_sync(os.getpid) == pid


async def test_stream_holds_the_worker_back(note: Path) -> None:
    """Names: nothing is read ahead: a generator that nobody asks for more stands still after about a megabyte."""
    size = 1 << 16
    async with open_pool() as pool:
        (worker,) = pool.workers
        async with pool.stream(jobs.flood, str(note), size) as parts:
            assert len(await anext(parts)) == size
            quiet = yielded = 0
            while quiet < 20:
                # It sleeps nowhere else than where the socket is full.
                await trio.sleep(0.002)
                state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
                now = note.stat().st_size
                quiet = quiet + 1 if state == "S" and now == yielded else 0
                yielded = now
                assert yielded * size < 8 << 20
            for _ in range(200):
                assert len(await anext(parts)) == size
            assert note.stat().st_size >= 200
        await until(lambda: all_idle(pool))
        assert await pool.run_sync(os.getpid) == worker.pid
        assert lines(Path(f"{note}.end")) == ["closed"]


@pytest.mark.parametrize("how", ["break", "return", "error"])
async def test_stream_left_early(how: str, note: Path) -> None:
    """Names: left early by break, return or an error, the generator is closed and the worker stays."""

    async def leave() -> None:
        async with pool.stream(jobs.flood, str(note), 10) as parts:
            async for part in parts:
                assert len(part) == 10
                if how == "break":
                    break
                if how == "return":
                    return
                raise KeyError("mine")

    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        if how == "error":
            with pytest.raises(KeyError, match="mine"):
                await leave()
        else:
            await leave()
        assert await pool.run_sync(os.getpid) == pid
        assert lines(Path(f"{note}.end")) == ["closed"]
        assert pool.statistics().jobs == {"replied": 3}


async def test_stream_left_at_any_moment() -> None:
    """Names: wherever the end of a stream and the wish to end it cross, the worker stays and answers rightly."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        for number in range(60):
            async with pool.stream(jobs.count, number % 5) as parts:
                for _ in range(number % 4):
                    with contextlib.suppress(StopAsyncIteration):
                        await anext(parts)
            assert await pool.run_sync(jobs.add, number, 1) == number + 1
        assert await pool.run_sync(os.getpid) == pid


async def test_stream_cancelled(note: Path) -> None:
    """Names: left by a cancel the worker is killed, and replaced."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        with trio.CancelScope() as scope:
            async with pool.stream(jobs.count_and_hang, 1, str(note)) as parts:
                assert await anext(parts) == 0
                await noted(note)
                scope.cancel()
                await anext(parts)
        assert scope.cancelled_caught
        assert await pool.run_sync(os.getpid) != pid
        assert not runs(pid)
        assert pool.statistics().exits == {"cancelled": 1}
        assert pool.statistics().jobs == {"replied": 2, "cancelled": 1}


async def test_cancelled_wait_for_a_part_loses_none() -> None:
    """Names: a cancel around `anext` alone loses no part."""
    async with open_pool() as pool, pool.stream(jobs.count, 100) as parts:
        found: list[int] = []
        for number in range(200):
            with trio.CancelScope() as scope, contextlib.suppress(StopAsyncIteration):
                if number % 2:
                    scope.cancel()
                found.append(await anext(parts))
        assert found == list(range(100))


async def test_generator_that_hangs_when_closed(note: Path, clock: trio.testing.MockClock) -> None:
    """Names: a generator that does not end within `destroy_timeout` of being left costs its worker, and nobody else."""
    async with open_pool(destroy_timeout=20.0) as pool:
        (worker,) = pool.workers
        async with pool.stream(jobs.hang_on_close, str(note)) as parts:
            async for _ in parts:
                break
        await noted(note)
        clock.jump(20.0)
        assert await pool.run_sync(os.getpid) != worker.pid
        assert lines(note) == ["closing"]
        assert worker.state.value is WorkerState.ERRORED
        await until(lambda: all_idle(pool))
        check(pool)


async def test_block_waits_for_a_stream_that_was_left(note: Path, clock: trio.testing.MockClock) -> None:
    """Names: leaving the pool waits for the rest of a stream, at most for `destroy_timeout`."""

    async def let_the_time_pass() -> None:
        await noted(note)
        clock.jump(20.0)

    async with trio.open_nursery() as nursery, open_pool(destroy_timeout=20.0) as pool:
        (worker,) = pool.workers
        async with pool.stream(jobs.hang_on_close, str(note)) as parts:
            assert await anext(parts) == 1
        nursery.start_soon(let_the_time_pass)
    assert lines(note) == ["closing"]
    assert worker.pid is not None
    assert not runs(worker.pid)


@pytest.mark.parametrize("function", [jobs.go_on_after_close, jobs.fail_on_close])
async def test_generator_that_does_not_close_well(function: Callable[..., Any], note: Path) -> None:
    """Names: a generator that yields on, or raises, when it is closed, costs no worker and reaches no other caller."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        for _ in range(3):
            async with pool.stream(function, *[str(note)] * (function is jobs.go_on_after_close)) as parts:
                async for _ in parts:
                    break
            assert await pool.run_sync(os.getpid) == pid
        assert (lines(note) != []) == (function is jobs.go_on_after_close)


async def test_stream_is_entered_once() -> None:
    """Names: a stream is used inside its block, and once."""
    async with open_pool() as pool:
        stream = pool.stream(jobs.count, 3)
        with pytest.raises(RuntimeError, match="must be entered"):
            await anext(stream)
        async with stream as parts:
            assert await anext(parts) == 0
        with pytest.raises(RuntimeError, match="only once"):
            async with stream:
                pass


# leases


async def test_lease() -> None:
    """Names: what one job of a lease leaves in the process is there for the next, and is for nobody else's."""
    async with open_pool(2) as pool:
        async with pool.lease() as worker:
            assert isinstance(worker, PythonWorker)
            pid = await worker.run_sync(jobs.keep, "name", "value")
            assert worker.pid == pid
            assert worker.slot == pool.workers[worker.slot].slot
            assert await worker.run_sync(jobs.environment, "TRIO_WORKERS_SLOT") == [str(worker.slot)]
            assert await pool.run_sync(os.getpid) != pid
            assert await worker.run_sync(jobs.recall, "name") == "value"
            async with worker.stream(jobs.count, 3) as parts:
                assert [part async for part in parts] == [0, 1, 2]
            with pytest.raises(ValueError, match="text"):
                await worker.run_sync(jobs.fail, "text")
            assert await worker.run_sync(os.getpid) == pid
            now = pool.statistics()
            assert (now.leased, now.idle) == (1, 1)
            check(pool)
        await until(lambda: all_idle(pool))
        assert pool.statistics().exits == {}


async def test_lease_after_a_stream_that_was_left(note: Path) -> None:
    """Names: a stream of a lease that was left early keeps the worker; its holder may go on with it at once."""
    async with open_pool() as pool, pool.lease() as worker:
        for _ in range(3):
            async with worker.stream(jobs.flood, str(note), 10) as parts:
                async for _ in parts:
                    break
            assert await worker.run_sync(os.getpid) == worker.pid
        for _ in range(3):
            async with worker.stream(jobs.count, 10) as parts:
                assert await anext(parts) == 0


async def test_lease_is_busy(note: Path, go: Path) -> None:
    """Names: two tasks in one leased worker are a BusyResourceError; so is a job beside its own stream."""
    async with open_pool() as pool, pool.lease() as worker:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run_sync, jobs.stay, str(note), str(go))
            await noted(note)
            with pytest.raises(trio.BusyResourceError):
                await worker.run_sync(jobs.echo, 1)
            with pytest.raises(trio.BusyResourceError):
                async with worker.stream(jobs.count, 1):
                    pass
            go.touch()
        async with worker.stream(jobs.count, 2) as parts:
            with pytest.raises(trio.BusyResourceError):
                await worker.run_sync(jobs.echo, 1)
            assert [part async for part in parts] == [0, 1]
        assert await worker.run_sync(jobs.echo, 1) == 1


async def test_lease_that_is_over() -> None:
    """Names: a worker whose lease is over belongs to its pool again; after the pool it is closed."""
    async with open_pool() as pool:
        async with pool.lease() as worker:
            pass
        with pytest.raises(trio.BusyResourceError, match="belongs to its pool"):
            await worker.run_sync(jobs.echo, 1)
        lease = pool.lease()
        async with lease:
            pass
        with pytest.raises(RuntimeError, match="only once"):
            async with lease:
                pass
    with pytest.raises(trio.ClosedResourceError):
        await worker.run_sync(jobs.echo, 1)


async def test_lease_cancelled(note: Path) -> None:
    """Names: a cancel inside a lease kills the worker if a job runs on it, and only then."""
    async with open_pool() as pool:
        pid = await pool.run_sync(os.getpid)
        with trio.CancelScope() as scope:
            async with pool.lease() as worker:
                await worker.run_sync(jobs.echo, 1)
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert await pool.run_sync(os.getpid) == pid
        async with pool.lease() as worker:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run_sync, jobs.hang, str(note))
                await noted(note)
                nursery.cancel_scope.cancel()
            with pytest.raises(trio.ClosedResourceError):
                await worker.run_sync(jobs.echo, 1)
        assert await pool.run_sync(os.getpid) != pid
        await until(lambda: all_idle(pool))


async def test_lease_waits_its_turn(note: Path, go: Path) -> None:
    """Names: a lease is queued as one job, with the errors of one."""
    async with open_pool(max_queue=1) as pool, pool.lease() as worker:
        order: list[str] = []

        async def lease() -> None:
            async with pool.lease() as other:
                assert other.pid == worker.pid
                order.append("leased")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease)
            await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().waiting == 1
            with pytest.raises(QueueFull):
                async with pool.lease():
                    pass
            nursery.cancel_scope.cancel()
        assert order == []
        assert pool.statistics().waiting == 0
    with pytest.raises(trio.ClosedResourceError):
        async with pool.lease():
            pass


async def test_executions_of_a_lease() -> None:
    """Names: `max_executions` is looked at when a lease ends."""
    async with open_pool(max_executions=2) as pool:
        async with pool.lease() as worker:
            pids = {await worker.run_sync(os.getpid) for _ in range(5)}
        assert pids == {worker.pid}
        assert await pool.run_sync(os.getpid) not in pids


# workers, statistics


async def test_workers() -> None:
    """Names: `workers` shows pid, slot and state of each, by slot."""
    async with open_pool(3) as pool:
        assert [worker.slot for worker in pool.workers] == [0, 1, 2]
        assert len({worker.pid for worker in pool.workers}) == 3
        assert all(isinstance(worker, Worker) for worker in pool.workers)
        assert {worker.state.value for worker in pool.workers} == {WorkerState.READY}
        workers = pool.workers
        assert pool.statistics().target == 3
        check(pool)
    assert {worker.state.value for worker in workers} == {WorkerState.STOPPED}
    assert pool.workers == ()


async def test_statistics_by_state(note: Path, go: Path) -> None:
    """Names: every worker is counted once: idle, busy, leased, starting or stopping."""
    wait, slow = Path(f"{note}.wait"), note.with_name("slow")
    async with open_pool(4, initializer=jobs.initialize_slowly, initargs=(str(note),), destroy_timeout=30.0) as pool:
        wait.touch()
        async with pool.lease() as stopping:
            await stopping.run_sync(jobs.at_exit, jobs.stay, str(slow), str(go))
            first = pool.workers[stopping.slot]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.stop)
            await noted(slow)
            await noted(note, 5)
            async with pool.lease(), pool.stream(jobs.count, 3) as parts:
                now = pool.statistics()
                assert (now.idle, now.busy, now.leased, now.starting, now.stopping) == (1, 1, 1, 1, 1)
                check(pool)
                assert [part async for part in parts] == [0, 1, 2]
            wait.unlink()
            go.touch()
        await until(lambda: all_idle(pool))
        assert pool.statistics().starts == 5
        assert pool.statistics().exits == {"stopped": 1}


async def test_statistics_at_every_moment(note: Path) -> None:
    """Names: idle + busy + starting + leased + stopping is the number of workers, whatever happens."""

    async def watch() -> None:
        while True:
            check(pool)
            await trio.lowlevel.checkpoint()

    async def crash() -> None:
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(os._exit, 1)

    async def cancel(number: int) -> None:
        path = note.with_name(f"cancel{number}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.hang, str(path))
            await noted(path)
            nursery.cancel_scope.cancel()

    async def lease() -> None:
        async with pool.lease() as worker:
            await worker.run_sync(jobs.echo, 1)

    def observe(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if opened:
            check(pool)

    opened = False
    async with open_pool(2, max_executions=3, observer=observe) as pool:
        opened = True
        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(crash)
                    nursery.start_soon(cancel, number)
                    nursery.start_soon(lease)
                    nursery.start_soon(pool.run_sync, jobs.echo, 1)
            watching.cancel_scope.cancel()
        jobs_by_outcome = pool.statistics().jobs
    assert jobs_by_outcome == {"crashed": 4, "cancelled": 4, "replied": 8}


async def test_one_execution_each() -> None:
    """Point 6: `max_executions=1` isolates everything: a new process for each job, of which none sees another."""
    async with open_pool(max_executions=1) as pool:
        pids: set[int] = set()
        for number in range(5):
            assert await pool.run_sync(jobs.recall, "number") is None
            pids.add(await pool.run_sync(jobs.keep, "number", number))
        assert len(pids) == 5
        with pytest.raises(ValueError, match="text"):
            await pool.run_sync(jobs.fail, "text")
        async with pool.stream(jobs.count, 3) as parts:
            assert [part async for part in parts] == [0, 1, 2]
        await until(lambda: all_idle(pool))
        assert pool.statistics().starts == 13
        assert pool.statistics().exits == {"max_executions": 12}


async def test_executions() -> None:
    """Names: after `max_executions` jobs a worker is replaced."""
    async with open_pool(max_executions=3) as pool:
        pids = [await pool.run_sync(os.getpid) for _ in range(9)]
        assert [len(set(pids[at : at + 3])) for at in (0, 3, 6)] == [1, 1, 1]
        assert len(set(pids)) == 3


async def test_queue_full(note: Path, go: Path) -> None:
    """Names: more than `max_queue` waiting callers are a QueueFull at once."""
    async with open_pool(max_queue=1) as pool, staying(pool, note, go), trio.open_nursery() as nursery:
        nursery.start_soon(pool.run_sync, jobs.echo, 1)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(QueueFull, match="max_queue is 1"):
            await pool.run_sync(jobs.echo, 2)
        with pytest.raises(QueueFull):
            async with pool.stream(jobs.count, 2):
                pass
        assert pool.statistics().jobs == {"queue_full": 2}
        go.touch()


async def test_allocate_timeout(note: Path, go: Path) -> None:
    """Names: no free worker within `allocate_timeout` is an AllocateTimeout that names the function."""
    async with open_pool(allocate_timeout=0.01) as pool, staying(pool, note, go):
        with pytest.raises(AllocateTimeout, match=r"'tests\.python_pool_jobs\.echo'.*0\.01 s.*1 are busy") as caught:
            await pool.run_sync(jobs.echo, 2)
        assert caught.value.started is False
        with pytest.raises(trio.TooSlowError, match="'labelled'"):
            await pool.run_sync(jobs.echo, 2, label="labelled")
        with pytest.raises(AllocateTimeout):
            async with pool.stream(jobs.count, 2):
                pass
        with pytest.raises(AllocateTimeout):
            async with pool.lease():
                pass
        assert pool.statistics().jobs == {"allocate_timeout": 4}


async def test_default_size() -> None:
    """Names: without a number there are as many workers as cores that this process may use."""
    async with open_pool(None) as pool:
        assert len(pool.workers) == len(os.sched_getaffinity(0))


# surroundings


async def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names: `env` is added to the environment of the workers: a mapping, or a function of the slot."""
    monkeypatch.setenv("INHERITED", "here")
    names = ("INHERITED", "ADDED", "TRIO_WORKERS_SLOT")
    async with open_pool(env={"ADDED": "too"}) as pool:
        assert await pool.run_sync(jobs.environment, *names) == ["here", "too", "0"]
    block = open_pool(2, env=lambda slot: {"ADDED": f"gpu{slot}"})
    async with block as pool, pool.lease() as one, pool.lease() as other:
        for worker in (one, other):
            found = await worker.run_sync(jobs.environment, *names)
            assert found == ["here", f"gpu{worker.slot}", str(worker.slot)]


async def test_cwd(tmp_path: Path) -> None:
    """Names: workers run in `cwd`; jobs are found there all the same."""
    for cwd in (tmp_path, str(tmp_path), os.fsencode(tmp_path)):
        async with open_pool(cwd=cwd) as pool:
            assert await pool.run_sync(os.getcwd) == os.path.realpath(tmp_path)
            assert await pool.run_sync(jobs.square, 3) == 9
    async with open_pool() as pool:
        assert await pool.run_sync(os.getcwd) == os.getcwd()


async def test_name(caplog: pytest.LogCaptureFixture) -> None:
    """Names: the pool's name is in its log, in what its workers write, in errors and in `repr`."""
    async with open_pool(name="resizer", allocate_timeout=0.01) as pool:
        assert "'resizer'" in repr(pool)
        await pool.run_sync(print, "said")
        await until(lambda: any(record.name == "trio_workers.worker" for record in caplog.records))
        async with pool.lease():
            with pytest.raises(AllocateTimeout, match="'resizer'"):
                await pool.run_sync(jobs.echo, 1)
    (record,) = [record for record in caplog.records if record.name == "trio_workers.worker"]
    assert record.getMessage().startswith("resizer[0] ")
    assert record.getMessage().endswith(": said")
    assert record.pool == "resizer"  # type: ignore[attr-defined]
    assert record.slot == 0  # type: ignore[attr-defined]


async def test_events() -> None:
    """Names: the same events as in `open_pool`: CREATED, ERROR with the error, DESTRUCT with the reason."""
    told = Told()
    async with open_pool(observer=told) as pool:
        (first,) = pool.workers
        with pytest.raises(WorkerCrashed) as caught:
            await pool.run_sync(os._exit, 3)
        await until(lambda: all_idle(pool))
        (second,) = pool.workers
    assert [event[:2] for event in told.events] == [
        (WorkerEvent.CREATED, first),
        (WorkerEvent.ERROR, first),
        (WorkerEvent.DESTRUCT, first),
        (WorkerEvent.CREATED, second),
        (WorkerEvent.DESTRUCT, second),
    ]
    contexts = [context for _, _, context in told.events]
    assert isinstance(contexts[1], WorkerCrashed)
    assert contexts[1].returncode == caught.value.returncode == 3
    assert (contexts[0], contexts[2], contexts[3], contexts[4]) == (None, "crashed", None, "closing")


async def test_observer_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """Names: an observer that raises is logged and does no harm."""

    def observe(*_: object) -> None:
        raise ValueError("mine")

    async with open_pool(observer=observe) as pool:
        assert await pool.run_sync(jobs.square, 3) == 9
    assert any("observer raised" in record.getMessage() for record in caplog.records)


async def test_stop_and_kill_a_worker(note: Path) -> None:
    """Names: a worker of the pool can be stopped softly, or killed; it is replaced."""
    async with open_pool() as pool:
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "exit")
        (worker,) = pool.workers
        await worker.stop()
        await worker.wait()
        assert lines(note) == ["exit"]
        assert worker.state.value is WorkerState.STOPPED
        await pool.run_sync(jobs.at_exit, jobs.note, str(note), "never")
        (worker,) = (one for one in pool.workers if one.state.value is WorkerState.READY)
        await worker.kill()
        with pytest.raises(WorkerCrashed):
            await worker.wait()
        assert lines(note) == ["exit"]
        assert await pool.run_sync(jobs.square, 3) == 9


# contextvars


async def test_context_of_a_job() -> None:
    """Point 6: each job runs in a fresh context: what one sets no other sees, failed ones and streams included."""
    jobs.variable.set("the pool's own")
    async with open_pool() as pool:
        for number in range(3):
            assert await pool.run_sync(jobs.set_variable, str(number)) == "fresh"
        async with pool.stream(jobs.set_variable_and_stream, "streamed") as parts:
            assert [part async for part in parts] == ["fresh", "streamed", "streamed"]
        async with pool.stream(jobs.set_variable_and_stream, "left early") as parts:
            assert await anext(parts) == "fresh"
            assert await anext(parts) == "left early"
        async with pool.lease() as worker:
            for number in range(2):
                assert await worker.run_sync(jobs.set_variable, str(number)) == "fresh"
        assert await pool.run_sync(jobs.set_variable, "") == "fresh"


async def test_context_of_an_initializer() -> None:
    """Point 6: what the initializer sets in its context every job finds, and can change for itself only."""
    async with open_pool(initializer=jobs.initialize_context, initargs=("initialized",)) as pool:
        for number in range(3):
            assert await pool.run_sync(jobs.set_variable, str(number)) == "initialized"


# initializers


async def test_initializer(note: Path) -> None:
    """Names: the initializer runs once in each worker before its first job, in replacements too."""
    async with open_pool(2, initializer=jobs.initialize, initargs=(str(note), 1, "two")) as pool:
        assert sorted(lines(note)) == sorted(str(worker.pid) for worker in pool.workers)
        for _ in range(4):
            assert await pool.run_sync(jobs.recall, "initialized") == (1, "two")
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(os._exit, 3)
        await until(lambda: all_idle(pool))
        assert set(lines(note)) >= {str(worker.pid) for worker in pool.workers}
        assert len(lines(note)) == len(set(lines(note))) == 3
    async with open_pool(initializer=functools.partial(jobs.initialize, str(note))) as pool:
        assert await pool.run_sync(jobs.recall, "initialized") == ()


async def test_initializer_that_prints(caplog: pytest.LogCaptureFixture) -> None:
    """Point 6: what an initializer prints is in the log, and in no answer."""
    async with open_pool(initializer=jobs.initialize_loudly, initargs=("hear",)) as pool:
        assert await pool.run_sync(jobs.square, 3) == 9
    said = [record.getMessage() for record in caplog.records if record.name == "trio_workers.worker"]
    for text in ("hear out", "hear unfinished", "hear err"):
        assert any(text in line for line in said), said


async def test_initializer_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 6: a failing initializer is a SpawnError with its exception as cause, and the worker's traceback."""
    monkeypatch.setattr("trio_workers._supervise.GRACE", 20.0)
    told = Told()
    with pytest.raises(SpawnError, match="initializer raised ValueError: wrong") as caught:
        async with open_pool(2, initializer=jobs.initialize_and_fail, initargs=("wrong",), observer=told):
            raise AssertionError
    error = caught.value
    assert (error.phase, error.started, error.returncode) == ("handshake", False, 1)
    assert error.slot in (0, 1)
    assert error.stderr == "before wrong"
    cause = error.__cause__
    assert isinstance(cause, ValueError)
    assert cause.args == ("wrong",)
    assert isinstance(cause.__cause__, RemoteTraceback)
    shown = "".join(traceback.format_exception(error))
    assert "in initialize_and_fail" in shown
    assert "KeyError: 'inner'" in shown
    assert WorkerEvent.CREATED not in [event for event, _, _ in told.events]
    assert told.errors[0] is error


async def test_initializer_with_an_exception_that_can_not_travel() -> None:
    """Point 6: where the exception itself can't be sent the cause is a JobError with its traceback as text."""
    with pytest.raises(SpawnError, match="Unsendable: first second") as caught:
        async with open_pool(initializer=jobs.initialize_and_raise_unsendable):
            raise AssertionError
    assert isinstance(caught.value.__cause__, JobError)
    assert "Unsendable: first second" in str(caught.value.__cause__)
    assert "in initialize_and_raise_unsendable" in str(caught.value.__cause__)


async def test_initializer_that_exits() -> None:
    """Point 6: an initializer that calls sys.exit is a SpawnError with its traceback, not the end of anything else."""
    with pytest.raises(SpawnError, match="SystemExit: 5") as caught:
        async with open_pool(initializer=exit, initargs=(5,)):
            raise AssertionError
    assert isinstance(caught.value.__cause__, JobError)


@pytest.mark.parametrize("status", [0, 4])
async def test_initializer_that_ends_its_process(status: int) -> None:
    """Point 6: an initializer that ends the process is a SpawnError with its status and last words."""
    with pytest.raises(SpawnError, match=f"exited with status {status} before it was ready") as caught:
        async with open_pool(initializer=jobs.say_and_exit, initargs=("last words", status)):
            raise AssertionError
    assert caught.value.returncode == status
    assert caught.value.stderr == "last words"


async def test_initializer_that_hangs(note: Path) -> None:
    """Point 6: an initializer that takes longer than `boot_timeout` is a SpawnError that names that field."""
    with pytest.raises(SpawnError, match="boot_timeout") as caught:
        async with open_pool(initializer=jobs.hang, initargs=(str(note),), boot_timeout=0.5):
            raise AssertionError
    assert caught.value.signal == 9


async def test_initializer_that_fails_later(note: Path) -> None:
    """Point 6: an initializer that fails in a replacement is an ERROR event and an AllocateTimeout, until it works."""
    told = Told()
    failing = Path(f"{note}.fail")
    async with open_pool(
        initializer=jobs.initialize_but_once, initargs=(str(note),), allocate_timeout=0.5, observer=told
    ) as pool:
        failing.touch()
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(os._exit, 3)
        await until(lambda: pool.statistics().failed_in_a_row)  # not only begun to fail
        with pytest.raises(AllocateTimeout, match="RuntimeError: not again") as caught:
            await pool.run_sync(jobs.square, 3)
        assert caught.value.last_spawn_error is not None
        assert isinstance(caught.value.last_spawn_error.__cause__, RuntimeError)
        failing.unlink()
        await until(lambda: all_idle(pool))
        assert await pool.run_sync(jobs.square, 3) == 9
        assert pool.statistics().failed_starts == lines(note).count("failed")
    assert isinstance(told.errors[1], SpawnError)
    assert told.events[1][0] is WorkerEvent.ERROR


async def test_initializer_that_can_not_be_imported_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 6: an initializer whose module fails to import in the worker is a SpawnError that says so."""
    (tmp_path / "fails_in_workers.py").write_text(
        "import sys\nif 'trio' not in sys.modules:\n    raise OSError('no such library')\ndef start(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import fails_in_workers  # type: ignore[import-not-found]

    with pytest.raises(SpawnError, match="OSError: no such library"):
        async with open_pool(initializer=fails_in_workers.start):
            raise AssertionError


# what is refused


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        ({"num_workers": 0}, ValueError, "num_workers"),
        ({"num_workers": -1}, ValueError, "num_workers"),
        ({"num_workers": True}, TypeError, "num_workers"),
        ({"num_workers": 1.0}, TypeError, "num_workers"),
        ({"num_workers": "2"}, TypeError, "num_workers"),
        ({"initializer": 5}, TypeError, "initializer"),
        ({"initializer": jobs.asynchronous}, TypeError, "initializer"),
        ({"initializer": jobs.count}, TypeError, "initializer"),
        ({"initializer": jobs.count, "initargs": (1,)}, TypeError, "initializer"),
        ({"initializer": lambda: None}, pickle.PicklingError, "initializer"),
        ({"initializer": jobs.initialize, "initargs": ({}, open)}, None, ""),
        ({"initializer": jobs.initialize, "initargs": (lambda: None,)}, pickle.PicklingError, "initargs"),
        ({"initializer": jobs.initialize, "initargs": "text"}, TypeError, "initargs"),
        ({"initializer": jobs.initialize, "initargs": b"text"}, TypeError, "initargs"),
        ({"initializer": jobs.initialize, "initargs": 5}, TypeError, "initargs"),
        ({"initargs": (1,)}, ValueError, "initargs"),
        ({"pickler": "json"}, ValueError, "pickler"),
        ({"pickler": None}, TypeError, "pickler"),
        ({"pickler": pickle}, TypeError, "pickler"),
        ({"observer": 5}, TypeError, "observer"),
        ({"observer": jobs.asynchronous}, TypeError, "observer"),
        ({"max_executions": -1}, ValueError, "max_executions"),
        ({"max_executions": 1.5}, TypeError, "max_executions"),
        ({"allocate_timeout": 0}, ValueError, "allocate_timeout"),
        ({"allocate_timeout": "1"}, TypeError, "allocate_timeout"),
        ({"allocate_timeout": float("nan")}, ValueError, "allocate_timeout"),
        ({"allocate_timeout": float("inf")}, None, ""),
        ({"destroy_timeout": -1}, ValueError, "destroy_timeout"),
        ({"destroy_timeout": float("inf")}, ValueError, "destroy_timeout"),
        ({"destroy_timeout": 0}, None, ""),
        ({"boot_timeout": 0}, ValueError, "boot_timeout"),
        ({"boot_timeout": None}, TypeError, "boot_timeout"),
        ({"max_queue": -1}, ValueError, "max_queue"),
        ({"max_queue": True}, TypeError, "max_queue"),
        ({"env": {"A": 1}}, TypeError, "env"),
        ({"env": {"A=B": "1"}}, ValueError, "env"),
        ({"env": [("A", "1")]}, TypeError, "env"),
        ({"cwd": 5}, TypeError, "cwd"),
        ({"cwd": ""}, ValueError, "cwd"),
        ({"cwd": "a\0b"}, ValueError, "cwd"),
        ({"max_frame_size": 0}, ValueError, "max_frame_size"),
        ({"max_frame_size": "1"}, TypeError, "max_frame_size"),
        ({"restart": 5}, TypeError, "restart"),
        ({"name": ""}, ValueError, "name"),
        ({"name": b"pool"}, TypeError, "name"),
    ],
)
def test_bad_parameters(arguments: dict[str, Any], kind: type[Exception] | None, named: str) -> None:
    """Names: what is wrong with a parameter is said at the call, by its name."""
    if kind is None:
        open_python_pool(**arguments)
        return
    with pytest.raises(kind, match=rf"\b{named}\b"):
        open_python_pool(**arguments)


def test_parameters_by_position() -> None:
    """Names: only `num_workers` may be given by position."""
    kinds = {name: one.kind for name, one in inspect.signature(open_python_pool).parameters.items()}
    assert kinds.pop("num_workers") is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (5, TypeError, "takes a function, not int"),
        (None, TypeError, "takes a function, not NoneType"),
        (jobs.asynchronous, TypeError, "asynchronous is async"),
        (functools.partial(jobs.asynchronous), TypeError, "asynchronous is async"),
    ],
)
async def test_bad_function(function: Any, kind: type[Exception], text: str) -> None:
    """Point 5: what is no plain function is refused before any worker is taken, and by its name."""
    async with open_pool() as pool, pool.lease() as worker:
        for run in (pool.run_sync, worker.run_sync):
            with pytest.raises(kind, match=f"run_sync {text}|run_sync takes a plain function, and .*{text}"):
                await run(function)
        for stream in (pool.stream, worker.stream):
            with pytest.raises(kind, match=f"stream {text}|stream takes a plain function, and .*{text}"):
                async with stream(function):
                    pass
        assert await worker.run_sync(jobs.square, 3) == 9
        assert pool.statistics().jobs == {"replied": 1}


async def test_bad_label() -> None:
    """Names: a label is a str; anything else is a TypeError that names it."""
    bad: Any = 5
    async with open_pool() as pool, pool.lease() as worker:
        for run in (pool.run_sync, worker.run_sync):
            with pytest.raises(TypeError, match="label"):
                await run(jobs.square, 3, label=bad)
        for stream in (pool.stream, worker.stream):
            with pytest.raises(TypeError, match="label"):
                stream(jobs.count, 3, label=bad)
        with pytest.raises(TypeError, match="label"):
            pool.lease(label=bad)


async def test_payloads_are_refused() -> None:
    """Names: `exec` on a worker of a Python pool is a TypeError that says what to use."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        with pytest.raises(TypeError, match="run_sync, not exec"):
            await worker.exec(Payload(b"text"))
        with pytest.raises(TypeError, match="run_sync"):
            async with worker.stream(Payload(b"text")):
                pass
        async with pool.lease():
            with pytest.raises(TypeError, match="run_sync"):
                await worker.exec(Payload(b"text"))
        assert await pool.run_sync(jobs.square, 3) == 9
        assert not hasattr(pool, "exec")
        assert pool.statistics().exits == {}


async def test_frame_size() -> None:
    """Names: there is no limit of size by default; with one, what is larger is refused before any worker is taken."""
    large = bytes(80 << 20)
    async with open_pool() as pool:
        assert await pool.run_sync(jobs.size_of, large) == len(large)
    async with open_pool(max_frame_size=1 << 20) as pool:
        pid = await pool.run_sync(os.getpid)
        with pytest.raises(ValueError, match=r"tests\.python_pool_jobs\.size_of.*max_frame_size"):
            await pool.run_sync(jobs.size_of, large)
        assert await pool.run_sync(os.getpid) == pid


@pytest.mark.parametrize("kind", [PythonPool, PythonWorker, Lease, Parts, Worker])
def test_no_constructors(kind: type) -> None:
    """Names: what only comes from a pool can't be made, and says where it comes from."""
    with pytest.raises(TypeError, match=f"{kind.__name__} has no public constructor"):
        kind()


async def test_repr(note: Path, go: Path) -> None:
    """Names: a pool and its workers show what they are at."""
    block = open_pool(2, name="some")
    assert repr(block) == "<the block of open_python_pool(), for async with>"
    async with block as pool:
        assert repr(pool) == (
            "<PythonPool 'some': 2 workers, 2 idle, 0 busy, 0 starting, 0 leased, 0 stopping; 0 callers waiting>"
        )
        async with pool.lease() as worker, staying(pool, note, go):
            assert "0 idle, 1 busy, 0 starting, 1 leased" in repr(pool)
            assert str(worker) == f"worker {worker.slot} (pid {worker.pid}, ready, 0 jobs)"
            assert repr(worker) == f"<PythonWorker: {worker}>"
    assert "0 workers" in repr(pool)


async def test_block_is_entered_once() -> None:
    """Names: a pool is opened once."""
    block = open_pool()
    async with block as pool:
        assert await pool.run_sync(jobs.square, 3) == 9
        with pytest.raises(RuntimeError, match="only once"):
            async with block:
                pass
    with pytest.raises(RuntimeError, match="only once"):
        async with block:
            pass


async def test_closed(note: Path) -> None:
    """Names: a pool that was left takes nothing more: no call, stream, lease or map."""
    async with open_pool() as pool:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await pool.run_sync(jobs.note, str(note), "never")
    with pytest.raises(trio.ClosedResourceError):
        async with pool.stream(jobs.count, 3):
            pass
    with pytest.raises(trio.ClosedResourceError):
        async with pool.lease():
            pass
    with pytest.raises(trio.ClosedResourceError):
        async with pool.map(jobs.note, [str(note)], ["never"]) as results:
            await anext(results)
    assert lines(note) == []


async def test_jobs_that_were_accepted_finish(note: Path, go: Path) -> None:
    """Names: left normally, the block waits for the jobs there are, running or waiting."""
    results: list[object] = []

    async def call(function: Callable[..., object], *args: object) -> None:
        results.append(await pool.run_sync(function, *args))

    async with trio.open_nursery() as nursery:
        async with open_pool() as pool:
            nursery.start_soon(call, jobs.stay, str(note), str(go))
            await noted(note)
            for number in range(3):
                nursery.start_soon(call, jobs.square, number)
                await trio.testing.wait_all_tasks_blocked()
            (worker,) = pool.workers
            go.touch()
        assert results == [worker.pid, 0, 1, 4]


async def test_errors_leave_the_block_as_they_are() -> None:
    """Names: what leaves the block is what was raised in it, a job's error included."""
    with pytest.raises(ValueError, match=r"^text$"):
        async with open_pool() as pool:
            await pool.run_sync(jobs.fail, "text")
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool() as pool, trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.fail, "text")
    assert [type(error) for error in caught.value.exceptions] == [ValueError]
