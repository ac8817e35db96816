"""Cancel is prompt, wherever it strikes, and so is Ctrl-C (promise 4); and each public function is a checkpoint.

More of it, with a second event in the same pass of the run loop, is in `test_races.py`.
"""

import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock, assert_checkpoints

from trio_workers import Payload, Pool, Worker, WorkerCrashed, WorkerError, WorkerState, open_pool, open_worker
from trio_workers.child import Job

from .test_pool_logic import Recorder, ask, check, config, settle, work

pytestmark = pytest.mark.faults


async def stream_for_ever(job: Job) -> AsyncGenerator[bytes]:
    """Stream a part, and then none; or do what the body says."""
    if job.body == b"hang":
        await trio.sleep_forever()
    yield b"part"
    if job.body == b"many":
        while True:
            yield b"part"
    if job.body == b"one":
        return
    await trio.sleep_forever()


class Counting:
    """A handler that counts the jobs it began."""

    def __init__(self, handler: Any = work) -> None:
        self.handler = handler
        self.began: list[bytes] = []

    def __call__(self, job: Job) -> Any:
        self.began.append(job.body)
        return self.handler(job)


async def cancelled(scope: trio.CancelScope, function: Callable[[], Awaitable[object]]) -> None:
    with scope:
        await function()


async def healed(pool: Pool, exits: dict[str, int]) -> None:
    """The pool has lost these workers, and serves with as many as it should have."""
    await settle()
    now = pool.statistics()
    assert (now.idle, now.waiting, len(pool.workers)) == (now.target, 0, now.target)
    assert dict(now.exits) == exits
    check(pool)


# where the job is when the cancel comes


async def test_waiting(autojump_clock: MockClock) -> None:
    """Promise 4: a cancelled job that waits leaves the queue at once; no worker is touched, and it never runs."""
    handler = Counting()
    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        scope = trio.CancelScope()
        nursery.start_soon(cancelled, scope, lambda: ask(pool, "never"))
        await settle()
        assert pool.statistics().waiting == 1
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        assert pool.statistics().waiting == 0
        assert trio.current_time() == 0
        await trio.sleep(6)
        await healed(pool, {})
    assert handler.began == [b"sleep 5"]
    assert pool.statistics().jobs == {"cancelled": 1, "replied": 1}


async def test_waiting_in_the_middle(autojump_clock: MockClock) -> None:
    """Promise 4: one that is cancelled in the middle of the queue leaves the others in their order."""
    handler = Counting()
    scopes = [trio.CancelScope() for _ in range(5)]
    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(cancelled, scope, lambda number=number: ask(pool, f"sleep {number + 1}"))
            await settle()
        scopes[2].cancel()
        await trio.sleep(100)
        await healed(pool, {})
    assert handler.began == [b"sleep 1", b"sleep 2", b"sleep 4", b"sleep 5"]


@pytest.mark.parametrize("passes", [2, 3, 10, 50])
async def test_being_written(passes: int, autojump_clock: MockClock) -> None:
    """Promise 4: a cancel in the middle of a large job's bytes ends the worker, which never began it."""
    handler = Counting()
    async with open_pool(config(handler, capacity=1000)) as pool, trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(cancelled, scope, lambda: pool.exec(Payload(b"x" * 1_000_000)))
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        (worker,) = pool.workers
        assert worker.line is not None
        assert not worker.line.whole
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        assert handler.began == []
        await healed(pool, {"cancelled": 1})
        assert await ask(pool) == "hello"


async def test_running(autojump_clock: MockClock) -> None:
    """Promise 4: a cancelled job that runs ends its worker at once; the replacement comes in the background."""
    handler = Counting()
    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        scope = trio.CancelScope()
        nursery.start_soon(cancelled, scope, lambda: ask(pool, "hang"))
        await settle()
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        assert worker.state.value is WorkerState.ERRORED
        with pytest.raises(WorkerError) as caught:
            await worker.wait()
        assert caught.value.returncode == -9
        await healed(pool, {"cancelled": 1})
        assert trio.current_time() == 0
    assert handler.began == [b"hang"]


async def test_running_with_others_waiting(autojump_clock: MockClock) -> None:
    """Promise 4: who waited for the worker of a cancelled job gets its replacement."""
    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(cancelled, scope, lambda: ask(pool, "hang"))
        await settle()
        answers: list[str] = []

        async def call() -> None:
            answers.append(await ask(pool))

        nursery.start_soon(call)
        await settle()
        scope.cancel()
        await settle()
        assert answers == ["hello"]
        assert trio.current_time() == 0
        await healed(pool, {"cancelled": 1})


async def test_half_a_reply(autojump_clock: MockClock) -> None:
    """Promise 4: half a reply is none: the worker is ended, and nobody gets the other half."""
    async with open_pool(config(work, capacity=1000)) as pool, trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(cancelled, scope, lambda: pool.exec(Payload(b"x" * 100_000)))
        (worker,) = pool.workers
        assert worker.line is None or not worker.line.has_more
        while not (worker.line is not None and worker.line.has_more):
            await trio.lowlevel.checkpoint()
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        await healed(pool, {"cancelled": 1})
        assert await ask(pool) == "hello"


async def test_answered(autojump_clock: MockClock) -> None:
    """Promise 4: where the whole reply is there when the cancel comes, the worker stays."""
    handler = Counting()
    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        scope = trio.CancelScope()
        nursery.start_soon(cancelled, scope, lambda: ask(pool, "sleep 1"))
        await settle()
        assert worker.line is not None
        # The reply comes behind the caller's back: the cancel strikes before its task is woken.
        relay: Any = worker.line.relay
        pipe = relay._back
        lot, pipe.lot = pipe.lot, trio.lowlevel.ParkingLot()
        await trio.sleep(2)
        pipe.lot = lot
        assert pipe.data
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        assert pool.workers == (worker,)
        await healed(pool, {})
        assert await ask(pool) == "hello"
    assert handler.began == [b"sleep 1", b"hello"]


@pytest.mark.parametrize("what", ["hang", "many", "silent"])
async def test_streaming(what: str, autojump_clock: MockClock) -> None:
    """Promise 4: a stream that is cancelled, before its first part or after, ends with its worker."""
    async with open_pool(config(stream_for_ever)) as pool, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def take() -> None:
            async with pool.stream(Payload(what.encode())) as parts:
                async for _ in parts:
                    pass

        nursery.start_soon(cancelled, scope, take)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        await healed(pool, {"cancelled": 1})
        assert pool.statistics().jobs == {"cancelled": 1}


async def test_in_the_block_of_a_stream(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel between two parts ends the worker as well."""
    async with open_pool(config(stream_for_ever)) as pool, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def take() -> None:
            async with pool.stream(Payload(b"many")) as parts:
                await anext(parts)
                await trio.sleep_forever()

        nursery.start_soon(cancelled, scope, take)
        await settle()
        scope.cancel()
        await healed(pool, {"cancelled": 1})


async def test_in_the_block_of_a_stream_that_is_over(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel after the last part costs no worker."""
    async with open_pool(config(stream_for_ever)) as pool, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def take() -> None:
            async with pool.stream(Payload(b"one")) as parts:
                async for _ in parts:
                    pass
                await trio.sleep_forever()

        nursery.start_soon(cancelled, scope, take)
        await settle()
        scope.cancel()
        await healed(pool, {})
        assert pool.statistics().jobs == {"replied": 1}


async def test_stream_waiting_for_a_worker(autojump_clock: MockClock) -> None:
    """Promise 4: a stream that is cancelled while it waits leaves the queue."""
    async with open_pool(config(stream_for_ever)) as pool, trio.open_nursery() as nursery:
        first = trio.CancelScope()
        nursery.start_soon(cancelled, first, lambda: ask(pool, "hang"))
        await settle()
        with trio.move_on_after(1) as scope:
            async with pool.stream(Payload()):
                pytest.fail("it was given a worker")
        assert scope.cancelled_caught
        assert pool.statistics().waiting == 0
        first.cancel()
        await healed(pool, {"cancelled": 1})


async def test_leased_and_idle(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel in a lease without a job gives the worker back."""
    async with open_pool(config(work)) as pool:
        before = pool.workers
        with trio.move_on_after(1) as scope:
            async with pool.lease() as worker:
                await ask(worker)
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert pool.workers == before
        await healed(pool, {})


async def test_leased_with_a_job(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel under a leased job ends the worker, once."""
    async with open_pool(config(work)) as pool:
        with trio.move_on_after(1) as scope:
            async with pool.lease() as worker:
                await ask(worker, "hang")
        assert scope.cancelled_caught
        await healed(pool, {"cancelled": 1})
        assert trio.current_time() == 1


async def test_a_job_inside_a_lease(autojump_clock: MockClock) -> None:
    """Promise 4: a job cancelled inside a lease ends the leased worker; the lease says so, and the pool heals."""
    async with open_pool(config(work)) as pool:
        async with pool.lease() as worker:
            with trio.move_on_after(1):
                await ask(worker, "hang")
            await worker.ended.wait()
            with pytest.raises(trio.ClosedResourceError):
                await ask(worker)
            assert await ask(pool) == "hello"
        await healed(pool, {"cancelled": 1})


async def test_lease_waiting_for_a_worker(autojump_clock: MockClock) -> None:
    """Promise 4: a lease that is cancelled while it waits leaves the queue."""
    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        with trio.move_on_after(1) as scope:
            async with pool.lease():
                pytest.fail("it was given a worker")
        assert scope.cancelled_caught
        assert pool.statistics().waiting == 0
        await trio.sleep(10)
        await healed(pool, {})


@pytest.mark.parametrize("ordered", [True, False])
async def test_in_a_map(ordered: bool, autojump_clock: MockClock) -> None:
    """Promise 4: a cancelled map ends its running jobs with their workers, closes its source, and leaves no queue."""
    closed = False

    def source() -> Iterator[Payload]:
        nonlocal closed
        try:
            for _ in range(10):
                yield Payload(b"hang")
        finally:
            closed = True

    handler = Counting()
    async with open_pool(config(handler, num_workers=2)) as pool:
        with trio.move_on_after(1) as scope:
            async with pool.map(source(), ordered=ordered) as replies:
                await anext(replies)
        assert scope.cancelled_caught
        assert closed
        await healed(pool, {"cancelled": 2})
        assert handler.began == [b"hang"] * 2


async def test_in_the_block_of_a_map(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel in the block of a map whose results lie ready costs no worker."""
    async with open_pool(config(work, num_workers=2)) as pool:
        before = pool.workers
        with trio.move_on_after(1) as scope:
            async with pool.map([Payload(b"x")] * 10) as replies:
                await anext(replies)
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert pool.workers == before
        await healed(pool, {})


async def test_a_cancelled_anext_of_a_map_loses_no_result(autojump_clock: MockClock) -> None:
    """Cancelling the wait for one result of a map loses none."""
    got: list[bytes] = []
    async with open_pool(config(work)) as pool, pool.map([Payload(b"sleep %d" % n) for n in (1, 2, 3)]) as replies:
        while len(got) < 3:
            with trio.move_on_after(0.4):
                got.append((await anext(replies)).body)
    assert got == [b"sleep 1", b"sleep 2", b"sleep 3"]
    assert pool.statistics().exits == {"closing": 1}


@pytest.mark.parametrize("after", [0, 3])
async def test_opening(after: float, autojump_clock: MockClock) -> None:
    """Promise 4: a cancel while the pool opens kills what is there, at once."""
    recorder = Recorder()

    async def boot(slot: int) -> None:
        await trio.sleep(0 if slot == 0 else 30)

    with trio.CancelScope() as scope:
        scope.deadline = after
        async with open_pool(config(work, boot=boot, num_workers=4), observer=recorder):
            pytest.fail("it opened")
    assert scope.cancelled_caught
    assert trio.current_time() == after
    assert all(worker.state.value is WorkerState.ERRORED for worker in recorder.workers)
    assert recorder.of("DESTRUCT") == ["closing"] * len(recorder.workers)
    assert recorder.of("ERROR") == []


async def test_draining(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel while the block waits for the last jobs kills at once; their callers get Closed."""
    endings: list[type[BaseException]] = []

    async def call(text: str) -> None:
        try:
            await ask(pool, text)
        except trio.ClosedResourceError as error:
            endings.append(type(error))

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(2) as scope:
            async with open_pool(config(work)) as pool:
                nursery.start_soon(call, "hang")
                await settle()
                nursery.start_soon(call, "waits")
                await settle()
        assert scope.cancelled_caught
        assert trio.current_time() == 2
        assert pool.workers == ()
    assert endings == [trio.ClosedResourceError] * 2


async def test_closing(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel while a worker has its time to stop kills it at once."""
    with trio.move_on_after(2) as scope:
        async with open_pool(config(stream_for_ever, destroy_timeout=1000)) as pool:
            async with pool.stream(Payload()) as parts:
                await anext(parts)
            await settle()
    assert scope.cancelled_caught
    assert trio.current_time() == 2
    assert pool.workers == ()


async def test_open_worker_with_a_job(autojump_clock: MockClock) -> None:
    """Promise 4: a cancel under the job of a single worker ends it, and open_worker is left."""
    with trio.move_on_after(1) as scope:
        async with open_worker(config(work)) as worker:
            await ask(worker, "hang")
    assert scope.cancelled_caught
    assert worker.state.value is WorkerState.ERRORED
    assert trio.current_time() == 1


async def test_a_job_of_a_single_worker(autojump_clock: MockClock) -> None:
    """Promise 4: a single worker whose job was cancelled is gone, and exec says that it is closed."""
    async with open_worker(config(work)) as worker:
        with trio.move_on_after(1):
            await ask(worker, "hang")
        with pytest.raises(trio.ClosedResourceError):
            await ask(worker)
        with pytest.raises(WorkerCrashed):
            await worker.wait()


@pytest.mark.parametrize("how", ["stop", "wait"])
async def test_waiting_for_a_workers_end(how: str, autojump_clock: MockClock) -> None:
    """Cancelling stop or wait gives up the wait, and nothing else."""
    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        with trio.move_on_after(1) as scope:
            await getattr(worker, how)()
        assert scope.cancelled_caught
        assert worker.state.value is WorkerState.WORKING
        await trio.sleep(5)
        await settle()
        assert worker.state.value is (WorkerState.STOPPED if how == "stop" else WorkerState.READY)


async def test_a_storm_of_cancels(autojump_clock: MockClock) -> None:
    """Promise 4: however many jobs are cancelled, at whatever moment, the pool is whole afterwards."""
    handler = Counting()
    async with open_pool(config(handler, num_workers=3)) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(300):
                scope = trio.CancelScope(deadline=number % 17 / 2)
                text = ("hang", "sleep 1", "hello")[number % 3]
                nursery.start_soon(cancelled, scope, lambda text=text: ask(pool, text))
        await trio.sleep(60)
        now = pool.statistics()
        assert now.idle == 3
        assert sum(now.jobs.values()) == 300 - sum(1 for number in range(300) if number % 17 == 0)
        check(pool)


# Ctrl-C


def interrupt_after(seconds: float) -> None:
    """Press Ctrl-C later, at a moment when trio can't raise it on the spot: it strikes the main task where it waits."""

    async def press() -> None:
        await trio.sleep(seconds)
        signal.raise_signal(signal.SIGINT)

    trio.lowlevel.spawn_system_task(press)


def run(main: Callable[[], Awaitable[object]]) -> None:
    """Run `main` on a clock that jumps; KeyboardInterrupt must leave it, bare."""
    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=MockClock(autojump_threshold=0))


def test_interrupt_while_opening() -> None:
    """Ctrl-C while the pool opens leaves as itself, and nothing is left."""
    recorder = Recorder()

    async def boot(slot: int) -> None:
        await trio.sleep(30 * slot)

    async def main() -> None:
        interrupt_after(3)
        async with open_pool(config(work, boot=boot, num_workers=3), observer=recorder):
            pytest.fail("it opened")

    run(main)
    assert recorder.of("DESTRUCT") == ["closing"]


@pytest.mark.parametrize("where", ["waiting", "running", "writing", "leased", "job in lease", "stream", "map", "block"])
def test_interrupt(where: str) -> None:
    """Ctrl-C strikes like a cancel, wherever the main task is: it leaves the block bare, and nothing is left."""
    pools: list[Pool] = []
    recorder = Recorder()
    others: list[BaseException] = []

    async def other(pool: Pool) -> None:
        try:
            await ask(pool, "hang")
        except trio.ClosedResourceError as error:
            others.append(error)

    async def main() -> None:
        interrupt_after(3)
        cfg = config(stream_for_ever if where == "stream" else work, num_workers=2, capacity=1000)
        async with open_pool(cfg, observer=recorder) as pool:
            pools.append(pool)
            trio.lowlevel.spawn_system_task(other, pool)
            await settle()
            if where == "waiting":
                trio.lowlevel.spawn_system_task(other, pool)
                await settle()
                await ask(pool)
            elif where == "running":
                await ask(pool, "hang")
            elif where == "writing":
                worker = next(worker for worker in pool.workers if worker.current is None)
                relay: Any = worker.process.relay  # type: ignore[union-attr]
                relay._there.write(b"x" * 999)
                await pool.exec(Payload(b"x" * 10_000))
            elif where == "leased":
                async with pool.lease():
                    await trio.sleep_forever()
            elif where == "job in lease":
                async with pool.lease() as leased:
                    await ask(leased, "hang")
            elif where == "stream":
                async with pool.stream(Payload()) as parts:
                    await anext(parts)
                    await anext(parts)
            elif where == "map":
                async with pool.map([Payload(b"hang")] * 5) as replies:
                    await anext(replies)
            else:
                await trio.sleep_forever()

    run(main)
    (pool,) = pools
    assert pool.workers == ()
    assert len(others) == (2 if where == "waiting" else 1)
    assert len(recorder.of("CREATED")) == len(recorder.of("DESTRUCT"))


def test_interrupt_while_draining() -> None:
    """Ctrl-C while the block waits for the last jobs leaves it at once."""
    ended: list[float] = []

    async def main() -> None:
        interrupt_after(3)
        try:
            async with open_pool(config(work)) as pool:
                trio.lowlevel.spawn_system_task(patient, pool)
                await settle()
        finally:
            ended.append(trio.current_time())
            assert pool.workers == ()

    async def patient(pool: Pool) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await ask(pool, "hang")

    run(main)
    assert ended == [3]


def test_interrupt_while_closing() -> None:
    """Ctrl-C while a worker has its time to stop leaves the block at once."""
    ended: list[float] = []

    async def main() -> None:
        interrupt_after(3)
        try:
            async with open_pool(config(stream_for_ever, destroy_timeout=1000)) as pool:
                async with pool.stream(Payload()) as parts:
                    await anext(parts)
                await settle()
        finally:
            ended.append(trio.current_time())
            assert pool.workers == ()

    run(main)
    assert ended == [3]


def test_interrupt_twice() -> None:
    """A second Ctrl-C while the workers are being reaped does not tear that apart."""

    class SlowToDie:
        async def __call__(self, job: Job) -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(10)

    ended: list[float] = []
    recorder = Recorder()

    async def main() -> None:
        interrupt_after(3)
        interrupt_after(5)
        interrupt_after(7)
        try:
            async with open_pool(config(SlowToDie()), observer=recorder) as pool:
                await ask(pool)
        finally:
            ended.append(trio.current_time())
            assert pool.workers == ()

    run(main)
    assert ended == [13]
    assert len(recorder.of("DESTRUCT")) == 1


def test_interrupt_in_a_task_of_the_callers() -> None:
    """Ctrl-C that trio raises in a child task, around its exec, comes out of the block in the caller's own group."""

    async def job(pool: Pool) -> None:
        await ask(pool)
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    async def main() -> None:
        try:
            async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
                nursery.start_soon(job, pool)
        except BaseExceptionGroup as group:
            assert [type(error) for error in group.exceptions] == [KeyboardInterrupt]
            raise group.exceptions[0] from None
        finally:
            assert pool.workers == ()

    run(main)


def test_interrupt_in_a_memory_workers_handler() -> None:
    """Ctrl-C that strikes in a handler in memory, which shares the process, leaves open_pool as itself."""

    async def handler(job: Job) -> None:
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        async with open_pool(config(handler)) as pool:
            await ask(pool)

    run(main)


# checkpoints


async def test_each_function_is_a_checkpoint(autojump_clock: MockClock) -> None:
    """Each public async function executes a checkpoint on each path that returns."""
    async with AsyncExitStack() as stack:
        with assert_checkpoints():
            pool = await stack.enter_async_context(open_pool(config(stream_or_work, num_workers=2)))
        with assert_checkpoints():
            await pool.exec(Payload(b"x"))
        stream = pool.stream(Payload(b"stream"))
        with assert_checkpoints():
            parts = await stream.__aenter__()
        for _ in range(3):
            with assert_checkpoints():
                await anext(parts)
        for _ in range(2):
            with assert_checkpoints(), pytest.raises(StopAsyncIteration):
                await anext(parts)
        await stream.__aexit__(None, None, None)
        with assert_checkpoints():
            async with pool.map([]):
                pass
        async with pool.map([Payload(b"x")] * 3) as replies:
            await settle()
            for _ in range(3):
                with assert_checkpoints():
                    await anext(replies)
            for _ in range(2):
                with assert_checkpoints(), pytest.raises(StopAsyncIteration):
                    await anext(replies)
        lease = pool.lease()
        with assert_checkpoints():
            worker = await lease.__aenter__()
        with assert_checkpoints():
            await worker.exec(Payload(b"x"))
        await lease.__aexit__(None, None, None)
        for _ in range(2):
            with assert_checkpoints():
                await worker.stop()
            with assert_checkpoints():
                await worker.wait()
        for _ in range(2):
            with assert_checkpoints():
                await pool.workers[0].kill()
        with assert_checkpoints():
            await stack.aclose()
    with assert_checkpoints():
        async with open_worker(config(work)) as worker, worker.stream(Payload(b"x")) as parts:
            with assert_checkpoints():
                await anext(parts)


def stream_or_work(job: Job) -> Any:
    return three(job) if job.body == b"stream" else work(job)


async def three(job: Job) -> AsyncGenerator[bytes]:
    for _ in range(3):
        yield b"part"


async def enter(context: Any) -> None:
    async with context:
        pytest.fail("it was entered")


async def test_in_a_cancelled_scope_nothing_begins(autojump_clock: MockClock) -> None:
    """Each function raises Cancelled promptly where it is cancelled already, and nothing has happened."""
    handler = Counting()
    async with open_pool(config(handler, num_workers=2)) as pool, pool.lease() as leased:
        worker = next(worker for worker in pool.workers if worker is not leased)

        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: pool.exec(Payload(b"x")),
            lambda: leased.exec(Payload(b"x")),
            lambda: enter(pool.stream(Payload(b"x"))),
            lambda: enter(leased.stream(Payload(b"x"))),
            lambda: enter(pool.lease()),
            lambda: enter(open_pool(config(handler))),
            lambda: enter(open_worker(config(handler))),
            worker.stop,
            worker.kill,
            worker.wait,
        ]
        for call in calls:
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
            await settle()
            now = pool.statistics()
            assert (now.idle, now.leased, now.jobs, now.exits, now.starts) == (1, 1, {}, {}, 2)
        assert handler.began == []
        assert [worker.state.num_execs for worker in pool.workers] == [0, 0]
    assert trio.current_time() == 0


async def test_a_map_in_a_cancelled_scope(autojump_clock: MockClock) -> None:
    """A map entered where it is cancelled already begins no job, and closes its source."""
    handler = Counting()
    taken = 0

    def source() -> Iterator[Payload]:
        nonlocal taken
        while True:
            taken += 1
            yield Payload(b"x")

    iterator = source()
    async with open_pool(config(handler)) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with pool.map(iterator) as replies:
                await anext(replies)
        assert scope.cancelled_caught
        assert (handler.began, taken) == ([], 0)
        with pytest.raises(StopIteration):
            next(iterator)
        await healed(pool, {})


async def test_leaving_in_a_cancelled_scope(autojump_clock: MockClock) -> None:
    """A block that is left normally in a cancelled scope is left by that cancel: its workers are killed."""
    recorder = Recorder()
    with trio.CancelScope() as scope:
        async with open_pool(config(work), observer=recorder):
            scope.cancel()
    assert scope.cancelled_caught
    assert [worker.state.value for worker in recorder.workers] == [WorkerState.ERRORED]


async def test_a_worker_that_ends_while_its_lease_is_held(autojump_clock: MockClock) -> None:
    """Promise 4: a leased worker that is killed from elsewhere is replaced while the lease is still held."""

    async def kill(worker: Worker) -> None:
        await worker.kill()

    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as worker:
            nursery.start_soon(kill, worker)
            await settle()
            with pytest.raises(trio.ClosedResourceError):
                await ask(worker)
            assert await ask(pool) == "hello"
        await healed(pool, {"killed": 1})
