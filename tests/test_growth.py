"""A pool that grows by itself: only where it helps, no further than it may, and back again.

On workers in memory and a clock that jumps; at the end, marked `faults`, on real processes.
"""

import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support import Floor, release
from tests.test_faults import until
from tests.test_pool_logic import ask, settle
from tests.test_reset import Callers, Outcome, Release, at_rest, check_ledger, pids, start
from trio_workers import (
    AllocateTimeout,
    Config,
    Limits,
    Payload,
    Pool,
    Restart,
    SpawnError,
    open_pool,
    open_python_pool,
)


def growing(old: Release, **fields: Any) -> Config:
    """One worker, and up to four."""
    fields = {"num_workers": 1, "max_workers": 4, "grow_after": 2.0, "allocate_timeout": math.inf, **fields}
    return old.config(restart=Restart(jitter=0.0), **fields)


async def all_done(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        await outcome.done.wait()
        assert outcome.error is None


# up


async def test_a_job_that_waits_gets_an_added_worker(autojump_clock: MockClock) -> None:
    """Growth: a worker is added when a job has waited for grow_after, not before, and that job gets it."""
    old = Release("old", took=1)
    async with open_pool(growing(old)) as pool, trio.open_nursery() as nursery:
        begun = trio.current_time()
        first = start(nursery, ask, pool, "sleep 100")
        await settle()
        second = start(nursery, ask, pool, "sleep 10")
        await trio.sleep(1.99)
        assert pool.statistics().starts == 1
        await trio.sleep(0.02)
        assert pool.statistics().starts == 2
        assert pool.statistics().target == 2
        assert pool.config.num_workers == 1
        await second.done.wait()
        assert trio.current_time() - begun == pytest.approx(2 + 1 + 10)
        await first.done.wait()
        assert pool.statistics().starts == 2


async def test_a_short_wait_adds_none(autojump_clock: MockClock) -> None:
    """Growth: waits shorter than grow_after add nobody, however many they are."""
    old = Release("old")
    async with open_pool(growing(old)) as pool, trio.open_nursery() as nursery:
        for _ in range(50):
            await all_done([start(nursery, ask, pool, "sleep 0.9") for _ in range(3)])
        assert pool.statistics().starts == 1


async def test_one_after_the_other_up_to_max_workers(autojump_clock: MockClock) -> None:
    """Growth: one worker each grow_after while jobs wait, max_workers at most, in the next slots."""
    floor, old = Floor(), Release("old", took=0.5)
    async with open_pool(growing(old), observer=floor) as pool, trio.open_nursery() as nursery:
        outcomes = [start(nursery, ask, pool, "sleep 100") for _ in range(10)]
        async with floor.watch(pool, every=0.5):
            for size in (2, 3, 4, 4, 4):
                await trio.sleep(2)
                await settle()
                assert pool.statistics().target == size
            assert [worker.slot for worker in pool.workers] == [0, 1, 2, 3]
            await all_done(outcomes)
        assert floor.highest == 4
        assert pool.statistics().starts == 4


async def test_no_growth_by_default(autojump_clock: MockClock) -> None:
    """Growth: without max_workers, or with as many as num_workers, a pool keeps its size."""
    old = Release("old")
    for most in (None, 2):
        async with open_pool(growing(old, num_workers=2, max_workers=most)) as pool, trio.open_nursery() as nursery:
            await all_done([start(nursery, ask, pool, "sleep 10") for _ in range(20)])
            assert pool.statistics().starts == 2


async def test_no_more_than_can_help(autojump_clock: MockClock) -> None:
    """Growth: never more workers come up than jobs wait."""
    old = Release("old", took=50)
    seen: list[tuple[int, int]] = []
    async with open_pool(growing(old, max_workers=100, grow_after=0.1)) as pool, trio.open_nursery() as nursery:
        outcomes = [start(nursery, ask, pool, "sleep 1000") for _ in range(4)]
        for _ in range(300):
            await trio.sleep(1)
            now = pool.statistics()
            seen.append((now.starting, now.waiting))
        assert pool.statistics().starts == 4
        await all_done(outcomes)
        assert pool.statistics().starts == 4
    assert all(starting <= waiting for starting, waiting in seen)
    assert (3, 3) in seen


async def test_no_herd(autojump_clock: MockClock) -> None:
    """Growth: 1,000 callers at once whose jobs are done before a worker could boot start none."""
    old = Release("old", took=5)
    cfg = growing(old, num_workers=2, max_workers=100, grow_after=0.1)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        begun = trio.current_time()
        await all_done([start(nursery, ask, pool, "sleep 0.002") for _ in range(1000)])
        assert trio.current_time() - begun == pytest.approx(1)
        assert pool.statistics().starts == 2
        # A few callers more do not need any either.
        await all_done([start(nursery, ask, pool, "sleep 0.5") for _ in range(3)])
        assert pool.statistics().starts <= 3


async def test_a_queue_that_does_not_drain(autojump_clock: MockClock) -> None:
    """Growth: jobs that seemed to be done before a worker could boot, and after the time of a boot are not, get one."""
    old = Release("old", took=5)
    cfg = growing(old, num_workers=2, max_workers=3, grow_after=0.1)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:

        async def call() -> None:
            while True:
                await ask(pool, "sleep 0.02")

        for _ in range(202):
            nursery.start_soon(call)
        await trio.sleep(4.9)
        assert pool.statistics().starts == 2
        await trio.sleep(1)
        assert pool.statistics().starts == 3
        nursery.cancel_scope.cancel()


async def test_a_herd_that_needs_them(autojump_clock: MockClock) -> None:
    """Growth: 1,000 callers at once with work for a long time get all that the pool may have, and are done sooner."""
    old = Release("old", took=1)
    cfg = growing(old, num_workers=2, max_workers=20, grow_after=0.1)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        begun = trio.current_time()
        await all_done([start(nursery, ask, pool, "sleep 1") for _ in range(1000)])
        assert trio.current_time() - begun < 70  # 500 s by two, 50 s by twenty
        assert pool.statistics().starts == 20


async def test_leases_and_streams_make_it_grow(autojump_clock: MockClock) -> None:
    """Growth: whoever waits counts, for a lease or a stream as well."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old, max_workers=3)) as pool:
        async with pool.lease() as first, pool.lease() as second, pool.stream(Payload(b"x")) as parts:
            assert [part.body async for part in parts] == [b"old"]
            assert {first.slot, second.slot} == {0, 1}
        assert pool.statistics().starts == 3


async def test_jobs_that_wait_for_a_while_and_leave(autojump_clock: MockClock) -> None:
    """Growth: callers who have left the queue when the time comes start nobody."""
    old = Release("old")
    async with open_pool(growing(old)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 100")
        await settle()
        for _ in range(20):
            with trio.move_on_after(1.5):
                await ask(pool)
            await trio.sleep(0.4)
        assert pool.statistics().starts == 1


async def test_not_while_boots_fail(autojump_clock: MockClock) -> None:
    """Growth: while added workers fail to boot no others are added; the pool serves on, and grows when they boot."""
    floor, old = Floor(), Release("old", took=0.1)
    async with open_pool(growing(old), observer=floor) as pool, trio.open_nursery() as nursery:
        old.bad = lambda number: True
        outcomes = [start(nursery, ask, pool, "sleep 10") for _ in range(12)]
        async with floor.watch(pool, every=0.1):
            await trio.sleep(62)
            now = pool.statistics()
            assert now.target == 2
            assert now.jobs == {"replied": 6}
            assert 3 <= now.failed_starts <= 12
            assert all(isinstance(error, SpawnError) for error in floor.of("ERROR"))
            old.bad = lambda number: False
            await all_done(outcomes)
        assert floor.lowest == 1
        assert pool.statistics().failed_starts == now.failed_starts


async def test_not_while_closing(autojump_clock: MockClock) -> None:
    """Growth: a pool whose block is left finishes what is there with the workers it has."""
    old = Release("old")
    async with trio.open_nursery() as nursery:
        async with open_pool(growing(old)) as pool:
            outcomes = [start(nursery, ask, pool, "sleep 5") for _ in range(4)]
            await settle()
        await all_done(outcomes)
        assert trio.current_time() == 20
        assert pool.statistics().starts == 1


async def test_allocate_timeout_counts_on(autojump_clock: MockClock) -> None:
    """Growth: it does not lengthen allocate_timeout for a caller."""
    old = Release("old", took=0.0)
    async with open_pool(growing(old, max_workers=2, allocate_timeout=5.0)) as pool, trio.open_nursery() as nursery:
        old.took = 50
        nursery.start_soon(ask, pool, "sleep 20")
        await settle()
        with pytest.raises(AllocateTimeout, match="1 starting"):
            await ask(pool)
        assert trio.current_time() == 5


# maps


async def test_a_map_makes_it_grow(autojump_clock: MockClock) -> None:
    """Growth: a map makes a pool grow, and uses the added workers; its long jobs don't run into allocate_timeout."""
    old = Release("old", took=0.5)
    cfg = growing(old, allocate_timeout=1.0)
    async with open_pool(cfg) as pool:
        begun = trio.current_time()
        async with pool.map(Payload(b"sleep 20") for _ in range(40)) as replies:
            assert [reply.body async for reply in replies] == [b"old"] * 40
        assert pool.statistics().target == 4
        assert trio.current_time() - begun < 240  # 800 s by one, 200 s by four
        assert pool.statistics().jobs == {"replied": 40}


async def test_a_map_of_few(autojump_clock: MockClock) -> None:
    """Growth: a map of two items adds no more than one worker, and one of quick jobs none."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old)) as pool:
        async with pool.map(Payload(b"sleep 0.01") for _ in range(100)) as replies:
            assert len([reply async for reply in replies]) == 100
        assert pool.statistics().starts == 1
        async with pool.map(Payload(b"sleep 50") for _ in range(2)) as replies:
            assert len([reply async for reply in replies]) == 2
        assert pool.statistics().starts == 2


async def test_a_map_beside_callers(autojump_clock: MockClock) -> None:
    """Growth: jobs of a map and of other callers share the added workers; each is answered once."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old)) as pool, trio.open_nursery() as nursery:
        callers = [start(nursery, ask, pool, "sleep 5") for _ in range(10)]
        async with pool.map(Payload(b"sleep 3") for _ in range(30)) as replies:
            assert len([reply async for reply in replies]) == 30
        await all_done(callers)
        assert pool.statistics().target == 4
        assert pool.statistics().jobs == {"replied": 40}


# down


async def grow(pool: Pool, count: int = 12, text: str = "sleep 10") -> None:
    async with trio.open_nursery() as nursery:
        await all_done([start(nursery, ask, pool, text) for _ in range(count)])


async def test_it_shrinks_after_a_minute(autojump_clock: MockClock) -> None:
    """Growth: who was free all the time over the last 60 s goes, from the highest slot down to num_workers."""
    floor, old = Floor(), Release("old", took=0.5)
    async with open_pool(growing(old, num_workers=2), observer=floor) as pool:
        before = pids(pool)
        await grow(pool)
        assert pool.statistics().target == 4
        async with floor.watch(pool, every=1.0):
            await trio.sleep(30)
            assert pool.statistics().target == 4
            await trio.sleep(100)
            assert at_rest(pool, 2)
        assert pids(pool) == before
        assert floor.lowest == 2
        assert floor.of("DESTRUCT") == ["shrink"] * 2
        assert pool.statistics().exits == {"shrink": 2}
        await trio.sleep(1000)
        assert at_rest(pool, 2)


async def test_it_shrinks_over_idle_ttl(autojump_clock: MockClock) -> None:
    """Growth: idle_ttl is the time it looks over, where there is one."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old, limits=Limits(idle_ttl=15.0))) as pool:
        await grow(pool)
        assert pool.statistics().target == 4
        await trio.sleep(4)
        assert pool.statistics().target == 4
        await trio.sleep(27)
        assert pool.statistics().target == 1
        assert pool.statistics().exits["shrink"] == 3


async def test_those_that_are_needed_stay(autojump_clock: MockClock) -> None:
    """Growth: it keeps as many as were at work at once over that time."""
    old = Release("old", took=0.5)
    async with (
        open_pool(growing(old, limits=Limits(idle_ttl=20.0, jitter=0.0))) as pool,
        trio.open_nursery() as nursery,
    ):
        await grow(pool)
        assert pool.statistics().target == 4

        async def call() -> None:
            while True:
                await ask(pool, "sleep 3")
                await trio.sleep(1)

        for _ in range(2):
            nursery.start_soon(call)
        await trio.sleep(200)
        assert pool.statistics().target == 2
        nursery.cancel_scope.cancel()


async def test_a_peak_in_each_window_keeps_all(autojump_clock: MockClock) -> None:
    """Growth: the low-water mark counts, not the mean: all that were at work for one moment of it stay."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old, limits=Limits(idle_ttl=20.0, jitter=0.0))) as pool:
        await grow(pool)
        for _ in range(20):
            await trio.sleep(10)
            await grow(pool, 4, "sleep 0.1")
        assert pool.statistics().target == 4
        assert "shrink" not in pool.statistics().exits


async def test_it_grows_again(autojump_clock: MockClock) -> None:
    """Growth: up and down again and again; slots are always 0 to n-1."""
    floor, old = Floor(), Release("old", took=0.5)
    async with open_pool(growing(old, limits=Limits(idle_ttl=15.0)), observer=floor) as pool:
        async with floor.watch(pool, every=0.5):
            for _ in range(5):
                await grow(pool)
                assert pool.statistics().target == 4
                await trio.sleep(31)
                assert pool.statistics().target == 1
        assert floor.lowest == 1
        assert pool.statistics().exits["shrink"] == 15


async def test_a_grown_pool_heals(autojump_clock: MockClock) -> None:
    """Growth: an added worker that dies is replaced like any other."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old)) as pool:
        await grow(pool)
        await pool.workers[3].kill()
        await trio.sleep(1)
        assert [worker.slot for worker in pool.workers] == [0, 1, 2, 3]
        assert pool.statistics().idle == 4


# with reset and resize


async def test_reset_of_a_grown_pool(autojump_clock: MockClock) -> None:
    """Growth: a reset replaces added workers, too, and keeps their number; with a config it is that one's."""
    floor, old, new = Floor(), Release("old", took=0.5), Release("new", took=0.5)
    async with open_pool(growing(old), observer=floor) as pool:
        await grow(pool)
        before = pids(pool)
        async with floor.watch(pool, every=0.1):
            await pool.reset()
            assert not set(before) & set(pids(pool))
            assert floor.lowest == 4
            assert pool.statistics().target == 4
            assert pool.config.num_workers == 1
            await pool.reset(growing(new, num_workers=2))
        assert at_rest(pool, 2)
        assert {await ask(pool) for _ in range(5)} == {"new"}
        await grow(pool)
        assert pool.statistics().target == 4


async def test_resize_of_a_grown_pool(autojump_clock: MockClock) -> None:
    """Growth: a resize says how many there are now and at least; it grows on from there."""
    old = Release("old", took=0.5)
    async with open_pool(growing(old)) as pool:
        await grow(pool)
        assert pool.statistics().target == 4
        await pool.resize(2)
        assert at_rest(pool, 2)
        await grow(pool)
        assert pool.statistics().target == 4
        await trio.sleep(200)
        assert at_rest(pool, 2)


async def test_growth_while_a_reset_runs(autojump_clock: MockClock) -> None:
    """Growth: jobs that wait while a reset runs make the pool grow all the same; both come to their end."""
    floor, old, new = Floor(), Release("old", took=3), Release("new", took=3)
    async with open_pool(growing(old, num_workers=2), observer=floor) as pool, trio.open_nursery() as nursery:
        async with floor.watch(pool, every=0.1):
            outcomes = [start(nursery, ask, pool, "sleep 5") for _ in range(40)]
            await settle()
            await pool.reset(growing(new, num_workers=2))
            assert {await ask(pool) for _ in range(5)} == {"new"}
            await all_done(outcomes)
        assert floor.lowest == 2
        assert pool.statistics().jobs == {"replied": 45}


# real processes


def meet_and_give_pid(directory: str, count: int) -> int:
    """Wait until so many processes are at it, and return our pid."""
    Path(directory, str(os.getpid())).touch()
    while len(os.listdir(directory)) < count:
        time.sleep(0.002)
    return os.getpid()


@pytest.mark.faults
async def test_growth_of_processes(tmp_path: Path) -> None:
    """Growth: processes are added under load, and go when it is over; every job is answered once."""
    floor, ledger = Floor(), tmp_path / "ledger"
    cfg = release("old", ledger, num_workers=1, max_workers=3, grow_after=0.02, limits=Limits(idle_ttl=0.2, jitter=0.0))
    async with open_pool(cfg, observer=floor) as pool:
        callers = Callers(pool, 8, "sleep 0.05")
        async with callers(), floor.watch(pool):
            await until(lambda: pool.statistics().busy == 3)
            await callers.more(20)
        await until(lambda: at_rest(pool, 1))
        assert floor.lowest == 1
        assert pool.statistics().exits["shrink"] == 2
    check_ledger(ledger, callers)
    assert len({pid for _, pid in callers.answers}) >= 3
    assert floor.of("ERROR") == []


@pytest.mark.faults
async def test_growth_of_functions(tmp_path: Path) -> None:
    """Growth: a pool of functions has it, too, for calls and maps."""
    limits = Limits(idle_ttl=0.2, jitter=0.0)
    async with open_python_pool(1, max_workers=3, grow_after=0.02, limits=limits, boot_timeout=30.0) as pool:
        used: set[int] = set()
        async with pool.map(meet_and_give_pid, itertools.repeat(str(tmp_path)), itertools.repeat(2)) as results:
            async for pid in results:
                used.add(pid)
                if len(used) == 2:
                    break
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(pool.run_sync, meet_and_give_pid, str(tmp_path), 3)
        await until(lambda: pool.statistics().target == len(pool.workers) == 1)
        assert await pool.run_sync(os.getpid) == pool.workers[0].pid
