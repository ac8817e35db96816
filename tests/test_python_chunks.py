"""Many calls of a map in one message: what nobody may see of it, whatever becomes of the worker in the middle.

The size of chunks is fixed here, so that nothing depends on how long anything takes; `Pace`, which decides it by time,
is given its times. A chunk may still be cut short (`BUDGET`): what is tested holds wherever it is cut.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import itertools
import logging
import math
import mmap
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests import python_pool_jobs as jobs
from tests.test_faults import until
from tests.test_python_map import Endless, Source
from tests.test_python_pool import all_idle, check, lines, noted, open_pool
from trio_workers import (
    JobError,
    JobRecord,
    JobTimeout,
    Limits,
    PythonPool,
    RelayError,
    RemoteTraceback,
    WorkerCrashed,
    _chunks,
    _conversation,
    _exchange,
    _interpreter,
    _map,
    _seats,
)
from trio_workers._functions import FunctionCodec
from trio_workers._pace import ALONE, GROWTH, QUICK, TARGET, Pace
from trio_workers._region import BEGUN, FIRST, MOST_ITEMS, RESULTS, SIZE, Region, as_list

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the helpers look at /proc")

WORD: Final = Struct("<I")


class Fixed:
    """A pace that is always the same."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.shrinks = False
        self.ran_together: list[int] = []

    def ran_alone(self, seconds: float, *, awaited: bool) -> None:
        return

    def ran(self, count: int, seconds: float, *, awaited: bool) -> None:
        assert seconds > 0
        self.ran_together.append(count)
        if self.shrinks and count < self.size:
            self.size = 1

    def alone(self) -> None:
        return


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Fixed]:
    """Fix the size of the chunks of maps to come."""

    def fix(size: int) -> Fixed:
        pace = Fixed(size)
        monkeypatch.setattr(_chunks, "Pace", lambda: pace)
        return pace

    return fix


async def everything(pool: PythonPool, function: Callable[..., Any], *sources: Any, **options: Any) -> list[Any]:
    """All results of a map."""
    async with pool.map(function, *sources, **options) as results:
        return [result async for result in results]


# sizes


def test_pace_begins_alone() -> None:
    """Calls go alone until enough of them were quick; a slow one sets that back, and does not end it."""
    pace = Pace()
    for _ in range(ALONE - 1):
        pace.ran_alone(QUICK / 2, awaited=True)
    assert pace.size == 1
    pace.ran_alone(QUICK, awaited=True)
    pace.ran_alone(QUICK / 2, awaited=True)
    assert pace.size == 1
    for _ in range(ALONE):
        pace.ran_alone(QUICK / 2, awaited=True)
    assert pace.size == 2


@pytest.mark.parametrize("seconds", [QUICK, 2 * QUICK, 1.0])
def test_pace_of_slow_calls(seconds: float) -> None:
    """Calls that take milliseconds go alone for ever."""
    pace = Pace()
    for _ in range(1000):
        pace.ran_alone(seconds, awaited=True)
    assert pace.size == 1


def test_pace_grows_where_somebody_waits() -> None:
    """Chunks grow by steps, up to what takes as long as they shall take, and only where somebody waits."""
    pace = Pace()
    for _ in range(2 * ALONE):
        pace.ran_alone(0.0, awaited=False)
    assert pace.size == 1
    pace.ran_alone(0.0, awaited=True)
    sizes = [pace.size]
    for _ in range(20):
        pace.ran(pace.size, pace.size * 1e-6, awaited=False)
        assert pace.size == sizes[-1]
        pace.ran(pace.size // 2 - 1 or 1, 1e-6, awaited=True)
        assert pace.size == sizes[-1] or pace.size == 2 * GROWTH  # from a much smaller one nothing is concluded
        pace.ran(pace.size, pace.size * 1e-6, awaited=True)
        sizes.append(pace.size)
    assert sizes[0] == 2
    assert all(after <= max(GROWTH * before, 2 * GROWTH * GROWTH) for before, after in itertools.pairwise(sizes))
    assert sizes[-1] == min(MOST_ITEMS, round(TARGET / 1e-6))
    assert "Pace" in repr(pace)


def test_pace_shrinks_at_once() -> None:
    """What has become slower goes in smaller chunks from the next on, and alone where it takes milliseconds."""
    pace = Pace()
    pace.size = 1000
    pace.ran(1000, 1000 * TARGET / 100, awaited=False)
    assert pace.size == 100
    pace.ran(10, 10 * TARGET / 10, awaited=False)
    assert pace.size == 10
    pace.ran(3, 3 * TARGET, awaited=True)
    assert pace.size == 1
    for _ in range(ALONE - 1):
        pace.ran_alone(0.0, awaited=True)
    assert pace.size == 1


@given(st.lists(st.tuples(st.integers(1, MOST_ITEMS), st.floats(0, 10), st.booleans(), st.booleans())))
def test_pace_stays_in_bounds(story: list[tuple[int, float, bool, bool]]) -> None:
    """Whatever it is told, a chunk has from 1 to as many items as there is room for."""
    pace = Pace()
    for count, seconds, alone, awaited in story:
        if alone:
            pace.ran_alone(seconds, awaited=awaited)
        else:
            pace.ran(count, seconds, awaited=awaited)
        assert 1 <= pace.size <= MOST_ITEMS


# the region


class TheChildsEnd:
    """A region, written to as a child does."""

    def __init__(self, region: Region, id_: int) -> None:
        self.memory = mmap.mmap(region.fd, SIZE)
        self.set(0, id_)

    def set(self, word: int, value: int) -> None:
        WORD.pack_into(self.memory, 4 * word, value)


def test_remains() -> None:
    """What is left of a chunk: how many items have begun, and the results of all but the last of those."""
    region = Region()
    child = TheChildsEnd(region, 7)
    assert region.remains(8) == (0, 0, b"")
    assert region.remains(7) == (0, 0, b"")
    child.memory[RESULTS : RESULTS + 6] = b"abcdef"
    child.set(BEGUN, 1)
    assert region.remains(7) == (1, 0, b"")
    child.set(BEGUN + 1, 1 + 4)
    assert region.remains(7) == (2, 0, b"abcd")
    child.set(FIRST, 1)  # the results have been sent; what is in their place counts no longer
    assert region.remains(7) == (2, 1, b"")
    child.set(FIRST, 2)
    assert region.remains(7) == (2, 2, b"")
    child.set(BEGUN + 2, 1)
    child.set(BEGUN + 3, 1 + 2)
    assert region.remains(7) == (4, 2, b"ab")
    for item in range(MOST_ITEMS):
        child.set(BEGUN + item, 1)
    assert region.remains(7) == (MOST_ITEMS, 2, b"")
    assert region.results(3) == b"abc"
    child.memory.close()
    region.close()
    region.close()
    assert "closed" in repr(region)


@given(st.lists(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()))
def test_results_in_a_row(values: list[object]) -> None:
    """Pickles of values, each without its end, are together one of a list."""
    assert pickle.loads(as_list(b"".join(pickle.dumps(value, 5)[:-1] for value in values))) == values


async def test_region_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Path, chunks_of: Callable[[int], Fixed]
) -> None:
    """Without memfd a file without a name does as well, and nothing is left of it."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pace = chunks_of(10)
    async with open_pool(2) as pool:
        assert list(tmp_path.iterdir()) == []
        items = range(40), [str(note)] * 40, [{15: "exit"}] * 40
        found = await everything(pool, jobs.end_at, *items, return_exceptions=True)
        assert [number for number, one in enumerate(found) if type(one) is WorkerCrashed] == [15]
        assert sorted(map(int, lines(note))) == list(range(40))
    assert max(pace.ran_together) > 1
    assert list(tmp_path.iterdir()) == [note]


# what comes out


@pytest.mark.parametrize("size", [2, 7, 50, 1000])
@pytest.mark.parametrize("kind", ["list", "range", "sync", "async"])
async def test_order(size: int, kind: str, chunks_of: Callable[[int], Fixed]) -> None:
    """Order, count and statistics are those of single calls."""
    pace = chunks_of(size)
    records: list[JobRecord] = []
    source: Any = {"list": list(range(100)), "range": range(100)}.get(kind) or Source(range(100)).iterate(kind)
    async with open_pool(2, job_observer=records.append) as pool:
        assert await everything(pool, jobs.square, source) == [number**2 for number in range(100)]
        assert pool.statistics().jobs == {"replied": 100}
        assert sum(worker.state.num_execs for worker in pool.workers) == 100
        assert len(records) == 100
        assert {(record.label, record.outcome) for record in records} == {("tests.python_pool_jobs.square", "replied")}
        assert sorted(await everything(pool, jobs.square, range(100), ordered=False)) == [n**2 for n in range(100)]
        check(pool)
    assert max(pace.ran_together) > 1


async def test_many_calls_at_their_own_pace() -> None:
    """With nothing fixed: all results, in order, of far more calls than go alone."""
    async with open_pool(2) as pool:
        assert await everything(pool, abs, range(-20_000, 0)) == list(range(20_000, 0, -1))
        assert pool.statistics().jobs == {"replied": 20_000}
        assert sum(worker.state.num_execs for worker in pool.workers) == 20_000
        async with pool.map(abs, range(20_000)) as results:
            batches = [batch async for batch in results.batches()]
        assert [result for batch in batches for result in batch] == list(range(20_000))
        assert all(batches)


async def test_several_sources(chunks_of: Callable[[int], Fixed]) -> None:
    """Several sources give rows, until the first ends, wherever that is."""
    chunks_of(7)
    async with open_pool(2) as pool:
        assert await everything(pool, jobs.add, range(30), itertools.count(5)) == [2 * n + 5 for n in range(30)]
        assert await everything(pool, jobs.add, itertools.count(5), range(30)) == [2 * n + 5 for n in range(30)]
        assert await everything(pool, jobs.add, range(30), Source().asynchronous()) == [2 * n for n in range(30)]
        assert await everything(pool, jobs.add, itertools.count(), []) == []


async def test_results_of_all_types(chunks_of: Callable[[int], Fixed]) -> None:
    """Each result is what it would be alone, small or large, of whatever type."""
    chunks_of(20)
    async with open_pool(2) as pool:
        found = await everything(pool, jobs.give_value, range(81))
        for number, result in enumerate(found):
            expected = jobs.give_value(number)
            assert type(result) is type(expected)
            assert repr(result) == repr(expected)
        assert pool.statistics().exits == {}
        alone = [await pool.run_sync(jobs.give_value, number) for number in (22, 23)]
        assert [type(result) for result in alone] == [bytes, bytearray]


@pytest.mark.parametrize("size", [8, 1000, 50_000, SIZE - RESULTS - 14, SIZE - RESULTS, 2 * SIZE])
async def test_more_results_than_the_region_holds(size: int, chunks_of: Callable[[int], Fixed]) -> None:
    """What has no room goes over the relay meanwhile, in its order."""
    chunks_of(500)
    count = 1000 if size <= 1000 else 60
    async with open_pool(2) as pool:
        found = await everything(pool, jobs.numbered_text, range(count), [size] * count)
        assert found == [jobs.numbered_text(number, size) for number in range(count)]


async def test_a_region_full_of_numbers(chunks_of: Callable[[int], Fixed]) -> None:
    """Numbers between texts, up to the last place."""
    chunks_of(MOST_ITEMS)
    items: list[Any] = [item for number in range(700) for item in (number, "y" * 700, number / 2)]
    async with open_pool(1) as pool:
        assert await everything(pool, jobs.echo, items) == items


async def test_items_share_nothing(chunks_of: Callable[[int], Fixed]) -> None:
    """What several items have in common is one object here, and none there; within one item it stays one."""
    chunks_of(10)
    shared: list[int] = []
    async with open_pool(1) as pool:
        assert await everything(pool, jobs.append, [shared] * 20, range(20)) == [[number] for number in range(20)]
        assert await everything(pool, jobs.echo, [[shared, shared]] * 3) == [[[], []]] * 3
        pairs = await everything(pool, jobs.echo, [[shared, shared]] * 3)
        assert all(one is other for one, other in pairs)
        assert len({id(pair[0]) for pair in pairs}) == 3


async def test_context_of_each_item(chunks_of: Callable[[int], Fixed]) -> None:
    """Each item has a fresh copy of the worker's context."""
    chunks_of(10)
    async with open_pool(1) as pool:
        assert await everything(pool, jobs.set_and_get_variable, range(20)) == ["unset"] * 20


async def test_standard_streams_are_mended(chunks_of: Callable[[int], Fixed]) -> None:
    """What an item closed is open for the next one, if it took longer than a moment."""
    chunks_of(10)
    async with open_pool(1) as pool:
        assert await everything(pool, jobs.close_standard_streams, range(20), [0.0005] * 20) == [[True] * 3] * 20


# errors


@pytest.mark.parametrize("ordered", [True, False])
async def test_errors(ordered: bool, chunks_of: Callable[[int], Fixed]) -> None:
    """An error is that item's alone, with the worker's traceback; the rest of the chunk runs on."""
    chunks_of(10)
    bad = {3: "raise", 11: "raise", 12: "raise", 14: "lock", 29: "raise"}
    async with open_pool(2) as pool:
        items = range(30), [""] * 30, [bad] * 30
        found = await everything(pool, jobs.end_at, *items, return_exceptions=True, ordered=ordered)
        errors = [one for one in found if isinstance(one, Exception)]
        assert sorted(map(str, (e for e in errors if isinstance(e, ValueError)))) == sorted(
            f"bad {number}" for number in (3, 11, 12, 29)
        )
        (unsendable,) = [error for error in errors if type(error) is JobError]
        assert "the result of tests.python_pool_jobs.end_at, of type lock, can't be pickled" in str(unsendable)
        assert sorted(one for one in found if isinstance(one, int)) == [n for n in range(30) if n not in bad]
        if ordered:
            assert [number for number, one in enumerate(found) if isinstance(one, Exception)] == [*bad]
        for error in errors:
            if isinstance(error, ValueError):
                assert isinstance(error.__cause__, RemoteTraceback)
                assert str(error.__cause__).count("File ") == 1  # of the job, and nothing of ours
        assert pool.statistics().jobs == {"replied": 25, "failed": 5}
        assert pool.statistics().exits == {}


@pytest.mark.parametrize("take", ["one by one", "batches"])
async def test_error_ends_the_map(take: str, chunks_of: Callable[[int], Fixed]) -> None:
    """Without `return_exceptions` the results before the error come first, all of them, and nothing after it."""
    chunks_of(10)
    source = Source()
    found: list[int] = []
    async with open_pool(2) as pool:
        with pytest.raises(ValueError, match="bad 25"):
            async with pool.map(jobs.fail_on, source.sync(), itertools.repeat(25)) as results:
                if take == "batches":
                    async for batch in results.batches():
                        assert batch
                        found += batch
                else:
                    async for result in results:
                        found.append(result)
        assert found == list(range(25))
        assert source.closed
        with pytest.raises(StopAsyncIteration):
            await anext(results)
        with pytest.raises(StopAsyncIteration):
            await anext(results.batches())
        assert await pool.run_sync(jobs.square, 3) == 9


@pytest.mark.parametrize("take", ["one by one", "batches"])
async def test_error_of_the_source(take: str, chunks_of: Callable[[int], Fixed]) -> None:
    """A source's error comes after the results of all that it gave before."""
    chunks_of(10)
    error = KeyError("mine")
    found: list[int] = []
    async with open_pool(2) as pool:
        with pytest.raises(KeyError) as caught:
            async with pool.map(jobs.square, Source(range(25), error).sync()) as results:
                if take == "batches":
                    async for batch in results.batches():
                        found += batch
                else:
                    async for result in results:
                        found.append(result)
        assert caught.value is error
        assert found == [number**2 for number in range(25)]


async def test_items_that_can_not_be_pickled(chunks_of: Callable[[int], Fixed]) -> None:
    """An item that can't be pickled fails alone; so does one that can't be unpickled there."""
    chunks_of(10)
    items: list[Any] = [*range(5), threading.Lock(), *range(5), threading.Lock(), threading.Lock(), 5]
    async with open_pool(2) as pool:
        found = await everything(pool, jobs.echo, items, return_exceptions=True)
        assert len(found) == len(items)
        for item, result in zip(items, found, strict=True):
            if isinstance(item, int):
                assert result == item
            else:
                assert type(result) is pickle.PicklingError
                assert "argument 1 of tests.python_pool_jobs.echo" in str(result)
        nothing = await everything(pool, jobs.echo, [threading.Lock()] * 30, return_exceptions=True)
        assert [type(result) for result in nothing] == [pickle.PicklingError] * 30
        assert pool.statistics().jobs == {"replied": 11}
        assert pool.statistics().exits == {}


async def test_large_items(chunks_of: Callable[[int], Fixed]) -> None:
    """Large arguments travel as they do alone, between small ones."""
    chunks_of(10)
    items: list[Any] = [1, b"x" * 100_000, 2, bytearray(b"y" * 100_000), "z" * 500_000, 3, ["a" * 50_000] * 4, 4, b"s"]
    async with open_pool(2) as pool:
        found = await everything(pool, jobs.echo, items * 5)
        assert found == items * 5
        texts = ["t" * 100_000] * 10
        assert await everything(pool, jobs.echo, texts) == texts


async def test_function_that_is_not_there(chunks_of: Callable[[int], Fixed]) -> None:
    """A function that workers can't find is each item's error."""
    chunks_of(10)
    async with open_pool(1) as pool:
        found = await everything(pool, _only_here, range(25), return_exceptions=True)
        assert [type(result) for result in found] == [JobError] * 25
        assert "the function can't be unpickled in the worker" in str(found[20])
        assert pool.statistics().exits == {}


def _only_here(number: int) -> int:
    return number


_only_here.__module__ = "tests"
vars(__import__("tests"))["_only_here"] = _only_here


# a worker's end in the middle


@pytest.mark.parametrize("how", ["exit", "kill", "segfault"])
@pytest.mark.parametrize("at", [0, 1, 5, 9])
@pytest.mark.parametrize("workers", [1, 2])
async def test_crash(how: str, at: int, workers: int, note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """A crash costs the item it hit; those before have their results, those after run elsewhere; none begins twice."""
    chunks_of(10)
    at += 10
    items = range(40), [str(note)] * 40, [{at: how}] * 40
    async with open_pool(workers) as pool:
        found = await everything(pool, jobs.end_at, *items, return_exceptions=True)
        assert [one for one in found if isinstance(one, int)] == [number for number in range(40) if number != at]
        error = found[at]
        assert type(error) is WorkerCrashed
        assert error.started is True
        assert error.returncode == {"exit": 7, "kill": -signal.SIGKILL, "segfault": -signal.SIGSEGV}[how]
        assert "it ran the job 'tests.python_pool_jobs.end_at'" in str(error)
        assert sorted(map(int, lines(note))) == list(range(40))
        assert pool.statistics().jobs == {"replied": 39, "crashed": 1}
        assert pool.statistics().exits == {"crashed": 1}
        await until(lambda: all_idle(pool))


async def test_crash_ends_the_map(note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """Without `return_exceptions` a crash comes after the results before it."""
    chunks_of(10)
    async with open_pool(2) as pool:
        found: list[object] = []
        items = range(40), [str(note)] * 40, [{15: "exit"}] * 40
        with pytest.raises(WorkerCrashed):
            async with pool.map(jobs.end_at, *items) as results:
                async for result in results:
                    found.append(result)  # noqa: PERF401 - what came before the error
        assert found == list(range(15))
        begun = lines(note)
        assert len(begun) == len(set(begun))
        assert await pool.run_sync(jobs.square, 3) == 9


@pytest.mark.limit(120)
async def test_every_item_crashes(note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """As many crashes as there are, each costs one item."""
    chunks_of(5)
    ends = dict.fromkeys(range(0, 20, 2), "exit")
    async with open_pool(2) as pool:
        items = range(20), [str(note)] * 20, [ends] * 20
        found = await everything(pool, jobs.end_at, *items, return_exceptions=True)
        assert [number for number, one in enumerate(found) if type(one) is WorkerCrashed] == [*ends]
        assert sorted(map(int, lines(note))) == list(range(20))


@pytest.mark.parametrize("size", [8, 50_000, SIZE])
@pytest.mark.parametrize("at", [1, 17, 59])
async def test_crash_after_parts(size: int, at: int, chunks_of: Callable[[int], Fixed]) -> None:
    """Results that went over the relay and results that did not are all there, each once, whatever ended the worker."""
    chunks_of(60)
    async with open_pool(1) as pool:
        items = range(60), [size] * 60, [at] * 60
        found = await everything(pool, jobs.give_text_or_exit, *items, return_exceptions=True)
        assert type(found[at]) is WorkerCrashed
        assert found[:at] + found[at + 1 :] == [jobs.numbered_text(n, size) for n in range(60) if n != at]
        assert pool.statistics().jobs == {"replied": 59, "crashed": 1}


async def test_killed_from_outside(note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """A kill at no particular moment costs at most one item, and none begins twice."""
    chunks_of(50)
    async with open_pool(1) as pool, trio.open_nursery() as nursery:
        found: list[Any] = []

        async def run() -> None:
            count = 600
            items = range(count), [str(note)] * count, [dict[int, str]()] * count
            found.extend(await everything(pool, jobs.end_at, *items, return_exceptions=True))

        nursery.start_soon(run)
        for _ in range(3):
            before = len(lines(note))
            await noted(note, before + 30)
            if (pid := pool.workers[0].pid) is not None and pool.workers[0].current is not None:
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: all(worker.pid != pid for worker in pool.workers))
    begun = [int(line) for line in lines(note)]
    crashed = [number for number, one in enumerate(found) if not isinstance(one, int)]
    assert len(begun) == len(set(begun))
    assert {*begun, *crashed} == set(range(600))  # what was hit may not have come as far as to note itself
    assert [type(one) for one in found if not isinstance(one, int)] == [WorkerCrashed] * pool.statistics().jobs.get(
        "crashed", 0
    )
    assert [one for one in found if isinstance(one, int)] == [n for n, one in enumerate(found) if isinstance(one, int)]


async def test_what_breaks_the_protocol(note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """An item that writes to the relay costs its worker, and that item alone."""
    chunks_of(10)
    async with open_pool(1) as pool:
        items = range(30), [str(note)] * 30, [{15: "relay"}] * 30
        found = await everything(pool, jobs.end_at, *items, return_exceptions=True)
        bad = [number for number, one in enumerate(found) if isinstance(one, RelayError)]
        assert bad
        begun = [int(line) for line in lines(note)]
        assert sorted(begun) == list(range(30))
        assert pool.statistics().exits == {"broke the protocol": 1}


async def test_fork(note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """A fork of an item's own answers nothing, and does not touch the account of the chunk."""
    chunks_of(10)
    async with open_pool(1) as pool:
        items = range(20), [str(note)] * 20, [{4: "fork", 15: "fork"}] * 20
        found = await everything(pool, jobs.end_at, *items)
        assert [one for number, one in enumerate(found) if number not in (4, 15)] == [
            number for number in range(20) if number not in (4, 15)
        ]
        assert sorted(map(int, lines(note))) == list(range(20))


async def test_exec_ttl(chunks_of: Callable[[int], Fixed]) -> None:
    """`exec_ttl` is for one item: many in a chunk may take longer, and the one that does pays alone."""
    chunks_of(100)
    async with open_pool(1, limits=Limits(exec_ttl=2.0)) as pool:
        # Together several times the bound.
        assert await everything(pool, jobs.nap_at, range(200), itertools.repeat(-1), itertools.repeat(0)) == [
            *range(200)
        ]
        assert len(await everything(pool, jobs.nap, range(300), itertools.repeat(0.01))) == 300
        found = await everything(
            pool, jobs.nap_at, range(30), itertools.repeat(15), itertools.repeat(60), return_exceptions=True
        )
        assert type(found[15]) is JobTimeout
        assert found[:15] + found[16:] == [number for number in range(30) if number != 15]
        assert pool.statistics().exits == {"exec_ttl": 1}


# time


async def test_items_that_turn_out_slow(chunks_of: Callable[[int], Fixed]) -> None:
    """A chunk whose items take long is cut short: what is ready is delivered, and other workers take the rest."""
    pace = chunks_of(100)
    pace.shrinks = True
    async with open_pool(2) as pool:
        pids = await everything(pool, jobs.nap, range(30), itertools.repeat(0.01))
        assert len(pids) == 30
        assert set(pids) == {worker.pid for worker in pool.workers}
        assert max(pace.ran_together) < 30
        assert pool.statistics().jobs == {"replied": 30}


@pytest.mark.parametrize("size", [8, 50_000, SIZE])
@pytest.mark.parametrize("at", [1, 12, 40])
async def test_results_before_a_slow_item(size: int, at: int, note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """An item that takes long keeps back no result before it, and when it is killed nothing is lost or comes twice."""
    chunks_of(60)
    async with open_pool(1) as pool:
        items = range(60), [size] * 60, [at] * 60, [str(note)] * 60
        async with pool.map(jobs.give_text_or_exit, *items, return_exceptions=True) as results:
            found = [await anext(results) for _ in range(at)]
            await noted(note)
            (worker,) = pool.workers
            await worker.kill()
            found += [result async for result in results]
        assert type(found[at]) is WorkerCrashed
        assert found[:at] + found[at + 1 :] == [jobs.numbered_text(n, size) for n in range(60) if n != at]
        assert pool.statistics().jobs == {"replied": 59, "crashed": 1}


@pytest.mark.parametrize("at", [6, 8])
async def test_what_is_left_of_a_chunk_goes_first(
    at: int, note: Path, chunks_of: Callable[[int], Fixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items that a chunk did not get to run before those behind it, and before one that goes alone: these may hang."""
    chunks_of(60)
    encode_calls = FunctionCodec.encode_calls

    def encode_six(self: FunctionCodec, function: Callable[..., object], columns: Sequence[Sequence[object]]) -> object:
        chunk = encode_calls(self, function, [column[:6] for column in columns])
        if at == 6 and columns[0][0] == 0:
            return chunk._replace(rest=self.encode_call(function, [column[6] for column in columns]))
        return chunk

    monkeypatch.setattr(FunctionCodec, "encode_calls", encode_six)
    async with open_pool(1) as pool:
        items = range(60), [at] * 60, [str(note)] * 60
        async with pool.map(jobs.dawdle_then_hang, *items, return_exceptions=True) as results:
            assert [await anext(results) for _ in range(at)] == [*range(at)]
            await noted(note)
            await pool.workers[0].kill()
            assert type(await anext(results)) is WorkerCrashed
            assert [result async for result in results] == [*range(at + 1, 60)]


async def test_left_between_the_last_result_and_its_end(
    chunks_of: Callable[[int], Fixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that is left when a chunk's results have all come, and its end has not: nobody is told of no calls."""
    chunks_of(10)
    see_through = _exchange.Exchange.see_through
    done = 0

    async def without_the_end(self: _exchange.Exchange, job: _seats.Job) -> object:
        nonlocal done
        if done == 10:
            await trio.sleep_forever()
        outcome = await see_through(self, job)
        assert isinstance(outcome, _conversation.Replied)
        done += _chunks.DONE_HEAD.unpack_from(outcome.body)[0] if job.slack else 1
        if done < 10 or not job.slack:
            return outcome  # the chunk was cut short
        return _conversation.Part(b"", outcome.body[_chunks.DONE_HEAD.size :])

    told: list[JobRecord] = []
    async with open_pool(1, job_observer=told.append) as pool:
        assert await pool.run_sync(jobs.square, 1) == 1  # what it imports takes longer than a chunk may
        monkeypatch.setattr(_exchange.Exchange, "see_through", without_the_end)
        async with pool.map(jobs.square, range(10)) as results:
            assert [await anext(results) for _ in range(10)] == [number**2 for number in range(10)]
        monkeypatch.undo()
        assert pool.statistics().jobs == {"replied": 11}
        assert [record.outcome for record in told] == ["replied"] * 11


async def test_slow_async_source(chunks_of: Callable[[int], Fixed]) -> None:
    """What a slow source has given is run and delivered, whatever it takes over the next item."""
    chunks_of(100)
    delivered = trio.Event()

    async def source() -> AsyncIterator[int]:
        nonlocal delivered
        for number in range(10):
            yield number
            await delivered.wait()
            delivered = trio.Event()

    async with open_pool(2) as pool, pool.map(jobs.square, source()) as results:
        for number in range(10):
            assert await anext(results) == number**2
            delivered.set()


async def test_slow_sync_source(chunks_of: Callable[[int], Fixed]) -> None:
    """A sync source that takes its time is not asked for a whole chunk before the first item is run."""
    chunks_of(1000)
    given: list[int] = []

    def source() -> Iterator[int]:
        for number in range(50):
            given.append(number)
            threading.Event().wait(0.005)  # longer than is taken for one chunk
            yield number

    async with open_pool(1) as pool, pool.map(jobs.square, source()) as results:
        assert await anext(results) == 0
        assert len(given) < 50
        assert [result async for result in results] == [number**2 for number in range(1, 50)]


# bounds


@pytest.mark.parametrize("window", [1, 2, 5, 64])
@pytest.mark.parametrize("kind", ["sync", "async", "iterator"])
async def test_window(window: int, kind: str, chunks_of: Callable[[int], Fixed]) -> None:
    """An explicit window is a hard bound, whatever the chunks; and nothing waits for ever."""
    chunks_of(50)
    source: Any = Endless() if kind == "iterator" else Source()
    async with open_pool(2) as pool:
        async with pool.map(
            jobs.square, source if kind == "iterator" else source.iterate(kind), window=window
        ) as results:
            for delivered in range(300):
                assert source.taken <= delivered + window
                assert await anext(results) == delivered**2
        assert source.taken <= 300 + window


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_default_window_grows_with_the_chunks(kind: str, chunks_of: Callable[[int], Fixed]) -> None:
    """Without a window two chunks for each worker may be taken and not delivered, and no more."""
    chunks_of(10)
    source = Source()
    async with open_pool(2) as pool, pool.map(jobs.square, source.iterate(kind)) as results:
        await until(lambda: source.taken == 40)
        await until(lambda: pool.statistics().idle == 2)
        await trio.testing.wait_all_tasks_blocked()
        assert source.taken == 40
        for delivered in range(200):
            assert await anext(results) == delivered**2
            assert source.taken <= delivered + 1 + 40


async def test_slow_consumer_is_not_flooded() -> None:
    """Where results wait to be taken, quick as the calls are, no more is taken ahead than for slow ones."""
    source = Source()
    async with open_pool(1) as pool, pool.map(jobs.square, source.sync()) as results:
        for delivered in range(200):
            await until(lambda delivered=delivered: source.taken == delivered + 2 and pool.statistics().idle == 1)
            await trio.testing.wait_all_tasks_blocked()
            assert await anext(results) == delivered**2
        assert source.taken <= 202


@pytest.mark.parametrize("fields", [{"max_executions": 3}, {"debug": True}, {"max_frame_size": 100_000}])
async def test_alone_where_each_counts(fields: dict[str, Any], chunks_of: Callable[[int], Fixed]) -> None:
    """With `max_executions`, `debug` or a small `max_frame_size` every call is a job of its own."""
    pace = chunks_of(10)
    async with open_pool(2, **fields) as pool:
        pids = await everything(pool, jobs.give_pid, range(12))
        most = {"max_executions": 3, "debug": 1}.get(next(iter(fields)), 12)
        assert max(pids.count(pid) for pid in pids) <= most
    assert pace.ran_together == []


# taking


async def test_batches(chunks_of: Callable[[int], Fixed]) -> None:
    """A batch has what is there, in order, and at least one; it does not wait for more."""
    chunks_of(10)
    go = trio.Event()

    async def source() -> AsyncIterator[int]:
        for number in range(25):
            yield number
        await go.wait()
        yield 25

    async with open_pool(1) as pool, pool.map(jobs.square, source(), window=100) as results:
        found: list[int] = []
        batches = results.batches()
        assert aiter(batches) is batches
        while len(found) < 25:
            with trio.testing.assert_checkpoints():
                batch = await anext(batches)
            assert batch
            found += batch
        go.set()
        async for batch in batches:
            found += batch
        assert found == [number**2 for number in range(26)]


async def test_batches_as_they_are_ready(note: Path, chunks_of: Callable[[int], Fixed]) -> None:
    """With `ordered=False` batches have what is ready."""
    chunks_of(2)
    items = [(str(note), f"{note}.go"), *[(number, 0) for number in range(21)]]
    async with open_pool(2) as pool, pool.map(jobs.stay_or_echo, items, ordered=False) as results:
        found: list[Any] = []
        async for batch in results.batches():
            found += batch
            if len(found) == 20:
                Path(f"{note}.go").touch()
        assert sorted(one for one in found if isinstance(one, tuple)) == items[1:]
        assert len(found) == 22


@pytest.mark.parametrize("ordered", [True, False])
async def test_batches_mixed_with_single_results(ordered: bool, chunks_of: Callable[[int], Fixed]) -> None:
    """Both ways of taking may be mixed, by one task or several, and each result is taken once."""
    chunks_of(7)
    found: list[int] = []
    async with open_pool(2) as pool, pool.map(jobs.square, range(500), ordered=ordered) as results:

        async def one_by_one() -> None:
            async for result in results:
                found.append(result)
                await trio.lowlevel.checkpoint()

        async def in_batches() -> None:
            async for batch in results.batches():
                found.extend(batch)

        async def mixed() -> None:
            for turn in itertools.count():
                try:
                    if turn % 2:
                        found.append(await anext(results))
                    else:
                        found.extend(await anext(results.batches()))
                except StopAsyncIteration:
                    return

        async with trio.open_nursery() as nursery:
            for take in (one_by_one, in_batches, mixed, one_by_one):
                nursery.start_soon(take)
    assert sorted(found) == [number**2 for number in range(500)]


async def test_mixed_by_one_task_keeps_the_order(chunks_of: Callable[[int], Fixed]) -> None:
    """Taken in turns by one task, results come in their order."""
    chunks_of(7)
    found: list[int] = []
    async with open_pool(2) as pool, pool.map(jobs.square, range(300)) as results:
        batches = results.batches()
        while len(found) < 300:
            found.append(await anext(results))
            if len(found) < 300:
                found += await anext(batches)
    assert found == [number**2 for number in range(300)]


async def test_cancelled_taking_loses_nothing(chunks_of: Callable[[int], Fixed]) -> None:
    """A cancel around one taking loses no result, and is noticed at each."""
    chunks_of(20)
    found: list[int] = []
    async with open_pool(2) as pool, pool.map(jobs.square, range(300)) as results:
        batches = results.batches()
        while len(found) < 300:
            with trio.CancelScope() as scope:
                scope.cancel()
                found.append(await anext(results))
            assert scope.cancelled_caught
            with trio.CancelScope() as scope:
                scope.cancel()
                found += await anext(batches)
            assert scope.cancelled_caught
            found.append(await anext(results))
    assert found == [number**2 for number in range(300)]


async def test_others_get_their_turn(chunks_of: Callable[[int], Fixed], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over results that are there lets other tasks run about every `YIELD_EVERY` seconds."""
    chunks_of(1000)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with open_pool(1) as pool, trio.open_nursery() as nursery:
        async with pool.map(jobs.square, range(1000)) as results:
            assert await anext(results) == 0
            await until(lambda: pool.statistics().jobs.get("replied") == 1000)
            nursery.start_soon(count)
            clock = itertools.count(_map.perf_counter(), _map.YIELD_EVERY / 3)
            monkeypatch.setattr(_map, "perf_counter", lambda: next(clock))
            for _ in range(900):
                await anext(results)
            assert 900 / 4 - 10 <= turns < 900
        nursery.cancel_scope.cancel()


# leaving


@pytest.mark.parametrize("how", ["break", "error", "cancel"])
async def test_left_early(how: str, chunks_of: Callable[[int], Fixed]) -> None:
    """Leaving costs at most the workers that run the map's chunks, closes the source, and leaves no more to run."""
    chunks_of(10)
    source = Source()
    async with open_pool(2) as pool:
        with trio.CancelScope() as scope:
            try:
                async with pool.map(jobs.nap_at, source.sync(), itertools.repeat(25), itertools.repeat(600)) as results:
                    async for result in results:
                        if result == 24:
                            if how == "break":
                                break
                            if how == "error":
                                raise KeyError("mine")
                            scope.cancel()
            except KeyError:
                assert how == "error"
        assert source.closed
        await until(lambda: all_idle(pool))
        exits = pool.statistics().exits
        assert set(exits) == {"cancelled"}
        assert exits["cancelled"] in (1, 2)
        assert await pool.run_sync(jobs.square, 3) == 9
        check(pool)


@pytest.mark.parametrize("return_exceptions", [True, False])
@pytest.mark.parametrize("size", [1, 10])
async def test_closed_pool_ends_the_map(return_exceptions: bool, size: int, chunks_of: Callable[[int], Fixed]) -> None:
    """A map that outlives its pool ends with that, once, whatever `return_exceptions` says."""
    chunks_of(size)
    source = Endless()
    found: list[object] = []
    closed: list[BaseException] = []

    async def consume(pool: PythonPool, started: trio.Event) -> None:
        with pytest.raises(trio.ClosedResourceError) as caught:
            async with pool.map(jobs.square, source, return_exceptions=return_exceptions) as results:
                async for result in results:
                    found.append(result)
                    started.set()
        closed.append(caught.value)

    async with trio.open_nursery() as nursery:
        started = trio.Event()
        async with open_pool(2) as pool:
            nursery.start_soon(consume, pool, started)
            await started.wait()
    assert len(closed) == 1
    assert found == [number**2 for number in range(len(found))]


# without a region


async def test_without_a_region(
    note: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    chunks_of: Callable[[int], Fixed],
) -> None:
    """Where no memory can be shared, calls go alone, one line in the log says so, and a crash costs one item."""
    chunks_of(10)

    def refuse() -> None:
        raise OSError("no memory today")

    monkeypatch.setattr(_interpreter, "Region", refuse)
    with caplog.at_level(logging.WARNING, logger="trio_workers.pool"):
        async with open_pool(2) as pool:
            assert await everything(pool, jobs.square, range(50)) == [number**2 for number in range(50)]
            items = range(40), [str(note)] * 40, [{0: "exit", 15: "exit"}] * 40
            found = await everything(pool, jobs.end_at, *items, return_exceptions=True)
            assert [number for number, one in enumerate(found) if type(one) is WorkerCrashed] == [0, 15]
            assert sorted(map(int, lines(note))) == list(range(40))
    assert caplog.text.count("no memory today") == 1


async def test_half_of_the_workers_without_a_region(
    note: Path, monkeypatch: pytest.MonkeyPatch, chunks_of: Callable[[int], Fixed]
) -> None:
    """A worker that has none runs one item of a chunk, and gives back the rest."""
    chunks_of(10)
    turns = itertools.count()

    def sometimes() -> Region:
        if next(turns) % 2:
            raise OSError("no memory today")
        return Region()

    monkeypatch.setattr(_interpreter, "Region", sometimes)
    async with open_pool(2) as pool:
        items = range(60), [str(note)] * 60, [{3: "exit", 15: "exit", 33: "raise"}] * 60
        found = await everything(pool, jobs.end_at, *items, return_exceptions=True)
        assert [n for n, one in enumerate(found) if isinstance(one, Exception)] == [3, 15, 33]
        assert sorted(map(int, lines(note))) == list(range(60))


def test_numbers_fit() -> None:
    """The table of a region has a place for each item, and results have most of the memory."""
    assert RESULTS == 4 * (BEGUN + MOST_ITEMS)
    assert math.log2(SIZE).is_integer()
