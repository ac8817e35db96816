"""`Config.read_ahead`: jobs that lie in a command worker's pipe ahead of their turn, with real processes.

What has been written can't be taken back. So nobody is killed for the sake of a job that others lie behind; and when a
worker dies, what it had answered is answered, what it provably had not read goes on, and of the rest nobody can know.
Nothing is ever run twice: each worker notes what it begins.

A worker reads here either exactly what it runs ("exact"), or as much as there is ("greedy"), as most programs do.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import collections
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing

from tests.support import ROOT
from tests.test_contract import DIALECTS, TRANSPORTS, command_of, factory_of
from tests.test_faults import runs, until
from tests.test_parent import wait
from tests.test_python_ahead import hold, leap, pid_of
from trio_workers import (
    AllocateTimeout,
    Config,
    JobError,
    JobRecord,
    JobTimeout,
    Limits,
    Payload,
    PipeFactory,
    Pool,
    QueueFull,
    RelayError,
    Restart,
    Worker,
    WorkerCrashed,
    WorkerError,
    WorkerEvent,
    WorkerState,
    _core,
    open_pool,
    open_worker,
)
from trio_workers._exchange import LEFT_ALONE
from trio_workers._goridge import encode_job
from trio_workers._seats import Phase

pytestmark = [pytest.mark.faults, pytest.mark.limit(120)]

WORKER: Final = """
import os, signal, sys, time
from trio_workers.child import STOP_REQUEST, Reply, _relay, serve

note, reads = sys.argv[1:]
relay = None


def read(self, size):
    global relay
    relay = self
    try:
        data = os.read(self._reader, 1 if reads == "exact" else 1 << 16)
    except ConnectionResetError:
        data = b""
    if data:
        self._decoder.receive(data)
    else:
        self._ended = True
    return 0


_relay.Relay._read = read


def begin(number):
    with open(note, "ab", 0) as file:
        file.write(b"%d %d\\n" % (number, os.getpid()))


def stream(number, count):
    for part in range(count):
        yield b"%d %d" % (number, part)


def handle(job):
    first, how, argument, *_ = job.body.split(b" ") + [b"", b""]
    number = int(first)
    answer = Reply(first, job.context)
    if how == b"stop" and not os.path.exists(f"{note}.{number}"):
        open(f"{note}.{number}", "x").close()
        return STOP_REQUEST
    begin(number)
    if how == b"stay":
        while not os.path.exists(argument):
            time.sleep(0.002)
    elif how == b"hang":
        time.sleep(1000)
    elif how == b"exit":
        os._exit(7)
    elif how == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == b"fail":
        raise ValueError(f"bad {number}")
    elif how == b"stream":
        return stream(number, int(argument))
    elif how == b"large":
        return Reply(first + b" " * int(argument), job.context)
    elif how == b"twice":
        relay.write(relay.reply(job.context, first))
    elif how == b"garbage":
        relay.write(b"this is no frame of any dialect")
    elif how == b"grow":
        ballast.append(b"x" * (int(argument) << 20))
        begin(number + 1000)
        time.sleep(1000)
    return answer


ballast = []
serve(handle)
"""

SPOKEN: Final = [
    *((language, protocol) for language in ("python", "php") for protocol in DIALECTS),
    ("node", "goridge-3"),
    ("perl", "goridge-3"),
]
"""The workers of the docs, and the dialects that each speaks."""

CANCELLED: Final = "cancelled"

ENDS: Final = {"exit": 7, "kill": -signal.SIGKILL}


def reading_ahead(
    note: Path, read_ahead: int = 8, *, reads: str = "exact", transport: str = "pipe", **fields: Any
) -> Config:
    """A pool of workers that note what they begin."""
    fields = {
        "num_workers": 1,
        "allocate_timeout": 1000.0,
        "destroy_timeout": 10.0,
        "boot_timeout": 30.0,
        "env": {"PYTHONPATH": str(ROOT)},
        "restart": Restart(initial=0.02),
        "factory": factory_of(transport, note.parent),
        **fields,
    }
    return Config(command=[sys.executable, "-S", "-c", WORKER, str(note), reads], read_ahead=read_ahead, **fields)


def begun(note: Path) -> list[int]:
    """The jobs that have begun, in their order."""
    return [int(line.split()[0]) for line in note.read_text().splitlines()] if note.exists() else []


class Callers:
    """Callers, each in a task of its own, and what each has got."""

    def __init__(self, pool: Pool, nursery: trio.Nursery, note: Path) -> None:
        self.pool = pool
        self.note = note
        self.found: dict[int, Any] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self._nursery = nursery

    async def come(self, *numbers: int, how: str = "", context: bytes = b"") -> None:
        """Hand in jobs, one after the other; return when the last of them waits."""
        for number in numbers:
            self.scopes[number] = trio.CancelScope()
            self._nursery.start_soon(self._call, number, f"{number} {how}".encode(), context)
            await trio.testing.wait_all_tasks_blocked()

    async def _call(self, number: int, body: bytes, context: bytes) -> None:
        scope = self.scopes[number]
        with scope:
            try:
                reply = await self.pool.exec(Payload(body, context), label=str(number))
            except Exception as error:
                self.found[number] = error
            else:
                assert reply.context == context
                self.found[number] = int(reply.body)
        if scope.cancelled_caught:
            self.found[number] = CANCELLED

    async def front(self, number: int, go: Path) -> None:
        """Hand in a job that is to be in front until somebody makes the file `go`, and wait until it has begun."""
        await self.come(number, how=f"stay {go}")
        await until(lambda: number in begun(self.note))

    async def all_told(self, count: int) -> None:
        """Wait until so many callers have got something."""
        await until(lambda: len(self.found) == count)

    def assert_began(self, *numbers: int) -> None:
        """These jobs have begun, each once, and no others."""
        assert sorted(begun(self.note)) == sorted(numbers)

    def assert_own(self, *numbers: int) -> None:
        """These callers have got the answers to their own jobs."""
        assert {number: self.found.get(number) for number in numbers} == {number: number for number in numbers}

    def assert_honest(self) -> None:
        """What each caller was told agrees with what the workers noted, and nothing began twice."""
        times = collections.Counter(begun(self.note))
        assert set(times.values()) <= {1}
        for number, found in self.found.items():
            if isinstance(found, WorkerError | JobTimeout):
                assert found.started is not (not times[number]) or found.started is None
            elif found != CANCELLED:
                assert (found, times[number]) == (number, 1)


def lost(found: object) -> bool:
    """Whether this is what a caller gets of whose job nobody can know whether it had begun."""
    return isinstance(found, WorkerError) and found.started is None


def ahead(pool: Pool) -> list[int]:
    """How many jobs lie in the line of each worker, the most first."""
    return sorted((len(worker.seat.ahead) for worker in pool.workers), reverse=True)


def waits(pool: Pool) -> int:
    return pool.statistics().waiting


def ready(pool: Pool) -> bool:
    now = pool.statistics()
    return now.idle == now.target == len(pool.workers)


@contextlib.asynccontextmanager
async def opened(config: Config, note: Path, **keywords: Any) -> AsyncIterator[tuple[Pool, Callers]]:
    """A pool and callers, who are waited for while it is open; at the end all is as it should be."""
    async with open_pool(config, **keywords) as pool:
        async with trio.open_nursery() as nursery:
            callers = Callers(pool, nursery, note)
            yield pool, callers
        await until(lambda: ready(pool))
        for number in range(5000, 5003):
            assert (await pool.exec(Payload(b"%d" % number))).body == b"%d" % number
        now = pool.statistics()
        assert now.waiting == 0
        assert now.starts == len(pool.workers) + sum(now.exits.values())
    note.write_text("".join(f"{line}\n" for line in note.read_text().splitlines() if not line.startswith("500")))


def let_go(worker: Worker) -> None:
    os.kill(pid_of(worker), signal.SIGCONT)


def unread(worker: Worker) -> int:
    """How many bytes lie in its pipe."""
    assert worker.line is not None
    size = worker.line.relay.unread_bytes()
    assert size is not None
    return size


def size_of(body: str, protocol: str = "goridge-3") -> int:
    return sum(map(len, encode_job(protocol, b"", body.encode())))


# the number


@pytest.mark.parametrize("value", [0, -1, -8])
def test_too_small(value: int) -> None:
    """It is at least 1."""
    with pytest.raises(ValueError, match=r"read_ahead"):
        Config(command=["worker"], read_ahead=value)


@pytest.mark.parametrize("value", [True, False, 1.5, 8.0, "8", b"8", None, [8]])
def test_no_integer(value: Any) -> None:
    """It is an int, and no bool."""
    with pytest.raises(TypeError, match=r"read_ahead"):
        Config(command=["worker"], read_ahead=value)


def test_default() -> None:
    """It is 1 where nothing is said, and any number above is taken."""
    assert Config(command=["worker"]).read_ahead == 1
    assert [Config(command=["worker"], read_ahead=number).read_ahead for number in (1, 2, 1000)] == [1, 2, 1000]


# how many


@pytest.mark.parametrize("protocol", DIALECTS)
@pytest.mark.parametrize("read_ahead", [1, 2, 8, 32])
async def test_as_many_as_it_says(read_ahead: int, protocol: str, note: Path) -> None:
    """With 1 there is one job in a pipe, and nothing lies behind it; with n there are n, the others wait outside."""
    async with opened(reading_ahead(note, read_ahead, protocol=protocol), note) as (pool, callers):
        (worker,) = pool.workers
        await hold(worker)
        await callers.come(*range(10, 50))
        assert unread(worker) == read_ahead * size_of("10 ", protocol)
        assert ahead(pool) == [read_ahead - 1]
        assert waits(pool) == 39
        assert worker.state.num_execs == 1
        let_go(worker)
    callers.assert_own(*range(10, 50))
    assert begun(note) == list(range(10, 50))


async def test_one_at_a_time_with_one(note: Path, go: Path) -> None:
    """With 1 no job is written before the one before is answered, whatever comes between."""
    async with opened(reading_ahead(note, 1, num_workers=2), note) as (pool, callers):
        await callers.front(0, go)
        await callers.front(1, go)
        await callers.come(*range(2, 20))
        assert ahead(pool) == [0, 0]
        assert [unread(worker) for worker in pool.workers] == [0, 0]
        callers.scopes[0].cancel()
        await until(lambda: 0 in callers.found and pool.statistics().exits == {"cancelled": 1})
        await callers.all_told(19)
        assert 1 not in callers.found
        go.touch()
    callers.assert_own(*range(1, 20))
    callers.assert_began(*range(20))


async def test_two_workers(note: Path, go: Path) -> None:
    """Each worker has as many on the way; who is free gets the next one before anybody lies behind another."""
    async with opened(reading_ahead(note, 4, num_workers=2), note) as (pool, callers):
        for number in range(12):
            await callers.come(number, how=f"stay {go}")
            assert ahead(pool) == [[0, 0], [0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3], [3, 3], [3, 3],
                                   [3, 3], [3, 3]][number]  # fmt: skip
        go.touch()
    callers.assert_own(*range(12))
    callers.assert_began(*range(12))


# answers


@pytest.mark.parametrize("reads", ["exact", "greedy"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("protocol", DIALECTS)
async def test_answers(protocol: str, transport: str, reads: str, note: Path) -> None:
    """Every caller gets its own answer, context, or error."""
    config = reading_ahead(note, protocol=protocol, transport=transport, reads=reads, num_workers=2)
    async with opened(config, note) as (pool, callers):
        workers = pool.workers
        for worker in workers:
            await hold(worker)
        for number in range(60):
            how = "fail" if number % 5 == 3 else ""
            await callers.come(number, how=how, context=b"context %d" % number if number % 2 and not how else b"")
        assert ahead(pool) == [7, 7]
        for worker in workers:
            let_go(worker)
        await callers.all_told(60)
        assert pool.workers == workers
        assert sum(worker.state.num_execs for worker in workers) == 60
    callers.assert_own(*(number for number in range(60) if number % 5 != 3))
    for number in range(3, 60, 5):
        assert isinstance(callers.found[number], JobError)
        assert f"bad {number}" in str(callers.found[number])
    callers.assert_began(*range(60))


@pytest.mark.parametrize(("language", "protocol"), SPOKEN)
async def test_answers_of_other_languages(language: str, protocol: str) -> None:
    """Workers that know nothing of it answer each job that lies in their pipe, in its turn."""
    config = Config(
        command=command_of(language), protocol=protocol, num_workers=1, read_ahead=8, env={"PYTHONPATH": str(ROOT)}
    )
    found: dict[int, object] = {}

    async def call(number: int) -> None:
        body = (b"upper a%d", b"fail a%d", b"no word %d")[number % 3] % number
        try:
            found[number] = await pool.exec(Payload(body, b"c%d" % number))
        except JobError as error:
            found[number] = error.message

    async with open_pool(config) as pool:
        (worker,) = pool.workers
        for _ in range(3):
            await hold(worker)
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(call, number)
                await trio.testing.wait_all_tasks_blocked()
                assert ahead(pool) == [7]
                let_go(worker)
            for number in range(30):
                context = b"c%d" % number
                answer = found.pop(number)
                if number % 3 == 1:
                    assert isinstance(answer, bytes)
                    assert b"a%d" % number in answer
                else:
                    word = b"A%d" if number % 3 == 0 else b"no word %d"
                    assert answer == Payload(word % number, context)
        assert pool.workers == (worker,)
        assert worker.state.num_execs == 90


@pytest.mark.parametrize("reads", ["exact", "greedy"])
async def test_what_has_a_worker_to_itself(reads: str, note: Path, go: Path) -> None:
    """Streams, leases and jobs of more than 4096 bytes lie behind nothing, and nothing lies behind them."""
    async with opened(reading_ahead(note, reads=reads), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(1)
        fits = 4096 - size_of("2 ")
        await callers.come(2, how=" " * fits)
        assert ahead(pool) == [2]
        await callers.come(3, how=" " * (fits + 1))
        await callers.come(4)
        assert ahead(pool) == [2]

        async def stream() -> None:
            async with pool.stream(Payload(b"5 stream 3")) as parts:
                callers.found[5] = [part.body async for part in parts]

        async def lease() -> None:
            async with pool.lease() as leased:
                callers.found[7] = int((await leased.exec(Payload(b"7"))).body)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            await trio.testing.wait_all_tasks_blocked()
            await callers.come(6)
            nursery.start_soon(lease)
            await trio.testing.wait_all_tasks_blocked()
            await callers.come(8, how="x" * 100_000)
            await callers.come(9, how="large 1000000")
            await callers.come(10, 11)
            go.touch()
        await callers.all_told(12)
        assert pool.workers == (worker,)
    assert callers.found.pop(5) == [b"5 0", b"5 1", b"5 2"]
    callers.assert_own(0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)
    assert begun(note) == list(range(12))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_large_answers(transport: str, note: Path) -> None:
    """Answers that no pipe holds come one after the other; who waits behind them gets its own."""
    config = reading_ahead(note, transport=transport, reads="greedy")
    async with opened(config, note) as (pool, callers):
        (worker,) = pool.workers
        await hold(worker)
        for number in range(24):
            await callers.come(number, how=f"large {(number % 3) * 700_000}")
        assert ahead(pool) == [7]
        let_go(worker)
    callers.assert_own(*range(24))
    assert begun(note) == list(range(24))


async def test_a_pipe_that_is_full(note: Path) -> None:
    """What does not fit into the pipe waits for its turn, and is written whole."""
    async with opened(reading_ahead(note, 1000, reads="greedy"), note) as (pool, callers):
        (worker,) = pool.workers
        await hold(worker)
        await callers.come(*range(100, 250), how="x" * 4000)
        assert unread(worker) < 150 * 4000
        let_go(worker)
    callers.assert_own(*range(100, 250))
    assert begun(note) == list(range(100, 250))


async def test_a_map(note: Path) -> None:
    """A map's items lie ahead of their turn as other jobs do, and come in their order."""
    async with opened(reading_ahead(note, num_workers=2), note) as (pool, _):
        async with pool.map(Payload(b"%d" % number) for number in range(300)) as replies:
            assert [int(reply.body) async for reply in replies] == list(range(300))
        assert sorted(begun(note)) == list(range(300))


async def test_an_own_worker(note: Path) -> None:
    """A single worker, which has one caller at a time, knows no jobs behind others."""
    async with open_worker(reading_ahead(note)) as worker:
        for number in range(3):
            assert (await worker.exec(Payload(b"%d" % number))).body == b"%d" % number
    assert begun(note) == [0, 1, 2]


async def test_debug(note: Path) -> None:
    """With `debug` each job has a process of its own, and none lies behind another."""
    async with open_pool(reading_ahead(note, debug=True, num_workers=2)) as pool, trio.open_nursery() as nursery:
        callers = Callers(pool, nursery, note)
        for number in range(6):
            nursery.start_soon(callers.come, number)
    callers.assert_own(*range(6))
    assert len({line.split()[1] for line in note.read_text().splitlines()}) == 6


async def test_records(note: Path, go: Path) -> None:
    """The job observer hears of each job once, with its times in order; those in the pipe wait until their turn."""
    records: list[JobRecord] = []
    async with opened(reading_ahead(note), note, job_observer=records.append) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(1, 2)
        await callers.come(3, how="fail")
        await callers.come(4)
        assert worker.current is not None
        assert worker.current.label == "0"
        callers.scopes[2].cancel()
        await until(lambda: 2 in callers.found)
        go.touch()
        await callers.all_told(5)
        assert {record.label: record.outcome for record in records} == {
            "0": "replied", "1": "replied", "2": "cancelled", "3": "failed", "4": "replied"
        }  # fmt: skip
        assert len(records) == 5
        for record in records:
            assert record.queued <= (record.queued if record.started is None else record.started) <= record.ended
        assert worker.state.num_execs == 5
        assert pool.statistics().jobs == {"replied": 3, "cancelled": 1, "failed": 1}
    callers.assert_began(*range(5))


# a worker dies


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("reads", ["exact", "greedy"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_dies(transport: str, reads: str, how: str, seen: bool, note: Path, go: Path) -> None:
    """It dies in the sixth of ten jobs: five are answered, that one pays, and nothing is run twice.

    What was provably unread is run by the replacement. Of what may have been read nobody can know, and that is said.
    """
    await dies(reading_ahead(note, 10, reads=reads, transport=transport), how, seen, note, go)


@pytest.mark.parametrize("protocol", DIALECTS)
async def test_dies_in_each_dialect(protocol: str, note: Path, go: Path) -> None:
    """The same in the other wires."""
    await dies(reading_ahead(note, 10, protocol=protocol), "exit", True, note, go)


async def dies(config: Config, how: str, seen: bool, note: Path, go: Path) -> None:
    """Let a worker die in the sixth of ten jobs, several times."""
    async with opened(config, note) as (pool, callers):
        for first in range(0, 40, 10):
            go.unlink(missing_ok=True)
            (worker,) = pool.workers
            await callers.front(first, go)
            await callers.come(*range(first + 1, first + 5))
            await callers.come(first + 5, how=how)
            await callers.come(*range(first + 6, first + 10))
            assert ahead(pool) == [9]
            go.touch()
            if not seen:
                pid = pid_of(worker)
                wait(lambda pid=pid: not runs(pid))  # blocks
            await callers.all_told(first + 10)
            await until(lambda: ready(pool))
            callers.assert_own(*range(first, first + 5))
            error = callers.found[first + 5]
            assert type(error) is WorkerCrashed
            assert (error.pid, error.returncode) == (worker.pid, ENDS[how])
            assert error.started is not False
            assert f"'{first + 5}'" in str(error)
            rest = [callers.found[number] for number in range(first + 6, first + 10)]
            if config.factory == PipeFactory() and is_exact(config):
                callers.assert_own(*range(first + 6, first + 10))
            else:
                assert all(isinstance(found, int) or lost(found) for found in rest)
                assert {found.pid for found in rest if isinstance(found, WorkerError)} <= {worker.pid}
    callers.assert_honest()
    assert pool.statistics().exits["crashed"] == 4


def is_exact(config: Config) -> bool:
    assert not callable(config.command)
    return config.command[-1] == "exact"


async def test_dies_before_it_reads(note: Path) -> None:
    """Killed with all its jobs unread, it costs nobody anything: they are run by its successor, in their order."""
    async with opened(reading_ahead(note), note) as (pool, callers):
        (worker,) = pool.workers
        await hold(worker)
        await callers.come(*range(20))
        assert ahead(pool) == [7]
        os.kill(pid_of(worker), signal.SIGKILL)
        await callers.all_told(20)
        await until(lambda: worker not in pool.workers)
    callers.assert_own(*range(20))
    assert begun(note) == list(range(20))


@pytest.mark.parametrize("transport", ["socketpair", "unix", "tcp"])
async def test_dies_before_it_reads_from_a_socket(transport: str, note: Path) -> None:
    """Over sockets nobody can tell how far it has read, so none of them is run again."""
    async with opened(reading_ahead(note, transport=transport), note) as (pool, callers):
        (worker,) = pool.workers
        await hold(worker)
        await callers.come(*range(8))
        assert ahead(pool) == [7]
        os.kill(pid_of(worker), signal.SIGKILL)
        await callers.all_told(8)
        assert all(lost(found) or found == number for number, found in callers.found.items())
    callers.assert_honest()


async def test_dies_with_others_outside(note: Path, go: Path) -> None:
    """Those for whom there was no room in the pipe of a worker that dies run elsewhere, whatever that had read."""
    async with opened(reading_ahead(note, 4, reads="greedy"), note) as (pool, callers):
        await callers.front(0, go)
        await callers.come(1, how="kill")
        await callers.come(*range(2, 20))
        assert ahead(pool) == [3]
        go.touch()
        await callers.all_told(20)
        assert isinstance(callers.found[1], WorkerCrashed)
    callers.assert_own(0, *range(6, 20))
    callers.assert_honest()


async def test_all_in_the_pipe_die(note: Path, go: Path) -> None:
    """Each job kills its worker, and each pays for itself alone where it was read alone."""
    async with opened(reading_ahead(note), note) as (pool, callers):
        await callers.front(0, go)
        await callers.come(*range(1, 8), how="kill")
        assert ahead(pool) == [7]
        go.touch()
        await callers.all_told(8)
        assert all(isinstance(callers.found[number], WorkerCrashed) for number in range(1, 8))
    callers.assert_own(0)
    callers.assert_began(*range(8))
    assert pool.statistics().exits["crashed"] == 7


async def php_in_one_line(protocol: str, bodies: Sequence[bytes]) -> dict[int, Any]:
    """Give one PHP worker these jobs, all in its line before it reads any; return what each caller has got."""
    config = Config(command=command_of("php"), protocol=protocol, num_workers=1, read_ahead=8)
    found: dict[int, Any] = {}

    async def call(number: int, body: bytes) -> None:
        try:
            found[number] = (await pool.exec(Payload(body))).body
        except WorkerError as error:
            found[number] = error

    async with open_pool(config) as pool:
        (worker,) = pool.workers
        await hold(worker)
        async with trio.open_nursery() as nursery:
            for number, body in enumerate(bodies):
                nursery.start_soon(call, number, body)
                await trio.testing.wait_all_tasks_blocked()
            assert ahead(pool) == [len(bodies) - 1]
            let_go(worker)
    return found


@pytest.mark.parametrize("protocol", DIALECTS)
@pytest.mark.parametrize("end", ["exit 3", "kill"])
async def test_php_dies(end: str, protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    """PHP reads no more than the job it runs, so all behind that are run by the replacement."""
    caplog.set_level(logging.INFO)
    bodies = [end.encode() if number == 4 else b"stderr job %d." % number for number in range(8)]
    found = await php_in_one_line(protocol, bodies)
    error = found.pop(4)
    assert type(error) is WorkerCrashed
    assert error.returncode == (3 if end == "exit 3" else -signal.SIGKILL)
    assert error.started is not False
    assert found == {number: b"ok" for number in range(8) if number != 4}
    said = " ".join(record.getMessage() for record in caplog.records if record.name == "trio_workers.worker")
    assert [said.count(f"job {number}.") for number in range(8)] == [1, 1, 1, 1, 0, 1, 1, 1]


# cancels


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("which", [(0,), (1,), (3, 5), (7,), (0, 1, 7), tuple(range(1, 8)), tuple(range(8))])
async def test_cancel(which: tuple[int, ...], transport: str, note: Path, go: Path) -> None:
    """What has been written runs, and nobody is killed for it: its answer is dropped, and all others have their own."""
    async with opened(reading_ahead(note, transport=transport), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(*range(1, 8))
        assert ahead(pool) == [7]
        for number in which:
            callers.scopes[number].cancel()
        await callers.all_told(len(which))
        go.touch()
        await callers.all_told(8)
        await callers.come(*range(8, 12))
        await callers.all_told(12)
        assert pool.workers == (worker,)
        assert pool.statistics().exits == {}
    assert all(callers.found[number] == CANCELLED for number in which)
    callers.assert_own(*(number for number in range(12) if number not in which))
    assert begun(note) == list(range(12))


async def test_cancel_outside_the_pipe(note: Path, go: Path) -> None:
    """What has not been written never runs."""
    async with opened(reading_ahead(note, 4), note) as (_, callers):
        await callers.front(0, go)
        await callers.come(*range(1, 10))
        for number in (5, 9):
            callers.scopes[number].cancel()
        await callers.all_told(2)
        go.touch()
    assert callers.found[5] == callers.found[9] == CANCELLED
    assert begun(note) == [0, 1, 2, 3, 4, 6, 7, 8]
    callers.assert_own(*begun(note))


async def test_cancel_of_one_alone(note: Path, go: Path) -> None:
    """Where nothing lies behind it, a worker is killed for the job it is at, as with 1."""
    async with opened(reading_ahead(note), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        callers.scopes[0].cancel()
        await callers.all_told(1)
        await until(lambda: worker not in pool.workers)
        assert pool.statistics().exits == {"cancelled": 1}
    assert callers.found == {0: CANCELLED}


@pytest.mark.parametrize("reads", ["exact", "greedy"])
async def test_cancel_of_one_that_hangs(reads: str, note: Path, clock: trio.testing.MockClock) -> None:
    """One that is left to run for the sake of those behind it has `destroy_timeout`, and then the worker is killed."""
    async with opened(reading_ahead(note, reads=reads, destroy_timeout=20.0), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.come(0, how="hang")
        await until(lambda: begun(note) == [0])
        await callers.come(*range(1, 6))
        assert ahead(pool) == [5]
        callers.scopes[0].cancel()
        await callers.all_told(1)
        await leap(clock, 19.0 - LEFT_ALONE)
        assert pool.workers == (worker,)
        await leap(clock, 2.0 + LEFT_ALONE)
        await callers.all_told(6)
        await until(lambda: worker not in pool.workers)
        assert pool.statistics().exits == {"cancelled": 1}
        if reads == "exact":
            callers.assert_own(*range(1, 6))
        else:
            assert all(lost(callers.found[number]) or callers.found[number] == number for number in range(1, 6))
    callers.assert_honest()


@pytest.mark.parametrize("seed", range(6))
async def test_cancel_in_the_pass_of_the_answers(seed: int, note: Path, go: Path) -> None:
    """All answers are there when some are cancelled: the worker stays, and nobody gets another one's answer."""
    chance = random.Random(seed)
    async with opened(reading_ahead(note), note) as (pool, callers):
        (worker,) = pool.workers
        for first in range(0, 48, 8):
            go.unlink(missing_ok=True)
            await callers.front(first, go)
            await callers.come(*range(first + 1, first + 8))
            go.touch()
            wait(lambda last=first + 7: last in begun(note) and sleeps(pid_of(worker)))  # blocks
            which = [number for number in range(first, first + 8) if chance.random() < 0.5]
            chance.shuffle(which)
            for number in which:
                callers.scopes[number].cancel()
            await callers.all_told(first + 8)
            assert [number for number in range(first, first + 8) if callers.found[number] == CANCELLED] == sorted(which)
        assert pool.workers == (worker,)
    callers.assert_honest()
    assert begun(note) == list(range(48))


def sleeps(pid: int) -> bool:
    """Whether a process waits for something: it has answered all it had."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


# time is over


async def test_allocate_timeout(note: Path, go: Path, clock: trio.testing.MockClock) -> None:
    """It ends the wait outside the pipe. What lies in it may be running, for all that is known, and gets its answer."""
    async with opened(reading_ahead(note, 4, allocate_timeout=5.0), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(*range(1, 8))
        assert ahead(pool) == [3]
        await leap(clock, 6.0)
        await until(lambda: set(callers.found) >= {4, 5, 6, 7})
        assert all(type(callers.found[number]) is AllocateTimeout for number in (4, 5, 6, 7))
        go.touch()
        await callers.all_told(8)
        assert pool.workers == (worker,)
    callers.assert_own(0, 1, 2, 3)
    assert begun(note) == [0, 1, 2, 3]


@pytest.mark.parametrize("reads", ["exact", "greedy"])
async def test_exec_ttl(reads: str, note: Path, clock: trio.testing.MockClock) -> None:
    """The worker is killed for the job in front; those behind it are run if unread, else nobody can know."""
    config = reading_ahead(note, reads=reads, limits=Limits(exec_ttl=5.0))
    async with opened(config, note) as (pool, callers):
        (worker,) = pool.workers
        await callers.come(0, how="hang")
        await until(lambda: begun(note) == [0])
        await callers.come(*range(1, 8))
        assert ahead(pool) == [7]
        await leap(clock, 5.0)
        await callers.all_told(8)
        error = callers.found[0]
        assert type(error) is JobTimeout
        assert (error.pid, error.started) == (worker.pid, True)
        if reads == "exact":
            callers.assert_own(*range(1, 8))
        else:
            assert all(lost(callers.found[number]) or callers.found[number] == number for number in range(1, 8))
        assert pool.statistics().exits == {"exec_ttl": 1}
    callers.assert_honest()


@pytest.mark.parametrize("reads", ["exact", "greedy"])
async def test_exec_ttl_while_nobody_looks(reads: str, note: Path, go: Path, clock: trio.testing.MockClock) -> None:
    """The program does something else for longer than `exec_ttl` while the worker works on: nobody pays for that."""
    last = go.with_name("last")
    config = reading_ahead(note, reads=reads, limits=Limits(exec_ttl=50.0))
    async with opened(config, note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(1, 2, 3)
        await callers.come(4, how=f"stay {last}")
        await callers.come(5, 6)
        assert ahead(pool) == [6]
        go.touch()
        wait(lambda: 4 in begun(note))  # blocks
        clock.jump(300.0)
        await callers.all_told(4)
        await leap(clock, 40.0)
        last.touch()
        await callers.all_told(7)
        assert pool.workers == (worker,)
        assert pool.statistics().exits == {}
    callers.assert_own(*range(7))
    assert begun(note) == list(range(7))


async def test_hard_memory(note: Path, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed for its memory is the error of the job in front; unread ones run elsewhere."""
    look = 40.0  # more than `until` waits, so that nobody looks while it grows
    monkeypatch.setattr(_core, "READ_MEMORY_EVERY", look)
    config = reading_ahead(note, limits=Limits(hard_memory=150 << 20))
    async with opened(config, note) as (pool, callers):
        (worker,) = pool.workers
        await callers.come(0, how="grow 200")
        await callers.come(*range(1, 8))
        await until(lambda: 1000 in begun(note))
        await leap(clock, look)
        await callers.all_told(8)
        error = callers.found[0]
        assert type(error) is WorkerError
        assert (error.pid, error.phase, error.started) == (worker.pid, "memory", True)
    callers.assert_own(*range(1, 8))
    callers.assert_began(0, 1000, *range(1, 8))


async def test_max_queue(note: Path, go: Path) -> None:
    """Those in the pipe wait, and count for `max_queue`."""
    async with opened(reading_ahead(note, max_queue=3), note) as (pool, callers):
        await callers.front(0, go)
        await callers.come(*range(1, 5))
        assert ahead(pool) == [3]
        assert type(callers.found[4]) is QueueFull
        go.touch()
    callers.assert_own(0, 1, 2, 3)


# a worker breaks the protocol


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
@pytest.mark.parametrize("reads", ["exact", "greedy"])
@pytest.mark.parametrize("protocol", DIALECTS)
async def test_garbage(protocol: str, reads: str, seen: bool, note: Path, go: Path) -> None:
    """Garbage is the error of the job that it came for: those before have their answers, and nobody has another's.

    Those behind it are run elsewhere where they were unread; else they have the same error, or nobody can know.
    """
    async with opened(reading_ahead(note, protocol=protocol, reads=reads), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(1, 2)
        await callers.come(3, how="garbage")
        await callers.come(4, 5, 6)
        assert ahead(pool) == [6]
        go.touch()
        if not seen:
            wait(lambda: 6 in begun(note))  # blocks
        await callers.all_told(7)
        await until(lambda: worker not in pool.workers)
        callers.assert_own(0, 1, 2)
        error = callers.found[3]
        assert type(error) is RelayError
        assert (error.pid, error.started) == (worker.pid, True)
        for number in (4, 5, 6):
            found = callers.found[number]
            assert found == number or (isinstance(found, WorkerError) and found.started is not False)
    callers.assert_honest()


@pytest.mark.parametrize("reads", ["exact", "greedy"])
@pytest.mark.parametrize("protocol", DIALECTS)
async def test_answers_twice(protocol: str, reads: str, note: Path, go: Path) -> None:
    """An answer too many is the worker's end as soon as nothing is on its way: who comes then has his own answer.

    Those before it have their own too. To those that were on the way behind it no wire of ours says whose an answer is:
    each may have got that of the one before. That is a price of more than 1.
    """
    told: list[object] = []

    def observe(event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.ERROR:
            told.append(context)

    config = reading_ahead(note, protocol=protocol, reads=reads)
    async with opened(config, note, observer=observe) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(1, 2)
        await callers.come(3, how="twice")
        await callers.come(4, 5, 6, 7)
        assert ahead(pool) == [7]
        go.touch()
        await callers.all_told(8)
        await until(lambda: not runs(pid_of(worker)) or (7 in begun(note) and sleeps(pid_of(worker))))
        await callers.come(*range(8, 20))
        await callers.all_told(20)
        await until(lambda: worker not in pool.workers)
        assert [type(error) for error in told] == [RelayError]
    callers.assert_own(0, 1, 2, 3, *range(8, 20))
    assert all(callers.found[number] in (number, number - 1) for number in (4, 5, 6, 7))
    callers.assert_began(*range(20))


@pytest.mark.parametrize("protocol", DIALECTS)
@pytest.mark.parametrize("read_ahead", [1, 8])
async def test_answers_twice_alone(read_ahead: int, protocol: str, note: Path) -> None:
    """With nothing behind it, an answer too many that comes with the first reaches nobody."""
    async with opened(reading_ahead(note, read_ahead, protocol=protocol), note) as (pool, callers):
        for number in range(0, 20, 2):
            (worker,) = pool.workers
            await callers.come(number, how="twice")
            await callers.all_told(number + 1)
            await until(lambda worker=worker: not runs(pid_of(worker)) or sleeps(pid_of(worker)))
            await callers.come(number + 1)
            await callers.all_told(number + 2)
            await until(lambda: ready(pool))
            await until(lambda gone=worker: gone not in pool.workers)
    callers.assert_own(*range(20))
    callers.assert_began(*range(20))


@pytest.mark.parametrize("reads", ["exact", "greedy"])
@pytest.mark.parametrize("protocol", DIALECTS)
async def test_stop_request(protocol: str, reads: str, note: Path, go: Path) -> None:
    """A worker that asks to be replaced in the middle: that job is run elsewhere, and what it had is still answered."""
    config = reading_ahead(note, protocol=protocol, reads=reads)
    async with opened(config, note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(1, 2)
        await callers.come(3, how="stop")
        await callers.come(*range(4, 20))
        assert ahead(pool) == [7]
        go.touch()
        await callers.all_told(20)
        await until(lambda: worker not in pool.workers)
        assert worker.state.value is WorkerState.STOPPED
    callers.assert_own(*range(20))
    callers.assert_began(*range(20))
    assert pool.statistics().exits["stop request"] == 1


@pytest.mark.parametrize("reads", ["exact", "greedy"])
async def test_stop_requests_of_all(reads: str, note: Path, go: Path) -> None:
    """A worker that asks for each of its jobs to be replaced goes once, and all are run by its successors."""
    async with opened(reading_ahead(note, reads=reads), note) as (pool, callers):
        await callers.front(0, go)
        await callers.come(*range(1, 8), how="stop")
        assert ahead(pool) == [7]
        go.touch()
    callers.assert_own(*range(8))
    callers.assert_began(*range(8))
    assert pool.statistics().exits["stop request"] == 1


@pytest.mark.parametrize("protocol", DIALECTS)
async def test_php_stop_request(protocol: str) -> None:
    """The same with PHP: a job that no worker wants is a WorkerError after a while, and no other job notices."""
    bodies = [b"stop" if number == 4 else b"upper a%d" % number for number in range(8)]
    found = await php_in_one_line(protocol, bodies)
    error = found.pop(4)
    assert isinstance(error, WorkerError)
    assert (error.phase, error.started) == ("retiring", False)
    assert found == {number: b"A%d" % number for number in range(8) if number != 4}


# workers that are replaced


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("number", [1, 2, 5, 8, 9])
async def test_max_executions(number: int, transport: str, note: Path) -> None:
    """No worker begins more jobs than `max_executions`, and the last of them is used up."""
    config = reading_ahead(note, transport=transport, max_executions=number, limits=Limits(jitter=0.0), reads="greedy")
    async with open_pool(config) as pool:
        (worker,) = pool.workers
        await hold(worker)
        async with trio.open_nursery() as nursery:
            callers = Callers(pool, nursery, note)
            await callers.come(*range(100, 118))
            assert max(ahead(pool)) == min(number, 8) - 1
            let_go(worker)
        callers.assert_own(*range(100, 118))
    callers.assert_began(*range(100, 118))
    per_worker = collections.Counter(line.split()[1] for line in note.read_text().splitlines())
    assert per_worker[str(worker.pid)] == number
    assert max(per_worker.values()) == number


CHANGES: Final[dict[str, dict[str, Any]]] = {
    "reset": {},
    "dialect": {},
    "read_ahead": {},
    "resize": {},
    "ttl": {"limits": Limits(ttl=0.2, jitter=0.5)},
    "max_executions": {"max_executions": 40, "limits": Limits(jitter=0.2)},
    "stop": {},
}


@pytest.mark.parametrize("reads", ["exact", "greedy"])
@pytest.mark.parametrize("change", CHANGES)
async def test_change_while_busy(change: str, reads: str, note: Path) -> None:
    """Workers are replaced while many callers call: nobody notices, and each job is run once."""
    config = reading_ahead(note, reads=reads, **{"num_workers": 2, **CHANGES[change]})
    seen: set[int | None] = set()
    calls = 0
    over = False

    async def call(number: int) -> None:
        nonlocal calls
        while not over:
            calls += 1
            mine = b"%d" % calls
            assert (await pool.exec(Payload(mine))).body.strip() == mine
            seen.update(worker.pid for worker in pool.workers)

    async with open_pool(config) as pool:
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(call, number)
            await until(lambda: calls > 100)
            for turn in range(3):
                before = calls
                if change == "reset":
                    await pool.reset()
                elif change == "dialect":
                    await pool.reset(attrs.evolve(config, protocol=DIALECTS[turn]))
                elif change == "read_ahead":
                    await pool.reset(attrs.evolve(config, read_ahead=(1, 32, 2)[turn]))
                elif change == "resize":
                    await pool.resize((1, 3, 2)[turn])
                elif change == "stop":
                    await pool.workers[-1].stop()
                await until(
                    lambda before=before, turn=turn: calls > before + 100 and (change != "ttl" or len(seen) > turn + 2)
                )
            over = True
        assert pool.statistics().jobs == {"replied": calls}
        assert len(seen) > 2
        assert not set(pool.statistics().exits) & {"crashed", "cancelled", "killed", "broke the protocol"}
    assert sorted(begun(note)) == list(range(1, calls + 1))


@pytest.mark.parametrize("soft", [True, False], ids=["stop", "kill"])
@pytest.mark.parametrize("reads", ["exact", "greedy"])
async def test_worker_ended_by_its_owner(reads: str, soft: bool, note: Path, go: Path) -> None:
    """`Worker.stop` lets a worker finish what it has been given; after `Worker.kill` what was unread runs elsewhere."""
    async with opened(reading_ahead(note, reads=reads), note) as (pool, callers):
        (worker,) = pool.workers
        await callers.front(0, go)
        await callers.come(*range(1, 20))
        assert ahead(pool) == [7]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.stop if soft else worker.kill)
            await trio.testing.wait_all_tasks_blocked()
            go.touch()
        await callers.all_told(20)
        await until(lambda: worker not in pool.workers)
        assert worker.state.value is (WorkerState.STOPPED if soft else WorkerState.ERRORED)
        if soft:
            callers.assert_own(*range(20))
        else:
            assert isinstance(callers.found[0], WorkerCrashed)
            assert callers.found[0].started is True
            callers.assert_own(*range(8, 20))
            if reads == "exact":
                callers.assert_own(*range(1, 8))
    callers.assert_honest()


async def test_left_while_many_wait(note: Path, go: Path) -> None:
    """A pool whose block is left does all jobs that it has accepted, those in pipes among them."""
    async with trio.open_nursery() as nursery:
        async with open_pool(reading_ahead(note, num_workers=2)) as pool:
            callers = Callers(pool, nursery, note)
            await callers.front(0, go)
            await callers.front(1, go)
            await callers.come(*range(2, 40))
            assert ahead(pool) == [7, 7]
            callers.scopes[5].cancel()
            await callers.all_told(1)
            nursery.start_soon(touch_later, pool, go)
        assert pool.workers == ()
    assert callers.found.pop(5) == CANCELLED
    callers.assert_own(*(number for number in range(40) if number != 5))
    callers.assert_began(*range(40))
    assert pool.statistics().exits == {"closing": 2}


async def touch_later(pool: Pool, go: Path) -> None:
    """Make the file when the pool is being closed."""
    await until(lambda: pool._core.roster.phase is Phase.CLOSING)
    go.touch()


@pytest.mark.parametrize("how", ["error", "cancel"])
async def test_left_by_force(how: str, note: Path, go: Path) -> None:
    """Left by an exception or a cancel the workers are killed, and all that have not been answered are told."""
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        with scope, contextlib.suppress(KeyError):
            async with open_pool(reading_ahead(note, num_workers=2, destroy_timeout=1000.0)) as pool:
                callers = Callers(pool, nursery, note)
                await callers.front(0, go)
                await callers.front(1, go)
                await callers.come(*range(2, 40))
                callers.scopes[2].cancel()
                await callers.all_told(1)
                if how == "error":
                    raise KeyError("mine")
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert pool.workers == ()
    assert callers.found.pop(2) == CANCELLED
    assert {type(found) for found in callers.found.values()} == {trio.ClosedResourceError}
    assert len(callers.found) == 39
    callers.assert_began(0, 1)
