"""`trio_workers.testing`, as its users have it, and the relay in memory that this package's own tests stand on."""

import functools
import logging
from collections.abc import AsyncGenerator
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

import trio_workers.testing
from trio_workers import (
    Config,
    JobError,
    Launch,
    Line,
    Payload,
    Pool,
    Restart,
    SpawnError,
    WorkerCrashed,
    WorkerError,
    WorkerProcess,
    open_pool,
)
from trio_workers.child import STOP_REQUEST, Job, Reply
from trio_workers.testing import BadBoot, Crash, MemoryFactory


def config(handler: Any, *, boot: Any = None, **fields: Any) -> Config:
    return Config(command=["any"], factory=MemoryFactory(handler, boot=boot), **{"num_workers": 1, **fields})


async def shout(job: Job) -> bytes:
    """The handler of the module's docstring."""
    if job.body == b"die":
        raise Crash(-9)
    return job.body.upper()


async def test_the_example(autojump_clock: MockClock) -> None:
    """The example of the docstring does what it says."""
    cfg = Config(command=["any"], num_workers=2, factory=MemoryFactory(shout))
    async with open_pool(cfg) as pool:
        assert (await pool.exec(Payload(b"hello"))).body == b"HELLO"
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"die"))
        assert (await pool.exec(Payload(b"again"))).body == b"AGAIN"


async def test_on_the_real_clock() -> None:
    """Any clock will do."""
    async with open_pool(config(shout)) as pool:
        assert (await pool.exec(Payload(b"hello"))).body == b"HELLO"


def test_names() -> None:
    """Three names are public, all of them documented."""
    assert trio_workers.testing.__all__ == ["BadBoot", "Crash", "MemoryFactory"]
    assert all(getattr(trio_workers.testing, name).__doc__ for name in trio_workers.testing.__all__)


def test_a_factory_is_frozen() -> None:
    """A MemoryFactory is a value: frozen, equal to its like, without its internals in its repr."""
    factory = MemoryFactory(shout)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        factory.handler = shout  # type: ignore[misc]
    assert factory == MemoryFactory(shout, boot=None)
    assert "capacity" not in repr(factory)


@pytest.mark.parametrize(("arguments", "name"), [((5,), "handler"), ((shout, 5), "boot")])
def test_wrong_arguments(arguments: tuple[Any, ...], name: str) -> None:
    """What can't be called is refused by the name of its field."""
    with pytest.raises(TypeError, match=f"MemoryFactory.{name}"):
        MemoryFactory(arguments[0], **({"boot": arguments[1]} if len(arguments) > 1 else {}))


# what a handler returns


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2", "goridge-3"])
@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (b"bytes", Payload(b"bytes")),
        (bytearray(b"array"), Payload(b"array")),
        (memoryview(b"view"), Payload(b"view")),
        (None, Payload()),
        (b"", Payload()),
        (Reply(b"body", b"context"), Payload(b"body", b"context")),
        (Reply(None, memoryview(b"c")), Payload(b"", b"c")),
    ],
    ids=["bytes", "bytearray", "memoryview", "None", "empty", "both-parts", "context-of-a-memoryview"],
)
async def test_answers(answer: Any, reply: Payload, protocol: str, autojump_clock: MockClock) -> None:
    """A handler returns what one of child.serve returns, in each dialect."""
    jobs: list[tuple[bytes, bytes]] = []

    async def handler(job: Job) -> Any:
        jobs.append((job.body, job.context))
        return answer

    async with open_pool(config(handler, protocol=protocol)) as pool:
        assert await pool.exec(Payload(b"b", b"c")) == reply
    assert jobs == [(b"b", b"c")]


@pytest.mark.parametrize("answer", ["text", 5, Reply("text"), object()], ids=["str", "int", "Reply of str", "object"])  # type: ignore[arg-type]
async def test_wrong_answers(answer: Any, autojump_clock: MockClock) -> None:
    """Another answer is a job error that says what is right; the worker stays."""

    async def handler(job: Job) -> Any:
        return answer

    async with open_pool(config(handler)) as pool:
        before = pool.workers
        with pytest.raises(JobError, match="TypeError"):
            await pool.exec(Payload())
        assert pool.workers == before


async def test_a_handler_that_is_not_async(autojump_clock: MockClock) -> None:
    """A plain function as handler is a job error that says so."""
    async with open_pool(config(lambda job: b"x")) as pool:
        with pytest.raises(JobError, match="a handler must be an async function; this one returned bytes"):
            await pool.exec(Payload())


async def test_other_callables(autojump_clock: MockClock) -> None:
    """A partial, a method, or an object with an async __call__ is a handler too."""

    async def prefix(text: bytes, job: Job) -> bytes:
        return text + job.body

    class Echo:
        async def __call__(self, job: Job) -> bytes:
            return job.body

        async def method(self, job: Job) -> AsyncGenerator[bytes]:
            yield job.body

    for handler, body in ((functools.partial(prefix, b"> "), b"> x"), (Echo(), b"x"), (Echo().method, b"x")):
        async with open_pool(config(handler)) as pool, pool.stream(Payload(b"x")) as parts:
            assert [part.body async for part in parts] == [body]


async def test_stop_request(autojump_clock: MockClock) -> None:
    """STOP_REQUEST itself asks to be replaced; equal bytes are a reply."""
    asked = 0

    async def handler(job: Job) -> Any:
        nonlocal asked
        asked += 1
        return STOP_REQUEST if asked == 2 else bytes(bytearray(STOP_REQUEST))

    async with open_pool(config(handler)) as pool:
        assert await pool.exec(Payload()) == Payload(STOP_REQUEST)
        (before,) = pool.workers
        assert await pool.exec(Payload()) == Payload(STOP_REQUEST)
        assert pool.workers != (before,)
        assert asked == 3


async def test_job_error(autojump_clock: MockClock) -> None:
    """An Exception is a job error whose text is the handler's own traceback, and the worker stays."""

    async def handler(job: Job) -> None:
        raise LookupError("no such thing")

    async with open_pool(config(handler)) as pool:
        before = pool.workers
        with pytest.raises(JobError) as caught:
            await pool.exec(Payload())
        assert pool.workers == before
    text = str(caught.value)
    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith("LookupError: no such thing")
    assert "test_testing.py" in text
    assert "trio_workers" not in text.replace("test_testing.py", "").partition("tests/")[2]


async def test_a_group_is_a_job_error(autojump_clock: MockClock) -> None:
    """A handler may use nurseries; the group that leaves one is a job error."""

    async def fail() -> None:
        raise LookupError("inside")

    async def handler(job: Job) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)

    async with open_pool(config(handler)) as pool:
        with pytest.raises(JobError, match="LookupError: inside"):
            await pool.exec(Payload())


async def test_a_handler_with_its_own_cancel_scope(autojump_clock: MockClock) -> None:
    """A handler's own timeouts are its own affair."""

    async def handler(job: Job) -> bytes:
        with trio.move_on_after(5):
            await trio.sleep_forever()
        return b"gave up"

    async with open_pool(config(handler)) as pool:
        assert (await pool.exec(Payload())).body == b"gave up"
        assert trio.current_time() == 5


# streams


async def test_stream(autojump_clock: MockClock) -> None:
    """An async generator streams; its parts are what a plain handler may return."""

    async def handler(job: Job) -> AsyncGenerator[Any]:
        yield b"one"
        await trio.sleep(1)
        yield Reply(b"two", b"context")
        yield None
        yield bytearray(b"four")

    async with open_pool(config(handler)) as pool, pool.stream(Payload()) as parts:
        got = [part async for part in parts]
    assert got == [Payload(b"one"), Payload(b"two", b"context"), Payload(), Payload(b"four")]


@pytest.mark.parametrize("part", [STOP_REQUEST, "text"], ids=["STOP_REQUEST", "str"])
async def test_a_wrong_part(part: Any, autojump_clock: MockClock) -> None:
    """A part that can't be is a job error in its place; the generator is closed and the worker stays."""
    closed = 0

    async def handler(job: Job) -> AsyncGenerator[Any]:
        nonlocal closed
        try:
            yield b"one"
            yield part
        finally:
            closed += 1

    async with open_pool(config(handler)) as pool:
        before = pool.workers
        with pytest.raises(JobError, match="TypeError"):
            async with pool.stream(Payload()) as parts:
                assert (await anext(parts)).body == b"one"
                await anext(parts)
        assert closed == 1
        assert pool.workers == before


async def test_stop_of_a_stream(autojump_clock: MockClock) -> None:
    """When the caller has had enough the generator is closed, between two parts, and its clean-up may wait."""
    closed: list[float] = []

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"x"
                await trio.sleep(1)
        finally:
            await trio.sleep(5)
            closed.append(trio.current_time())

    async with open_pool(config(handler)) as pool:
        (before,) = pool.workers
        async with pool.stream(Payload()) as parts:
            await anext(parts)
        await trio.sleep(10)
        assert closed == [6]
        assert pool.workers == (before,)
        assert pool.statistics().idle == 1


async def test_a_killed_stream_closes_its_generator(autojump_clock: MockClock) -> None:
    """A worker that is killed while a part waits for room in the relay leaves no generator behind."""
    closed = 0

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        nonlocal closed
        try:
            while True:
                yield b"x" * 100_000
        finally:
            closed += 1

    with trio.move_on_after(1):
        async with open_pool(config(handler)) as pool, pool.stream(Payload()) as parts:
            await anext(parts)
            await trio.sleep_forever()
    assert closed == 1


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
async def test_streams_need_goridge_3(protocol: str, autojump_clock: MockClock) -> None:
    """In the older dialects a generator is a job error that says so."""

    async def handler(job: Job) -> AsyncGenerator[bytes]:
        yield b"x"

    async with open_pool(config(handler, protocol=protocol)) as pool:
        with pytest.raises(JobError, match=f"streams need goridge-3; the pool speaks {protocol}"):
            await pool.exec(Payload())


# faults


@pytest.mark.parametrize(("returncode", "text"), [(0, "status 0"), (3, "status 3"), (-11, "SIGSEGV")])
async def test_crash(returncode: int, text: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Crash ends the worker with this exit status; its stderr is logged, and in the error."""

    async def handler(job: Job) -> None:
        raise Crash(returncode, stderr="first line\nlast line")

    with caplog.at_level(logging.WARNING, "trio_workers.worker"):
        async with open_pool(config(handler)) as pool:
            with pytest.raises(WorkerCrashed, match=text) as caught:
                await pool.exec(Payload())
    assert caught.value.returncode == returncode
    assert caught.value.stderr == "first line\nlast line"
    assert caught.value.started is True
    lines = [record.getMessage() for record in caplog.records if record.name == "trio_workers.worker"]
    assert [line.partition(": ")[2] for line in lines] == ["first line", "last line"]


async def test_crash_by_default(autojump_clock: MockClock) -> None:
    """Crash() is exit status 1 and an empty stderr."""

    async def handler(job: Job) -> None:
        raise Crash

    async with open_pool(config(handler)) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.exec(Payload())
    assert (caught.value.returncode, caught.value.stderr) == (1, "")


async def test_boot(autojump_clock: MockClock) -> None:
    """boot is run for each worker with its slot, before the handshake."""
    booted: list[tuple[int, float]] = []

    async def boot(slot: int) -> None:
        await trio.sleep(10 * (slot + 1))
        booted.append((slot, trio.current_time()))

    async with open_pool(config(shout, boot=boot, num_workers=3)) as pool:
        assert trio.current_time() == 30
        with pytest.raises(WorkerCrashed):
            await pool.exec(Payload(b"die"))
        await trio.sleep(40)
    assert booted[:3] == [(0, 10), (1, 20), (2, 30)]
    assert len(booted) == 4


async def fail_to_boot(slot: int) -> None:
    raise BadBoot("no database")


async def crash_at_boot(slot: int) -> None:
    raise Crash(-6, stderr="abort")


async def raise_at_boot(slot: int) -> None:
    raise LookupError("oops")


@pytest.mark.parametrize(
    ("boot", "returncode", "stderr"),
    [(fail_to_boot, 1, "no database"), (crash_at_boot, -6, "abort"), (raise_at_boot, 1, "LookupError: oops")],
)
async def test_bad_boot(boot: Any, returncode: int, stderr: str, autojump_clock: MockClock) -> None:
    """A worker whose boot fails never becomes ready; what it wrote to stderr is in the SpawnError."""
    with pytest.raises(SpawnError) as caught:
        async with open_pool(config(shout, boot=boot)):
            pytest.fail("it opened")
    assert caught.value.returncode == returncode
    assert caught.value.stderr.endswith(stderr)


async def test_bad_boot_in_a_handler(autojump_clock: MockClock) -> None:
    """BadBoot in a handler ends the worker, fails the next boot in its slot, and no other."""
    failed: list[object] = []

    async def handler(job: Job) -> None:
        if job.body:
            raise BadBoot("out of memory")

    cfg = config(handler, num_workers=2, restart=Restart(initial=5, jitter=0))
    async with open_pool(cfg, observer=lambda event, worker, context: failed.append(context)) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.exec(Payload(b"x"))
        assert (caught.value.returncode, caught.value.stderr) == (1, "out of memory")
        await trio.sleep(1)
        (error,) = [context for context in failed if isinstance(context, SpawnError)]
        assert (error.slot, error.stderr) == (caught.value.slot, "out of memory")
        assert pool.statistics().idle == 1
        await trio.sleep(5)
        assert pool.statistics().idle == 2
        assert pool.statistics().failed_starts == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["handler", "generator", "boot"])
async def test_an_interrupt_is_not_lost(where: str, error: type[BaseException], autojump_clock: MockClock) -> None:
    """An exception that is no Exception leaves open_pool, wherever in a memory worker it was raised."""

    async def handler(job: Job) -> None:
        raise error

    async def generator(job: Job) -> AsyncGenerator[bytes]:
        yield b"x"
        raise error

    async def boot(slot: int) -> None:
        if where == "boot":
            raise error

    with pytest.raises(error):
        async with (
            open_pool(config(generator if where == "generator" else handler, boot=boot)) as pool,
            pool.stream(Payload()) as parts,
        ):
            async for _ in parts:
                pass


async def test_a_kill_cancels_the_handler(autojump_clock: MockClock) -> None:
    """A kill cancels the handler, whose clean-up runs before the worker has ended; the returncode is -9."""
    cleaned: list[float] = []

    async def handler(job: Job) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)
            cleaned.append(trio.current_time())

    async with open_pool(config(handler)) as pool:
        (worker,) = pool.workers
        with trio.move_on_after(1):
            await pool.exec(Payload())
        with pytest.raises(WorkerError) as caught:
            await worker.wait()
    assert cleaned == [3]
    assert caught.value.returncode == -9


async def test_who_was_killed_writes_nothing(autojump_clock: MockClock) -> None:
    """A handler that answers although it was killed answers nobody."""
    answers = 0

    async def handler(job: Job) -> bytes:
        nonlocal answers
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            answers += 1
        return b"too late"

    async def kill_it(pool: Pool) -> None:
        await wait_all_tasks_blocked()
        await pool.workers[0].kill()

    async with open_pool(config(handler)) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(kill_it, pool)
        with pytest.raises(WorkerCrashed) as caught:
            await pool.exec(Payload())
        assert caught.value.returncode == -9
        assert answers == 1


async def test_only_a_kill_ends_a_worker(autojump_clock: MockClock) -> None:
    """As a process, a worker does not notice that tasks around it are cancelled: its job is finished first."""
    finished: list[bytes] = []

    async def handler(job: Job) -> bytes:
        await trio.sleep(5)
        finished.append(job.body)
        return job.body

    async def call(pool: Pool) -> None:
        await pool.exec(Payload(b"x"))

    async with trio.open_nursery() as nursery:
        async with open_pool(config(handler)) as pool:
            nursery.start_soon(call, pool)
            await wait_all_tasks_blocked()
        assert finished == [b"x"]


async def test_pids(autojump_clock: MockClock) -> None:
    """Pids are made up: each another, and larger than any that the system gives."""
    pids: set[int | None] = set()
    for _ in range(3):
        async with open_pool(config(shout, num_workers=4)) as pool:
            pids |= {worker.pid for worker in pool.workers}
    assert len(pids) == 12
    assert all(pid is not None and 2**22 < pid < 2**31 for pid in pids)


# the relay, by itself


def launch(protocol: str = "goridge-3") -> Launch:
    return Launch(argv=("any",), env={}, slot=0, label="test[0]", protocol=protocol, max_frame_size=1 << 20)


async def start(nursery: trio.Nursery, handler: Any, *, capacity: int = 65536) -> tuple[WorkerProcess, Line]:
    spawner = await MemoryFactory(handler, _capacity=capacity).open(nursery)
    process = await spawner.spawn(launch())
    line = await spawner.connect(process, launch())
    await line.shake_hands()
    assert line.peer == process.pid
    return process, line


async def test_factory_and_spawner_are_checkpoints(autojump_clock: MockClock) -> None:
    """Opening, spawning and connecting are checkpoints."""
    async with trio.open_nursery() as nursery:
        with assert_checkpoints():
            spawner = await MemoryFactory(shout).open(nursery)
        with assert_checkpoints():
            process = await spawner.spawn(launch())
        with assert_checkpoints():
            line = await spawner.connect(process, launch())
        line.relay.close()
        with assert_checkpoints():
            await process.wait_exit()
        with assert_checkpoints():
            await process.wait_exit()
        spawner.close()
        spawner.close()


async def test_the_end_of_the_relay_ends_the_worker(autojump_clock: MockClock) -> None:
    """A worker whose relay is closed leaves with status 0, as a real one does."""
    async with trio.open_nursery() as nursery:
        process, line = await start(nursery, shout)
        assert process.peek() is None
        line.relay.close()
        line.relay.close()
        await process.wait_exit()
        assert (process.peek(), process.reap(), process.reap()) == (0, 0, 0)
        process.kill()
        assert process.peek() == 0
        assert line.relay.closed
        assert line.relay.read_now(10) == b""
        with pytest.raises(BrokenPipeError):
            line.relay.write_now(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await line.relay.wait_readable()
        with pytest.raises(trio.ClosedResourceError):
            await line.relay.wait_writable()


async def test_what_is_no_frame_ends_the_worker(autojump_clock: MockClock) -> None:
    """A worker that gets what is no frame ends with status 1 and a traceback, as a real one does."""
    async with trio.open_nursery() as nursery:
        process, line = await start(nursery, shout)
        line.relay.write_now(b"garbage")
        await process.wait_exit()
        assert process.peek() == 1
        assert "FrameError" in process.stderr_tail
        assert line.relay.has_input()
        assert line.relay.read_now(10) == b""
        with pytest.raises(BrokenPipeError):
            line.relay.write_now(b"x")
        await line.relay.wait_writable()


async def test_the_relay_holds_so_much(autojump_clock: MockClock) -> None:
    """A write takes what there is room for; waiting for room ends when the worker reads."""
    async with trio.open_nursery() as nursery:
        process, line = await start(nursery, shout, capacity=100)
        assert line.relay.write_now(b"\x1b" + b"x" * 149) == 100
        assert line.relay.write_now(b"x") == 0
        assert line.relay.unread()
        with assert_checkpoints():
            await line.relay.wait_writable()
        process.kill()
        await process.wait_exit()
        assert process.peek() == 1  # it was faster, and refused the bytes


async def test_unread_is_exact(autojump_clock: MockClock) -> None:
    """After a death it is known whether the worker had read all its bytes."""
    async with trio.open_nursery() as nursery:
        process, line = await start(nursery, shout)
        assert line.relay.unread() is False
        process.kill()
        line.relay.write_now(b"unread")
        await process.wait_exit()
        assert line.relay.unread() is True
        assert process.peek() == -9


async def test_close_wakes(autojump_clock: MockClock) -> None:
    """Closing wakes who waits, with ClosedResourceError."""
    woken = 0

    async def wait(line: Line) -> None:
        nonlocal woken
        with pytest.raises(trio.ClosedResourceError):
            await line.relay.wait_readable()
        woken += 1

    async with trio.open_nursery() as nursery:
        _, line = await start(nursery, shout)
        nursery.start_soon(wait, line)
        await wait_all_tasks_blocked()
        line.relay.close()
        await wait_all_tasks_blocked()
        assert woken == 1


async def test_waiting_is_one_pass(autojump_clock: MockClock) -> None:
    """Waiting for what is there already is a checkpoint, and loses to a cancel."""
    async with trio.open_nursery() as nursery:
        _, line = await start(nursery, shout)
        with assert_checkpoints():
            await line.relay.wait_writable()
        with trio.CancelScope() as scope:
            scope.cancel()
            await line.relay.wait_writable()
        assert scope.cancelled_caught
        with trio.move_on_after(1) as scope:
            await line.relay.wait_readable()
        assert scope.cancelled_caught
        assert "0 bytes there, 0 back" in repr(line.relay)
        line.relay.close()
        assert "closed" in repr(line.relay)
