"""What a review and a new user found, each so that it does not come back."""

import contextlib
import hashlib
import logging
import os
import signal
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.test_contract import command_of, factory_of
from tests.test_faults import Told, heals, puppets, tell, until
from tests.test_pool_logic import ask, settle, work
from tests.test_pool_logic import config as memory
from tests.test_stream_relay import StreamFactory
from trio_workers import (
    Factory,
    Payload,
    Restart,
    RestartLimitExceeded,
    SocketFactory,
    SpawnError,
    TrioWorkersInternalError,
    WorkerCrashed,
    WorkerError,
    WorkerState,
    open_pool,
    open_worker,
)
from trio_workers.child import Job
from trio_workers.testing import BadBoot

LARGE = b"#" * (2 << 20)

# A worker that speaks before it has read its job, and checks that the job comes whole all the same.
EARLY = """
import hashlib, os, sys, time
from trio_workers._goridge import context_frame_3, encode_control

def read(size):
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            sys.exit(0)
        data += piece
    return data

def write(data):
    while data:
        data = data[os.write(1, data):]

handshake = read(12)
read(int.from_bytes(handshake[2:6], "little"))
write(encode_control("goridge-3", b'{"pid":%d}' % os.getpid()))
while True:
    head = read(12)
    if head[1] & 1:
        sys.exit(0)
    size = int.from_bytes(head[2:6], "little")
    start = read(4 + 1000)
    write(context_frame_3(0, b"", b"early", 1 | 4))
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.001)
    digest = hashlib.sha256(start[4:] + read(size - 1000)).hexdigest().encode()
    frames = b"".join(read(12)[10:11] for _ in range(int(os.environ["FRAMES"])))
    with open(os.environ["GO"] + ".seen", "wb") as file:
        file.write(digest + frames)
    write(context_frame_3(0, b"", digest + frames, 0))
"""


@pytest.fixture(params=["pipe", "socketpair", "stream"])
def over_stdio(request: pytest.FixtureRequest, tmp_path: Path) -> Factory:
    return StreamFactory() if request.param == "stream" else factory_of(request.param, tmp_path)


def early(factory: Factory, go: Path, frames: int) -> Any:
    config = puppets(factory=factory)
    assert isinstance(config.env, dict)
    assert isinstance(config.command, list)
    env = {**config.env, "GO": str(go), "FRAMES": str(frames)}
    return puppets(factory=factory, command=[*config.command[:-1], EARLY], env=env)


# control frames


async def test_pong_comes_behind_the_job(over_stdio: Factory, tmp_path: Path) -> None:
    """A ping while the job is being written: the body arrives intact, and the pong behind it."""
    async with open_pool(early(over_stdio, tmp_path / "go", 1)) as pool:
        (worker,) = pool.workers
        async with pool.stream(Payload(LARGE)) as parts:
            assert (await anext(parts)).body == b"early"
            assert worker.line is not None
            assert not worker.line.whole
            (tmp_path / "go").touch()
            (last,) = [part.body async for part in parts]
        assert last == hashlib.sha256(LARGE).hexdigest().encode() + b"\x08"
        assert pool.workers == (worker,)


async def test_stop_of_a_stream_comes_behind_the_job(over_stdio: Factory, tmp_path: Path) -> None:
    """A stream is left while its job is being written: the rest of the job, the pong, and then its end."""
    async with open_pool(early(over_stdio, tmp_path / "go", 2)) as pool:
        (worker,) = pool.workers
        async with pool.stream(Payload(LARGE)) as parts:
            assert (await anext(parts)).body == b"early"
        assert worker.line is not None
        assert not worker.line.whole
        (tmp_path / "go").touch()
        await until(lambda: worker.state.value is not WorkerState.WORKING)
        assert worker.state.value is WorkerState.READY
    seen = (tmp_path / "go.seen").read_bytes()
    assert seen == hashlib.sha256(LARGE).hexdigest().encode() + b"\x08\x02"


async def test_large_context_without_a_body(over_stdio: Factory) -> None:
    """A job whose body is empty is whole once its context is written: its worker stays."""
    async with open_pool(puppets(factory=over_stdio, command=command_of("python"))) as pool:
        workers = pool.workers
        for size in (32_000, 33_000, 3 << 20):
            job = Payload(b"", b"c" * size)
            assert await pool.exec(job) == job
        assert pool.workers == workers


# what fails


async def test_two_tasks_in_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    """A stream that is left while another task takes from it costs its worker, and not the pool."""
    async with open_pool(puppets()) as pool:
        (worker,) = pool.workers
        errors: list[Exception] = []

        async def take() -> None:
            try:
                await anext(parts)
            except Exception as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            source = b"raw(context_frame_3(0, b'', b'one', 1)); time.sleep(1000)"
            async with pool.stream(Payload(source)) as parts:
                assert (await anext(parts)).body == b"one"
                nursery.start_soon(take)
                await trio.testing.wait_all_tasks_blocked()
        await heals(pool, worker)
        (error,) = errors
        assert isinstance(error, WorkerError)
    assert "could not be read to its end" in caplog.text


@pytest.fixture
def loud() -> Iterator[logging.Logger]:
    """A log of stderr with a filter that raises."""
    log = logging.getLogger("trio_workers.worker")

    def refuse(_: logging.LogRecord) -> bool:
        raise ArithmeticError("a bug in a filter")

    log.addFilter(refuse)
    yield log
    log.removeFilter(refuse)


@pytest.mark.parametrize("how_often", ["[1]", "range(10 ** 9)"])
@pytest.mark.parametrize("transport", ["pipe", "tcp"])
async def test_life_that_fails(loud: logging.Logger, transport: str, how_often: str, tmp_path: Path) -> None:
    """An error in the middle of a worker's life ends the pool as a bug, and leaves no process and no descriptor."""
    with pytest.raises(TrioWorkersInternalError) as caught:
        async with open_pool(puppets(num_workers=2, factory=factory_of(transport, tmp_path))) as pool:
            await tell(pool, f"for _ in {how_often}: os.write(2, b'hello\\n' * 1000)\ntime.sleep(1000)")
    assert "a bug in a filter" in "".join(traceback.format_exception(caught.value))


async def test_life_that_fails_at_the_end(loud: logging.Logger) -> None:
    """The same where what raises is only reached when the process has ended already."""
    with pytest.raises(TrioWorkersInternalError):
        async with open_pool(puppets()) as pool:
            await tell(pool, "os.write(2, b'no newline'); os._exit(1)")


DIES = """
import os
from trio_workers._goridge import encode_control
os.read(0, 1000)
os.write(1, encode_control("goridge-3", b'{"pid":%d}' % os.getpid()))
os._exit(4)
"""


@pytest.mark.parametrize("transport", ["pipe", "socketpair"])
async def test_dies_right_after_the_handshake(transport: str, tmp_path: Path) -> None:
    """A single worker that dies as it becomes ready is a SpawnError, or is there and its job says that it died."""
    config = puppets(factory=factory_of(transport, tmp_path))
    assert isinstance(config.command, list)
    config = puppets(factory=config.factory, command=[*config.command[:-1], DIES])
    for _ in range(15):
        with pytest.raises((SpawnError, WorkerCrashed)) as caught:
            async with open_worker(config) as worker:
                await worker.exec(Payload(b"x"))
        assert caught.value.returncode == 4
        assert caught.value.started is False


async def test_handshake_and_death_in_one_moment(autojump_clock: MockClock) -> None:
    """A worker that is gone before it could be leased is a SpawnError, not an AssertionError."""
    config = memory(work)

    def observer(event: object, worker: Any, _: object) -> None:
        if getattr(event, "name", "") == "CREATED":
            worker._owner.kill(worker, "killed")

    with pytest.raises(SpawnError) as caught:
        async with open_worker(config, observer=observer):
            pytest.fail("it opened")
    assert caught.value.started is False


# misuse


async def test_entered_twice(autojump_clock: MockClock) -> None:
    """What `async with` takes is entered once, and says so."""

    async def streams(job: Job) -> AsyncIterator[bytes]:
        yield b"one"

    block = open_pool(memory(streams))
    async with block as pool:
        with pytest.raises(RuntimeError, match=r"once; call open_pool\(\) again"):
            await block.__aenter__()
        stream = pool.stream(Payload(b""))
        with pytest.raises(RuntimeError, match="must be entered"):
            await anext(stream)
        async with stream:
            with pytest.raises(RuntimeError, match=r"only once; call stream\(\)"):
                await stream.__aenter__()
        with pytest.raises(RuntimeError, match=r"only once; call stream\(\)"):
            await stream.__aenter__()
        lease = pool.lease()
        async with lease:
            with pytest.raises(RuntimeError, match=r"only once; call lease\(\)"):
                await lease.__aenter__()
        with pytest.raises(RuntimeError, match=r"only once; call lease\(\)"):
            await lease.__aenter__()
        results = pool.map([])
        async with results:
            with pytest.raises(RuntimeError, match=r"once; call map\(\) again"):
                await results.__aenter__()
    with pytest.raises(RuntimeError, match=r"once; call open_pool\(\) again"):
        await block.__aenter__()
    single = open_worker(memory(work))
    async with single:
        with pytest.raises(RuntimeError, match=r"once; call open_worker\(\) again"):
            await single.__aenter__()


@pytest.mark.parametrize("label", [b"x", 1, ["x"], object()])
async def test_wrong_label(label: Any, autojump_clock: MockClock) -> None:
    """A label of a wrong type is a TypeError that names it, before a worker is taken."""
    async with open_pool(memory(work)) as pool:
        with pytest.raises(TypeError, match="label must be a str or None"):
            await pool.exec(Payload(b""), label=label)
        with pytest.raises(TypeError, match="label must be a str or None"):
            pool.stream(Payload(b""), label=label)
        with pytest.raises(TypeError, match="label must be a str or None"):
            pool.lease(label=label)
        async with pool.lease() as worker:
            with pytest.raises(TypeError, match="label must be a str or None"):
                await worker.exec(Payload(b""), label=label)
            assert worker.state.num_execs == 0
            assert await ask(worker) == "hello"


@pytest.mark.parametrize("opener", [open_pool, open_worker])
def test_async_observer(opener: Any) -> None:
    """An observer that would never be awaited is refused."""

    async def observer(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(TypeError, match="not an async one"):
        opener(memory(work), observer=observer)


def test_repr_of_a_large_payload() -> None:
    """What a debugger shows of a payload of 10 MB is a line."""
    assert len(repr(Payload(b"\0" * 10_000_000, b"x" * 10_000_000))) < 2_000
    assert repr(Payload(b"a", b"b")) == "Payload(body=b'a', context=b'b')"


# cancels and interrupts


async def test_shielded_body_keeps_its_pool() -> None:
    """A body that is shielded from a cancel around the block gets its replacements all the same."""
    config = puppets(max_executions=1, factory=SocketFactory("tcp://127.0.0.1:0"))
    with trio.CancelScope() as outer:
        async with open_pool(config) as pool:
            with trio.CancelScope(shield=True):
                outer.cancel()
                pids = {await tell(pool, "reply(b'%d' % os.getpid())") for _ in range(4)}
                assert len(pids) == 4
                async with pool.stream(Payload(b"raw(context_frame_3(0, b'', b'1', 1)); reply(b'')")) as parts:
                    assert (await anext(parts)).body == b"1"
    assert outer.cancelled_caught


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_ends_of_a_worker_are_protected(
    how: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C does not come in the middle of what `Worker.stop` and `Worker.kill` change."""
    seen: list[bool] = []
    method = "retire" if how == "stop" else "kill"
    async with open_pool(memory(work)) as pool:
        inner = getattr(pool._core, method)

        def watched(*arguments: Any) -> None:
            seen.append(trio.lowlevel.currently_ki_protected())
            inner(*arguments)

        monkeypatch.setattr(pool._core, method, watched)
        assert not trio.lowlevel.currently_ki_protected()
        await getattr(pool.workers[0], how)()
    assert seen == [True]


async def test_interrupt_in_the_source_of_a_map(autojump_clock: MockClock) -> None:
    """An interrupt in a source leaves the block, though the body raises an error of its own on its way out."""

    def source() -> Iterator[Payload]:
        yield Payload(b"one")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        async with open_pool(memory(work)) as pool, pool.map(source()):
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("the body's")
    assert isinstance(caught.value.__context__, ValueError)


async def test_cancelled_job_is_named_in_the_log(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Who looks for the job that cost a worker finds its label, at INFO."""
    caplog.set_level(logging.INFO, "trio_workers.pool")
    async with open_pool(memory(work)) as pool:
        with trio.move_on_after(1):
            await pool.exec(Payload(b"hang"), label="the slow one")
    (record,) = (record for record in caplog.records if "cancelled" in record.getMessage())
    assert record.levelno == logging.INFO
    assert "the job 'the slow one'" in record.getMessage()
    assert "1.000 s" in record.getMessage()


# ends of workers


async def test_exit_status_of_a_worker_that_is_going() -> None:
    """A job on a worker whose death nobody has noticed yet waits for it to be told, with its true exit status."""
    for _ in range(10):
        async with open_worker(puppets()) as worker:
            assert worker.pid
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(WorkerCrashed) as caught:
                await worker.exec(Payload(b"reply(b'')"))
            assert (caught.value.returncode, caught.value.pid) == (-9, worker.pid)


async def test_lease_on_a_worker_that_is_killed(autojump_clock: MockClock) -> None:
    """A lease that has been given a worker, and not been entered, goes on to another when that one is killed."""
    async with open_pool(memory(work)) as pool:
        (first,) = pool.workers
        got: list[object] = []

        async def have() -> None:
            async with pool.lease() as worker:
                got.append(worker)
                assert await ask(worker) == "hello"

        async with trio.open_nursery() as nursery:
            async with pool.lease():
                nursery.start_soon(have)
                await settle()
            # Leaving did not give way to any other task.
            first._owner.kill(first, "killed")
            assert got == []
        (second,) = got
        assert second is not first


async def test_wait_twice(autojump_clock: MockClock) -> None:
    """Each who waits for a worker's end gets an exception of his own, whose traceback does not grow."""
    async with open_pool(memory(work)) as pool:
        (worker,) = pool.workers
        with pytest.raises(WorkerCrashed):
            await ask(pool, "crash 3")
        errors: list[WorkerError] = []
        for _ in range(3):
            with pytest.raises(WorkerError) as caught:
                await worker.wait()
            errors.append(caught.value)
    one, two, three = errors
    assert len({id(one), id(two), id(three)}) == 3
    depths = {len([*traceback.walk_tb(error.__traceback__)]) for error in errors}
    assert len(depths) == 1
    assert {(error.returncode, error.stderr, str(error)) for error in errors} == {(3, "last words", str(one))}
    assert one.__notes__ == three.__notes__


async def test_wait_tells_the_cause() -> None:
    """What is told of a worker that could not be started includes the system's own error, each time."""
    told = Told()
    with pytest.raises(SpawnError) as caught:
        async with open_pool(puppets(command=["/nowhere/at/all"]), observer=told):
            pytest.fail("it opened")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    ((_, worker, _),) = told.events
    assert worker is not None
    for _ in range(2):
        with pytest.raises(SpawnError) as caught:
            await worker.wait()
        assert isinstance(caught.value.__cause__, FileNotFoundError)


# giving up


def gives_up() -> Any:
    """A pool whose worker's boots fail, from the second on."""
    boots = iter([True])

    async def boot(slot: int) -> None:
        if not next(boots, False):
            raise BadBoot("no more")

    return memory(work, boot=boot, restart=Restart(jitter=0.0, give_up_after=2))


async def test_give_up_while_the_body_waits(autojump_clock: MockClock) -> None:
    """A body that waits for a worker which will never come is told why, and not in a group."""
    with pytest.raises(RestartLimitExceeded) as caught:
        async with open_pool(gives_up()) as pool:
            with contextlib.suppress(WorkerCrashed):
                await ask(pool, "crash 1")
            await ask(pool)
    assert isinstance(caught.value.__cause__, SpawnError)
    assert caught.value.__cause__.stderr == "no more"


async def test_give_up_while_a_nursery_in_the_body_waits(autojump_clock: MockClock) -> None:
    """The groups that the body's own nurseries make of it are opened, where nothing else is in them."""
    with pytest.raises(RestartLimitExceeded, match="2 boots in a row"):
        async with open_pool(gives_up()) as pool:
            with contextlib.suppress(WorkerCrashed):
                await ask(pool, "crash 1")
            async with trio.open_nursery() as outer, trio.open_nursery() as inner:
                outer.start_soon(ask, pool)
                inner.start_soon(ask, pool)
                inner.start_soon(trio.sleep_forever)


async def test_give_up_beside_an_error_of_the_body(autojump_clock: MockClock) -> None:
    """An error of the body's own leaves the block as it is, with the give-up behind it."""
    with pytest.raises(ValueError, match="mine") as caught:
        async with open_pool(gives_up()) as pool:
            with contextlib.suppress(WorkerCrashed):
                await ask(pool, "crash 1")
            try:
                await ask(pool)
            finally:
                raise ValueError("mine")
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, RestartLimitExceeded):
        error = error.__context__
    assert error is not None


# wrong programs


async def test_cat_is_no_worker() -> None:
    """A program that echoes what it reads is told from a worker by the pid in the handshake."""
    with pytest.raises(SpawnError, match="echoes what it reads") as caught:
        async with open_worker(puppets(command=["cat"])):
            pytest.fail("it opened")
    assert caught.value.phase == "handshake"
