"""What was wrong with jobs ahead of their turn, each so that it does not come back."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.test_faults import puppets, ready, until
from tests.test_pool_logic import config, settle, work
from trio_workers import (
    Config,
    JobTimeout,
    Limits,
    Payload,
    Pool,
    TrioWorkersInternalError,
    WorkerCrashed,
    WorkerEvent,
    _exchange,
    _platform,
    open_pool,
    open_python_pool,
)
from trio_workers._call_line import PacketLine
from trio_workers._goridge import PIPE_BUF, PROTOCOLS, encode_job

LARGE: Final = b"#" * 100_000


class Answers:
    """What callers got, each in a task of its own, by what they asked."""

    def __init__(self, pool: Pool, nursery: trio.Nursery) -> None:
        self.pool = pool
        self.nursery = nursery
        self.found: dict[bytes, Any] = {}
        self.scopes: dict[bytes, trio.CancelScope] = {}

    async def ask(self, body: bytes, context: bytes = b"") -> None:
        """Ask in a task of its own; return when that waits for its answer."""
        self.nursery.start_soon(self.run, body, context)
        await settle()

    async def run(self, body: bytes, context: bytes = b"") -> None:
        with trio.CancelScope() as scope:
            self.scopes[body] = scope
            try:
                answer = await self.pool.exec(Payload(body, context))
            except Exception as error:
                self.found[body] = error
            else:
                self.found[body] = answer.body
        if scope.cancelled_caught:
            self.found[body] = "cancelled"


def reading_ahead(read_ahead: int, handler: Any = work, **fields: Any) -> Config:
    """A pool of one worker in memory, to which so many jobs may be on the way."""
    return attrs.evolve(config(handler, **fields), read_ahead=read_ahead)


async def test_a_large_job_that_waits_through_a_reset(autojump_clock: MockClock) -> None:
    """It came when no job lay ahead of its turn, and lies so under no later plan."""
    async with open_pool(reading_ahead(1)) as pool:
        async with trio.open_nursery() as nursery:
            answers = Answers(pool, nursery)
            for body in (b"sleep 1", b"sleep 2", LARGE, b"small"):
                await answers.ask(body)
            nursery.start_soon(pool.reset, reading_ahead(8))
        assert answers.found == {body: body for body in (b"sleep 1", b"sleep 2", LARGE, b"small")}
        assert pool.statistics().exits == {"reset": 1}


@pytest.mark.parametrize("protocol", [one for one in PROTOCOLS if one != "goridge-3"])
async def test_a_job_that_another_wire_makes_large(protocol: str, autojump_clock: MockClock) -> None:
    """Small enough in the wire it was encoded for, it is none to lie ahead of its turn in that of a later plan."""
    context = b"c" * (PIPE_BUF - 17)
    (frame,) = encode_job("goridge-3", context, b"x")
    assert len(frame) <= PIPE_BUF
    assert len(encode_job(protocol, context, b"x")) == 2
    async with open_pool(reading_ahead(2)) as pool:
        async with trio.open_nursery() as nursery:
            answers = Answers(pool, nursery)
            await answers.ask(b"sleep 1")
            await answers.ask(b"sleep 2")
            await answers.ask(b"sleep 3")
            await answers.ask(b"x", context)
            nursery.start_soon(pool.reset, attrs.evolve(reading_ahead(8), protocol=protocol))
        assert answers.found == {body: body for body in (b"sleep 1", b"sleep 2", b"sleep 3", b"x")}


async def test_an_answer_that_was_there_before_the_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that answers too often reaches jobs that were on the way to it, and no job written after its answers."""
    gate = tmp_path / "gate"
    first = f"while not os.path.exists({str(gate)!r}): time.sleep(0.001)\nraw(3 * frame(b'one'))".encode()
    others = [f"reply(b'{number}')".encode() for number in range(2, 6)]
    caplog.set_level(logging.ERROR, "trio_workers.pool")
    async with open_pool(puppets(read_ahead=2)) as pool, trio.open_nursery() as nursery:
        answers = Answers(pool, nursery)
        for body in (first, *others):
            await answers.ask(body)
        await until(lambda: pool.statistics().waiting == 4)
        gate.touch()
    # The second is on the way when the first is answered, and nothing in this wire says whose an answer is.
    assert answers.found == {first: b"one", others[0]: b"one", others[1]: b"3", others[2]: b"4", others[3]: b"5"}
    assert pool.statistics().exits == {"broke the protocol": 1, "closing": 1}


async def test_an_answer_that_was_there_before_the_job_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it reach a job that has been lent, and is to be written at the end of the pass."""
    monkeypatch.setattr(_exchange, "FEW", 0)  # one is enough to write them at the end of a pass
    caplog.set_level(logging.ERROR, "trio_workers.pool")
    others = [f"reply(b'{number}')".encode() for number in range(4)]
    async with open_pool(puppets(read_ahead=8)) as pool:
        # Which comes first, the answer or the others, is chance: trio throws a coin in each pass.
        for number in range(10):
            gate = tmp_path / str(number)
            first = f"while not os.path.exists({str(gate)!r}): time.sleep(0.001)\nraw(5 * frame(b'one'))".encode()
            (worker,) = pool.workers
            async with trio.open_nursery() as nursery:
                answers = Answers(pool, nursery)
                await answers.ask(first)
                gate.touch()
                assert worker.line is not None
                while not worker.line.relay.has_input():
                    time.sleep(0.001)  # noqa: ASYNC251 - nobody else must have his turn
                for body in others:
                    nursery.start_soon(answers.run, body)
            assert answers.found == {first: b"one", **{body: body[8:9] for body in others}}
            await until(lambda worker=worker: worker not in pool.workers)
            await until(lambda: ready(pool))


async def test_a_pong_is_no_part_of_a_job(tmp_path: Path) -> None:
    """Promise 3: an unread control frame behind a job that was read whole proves nothing, and that runs once."""
    log = tmp_path / "log"
    log.touch()
    gate = tmp_path / "gate"
    first = (
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.001)\n"
        f"raw(context_frame_3(0, b'', b'one', 4))\n"  # with a ping
    ).encode()
    # The pong was written when the answer was read, behind the others: so it is there before this one dies.
    second = (
        f"open({str(log)!r}, 'a').write('ran ')\n"
        f"import fcntl, struct, termios\n"
        f"while struct.unpack('i', fcntl.ioctl(0, termios.FIONREAD, bytes(4)))[0] != 12: time.sleep(0.001)\n"
        f"os._exit(7)\n"
    ).encode()
    async with open_pool(puppets(read_ahead=2)) as pool:
        async with trio.open_nursery() as nursery:
            answers = Answers(pool, nursery)
            for body in (first, second):
                await answers.ask(body)
            assert [job.ahead is not None for job in pool._core.roster._waiting] == [True]
            gate.touch()
        assert answers.found[first] == b"one"
        error = answers.found[second]
        assert isinstance(error, WorkerCrashed)
        assert (error.returncode, error.started, error.phase) == (7, None, "running")
        assert log.read_text() == "ran "


@pytest.mark.parametrize("ending", ["crash", "exec_ttl"])
async def test_what_lies_behind_a_job_says_nothing_of_it(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    """The job in front was read whole and ran, though its worker left others unread; those go on."""
    caplog.set_level(logging.ERROR, "trio_workers.pool")
    first = b"os._exit(7)" if ending == "crash" else b"time.sleep(100)"
    others = [f"reply(b'{number}')".encode() for number in range(3)]
    told: list[object] = []
    limits = Limits(exec_ttl=5.0) if ending == "exec_ttl" else Limits()
    async with open_pool(
        puppets(read_ahead=8, limits=limits),
        observer=lambda event, worker, context: told.append(context) if event is WorkerEvent.ERROR else None,
    ) as pool:
        async with trio.open_nursery() as nursery:
            answers = Answers(pool, nursery)
            async with pool.lease() as worker:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGSTOP)  # so that all of them lie there before the first is read
                for body in (first, *others):
                    await answers.ask(body)
            os.kill(worker.pid, signal.SIGCONT)
        error = answers.found.pop(first)
        assert answers.found == {body: body[8:9] for body in others}
    (event,) = told
    for one in (error, event):
        if ending == "crash":
            assert isinstance(one, WorkerCrashed)
            assert "while it ran a job" in str(one)
            assert (one.phase, one.started) == ("running", True)
        else:
            assert isinstance(one, JobTimeout)
            assert "ran for longer than exec_ttl" in str(one)
    assert isinstance(error, WorkerCrashed | JobTimeout)
    assert error.started is True


@pytest.mark.skipif(not _platform.HERE.has_packets(), reason="needs SOCK_SEQPACKET")
async def test_the_packets_of_a_life_that_fails() -> None:
    """An error in the middle of a worker's life leaves none of its sockets to the garbage collector."""

    def refuse(_: logging.LogRecord) -> bool:
        raise ArithmeticError("a bug in a filter")

    log = logging.getLogger("trio_workers.worker")
    log.addFilter(refuse)
    try:
        with pytest.raises(TrioWorkersInternalError):
            async with open_python_pool(1) as pool:
                (worker,) = pool.workers
                line = worker.line
                assert isinstance(line, PacketLine)
                await pool.run_sync(print, "hello")
                await trio.sleep_forever()
    finally:
        log.removeFilter(refuse)
    assert line._spare.fileno() == line._packets.fileno() == -1
