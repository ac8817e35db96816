"""A factory of one's own over trio streams: `StreamRelay` is held to what a relay over descriptors is held to."""

import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import pytest
import trio
import trio.testing

from tests.test_contract import (
    account,
    check_cancel,
    check_crash,
    check_job_error,
    check_payloads,
    check_place,
    check_stop_request,
    check_stream,
    command_of,
)
from tests.test_faults import Told, busy, heals, puppets, ready, tell, until
from trio_workers import (
    Config,
    Conversation,
    Factory,
    Launch,
    Line,
    Payload,
    PipeFactory,
    Pool,
    RelayError,
    Spawner,
    StreamRelay,
    Worker,
    WorkerCrashed,
    WorkerProcess,
    WorkerState,
    open_pool,
)
from trio_workers._relay import STREAM_BUFFER, FdRelay

LARGE: Final = 2 << 20
"""Bytes of a job that no buffers on the way take in as a whole."""


class StreamFactory(Factory):
    """Workers on a socket pair, which the pool sees as a trio stream."""

    async def open(self, nursery: trio.Nursery) -> Spawner:
        return StreamSpawner(await PipeFactory("socketpair").open(nursery), nursery)


class StreamSpawner(Spawner):
    def __init__(self, inner: Spawner, nursery: trio.Nursery) -> None:
        self.inner = inner
        self.nursery = nursery

    async def spawn(self, launch: Launch) -> WorkerProcess:
        return await self.inner.spawn(launch)

    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        relay = (await self.inner.connect(process, launch)).relay
        assert isinstance(relay, FdRelay)
        connection = socket.socket(fileno=os.dup(relay._read_fd))
        relay.close()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        return Line(StreamRelay(stream, self.nursery), Conversation(launch.protocol, launch.max_frame_size))

    def close(self) -> None:
        self.inner.close()


def streaming(**changes: Any) -> Config:
    return puppets(**{"factory": StreamFactory(), **changes})


def relay_of(worker: Worker) -> StreamRelay:
    assert worker.line is not None
    assert isinstance(worker.line.relay, StreamRelay)
    return worker.line.relay


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@contextlib.asynccontextmanager
async def opened(config: Config, **options: Any) -> AsyncIterator[Pool]:
    """A pool that leaves no task behind; children and descriptors are looked for after every test."""
    before = tasks()
    async with open_pool(config, **options) as pool:
        yield pool
    assert tasks() == before


async def test_contract() -> None:
    """What every transport is held to, from the handshake to the soft stop, which ends the workers by themselves."""
    config = streaming(command=command_of("python"), num_workers=2)
    async with opened(config) as pool:
        await check_payloads(pool)
        await check_place(pool)
        await check_job_error(pool)
        await check_stream(pool)
        await check_stop_request(pool)
        await check_crash(pool, proof=None)
        await check_cancel(pool)
        account(pool)
        last = pool.workers
    for worker in last:
        await worker.wait()
        assert worker.state.value is WorkerState.STOPPED
        assert worker.process is not None
        assert worker.process.peek() == 0


async def test_ping_in_the_last_frame() -> None:
    """A ping that comes with the end of a reply is answered, and the worker stays."""
    async with opened(streaming()) as pool:
        (worker,) = pool.workers
        source = (
            "raw(context_frame_3(0, b'', b'one', 1)); raw(context_frame_3(0, b'', b'two', 4)); sys.pong = read(12)[10]"
        )
        async with pool.stream(Payload(source.encode())) as parts:
            assert [part.body async for part in parts] == [b"one", b"two"]
        assert await tell(pool, "reply(b'%d' % sys.pong)") == b"8"
        assert pool.workers == (worker,)


async def test_two_answers_in_one_write() -> None:
    """The job gets its answer, the worker is replaced, and nobody gets the other one."""
    told = Told()
    async with opened(streaming(), observer=told) as pool:
        (worker,) = pool.workers
        assert await tell(pool, "raw(frame(b'one') + frame(b'two'))") == b"one"
        await heals(pool, worker)
    (error,) = told.errors
    assert isinstance(error, RelayError)


async def test_second_answer_before_the_next_job() -> None:
    """An answer that no job asked for is the next caller's never: that job goes to another worker."""
    told = Told()
    async with opened(streaming(), observer=told) as pool:
        (worker,) = pool.workers
        assert await tell(pool, "reply(b'one'); reply(b'late')") == b"one"
        await until(lambda: worker not in pool.workers or relay_of(worker).has_input())
        assert await tell(pool, "reply(b'mine')") == b"mine"
        await heals(pool, worker)
    (error,) = told.errors
    assert isinstance(error, RelayError)


async def test_answers_and_exits() -> None:
    """A reply that came with the end of its worker arrives; so does an error's exit status after it."""
    async with opened(streaming()) as pool:
        for number in range(15):
            (worker,) = pool.workers
            assert await tell(pool, f"reply(b'{number}' * 10_000); os._exit(0)") == b"%d" % number * 10_000
            await worker.ended.wait()  # of a job in a stream's buffer nobody can say that it did not start
            await until(lambda: ready(pool))
        with pytest.raises(WorkerCrashed) as caught:
            await tell(pool, "raw(frame(b'half a frame')[:20]); os._exit(3)")
        assert (caught.value.returncode, caught.value.started) == (3, True)
        await heals(pool)


@contextlib.contextmanager
def frozen(worker: Worker) -> Iterator[None]:
    """A worker that does not read."""
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.pid, signal.SIGCONT)


async def test_cancel_while_a_large_job_is_written() -> None:
    """A job of which a part is in every buffer on the way is cancelled: its worker is replaced, and the pool works."""
    async with opened(streaming()) as pool:
        (worker,) = pool.workers
        assert worker.pid
        os.kill(worker.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell, pool, "#" * LARGE)
            await until(lambda: busy(pool) and len(relay_of(worker)._outbox) == STREAM_BUFFER)
            assert worker.line is not None
            assert not worker.line.whole
            nursery.cancel_scope.cancel()
        await heals(pool, worker)


async def test_cancel_of_one_part_while_the_job_is_written() -> None:
    """Cancelling `__anext__` alone loses nothing of the job: the rest of it is written by the next call."""
    source = b"reply(b'%d %s' % (len(rest), rest[-3:]))\n#" + b"x" * LARGE + b"end"
    async with opened(streaming()) as pool:
        (worker,) = pool.workers
        with frozen(worker):
            async with pool.stream(Payload(source)) as parts:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(anext, parts)
                    await until(lambda: len(relay_of(worker)._outbox) == STREAM_BUFFER)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                assert worker.line is not None
                assert not worker.line.whole
                assert worker.pid
                os.kill(worker.pid, signal.SIGCONT)
                assert [part.body async for part in parts] == [b"%d end" % (4 + len(source))]
        await heals(pool)
        assert pool.workers == (worker,)


async def test_kill_of_a_worker_that_does_not_read() -> None:
    """A relay whose task hangs in `send_all` goes with its worker."""
    async with opened(streaming(num_workers=2)) as pool:
        async with pool.lease() as worker, trio.open_nursery() as nursery:
            assert worker.pid
            os.kill(worker.pid, signal.SIGSTOP)

            async def send() -> None:
                with pytest.raises(WorkerCrashed):
                    await worker.exec(Payload(b"#" * LARGE))

            nursery.start_soon(send)
            await until(lambda: len(relay_of(worker)._outbox) == STREAM_BUFFER)
            os.kill(worker.pid, signal.SIGKILL)
        await heals(pool, worker)
