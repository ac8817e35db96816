"""`PythonPool.map`: sources and windows, order, errors of items, jobs and sources, and what leaving early ends.

What a map does with any pool is also in `test_pool_logic.py`, on a virtual clock.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import itertools
import operator
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests import python_pool_jobs as jobs
from tests.test_faults import until
from tests.test_python_pool import all_idle, check, lines, noted, open_pool
from trio_workers import JobError, RemoteTraceback, Results, WorkerCrashed

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the helpers look at /proc")


class Source:
    """A source that counts what was taken of it, and knows whether it was closed."""

    def __init__(self, items: Any = None, error: BaseException | None = None) -> None:
        self.items = itertools.count() if items is None else items
        self.error = error
        self.taken = 0
        self.closed = False

    def sync(self) -> Iterator[Any]:
        try:
            for item in self.items:
                self.taken += 1
                yield item
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True

    async def asynchronous(self) -> AsyncIterator[Any]:
        try:
            for item in self.items:
                await trio.lowlevel.checkpoint()
                self.taken += 1
                yield item
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True

    def iterate(self, kind: str) -> Any:
        return self.sync() if kind == "sync" else self.asynchronous()


class Endless:
    """An iterator that is no generator, and has no end."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> "Endless":
        return self

    def __next__(self) -> int:
        self.taken += 1
        return self.taken - 1


class EndlessLater:
    """The same, asynchronous."""

    def __init__(self) -> None:
        self.taken = 0

    def __aiter__(self) -> "EndlessLater":
        return self

    async def __anext__(self) -> int:
        await trio.lowlevel.checkpoint()
        self.taken += 1
        return self.taken - 1


KINDS = pytest.mark.parametrize("kind", ["sync", "async"])

# sources


@pytest.mark.parametrize("number", [0, 1, 2, 7, 100])
@KINDS
async def test_sources(kind: str, number: int) -> None:
    """Point 7: a map takes from a sync or async source of any length, and gives the results in its order."""
    source = Source(range(number))
    async with open_pool(2) as pool:
        async with pool.map(jobs.square, source.iterate(kind)) as results:
            assert [result async for result in results] == [item**2 for item in range(number)]
            with pytest.raises(StopAsyncIteration):
                await anext(results)
        assert source.taken == number
        assert source.closed
        assert pool.statistics().jobs.get("replied", 0) == number
        assert pool.statistics().exits == {}


async def test_iterables() -> None:
    """Point 7: whatever can be iterated over is a source."""
    async with open_pool() as pool:
        for source in ([1, 2], (1, 2), {1: "a", 2: "b"}, iter([1, 2]), range(1, 3), b"\1\2"):
            async with pool.map(jobs.square, source) as results:
                assert [result async for result in results] == [1, 4]
        async with pool.map(str.upper, "ab") as letters:
            assert [letter async for letter in letters] == ["A", "B"]


async def test_several_sources() -> None:
    """Point 7: several sources are taken from side by side, sync and async ones together, until the first ends."""
    async with open_pool(2) as pool:
        async with pool.map(jobs.add, [1, 2, 3], Source().asynchronous(), itertools.count(10)) as results:
            assert [result async for result in results] == [11, 14, 17]
        async with pool.map(pow, [2, 3], [3, 4], [5, 5]) as results:
            assert [result async for result in results] == [3, 1]
        first, second = Source(), Source([])
        async with pool.map(operator.add, first.sync(), second.asynchronous()) as results:
            assert [result async for result in results] == []
        assert (first.closed, second.closed) == (True, True)
        assert (first.taken, second.taken) == (1, 0)


@pytest.mark.parametrize("source", [Endless, EndlessLater])
async def test_endless(source: type[Endless | EndlessLater]) -> None:
    """Point 7: a source without end is taken from as results are taken, and no further."""
    async with open_pool(2) as pool:
        endless = source()
        async with pool.map(jobs.square, endless) as results:
            for number in range(50):
                assert await anext(results) == number**2
                assert endless.taken <= number + 1 + 4
        await until(lambda: all_idle(pool))
        assert endless.taken <= 54
        check(pool)


async def test_names_of_jobs(note: Path) -> None:
    """Names: a map's jobs are named after their function."""
    async with open_pool() as pool, pool.map(jobs.stay, [str(note)], [f"{note}.go"]) as results:
        await noted(note)
        current = pool.workers[0].current
        assert current is not None
        assert current.label == "tests.python_pool_jobs.stay"
        Path(f"{note}.go").touch()
        assert await anext(results) == pool.workers[0].pid


# the window


@pytest.mark.parametrize(("workers", "window"), [(1, None), (2, None), (2, 1), (2, 3), (1, 10)])
@pytest.mark.parametrize("ordered", [True, False])
@KINDS
async def test_window(kind: str, workers: int, window: int | None, ordered: bool) -> None:
    """Point 7: at most `window` items are taken and not delivered, by default two for each worker."""
    bound = 2 * workers if window is None else window
    source = Source()
    most = 0
    async with open_pool(workers) as pool:
        async with pool.map(jobs.square, source.iterate(kind), window=window, ordered=ordered) as results:
            for delivered in range(12):
                # As many as may be are taken; and when nothing moves any more, none beyond.
                await until(lambda delivered=delivered: source.taken == delivered + bound)
                await until(lambda: pool.statistics().idle == workers)
                await trio.testing.wait_all_tasks_blocked()
                most = max(most, source.taken - delivered)
                await anext(results)
        assert most == bound
        assert source.closed


async def test_one_slow_job_holds_the_window(note: Path) -> None:
    """Point 7: in order, what is ready waits for what came before it, and the window holds."""
    source = Source([(str(note), f"{note}.go"), *[(1, 1)] * 50])
    async with open_pool(2) as pool, pool.map(jobs.stay_or_echo, source.sync(), window=5) as results:
        await noted(note)
        await until(lambda: source.taken == 5 and pool.statistics().idle == 1)
        await trio.testing.wait_all_tasks_blocked()
        assert source.taken == 5
        Path(f"{note}.go").touch()
        first = await anext(results)
        assert first in {worker.pid for worker in pool.workers}
        assert [result async for result in results] == [(1, 1)] * 50


async def test_as_they_are_ready(note: Path) -> None:
    """Point 7: with `ordered=False` results come as they are ready, and each once."""
    items = [(str(note), f"{note}.go"), *[(number, 0) for number in range(20)]]
    async with open_pool(2) as pool, pool.map(jobs.stay_or_echo, items, ordered=False) as results:
        found = [await anext(results) for _ in range(20)]
        assert found == items[1:]
        Path(f"{note}.go").touch()
        assert [result async for result in results] == [int(lines(note)[0])]


async def test_all_workers_work(note: Path) -> None:
    """Point 7: a map has work for every worker."""
    async with open_pool(3) as pool, pool.map(jobs.meet, [str(note)] * 3, [3] * 3) as results:
        assert {result async for result in results} == {worker.pid for worker in pool.workers}


# errors


@pytest.mark.parametrize("ordered", [True, False])
async def test_error_of_a_job(ordered: bool) -> None:
    """Point 7: a job's error comes where its result would have, as itself, and ends the map."""
    source = Source()
    async with open_pool() as pool:
        found: list[int] = []
        with pytest.raises(ValueError, match="bad 3") as caught:
            async with pool.map(jobs.fail_on, source.sync(), itertools.repeat(3), ordered=ordered) as results:
                async for result in results:
                    found.append(result)  # noqa: PERF401 - what came before the error
        assert found == [0, 1, 2]
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert source.closed
        assert await pool.run_sync(jobs.square, 3) == 9
        assert pool.workers[0].state.num_execs <= 3 + 2 + 1


async def test_nothing_follows_an_error() -> None:
    """Point 7: after an error the map is at its end."""
    async with open_pool() as pool, pool.map(jobs.fail_on, [0, 1, 2, 3], [1] * 4) as results:
        assert await anext(results) == 0
        with pytest.raises(ValueError, match="bad 1"):
            await anext(results)
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(results)


@pytest.mark.parametrize("ordered", [True, False])
async def test_return_exceptions(ordered: bool) -> None:
    """Point 7: with `return_exceptions=True` errors are results, crashes too, and the map goes on past them."""
    async with open_pool(2) as pool:
        async with pool.map(
            jobs.end_on, range(30), itertools.repeat("fail"), return_exceptions=True, ordered=ordered
        ) as results:
            found = [result async for result in results]
        assert len(found) == 30
        errors = [one for one in found if isinstance(one, BaseException)]
        assert [type(error) for error in errors] == [ValueError] * 10
        assert sorted(one for one in found if isinstance(one, int)) == [item for item in range(30) if item % 3]
        if ordered:
            assert [isinstance(one, ValueError) for one in found] == [item % 3 == 0 for item in range(30)]
        assert pool.statistics().exits == {}
        async with pool.map(jobs.end_on, range(6), itertools.repeat("crash"), return_exceptions=True) as results:
            ends = [type(result) async for result in results]
        assert ends == [WorkerCrashed, int, int] * 2
        assert pool.statistics().exits == {"crashed": 2}


async def test_crash(note: Path) -> None:
    """Point 7: a worker's crash is that item's error, after the results before it."""
    async with open_pool() as pool:
        found: list[int] = []
        with pytest.raises(WorkerCrashed, match="end_on"):
            async with pool.map(jobs.end_on, [1, 2, 3, 4], itertools.repeat("crash")) as results:
                async for result in results:
                    found.append(result)  # noqa: PERF401 - what came before the error
        assert found == [1, 2]
        assert await pool.run_sync(jobs.square, 3) == 9


@pytest.mark.parametrize("return_exceptions", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@KINDS
async def test_error_of_the_source(kind: str, ordered: bool, return_exceptions: bool) -> None:
    """Point 7: an error of the source comes out as itself, after all results before it; it is never a result."""
    error = KeyError("mine")
    source = Source(range(5), error)
    async with open_pool(2) as pool:
        found: list[object] = []
        with pytest.raises(KeyError) as caught:
            async with pool.map(
                jobs.square, source.iterate(kind), ordered=ordered, return_exceptions=return_exceptions
            ) as results:
                async for result in results:
                    found.append(result)  # noqa: PERF401 - what came before the error
        assert caught.value is error
        assert sorted(map(int, map(str, found))) == [0, 1, 4, 9, 16]
        assert await pool.run_sync(jobs.square, 3) == 9
        assert pool.statistics().exits == {}


@pytest.mark.parametrize("bad", [lambda: None, threading.Lock()], ids=["lambda", "lock"])
async def test_item_that_can_not_be_pickled(bad: object) -> None:
    """Point 7: an item that can't be pickled is that item's error, at its place."""
    async with open_pool() as pool:
        found: list[object] = []
        with pytest.raises(pickle.PicklingError, match=r"argument 1 of tests\.python_pool_jobs\.echo"):
            async with pool.map(jobs.echo, [1, 2, bad, 3]) as results:
                async for result in results:
                    found.append(result)  # noqa: PERF401 - what came before the error
        assert found == [1, 2]
        async with pool.map(jobs.echo, [1, bad, 2], return_exceptions=True) as mixed:
            kinds = [type(result) async for result in mixed]
        assert kinds == [int, pickle.PicklingError, int]
        assert pool.statistics().exits == {}
        assert pool.statistics().jobs["replied"] >= 4


async def test_result_that_can_not_be_pickled() -> None:
    """Point 7: a result that can't be pickled is that item's error; the worker stays."""
    async with open_pool() as pool:
        async with pool.map(jobs.give_lock, [0, 1, 2], return_exceptions=True) as results:
            kinds = [type(result) async for result in results]
        assert kinds == [int, JobError, int]
        assert pool.statistics().exits == {}


async def test_exit_of_a_job() -> None:
    """Point 7: a job that calls sys.exit is one failure among the results, and no end of the map."""
    async with open_pool() as pool:
        async with pool.map(jobs.end_on, [0, 1, 3], ["exit"] * 3, return_exceptions=True) as results:
            kinds = [type(result) async for result in results]
        assert kinds == [JobError, int, JobError]


# leaving


@pytest.mark.parametrize("how", ["break", "return", "error", "cancel"])
@KINDS
async def test_left_early(kind: str, how: str, note: Path) -> None:
    """Point 7: leaving a map early, by whatever way, closes its source and stops its jobs."""
    source = Source()
    scope = trio.CancelScope()

    async def leave() -> None:
        async with pool.map(jobs.hang_for, source.iterate(kind), itertools.repeat(str(note))) as results:
            async for result in results:
                assert result == 0
                await noted(note)
                if how == "break":
                    break
                if how == "return":
                    return
                if how == "error":
                    raise KeyError("mine")
                scope.cancel()
                await trio.lowlevel.checkpoint()

    async with open_pool(2) as pool:
        with scope:
            if how == "error":
                with pytest.raises(KeyError, match="mine"):
                    await leave()
            else:
                await leave()
        assert scope.cancelled_caught == (how == "cancel")
        assert source.closed
        taken = source.taken
        await until(lambda: all_idle(pool))
        exits = pool.statistics().exits
        assert set(exits) == {"cancelled"}
        assert exits["cancelled"] in (1, 2)
        assert source.taken == taken
        assert await pool.run_sync(jobs.square, 3) == 9


async def test_left_before_the_first_result() -> None:
    """Point 7: a map that nobody takes from is left like any other."""
    source = Source()
    async with open_pool(2) as pool:
        async with pool.map(jobs.square, source.sync()):
            await until(lambda: source.taken == 4)
        assert source.closed
        async with pool.map(jobs.square, source.sync()):
            pass
        await until(lambda: all_idle(pool))
        assert await pool.run_sync(jobs.square, 3) == 9


async def test_error_of_a_source_that_is_closed() -> None:
    """Point 7: what a source raises as it is closed leaves the block as itself."""

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise KeyError("at its close")

    async with open_pool() as pool:
        with pytest.raises(KeyError, match="at its close"):
            async with pool.map(jobs.square, source()) as results:
                await anext(results)
        assert await pool.run_sync(jobs.square, 3) == 9


async def test_results_after_the_block() -> None:
    """Point 7: behind its block a map is at its end, and can't be entered again."""
    async with open_pool() as pool:
        block = pool.map(jobs.square, Source().sync())
        async with block as results:
            assert await anext(results) == 0
        with pytest.raises(StopAsyncIteration):
            await anext(results)
        with pytest.raises(RuntimeError, match="only once"):
            async with block:
                pass


# with others


async def test_calls_inside_the_loop() -> None:
    """Point 7: `run_sync`, streams, leases and another map work inside the loop, even with one worker."""
    async with open_pool() as pool:
        found: list[list[int]] = []
        async with pool.map(jobs.square, range(6)) as results:
            async for result in results:
                line = [result, await pool.run_sync(jobs.square, result)]
                async with pool.stream(jobs.count, 2) as parts:
                    line += [part async for part in parts]
                async with pool.lease() as worker:
                    line.append(await worker.run_sync(jobs.square, 3))
                async with pool.map(jobs.square, [5]) as inner:
                    line += [one async for one in inner]
                found.append(line)
        assert found == [[number**2, number**4, 0, 1, 9, 25] for number in range(6)]
        assert pool.statistics().exits == {}


async def test_others_are_served_meanwhile() -> None:
    """Point 7: an endless map leaves room for other callers, who wait for one job of each worker at most."""
    async with open_pool(2) as pool, trio.open_nursery() as nursery:

        async def consume() -> None:
            async with pool.map(jobs.square, itertools.count()) as results:
                async for _ in results:
                    pass

        nursery.start_soon(consume)
        for number in range(50):
            assert await pool.run_sync(jobs.square, number) == number**2
        nursery.cancel_scope.cancel()


async def test_several_consumers() -> None:
    """Point 7: several tasks may take from one map, and each result is taken once."""
    found: list[int] = []
    async with open_pool(2) as pool, pool.map(jobs.square, range(100)) as results:

        async def consume() -> None:
            async for result in results:
                found.append(result)  # noqa: PERF401 - shared with the others

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(consume)
    assert sorted(found) == [number**2 for number in range(100)]


async def test_queue_bound_does_not_count_maps() -> None:
    """Point 7: `max_queue` and `allocate_timeout` are for callers, and not for what waits inside a map."""
    async with open_pool(max_queue=0) as pool, pool.map(jobs.square, range(20), window=20) as results:
        assert [result async for result in results] == [number**2 for number in range(20)]


async def test_processes_of_their_own() -> None:
    """Point 6: with `max_executions=1` each item of a map has a process of its own."""
    async with open_pool(2, max_executions=1) as pool:
        async with pool.map(jobs.give_pid, range(10)) as results:
            pids = [pid async for pid in results]
        assert len(set(pids)) == 10


async def test_cancelled_wait_loses_no_result() -> None:
    """Point 7: a cancel around `anext` alone loses no result."""
    async with open_pool() as pool, pool.map(jobs.square, range(50)) as results:
        found: list[int] = []
        while len(found) < 50:
            with trio.CancelScope() as scope:
                scope.cancel()
                found.append(await anext(results))
            with trio.CancelScope():
                found.append(await anext(results))
        assert found == [number**2 for number in range(50)]


async def test_object_itself_has_anext() -> None:
    """Point 7: tqdm and rich take from the object with `__anext__`: a map's results have both halves."""
    async with open_pool() as pool, pool.map(jobs.square, [1]) as results:
        assert isinstance(results, Results)
        assert aiter(results) is results
        with trio.testing.assert_checkpoints():
            assert await anext(results) == 1


# what is refused


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda pool: pool.map(jobs.square), TypeError, "at least one iterable"),
        (lambda pool: pool.map(5, [1]), TypeError, "map takes a function, not int"),
        (lambda pool: pool.map(None, [1]), TypeError, "map takes a function, not NoneType"),
        (lambda pool: pool.map(jobs.asynchronous, [1]), TypeError, "asynchronous is async"),
        (lambda pool: pool.map(jobs.count, [1]), TypeError, "count is a generator"),
        (lambda pool: pool.map(jobs.square, 5), TypeError, "iterable.*not int"),
        (lambda pool: pool.map(jobs.square, [1], 5), TypeError, "iterable.*not int"),
        (lambda pool: pool.map(jobs.square, [1], window=0), ValueError, "window"),
        (lambda pool: pool.map(jobs.square, [1], window=-1), ValueError, "window"),
        (lambda pool: pool.map(jobs.square, [1], window=True), TypeError, "window"),
        (lambda pool: pool.map(jobs.square, [1], window="5"), TypeError, "window"),
        (lambda pool: pool.map(jobs.square, [1], chunksize=5), TypeError, "chunksize"),
    ],
)
async def test_bad_parameters(call: Callable[[Any], object], kind: type[Exception], text: str) -> None:
    """Point 7: what is wrong with a map is said at the call, before anything is taken from the source."""
    async with open_pool() as pool:
        with pytest.raises(kind, match=text):
            call(pool)
