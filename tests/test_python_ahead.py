"""Python functions that lie in their worker's line ahead of their turn, with real processes.

Whatever strikes the job in front, or one of those behind it: each caller gets what its own job ended with, what was not
read goes on elsewhere, and nothing runs twice. Each job notes its number as it begins.

In most tests those behind a job lie there for certain: what is a millisecond else is LASTING (`lasting`), and where it
is to pass the pool's clock is put forward.
"""

# ruff: noqa: ASYNC240, ASYNC251 - tests may block for a moment

import collections
import contextlib
import functools
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing

from tests import python_ahead_jobs as ahead_jobs
from tests import python_pool_jobs as jobs
from tests.test_faults import Told, runs, stopped, until
from tests.test_parent import wait
from tests.test_python_pool import all_idle, check, lines, noted, open_pool
from trio_workers import (
    AllocateTimeout,
    JobError,
    JobRecord,
    JobTimeout,
    Limits,
    PythonPool,
    QueueFull,
    RelayError,
    Restart,
    Worker,
    WorkerCrashed,
    WorkerError,
    WorkerState,
    _core,
    _roster,
)

pytestmark = [
    pytest.mark.faults,
    pytest.mark.limit(120),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and sockets for packets"),
]

NEVER: Final = Restart(initial=1000.0, maximum=1000.0, give_up_after=1)
"""A pool that ever backed off would stand still."""

LASTING: Final = 15.0
"""Seconds for which a job may hold up those behind it, in tests with `lasting`; none takes so long by itself."""

CANCELLED: Final = "cancelled"


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what lies behind a job lie there for LASTING, however long the job took that shows how quick they are."""
    monkeypatch.setattr(_roster, "PATIENCE", LASTING)
    note_pace = _roster.Roster._note_pace
    monkeypatch.setattr(
        _roster.Roster, "_note_pace", lambda self, seat, took: note_pace(self, seat, min(took, LASTING / 100))
    )


async def leap(clock: trio.testing.MockClock, seconds: float) -> None:
    """Put the clock forward, and let the pool see it."""
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked()


class Callers:
    """Callers of small jobs, each in a task of its own, and what each has got."""

    def __init__(self, pool: PythonPool, nursery: trio.Nursery, note: Path) -> None:
        self.pool = pool
        self.note = note
        self.found: dict[int, Any] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self._nursery = nursery

    async def come(self, *numbers: int, how: str = "", go: Path | None = None) -> None:
        """Hand in jobs, one after the other; return when the last of them waits."""
        for number in numbers:
            await self.run(number, ahead_jobs.act, how, "" if go is None else str(go))

    async def run(self, number: int, function: Callable[..., Any], *args: Any) -> None:
        """Hand in a job that notes its number; return when it waits."""
        self.scopes[number] = trio.CancelScope()
        self._nursery.start_soon(self._call, number, function, args)
        await trio.testing.wait_all_tasks_blocked()

    async def _call(self, number: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        scope = self.scopes[number]
        with scope:
            try:
                call = functools.partial(self.pool.run_sync, function, number, str(self.note), *args)
                self.found[number] = await call(label=str(number))
            except Exception as error:
                self.found[number] = error
        if scope.cancelled_caught:
            self.found[number] = CANCELLED

    async def front(self, number: int, function: Callable[..., Any] = ahead_jobs.act, *args: Any) -> None:
        """Hand in a job that is to be in front, and wait until it has begun."""
        await self.run(number, function, *args)
        await until(lambda: str(number) in lines(self.note))

    def assert_began(self, *numbers: int) -> None:
        """These jobs have begun, each once, and no others."""
        assert sorted(map(int, lines(self.note))) == sorted(numbers)

    def assert_own_or_lost(self, *numbers: int) -> None:
        """The same, but for those which the worker had read as well before anybody saw that it broke the protocol."""
        for number in numbers:
            found = self.found[number]
            assert found == number or (type(found) is RelayError and found.started is True)

    def assert_began_or_lost(self, *numbers: int) -> None:
        """Each began once, or was lost on the way: read by a worker that was killed before the job noted its number."""
        began = [int(line) for line in lines(self.note)]
        lost = {number for number in numbers if isinstance(self.found[number], RelayError)}
        assert len(began) == len(set(began))
        assert {*numbers} - lost <= {*began} <= {*numbers}

    def assert_own(self, *numbers: int) -> None:
        """These callers have got the results of their own jobs."""
        assert {number: self.found.get(number) for number in numbers} == {number: number for number in numbers}


def ahead(pool: PythonPool) -> list[int]:
    """How many jobs lie in the line of each worker that serves, the most first."""
    seats = [worker.seat for worker in pool.workers]
    return sorted((len(seat.ahead) for seat in seats if seat.state is _roster.SERVING), reverse=True)


def waits(pool: PythonPool) -> int:
    return pool.statistics().waiting


async def hold(worker: Worker) -> None:
    """Let a worker stand still, so that it reads nothing."""
    os.kill(pid_of(worker), signal.SIGSTOP)
    await until(lambda: stopped(pid_of(worker)))


def pid_of(worker: Worker) -> int:
    assert worker.pid is not None
    return worker.pid


async def warm_up(pool: PythonPool, directory: Path) -> None:
    """Let every worker answer a job: before that nobody knows how long jobs take, and nothing lies behind one."""
    count, path = len(pool.workers), str(directory / f"meeting{time.monotonic_ns()}")
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(pool.run_sync, jobs.meet, path, count)


@contextlib.asynccontextmanager
async def opened(note: Path, num_workers: int = 1, **fields: Any) -> AsyncIterator[tuple[PythonPool, Callers]]:
    """A pool whose workers have answered a job, and callers; at the end all is as it should be.

    The callers are waited for while the pool is still open.
    """
    async with open_pool(num_workers, **{"restart": NEVER, "allocate_timeout": 1000.0, **fields}) as pool:
        await warm_up(pool, note.parent)
        async with trio.open_nursery() as nursery:
            yield pool, Callers(pool, nursery, note)
        await heals(pool)


async def heals(pool: PythonPool, *gone: Worker) -> None:
    """All workers are there again, none of them is one of these, and jobs get their own results."""
    await until(lambda: all_idle(pool))
    assert not set(gone) & set(pool.workers)
    for number in range(3):
        assert await pool.run_sync(jobs.square, number) == number**2
    assert waits(pool) == 0
    check(pool)


# nothing happens


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_everybody_gets_their_own(num_workers: int) -> None:
    """Jobs lie behind others by themselves, where many wait, and every caller gets the result of its own job."""
    most = 0
    results: dict[int, int] = {}

    def observe(record: JobRecord) -> None:
        nonlocal most
        most = max(most, *ahead(pool))

    async def call(number: int) -> None:
        assert number not in results
        results[number] = await pool.run_sync(jobs.echo, number)

    async with open_pool(num_workers, job_observer=observe) as pool:
        count = 0
        while most < 4:  # a machine that is busy with other things may need a while
            async with trio.open_nursery() as nursery:
                for number in range(count, count + 200):
                    nursery.start_soon(call, number)
            count += 200
        assert results == {number: number for number in range(count)}
        now = pool.statistics()
        assert now.jobs == {"replied": count}
        assert now.exits == {}
        assert sum(worker.state.num_execs for worker in pool.workers) == count


async def test_in_the_order_in_which_they_came(note: Path, go: Path, lasting: None) -> None:
    """Those in the line, and those for whom there was no room in it, have their turns in the order of their coming."""
    async with opened(note) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(*range(1, 40))
        assert ahead(pool) == [_roster.MOST_AHEAD]
        assert waits(pool) == 39
        assert pool.workers[0].state.num_execs == 2
        go.touch()
    assert lines(note) == [str(number) for number in range(40)]
    callers.assert_own(*range(40))


async def test_nothing_lies_behind_the_first_job(note: Path, go: Path, lasting: None) -> None:
    """As long as nobody knows how long a worker's jobs take, one is given to it at a time."""
    async with open_pool() as pool:
        async with trio.open_nursery() as nursery:
            callers = Callers(pool, nursery, note)
            await callers.front(0, ahead_jobs.act, "", str(go))
            await callers.come(1, 2, 3)
            assert ahead(pool) == [0]
            assert waits(pool) == 3
            go.touch()
        callers.assert_own(*range(4))


async def test_nothing_lies_behind_slow_jobs() -> None:
    """Where jobs take longer than a millisecond, none lies behind another."""
    most = 0

    def observe(record: JobRecord) -> None:
        nonlocal most
        most = max(most, *ahead(pool))

    async with open_pool(job_observer=observe) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(pool.run_sync, jobs.nap, number, 0.003)
        assert pool.statistics().jobs == {"replied": 30}
    assert most == 0


async def test_two_lines(note: Path, tmp_path: Path, lasting: None) -> None:
    """With two workers at work both have a line, each with its share."""
    first, second = tmp_path / "first", tmp_path / "second"
    async with opened(note, 2) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(first))
        await callers.front(1, ahead_jobs.act, "", str(second))
        await callers.come(*range(2, 40))
        assert ahead(pool) == [_roster.MOST_AHEAD] * 2
        first.touch()
        await until(lambda: len(callers.found) >= 1 + _roster.MOST_AHEAD)
        second.touch()
    callers.assert_own(*range(40))
    callers.assert_began(*range(40))


@pytest.mark.parametrize("quick", [False, True], ids=["lasting", "as it is"])
async def test_behind_one_that_blocks(
    quick: bool, note: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: trio.testing.MockClock
) -> None:
    """Those behind a job that takes long move to a worker with room, and are run once."""
    never, soon = tmp_path / "never", tmp_path / "soon"
    if not quick:
        monkeypatch.setattr(_roster, "PATIENCE", LASTING)
    async with opened(note, 2) as (pool, callers):
        if quick:
            await quicken(pool)
        await callers.front(0, ahead_jobs.act, "", str(never))
        await callers.front(1, ahead_jobs.act, "", str(soon))
        await callers.come(*range(2, 12))
        if not quick:
            assert ahead(pool) == [5, 5]
            await leap(clock, LASTING)
        await until(lambda: ahead(pool) == [0, 0])
        assert waits(pool) == 10
        soon.touch()
        await until(lambda: len(callers.found) == 11)
        never.touch()
    callers.assert_own(*range(12))
    callers.assert_began(*range(12))
    if not quick:  # else one may be put behind the job that blocks, and taken back, while the next is run
        assert lines(note) == [str(number) for number in range(12)]


async def quicken(pool: PythonPool) -> None:
    """Run quick jobs until some may lie in every worker's line."""
    while not all(worker.seat.depth > 2 for worker in pool.workers):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(pool.run_sync, jobs.echo, number)


async def test_behind_one_that_blocks_on_the_only_worker(
    note: Path, go: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """With one worker they wait outside its line until it is free, and others come behind them."""
    async with opened(note) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2, 3)
        assert ahead(pool) == [3]
        await leap(clock, LASTING)
        assert ahead(pool) == [0]
        await callers.come(4, 5, 6)
        assert ahead(pool) == [0]
        assert waits(pool) == 6
        go.touch()
    callers.assert_own(*range(7))
    assert lines(note) == [str(number) for number in range(7)]


async def test_behind_one_that_was_over_unseen(
    note: Path, go: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """When their time is over the worker may be beyond the job in front, and nobody has seen it: nothing is lost."""
    last = note.with_name("last")
    async with opened(note) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2)
        await callers.come(3, go=last)
        await callers.come(4, 5)
        assert ahead(pool) == [5]
        go.touch()
        wait(lambda: "3" in lines(note))  # blocks: nobody reads the answers to 0, 1 and 2
        clock.jump(LASTING)
        await until(lambda: set(callers.found) == {0, 1, 2})
        current = pool.workers[0].current
        assert current is not None
        assert current.label == "3"
        last.touch()
    callers.assert_own(*range(6))
    assert lines(note) == [str(number) for number in range(6)]


async def test_who_is_at_work(note: Path, tmp_path: Path, lasting: None) -> None:
    """`Worker.current` is the job in front, and its time runs from when it came there; the others wait."""
    turns = [tmp_path / f"turn{number}" for number in range(4)]
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        before = trio.current_time()
        for number, turn in enumerate(turns):
            await callers.come(number, go=turn)
        assert ahead(pool) == [3]
        for number, turn in enumerate(turns):
            await noted(note, number + 1)
            await until(lambda number=number: worker.current is not None and worker.current.label == str(number))
            assert worker.current is not None
            assert before <= worker.current.started <= (before := trio.current_time())
            assert worker.state.value is WorkerState.WORKING
            assert worker.state.num_execs == 2 + number
            now = pool.statistics()
            assert (now.busy, now.waiting) == (1, 3 - number)
            assert (now.longest_wait > 0) == (number < 3)
            turn.touch()
    callers.assert_own(*range(4))


async def test_errors_are_their_own(note: Path, go: Path, lasting: None) -> None:
    """What a job raised, could not return or could not read reaches its own caller, and costs nobody anything."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        for number in range(1, 13):
            await callers.come(number, how=("", "raise", "lock")[number % 3])
        assert ahead(pool) == [12]
        go.touch()
    callers.assert_own(*range(0, 13, 3))
    for number in range(1, 13, 3):
        assert isinstance(callers.found[number], ValueError)
        assert str(callers.found[number]) == f"bad {number}"
        assert isinstance(callers.found[number + 1], JobError)
        assert "lock" in str(callers.found[number + 1])
    callers.assert_began(*range(13))
    assert worker.state.num_execs == 1 + 13 + 3


async def test_records(note: Path, go: Path, lasting: None, clock: trio.testing.MockClock) -> None:
    """The job observer hears of each job once: who, how it went, and when, in this order: queued, started, ended."""
    records: list[JobRecord] = []
    async with opened(note, job_observer=records.append) as (pool, callers):
        (worker,) = pool.workers
        records.clear()
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1)
        await callers.come(2, how="raise")
        await callers.come(3, 4, 5)
        assert ahead(pool) == [5]
        callers.scopes[4].cancel()
        await until(lambda: 4 in callers.found)
        clock.jump(1.0)
        go.touch()
        await until(lambda: len(callers.found) == 6)
        assert sorted(records, key=lambda record: int(record.label or "-1")) == [
            JobRecord(
                label=str(number),
                slot=None if number == 4 else 0,
                pid=None if number == 4 else worker.pid,
                queued=record.queued,
                started=record.started,
                ended=record.ended,
                outcome={2: "failed", 4: "cancelled"}.get(number, "replied"),
            )
            for number, record in enumerate(sorted(records, key=lambda record: int(record.label or "-1")))
        ]
        for record in records:
            if record.outcome == "cancelled":
                assert record.started is None
                assert record.queued < record.ended
            else:
                assert record.started is not None
                assert record.queued <= record.started < record.ended
                assert record.label == "0" or record.started - record.queued > 1.0


# a worker ends under a job that others lie behind

ENDS: Final = {"exit": 7, "kill": -signal.SIGKILL, "segfault": -signal.SIGSEGV}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("how", [*ENDS, "killed from outside"])
async def test_crash_of_the_one_in_front(
    how: str, num_workers: int, note: Path, tmp_path: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """A crash is the error of the job in front; those behind it go on, elsewhere or on the replacement, each once."""
    go, later = tmp_path / "go", tmp_path / "later"
    told = Told()
    async with opened(note, num_workers, observer=told) as (pool, callers):
        await callers.front(0, ahead_jobs.act, how if how in ENDS else "", str(go))
        (worker,) = (worker for worker in pool.workers if worker.current is not None)
        if num_workers == 2:
            await callers.front(100, ahead_jobs.act, "", str(later))
        await callers.come(*range(1, 11))
        assert ahead(pool) == [[10], [5, 5]][num_workers - 1]
        if how in ENDS:
            go.touch()
        else:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: 0 in callers.found)
        await leap(clock, LASTING)  # some may have come into the other's line
        await until(lambda: len(callers.found) == 11)
        later.touch()
        await until(lambda: len(callers.found) == 10 + num_workers)
        await until(lambda: worker not in pool.workers)
    assert_paid(callers, 0, worker, ENDS.get(how, -signal.SIGKILL))
    callers.assert_own(*range(1, 11))
    callers.assert_began(*range(11), *[100][: num_workers - 1])
    assert len(told.errors) == 1
    assert isinstance(told.errors[0], WorkerCrashed)
    assert pool.statistics().exits["crashed"] == 1


def assert_paid(callers: Callers, number: int, worker: Worker, returncode: int) -> None:
    """A job that had started has paid for the end of this worker."""
    error = callers.found[number]
    assert type(error) is WorkerCrashed, error
    assert (error.pid, error.returncode) == (worker.pid, returncode)
    assert (error.phase, error.started) == ("running", True)
    assert f"'{number}'" in str(error)


async def crash_behind(how: str, note: Path, go: Path, *, each: int, line: int, seen: bool) -> None:
    """Six times so many jobs: of each the first is in front, so many others lie in its line, and the sixth crashes."""
    async with opened(note) as (pool, callers):
        for first in range(0, 6 * each, each):
            go.unlink(missing_ok=True)
            (worker,) = pool.workers
            await callers.front(first, ahead_jobs.act, "", str(go))
            await callers.come(*range(first + 1, first + 5))
            await callers.come(first + 5, how=how)
            await callers.come(*range(first + 6, first + each))
            assert ahead(pool) == [line]
            go.touch()
            if not seen:
                pid = pid_of(worker)
                wait(lambda pid=pid: not runs(pid))  # blocks
            await until(lambda first=first: len(callers.found) == first + each)
            await until(lambda: all_idle(pool))
            assert_paid(callers, first + 5, worker, ENDS[how])
            await warm_up(pool, note.parent)
    callers.assert_own(*(number for number in range(6 * each) if number % each != 5))
    callers.assert_began(*range(6 * each))
    assert pool.statistics().exits["crashed"] == 6


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
@pytest.mark.parametrize("how", ENDS)
async def test_crash_of_one_behind(how: str, seen: bool, note: Path, go: Path, lasting: None) -> None:
    """A worker dies in a job that lay behind others: those had their answers, it pays, those behind it run elsewhere.

    Unseen: answers and death are found in the same pass, now the one first and now the other.
    """
    await crash_behind(how, note, go, each=10, line=9, seen=seen)


@pytest.mark.parametrize("how", ENDS)
async def test_crash_of_one_behind_with_a_queue(how: str, note: Path, go: Path, lasting: None) -> None:
    """The same where more wait than the line takes: none of them is put into the line of the dead worker."""
    await crash_behind(how, note, go, each=30, line=_roster.MOST_AHEAD, seen=False)


async def test_many_crashes_in_one_line(note: Path, go: Path, lasting: None) -> None:
    """Every third job ends its worker: each pays for itself, and every other caller has its own result."""
    async with opened(note) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        for number in range(1, 15):
            await callers.come(number, how="" if number % 3 else "exit")
        assert ahead(pool) == [14]
        go.touch()
    callers.assert_own(0, *(number for number in range(15) if number % 3))
    assert all(isinstance(callers.found[number], WorkerCrashed) for number in range(3, 15, 3))
    callers.assert_began(*range(15))
    assert pool.statistics().exits["crashed"] == 4


async def test_crashes_of_all_in_a_line(note: Path, tmp_path: Path, lasting: None) -> None:
    """All jobs in the lines of two workers end them: each is one error, and one replacement."""
    async with opened(note, 2) as (pool, callers):
        first, second = tmp_path / "first", tmp_path / "second"
        await callers.front(0, ahead_jobs.act, "exit", str(first))
        await callers.front(1, ahead_jobs.act, "kill", str(second))
        for number in range(2, 12):
            await callers.come(number, how=("exit", "kill")[number % 2])
        assert ahead(pool) == [5, 5]
        first.touch()
        second.touch()
        await until(lambda: len(callers.found) == 12)
    assert [(type(error), error.started) for _, error in sorted(callers.found.items())] == [(WorkerCrashed, True)] * 12
    callers.assert_began(*range(12))
    assert pool.statistics().exits["crashed"] == 12


async def test_killed_before_it_read_any(note: Path, lasting: None) -> None:
    """A worker that is killed when it has read nothing of its line costs nobody a job, and all run in their order."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        pid = pid_of(worker)
        await hold(worker)
        await callers.come(*range(10))
        assert ahead(pool) == [9]
        assert waits(pool) == 9
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(callers.found) == 10)
        await until(lambda: worker not in pool.workers)
    callers.assert_own(*range(10))
    assert lines(note) == [str(number) for number in range(10)]
    assert pool.statistics().exits["crashed"] == 1


# cancels


@pytest.mark.parametrize("which", [(0,), (1,), (4,), (8,), (2, 3, 7), (0, 1), (0, 5, 8), tuple(range(1, 9))])
async def test_cancel(which: tuple[int, ...], note: Path, go: Path, lasting: None) -> None:
    """The worker is killed for a cancel of the job in front alone; who lay in the line never begins; the rest run."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(*range(1, 9))
        assert ahead(pool) == [8]
        for number in which:
            callers.scopes[number].cancel()
        await until(lambda: len(callers.found) >= len(which))
        go.touch()
        await until(lambda: len(callers.found) == 9)
        assert (worker not in pool.workers) == (0 in which)
    rest = [number for number in range(9) if number not in which]
    assert {number for number, found in callers.found.items() if found == CANCELLED} == set(which)
    callers.assert_own(*rest)
    assert lines(note) == [str(number) for number in range(9) if number == 0 or number in rest]
    assert pool.statistics().exits.get("cancelled", 0) == (0 in which)


async def test_cancel_of_all(note: Path, go: Path, lasting: None) -> None:
    """When all are cancelled at once, the worker that had them is killed and nothing else begins."""
    async with opened(note, 2) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.front(1, ahead_jobs.act, "", str(go))
        await callers.come(*range(2, 30))
        assert ahead(pool) == [14, 14]
        for scope in callers.scopes.values():
            scope.cancel()
        await until(lambda: len(callers.found) == 30)
    assert set(callers.found.values()) == {CANCELLED}
    callers.assert_began(0, 1)
    assert pool.statistics().exits["cancelled"] == 2


@pytest.mark.parametrize("which", [(3,), (3, 4), (0, 3), (0, 1, 2, 3), tuple(range(7))])
async def test_cancel_of_one_that_runs_unseen(which: tuple[int, ...], note: Path, go: Path, lasting: None) -> None:
    """The worker is at a job behind the one in front, and nobody has seen it: who is cancelled there is killed for it.

    Those before it have been answered, so they are not hit, and those behind it are run elsewhere.
    """
    never = note.with_name("never")
    async with opened(note, destroy_timeout=1000.0) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2)
        await callers.come(3, go=never)
        await callers.come(4, 5, 6)
        assert ahead(pool) == [6]
        go.touch()
        wait(lambda: "3" in lines(note))  # blocks
        for number in which:
            callers.scopes[number].cancel()
        await until(lambda: len(callers.found) == 7)
        await until(lambda: worker not in pool.workers)
    rest = [number for number in range(7) if number not in which]
    assert {number for number, found in callers.found.items() if found == CANCELLED} == set(which)
    callers.assert_own(*rest)
    callers.assert_began(0, 1, 2, 3, *(number for number in rest if number > 3))
    assert pool.statistics().exits["cancelled"] == 1


@pytest.mark.parametrize("seed", range(10))
async def test_cancel_in_the_pass_of_the_answers(seed: int, note: Path, go: Path, lasting: None) -> None:
    """All answers are there when some are cancelled: those end so, the others have their own, and the worker stays."""
    chance = random.Random(seed)
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        for first in range(0, 100, 10):
            go.unlink(missing_ok=True)
            await callers.front(first, ahead_jobs.act, "", str(go))
            for number in range(first + 1, first + 10):
                await callers.come(number, how=chance.choice(["", "", "raise"]))
            assert ahead(pool) == [9]
            go.touch()
            wait(lambda last=first + 9: has_answered(worker, note, last))  # blocks
            which = [number for number in range(first, first + 10) if chance.random() < 0.5]
            chance.shuffle(which)
            late = {number for number in which if chance.random() < 0.5}
            for number in which:
                if number in late:
                    callers.scopes[number].deadline = trio.current_time()
                else:
                    callers.scopes[number].cancel()
            await until(lambda first=first: len(callers.found) == first + 10)
            for number in range(first, first + 10):
                found = callers.found[number]
                own = found == number or (isinstance(found, ValueError) and str(found) == f"bad {number}")
                if number in late:
                    assert own or found == CANCELLED  # which of the two is seen first is left open
                else:
                    assert found == CANCELLED if number in which else own
        assert pool.workers == (worker,)
        assert pool.statistics().exits == {}
    callers.assert_began(*range(100))


def has_answered(worker: Worker, note: Path, number: int) -> bool:
    """Whether this job has begun, and its worker sleeps since: it waits for the next."""
    began = {line.split()[0] for line in lines(note)}
    # After that: a state from before says nothing of this job.
    stat = Path(f"/proc/{worker.pid}/stat").read_text()
    return str(number) in began and stat.rpartition(")")[2].split()[0] == "S"


async def test_cancel_of_one_answered_unseen(note: Path, go: Path, lasting: None) -> None:
    """Its whole answer is there when it is cancelled, while another runs: it is dropped, and nobody is hit."""
    last = note.with_name("last")
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2)
        await callers.come(3, go=last)
        await callers.come(4, 5)
        assert ahead(pool) == [5]
        go.touch()
        wait(lambda: "3" in lines(note))  # blocks
        callers.scopes[2].cancel()
        await until(lambda: len(callers.found) == 3)
        last.touch()
        await until(lambda: len(callers.found) == 6)
        assert pool.workers == (worker,)
    assert callers.found[2] == CANCELLED
    callers.assert_own(0, 1, 3, 4, 5)
    assert lines(note) == [str(number) for number in range(6)]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2), (3,)])
async def test_cancel_of_what_a_stopped_worker_has_not_read(which: tuple[int, ...], note: Path, lasting: None) -> None:
    """A worker stands still, and has read nothing: who is cancelled never begins, and all others are run."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        pid = pid_of(worker)
        await hold(worker)
        await callers.come(*range(4))
        assert ahead(pool) == [3]
        for number in which:
            callers.scopes[number].cancel()
        await until(lambda: len(callers.found) >= len(which))
        if runs(pid):
            os.kill(pid, signal.SIGCONT)
        await until(lambda: len(callers.found) == 4)
    rest = [number for number in range(4) if number not in which]
    assert all(callers.found[number] == CANCELLED for number in which)
    callers.assert_own(*rest)
    assert lines(note) == [str(number) for number in rest]


@pytest.mark.parametrize("which", [(0,), (1,), (3,), (0, 2, 6), (8,)])
async def test_cancel_where_answers_come_in_pieces(which: tuple[int, ...], note: Path, go: Path, lasting: None) -> None:
    """Their answers are there, and too many for one read: what is read next is nobody's who has been answered."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(9, ahead_jobs.act, "", str(go))
        for number in range(9):
            await callers.run(number, ahead_jobs.act_and_say, 15_000)
        assert ahead(pool) == [9]
        go.touch()
        wait(lambda: has_answered(worker, note, 8))  # blocks
        for number in which:
            callers.scopes[number].cancel()
        await until(lambda: len(callers.found) == 10)
        assert pool.workers == (worker,)
    for number in range(9):
        found = callers.found[number]
        assert found == (CANCELLED if number in which else (number, worker.pid, bytearray(15_000)))
    callers.assert_own(9)
    assert [line.split()[0] for line in lines(note)] == ["9", *(str(number) for number in range(9))]


async def test_cancel_and_come_again(note: Path, go: Path, lasting: None) -> None:
    """Those who come after a cancel have their turns behind those who were there before."""
    async with opened(note) as (_, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2, 3, 4)
        callers.scopes[2].cancel()
        await until(lambda: 2 in callers.found)
        await callers.come(5, 6)
        callers.scopes[4].cancel()
        await until(lambda: 4 in callers.found)
        await callers.come(7)
        go.touch()
    callers.assert_own(0, 1, 3, 5, 6, 7)
    assert lines(note) == ["0", "1", "3", "5", "6", "7"]


# time is over


async def test_allocate_timeout(note: Path, go: Path, lasting: None, clock: trio.testing.MockClock) -> None:
    """Who has waited in a line for `allocate_timeout` is told so, and has not started; the worker is not touched."""
    async with opened(note, allocate_timeout=12.0) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2, 3)
        await leap(clock, 7.0)
        await callers.come(4, 5)
        assert ahead(pool) == [5]
        await leap(clock, 7.0)
        await until(lambda: len(callers.found) == 3)
        for number in (1, 2, 3):
            error = callers.found[number]
            assert type(error) is AllocateTimeout
            assert error.started is False
            assert f"'{number}'" in str(error)
            assert "of 1 workers 1 are busy" in str(error)
        assert waits(pool) == 2
        go.touch()
        await until(lambda: len(callers.found) == 6)
        assert pool.workers == (worker,)
        assert pool.statistics().jobs["allocate_timeout"] == 3
    callers.assert_own(0, 4, 5)
    assert lines(note) == ["0", "4", "5"]


async def test_allocate_timeout_of_what_runs_unseen(
    note: Path, go: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """Whose turn had come before its time was over gets its result, also where nobody had seen that."""
    last = note.with_name("last")
    async with opened(note, allocate_timeout=5.0) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1)
        await callers.come(2, go=last)
        await callers.come(3, 4)
        assert ahead(pool) == [4]
        go.touch()
        wait(lambda: "2" in lines(note))  # blocks
        clock.jump(6.0)
        await until(lambda: len(callers.found) == 4)
        assert type(callers.found[3]) is type(callers.found[4]) is AllocateTimeout
        last.touch()
    callers.assert_own(0, 1, 2)
    callers.assert_began(0, 1, 2)


async def test_exec_ttl(note: Path, lasting: None, clock: trio.testing.MockClock) -> None:
    """A job that takes longer than `exec_ttl` is its caller's JobTimeout; those behind it run on the replacement."""
    async with opened(note, limits=Limits(exec_ttl=5.0)) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "hang")
        await callers.come(*range(1, 11))
        assert ahead(pool) == [10]
        await leap(clock, 5.0)
        await until(lambda: len(callers.found) == 11)
        error = callers.found[0]
        assert type(error) is JobTimeout
        assert (error.pid, error.started) == (worker.pid, True)
        await until(lambda: worker not in pool.workers)
        assert pool.statistics().exits == {"exec_ttl": 1}
    callers.assert_own(*range(1, 11))
    assert lines(note) == [str(number) for number in range(11)]


async def test_exec_ttl_runs_from_the_turn(
    note: Path, tmp_path: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """What a job waits behind others counts for none of it: jobs that take long together are not too long each."""
    turns = [tmp_path / f"turn{number}" for number in range(5)]
    async with opened(note, limits=Limits(exec_ttl=12.0)) as (pool, callers):
        (worker,) = pool.workers
        for number, turn in enumerate(turns):
            await callers.come(number, go=turn)
        assert ahead(pool) == [4]
        for number, turn in enumerate(turns):
            await noted(note, number + 1)
            await until(lambda number=number: worker.current is not None and worker.current.label == str(number))
            await leap(clock, 4.0)
            turn.touch()
        await until(lambda: len(callers.found) == 5)
        assert pool.workers == (worker,)
    callers.assert_own(*range(5))


@pytest.mark.parametrize("blocks", [1.0, 30.0])
async def test_exec_ttl_while_nobody_looks(
    blocks: float, note: Path, go: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """The program does something else for longer than `exec_ttl`, while the worker works on: nobody pays for that.

    Jobs that were answered meanwhile have their results, and the time of the one that runs begins when it is seen.
    """
    last = note.with_name("last")
    async with opened(note, limits=Limits(exec_ttl=12.0)) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2, 3)
        await callers.come(4, go=last)
        await callers.come(5, 6)
        assert ahead(pool) == [6]
        go.touch()
        wait(lambda: "4" in lines(note))  # blocks
        clock.jump(11.5 + blocks)
        await until(lambda: len(callers.found) == 4)
        await leap(clock, 4.0)
        last.touch()
        await until(lambda: len(callers.found) == 7)
        assert pool.workers == (worker,)
        assert pool.statistics().exits == {}
    callers.assert_own(*range(7))
    assert lines(note) == [str(number) for number in range(7)]


async def test_exec_ttl_of_one_that_hangs_unseen(
    note: Path, go: Path, lasting: None, clock: trio.testing.MockClock
) -> None:
    """One behind the job in front hangs while nobody looks: it alone is told, when its own time is over."""
    async with opened(note, limits=Limits(exec_ttl=5.0)) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2)
        await callers.come(3, how="hang")
        await callers.come(4, 5)
        assert ahead(pool) == [5]
        go.touch()
        wait(lambda: "3" in lines(note))  # blocks
        clock.jump(100.0)
        await until(lambda: len(callers.found) == 3)
        callers.assert_own(0, 1, 2)
        await leap(clock, 5.0)
        await until(lambda: len(callers.found) == 6)
        assert type(callers.found[3]) is JobTimeout
        assert callers.found[3].pid == worker.pid
    callers.assert_own(0, 1, 2, 4, 5)
    assert lines(note) == [str(number) for number in range(6)]
    assert pool.statistics().exits["exec_ttl"] == 1


async def test_exec_ttl_of_a_stopped_worker(note: Path, lasting: None, clock: trio.testing.MockClock) -> None:
    """A worker stands still and has read nothing: when the time is over it is replaced, and all jobs are run."""
    async with opened(note, limits=Limits(exec_ttl=5.0)) as (pool, callers):
        (worker,) = pool.workers
        await hold(worker)
        await callers.come(*range(6))
        assert ahead(pool) == [5]
        await leap(clock, 5.0)
        await until(lambda: len(callers.found) == 6)
        await until(lambda: worker not in pool.workers)
    callers.assert_own(*range(6))
    assert lines(note) == [str(number) for number in range(6)]


async def test_exec_ttl_while_the_program_sleeps(note: Path, clock: trio.testing.MockClock) -> None:
    """As it is, with nothing changed: a task that blocks the program for longer than `exec_ttl` hits no quick job."""
    async with opened(note, 2, limits=Limits(exec_ttl=30.0)) as (pool, callers):
        for first in range(0, 100, 50):
            async with trio.open_nursery() as nursery:
                callers = Callers(pool, nursery, note)
                for number in range(first, first + 50):
                    nursery.start_soon(callers.come, number)
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                time.sleep(0.5)
                clock.jump(30.5)
            callers.assert_own(*range(first, first + 50))
    callers.assert_began(*range(100))


async def test_hard_memory(
    note: Path, go: Path, lasting: None, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that grows too large is its job's error; those behind it run on the replacement."""
    monkeypatch.setattr(_core, "READ_MEMORY_EVERY", LASTING)  # so that nobody looks while it grows
    async with opened(note, limits=Limits(hard_memory=100 << 20)) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.grow, 150 << 20, str(go))
        await callers.come(*range(1, 11))
        assert ahead(pool) == [10]
        go.touch()
        await until(lambda: (worker.resident_memory() or 0) > 140 << 20)
        await leap(clock, LASTING)
        await until(lambda: len(callers.found) == 11)
        error = callers.found[0]
        assert type(error) is WorkerError
        assert (error.pid, error.phase, error.started) == (worker.pid, "memory", True)
        assert pool.statistics().exits == {"hard_memory": 1}
    callers.assert_own(*range(1, 11))
    assert lines(note) == [str(number) for number in range(11)]


async def test_max_queue(note: Path, go: Path, lasting: None) -> None:
    """Those in a line wait like all others, and count for `max_queue`."""
    async with opened(note, max_queue=3) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(*range(1, 6))
        assert ahead(pool) == [3]
        assert type(callers.found[4]) is type(callers.found[5]) is QueueFull
        callers.scopes[2].cancel()
        await until(lambda: 2 in callers.found)
        await callers.come(6, 7)
        assert set(callers.found) == {2, 4, 5, 7}
        go.touch()
    callers.assert_own(0, 1, 3, 6)
    assert lines(note) == ["0", "1", "3", "6"]


async def test_growth(note: Path, go: Path) -> None:
    """Those that wait behind a job that takes long make the pool grow, and run on the new worker."""
    async with opened(note, max_workers=2, grow_after=0.05) as (pool, callers):
        await quicken(pool)
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(*range(1, 11))
        await until(lambda: len(callers.found) == 10)
        assert len(pool.workers) == 2
        go.touch()
        await until(lambda: len(callers.found) == 11)
        await pool.resize(1)
    callers.assert_own(*range(11))
    callers.assert_began(*range(11))


# the end of the pool, and changes while it is at work


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_left_while_many_wait(num_workers: int, note: Path, go: Path, lasting: None) -> None:
    """A pool whose block is left does all jobs that it has accepted, those in lines among them, and takes no others."""
    async with trio.open_nursery() as nursery:
        async with open_pool(num_workers, allocate_timeout=1000.0) as pool:
            await warm_up(pool, note.parent)
            callers = Callers(pool, nursery, note)
            for number in range(num_workers):
                await callers.front(number, ahead_jobs.act, "", str(go))
            await callers.come(*range(num_workers, 60))
            assert ahead(pool) == [_roster.MOST_AHEAD] * num_workers
            nursery.start_soon(touch_when, lambda: pool._core.roster.phase is _roster.Phase.CLOSING, go)
        assert pool.workers == ()
        with pytest.raises(trio.ClosedResourceError):
            await pool.run_sync(jobs.square, 2)
    callers.assert_own(*range(60))
    callers.assert_began(*range(60))
    assert pool.statistics().exits == {"closing": num_workers}


async def touch_when(condition: Callable[[], object], go: Path) -> None:
    await until(condition)
    go.touch()


@pytest.mark.parametrize("how", ["error", "cancel"])
async def test_left_by_force(how: str, note: Path, go: Path, lasting: None) -> None:
    """Left by an exception or a cancel the workers are killed; all their jobs are told, and none in a line begins."""
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        with scope, contextlib.suppress(KeyError):
            async with open_pool(2, allocate_timeout=1000.0, destroy_timeout=1000.0) as pool:
                await warm_up(pool, note.parent)
                callers = Callers(pool, nursery, note)
                await callers.front(0, ahead_jobs.act, "", str(go))
                await callers.front(1, ahead_jobs.act, "", str(go))
                await callers.come(*range(2, 60))
                assert ahead(pool) == [_roster.MOST_AHEAD] * 2
                go.touch()  # unseen: nothing is awaited
                if how == "error":
                    raise KeyError("mine")
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert pool.workers == ()
    began = [int(line) for line in lines(note)]
    assert len(began) == len(set(began))
    for number, found in callers.found.items():
        if found == number:  # answered before the end came
            assert number in began
        else:
            assert type(found) is trio.ClosedResourceError
    assert len(callers.found) == 60
    if how == "error":  # as many as could lie in the lines may have been answered in that moment, and no more
        assert sum(type(found) is int for found in callers.found.values()) <= 2 * (1 + _roster.MOST_AHEAD)


async def test_callers_inside_are_cancelled(note: Path, go: Path, lasting: None) -> None:
    """A cancel of callers and pool together: nobody hangs, and nothing that lay in a line begins."""
    with trio.CancelScope() as scope:
        async with open_pool(2, allocate_timeout=1000.0) as pool:
            await warm_up(pool, note.parent)
            async with trio.open_nursery() as nursery:
                callers = Callers(pool, nursery, note)
                await callers.front(0, ahead_jobs.act, "", str(go))
                await callers.front(1, ahead_jobs.act, "", str(go))
                await callers.come(*range(2, 60))
                scope.cancel()
    assert scope.cancelled_caught
    assert pool.workers == ()
    callers.assert_began(0, 1)
    assert pool.statistics().jobs == {"replied": 2, "cancelled": 60}


@pytest.mark.parametrize("soft", [True, False], ids=["stop", "kill"])
async def test_worker_ended_by_its_owner(soft: bool, note: Path, go: Path, lasting: None) -> None:
    """`Worker.stop` lets it finish the job in front, `Worker.kill` does not; what lies behind that is run once."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(*range(1, 8))
        assert ahead(pool) == [7]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.stop if soft else worker.kill)
            await trio.testing.wait_all_tasks_blocked()
            go.touch()
        await until(lambda: worker not in pool.workers)
        assert worker.state.value is (WorkerState.STOPPED if soft else WorkerState.ERRORED)
        await until(lambda: len(callers.found) == 8)
    if soft:
        callers.assert_own(0)
    else:
        assert isinstance(callers.found[0], WorkerCrashed)
        assert callers.found[0].started is True
    callers.assert_own(*range(1, 8))
    assert lines(note) == [str(number) for number in range(8)]


@pytest.mark.parametrize("number", [1, 2, 7, 100])
async def test_max_executions(number: int, note: Path, lasting: None) -> None:
    """No worker is given more jobs than `max_executions`, neither in front nor in its line."""
    async with open_pool(max_executions=number, limits=Limits(jitter=0.0), allocate_timeout=1000.0) as pool:
        await pool.run_sync(jobs.echo, 1)
        await until(lambda: all_idle(pool))
        async with trio.open_nursery() as nursery:
            callers = Callers(pool, nursery, note)
            for caller in range(20):
                nursery.start_soon(callers.run, caller, ahead_jobs.act_and_say)
    count = collections.Counter(line.split()[1] for line in lines(note))
    assert sum(count.values()) == len({line.split()[0] for line in lines(note)}) == 20
    assert max(count.values()) <= number
    assert [callers.found[caller][0] for caller in range(20)] == list(range(20))


@pytest.mark.parametrize("number", [2, 5])
async def test_max_executions_bounds_the_line(number: int, note: Path, go: Path, lasting: None) -> None:
    """In a line lie no more jobs than its worker may still begin; the others wait for its successor."""
    async with open_pool(max_executions=number, limits=Limits(jitter=0.0), allocate_timeout=1000.0) as pool:
        (worker,) = pool.workers
        await pool.run_sync(jobs.echo, 1)
        async with trio.open_nursery() as nursery:
            callers = Callers(pool, nursery, note)
            await callers.front(0, ahead_jobs.act, "", str(go))
            await callers.come(*range(1, 10))
            assert ahead(pool) == [number - 2]
            go.touch()
        callers.assert_own(*range(10))
        assert worker.state.num_execs == number
    callers.assert_began(*range(10))


CHANGES: Final[dict[str, dict[str, Any]]] = {
    "reset": {},
    "resize": {},
    "ttl": {"limits": Limits(ttl=0.2, jitter=0.5)},
    "max_executions": {"max_executions": 40, "limits": Limits(jitter=0.2)},
    "stop": {},
    "all": {"max_executions": 200, "limits": Limits(ttl=0.5, idle_ttl=0.05, exec_ttl=30.0)},
}


@pytest.mark.parametrize("patient", [True, False], ids=["lasting", "as it is"])
@pytest.mark.parametrize("change", CHANGES)
async def test_change_while_busy(change: str, patient: bool, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are replaced while many callers call: nobody notices, and each job is run once."""
    if patient:
        monkeypatch.setattr(_roster, "PATIENCE", LASTING)
    seen: set[int | None] = set()
    calls = 0
    over = False

    async def call(number: int) -> None:
        nonlocal calls
        while not over:
            calls += 1
            mine = calls
            assert await pool.run_sync(ahead_jobs.act, mine, str(note)) == mine
            seen.update(worker.pid for worker in pool.workers)

    async with open_pool(2, allocate_timeout=1000.0, **CHANGES[change]) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(call, number)
            await until(lambda: calls > 100)
            for turn in range(1, 5):
                if change in ("reset", "all"):
                    await pool.reset()
                if change in ("resize", "all"):
                    await pool.resize((1, 3, 2, 2)[turn - 1])
                if change in ("stop", "all"):
                    await pool.workers[-1].stop()
                before = calls
                await until(
                    lambda before=before, turn=turn: calls > before + 100 and (change != "ttl" or len(seen) > turn)
                )
            over = True
        assert pool.statistics().jobs == {"replied": calls}
        assert len(seen) > 2
        assert not set(pool.statistics().exits) & {"crashed", "cancelled", "killed"}
    assert sorted(map(int, lines(note))) == list(range(1, calls + 1))


async def test_reset_with_jobs_in_a_line(note: Path, go: Path, lasting: None) -> None:
    """A worker that is replaced by plan does the job it is at and those in its line, or they are run by the new one."""
    told = Told()
    async with opened(note, observer=told) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(*range(1, 20))
        assert ahead(pool) == [_roster.MOST_AHEAD]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.reset)
            await until(lambda: len(told.events) == 2)  # the new one is there
            go.touch()
        await until(lambda: worker not in pool.workers)
    callers.assert_own(*range(20))
    callers.assert_began(*range(20))


# what is no small call


async def test_nothing_lies_behind_what_is_large(note: Path, go: Path, lasting: None) -> None:
    """Streams, leases, large calls and chunks have a worker to themselves, in their turn; what comes behind waits."""
    async with opened(note) as (pool, callers):
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2)
        await callers.run(3, ahead_jobs.act_and_say, 0, b"x" * 100_000)
        await callers.come(4, 5)
        assert ahead(pool) == [2]

        async def stream() -> None:
            async with pool.stream(ahead_jobs.count, 6, str(note), 3) as parts:
                callers.found[6] = [part async for part in parts]

        async def lease() -> None:
            async with pool.lease() as worker:
                assert ahead(pool) == [0]
                callers.found[8] = await worker.run_sync(ahead_jobs.act, 8, str(note))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            await trio.testing.wait_all_tasks_blocked()
            await callers.come(7)
            nursery.start_soon(lease)
            await trio.testing.wait_all_tasks_blocked()
            await callers.come(9)
            assert ahead(pool) == [2]
            assert waits(pool) == 9
            go.touch()
    callers.assert_own(0, 1, 2, 4, 5, 7, 8, 9)
    assert callers.found[3][0] == 3
    assert len(callers.found[3][2]) == 100_000
    assert callers.found[6] == [(6, 0), (6, 1), (6, 2)]
    assert [line.split()[0] for line in lines(note)] == [str(number) for number in range(10)]


SIZES: Final = (0, 100, 4_000, 5_000, 17_000, 40_000, 100_000, 300_000, 1_000_000)


@pytest.mark.parametrize("patient", [True, False], ids=["lasting", "as it is"])
@pytest.mark.parametrize("seed", range(3))
async def test_all_kinds_at_once(seed: int, patient: bool, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny calls, large arguments, large results, streams, leases, maps and errors, mixed: each has its own."""
    if patient:
        monkeypatch.setattr(_roster, "PATIENCE", LASTING)
    chance = random.Random(seed)
    kinds = collections.Counter[str]()

    async def tiny(number: int) -> None:
        assert await pool.run_sync(ahead_jobs.act, number, str(note)) == number

    async def wrong(number: int) -> None:
        with pytest.raises(ValueError, match=rf"^bad {number}$"):
            await pool.run_sync(ahead_jobs.act, number, str(note), "raise")

    async def large(number: int) -> None:
        made, size = chance.choice([bytes, bytearray]), chance.choice(SIZES)
        given = made([number % 256]) * size
        found, _, back = await pool.run_sync(ahead_jobs.act_and_say, number, str(note), 0, given)
        assert (found, type(back)) == (number, made)
        assert back == given

    async def result(number: int) -> None:
        size = chance.choice(SIZES[1:])
        found, _, buffer = await pool.run_sync(ahead_jobs.act_and_say, number, str(note), size)
        assert (found, len(buffer)) == (number, size)

    async def stream(number: int) -> None:
        count = chance.choice([0, 1, 50])
        async with pool.stream(ahead_jobs.count, number, str(note), count) as parts:
            assert [part async for part in parts] == [(number, part) for part in range(count)]

    async def left(number: int) -> None:
        async with pool.stream(ahead_jobs.count, number, str(note), 1_000) as parts:
            assert await anext(parts) == (number, 0)

    async def lease(number: int) -> None:
        async with pool.lease() as worker:
            assert await worker.run_sync(ahead_jobs.act, number, str(note)) == number

    async def items(number: int) -> None:
        first = 1000 * (number + 1)
        async with pool.map(ahead_jobs.Act(str(note)), range(first, first + 300)) as results:
            assert [result async for result in results] == list(range(first, first + 300))
        await tiny(number)

    functions = [*[tiny] * 12, wrong, large, result, stream, left, lease, items]
    async with open_pool(2, allocate_timeout=1000.0) as pool:
        workers = pool.workers
        async with trio.open_nursery() as nursery:
            for number in range(200):
                function = chance.choice(functions)
                kinds[function.__name__] += 1
                nursery.start_soon(function, number)
                if not chance.randrange(20):
                    await trio.sleep(0.001)
        assert pool.workers == workers
        assert pool.statistics().exits == {}
    numbers = [int(line.split()[0]) for line in lines(note)]
    assert len(numbers) == len(set(numbers)) == 200 + 300 * kinds["items"]


# jobs that do what they had better not


@pytest.mark.parametrize(
    "function",
    [ahead_jobs.print_much, ahead_jobs.leave_threads, ahead_jobs.close_standard_streams, ahead_jobs.fork_and_return],
)
async def test_harmless(function: Callable[..., int], note: Path, go: Path, lasting: None) -> None:
    """A job that prints, leaves threads, closes its standard streams or comes back twice: no other one notices."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        for first in (0, 10):
            go.unlink(missing_ok=True)
            await callers.front(first, function, str(go))
            await callers.come(first + 1, first + 2)
            await callers.run(first + 3, function, str(go))
            await callers.come(first + 4, first + 5)
            assert ahead(pool) == [5]
            go.touch()
            await until(lambda first=first: len(callers.found) == first // 10 * 6 + 6)
        assert pool.workers == (worker,)
    callers.assert_own(*range(6), *range(10, 16))
    callers.assert_began(*range(6), *range(10, 16))


@pytest.mark.parametrize("how", ["stop", "crash", "cancel"])
async def test_a_child_that_keeps_the_descriptors(how: str, note: Path, go: Path, lasting: None) -> None:
    """A job's child has a copy of the packets' socket: it takes none from the line, and dies with its worker."""
    children = note.with_name("children")
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.fork_and_leave, str(go), str(children))
        await callers.come(1, 2)
        await callers.come(3, how={"stop": "", "crash": "kill", "cancel": "hang"}[how])
        await callers.come(4, 5)
        assert ahead(pool) == [5]
        go.touch()
        (child,) = await noted(children)
        if how == "cancel":
            await until(lambda: "3" in lines(note))
            callers.scopes[3].cancel()
        elif how == "stop":
            await until(lambda: len(callers.found) == 6)
            await worker.stop()
        await until(lambda: len(callers.found) == 6)
        await until(lambda: not runs(int(child)))
        await until(lambda: worker not in pool.workers)
    assert callers.found[3] == CANCELLED if how == "cancel" else how != "crash" or callers.found[3].started is True
    callers.assert_own(0, 1, 2, 4, 5)
    callers.assert_began(*range(6))


async def test_a_job_closes_the_packets(note: Path, go: Path, lasting: None) -> None:
    """Its answer is there, and then the worker can read no other job: those behind it are run by the replacement."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.close_sockets, str(go), False)
        await callers.come(*range(1, 6))
        assert ahead(pool) == [5]
        go.touch()
        await until(lambda: len(callers.found) == 6)
        await until(lambda: worker not in pool.workers)
    callers.assert_own(*range(6))
    callers.assert_began(*range(6))


@pytest.mark.parametrize("kinds", [(True,), (True, False)])
async def test_a_job_closes_the_relay(kinds: tuple[bool, ...], note: Path, go: Path, lasting: None) -> None:
    """Its answer reaches nobody, so it pays; those behind it are run by the replacement."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.close_sockets, str(go), *kinds)
        await callers.come(*range(1, 6))
        assert ahead(pool) == [5]
        go.touch()
        await until(lambda: len(callers.found) == 6)
        await until(lambda: worker not in pool.workers)
    assert isinstance(callers.found[0], WorkerCrashed)
    assert callers.found[0].started is True
    callers.assert_own(*range(1, 6))
    callers.assert_began(*range(6))


async def test_a_job_writes_to_the_relay(note: Path, go: Path, lasting: None) -> None:
    """What it writes there is its own error; those before it have their results, those behind it run elsewhere."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.act, "", str(go))
        await callers.come(1, 2)
        await callers.come(3, how="relay")
        await callers.come(4, 5)
        assert ahead(pool) == [5]
        go.touch()
        await until(lambda: len(callers.found) == 6)
        await until(lambda: worker not in pool.workers)
    assert isinstance(callers.found[3], RelayError)
    assert callers.found[3].pid == worker.pid
    callers.assert_own(0, 1, 2)
    callers.assert_own_or_lost(4, 5)
    callers.assert_began_or_lost(*range(6))


async def test_a_job_sends_packets(note: Path, go: Path, lasting: None) -> None:
    """Packets that nobody asked for are read by nobody, and keep nobody from anything."""
    async with opened(note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, ahead_jobs.write_packets, str(go))
        await callers.come(*range(1, 6))
        assert ahead(pool) == [5]
        go.touch()
        await until(lambda: len(callers.found) == 6)
        assert callers.found[0] > 0
        await callers.come(*range(6, 10))
        await until(lambda: len(callers.found) == 10)
        assert pool.workers == (worker,)
    callers.assert_own(*range(1, 10))
    callers.assert_began(*range(10))


async def test_a_job_steals_another(note: Path, go: Path, lasting: None) -> None:
    """A job that reads a packet which is for its worker takes it from its caller: nobody gets another one's answer."""
    async with opened(note) as (pool, callers):
        await callers.front(0, ahead_jobs.steal, str(go))
        await callers.come(*range(1, 6))
        assert ahead(pool) == [5]
        go.touch()
        await until(lambda: len(callers.found) == 6)
        assert callers.found[0] > 0
        assert isinstance(callers.found[1], RelayError)
    callers.assert_own_or_lost(2, 3, 4, 5)
    callers.assert_began_or_lost(0, 2, 3, 4, 5)
