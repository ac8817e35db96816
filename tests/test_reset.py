"""`reset` and `resize`: replacement by plan loses no job and no capacity, and what can't boot changes nothing.

The first half runs on workers in memory and a clock that jumps; the second, marked `faults`, on real processes.
"""

import contextlib
import functools
import itertools
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests import python_pool_jobs as jobs
from tests.support import RELEASE, ROOT, Floor, ask_release, release
from tests.test_contract import DIALECTS, factory_of
from tests.test_faults import until
from tests.test_pool_logic import ask, config, settle, work
from trio_workers import (
    AllocateTimeout,
    Config,
    JobTimeout,
    Limits,
    Payload,
    Pool,
    PythonPool,
    QueueFull,
    Restart,
    RestartLimitExceeded,
    SocketFactory,
    Spawner,
    SpawnError,
    WorkerError,
    WorkerEvent,
    open_pool,
    open_python_pool,
)
from trio_workers.child import Job
from trio_workers.testing import BadBoot, MemoryFactory

FACTORIES: Final = ("pipe", "socketpair", "unix", "tcp", "pipe")


class Release:
    """Workers in memory that answer with the name of their release; how they boot can be changed meanwhile."""

    def __init__(self, name: str, *, took: float = 0.0, bad: Callable[[int], bool] = lambda count: False) -> None:
        self.name = name
        self.took = took
        self.bad = bad
        self.boots = 0

    async def handle(self, job: Job) -> bytes:
        await work(job)
        return self.name.encode()

    async def boot(self, slot: int) -> None:
        self.boots += 1
        number = self.boots
        await trio.sleep(self.took)
        if self.bad(number):
            raise BadBoot(f"{self.name} is broken")

    def config(self, **fields: Any) -> Config:
        return config(self.handle, boot=self.boot, **{"num_workers": 3, **fields})


class Outcome:
    """What became of a call in a task of its own."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.at = 0.0

    async def run(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            with self.scope:
                await function(*args)
        except Exception as error:
            self.error = error
        self.at = trio.current_time()
        self.done.set()


def start(nursery: trio.Nursery, function: Callable[..., Any], *args: Any) -> Outcome:
    outcome = Outcome()
    nursery.start_soon(outcome.run, function, *args)
    return outcome


def pids(pool: Any) -> list[int | None]:
    return [worker.pid for worker in pool.workers]


def at_rest(pool: Any, size: int) -> bool:
    """Whether a pool has that many workers, in the first slots, all free, and aims for no other number."""
    now = pool.statistics()
    return (
        (now.target, now.idle, len(pool.workers)) == (size, size, size)
        and [worker.slot for worker in pool.workers] == list(range(size))
        and getattr(pool, "config", pool._core.config).num_workers == size
    )


async def load(pool: Pool, told: list[str], text: str = "sleep 0.1") -> None:
    """Call again and again, until cancelled; the release of each answer is kept."""
    while True:
        told.append(await ask(pool, text))


# what a reset does


async def test_reset_replaces_every_worker(autojump_clock: MockClock) -> None:
    """Reset: afterwards all workers are fresh, one was replaced at a time, and no moment had fewer than before."""
    floor, old = Floor(), Release("old", took=1.0)
    async with open_pool(old.config(), observer=floor) as pool:
        before = pids(pool)
        async with floor.watch(pool, every=0.05):
            await pool.reset()
            assert at_rest(pool, 3)
        assert not set(before) & set(pids(pool))
        assert floor.lowest == 3
        assert floor.highest == 4
        assert trio.current_time() == pytest.approx(4)  # one boot to open, and one after the other to replace three
        assert floor.of("DESTRUCT") == ["reset"] * 3
        assert floor.of("ERROR") == []
        assert pool.statistics().exits == {"reset": 3}
        assert pool.statistics().restarts == {0: 1, 1: 1, 2: 1}


async def test_a_large_pool_replaces_one_in_eight(autojump_clock: MockClock) -> None:
    """Reset: of a large pool a share is replaced at a time, and still none is missing."""
    floor, old = Floor(), Release("old", took=1.0)
    async with open_pool(old.config(num_workers=24), observer=floor) as pool:
        begun = trio.current_time()
        async with floor.watch(pool, every=0.05):
            await pool.reset()
        assert floor.lowest == 24
        assert floor.highest == 27
        assert trio.current_time() - begun == pytest.approx(8)


async def test_under_load_no_old_worker_answers_afterwards(autojump_clock: MockClock) -> None:
    """Reset: callers notice nothing but the new answers; after it has returned there are no others."""
    floor, old, new = Floor(), Release("old", took=0.5), Release("new", took=0.5)
    told: list[str] = []
    async with open_pool(old.config(), observer=floor) as pool, trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(load, pool, told)
        async with floor.watch(pool, every=0.05):
            await trio.sleep(1)
            await pool.reset(new.config())
            returned = len(told)
            await trio.sleep(1)
        assert set(told[:returned]) == {"old", "new"}
        assert set(told[returned:]) == {"new"}
        assert floor.lowest == 3
        assert set(pool.statistics().jobs) == {"replied"}
        nursery.cancel_scope.cancel()


async def test_the_target_is_set_at_once(autojump_clock: MockClock) -> None:
    """Reset: from the call on the pool's config is the new one; what is awaited is the waiting."""
    old, new = Release("old"), Release("new", took=10)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        cfg = new.config(num_workers=4, max_queue=7, allocate_timeout=3.0)
        outcome = start(nursery, pool.reset, cfg)
        await settle()
        assert pool.config is cfg
        assert pool.statistics().target == 4
        assert not outcome.done.is_set()
        assert await ask(pool) == "old"
        await outcome.done.wait()
        assert outcome.error is None
        assert pool.config is cfg
        assert at_rest(pool, 4)


@pytest.mark.parametrize(("before", "after"), [(3, 5), (3, 1), (1, 4), (4, 4)])
async def test_to_another_number(before: int, after: int, autojump_clock: MockClock) -> None:
    """Reset: the number of workers may change with it, and is never below the smaller of the two."""
    floor, old, new = Floor(), Release("old", took=0.5), Release("new", took=0.5)
    async with open_pool(old.config(num_workers=before), observer=floor) as pool, trio.open_nursery() as nursery:
        told: list[str] = []
        for _ in range(6):
            nursery.start_soon(load, pool, told)
        await trio.sleep(1)
        async with floor.watch(pool, every=0.05):
            await pool.reset(new.config(num_workers=after))
            assert pool.config.num_workers == pool.statistics().target == after
            assert [worker.slot for worker in pool.workers] == list(range(after))
        assert floor.lowest >= min(before, after)
        returned = len(told)
        await trio.sleep(1)
        assert set(told[returned:]) == {"new"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(DIALECTS, 2)))
async def test_to_another_dialect(before: str, after: str, autojump_clock: MockClock) -> None:
    """Reset: jobs that wait are encoded for whichever worker they get, those of a lease and a map among them."""
    old, new = Release("old", took=0.5), Release("new", took=0.5)
    async with (
        open_pool(old.config(num_workers=2, protocol=before)) as pool,
        trio.open_nursery() as nursery,
    ):
        got: list[Payload] = []

        async def call(number: int) -> None:
            got.append(await pool.exec(Payload(b"sleep 0.3", b"%d" % number)))

        async def lease() -> None:
            async with pool.lease() as worker:
                got.extend([await worker.exec(Payload(b"sleep 0.3")) for _ in range(5)])

        async def take_map() -> None:
            async with pool.map(Payload(b"sleep 0.3") for _ in range(10)) as replies:
                got.extend([reply async for reply in replies])

        nursery.start_soon(lease)
        nursery.start_soon(take_map)
        for number in range(20):
            nursery.start_soon(call, number)
        await settle()
        assert pool.statistics().waiting > 18
        await pool.reset(new.config(num_workers=2, protocol=after))
        assert {await ask(pool) for _ in range(4)} == {"new"}
    assert Counter(payload.body for payload in got).keys() == {b"old", b"new"}
    assert len(got) == 35
    assert pool.statistics().jobs == {"replied": 39}


async def test_fields_for_the_jobs_to_come(autojump_clock: MockClock) -> None:
    """Reset: the bounds of queue, time and size that count are those of the config that was given last."""
    old, new = Release("old"), Release("new")
    async with open_pool(old.config(num_workers=1)) as pool, trio.open_nursery() as nursery:
        await pool.exec(Payload(b"x" * 200))
        await pool.reset(
            new.config(num_workers=1, max_queue=1, allocate_timeout=2.0, max_frame_size=100, max_executions=3)
        )
        with pytest.raises(ValueError, match="max_frame_size"):
            await pool.exec(Payload(b"x" * 200))
        for _ in range(6):
            await ask(pool)
        await settle()
        assert pool.statistics().exits == {"reset": 1, "max_executions": 2}
        nursery.start_soon(ask, pool, "sleep 10")
        await settle()
        begun = trio.current_time()
        waiting = start(nursery, ask, pool)
        await settle()
        with pytest.raises(QueueFull):
            await ask(pool)
        await waiting.done.wait()
        assert isinstance(waiting.error, AllocateTimeout)
        assert waiting.at - begun == 2


async def test_to_another_destroy_timeout(autojump_clock: MockClock) -> None:
    """Reset: a worker is ended as its own config says."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"part"
        await trio.sleep_forever()

    async with open_pool(config(handler, destroy_timeout=50.0)) as pool:
        await pool.reset(config(handler, destroy_timeout=2.0))
        async with pool.stream(Payload()) as parts:
            await anext(parts)
    assert trio.current_time() == 2


async def test_to_other_limits(autojump_clock: MockClock) -> None:
    """Reset: the limits of the new config hold for its workers, and go away with it."""
    old = Release("old")
    async with open_pool(old.config(num_workers=1)) as pool:
        await ask(pool, "sleep 100")
        await pool.reset(old.config(num_workers=1, limits=Limits(exec_ttl=3.0, ttl=50.0, jitter=0.0)))
        with pytest.raises(JobTimeout, match="exec_ttl"):
            await ask(pool, "sleep 100")
        await trio.sleep(51)
        assert pool.statistics().exits == {"reset": 1, "exec_ttl": 1, "ttl": 1}
        await pool.reset(old.config(num_workers=1))
        await ask(pool, "sleep 1000")
        assert pool.statistics().exits == {"reset": 2, "exec_ttl": 1, "ttl": 1}


async def test_to_debug_and_back(autojump_clock: MockClock) -> None:
    """Reset: to `debug` there is no worker left but for jobs; back again all stand ready. No job is lost."""
    old, new = Release("old", took=0.2), Release("new", took=0.2)
    told: list[str] = []
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(load, pool, told)
        await trio.sleep(1)
        await pool.reset(new.config(debug=True))
        assert pool.config.debug
        returned = len(told)
        await trio.sleep(2)
        assert set(told[returned:]) == {"new"}
        assert len(pool.workers) <= 3
        await pool.reset(old.config())
        returned = len(told)
        await trio.sleep(1)
        assert set(told[returned:]) == {"old"}
        nursery.cancel_scope.cancel()
    assert set(pool.statistics().jobs) <= {"replied", "cancelled"}
    assert pool.statistics().jobs["cancelled"] <= 6


async def test_debug_and_idle(autojump_clock: MockClock) -> None:
    """Reset: an idle pool has no worker with `debug`, and all of them without it."""
    old = Release("old", took=1.0)
    async with open_pool(old.config()) as pool:
        await pool.reset(old.config(debug=True))
        assert pool.workers == ()
        assert await ask(pool) == "old"
        await pool.reset(old.config(num_workers=2))
        assert at_rest(pool, 2)


# what it does not disturb


async def test_a_leased_worker_is_replaced_after_its_lease(autojump_clock: MockClock) -> None:
    """Reset: it waits for a lease, whose holder keeps the worker and all it has in it."""
    old, new = Release("old"), Release("new")
    async with open_pool(old.config(num_workers=2)) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as worker:
            outcome = start(nursery, pool.reset, new.config(num_workers=2))
            for _ in range(5):
                assert (await worker.exec(Payload(b"sleep 1"))).body == b"old"
            assert not outcome.done.is_set()
            assert {await ask(pool) for _ in range(3)} == {"new"}
        await outcome.done.wait()
        assert outcome.error is None
        assert outcome.at == 5
        assert at_rest(pool, 2)
        await worker.wait()
    assert pool.statistics().exits == {"reset": 2, "closing": 2}


async def test_a_stream_goes_on(autojump_clock: MockClock) -> None:
    """Reset: a stream that runs comes to its end on its old worker."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        for number in range(5):
            yield b"%d" % number
            await trio.sleep(1)

    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        async with pool.stream(Payload()) as parts:
            first = await anext(parts)
            outcome = start(nursery, pool.reset)
            assert [first.body, *[part.body async for part in parts]] == [b"0", b"1", b"2", b"3", b"4"]
            assert not outcome.done.is_set() or outcome.at == 5
        await outcome.done.wait()
        assert outcome.error is None
    assert pool.statistics().jobs == {"replied": 1}


async def test_a_map_goes_on(autojump_clock: MockClock) -> None:
    """Reset: a map under way comes to its end, in its order, on old workers and new ones."""
    old, new = Release("old", took=0.3), Release("new", took=0.3)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        outcomes: list[Outcome] = []
        answers: list[bytes] = []
        async with pool.map(Payload(b"sleep 0.2") for _ in range(40)) as replies:
            async for reply in replies:
                if not answers:
                    outcomes.append(start(nursery, pool.reset, new.config()))
                answers.append(reply.body)
        assert len(answers) == 40
        assert (answers[0], answers[-1]) == (b"old", b"new")
        await outcomes[0].done.wait()
        assert outcomes[0].error is None


async def test_a_worker_that_crashes_meanwhile(autojump_clock: MockClock) -> None:
    """Reset: crashes of jobs while it runs are theirs alone; it comes to its end."""
    old, new = Release("old", took=0.5), Release("new", took=0.5)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        outcome = start(nursery, pool.reset, new.config())
        for _ in range(20):
            await trio.sleep(0.15)
            with pytest.raises(WorkerError):
                await ask(pool, "crash 3")
        await outcome.done.wait()
        assert outcome.error is None
        assert {await ask(pool) for _ in range(6)} == {"new"}


# what can't boot


@pytest.mark.parametrize("fails_at", [1, 2, 3])
async def test_what_cannot_boot_changes_nothing(fails_at: int, autojump_clock: MockClock) -> None:
    """Reset: the SpawnError of the first failed boot comes out, those replaced already are old ones again."""
    floor = Floor()
    old, new = Release("old", took=0.2), Release("new", took=0.2, bad=lambda number: number >= fails_at)
    async with open_pool(old.config(), observer=floor) as pool:
        before, cfg = pids(pool), pool.config
        async with floor.watch(pool, every=0.05):
            with pytest.raises(SpawnError, match="before it was ready") as caught:
                await pool.reset(new.config(num_workers=5, max_queue=0))
            assert caught.value.stderr == "new is broken"
            assert caught.value.phase == "handshake"
            assert caught.value.started is False
            assert pool.config is cfg
            assert pool.statistics().target == 3
            await trio.sleep(5)
        assert floor.lowest == 3
        assert at_rest(pool, 3)
        assert {await ask(pool) for _ in range(6)} == {"old"}
        # Two more slots were to be filled, side by side with the first replacement.
        assert len(set(before) & set(pids(pool))) >= 3 - (fails_at - 1)
        assert pool.statistics().failed_starts == 1
        new.bad = lambda number: False
        await pool.reset(new.config())
        assert {await ask(pool) for _ in range(6)} == {"new"}
        assert at_rest(pool, 3)


async def test_an_observer_sees_the_one_or_the_other(autojump_clock: MockClock) -> None:
    """Reset: whatever an observer is told, the pool's config and its number of workers are of one plan by then."""
    old, new = Release("old", took=0.2), Release("new", took=0.2, bad=lambda number: number == 2)
    seen: list[tuple[str, int, int]] = []

    def observe(event: WorkerEvent, worker: object, context: object) -> None:
        seen.append((event.name, pool.config.num_workers, pool.statistics().target))

    opened = False
    async with open_pool(old.config(), observer=lambda *what: opened and observe(*what)) as pool:
        opened = True
        with pytest.raises(SpawnError):
            await pool.reset(new.config(num_workers=5))
        await trio.sleep(5)
        assert ("ERROR", 3, 3) in seen
        assert {(size, target) for _, size, target in seen} <= {(5, 5), (3, 3)}
        opened = False


async def test_a_failed_first_boot_keeps_the_very_workers(autojump_clock: MockClock) -> None:
    """Reset: where the first boot fails no worker was touched, and jobs ran on all the time."""
    old, new = Release("old", took=0.2), Release("new", took=0.2, bad=lambda number: True)
    told: list[str] = []
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        before, cfg = pids(pool), pool.config
        for _ in range(5):
            nursery.start_soon(load, pool, told)
        for _ in range(3):
            with pytest.raises(SpawnError) as caught:
                await pool.reset(new.config())
            assert caught.value.slot == 0
            assert pids(pool) == before
            assert pool.config is cfg
            await trio.sleep(1)
        assert set(told) == {"old"}
        assert new.boots == 3
        nursery.cancel_scope.cancel()


async def test_boot_timeout_of_the_new(autojump_clock: MockClock) -> None:
    """Reset: new workers that never answer are given up after their own boot_timeout."""
    old, new = Release("old"), Release("new", took=1000)
    async with open_pool(old.config(boot_timeout=500.0)) as pool:
        with pytest.raises(SpawnError, match="boot_timeout") as caught:
            await pool.reset(new.config(boot_timeout=7.0))
        assert trio.current_time() == 7
        assert caught.value.phase == "handshake"
        assert at_rest(pool, 3)


async def test_the_same_that_no_longer_boots(autojump_clock: MockClock) -> None:
    """Reset: without a config the same holds, and workers that were replaced already count as good as the others."""
    old = Release("old", bad=lambda number: number >= 5)
    async with open_pool(old.config()) as pool:
        before = pids(pool)
        with pytest.raises(SpawnError):
            await pool.reset()
        await trio.sleep(100)
        assert at_rest(pool, 3)
        assert len(set(before) & set(pids(pool))) == 2  # one was replaced before a boot failed
        assert old.boots == 5


async def test_a_repair(autojump_clock: MockClock) -> None:
    """Reset: a pool whose workers no longer boot is repaired by it at once, whatever its back-off is."""
    old, new = Release("old"), Release("new", took=0.5)
    restart = Restart(initial=100.0, maximum=100.0, jitter=0.0)
    async with open_pool(old.config(restart=restart, allocate_timeout=30.0)) as pool, trio.open_nursery() as nursery:
        old.bad = lambda number: True
        for worker in pool.workers:
            await worker.kill()
        await trio.sleep(1)
        assert pool.workers == ()
        waiting = start(nursery, ask, pool)
        await settle()
        begun = trio.current_time()
        await pool.reset(new.config())
        assert trio.current_time() - begun == pytest.approx(0.5)
        await waiting.done.wait()
        assert waiting.error is None
        assert waiting.at - begun == pytest.approx(0.5)
        assert at_rest(pool, 3)


async def test_a_repair_of_workers_that_hang_at_their_start(autojump_clock: MockClock) -> None:
    """Reset: it does not wait for boots of what it replaces, be it the old or an earlier reset's."""
    old, first, new = Release("old"), Release("first", took=1000), Release("new", took=1)
    async with open_pool(old.config(boot_timeout=500.0)) as pool, trio.open_nursery() as nursery:
        old.took = 1000
        await pool.workers[1].kill()
        await trio.sleep(5)
        assert pool.statistics().starting == 1
        outcome = start(nursery, pool.reset, first.config(boot_timeout=500.0))
        await trio.sleep(5)
        begun = trio.current_time()
        await pool.reset(new.config())
        assert trio.current_time() - begun < 10
        await outcome.done.wait()
        assert outcome.error is None
        assert at_rest(pool, 3)
        assert {await ask(pool) for _ in range(6)} == {"new"}


async def test_a_repair_that_does_not_help(autojump_clock: MockClock) -> None:
    """Reset: of a pool without any worker, to one that can't boot either, is that error; the next may help."""
    old, new = Release("old"), Release("new", bad=lambda number: True)
    restart = Restart(initial=100.0, maximum=100.0, jitter=0.0)
    async with open_pool(old.config(restart=restart)) as pool:
        old.bad = lambda number: True
        for worker in pool.workers:
            await worker.kill()
        for _ in range(2):
            with pytest.raises(SpawnError) as caught:
                await pool.reset(new.config())
            assert caught.value.stderr == "new is broken"
        old.bad = lambda number: False
        await pool.reset()
        assert at_rest(pool, 3)
        assert await ask(pool) == "old"


# more than one at a time


async def test_a_second_reset_takes_over(autojump_clock: MockClock) -> None:
    """Reset: a second one while one runs takes over from it; both return when its workers are there."""
    old, first, second = Release("old", took=1), Release("first", took=1), Release("second", took=1)
    floor = Floor()
    async with open_pool(old.config(), observer=floor) as pool, trio.open_nursery() as nursery:
        async with floor.watch(pool, every=0.05):
            outcomes = [start(nursery, pool.reset, first.config(num_workers=4))]
            await trio.sleep(1.5)
            assert await ask(pool) in ("old", "first")
            cfg = second.config(num_workers=2)
            outcomes.append(start(nursery, pool.reset, cfg))
            await settle()
            assert pool.config is cfg
            for outcome in outcomes:
                await outcome.done.wait()
                assert outcome.error is None
        assert outcomes[0].at == outcomes[1].at
        assert pool.config is cfg
        assert at_rest(pool, 2)
        assert {await ask(pool) for _ in range(5)} == {"second"}
        assert floor.lowest >= 2


async def test_two_resets_in_one_moment(autojump_clock: MockClock) -> None:
    """Reset: of two in one pass of the run loop one counts, for the config and for all workers."""
    old, first, second = Release("old"), Release("first"), Release("second")
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        both = {to.name: to.config(name=to.name) for to in (first, second)}
        outcomes = [start(nursery, pool.reset, cfg) for cfg in both.values()]
        for outcome in outcomes:
            await outcome.done.wait()
            assert outcome.error is None
        assert at_rest(pool, 3)
        assert {await ask(pool) for _ in range(6)} == {pool.config.name}
        assert pool.config is both[pool.config.name]


async def test_the_later_of_two_resets_fails(autojump_clock: MockClock) -> None:
    """Reset: where the later one can't boot both get its SpawnError, and the pool is as it was before the first."""
    old, first = Release("old", took=1), Release("first", took=1)
    second = Release("second", took=1, bad=lambda number: True)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        cfg = pool.config
        outcomes = [start(nursery, pool.reset, first.config(num_workers=5))]
        await trio.sleep(1.5)
        outcomes.append(start(nursery, pool.reset, second.config(num_workers=2)))
        for outcome in outcomes:
            await outcome.done.wait()
            assert isinstance(outcome.error, SpawnError)
            assert outcome.error.stderr == "second is broken"
        assert outcomes[0].error is not outcomes[1].error
        assert pool.config is cfg
        assert pool.statistics().target == 3
        await trio.sleep(20)
        assert at_rest(pool, 3)
        assert {await ask(pool) for _ in range(6)} == {"old"}


async def test_an_earlier_one_that_fails_after_it_was_taken_over(autojump_clock: MockClock) -> None:
    """Reset: what the first could not boot is no matter any more once the second has taken over."""
    old, second = Release("old"), Release("second", took=1)
    first = Release("first", took=2, bad=lambda number: True)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        outcomes = [start(nursery, pool.reset, first.config())]
        await trio.sleep(1)
        outcomes.append(start(nursery, pool.reset, second.config()))
        for outcome in outcomes:
            await outcome.done.wait()
            assert outcome.error is None
        assert at_rest(pool, 3)
        assert {await ask(pool) for _ in range(6)} == {"second"}


@pytest.mark.parametrize("reset_first", [True, False])
@pytest.mark.parametrize("size", [1, 5])
async def test_reset_and_resize_together(reset_first: bool, size: int, autojump_clock: MockClock) -> None:
    """Reset: with a resize beside it both hold, whichever came first; the later number of workers counts."""
    old, new = Release("old", took=1), Release("new", took=1)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        calls: list[tuple[Any, Any]] = [(pool.reset, new.config(num_workers=4)), (pool.resize, size)]
        outcomes: list[Outcome] = []
        for call in calls if reset_first else reversed(calls):
            outcomes.append(start(nursery, *call))
            await trio.sleep(0.5)
        for outcome in outcomes:
            await outcome.done.wait()
            assert outcome.error is None
        assert at_rest(pool, size if reset_first else 4)
        assert {await ask(pool) for _ in range(10)} == {"new"}


@pytest.mark.parametrize("reset_first", [True, False])
async def test_reset_and_resize_fail_together(reset_first: bool, autojump_clock: MockClock) -> None:
    """Reset: where a boot fails both are taken back: workers, config and number."""
    old, new = Release("old", took=1), Release("new", took=1, bad=lambda number: number >= 3)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        cfg = pool.config
        calls: list[tuple[Any, ...]] = [(pool.reset, new.config()), (pool.resize, 5)]
        outcomes: list[Outcome] = []
        for call in calls if reset_first else reversed(calls):
            outcomes.append(start(nursery, *call))
            await trio.sleep(0.25)
        for outcome in outcomes:
            await outcome.done.wait()
            assert isinstance(outcome.error, SpawnError)
        assert pool.config == cfg
        await trio.sleep(20)
        assert at_rest(pool, 3)
        assert {await ask(pool) for _ in range(6)} == {"old"}


# factories that take their time


@attrs.frozen
class SlowFactory(MemoryFactory):
    """A factory in memory that takes seconds to open, or can't be."""

    seconds: float = attrs.field(default=0.0, kw_only=True)
    error: OSError | None = attrs.field(default=None, kw_only=True)

    async def open(self, nursery: trio.Nursery) -> Spawner:
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return await super().open(nursery)


def slow(to: Release, **fields: Any) -> Config:
    return attrs.evolve(to.config(), factory=SlowFactory(to.handle, boot=to.boot, **fields))


async def test_a_factory_that_opens_slowly(autojump_clock: MockClock) -> None:
    """Reset: until the factory is open nothing has changed; resizes go on beside it, and the later reset counts."""
    old, first, second = Release("old"), Release("first"), Release("second")
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        cfg = pool.config
        outcomes = [start(nursery, pool.reset, slow(first, seconds=5))]
        await trio.sleep(1)
        outcomes.append(start(nursery, pool.reset, slow(second, seconds=3)))
        await settle()
        assert pool.config is cfg
        await pool.resize(2)
        assert at_rest(pool, 2)
        assert await ask(pool) == "old"
        await outcomes[0].done.wait()
        assert trio.current_time() == 5
        assert {await ask(pool) for _ in range(6)} == {"first"}
        await outcomes[1].done.wait()
        assert trio.current_time() == 8
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert {await ask(pool) for _ in range(6)} == {"second"}
        assert at_rest(pool, 2), "the resize came after both"
        assert pool.config.num_workers == 2


async def test_a_factory_that_opens_while_the_pool_is_closed(autojump_clock: MockClock) -> None:
    """Reset: what a factory needs of a nursery that is closed meanwhile is no error of its own."""

    @attrs.frozen(eq=False)
    class Late(SlowFactory):
        async def open(self, nursery: trio.Nursery) -> Spawner:
            spawner = await super().open(nursery)
            nursery.start_soon(trio.sleep, 0)
            return spawner

    old, new = Release("old"), Release("new")
    async with trio.open_nursery() as nursery:
        async with open_pool(old.config()) as pool:
            late = Late(new.handle, boot=new.boot, seconds=5)
            outcome = start(nursery, pool.reset, attrs.evolve(new.config(), factory=late))
            await trio.sleep(1)
        await outcome.done.wait()
    assert type(outcome.error) is trio.ClosedResourceError


async def test_a_factory_whose_opening_is_cancelled(autojump_clock: MockClock) -> None:
    """Reset: cancelled while the factory opens, or while another one's does, nothing has changed; the next works."""
    old, new = Release("old"), Release("new")
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        before, cfg = pids(pool), pool.config
        outcomes = [start(nursery, pool.reset, slow(new, seconds=5)) for _ in range(2)]
        await trio.sleep(1)
        for outcome in reversed(outcomes):
            outcome.scope.cancel()
            await outcome.done.wait()
            await settle()
            assert pool.config is cfg
            assert pids(pool) == before
        await pool.reset(slow(new, seconds=1))
        assert {await ask(pool) for _ in range(6)} == {"new"}


async def test_a_pool_that_closes_while_a_factory_opens(autojump_clock: MockClock) -> None:
    """Reset: the block left while the factory opens: ClosedResourceError, and the factory is not used."""
    old, new = Release("old"), Release("new")
    async with trio.open_nursery() as nursery:
        async with open_pool(old.config()) as pool:
            start(nursery, ask, pool, "sleep 10")
            outcome = start(nursery, pool.reset, slow(new, seconds=5))
            await settle()
        await outcome.done.wait()
        assert isinstance(outcome.error, trio.ClosedResourceError)
        assert outcome.at == 5
    assert new.boots == 0
    assert pool.statistics().jobs == {"replied": 1}


async def test_a_second_factory_that_cannot_be_opened(autojump_clock: MockClock) -> None:
    """Reset: a second one whose factory can't be opened is that error, and does not trouble the first."""
    old, new = Release("old"), Release("new", took=1)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        outcome = start(nursery, pool.reset, new.config())
        await settle()
        cfg = pool.config
        with pytest.raises(OSError, match="taken"):
            await pool.reset(slow(old, error=OSError("taken")))
        assert pool.config is cfg
        await outcome.done.wait()
        assert outcome.error is None
        assert {await ask(pool) for _ in range(6)} == {"new"}


# cancelled, closed, given up


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 70])
@pytest.mark.parametrize("how", ["reset", "same", "resize"])
async def test_cancelled_at_any_moment(how: str, passes: int, autojump_clock: MockClock) -> None:
    """Reset, resize: cancelled at any moment the pool is as it was or as was asked; it serves, and the next works."""
    old, new = Release("old"), Release("new")
    floor = Floor()
    async with open_pool(old.config(), observer=floor) as pool, trio.open_nursery() as nursery:
        before, cfg = pids(pool), pool.config
        calls: dict[str, tuple[Any, ...]] = {
            "reset": (pool.reset, new.config(num_workers=4)),
            "same": (pool.reset,),
            "resize": (pool.resize, 4),
        }
        async with floor.watch(pool, every=0.5):
            outcome = start(nursery, *calls[how])
            if not passes:
                outcome.scope.cancel()
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            outcome.scope.cancel()
            await outcome.done.wait()
            assert outcome.error is None
            await settle()
            asked = pool.statistics().starts > 3
            assert asked or (pids(pool) == before and pool.config is cfg)
            assert passes > 0 or not asked
            size = 4 if asked and how != "same" else 3
            assert at_rest(pool, size)
            assert {await ask(pool) for _ in range(8)} == {"new" if asked and how == "reset" else "old"}
            await pool.reset(new.config(num_workers=2))
            assert at_rest(pool, 2)
            assert {await ask(pool) for _ in range(8)} == {"new"}
        assert floor.lowest >= 2


async def test_cancelled_in_the_middle(autojump_clock: MockClock) -> None:
    """Reset, resize: cancelling gives up the wait, not the change; a failed boot later still takes it back."""
    old, new = Release("old"), Release("new", took=1, bad=lambda number: number >= 3)
    async with open_pool(old.config()) as pool:
        cfg = pool.config
        with trio.move_on_after(1.5) as scope:
            await pool.reset(new.config(num_workers=2))
        assert scope.cancelled_caught
        assert pool.config.num_workers == 2
        await trio.sleep(5)
        assert at_rest(pool, 2)
        with trio.move_on_after(0.5) as scope:
            await pool.resize(3)
        assert scope.cancelled_caught
        assert pool.config.num_workers == 3
        await trio.sleep(5)
        assert at_rest(pool, 2)  # the third boot failed
        assert pool.statistics().failed_starts == 1
        await pool.reset(cfg)
        assert at_rest(pool, 3)
        assert pool.config is cfg


@pytest.mark.parametrize("how", ["reset", "same", "resize"])
async def test_in_a_closed_pool(how: str, autojump_clock: MockClock) -> None:
    """Reset, resize: in a closed pool they are ClosedResourceError, and start nothing."""
    old = Release("old")
    async with open_pool(old.config()) as pool:
        pass
    calls: dict[str, tuple[Any, ...]] = {
        "reset": (pool.reset, old.config()),
        "same": (pool.reset,),
        "resize": (pool.resize, 4),
    }
    function, *arguments = calls[how]
    with pytest.raises(trio.ClosedResourceError, match="closed"):
        await function(*arguments)
    assert old.boots == 3
    assert pool.config.num_workers == 3


@pytest.mark.parametrize("how", ["reset", "same", "resize"])
async def test_closed_while_it_waits(how: str, autojump_clock: MockClock) -> None:
    """Reset, resize: where the block is left meanwhile they are ClosedResourceError; jobs that are there finish."""
    old = Release("old", took=1)
    async with trio.open_nursery() as nursery:
        async with open_pool(old.config()) as pool:
            calls: dict[str, tuple[Any, ...]] = {
                "reset": (pool.reset, old.config(num_workers=5)),
                "same": (pool.reset,),
                "resize": (pool.resize, 5),
            }
            jobs = [start(nursery, ask, pool, "sleep 3") for _ in range(7)]
            await settle()
            outcome = start(nursery, *calls[how])
            await trio.sleep(0.5)
        assert isinstance(outcome.error, trio.ClosedResourceError)
        await settle()
        assert [job.error for job in jobs] == [None] * 7
    assert pool.workers == ()
    assert pool.statistics().jobs == {"replied": 7}


@pytest.mark.parametrize("error", [ValueError("mine"), None], ids=["error", "cancel"])
@pytest.mark.parametrize("passes", [0, 1, 2, 3, 5, 8, 13, 21, 34])
async def test_left_while_a_reset_runs(passes: int, error: ValueError | None, autojump_clock: MockClock) -> None:
    """Reset: the block left by an error or a cancel at any moment of it ends everything at once, with that."""
    old, new = Release("old", took=0.001), Release("new", took=0.001)
    async with trio.open_nursery() as nursery:
        mine = pytest.raises(ValueError, match="mine") if error else contextlib.nullcontext()
        with trio.CancelScope() as scope, mine:
            async with open_pool(old.config()) as pool:
                outcome = start(nursery, pool.reset, new.config(num_workers=5))
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                if error is not None:
                    raise error
                scope.cancel()
                await trio.sleep_forever()
        await outcome.done.wait()
        assert isinstance(outcome.error, trio.ClosedResourceError)
    assert scope.cancelled_caught is (error is None)
    assert pool.workers == ()
    now = pool.statistics()
    assert now.starts == sum(now.exits.values())


async def test_given_up_while_it_waits(autojump_clock: MockClock) -> None:
    """Reset, resize: the pool gives up while one waits: ClosedResourceError, with the reason as its cause."""
    broken = False

    async def boot(slot: int) -> None:
        if slot == 2:
            await trio.sleep(1000)
        if broken:
            raise BadBoot("broken")

    cfg = config(work, boot=boot, num_workers=2, restart=Restart(initial=1.0, jitter=0.0, give_up_after=2))
    async with trio.open_nursery() as nursery:
        with pytest.raises(RestartLimitExceeded):
            async with open_pool(cfg) as pool:
                outcome = start(nursery, pool.resize, 3)
                await settle()
                broken = True
                await pool.workers[0].kill()
                await trio.sleep(500)
        await outcome.done.wait()
        assert isinstance(outcome.error, trio.ClosedResourceError)
        assert isinstance(outcome.error.__cause__, RestartLimitExceeded)
        assert trio.current_time() == 1


@pytest.mark.parametrize(
    "wrong", [1, "php worker.php", ["php"], {}, Config, object()], ids=["int", "str", "list", "dict", "class", "object"]
)
async def test_no_config(wrong: Any, autojump_clock: MockClock) -> None:
    """Bad input: what is no Config is a TypeError that names it, and nothing has changed."""
    old = Release("old")
    async with open_pool(old.config()) as pool:
        cfg = pool.config
        with pytest.raises(TypeError, match="config must be a Config"):
            await pool.reset(wrong)
        assert pool.config is cfg
        assert old.boots == 3


# resize


async def test_resize_up_and_down(autojump_clock: MockClock) -> None:
    """Resize: added workers are booted side by side; of too many those of the highest slots go."""
    floor, old = Floor(), Release("old", took=1)
    async with open_pool(old.config(), observer=floor) as pool:
        before = pids(pool)
        async with floor.watch(pool, every=0.05):
            begun = trio.current_time()
            await pool.resize(6)
            assert at_rest(pool, 6)
            assert pids(pool)[:3] == before
            assert trio.current_time() - begun == pytest.approx(1)
            await pool.resize(2)
            assert at_rest(pool, 2)
            assert pids(pool) == before[:2]
        assert floor.lowest == 2
        assert floor.of("DESTRUCT") == ["resize"] * 4
        assert pool.statistics().exits == {"resize": 4}
        assert pool.statistics().restarts == {0: 0, 1: 0}
        await pool.resize(2)
        assert old.boots == 6


async def test_resize_down_waits_for_jobs(autojump_clock: MockClock) -> None:
    """Resize: who is on a job goes after it; nothing is cut off, and what waits is done by those that stay."""
    old = Release("old")
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        jobs = [start(nursery, ask, pool, "sleep 5") for _ in range(4)]
        await settle()
        await pool.resize(1)
        assert trio.current_time() == 5
        assert pool.statistics().target == 1
        for job in jobs:
            await job.done.wait()
            assert job.error is None
        assert trio.current_time() == 10
        assert at_rest(pool, 1)


async def test_resize_down_waits_for_a_lease(autojump_clock: MockClock) -> None:
    """Resize: who is leased goes after the lease."""
    old = Release("old")
    async with open_pool(old.config(num_workers=2)) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as first, pool.lease() as second:
            outcome = start(nursery, pool.resize, 1)
            await trio.sleep(3)
            for worker in (first, second):
                assert (await worker.exec(Payload(b"sleep 1"))).body == b"old"
            assert not outcome.done.is_set()
        await outcome.done.wait()
        assert outcome.error is None
        assert at_rest(pool, 1)


async def test_jobs_that_wait_get_the_added_workers(autojump_clock: MockClock) -> None:
    """Resize: an added worker takes a waiting job as soon as it is ready."""
    old = Release("old", took=1)
    async with open_pool(old.config(num_workers=1)) as pool, trio.open_nursery() as nursery:
        begun = trio.current_time()
        jobs = [start(nursery, ask, pool, "sleep 100") for _ in range(3)]
        await settle()
        await pool.resize(3)
        assert trio.current_time() - begun == pytest.approx(1)
        now = pool.statistics()
        assert (now.busy, now.waiting) == (3, 0)
        for job in jobs:
            await job.done.wait()
        assert trio.current_time() - begun == pytest.approx(101)


@pytest.mark.parametrize("wrong", [0, -1, True, False, 1.5, "3", None, b"1", [1]], ids=repr)
@pytest.mark.parametrize("python", [False, True])
async def test_no_number(python: bool, wrong: Any, autojump_clock: MockClock) -> None:
    """Bad input: a number of workers that is none is an error that names num_workers, and nothing has changed."""
    old = Release("old")
    async with open_pool(old.config()) as pool:
        cfg, before = pool.config, pids(pool)
        resize = functools.partial(type(pool).resize, pool)
        if python:
            resize = functools.partial(PythonPool.resize, PythonPool._create(pool._core, None))  # type: ignore[arg-type]
        kind = ValueError if type(wrong) is int else TypeError
        with pytest.raises(kind, match="num_workers"):
            await resize(wrong)
        assert pool.config is cfg
        assert pids(pool) == before
        assert at_rest(pool, 3)


@pytest.mark.parametrize("size", [4, 6])
async def test_resize_that_cannot_boot(size: int, autojump_clock: MockClock) -> None:
    """Resize: a failed boot is its SpawnError; the pool has as many workers as before, the very same."""
    old = Release("old", took=1, bad=lambda number: number > 3 and number == size)
    async with open_pool(old.config()) as pool:
        before, cfg = pids(pool), pool.config
        with pytest.raises(SpawnError) as caught:
            await pool.resize(size)
        assert (caught.value.stderr, caught.value.started) == ("old is broken", False)
        assert pool.config == cfg
        assert pool.statistics().target == 3
        await trio.sleep(10)
        assert pids(pool) == before
        assert at_rest(pool, 3)
        await pool.resize(size)
        assert at_rest(pool, size)


async def test_resize_raises_max_workers(autojump_clock: MockClock) -> None:
    """Resize: `max_workers` stays, or is raised to the new number."""
    old = Release("old")
    async with open_pool(old.config(max_workers=5)) as pool:
        await pool.resize(4)
        assert (pool.config.num_workers, pool.config.max_workers) == (4, 5)
        await pool.resize(7)
        assert (pool.config.num_workers, pool.config.max_workers) == (7, 7)
        await pool.resize(2)
        assert pool.config.num_workers == 2
        assert at_rest(pool, 2)


async def test_the_later_resize_counts(autojump_clock: MockClock) -> None:
    """Resize: one while another is under way takes over from it, and both return."""
    old = Release("old", took=1)
    async with open_pool(old.config()) as pool, trio.open_nursery() as nursery:
        outcomes: list[Outcome] = []
        for size in (8, 1, 5, 2, 4):
            outcomes.append(start(nursery, pool.resize, size))
            await trio.sleep(0.3)
        for outcome in outcomes:
            await outcome.done.wait()
            assert outcome.error is None
        await settle()
        assert at_rest(pool, 4)


async def test_resize_with_debug(autojump_clock: MockClock) -> None:
    """Resize: with `debug` it is how many processes there may be at a time."""
    old = Release("old")
    async with open_pool(old.config(num_workers=1, debug=True)) as pool, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        assert len(pool.workers) == 1
        await pool.resize(3)
        await settle()
        assert len(pool.workers) == 3
        assert pool.config.num_workers == 3


async def test_checkpoints(autojump_clock: MockClock) -> None:
    """Each of them is a checkpoint, also where there is nothing to do."""
    old = Release("old")
    async with open_pool(old.config()) as pool:
        with trio.testing.assert_checkpoints():
            await pool.resize(3)
        with trio.testing.assert_checkpoints():
            await pool.reset()


# real processes


class Callers:
    """Many callers at once, each with one job after the other; what became of every job is kept."""

    def __init__(self, pool: Pool, count: int, text: str = "say") -> None:
        self.pool = pool
        self.count = count
        self.text = text
        self.numbers = itertools.count()
        self.answers: list[tuple[str, int]] = []
        """Of each job that has ended the release and the pid that answered, in order."""
        self.errors: list[Exception] = []
        self.over = False

    async def call(self) -> None:
        while not self.over:
            number = next(self.numbers)
            try:
                reply = await self.pool.exec(Payload(f"{self.text} {number}".encode()))
            except Exception as error:
                self.errors.append(error)
                return
            name, pid, *_, answered = reply.body.decode().split()
            assert int(answered) == number  # each reply is that job's own
            self.answers.append((name, int(pid)))

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncGenerator[None]:
        async with trio.open_nursery() as nursery:
            for _ in range(self.count):
                nursery.start_soon(self.call)
            yield
            self.over = True

    async def more(self, count: int) -> None:
        """Wait until as many more jobs have ended."""
        aim = len(self.answers) + count
        await until(lambda: len(self.answers) >= aim or self.errors)


def check_ledger(ledger: Path, callers: Callers) -> None:
    """No job was lost, refused or failed, and none began twice."""
    assert callers.errors == []
    begun = Counter(line.split()[-1] for line in ledger.read_text().splitlines())
    assert set(begun.values()) == {1}
    assert len(begun) == next(callers.numbers) == len(callers.answers)


@pytest.mark.faults
async def test_reset_of_processes_under_load(tmp_path: Path) -> None:
    """Reset: under full load no job is lost, refused, failed or run twice, and no old process answers afterwards."""
    floor, ledger = Floor(), tmp_path / "ledger"
    async with open_pool(release("first", ledger), observer=floor) as pool:
        callers = Callers(pool, 24)
        async with callers(), floor.watch(pool):
            for name in ("second", "third", "fourth"):
                await callers.more(50)
                old = set(pids(pool))
                await pool.reset(release(name, ledger))
                returned = len(callers.answers)
                assert not old & set(pids(pool))
                await callers.more(50)
                assert {told for told, _ in callers.answers[returned:]} == {name}
                assert not old & {pid for _, pid in callers.answers[returned:]}
    assert floor.lowest == 2
    check_ledger(ledger, callers)
    assert floor.of("ERROR") == []


@pytest.mark.faults
async def test_reset_and_resize_of_processes_many_times(tmp_path: Path) -> None:
    """Reset, resize: 50 times over under full load no job is lost, none refused, none answered twice."""
    floor, ledger = Floor(), tmp_path / "ledger"
    sizes = itertools.cycle((1, 3, 2, 4, 2))
    async with open_pool(release("0", ledger), observer=floor) as pool:
        callers = Callers(pool, 12)
        async with callers(), floor.watch(pool):
            for number in range(1, 51):
                if number % 2:
                    await pool.resize(next(sizes))
                else:
                    await pool.reset(release(str(number), ledger, num_workers=pool.config.num_workers))
                    returned = len(callers.answers)
                    await callers.more(3)
                    assert {told for told, _ in callers.answers[returned:]} == {str(number)}
    assert floor.lowest >= 1
    check_ledger(ledger, callers)
    assert floor.of("ERROR") == []
    assert set(pool.statistics().jobs) == {"replied"}


@pytest.mark.faults
async def test_reset_of_processes_to_other_dialects(tmp_path: Path) -> None:
    """Reset: from each dialect to each other under load, jobs that wait at that moment included."""
    ledger = tmp_path / "ledger"
    one, two, three = DIALECTS
    async with open_pool(release("0", ledger, protocol=one)) as pool:
        callers = Callers(pool, 10, "sleep 0.005")
        async with callers():
            for number, dialect in enumerate((two, three, one, three, two, one), 1):
                await callers.more(10)
                assert pool.statistics().waiting
                await pool.reset(release(str(number), ledger, protocol=dialect))
                returned = len(callers.answers)
                await callers.more(5)
                assert {told for told, _ in callers.answers[returned:]} == {str(number)}
                assert pool.config.protocol == dialect
    check_ledger(ledger, callers)


@pytest.mark.faults
async def test_reset_of_processes_to_other_factories(tmp_path: Path) -> None:
    """Reset: over every factory and back; the socket of one that is left is gone at once, and no descriptor stays."""

    async def relay(pool: Pool) -> str:
        return (await pool.exec(Payload(b"env RR_RELAY"))).body.decode()

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    ledger = tmp_path / "ledger"
    async with open_pool(release("0", ledger, factory=factory_of("pipe", tmp_path))) as pool:
        before = descriptors()
        for number, transport in enumerate(FACTORIES[1:], 1):
            old = await relay(pool)
            callers = Callers(pool, 6)
            async with callers():
                await callers.more(10)
                await pool.reset(release(str(number), ledger, factory=factory_of(transport, tmp_path)))
                returned = len(callers.answers)
                await callers.more(10)
                assert {told for told, _ in callers.answers[returned:]} == {str(number)}
            assert callers.errors == []
            address = await relay(pool)
            assert address.partition(":")[0] == {"unix": "unix", "tcp": "tcp"}.get(transport, "pipes")
            if old.startswith("unix://"):
                assert not Path(old[7:]).exists()  # noqa: ASYNC240
            elif old.startswith("tcp://"):
                host, port = old[6:].split(":")
                with socket.socket() as sock:
                    assert sock.connect_ex((host, int(port))) != 0
        assert descriptors() == before
        assert not (tmp_path / "pool.sock").exists()


@pytest.mark.faults
async def test_reset_within_one_socket(tmp_path: Path) -> None:
    """Reset: old and new workers of an equal factory share its listener, which stays open."""
    for transport in ("unix", "tcp"):
        factory = factory_of(transport, tmp_path)
        async with open_pool(release("old", factory=factory)) as pool:
            before = (await pool.exec(Payload(b"env RR_RELAY"))).body
            await pool.reset(release("new", factory=factory_of(transport, tmp_path)))
            assert (await pool.exec(Payload(b"env RR_RELAY"))).body == before
            await pool.reset()
            assert await ask_release(pool) == "new"
            with pytest.raises(SpawnError):
                await pool.reset(release("bad", factory=factory, cwd=tmp_path / "missing"))
            await pool.reset()
            assert await ask_release(pool) == "new"


@pytest.mark.faults
async def test_a_factory_that_cannot_be_opened(tmp_path: Path) -> None:
    """Reset: an address that is taken or can't be had is its OSError; nothing has changed, and nothing is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with open_pool(release("old")) as pool:
            cfg, before = pool.config, pids(pool)
            port = taken.getsockname()[1]
            for address in (f"tcp://127.0.0.1:{port}", f"unix://{tmp_path}/no/such/directory"):
                with pytest.raises(OSError, match=r".") as caught:
                    await pool.reset(release("new", factory=SocketFactory(address)))
                assert not isinstance(caught.value, trio.ClosedResourceError)
                assert pool.config is cfg
                assert pids(pool) == before
            await pool.reset(release("new"))
            assert await ask_release(pool) == "new"


@pytest.mark.faults
async def test_reset_of_processes_to_another_environment(tmp_path: Path) -> None:
    """Reset: to another environment and directory: the new workers have them."""
    (tmp_path / "here").mkdir()
    async with open_pool(release("old", num_workers=1)) as pool:
        env = {"PYTHONPATH": str(ROOT), "COLOUR": "red"}
        await pool.reset(release("old", num_workers=1, env=env, cwd=tmp_path / "here"))
        assert (await pool.exec(Payload(b"env COLOUR"))).body == b"red"
        (worker,) = pool.workers
        assert os.readlink(f"/proc/{worker.pid}/cwd") == str(tmp_path / "here")


BROKEN: Final[dict[str, tuple[list[str], str, str]]] = {
    "missing": (["/no/such/program"], "spawn", "No such file"),
    "exits": ([sys.executable, "-S", "-c", "import sys; sys.exit('not today')"], "handshake", "status 1"),
    "hangs": ([sys.executable, "-S", "-c", "import time; time.sleep(1000)"], "handshake", "boot_timeout"),
    "garbage": ([sys.executable, "-S", "-c", "print('hello world', flush=True); input()"], "handshake", "hello world"),
}


@pytest.mark.faults
@pytest.mark.parametrize("how", BROKEN)
async def test_processes_that_cannot_boot(how: str, tmp_path: Path) -> None:
    """Reset: new processes that can't boot are their SpawnError; the old ones stay, the same pids, and serve."""
    command, phase, text = BROKEN[how]
    ledger, floor = tmp_path / "ledger", Floor()
    async with open_pool(release("old", ledger), observer=floor) as pool:
        cfg, before = pool.config, pids(pool)
        callers = Callers(pool, 6)
        async with callers(), floor.watch(pool):
            bad = attrs.evolve(cfg, command=command, boot_timeout=0.3 if how == "hangs" else 30.0, max_queue=1000)
            with pytest.raises(SpawnError, match=text) as caught:
                await pool.reset(bad)
            assert caught.value.phase == phase
            assert command[-1][:10] in str(caught.value)
            assert pids(pool) == before
            assert pool.config is cfg
            await callers.more(20)
        assert floor.lowest == 2
        assert {told for told, _ in callers.answers} == {"old"}
        await pool.reset(release("new", ledger))
        assert await ask_release(pool, "say -1") == "new"
    assert callers.errors == []


@pytest.mark.faults
async def test_processes_that_boot_only_once(tmp_path: Path) -> None:
    """Reset: a failure after some were replaced takes those back too."""
    flag = tmp_path / "flag"
    source = f"import os\nif os.path.exists({str(flag)!r}): raise SystemExit(5)\nopen({str(flag)!r}, 'w').close()\n"
    async with open_pool(release("old", num_workers=3)) as pool:
        cfg = pool.config
        bad = attrs.evolve(cfg, command=[sys.executable, "-S", "-c", source + RELEASE, "bad"])
        with pytest.raises(SpawnError, match="status 5"):
            await pool.reset(bad)
        assert pool.config is cfg
        await until(lambda: at_rest(pool, 3))
        assert {await ask_release(pool) for _ in range(9)} == {"old"}


@pytest.mark.faults
async def test_sockets_of_what_cannot_boot(tmp_path: Path) -> None:
    """Reset: the sockets of a factory whose workers can't boot, or that was taken over from, are gone afterwards."""
    path, factory = tmp_path / "pool.sock", factory_of("unix", tmp_path)
    async with open_pool(release("old")) as pool, trio.open_nursery() as nursery:
        cfg = pool.config
        with pytest.raises(SpawnError, match="status 5"):
            await pool.reset(
                attrs.evolve(cfg, factory=factory, command=[sys.executable, "-S", "-c", "raise SystemExit(5)"])
            )
        assert not path.exists()
        hanging = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]
        outcome = start(nursery, pool.reset, attrs.evolve(cfg, factory=factory, command=hanging))
        await until(path.exists)
        await pool.reset(cfg)
        await outcome.done.wait()
        assert outcome.error is None
        await until(lambda: at_rest(pool, 2) and not path.exists())
        assert await ask_release(pool) == "old"


@pytest.mark.faults
async def test_a_repair_of_processes(tmp_path: Path) -> None:
    """Reset: a pool whose program has broken serves again with another, without a wait for its back-off."""
    script = tmp_path / "worker.py"
    script.write_text(RELEASE)
    good = release("new")
    restart = Restart(initial=1000.0, maximum=1000.0)
    cfg = attrs.evolve(good, command=[sys.executable, "-S", str(script), "old"], restart=restart)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        script.write_text("raise SystemExit(9)")
        for worker in pool.workers:
            await worker.kill()
        await until(lambda: pool.statistics().failed_starts >= 2)
        waiting = start(nursery, ask_release, pool)
        await pool.reset(good)
        await waiting.done.wait()
        assert waiting.error is None
        assert at_rest(pool, 2)
        assert {await ask_release(pool) for _ in range(4)} == {"new"}


@pytest.mark.faults
async def test_reset_of_functions() -> None:
    """Reset, resize: a pool of functions has them too; edited code counts, and no job is lost."""
    floor = Floor()
    async with open_python_pool(2, boot_timeout=30.0, observer=floor) as pool:
        got: list[int] = []

        async def call() -> None:
            while not stop:
                got.append(await pool.run_sync(os.getpid))

        stop = False
        before = set(pids(pool))
        async with trio.open_nursery() as nursery, floor.watch(pool):
            for _ in range(6):
                nursery.start_soon(call)
            await pool.reset()
            returned = len(got)
            assert not before & set(pids(pool))
            await until(lambda: len(got) > returned + 20)
            assert not before & set(got[returned:])
            await pool.resize(3)
            assert pool.statistics().target == 3
            await pool.resize(1)
            assert at_rest(pool, 1) or pool.statistics().busy == 1
            stop = True
        assert floor.lowest >= 1
        assert set(pool.statistics().jobs) == {"replied"}
        assert len(got) == pool.statistics().jobs["replied"]
        with pytest.raises(TypeError, match="num_workers"):
            await pool.resize(True)
    with pytest.raises(trio.ClosedResourceError):
        await pool.reset()


@pytest.mark.faults
async def test_functions_that_cannot_boot(tmp_path: Path) -> None:
    """Reset, resize: an initializer that fails is a SpawnError with its exception as the cause; old workers stay."""
    flag = str(tmp_path / "flag")
    async with open_python_pool(1, initializer=jobs.initialize_but_once, initargs=(flag,), boot_timeout=30.0) as pool:
        before = pids(pool)
        Path(f"{flag}.fail").touch()  # noqa: ASYNC240
        for call in (pool.reset, functools.partial(pool.resize, 2)):
            with pytest.raises(SpawnError, match="initializer raised") as caught:
                await call()
            assert isinstance(caught.value.__cause__, Exception)
            assert pids(pool) == before
            assert await pool.run_sync(os.getpid) == before[0]


@pytest.mark.faults
@pytest.mark.parametrize("passes", [1, 3, 10, 30])
async def test_processes_left_by_a_cancel(passes: int, tmp_path: Path) -> None:
    """Reset: leaving the block by a cancel while processes are being replaced leaves none of them, and no socket."""
    with trio.CancelScope() as scope:
        async with open_pool(release("old")) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(pool.reset, release("new", factory=factory_of("unix", tmp_path)))
            for _ in range(passes):
                await trio.sleep(0.001)
            scope.cancel()
    assert scope.cancelled_caught
    assert pool.workers == ()
    assert not (tmp_path / "pool.sock").exists()
