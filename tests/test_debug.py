"""`Config.debug`: no standing workers, each job has a process of its own that was started for it.

On workers in memory and a clock that jumps; at the end, marked `faults`, on real processes.
"""

import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.support import RELEASE, Floor, ask_release, release
from tests.test_contract import DIALECTS, TRANSPORTS, factory_of
from tests.test_faults import runs, until
from tests.test_pool_logic import ask, config, settle, work
from tests.test_reset import Release, pids, start
from trio_workers import (
    AllocateTimeout,
    Config,
    JobError,
    JobTimeout,
    Limits,
    Payload,
    Pool,
    PythonPool,
    QueueFull,
    Restart,
    SpawnError,
    WorkerCrashed,
    WorkerError,
    WorkerState,
    open_pool,
    open_python_pool,
    open_worker,
)
from trio_workers.child import Job
from trio_workers.testing import BadBoot, MemoryFactory


def debugging(old: Release, **fields: Any) -> Config:
    return old.config(**{"debug": True, "num_workers": 2, **fields})


def empty(pool: Pool | PythonPool) -> bool:
    """Whether there is no worker, and nobody waits for one."""
    now = pool.statistics()
    return not pool.workers and not now.waiting and now.idle + now.busy + now.starting + now.leased + now.stopping == 0


async def test_each_job_has_a_process_of_its_own(autojump_clock: MockClock) -> None:
    """Debug: there is no worker but for a job, and none does two."""
    floor, old = Floor(), Release("old", took=1)
    async with open_pool(debugging(old), observer=floor) as pool:
        assert trio.current_time() == 0
        assert empty(pool)
        assert old.boots == 0
        for number in range(1, 4):
            assert await ask(pool) == "old"
            await settle()
            assert empty(pool)
            assert old.boots == number
        assert trio.current_time() == 3
        assert len({pid for _, pid, _ in floor.events}) == 3
        assert floor.of("DESTRUCT") == ["debug"] * 3
        assert floor.of("ERROR") == []
        now = pool.statistics()
        assert (now.starts, now.exits, now.jobs) == (3, {"debug": 3}, {"replied": 3})


async def test_as_many_at_a_time_as_there_are_workers(autojump_clock: MockClock) -> None:
    """Debug: num_workers processes at most, in slots 0 to n-1; jobs have theirs in the order in which they came."""
    floor = Floor()
    begun: list[bytes] = []

    async def handler(job: Job) -> bytes:
        begun.append(job.body)
        await trio.sleep(1)
        return b""

    cfg = config(handler, num_workers=3, debug=True)
    slots: set[int] = set()
    async with open_pool(cfg, observer=floor) as pool, trio.open_nursery() as nursery:
        async with floor.watch(pool, every=0.05):
            outcomes = []
            for number in range(20):
                outcomes.append(start(nursery, ask, pool, f"{number}"))
                await settle()
                slots.update(worker.slot for worker in pool.workers)
            for outcome in outcomes:
                await outcome.done.wait()
                assert outcome.error is None
        assert floor.highest == 3
        assert slots == {0, 1, 2}
        assert trio.current_time() == pytest.approx(7)
        assert begun[:3] == [b"0", b"1", b"2"]
        assert sorted(begun, key=int) == [b"%d" % number for number in range(20)]
        assert [int(body) // 3 for body in begun] == sorted(int(body) // 3 for body in begun)


async def test_a_failed_boot_is_its_jobs(autojump_clock: MockClock) -> None:
    """Debug: what does not boot is the SpawnError of that job, and of no other; nobody waits for a back-off."""
    floor, old = Floor(), Release("old", took=1, bad=lambda number: number == 2)
    restart = Restart(initial=1000.0, maximum=1000.0, give_up_after=1)
    async with (
        open_pool(debugging(old, num_workers=1, restart=restart), observer=floor) as pool,
        trio.open_nursery() as nursery,
    ):
        outcomes = []
        for _ in range(4):
            outcomes.append(start(nursery, ask, pool))
            await settle()
        for outcome in outcomes:
            await outcome.done.wait()
        first, second, third, fourth = (outcome.error for outcome in outcomes)
        assert (first, third, fourth) == (None, None, None)
        assert isinstance(second, SpawnError)
        assert (second.stderr, second.phase, second.started, second.slot) == ("old is broken", "handshake", False, 0)
        assert trio.current_time() == 4
        assert [type(error) for error in floor.of("ERROR")] == [SpawnError]
        await settle()
        now = pool.statistics()
        assert now.jobs == {"replied": 3, "boot_failed": 1}
        assert (now.failed_starts, now.exits) == (1, {"debug": 3, "boot failed": 1})
        assert empty(pool)


async def test_boots_that_all_fail(autojump_clock: MockClock) -> None:
    """Debug: exec, stream, lease and map all tell of it, each in its own way; and the pool opens and closes."""
    old = Release("old", bad=lambda number: True)
    async with open_pool(debugging(old)) as pool:
        with pytest.raises(SpawnError, match="before it was ready"):
            await ask(pool)
        with pytest.raises(SpawnError):
            async with pool.stream(Payload()):
                pytest.fail("it came up")
        with pytest.raises(SpawnError):
            async with pool.lease():
                pytest.fail("it came up")
        async with pool.map([Payload(), Payload()], return_exceptions=True) as replies:
            assert [type(reply) async for reply in replies] == [SpawnError] * 2
        old.bad = lambda number: False
        assert await ask(pool) == "old"
        assert pool.statistics().jobs == {"boot_failed": 5, "replied": 1}


async def test_boot_timeout(autojump_clock: MockClock) -> None:
    """Debug: what takes too long to boot is its job's SpawnError, too."""
    old = Release("old", took=100)
    async with open_pool(debugging(old, boot_timeout=7.0)) as pool:
        with pytest.raises(SpawnError, match="boot_timeout"):
            await ask(pool)
        assert trio.current_time() == 7


async def test_allocate_timeout(autojump_clock: MockClock) -> None:
    """Debug: a job waits for its process within allocate_timeout; past that the process is ended."""
    old = Release("old", took=100)
    async with open_pool(debugging(old, allocate_timeout=5.0, boot_timeout=500.0)) as pool:
        with pytest.raises(AllocateTimeout, match="1 starting") as caught:
            await ask(pool)
        assert caught.value.started is False
        assert trio.current_time() == 5
        await settle()
        assert empty(pool)
        old.took = 1
        assert await ask(pool) == "old"


async def test_cancelled_while_it_boots(autojump_clock: MockClock) -> None:
    """Debug: the process of a job that is cancelled goes with it, and its place is the next one's."""
    old = Release("old", took=10)
    async with open_pool(debugging(old, num_workers=1)) as pool, trio.open_nursery() as nursery:
        first = start(nursery, ask, pool)
        await settle()
        second = start(nursery, ask, pool)
        await trio.sleep(5)
        (worker,) = pool.workers
        assert pool.statistics().waiting == 2
        first.scope.cancel()
        await settle()
        assert first.done.is_set()
        assert worker not in pool.workers
        assert len(pool.workers) == 1
        await second.done.wait()
        assert second.error is None
        assert trio.current_time() == 15
        assert pool.statistics().jobs == {"cancelled": 1, "replied": 1}
        assert pool.statistics().exits["cancelled"] == 1


async def test_cancelled_while_it_waits_for_a_place(autojump_clock: MockClock) -> None:
    """Debug: a job without a process leaves the queue, and nobody else is touched."""
    old = Release("old", took=10)
    async with open_pool(debugging(old, num_workers=1)) as pool, trio.open_nursery() as nursery:
        outcomes = []
        for _ in range(3):
            outcomes.append(start(nursery, ask, pool))
            await settle()
        outcomes[1].scope.cancel()
        for outcome in outcomes:
            await outcome.done.wait()
        assert trio.current_time() == 20
        assert old.boots == 2
        assert pool.statistics().jobs == {"cancelled": 1, "replied": 2}


@pytest.mark.parametrize("passes", range(12))
async def test_cancelled_at_any_moment(passes: int, autojump_clock: MockClock) -> None:
    """Debug: a cancel at any moment of a job leaves no process, and every place is there again."""
    old = Release("old")
    async with open_pool(debugging(old, num_workers=1)) as pool, trio.open_nursery() as nursery:
        outcome = start(nursery, ask, pool)
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        outcome.scope.cancel()
        await outcome.done.wait()
        await settle()
        assert empty(pool)
        assert await ask(pool) == "old"
        assert sum(pool.statistics().jobs.values()) in (1, 2)  # one that was cancelled before it came is none


async def test_a_lease(autojump_clock: MockClock) -> None:
    """Debug: a lease has one fresh process for all of its jobs."""
    old = Release("old", took=1)
    async with open_pool(debugging(old, num_workers=1)) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as worker:
            pid = worker.pid
            for _ in range(3):
                assert await ask(worker) == "old"
            assert pids(pool) == [pid]
            other = start(nursery, ask, pool)
            await trio.sleep(10)
            assert not other.done.is_set()
        await other.done.wait()
        assert other.error is None
        await worker.wait()
        assert worker.state.value is WorkerState.STOPPED
        assert old.boots == 2


async def test_a_stream_and_a_map(autojump_clock: MockClock) -> None:
    """Debug: a stream and each job of a map have a process each."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        for number in range(3):
            yield b"%d" % number

    async with open_pool(config(handler, num_workers=2, debug=True)) as pool:
        async with pool.stream(Payload()) as parts:
            assert [part.body async for part in parts] == [b"0", b"1", b"2"]
        async with pool.stream(Payload()) as parts:
            async for _ in parts:
                break
        await settle()
        assert empty(pool)
        assert pool.statistics().starts == 2
    old = Release("old", took=1)
    async with open_pool(debugging(old)) as pool:
        begun = trio.current_time()
        async with pool.map(Payload(b"%d" % number) for number in range(10)) as replies:
            assert [reply.body async for reply in replies] == [b"old"] * 10
        assert trio.current_time() - begun == pytest.approx(5)
        assert old.boots == 10
        await settle()
        assert empty(pool)


@pytest.mark.parametrize("bound", [0, 1, 2])
async def test_max_queue(bound: int, autojump_clock: MockClock) -> None:
    """Debug: max_queue counts those that wait for a place, not those whose process comes up."""
    old = Release("old", took=1)
    async with open_pool(debugging(old, max_queue=bound)) as pool, trio.open_nursery() as nursery:
        outcomes = [start(nursery, ask, pool) for _ in range(2 + bound)]
        await settle()
        for _ in range(3):
            with pytest.raises(QueueFull):
                await ask(pool)
        for outcome in outcomes:
            await outcome.done.wait()
            assert outcome.error is None
        await settle()  # a process that is ending still has its place
        assert await ask(pool) == "old"
        assert pool.statistics().jobs == {"replied": 3 + bound, "queue_full": 3}


async def test_a_stop_request(autojump_clock: MockClock) -> None:
    """Debug: a process that asks to be replaced is; the job has another one, until its patience is at its end."""
    old = Release("old")

    async def handler(job: Job) -> Any:
        if job.body == b"ever" or old.boots < 3:
            return await work(Job(b"stop", b""))
        return b"done"

    async with open_pool(config(handler, boot=old.boot, debug=True)) as pool:
        assert await ask(pool, "x") == "done"
        assert old.boots == 3
        with pytest.raises(WorkerError) as caught:
            await ask(pool, "ever")
        assert (caught.value.phase, caught.value.started) == ("retiring", False)
        await settle()
        assert empty(pool)
        assert pool.statistics().jobs == {"replied": 1, "retired": 1}
        assert old.boots == 6


async def test_faults_of_jobs(autojump_clock: MockClock) -> None:
    """Debug: a job's error, crash or time limit is that job's alone."""
    old = Release("old")
    limits = Limits(exec_ttl=5.0, ttl=1.0, idle_ttl=1.0)
    async with open_pool(debugging(old, num_workers=1, limits=limits, max_executions=1)) as pool:
        with pytest.raises(JobError):
            await ask(pool, "fail now")
        with pytest.raises(WorkerCrashed) as caught:
            await ask(pool, "crash 3")
        assert caught.value.returncode == 3
        with pytest.raises(JobTimeout):
            await ask(pool, "hang")
        assert await ask(pool, "sleep 4") == "old"
        await settle()
        assert empty(pool)
        assert pool.statistics().exits == {"debug": 2, "crashed": 1, "exec_ttl": 1}


async def test_closing_while_jobs_wait(autojump_clock: MockClock) -> None:
    """Debug: the block left normally waits for all jobs that were handed in, each with its process."""
    old = Release("old", took=1)
    async with trio.open_nursery() as nursery:
        async with open_pool(debugging(old)) as pool:
            outcomes = [start(nursery, ask, pool) for _ in range(7)]
            await settle()
        for outcome in outcomes:
            await outcome.done.wait()
            assert outcome.error is None
    assert trio.current_time() == 4
    assert old.boots == 7
    assert empty(pool)
    with pytest.raises(trio.ClosedResourceError):
        await ask(pool)


async def test_left_by_an_error_while_jobs_wait(autojump_clock: MockClock) -> None:
    """Debug: the block left by an error ends all that wait or come up."""
    old = Release("old", took=1)
    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="mine"):
            async with open_pool(debugging(old)) as pool:
                outcomes = [start(nursery, ask, pool) for _ in range(7)]
                await settle()
                raise ValueError("mine")
        for outcome in outcomes:
            await outcome.done.wait()
            assert isinstance(outcome.error, trio.ClosedResourceError)
    assert trio.current_time() == 0
    assert empty(pool)


async def test_statistics_while_it_boots(autojump_clock: MockClock) -> None:
    """Debug: a process that comes up is starting, its job is waiting; never is anybody idle."""
    old = Release("old", took=10)
    async with open_pool(debugging(old)) as pool, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, pool, "sleep 5")
        await trio.sleep(4)
        now = pool.statistics()
        assert (now.target, now.starting, now.waiting, now.idle, now.busy) == (2, 2, 3, 0, 0)
        assert now.longest_wait == 4
        await trio.sleep(7)
        now = pool.statistics()
        assert (now.target, now.starting, now.waiting, now.idle, now.busy) == (2, 0, 1, 0, 2)


async def test_a_worker_is_stopped_or_killed_while_it_boots(autojump_clock: MockClock) -> None:
    """Debug: whoever ends a process that comes up does not end its job, which gets another."""
    old = Release("old", took=10)
    async with open_pool(debugging(old, num_workers=1)) as pool, trio.open_nursery() as nursery:
        outcome = start(nursery, ask, pool)
        for how in ("kill", "stop"):
            await trio.sleep(5)
            (worker,) = pool.workers
            await getattr(worker, how)()
        await outcome.done.wait()
        assert outcome.error is None
        assert trio.current_time() == 20
        assert old.boots == 3


async def test_a_single_worker_has_no_debug(autojump_clock: MockClock) -> None:
    """Debug: `open_worker` does not look at it: a worker to oneself stays."""
    old = Release("old")
    async with open_worker(debugging(old)) as worker:
        for _ in range(3):
            assert await ask(worker) == "old"
    assert old.boots == 1


async def test_broken_from_the_beginning(autojump_clock: MockClock) -> None:
    """Debug: a pool of what can't boot opens all the same."""

    async def boot(slot: int) -> None:
        raise BadBoot("broken")

    async with open_pool(Config(command=["any"], debug=True, factory=MemoryFactory(work, boot=boot))) as pool:
        assert empty(pool)


# real processes


@pytest.mark.faults
async def test_edited_code_counts_at_once(tmp_path: Path) -> None:
    """Debug: a process is started after its job was handed in, so what is edited before counts for it."""
    script = tmp_path / "worker.py"
    cfg = attrs.evolve(release("x"), command=[sys.executable, "-S", str(script), "first"], debug=True)
    async with open_pool(cfg) as pool:
        for number in range(3):
            script.write_text(RELEASE.replace("{release}", f"edited{number}"))
            assert await ask_release(pool) == f"edited{number}"
        script.write_text("raise SystemExit('a slip of the pen')")
        with pytest.raises(SpawnError) as caught:
            await ask_release(pool)
        assert caught.value.stderr == "a slip of the pen"
        script.write_text(RELEASE)
        assert await ask_release(pool) == "first"
        await until(lambda: empty(pool))


@pytest.mark.faults
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_over_every_wire(dialect: str, transport: str, tmp_path: Path) -> None:
    """Debug: it is there for all transports and dialects."""
    cfg = release("old", factory=factory_of(transport, tmp_path), protocol=dialect, debug=True)
    async with open_pool(cfg) as pool:
        used = {(await pool.exec(Payload(b"say"))).body.split()[1] for _ in range(2)}
        async with pool.map(Payload(b"say %d" % number) for number in range(4)) as replies:
            got = [reply.body.split() async for reply in replies]
        used |= {pid for _, pid, _ in got}
        assert [int(number) for _, _, number in got] == [0, 1, 2, 3]
        assert len(used) == 6
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"exit 3"))
        await until(lambda: empty(pool))


@pytest.mark.faults
async def test_a_missing_program() -> None:
    """Debug: a program that is not there is told to each job, with where it was looked for."""
    async with open_pool(Config(command=["/no/such/program"], debug=True, num_workers=2)) as pool:
        for _ in range(3):
            with pytest.raises(SpawnError, match="/no/such/program") as caught:
                await pool.exec(Payload(b"x"))
            assert (caught.value.phase, caught.value.pid, caught.value.started) == ("spawn", None, False)
        assert empty(pool)


@pytest.mark.faults
async def test_a_process_that_hangs_at_its_start(tmp_path: Path) -> None:
    """Debug: a job that is cancelled while its process comes up takes that with it."""
    cfg = release("old", debug=True, num_workers=1)
    bad = attrs.evolve(cfg, command=[sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
    async with open_pool(bad) as pool, trio.open_nursery() as nursery:
        outcome = start(nursery, pool.exec, Payload(b"x"))
        await until(lambda: pool.workers and pool.workers[0].pid is not None)
        pid = pool.workers[0].pid
        assert pid is not None
        outcome.scope.cancel()
        await outcome.done.wait()
        assert outcome.error is None
        await until(lambda: empty(pool))
        assert not runs(pid)


@pytest.mark.faults
async def test_functions(tmp_path: Path) -> None:
    """Debug: a function runs in a fresh interpreter each time, and finds its module as it is then."""
    module = tmp_path / "edited_module.py"
    module.write_text("def give():\n    return 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import edited_module  # type: ignore[import-not-found]

        async with open_python_pool(2, debug=True, boot_timeout=30.0) as pool:
            assert empty(pool)
            used = {await pool.run_sync(os.getpid) for _ in range(3)}
            assert len(used) == 3
            assert await pool.run_sync(edited_module.give) == 1
            module.write_text("def give():\n    return 'two'\n")
            assert await pool.run_sync(edited_module.give) == "two"
            async with pool.lease() as worker:
                assert len({await worker.run_sync(os.getpid) for _ in range(2)}) == 1
            await until(lambda: empty(pool))
            assert pool.statistics().starts == 6
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("edited_module", None)


def _raise(text: str) -> None:
    raise ValueError(text)


@pytest.mark.faults
async def test_an_initializer_that_fails() -> None:
    """Debug: an initializer that raises is the SpawnError of each call, with its exception as the cause."""
    async with open_python_pool(1, debug=True, initializer=_raise, initargs=("mine",), boot_timeout=30.0) as pool:
        for _ in range(2):
            with pytest.raises(SpawnError, match="initializer raised") as caught:
                await pool.run_sync(time.time)
            assert isinstance(caught.value.__cause__, ValueError)
        await until(lambda: empty(pool))
