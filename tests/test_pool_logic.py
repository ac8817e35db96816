"""What a pool decides, on workers in memory and a clock that jumps: promises 1, 2, 3, 5, 6 and 9 of the design."""

import contextlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_workers import (
    AllocateTimeout,
    Config,
    JobError,
    Limits,
    Payload,
    Pool,
    QueueFull,
    Restart,
    RestartLimitExceeded,
    SpawnError,
    Worker,
    WorkerCrashed,
    WorkerError,
    WorkerEvent,
    WorkersError,
    WorkerState,
    open_pool,
    open_worker,
)
from trio_workers.child import STOP_REQUEST, Job, Reply
from trio_workers.testing import BadBoot, Crash, MemoryFactory


def config(handler: Any, *, boot: Any = None, capacity: int = 65536, **fields: Any) -> Config:
    """A pool of one worker, without jitter."""
    fields = {"num_workers": 1, "restart": Restart(jitter=0.0), "destroy_timeout": 5.0, **fields}
    return Config(command=["any"], factory=MemoryFactory(handler, boot=boot, _capacity=capacity), **fields)


async def work(job: Job) -> Any:
    """Do what the body says."""
    what, _, argument = job.body.decode().partition(" ")
    if what == "sleep":
        await trio.sleep(float(argument))
    elif what == "fail":
        raise ValueError(argument)
    elif what == "crash":
        raise Crash(int(argument), stderr="last words")
    elif what == "stop":
        return STOP_REQUEST
    elif what == "hang":
        await trio.sleep_forever()
    return Reply(job.body, job.context)


async def ask(pool: Pool | Worker, text: str = "hello") -> str:
    return (await pool.exec(Payload(text.encode()))).body.decode()


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def check(pool: Pool) -> None:
    """What holds of a pool at every moment."""
    now = pool.statistics()
    assert now.idle + now.busy + now.starting + now.leased + now.stopping == len(pool.workers)
    assert now.target <= now.starts
    assert len(pool.workers) <= 2 * now.target
    assert now.starts == len(pool.workers) + sum(now.exits.values())
    assert [worker.slot for worker in pool.workers] == sorted(worker.slot for worker in pool.workers)
    if not now.waiting:
        assert now.longest_wait == 0.0


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None, Any]] = []
        self.workers: list[Worker] = []

    def __call__(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        self.events.append((event.name, None if worker is None else worker.pid, context))
        if event is WorkerEvent.CREATED:
            assert worker is not None
            self.workers.append(worker)

    def of(self, name: str) -> list[Any]:
        return [context for event, _, context in self.events if event == name]


# 1: the nursery owns the workers, and the block is left as it should be


async def test_leaving_finishes_jobs_that_run_and_wait(autojump_clock: MockClock) -> None:
    """Promise 1: left normally, accepted jobs of other tasks finish, and later ones are refused."""
    answers: list[str] = []

    async def call(text: str) -> None:
        answers.append(await ask(pool, text))

    async with trio.open_nursery() as nursery:
        async with open_pool(config(work)) as pool:
            for text in ("sleep 3", "sleep 2", "sleep 1"):
                nursery.start_soon(call, text)
                await settle()
            assert pool.statistics().waiting == 2
        assert answers == ["sleep 3", "sleep 2", "sleep 1"]
        assert trio.current_time() == 6
    with pytest.raises(trio.ClosedResourceError, match="closed"):
        await ask(pool)


async def test_jobs_are_refused_while_closing(autojump_clock: MockClock) -> None:
    """Promise 1: from the moment the block is left nothing new is taken, by exec, stream, lease or map."""
    async with trio.open_nursery() as nursery:
        opened, leave = trio.Event(), trio.Event()
        pool: Pool

        async def own() -> None:
            nonlocal pool
            async with open_pool(config(work)) as pool:
                nursery.start_soon(ask, pool, "sleep 5")
                await settle()
                opened.set()
                await leave.wait()

        nursery.start_soon(own)
        await opened.wait()
        leave.set()
        await settle()
        assert pool.statistics().busy == 1
        with pytest.raises(trio.ClosedResourceError):
            await ask(pool)
        with pytest.raises(trio.ClosedResourceError):
            async with pool.stream(Payload(b"x")):
                pass
        with pytest.raises(trio.ClosedResourceError):
            async with pool.lease():
                pass
        with pytest.raises(trio.ClosedResourceError):
            async with pool.map([Payload(b"x")]) as replies:
                await anext(replies)
        assert pool.statistics().jobs["closed"] >= 2


async def test_soft_stop(autojump_clock: MockClock) -> None:
    """Promise 1: idle workers get the stop frame and leave with status 0."""
    recorder = Recorder()
    async with open_pool(config(work, num_workers=3), observer=recorder) as pool:
        await ask(pool)
    assert recorder.of("DESTRUCT") == ["closing"] * 3
    assert recorder.of("ERROR") == []
    for worker in recorder.workers:
        assert worker.state.value is WorkerState.STOPPED
        await worker.wait()
    assert trio.current_time() == 0


async def test_a_worker_that_does_not_stop_is_killed(autojump_clock: MockClock) -> None:
    """Promise 1: after the stop frame comes destroy_timeout, and then SIGKILL."""
    recorder = Recorder()

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"first"
        await trio.sleep_forever()

    async with (
        open_pool(config(handler, destroy_timeout=3), observer=recorder) as pool,
        pool.stream(Payload()) as parts,
    ):
        await anext(parts)  # left early: the worker is asked to end the stream, and does not
    assert trio.current_time() == 3
    assert recorder.workers[0].state.value is WorkerState.ERRORED
    with pytest.raises(WorkerError) as caught:
        await recorder.workers[0].wait()
    assert caught.value.signal == 9


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), ExceptionGroup("mine", [KeyError(1), ValueError(2)])],
    ids=lambda error: type(error).__name__,
)
async def test_what_leaves_the_block_is_not_wrapped(error: BaseException, autojump_clock: MockClock) -> None:
    """Promise 1: a user's exception leaves open_pool as it is; workers are killed, and callers elsewhere get Closed."""
    endings: list[type[BaseException]] = []

    async def call() -> None:
        try:
            await ask(pool, "hang")
        except trio.ClosedResourceError as closed:
            assert closed.__cause__ is None
            endings.append(type(closed))

    recorder = Recorder()
    async with trio.open_nursery() as nursery:
        with pytest.raises(type(error)) as caught:
            async with open_pool(config(work, num_workers=2), observer=recorder) as pool:
                for _ in range(3):
                    nursery.start_soon(call)
                await settle()
                check(pool)
                raise error
        assert caught.value is error
        assert pool.workers == ()
    assert endings == [trio.ClosedResourceError] * 3
    assert trio.current_time() == 0
    assert recorder.of("DESTRUCT") == ["closing"] * 2
    assert all(worker.state.value is WorkerState.ERRORED for worker in recorder.workers)


async def test_a_cancel_leaves_the_block(autojump_clock: MockClock) -> None:
    """Promise 1: a cancel from outside kills the workers at once and comes out as that cancel."""
    with trio.CancelScope() as scope:
        async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(ask, pool, "hang")
            await settle()
            scope.cancel()
    assert scope.cancelled_caught
    assert pool.workers == ()
    assert trio.current_time() == 0


async def test_a_callers_own_nursery_in_the_block(autojump_clock: MockClock) -> None:
    """Promise 1: what a nursery of the user's raises in the block is that nursery's group, and no group around it."""
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(config(work, num_workers=2)) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(ask, pool, "fail here")
            nursery.start_soon(ask, pool, "hang")
    assert [type(error) for error in caught.value.exceptions] == [JobError]


async def test_a_return_from_the_block(autojump_clock: MockClock) -> None:
    """Promise 1: leaving by return or break is leaving normally."""

    async def run() -> str:
        async with open_pool(config(work)) as pool:
            return await ask(pool)

    assert await run() == "hello"
    for _ in range(2):
        async with open_pool(config(work)):
            break


async def test_the_first_spawn_error_ends_the_opening(autojump_clock: MockClock) -> None:
    """Promise 1: the first worker that does not become ready ends the opening with its SpawnError, bare."""

    async def boot(slot: int) -> None:
        if slot == 1:
            raise BadBoot("no such table")
        await trio.sleep(100)

    with pytest.raises(SpawnError) as caught:
        async with open_pool(config(work, boot=boot, num_workers=3)):
            pytest.fail("it opened")
    assert (caught.value.slot, caught.value.returncode, caught.value.stderr) == (1, 1, "no such table")
    assert caught.value.started is False
    assert trio.current_time() == 0


async def test_boot_timeout(autojump_clock: MockClock) -> None:
    """A worker that never answers the handshake is a SpawnError after boot_timeout."""

    async def boot(slot: int) -> None:
        await trio.sleep_forever()

    with pytest.raises(SpawnError, match="boot_timeout") as caught:
        async with open_pool(config(work, boot=boot, boot_timeout=30)):
            pytest.fail("it opened")
    assert trio.current_time() == 30
    assert caught.value.phase == "handshake"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("field", ["command", "env"])
async def test_a_callable_in_the_config_that_raises(
    field: str, error: type[BaseException], autojump_clock: MockClock
) -> None:
    """A command or env function that raises at the opening is a SpawnError; an interrupt in it comes out as itself."""

    def function(slot: int) -> Any:
        raise error("mine")

    cfg = config(work)
    cfg = Config(**{"command": ["any"], "factory": cfg.factory, "num_workers": 2, field: function})
    with pytest.raises(
        SpawnError if error is ValueError else error, match="mine" if error is not KeyboardInterrupt else None
    ):
        async with open_pool(cfg):
            pytest.fail("it opened")


async def test_hard_memory_in_another_unit(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """Limits: a bound below 1 MiB, which was meant in megabytes, is told in bytes, not as 0 MiB."""
    monkeypatch.setattr(Worker, "resident_memory", lambda worker: 10 * 2**20)
    async with open_pool(config(work, limits=Limits(hard_memory=512))) as pool:
        with pytest.raises(WorkerError, match=r"used 10485760 bytes of memory, more than hard_memory \(512 bytes\), "):
            await ask(pool, "sleep 5")


# 2 and 3: one ending, at most once, and the budget of waiting


async def test_allocate_timeout(autojump_clock: MockClock) -> None:
    """Promise 2: a job that gets no worker in time leaves the queue, and says who had them."""
    async with open_pool(config(work, allocate_timeout=4)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 10")
        await settle()
        with pytest.raises(AllocateTimeout, match=r"of 1 workers 1 are busy.*did not start") as caught:
            await pool.exec(Payload(b"late"), label="late")
        assert "'late'" in str(caught.value)
        assert isinstance(caught.value, trio.TooSlowError)
        assert caught.value.started is False
        assert trio.current_time() == 4
        assert pool.statistics().waiting == 0
        check(pool)
    assert pool.statistics().jobs == {"allocate_timeout": 1, "replied": 1}


async def test_allocate_timeout_is_a_budget(autojump_clock: MockClock) -> None:
    """Promise 3: a job that is handed on keeps what is left of its time to wait."""
    boots = 0

    async def boot(slot: int) -> None:
        nonlocal boots
        boots += 1
        if boots > 1:
            await trio.sleep(50)

    async with open_pool(config(work, boot=boot, allocate_timeout=10)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 6")
        await settle()
        with pytest.raises(AllocateTimeout):
            await ask(pool, "stop")
        assert trio.current_time() == 10
        check(pool)


async def test_a_job_that_has_no_time_left_is_still_given_a_free_worker(autojump_clock: MockClock) -> None:
    """Promise 3: the budget is for waiting: a job handed on with little time left runs where a worker is free."""
    asked = Counter[bytes]()

    async def handler(job: Job) -> Any:
        asked[job.body] += 1
        if job.body == b"twice" and asked[job.body] == 1:
            return STOP_REQUEST
        return await work(job)

    async with open_pool(config(handler, num_workers=2, allocate_timeout=5)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 4.9")
        nursery.start_soon(ask, pool, "sleep 4.9")
        await settle()
        assert await ask(pool, "twice") == "twice"
    assert asked[b"twice"] == 2


async def test_spawn_errors_are_told_by_allocate_timeout(autojump_clock: MockClock) -> None:
    """Promise 6: at runtime a failed start is no exception of exec; AllocateTimeout tells the last one."""
    boots = 0

    async def boot(slot: int) -> None:
        nonlocal boots
        boots += 1
        if boots > 1:
            raise BadBoot("disk full")

    recorder = Recorder()
    async with open_pool(config(work, boot=boot, allocate_timeout=20), observer=recorder) as pool:
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        with pytest.raises(AllocateTimeout, match=r"starts of a worker failed.*exited with status 1") as caught:
            await ask(pool)
        assert isinstance(caught.value.last_spawn_error, SpawnError)
        assert caught.value.last_spawn_error.stderr == "disk full"
        check(pool)
    errors = recorder.of("ERROR")
    assert isinstance(errors[0], WorkerCrashed)
    assert {type(error) for error in errors[1:]} == {SpawnError}
    assert pool.statistics().failed_starts == len(errors) - 1


@pytest.mark.parametrize(
    ("failing", "starts", "slots"),
    [
        (
            1,
            "The last start of a worker failed: ",
            "1 are busy, 0 starting, 0 leased, 0 stopping, 1 waits to be tried again,",
        ),
        (
            2,
            "The last 2 starts of a worker failed: ",
            "0 are busy, 0 starting, 0 leased, 0 stopping, 2 wait to be tried again,",
        ),
    ],
)
async def test_allocate_timeout_counts_slots_that_wait(
    failing: int, starts: str, slots: str, autojump_clock: MockClock
) -> None:
    """Promise 6: the numbers in AllocateTimeout add up: a slot that waits to be tried again has no worker to count."""
    booted = Counter[int]()

    async def boot(slot: int) -> None:
        booted[slot] += 1
        if booted[slot] > 1:
            raise BadBoot("disk full")

    restart = Restart(initial=100.0, maximum=100.0, jitter=0.0)
    cfg = config(work, boot=boot, num_workers=2, restart=restart, allocate_timeout=20)
    async with open_pool(cfg) as pool, trio.open_nursery() as nursery:
        for _ in range(failing):
            with pytest.raises(WorkerCrashed):
                await ask(pool, "crash 1")
        if failing == 1:
            nursery.start_soon(ask, pool, "sleep 30")
        await settle()
        with pytest.raises(AllocateTimeout) as caught:
            await ask(pool)
        assert f"of 2 workers {slots} and 1 callers wait" in str(caught.value)
        assert starts in str(caught.value)
        now = pool.statistics()
        assert now.target - (now.idle + now.busy + now.starting + now.leased) == failing


async def test_reset_after_one_that_failed(autojump_clock: MockClock) -> None:
    """Reset: after a failure those of the new release that came up go on; a further reset waits until they are gone."""
    boots = 0

    async def boot(slot: int) -> None:
        nonlocal boots
        boots += 1
        await trio.sleep(10)
        if boots == 3:
            raise BadBoot("disk full")

    async def new(job: Job) -> Any:
        return b"new"

    async def ask_all() -> list[str]:
        return sorted([await ask(pool, "old") for _ in range(4)])

    async with open_pool(config(work, num_workers=4)) as pool:
        with pytest.raises(SpawnError, match="disk full"):
            await pool.reset(config(new, boot=boot, num_workers=4))
        assert await ask_all() == ["new", "new", "old", "old"]
        await pool.reset()
        assert await ask_all() == ["old"] * 4


async def test_queue_full(autojump_clock: MockClock) -> None:
    """Promise 2: more callers than max_queue are refused at once, and nobody else is troubled."""
    async with open_pool(config(work, max_queue=2)) as pool, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, pool, "sleep 1")
        await settle()
        with pytest.raises(QueueFull, match="max_queue is 2") as caught:
            await ask(pool)
        assert caught.value.started is False
        assert pool.statistics().waiting == 2
    assert pool.statistics().jobs == {"queue_full": 1, "replied": 3}


async def test_no_queue_at_all(autojump_clock: MockClock) -> None:
    """Promise 2: with max_queue=0 a job is run at once or refused."""
    async with open_pool(config(work, max_queue=0)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 1")
        await settle()
        with pytest.raises(QueueFull):
            await ask(pool)
        await trio.sleep(1)
        await settle()
        assert await ask(pool) == "hello"


async def test_stop_requests_are_handed_on_so_often(autojump_clock: MockClock) -> None:
    """Promise 3: a job that workers refuse is handed on num_workers + 1 times, and then is a WorkerError."""
    asked = 0

    async def handler(job: Job) -> Any:
        nonlocal asked
        asked += 1
        return STOP_REQUEST

    async with open_pool(config(handler, num_workers=2)) as pool:
        with pytest.raises(WorkerError) as caught:
            await ask(pool)
        assert type(caught.value) is WorkerError
        assert (caught.value.phase, caught.value.started) == ("retiring", False)
        assert asked == 4
        check(pool)
    assert pool.statistics().jobs == {"retired": 1}
    assert pool.statistics().exits["stop request"] == 4


async def test_a_stop_request_goes_to_the_front(autojump_clock: MockClock) -> None:
    """Promise 3: a job that is handed on comes before those that came after it."""
    order: list[bytes] = []
    refused: set[bytes] = set()

    async def handler(job: Job) -> Any:
        if job.body not in refused:
            refused.add(job.body)
            if job.body == b"1":
                return STOP_REQUEST
        await trio.sleep(1)
        order.append(job.body)
        return None

    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ask, pool, str(number))
            await settle()
    assert order == [b"0", b"1", b"2", b"3"]


async def test_an_echo_of_the_stop_request_is_a_reply(autojump_clock: MockClock) -> None:
    """Promise 3: only the constant itself asks to be replaced; a body of these bytes is a body."""
    async with open_pool(config(work)) as pool:
        assert await ask(pool, STOP_REQUEST.decode()) == STOP_REQUEST.decode()
        assert len(pool.statistics().exits) == 0


async def test_a_worker_found_dead_costs_no_job(autojump_clock: MockClock) -> None:
    """Promise 3: a job given to a worker that has just died is handed on, and runs once."""
    ran = 0

    async def handler(job: Job) -> None:
        nonlocal ran
        ran += 1

    async with open_pool(config(handler, num_workers=2)) as pool:
        await ask(pool)
        await ask(pool)
        for worker in pool.workers:
            worker.process.kill()  # type: ignore[union-attr]
        await ask(pool)
        assert ran == 3
        await settle()
        check(pool)
        assert pool.statistics().exits == {"crashed": 2}


async def test_fair(autojump_clock: MockClock) -> None:
    """Promise 9: jobs get workers in the order in which they came, whoever cancels between them."""
    order: list[str] = []
    scopes = {number: trio.CancelScope() for number in range(20)}

    async def handler(job: Job) -> None:
        order.append(job.body.decode())
        await trio.sleep(1)

    async def call(number: int) -> None:
        with scopes[number]:
            await ask(pool, str(number))

    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(call, number)
            await settle()
        for number in (5, 9, 10):
            scopes[number].cancel()
    assert [int(number) for number in order] == [n for n in range(20) if n not in (5, 9, 10)]
    assert trio.current_time() == 17


async def test_a_newcomer_does_not_overtake(autojump_clock: MockClock) -> None:
    """Promise 9: a job that comes while others wait stands behind them, though a worker becomes free just then."""
    order: list[str] = []

    async def call(text: str) -> None:
        await ask(pool, text)
        order.append(text)

    async def hog() -> None:
        await ask(pool, "sleep 1")
        order.append("hog")
        await call("again")  # at once, in the same step as the reply

    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(hog)
        await settle()
        nursery.start_soon(call, "waiting")
    assert order == ["hog", "waiting", "again"]


# 5 and 6: one caller pays, and the pool heals


async def test_a_crash_fails_its_own_job_only(autojump_clock: MockClock) -> None:
    """Promise 5: a crash fails the job that was on that worker and no other; the error tells what there is to know."""
    endings: list[Any] = []

    async def call(text: str) -> None:
        try:
            endings.append(await ask(pool, text))
        except WorkerCrashed as error:
            endings.append(error)

    async with open_pool(config(work, num_workers=2)) as pool:
        victims = {worker.pid for worker in pool.workers}
        async with trio.open_nursery() as nursery:
            for text in ("crash -11", "sleep 1", "sleep 2", "hello"):
                nursery.start_soon(call, text)
                await settle()
        check(pool)
        assert pool.statistics().idle == 2
    error = next(ending for ending in endings if not isinstance(ending, str))
    assert sorted(ending for ending in endings if isinstance(ending, str)) == ["hello", "sleep 1", "sleep 2"]
    assert error.pid in victims
    assert (error.returncode, error.signal, error.stderr) == (-11, 11, "last words")
    assert (error.phase, error.started) == ("running", True)
    assert error.__notes__ == ["The last lines of its stderr:\nlast words"]
    assert pool.statistics().jobs == {"crashed": 1, "replied": 3}


async def test_crashes_under_jobs_are_replaced_at_once_and_never_counted(autojump_clock: MockClock) -> None:
    """Promise 6: after a job died of a worker there is another at once, however often, and the pool never gives up."""
    cfg = config(work, restart=Restart(initial=5, jitter=0, give_up_after=1))
    async with open_pool(cfg) as pool:
        for _ in range(30):
            with pytest.raises(WorkerCrashed):
                await ask(pool, "crash 1")
        assert await ask(pool) == "hello"
        assert trio.current_time() == 0
        check(pool)
        assert pool.statistics().restarts == {0: 30}
        assert pool.statistics().starts == 31


async def test_replacement_is_off_the_callers_path(autojump_clock: MockClock) -> None:
    """Promise 6: who lost a worker does not wait for the next; another worker serves meanwhile."""
    boots = 0

    async def boot(slot: int) -> None:
        nonlocal boots
        boots += 1
        if boots > 2:
            await trio.sleep(50)

    async with open_pool(config(work, boot=boot, num_workers=2)) as pool:
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        await settle()
        assert (pool.statistics().idle, pool.statistics().starting) == (1, 1)
        assert await ask(pool) == "hello"
        assert trio.current_time() == 0
        await trio.sleep(50)
        await settle()
        assert (pool.statistics().idle, pool.statistics().starting) == (2, 0)


async def test_back_off(autojump_clock: MockClock) -> None:
    """Promise 6: failed boots are tried again after initial, then factor times as long, up to maximum."""
    boots: list[float] = []

    async def boot(slot: int) -> None:
        boots.append(trio.current_time())
        if 1 < len(boots) < 8:
            raise BadBoot

    restart = Restart(initial=1, factor=2, maximum=5, jitter=0)
    async with open_pool(config(work, boot=boot, restart=restart)) as pool:
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        assert await ask(pool) == "hello"
        assert boots == [0, 0, 1, 3, 7, 12, 17, 22]
        # A job was served, so the count starts again.
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        await settle()
        assert boots[-1] == 22
        check(pool)


async def test_jitter(autojump_clock: MockClock) -> None:
    """Promise 6: each delay is varied by the share jitter."""
    boots: list[float] = []

    async def boot(slot: int) -> None:
        boots.append(trio.current_time())
        if len(boots) > 1:
            raise BadBoot

    restart = Restart(initial=10, factor=1, maximum=10, jitter=0.5)
    async with open_pool(config(work, boot=boot, restart=restart)) as pool:
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        await trio.sleep(500)
    delays = [after - before for before, after in itertools.pairwise(boots[1:])]
    assert len(set(delays)) > 10
    assert all(5 <= delay <= 15 for delay in delays)


async def test_death_while_idle_before_the_first_job_backs_off(autojump_clock: MockClock) -> None:
    """Promise 6: a worker that shakes hands and dies unused waits longer each time; the handshake resets nothing."""
    recorder = Recorder()
    restart = Restart(initial=1, factor=3, maximum=100, jitter=0, stable_after=50)
    created: list[float] = []

    def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        recorder(event, worker, context)
        if event is WorkerEvent.CREATED:
            created.append(trio.current_time())

    async with open_pool(config(work, restart=restart), observer=observer) as pool:
        for delay in (1, 3, 9):
            pool.workers[0].process.kill()  # type: ignore[union-attr]
            await settle()
            assert pool.workers == ()
            await trio.sleep(delay)
            await settle()
            assert len(pool.workers) == 1
        assert created == [0, 1, 4, 13]
        await trio.sleep(50)  # it lived for stable_after
        pool.workers[0].process.kill()  # type: ignore[union-attr]
        await trio.sleep(1)
        await settle()
        assert created[-1] == 64
    assert [error.phase for error in recorder.of("ERROR")] == ["idle"] * 4


async def test_death_while_idle_after_a_job_is_replaced_at_once(autojump_clock: MockClock) -> None:
    """Promise 6: a worker that has served is replaced at once when it dies idle."""
    async with open_pool(config(work)) as pool:
        await ask(pool)
        pool.workers[0].process.kill()  # type: ignore[union-attr]
        await settle()
        assert pool.statistics().idle == 1
        assert trio.current_time() == 0


async def test_giving_up(autojump_clock: MockClock) -> None:
    """Promise 6: after give_up_after failed boots in a row the block ends by RestartLimitExceeded, for all to know."""
    boots = 0

    async def boot(slot: int) -> None:
        nonlocal boots
        boots += 1
        if boots > 2:
            raise BadBoot("no licence")

    waiting: list[BaseException] = []

    async def wait() -> None:
        try:
            await ask(pool)
        except trio.ClosedResourceError as error:
            waiting.append(error)

    async def run() -> None:
        try:
            await ask(pool, "hang")
        except trio.ClosedResourceError as error:
            waiting.append(error)

    recorder = Recorder()
    cfg = config(work, boot=boot, num_workers=2, restart=Restart(initial=1, jitter=0, give_up_after=4))
    async with trio.open_nursery() as nursery:
        with pytest.raises(RestartLimitExceeded, match="4 boots in a row") as caught:
            async with open_pool(cfg, observer=recorder) as pool:
                nursery.start_soon(run)
                await settle()
                with pytest.raises(WorkerCrashed):
                    await ask(pool, "crash 1")
                nursery.start_soon(wait)
                await trio.sleep_forever()
        assert boots == 2 + 4
        assert isinstance(caught.value.__cause__, SpawnError)
        assert caught.value.__cause__.stderr == "no licence"
        assert pool.workers == ()
    assert [error.__cause__ for error in waiting] == [caught.value] * 2
    with pytest.raises(trio.ClosedResourceError) as late:
        await ask(pool)
    assert late.value.__cause__ is caught.value


async def bad_after_the_first(slot: int, boots: list[int]) -> None:
    boots.append(slot)
    if len(boots) > 1:
        raise BadBoot("no licence")


async def test_an_error_of_the_users_while_giving_up(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """Promise 6: an error raised while the give-up unwinds the block wins; the give-up is its context, and logged."""
    boots: list[int] = []
    cfg = config(work, boot=lambda slot: bad_after_the_first(slot, boots), restart=Restart(give_up_after=3, jitter=0))
    with pytest.raises(ValueError, match="mine") as caught:
        async with open_pool(cfg) as pool:
            with pytest.raises(WorkerCrashed):
                await ask(pool, "crash 1")
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("mine")
    chain: list[BaseException] = []
    error: BaseException | None = caught.value
    while error is not None:
        chain.append(error)
        error = error.__context__
    assert any(isinstance(error, RestartLimitExceeded) for error in chain)
    assert any(record.levelno == logging.ERROR for record in caplog.records)


async def test_giving_up_while_closing(autojump_clock: MockClock) -> None:
    """Promise 6: a pool that can't finish its last jobs because it gives up says so when the block is left."""
    boots: list[int] = []
    cfg = config(work, boot=lambda slot: bad_after_the_first(slot, boots), restart=Restart(give_up_after=3, jitter=0))
    endings: list[Any] = []

    async def call(text: str) -> None:
        try:
            await ask(pool, text)
        except (WorkerCrashed, trio.ClosedResourceError) as error:
            endings.append(type(error))

    async with trio.open_nursery() as nursery:
        with pytest.raises(RestartLimitExceeded):
            async with open_pool(cfg) as pool:
                nursery.start_soon(call, "crash 1")
                await settle()
                nursery.start_soon(call, "never")
                await settle()
    assert endings == [WorkerCrashed, trio.ClosedResourceError]


async def test_a_dead_worker_is_replaced_while_closing_if_jobs_wait(autojump_clock: MockClock) -> None:
    """Promise 1: jobs accepted before the close are finished by a replacement if need be."""
    endings: list[Any] = []

    async def call(text: str) -> None:
        try:
            endings.append(await ask(pool, text))
        except WorkerCrashed as error:
            endings.append(type(error))

    async def handler(job: Job) -> Any:
        await trio.sleep(1)
        return await work(job)

    async with trio.open_nursery() as nursery:
        async with open_pool(config(handler)) as pool:
            for text in ("crash 1", "one", "two"):
                nursery.start_soon(call, text)
                await settle()
        assert endings == [WorkerCrashed, "one", "two"]


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_max_executions(limit: int, autojump_clock: MockClock) -> None:
    """Promise 6: max_executions is a hard bound, job errors included, and the replacement is there in time."""
    recorder = Recorder()
    jobs = 12
    async with open_pool(config(work, max_executions=limit), observer=recorder) as pool:
        for number in range(jobs):
            if number % 2:
                with pytest.raises(JobError):
                    await ask(pool, "fail x")
            else:
                await ask(pool)
            await settle()
            check(pool)
            assert pool.statistics().idle == 1
        assert trio.current_time() == 0
    for worker in recorder.workers:
        assert worker.state.num_execs <= limit
        assert worker.state.value is WorkerState.STOPPED
    assert [worker.state.num_execs for worker in recorder.workers].count(limit) == jobs // limit
    assert pool.statistics().exits == {"max_executions": jobs // limit, "closing": 1}
    assert recorder.of("ERROR") == []


async def test_the_successor_starts_ahead_of_the_last_job(autojump_clock: MockClock) -> None:
    """Promise 6: while the last permitted job runs its successor boots and stands by, and takes over at once."""
    boots = 0

    async def boot(slot: int) -> None:
        nonlocal boots
        boots += 1
        if boots > 1:
            await trio.sleep(5)

    async with open_pool(config(work, boot=boot, max_executions=1)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        assert [worker.slot for worker in pool.workers] == [0, 0]
        assert (pool.statistics().busy, pool.statistics().starting) == (1, 1)
        await trio.sleep(5)
        assert await ask(pool) == "hello"
        assert trio.current_time() == 5
        check(pool)


async def test_all_workers_at_once_with_max_executions_1(autojump_clock: MockClock) -> None:
    """Promise 6: many callers on workers that serve one job each: as many processes as jobs, never too many at once."""
    recorder = Recorder()
    cfg = config(work, num_workers=3, max_executions=1)
    async with open_pool(cfg, observer=recorder) as pool, trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(ask, pool, "sleep 1")
        for _ in range(10):
            await trio.sleep(0.5)
            check(pool)
    assert sorted(worker.state.num_execs for worker in recorder.workers)[-30:] == [1] * 30
    assert pool.statistics().jobs == {"replied": 30}


# observers and statistics


async def test_observer(autojump_clock: MockClock) -> None:
    """Observers are told in order, after the change: CREATED, then ERROR where there was one, then DESTRUCT, once."""
    recorder = Recorder()
    async with open_pool(config(work), observer=recorder) as pool:
        first = pool.workers[0].pid
        with pytest.raises(JobError):
            await ask(pool, "fail x")
        with pytest.raises(WorkerCrashed) as crash:
            await ask(pool, "crash 3")
        await settle()
        second = pool.workers[0].pid
    assert [(event, pid) for event, pid, _ in recorder.events] == [
        ("CREATED", first),
        ("ERROR", first),
        ("DESTRUCT", first),
        ("CREATED", second),
        ("DESTRUCT", second),
    ]
    contexts = [context for _, _, context in recorder.events]
    assert isinstance(contexts[1], WorkerCrashed)
    assert contexts[1].returncode == crash.value.returncode == 3
    assert (contexts[0], contexts[2], contexts[4]) == (None, "crashed", "closing")


async def test_the_observer_sees_a_complete_change(autojump_clock: MockClock) -> None:
    """When an observer is called the numbers add up."""
    pools: list[Pool] = []
    seen = 0

    def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        nonlocal seen
        for pool in pools:
            seen += 1
            check(pool)
            assert repr(pool)
            assert str(worker)

    async with open_pool(config(work, num_workers=2, max_executions=2), observer=observer) as pool:
        pools.append(pool)
        for text in ("hello", "crash 1", "stop", "hello", "hello"):
            with contextlib.suppress(WorkerError):
                await ask(pool, text)
            await settle()
    assert seen > 10


@pytest.mark.parametrize("event", list(WorkerEvent))
async def test_an_observer_that_raises(
    event: WorkerEvent, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """An observer that raises is logged and does no harm."""

    def observer(happened: WorkerEvent, worker: Worker | None, context: object) -> None:
        if happened is event:
            raise ValueError("clumsy")

    async with open_pool(config(work), observer=observer) as pool:
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        assert await ask(pool) == "hello"
    assert "clumsy" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_in_the_observer(error: type[BaseException], autojump_clock: MockClock) -> None:
    """An interrupt that strikes in an observer leaves the block as itself."""

    def observer(happened: WorkerEvent, worker: Worker | None, context: object) -> None:
        if happened is WorkerEvent.ERROR:
            raise error

    with pytest.raises(error):
        async with open_pool(config(work), observer=observer) as pool:
            with pytest.raises(WorkerCrashed):
                await ask(pool, "crash 1")
            await trio.sleep_forever()


async def test_an_observer_may_call_the_pool(autojump_clock: MockClock) -> None:
    """An observer may start work on the pool: it is called between the changes, never inside one."""
    async with trio.open_nursery() as nursery:
        answers: list[str] = []
        pools: list[Pool] = []

        async def call(pool: Pool) -> None:
            answers.append(await ask(pool))

        def observer(event: WorkerEvent, worker: Worker | None, context: object) -> None:
            for pool in pools:
                if event is WorkerEvent.CREATED:
                    nursery.start_soon(call, pool)

        async with open_pool(config(work), observer=observer) as pool:
            pools.append(pool)
            with pytest.raises(WorkerCrashed):
                await ask(pool, "crash 1")
            await settle()
            assert answers == ["hello"]


async def test_statistics(autojump_clock: MockClock) -> None:
    """Each job is counted once, by its outcome, whichever way it went through the pool."""
    streamed = 0

    async def handler(job: Job) -> Any:
        return await work(job)

    async with open_pool(config(handler, num_workers=2, allocate_timeout=1)) as pool:
        assert pool.statistics().jobs == {}
        await ask(pool)
        with pytest.raises(JobError):
            await ask(pool, "fail x")
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 1")
        with trio.move_on_after(1):
            await ask(pool, "hang")
        async with pool.stream(Payload(b"x")) as parts:
            async for _ in parts:
                streamed += 1
        async with pool.map([Payload(b"x")] * 3) as replies:
            async for _ in replies:
                streamed += 1
        async with pool.lease() as worker:
            await ask(worker)
            await ask(worker)
        assert streamed == 4
        await settle()
        check(pool)
        now = pool.statistics()
        assert now.jobs == {"replied": 7, "failed": 1, "crashed": 1, "cancelled": 1}
        assert now.exits == {"crashed": 1, "cancelled": 1}
        assert (now.target, now.idle, now.starts, now.failed_starts) == (2, 2, 4, 0)
        assert sum(now.restarts.values()) == 2
    assert pool.statistics().exits == {"crashed": 1, "cancelled": 1, "closing": 2}


async def test_longest_wait(autojump_clock: MockClock) -> None:
    """Statistics tell how long the first in the queue has waited."""
    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 10")
        await settle()
        nursery.start_soon(ask, pool)
        await trio.sleep(3)
        nursery.start_soon(ask, pool)
        await trio.sleep(1)
        assert (pool.statistics().waiting, pool.statistics().longest_wait) == (2, 4)


async def test_what_a_worker_shows(autojump_clock: MockClock) -> None:
    """A worker's state, count, label and text follow what it does."""
    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        (worker,) = pool.workers
        assert worker.state.value is WorkerState.READY
        assert worker.current is None
        before = worker.state.updated
        assert before.tzinfo is not None
        await trio.sleep(2)

        async def call() -> None:
            await pool.exec(Payload(b"sleep 1"), label="nap")

        nursery.start_soon(call)
        await settle()
        assert worker.state.value is WorkerState.WORKING
        assert worker.state.num_execs == 1
        assert worker.current is not None
        assert (worker.current.label, worker.current.started) == ("nap", 2)
        assert str(worker) == f"worker 0 (pid {worker.pid}, working, 1 job)"
        assert "1 busy" in repr(pool)
    assert worker.state.value is WorkerState.STOPPED
    assert worker.pid is not None
    assert worker.pid > 2**22


# lease


async def test_lease(autojump_clock: MockClock) -> None:
    """A lease is one worker to oneself: others wait, its jobs run in turn, and it goes back."""
    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        async with pool.lease(label="mine") as worker:
            assert pool.statistics().leased == 1
            assert worker.current is not None
            assert worker.current.label == "mine"
            nursery.start_soon(ask, pool, "other")
            await settle()
            assert pool.statistics().waiting == 1
            assert await ask(worker, "a") == "a"
            with pytest.raises(JobError):
                await ask(worker, "fail x")
            assert await ask(worker, "b") == "b"
            assert worker.state.num_execs == 3
            check(pool)
        with pytest.raises(trio.BusyResourceError, match="belongs to its pool"):
            await ask(worker)
        await settle()
        assert pool.statistics().idle == 1
        assert pool.workers == (worker,)


async def test_two_tasks_in_one_leased_worker(autojump_clock: MockClock) -> None:
    """A leased worker takes one job at a time."""
    async with open_pool(config(work)) as pool, pool.lease() as worker, trio.open_nursery() as nursery:
        nursery.start_soon(ask, worker, "sleep 1")
        await settle()
        with pytest.raises(trio.BusyResourceError, match="another task"):
            await ask(worker)


async def test_lease_waits_in_line(autojump_clock: MockClock) -> None:
    """Promise 9: a lease is queued as one job, with the errors of one."""
    async with open_pool(config(work, allocate_timeout=2, max_queue=1)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(ask, pool, "sleep 5")
        await settle()
        with pytest.raises(AllocateTimeout):
            async with pool.lease():
                pytest.fail("it was given")
        nursery.start_soon(ask, pool, "sleep 1")
        await settle()
        with pytest.raises(QueueFull):
            async with pool.lease():
                pytest.fail("it was given")
        nursery.cancel_scope.cancel()


async def test_a_stop_request_inside_a_lease(autojump_clock: MockClock) -> None:
    """Promise 3: a leased job that is refused is not handed on: WorkerError(phase="retiring", started=False)."""
    async with open_pool(config(work)) as pool:
        async with pool.lease() as worker:
            with pytest.raises(WorkerError) as caught:
                await ask(worker, "stop")
            assert type(caught.value) is WorkerError
            assert (caught.value.phase, caught.value.started) == ("retiring", False)
            with pytest.raises(trio.ClosedResourceError):
                await ask(worker)
        await trio.sleep(1)
        check(pool)
        assert await ask(pool) == "hello"


async def test_a_crash_inside_a_lease(autojump_clock: MockClock) -> None:
    """Promise 5: a crash under a leased job is that job's error; the pool replaces the worker meanwhile."""
    async with open_pool(config(work)) as pool:
        async with pool.lease() as worker:
            with pytest.raises(WorkerCrashed) as caught:
                await ask(worker, "crash 5")
            assert (caught.value.returncode, caught.value.phase, caught.value.started) == (5, "leased", True)
            with pytest.raises(WorkerCrashed) as again:
                await ask(worker)
            assert again.value.started is False
            assert await ask(pool) == "hello"
        check(pool)
        await settle()
        assert pool.statistics().idle == 1


async def test_max_executions_is_looked_at_when_a_lease_ends(autojump_clock: MockClock) -> None:
    """Promise 6: inside a lease jobs are not counted against max_executions; after it the worker is replaced."""
    async with open_pool(config(work, max_executions=2)) as pool:
        async with pool.lease() as worker:
            for _ in range(5):
                await ask(worker)
        await settle()
        assert worker.state.value is WorkerState.STOPPED
        assert await ask(pool) == "hello"
        check(pool)
        assert pool.statistics().exits == {"max_executions": 1}


async def test_a_lease_left_by_an_error_keeps_its_worker(autojump_clock: MockClock) -> None:
    """An error in a lease's block leaves as it is, and the idle worker goes back."""
    async with open_pool(config(work)) as pool:
        before = pool.workers
        with pytest.raises(ValueError, match="mine"):
            async with pool.lease() as worker:
                await ask(worker)
                raise ValueError("mine")
        assert pool.statistics().idle == 1
        assert pool.workers == before


async def test_a_lease_that_ends_under_a_job(autojump_clock: MockClock) -> None:
    """Promise 4: a lease left while another task's job runs on it ends with its worker."""
    ending: list[BaseException] = []

    async def call(worker: Worker) -> None:
        try:
            await ask(worker, "hang")
        except WorkersError as error:
            ending.append(error)

    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        async with pool.lease() as worker:
            nursery.start_soon(call, worker)
            await settle()
        await settle()
        assert [type(error) for error in ending] == [WorkerCrashed]
        assert pool.statistics().idle == 1
        check(pool)


async def test_closing_waits_for_a_lease(autojump_clock: MockClock) -> None:
    """Promise 1: a lease accepted before the close is finished, jobs inside it too."""
    answers: list[str] = []
    held = trio.Event()

    async def hold() -> None:
        async with pool.lease() as worker:
            held.set()
            await trio.sleep(3)
            answers.append(await ask(worker))

    async with trio.open_nursery() as nursery:
        async with open_pool(config(work)) as pool:
            nursery.start_soon(hold)
            await held.wait()
        assert answers == ["hello"]
        assert trio.current_time() == 3


# a worker by itself


async def test_a_worker_of_the_pool_is_not_yours(autojump_clock: MockClock) -> None:
    """exec and stream on a worker that the pool owns are BusyResourceError, and nothing is sent."""
    async with open_pool(config(work)) as pool:
        (worker,) = pool.workers
        with pytest.raises(trio.BusyResourceError):
            await ask(worker)
        with pytest.raises(trio.BusyResourceError):
            async with worker.stream(Payload(b"x")):
                pass
        assert worker.state.num_execs == 0


async def test_stop(autojump_clock: MockClock) -> None:
    """Worker.stop waits for the running job and for the end; the pool replaces the worker; twice is harmless."""
    answers: list[str] = []

    async def call(text: str) -> None:
        answers.append(await ask(pool, text))

    async with open_pool(config(work)) as pool:
        (worker,) = pool.workers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, "sleep 3")
            await settle()
            nursery.start_soon(worker.stop)
            await worker.stop()
            assert trio.current_time() == 3
        assert answers == ["sleep 3"]
        assert worker.state.value is WorkerState.STOPPED
        await worker.wait()
        await worker.stop()
        assert await ask(pool) == "hello"
        assert trio.current_time() == 3
        check(pool)
        assert pool.statistics().exits == {"stopped": 1}


async def test_kill(autojump_clock: MockClock) -> None:
    """Worker.kill ends the job on it, waits for the end, and wait says what happened; twice is harmless."""
    endings: list[Exception] = []

    async def call() -> None:
        try:
            await ask(pool, "hang")
        except WorkerError as error:
            endings.append(error)

    async with open_pool(config(work)) as pool:
        (worker,) = pool.workers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await settle()
            await worker.kill()
            await worker.kill()
        assert worker.state.value is WorkerState.ERRORED
        assert [(type(error), error.signal) for error in endings] == [(WorkerCrashed, 9)]  # type: ignore[attr-defined]
        with pytest.raises(WorkerError) as caught:
            await worker.wait()
        assert caught.value.returncode == -9
        assert await ask(pool) == "hello"
        check(pool)
        assert pool.statistics().exits == {"killed": 1}


async def test_open_worker(autojump_clock: MockClock) -> None:
    """A single worker to oneself: exec, stream, and a soft stop at the end."""
    recorder = Recorder()
    async with open_worker(config(work, num_workers=7), observer=recorder) as worker:
        assert await ask(worker) == "hello"
        assert worker.slot == 0
        async with worker.stream(Payload(b"x")) as parts:
            assert [part.body async for part in parts] == [b"x"]
        with pytest.raises(JobError):
            await ask(worker, "fail x")
        assert worker.state.num_execs == 3
    assert worker.state.value is WorkerState.STOPPED
    assert [event for event, _, _ in recorder.events] == ["CREATED", "DESTRUCT"]
    with pytest.raises(trio.ClosedResourceError):
        await ask(worker)


async def test_open_worker_is_not_replaced(autojump_clock: MockClock) -> None:
    """After a crash a single worker's exec says what it ended with, each time."""
    async with open_worker(config(work)) as worker:
        with pytest.raises(WorkerCrashed):
            await ask(worker, "crash 4")
        for _ in range(2):
            with pytest.raises(WorkerCrashed) as caught:
                await ask(worker)
            assert (caught.value.returncode, caught.value.started) == (4, False)
        with pytest.raises(WorkerCrashed):
            await worker.wait()


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_open_worker_ended_by_its_owner(how: str, autojump_clock: MockClock) -> None:
    """After stop or kill a single worker's exec is ClosedResourceError."""
    async with open_worker(config(work)) as worker:
        await getattr(worker, how)()
        with pytest.raises(trio.ClosedResourceError):
            await ask(worker)


async def test_open_worker_lets_errors_out(autojump_clock: MockClock) -> None:
    """Promise 1: an exception leaves open_worker as it is, and the worker is killed."""
    with pytest.raises(ValueError, match="mine"):
        async with open_worker(config(work)) as worker:
            raise ValueError("mine")
    assert worker.state.value is WorkerState.ERRORED


# stream


class Source:
    """A streaming handler that tells how far it has come."""

    def __init__(self, *, count: int = 10**9, size: int = 1, error: Exception | None = None) -> None:
        self.count = count
        self.size = size
        self.error = error
        self.made = 0
        self.closed = 0

    async def __call__(self, job: Job) -> AsyncGenerator[Any]:
        self.made = 0
        try:
            for number in range(self.count):
                self.made += 1
                yield Reply(b"%d" % number + b" " * (self.size - 1), job.context)
                await trio.lowlevel.checkpoint()
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


async def test_stream(autojump_clock: MockClock) -> None:
    """A streamed reply comes part by part, with context, and the worker stays."""
    source = Source(count=3)
    async with open_pool(config(source)) as pool:
        before = pool.workers
        async with pool.stream(Payload(b"", b"ctx"), label="s") as parts:
            assert parts.__aiter__() is parts
            assert [part async for part in parts] == [Payload(b"%d" % n, b"ctx") for n in range(3)]
            with pytest.raises(StopAsyncIteration):
                await anext(parts)
        assert pool.statistics().idle == 1
        assert pool.workers == before
        assert source.closed == 1


async def test_a_stream_without_parts(autojump_clock: MockClock) -> None:
    """A stream without parts is an empty reply on the wire, and so one empty part."""
    async with open_pool(config(Source(count=0))) as pool, pool.stream(Payload()) as parts:
        assert [part async for part in parts] == [Payload()]


async def test_stream_of_a_plain_reply(autojump_clock: MockClock) -> None:
    """stream() of a reply that is not streamed has one part."""
    async with open_pool(config(work)) as pool, pool.stream(Payload(b"x", b"c")) as parts:
        assert [part async for part in parts] == [Payload(b"x", b"c")]


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
async def test_stream_in_older_dialects(protocol: str, autojump_clock: MockClock) -> None:
    """In goridge-1 and -2 a reply has one part, and a handler that streams is a job error that says so."""
    async with open_pool(config(work, protocol=protocol)) as pool, pool.stream(Payload(b"x", b"c")) as parts:
        assert [part async for part in parts] == [Payload(b"x", b"c")]
    async with open_pool(config(Source(), protocol=protocol)) as pool:
        with pytest.raises(JobError, match="goridge-3"):
            await ask(pool)


async def test_back_pressure(autojump_clock: MockClock) -> None:
    """Nothing is read ahead: a slow consumer holds the worker back by what the relay holds."""
    source = Source(size=1000)
    async with open_pool(config(source, capacity=2000)) as pool, pool.stream(Payload()) as parts:
        for taken in range(50):
            await anext(parts)
            await settle()
            # At most one read of the pool's (64 KiB) and what the relay holds.
            assert source.made <= taken + 5 + 65536 // 1000


async def test_break_keeps_the_worker(autojump_clock: MockClock) -> None:
    """Left by break the worker is asked to end the stream: its generator is closed, and it serves the next job."""
    source = Source(size=1000)
    async with open_pool(config(source)) as pool:
        before = pool.workers
        for _ in range(3):
            async with pool.stream(Payload()) as parts:
                async for _part in parts:
                    break
            await settle()
            assert pool.statistics().idle == 1
        assert pool.workers == before
        assert source.closed == 3


async def test_left_before_the_first_part(autojump_clock: MockClock) -> None:
    """A stream left before its first part was taken keeps its worker as well."""
    source = Source(size=100)
    async with open_pool(config(source)) as pool:
        before = pool.workers
        async with pool.stream(Payload()):
            pass
        await settle()
        assert pool.statistics().idle == 1
        assert pool.workers == before


async def test_an_error_in_the_block_keeps_the_worker(autojump_clock: MockClock) -> None:
    """A stream left by the user's error lets that out as it is, and keeps its worker."""
    async with open_pool(config(Source())) as pool:
        before = pool.workers
        with pytest.raises(ValueError, match="mine"):
            async with pool.stream(Payload()) as parts:
                await anext(parts)
                raise ValueError("mine")
        await settle()
        assert pool.statistics().idle == 1
        assert pool.workers == before


async def test_who_waits_gets_the_worker_of_a_left_stream(autojump_clock: MockClock) -> None:
    """Promise 9: the worker of a stream that was left goes to who waits, when the last frame has been read."""
    source = Source()
    async with open_pool(config(source)) as pool:
        async with pool.stream(Payload()) as parts:
            await anext(parts)
        async with pool.stream(Payload(b"", b"second")) as parts:
            assert (await anext(parts)) == Payload(b"0", b"second")


async def test_a_cancel_in_a_stream_kills(autojump_clock: MockClock) -> None:
    """Promise 4: a stream left by a cancel ends with its worker, which is replaced."""
    async with open_pool(config(Source())) as pool:
        (before,) = pool.workers
        with trio.CancelScope() as scope:
            async with pool.stream(Payload()) as parts:
                await anext(parts)
                scope.cancel()
                await anext(parts)
        await settle()
        assert pool.statistics().exits == {"cancelled": 1}
        assert pool.statistics().idle == 1
        assert before.state.value is WorkerState.ERRORED


async def test_a_cancelled_anext_loses_no_part(autojump_clock: MockClock) -> None:
    """Cancelling the wait for one part alone loses none."""

    async def slow(job: Job) -> AsyncGenerator[bytes]:
        for number in range(5):
            await trio.sleep(1)
            yield b"%d" % number

    got: list[bytes] = []
    async with open_pool(config(slow)) as pool, pool.stream(Payload()) as parts:
        while True:
            with trio.move_on_after(0.3):
                try:
                    got.append((await anext(parts)).body)
                except StopAsyncIteration:
                    break
    assert got == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_job_error_in_a_stream(autojump_clock: MockClock) -> None:
    """A job error comes out of the iteration in its place, and the worker stays."""
    source = Source(count=2, error=KeyError("missing"))
    async with open_pool(config(source)) as pool:
        before = pool.workers
        got: list[bytes] = []
        with pytest.raises(JobError, match="missing"):
            async with pool.stream(Payload()) as parts:
                async for part in parts:
                    got += [part.body]
        assert got == [b"0", b"1"]
        assert pool.statistics().idle == 1
        assert pool.workers == before


async def test_a_crash_in_a_stream(autojump_clock: MockClock) -> None:
    """Promise 5: a crash in the middle of a stream comes after the parts that came before it, phase streaming."""
    source = Source(count=2, error=Crash(6))
    async with open_pool(config(source)) as pool:
        got: list[bytes] = []
        with pytest.raises(WorkerCrashed) as caught:
            async with pool.stream(Payload()) as parts:
                async for part in parts:
                    got += [part.body]
        assert got == [b"0", b"1"]
        assert (caught.value.phase, caught.value.started, caught.value.returncode) == ("streaming", True, 6)
        await settle()
        assert pool.statistics().idle == 1


async def test_exec_of_a_streamed_reply(autojump_clock: MockClock) -> None:
    """exec of a reply that is streamed is a JobError that names stream(); the worker stays."""
    source = Source()
    async with open_pool(config(source)) as pool:
        before = pool.workers
        with pytest.raises(JobError, match=r"stream\(\)"):
            await ask(pool)
        await settle()
        assert pool.statistics().idle == 1
        assert pool.workers == before
        assert source.closed == 1


async def test_a_left_stream_that_does_not_end_is_killed(autojump_clock: MockClock) -> None:
    """A stream that does not end within destroy_timeout of being left costs its worker, and nobody else anything."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"x"
        if job.body:
            await trio.sleep_forever()

    async with open_pool(config(handler, destroy_timeout=7)) as pool:
        async with pool.stream(Payload(b"hang")) as parts:
            await anext(parts)
        async with pool.stream(Payload()) as parts:
            assert [part.body async for part in parts] == [b"x"]
        assert trio.current_time() == 7
        check(pool)


async def test_the_block_is_left_by_an_error_while_a_stream_is_read_out(autojump_clock: MockClock) -> None:
    """Promise 1: an error leaves the block as it is, also while the pool reads a stream to its end."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"x"
        await trio.sleep_forever()

    with pytest.raises(ValueError, match="mine"):
        async with open_pool(config(handler)) as pool:
            async with pool.stream(Payload()) as parts:
                await anext(parts)
            await settle()
            raise ValueError("mine")


async def test_a_worker_that_dies_while_a_stream_is_read_out(autojump_clock: MockClock) -> None:
    """Promise 5: a worker that dies while a left stream is read out is replaced, and that is nobody's error."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"x"
        await trio.sleep(1)
        raise Crash(1)

    async with open_pool(config(handler)) as pool:
        async with pool.stream(Payload()) as parts:
            await anext(parts)
        await trio.sleep(2)
        assert pool.statistics().idle == 1
        assert pool.statistics().exits == {"crashed": 1}


async def test_a_failing_end_while_a_stream_is_read_out(autojump_clock: MockClock) -> None:
    """A left stream that ends by a job error keeps its worker."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"x"
        await trio.sleep(1)
        raise ValueError

    async with open_pool(config(handler)) as pool:
        async with pool.stream(Payload()) as parts:
            await anext(parts)
        await trio.sleep(2)
        assert pool.statistics().idle == 1
        assert pool.statistics().exits == {}


async def test_stream_inside_a_lease(autojump_clock: MockClock) -> None:
    """A leased worker streams, also left early, and serves the lease's next job."""
    source = Source()
    async with open_pool(config(source)) as pool, pool.lease() as worker:
        async with worker.stream(Payload()) as parts:
            await anext(parts)
        await settle()
        async with worker.stream(Payload(b"", b"2")) as parts:
            assert (await anext(parts)).context == b"2"
            with pytest.raises(trio.BusyResourceError):
                await ask(worker)


async def test_a_lease_left_while_its_stream_is_read_out(autojump_clock: MockClock) -> None:
    """A lease that ends right after a stream was left early gives a clean worker back, or replaces it."""
    async with open_pool(config(Source())) as pool:
        async with pool.lease() as worker, worker.stream(Payload()) as parts:
            await anext(parts)
        await trio.sleep(1)
        check(pool)
        assert pool.statistics().idle == 1


# map


def payloads(count: int) -> list[Payload]:
    return [Payload(b"%d" % number) for number in range(count)]


async def shuffled(job: Job) -> Any:
    """Take longer for even numbers."""
    await trio.sleep(2 if int(job.body) % 2 == 0 else 1)
    return job.body


async def endless() -> AsyncIterator[Payload]:
    number = 0
    while True:
        yield Payload(b"%d" % number)
        number += 1


def endless_sync() -> Iterator[Payload]:
    number = 0
    while True:
        yield Payload(b"%d" % number)
        number += 1


async def asynchronous(items: list[Payload]) -> AsyncIterator[Payload]:
    for item in items:
        await trio.lowlevel.checkpoint()
        yield item


@pytest.mark.parametrize("source", [payloads, lambda n: iter(payloads(n)), lambda n: asynchronous(payloads(n))])
async def test_map_in_order(source: Callable[[int], Any], autojump_clock: MockClock) -> None:
    """map gives replies in the order of a sync or async source."""
    async with open_pool(config(shuffled, num_workers=3)) as pool, pool.map(source(20)) as replies:
        assert replies.__aiter__() is replies
        assert [int(reply.body) async for reply in replies] == list(range(20))
        with pytest.raises(StopAsyncIteration):
            await anext(replies)
    assert pool.statistics().jobs == {"replied": 20}


async def test_map_as_they_come(autojump_clock: MockClock) -> None:
    """With ordered=False replies come as they are ready."""
    async with open_pool(config(shuffled, num_workers=2)) as pool, pool.map(payloads(4), ordered=False) as replies:
        got = [int(reply.body) async for reply in replies]
    assert sorted(got) == [0, 1, 2, 3]
    assert got[0] == 1


async def test_map_of_nothing(autojump_clock: MockClock) -> None:
    """A map of an empty source ends at once."""
    async with open_pool(config(work)) as pool:
        for ordered in (True, False):
            async with pool.map([], ordered=ordered) as replies:
                assert [reply async for reply in replies] == []


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 100])
async def test_map_window(window: int | None, ordered: bool, autojump_clock: MockClock) -> None:
    """At most window items are taken from the source and not delivered; by default two for each worker."""
    taken = delivered = most = 0

    def source() -> Iterator[Payload]:
        nonlocal taken, most
        for payload in payloads(50):
            taken += 1
            most = max(most, taken - delivered)
            yield payload

    async with (
        open_pool(config(shuffled, num_workers=3)) as pool,
        pool.map(source(), window=window, ordered=ordered) as replies,
    ):
        await settle()
        async for _ in replies:
            delivered += 1
            await trio.sleep(5 if delivered == 10 else 0)
    assert delivered == taken == 50
    assert most <= (window or 6)
    if window in (None, 7, 100):
        assert most == (window or 6) or window == 100


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("make", [endless, endless_sync])
async def test_map_of_an_endless_source(make: Callable[[], Any], ordered: bool, autojump_clock: MockClock) -> None:
    """An endless source is fine: leaving the block ends it, and closes the generator."""
    source = make()
    async with open_pool(config(shuffled, num_workers=2)) as pool:
        async with pool.map(source, ordered=ordered) as replies:
            got = []
            async for reply in replies:
                got.append(int(reply.body))
                if len(got) == 10:
                    break
        assert len(set(got)) == 10
        if inspect.isgenerator(source):
            assert inspect.getgeneratorstate(source) == inspect.GEN_CLOSED
        else:
            with pytest.raises(StopAsyncIteration):
                await anext(source)
        await settle()
        check(pool)
        assert pool.statistics().idle == 2


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("asyncly", [True, False])
async def test_map_source_error(asyncly: bool, ordered: bool, autojump_clock: MockClock) -> None:
    """An error of the source comes out as itself, after all results before it."""

    def source() -> Iterator[Payload]:
        yield from payloads(3)
        raise LookupError("no more")

    async def async_source() -> AsyncIterator[Payload]:
        for payload in payloads(3):
            yield payload
        raise LookupError("no more")

    got: list[int] = []
    async with open_pool(config(shuffled, num_workers=2)) as pool:
        with pytest.raises(LookupError, match="no more"):
            async with pool.map(async_source() if asyncly else source(), ordered=ordered) as replies:
                async for reply in replies:
                    got += [int(reply.body)]
        assert sorted(got) == [0, 1, 2]
        assert await pool.exec(Payload(b"1")) == Payload(b"1")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_map_source_interrupt(error: type[BaseException], autojump_clock: MockClock) -> None:
    """An interrupt that strikes in the source leaves the map, unwrapped."""

    def source() -> Iterator[Payload]:
        yield from payloads(1)
        raise error

    async with open_pool(config(work, num_workers=2)) as pool:
        with pytest.raises(error):
            async with pool.map(source()) as replies:
                async for _ in replies:
                    await trio.sleep(1)
        assert await ask(pool) == "hello"


@pytest.mark.parametrize("ordered", [True, False])
async def test_map_job_error(ordered: bool, autojump_clock: MockClock) -> None:
    """A job's error is raised in its place, unwrapped, and ends the map; the pool goes on."""
    items = [Payload(text) for text in (b"a", b"b", b"fail c", b"d", b"hang")]
    got: list[bytes] = []
    async with open_pool(config(work, num_workers=2)) as pool:
        with pytest.raises(JobError, match="c"):
            async with pool.map(items, ordered=ordered) as replies:
                async for reply in replies:
                    got += [reply.body]
        if ordered:
            assert got == [b"a", b"b"]
        await settle()
        check(pool)
        assert await ask(pool) == "hello"


async def test_map_after_an_error_there_is_nothing(autojump_clock: MockClock) -> None:
    """After an error has been raised the map is over."""
    async with open_pool(config(work)) as pool, pool.map([Payload(b"fail x"), Payload(b"y")]) as replies:
        with pytest.raises(JobError):
            await anext(replies)
        with pytest.raises(StopAsyncIteration):
            await anext(replies)


async def test_map_return_exceptions(autojump_clock: MockClock) -> None:
    """With return_exceptions=True errors are delivered in their place, and the map goes on."""
    items: list[Any] = [Payload(text) for text in (b"a", b"fail b", b"crash 1", b"d")]
    items.insert(2, "no payload")
    async with open_pool(config(work)) as pool, pool.map(items, return_exceptions=True) as replies:
        got = [reply async for reply in replies]
    assert [type(item) for item in got] == [Payload, JobError, TypeError, WorkerCrashed, Payload]


async def test_map_of_what_is_no_payload(autojump_clock: MockClock) -> None:
    """An item that is no Payload is a TypeError in its place that names Payload, and no worker is lost."""
    async with open_pool(config(work)) as pool:
        with pytest.raises(TypeError, match="Payload"):
            async with pool.map([b"raw"]) as replies:  # type: ignore[list-item]
                await anext(replies)
        assert pool.statistics().starts == 1


@pytest.mark.parametrize(
    ("source", "fields", "error"),
    [
        (5, {}, TypeError),
        ([], {"window": 0}, ValueError),
        ([], {"window": True}, TypeError),
        ([], {"window": 1.5}, TypeError),
    ],
)
async def test_map_types(
    source: Any, fields: dict[str, Any], error: type[Exception], autojump_clock: MockClock
) -> None:
    """A wrong source or window is refused by map() itself."""
    async with open_pool(config(work)) as pool:
        with pytest.raises(error):
            pool.map(source, **fields)


async def test_map_left_by_an_error(autojump_clock: MockClock) -> None:
    """An error in the map's block leaves as it is, jobs under way are cancelled, and the generator is closed."""
    closed = False

    def source() -> Iterator[Payload]:
        nonlocal closed
        try:
            while True:
                yield Payload(b"hang")
        finally:
            closed = True

    async with open_pool(config(work, num_workers=2)) as pool:
        with pytest.raises(ValueError, match="mine"):
            async with pool.map(source()):
                await settle()
                raise ValueError("mine")
        assert closed
        await settle()
        assert pool.statistics().idle == 2
        assert pool.statistics().exits == {"cancelled": 2}


async def test_map_leaves_room_for_others(autojump_clock: MockClock) -> None:
    """A job in the loop of a map on one worker gets its turn: the map holds no worker while nobody takes from it."""
    async with open_pool(config(work)) as pool, pool.map(payloads(5)) as replies:
        async for reply in replies:
            assert await ask(pool, "between") == "between"
            assert reply.body.isdigit()


async def test_map_jobs_do_not_count_while_they_wait_inside(autojump_clock: MockClock) -> None:
    """Neither max_queue nor allocate_timeout counts a map's jobs before they have their turn."""
    cfg = config(work, num_workers=2, max_queue=0, allocate_timeout=5)
    async with open_pool(cfg) as pool, pool.map([Payload(b"sleep 4")] * 10) as replies:
        assert len([reply async for reply in replies]) == 10
        assert trio.current_time() == 20


async def test_two_maps_share(autojump_clock: MockClock) -> None:
    """Promise 9: two maps on one pool take turns; neither starves the other."""
    finished = ""

    async def run(name: str) -> None:
        nonlocal finished
        async with pool.map([Payload(b"sleep 1")] * 5) as replies:
            async for _ in replies:
                finished += name

    async with open_pool(config(work)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(run, "a")
        nursery.start_soon(run, "b")
    assert trio.current_time() == 10
    assert Counter(finished[:6]) == {"a": 3, "b": 3}


async def test_several_tasks_take_from_one_map(autojump_clock: MockClock) -> None:
    """Several tasks may take from one map: each result is delivered once."""
    got: list[int] = []

    async def take(replies: Any) -> None:
        async for reply in replies:
            got.append(int(reply.body))
            await trio.sleep(0.1)

    async with (
        open_pool(config(shuffled, num_workers=2)) as pool,
        pool.map(payloads(20)) as replies,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            nursery.start_soon(take, replies)
    assert sorted(got) == list(range(20))


async def test_map_while_the_pool_closes_under_it(autojump_clock: MockClock) -> None:
    """Promise 2: a map elsewhere gets ClosedResourceError when the pool is closed under it."""
    ending: list[type[BaseException]] = []
    started = trio.Event()

    async def run() -> None:
        try:
            async with pool.map(endless()) as replies:
                async for _ in replies:
                    started.set()
                    await trio.sleep(1)
        except trio.ClosedResourceError as error:
            ending.append(type(error))

    async with trio.open_nursery() as nursery, open_pool(config(work)) as pool:
        nursery.start_soon(run)
        await started.wait()
    assert ending == [trio.ClosedResourceError]


# odds


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2", "goridge-3"])
@pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 3_000_000])
async def test_sizes(protocol: str, size: int, autojump_clock: MockClock) -> None:
    """Payloads of every size come back as they went, through a relay that holds 64 KiB."""
    payload = Payload(b"b" * size, b"c" * (size // 2))
    async with open_pool(config(work, protocol=protocol)) as pool:
        assert await pool.exec(payload) == payload
        assert pool.statistics().exits == {}


async def test_bad_input_costs_nothing(autojump_clock: MockClock) -> None:
    """Bad input is refused before the job is accepted, and is no ending."""
    async with open_pool(config(work, max_frame_size=100)) as pool:
        with pytest.raises(TypeError, match="Payload"):
            await pool.exec(b"raw")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_frame_size"):
            await pool.exec(Payload(b"x" * 101))
        with pytest.raises(TypeError, match="Payload"):
            pool.stream(b"raw")  # type: ignore[arg-type]
        assert pool.statistics().jobs == {}
        assert pool.statistics().idle == 1


async def test_wrong_arguments(autojump_clock: MockClock) -> None:
    """open_pool and open_worker refuse what is no Config or no observer, by name."""
    for function in (open_pool, open_worker):
        with pytest.raises(TypeError, match="Config"):
            function("config")  # type: ignore[operator]
        with pytest.raises(TypeError, match="observer"):
            function(config(work), observer=5)  # type: ignore[operator]


async def test_many_callers(autojump_clock: MockClock) -> None:
    """Promises 2 and 3: under crashes, stop requests, errors and cancels each job ends once and none runs twice."""
    runs = Counter[bytes]()
    endings = Counter[str]()
    refused: set[bytes] = set()
    kinds = ["sleep 1", "crash 1", "fail x", "hello", "sleep 0.5", "refuse once"]

    async def handler(job: Job) -> Any:
        if job.body == b"refuse once" and job.context not in refused:
            refused.add(job.context)
            return STOP_REQUEST
        runs[job.context] += 1
        return await work(job)

    async def call(number: int) -> None:
        payload = Payload(kinds[number % len(kinds)].encode(), b"%d" % number)
        with trio.move_on_after(20 if number % 7 else 3) as scope:
            try:
                await pool.exec(payload)
                endings["reply"] += 1
            except (WorkerError, JobError) as error:
                endings[type(error).__name__] += 1
        if scope.cancelled_caught:
            endings["cancelled"] += 1

    async with open_pool(config(handler, num_workers=3, max_executions=5)) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(120):
                nursery.start_soon(call, number)
        await trio.sleep(60)
        check(pool)
        assert pool.statistics().idle == 3
    assert endings.total() == 120
    assert pool.statistics().jobs.get("cancelled", 0) == endings["cancelled"]
    assert sum(pool.statistics().jobs.values()) == 120
    assert set(runs.values()) == {1}
