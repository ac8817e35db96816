"""What a job costs that finds a worker free, and what one costs that lies ahead of its turn: counted, not timed.

Under load the counts depend on how many answers are there when the pool looks. So here they all are: the workers are
stopped while their lines are filled, and the pool looks when the last answer has come. Workers for functions stop
in the job in front, which they must have read before others lie behind it.
"""

import fcntl
import os
import pickle
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing

from tests.support import require
from trio_workers import Config, Payload, PipeFactory, Pool, PythonPool, _platform, open_pool, open_python_pool
from trio_workers._calls import RESULT, encode
from trio_workers._goridge import encode_reply
from trio_workers._relay import FdRelay
from trio_workers._roster import MOST_AHEAD

ROOT: Final = Path(__file__).parent.parent
WORKER: Final = [sys.executable, "-S", str(Path(__file__).parent / "workers" / "worker.py")]
JOBS: Final = 200


class Count(trio.abc.Instrument):
    """Counts what trio's run loop does."""

    def __init__(self) -> None:
        self.passes = 0
        self.steps: Counter[str] = Counter()
        self.spawned = 0

    def before_io_wait(self, timeout: float) -> None:
        self.passes += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps[task.name] += 1

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.spawned += 1


async def count(run: Callable[[], Awaitable[object]]) -> Count:
    """Count over many jobs, after one that makes what is kept."""
    await run()
    counter = Count()
    trio.lowlevel.add_instrument(counter)
    for _ in range(JOBS):
        await run()
    trio.lowlevel.remove_instrument(counter)
    return counter


def config(transport: str, protocol: str = "goridge-3", **fields: Any) -> Config:
    fields = {"num_workers": 1, **fields}
    return Config(
        command=WORKER,
        env={"PYTHONPATH": str(ROOT)},
        boot_timeout=30.0,
        factory=PipeFactory(transport=transport),
        protocol=protocol,
        **fields,
    )


async def quiet(pool: Pool) -> None:
    """Wait until whatever the opening has left to do is done."""
    await trio.testing.wait_all_tasks_blocked(0.05)


@pytest.mark.parametrize("transport", ["pipe", "socketpair"])
@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2", "goridge-3"])
@pytest.mark.parametrize("read_ahead", [1, 8])
async def test_passes_of_the_run_loop(transport: str, protocol: str, read_ahead: int) -> None:
    """Speed: an `exec` that finds a worker free takes one pass of the run loop and one step of its own task alone."""
    async with open_pool(config(transport, protocol, read_ahead=read_ahead)) as pool:
        await quiet(pool)
        counter = await count(lambda: pool.exec(Payload(b"hello", b"context")))
    (steps,) = counter.steps.values()
    assert counter.passes == JOBS
    assert steps == JOBS
    assert counter.spawned == 0


async def test_passes_in_a_lease() -> None:
    """Speed: a job on a worker that is leased costs no more than another."""
    async with open_pool(config("pipe")) as pool, pool.lease() as worker:
        await quiet(pool)
        counter = await count(lambda: worker.exec(Payload(b"hello")))
    assert counter.passes == JOBS
    assert counter.spawned == 0


async def test_passes_of_a_function() -> None:
    """Speed: a function that finds a worker free costs as little as an `exec`."""
    async with open_python_pool(1) as pool:
        await trio.testing.wait_all_tasks_blocked(0.05)
        counter = await count(lambda: pool.run_sync(abs, -1))
    (steps,) = counter.steps.values()
    assert counter.passes == JOBS
    assert steps == JOBS
    assert counter.spawned == 0


# under load

FILLED: Final = {"functions": 1 + MOST_AHEAD, "commands": 8}
"""Jobs on the way to one worker."""
HELD: Final = {"functions": 1, "commands": 0}
"""Of these, jobs that a worker must have read before others lie behind."""
ANSWER: Final = {
    "functions": len(b"".join(encode(RESULT, 1, pickle.dumps(None, 5)))),
    "commands": len(encode_reply("goridge-3", b"echo", b"hello")),
}
"""Bytes of one answer."""


def loaded(kind: str) -> tuple[AbstractAsyncContextManager[Pool | PythonPool], Callable[..., Awaitable[object]]]:
    """A pool of two workers, and a job for it."""
    if kind == "functions":
        return open_python_pool(2), lambda pool: pool.run_sync(signal.raise_signal, 0)
    payload = Payload(b"hello", b"echo")
    return open_pool(config("pipe", num_workers=2, read_ahead=FILLED[kind])), lambda pool: pool.exec(payload)


async def fill_and_empty(
    pool: Pool | PythonPool,
    run: Callable[..., Awaitable[object]],
    each: int,
    size: int,
    filling: Count | None = None,
    emptying: Count | None = None,
) -> None:
    """Hand in so many jobs for each worker, let them all be answered, by so many bytes each, and take that."""
    workers = pool.workers
    async with trio.open_nursery() as nursery:
        if isinstance(pool, PythonPool):  # behind a job that its worker has read: such as one that stops it
            for _ in workers:
                nursery.start_soon(pool.run_sync, signal.raise_signal, int(signal.SIGSTOP))
            await trio.testing.wait_all_tasks_blocked()
        for worker in workers:
            assert worker.pid is not None
            if not isinstance(pool, PythonPool):
                os.kill(worker.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, worker.pid, os.WSTOPPED)  # noqa: ASYNC222 - it takes no time
        if filling is not None:
            trio.lowlevel.add_instrument(filling)
        for _ in range(len(workers) * (each - isinstance(pool, PythonPool))):
            nursery.start_soon(run, pool)
        await trio.testing.wait_all_tasks_blocked()
        if filling is not None:
            trio.lowlevel.remove_instrument(filling)
        for worker in pool.workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGCONT)
        for worker in pool.workers:
            assert worker.line is not None
            assert isinstance(worker.line.relay, FdRelay)
            wait_for_bytes(worker.line.relay._read_fd, each * size)
        if emptying is not None:
            trio.lowlevel.add_instrument(emptying)
    if emptying is not None:
        trio.lowlevel.remove_instrument(emptying)


def wait_for_bytes(fd: int, expected: int) -> None:
    """Wait until so many bytes can be read from there, and let nobody else run meanwhile."""
    count, until = 0, time.monotonic() + 20.0
    while count < expected:
        time.sleep(0.0002)
        (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
        assert time.monotonic() < until, f"{count} of {expected} bytes have come"


async def rounds(kind: str, number: int, filling: Count | None = None, emptying: Count | None = None) -> None:
    """Fill the lines of a fresh pool and let them be emptied, so many times."""
    opening, run = loaded(kind)
    async with opening as pool:
        await trio.testing.wait_all_tasks_blocked(0.05)
        await fill_and_empty(pool, run, 1, ANSWER[kind])  # now their pace is known
        await fill_and_empty(pool, run, FILLED[kind], ANSWER[kind])
        for _ in range(number):
            await fill_and_empty(pool, run, FILLED[kind], ANSWER[kind], filling, emptying)
        jobs = 2 * (1 + FILLED[kind] * (number + 1))
        assert pool.statistics().jobs == {"replied": jobs}


KINDS: Final = [
    pytest.param(
        "functions", marks=pytest.mark.skipif(not _platform.HERE.has_packets(), reason="needs SOCK_SEQPACKET")
    ),
    "commands",
]


@pytest.mark.skipif(sys.platform != "linux", reason="needs FIONREAD on the other end")
@pytest.mark.parametrize("kind", KINDS)
async def test_passes_under_load(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed: two full lines are emptied in two passes of the run loop; each task takes one step in, and one out."""
    monkeypatch.setattr("trio_workers._roster.PATIENCE", 1e6)  # a stopped worker is no slow one
    filling, emptying = Count(), Count()
    await rounds(kind, 20, filling, emptying)
    callers = 2 * (FILLED[kind] - HELD[kind])
    task = "tests.test_cost.loaded.<locals>.<lambda>"
    # Whoever is in front reads, and settles the answers of those behind; they and the nursery follow in a pass each.
    assert emptying.passes == 3 * 20
    assert emptying.steps.pop(task) == callers * 20
    assert emptying.steps.pop("trio_workers._python_pool.PythonPool.run_sync", 0) == 2 * HELD[kind] * 20
    assert emptying.steps.total() == 20  # of the nursery's own task
    assert emptying.spawned == 0
    # All but the first few are written by the housekeeper, at the end of the pass.
    assert filling.steps.pop(task) == callers * 20
    assert filling.steps.pop("trio_workers._core.PoolCore._keep_house") == 20
    assert filling.steps.total() == 20
    assert filling.spawned == callers * 20


APPLICATION: Final = """
import sys
import trio
import trio.testing
from trio_workers import Config, Payload, PipeFactory, open_pool

async def main():
    transport, read_ahead = sys.argv[2].split()
    config = Config(command=sys.argv[3:], num_workers=1, factory=PipeFactory(transport), read_ahead=int(read_ahead))
    payload = Payload(b"hello", b"context")
    async with open_pool(config) as pool:
        for _ in range(int(sys.argv[1])):
            await pool.exec(payload)

trio.run(main)
"""


FUNCTIONS: Final = """
import sys
import trio
from trio_workers import open_python_pool

async def main():
    async with open_python_pool(1) as pool:
        for _ in range(int(sys.argv[1])):
            await pool.run_sync(abs, -1)

trio.run(main)
"""


LOADED: Final = """
import sys
import trio
from tests.test_cost import rounds
from trio_workers import _roster

_roster.PATIENCE = 1e6
trio.run(rounds, sys.argv[2], int(sys.argv[1]))
"""


def system_calls(program: str, jobs: int, transport: str, report: Path) -> Counter[str]:
    """The system calls of an application's main thread, by name."""
    strace = [require("strace"), "-c", "-U", "calls,name", "-o", str(report)]
    application = [sys.executable, "-c", program, str(jobs), transport, *WORKER]
    done = subprocess.run(
        [*strace, *application], env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, check=False
    )
    if "ptrace" in done.stderr and "Operation not permitted" in done.stderr:
        pytest.skip("strace is not allowed to trace here")
    assert done.returncode == 0, done.stderr
    calls: Counter[str] = Counter()
    for line in report.read_text().splitlines():
        number, _, name = line.strip().partition(" ")
        if number.isdecimal() and name.strip() != "total":
            calls[name.strip()] = int(number)
    return calls


def per_job(program: str, transport: str, tmp_path: Path, some: int, more: int) -> dict[str, float]:
    """The system calls of each job (or round) more, by name."""
    system_calls(
        program, 1, transport, tmp_path / "first"
    )  # what is compiled once is compiled in neither of the others
    before = system_calls(program, some, transport, tmp_path / "some")
    after = system_calls(program, more, transport, tmp_path / "more")
    each = {name: round((after[name] - before[name]) / (more - some), 1) for name in {*before, *after}}
    return {name: calls for name, calls in each.items() if calls}


@pytest.mark.parametrize("transport", ["pipe 1", "socketpair 1", "pipe 8", "functions"])
def test_system_calls(transport: str, tmp_path: Path) -> None:
    """Speed: a job that finds a worker free takes write, epoll_ctl, epoll_wait and read once each, and one poll."""
    program = FUNCTIONS if transport == "functions" else APPLICATION
    assert per_job(program, transport, tmp_path, 500, 1500) == {
        "write": 1.0,
        "epoll_ctl": 1.0,
        "epoll_wait": 1.0,
        "read": 1.0,
        "poll": 1.0,
    }


OUR_OWN: Final = frozenset({"kill", "waitid", "ioctl", "clock_nanosleep", "futex", "mmap", "munmap", "brk"})
"""System calls of the test itself, and of the memory that Python takes."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs FIONREAD on the other end")
@pytest.mark.parametrize("kind", KINDS)
def test_system_calls_under_load(kind: str, tmp_path: Path) -> None:
    """Speed: a full line is read at once. Each call is a packet of its own, jobs of commands go together."""
    each = per_job(LOADED, kind, tmp_path, 50, 350)
    # Of the jobs of commands the first few are written one by one, for nobody knows yet that there will be many.
    writes = {"functions": 2.0 * FILLED[kind], "commands": 2.0 + 3.0 + 2.0}[kind]
    assert {name: calls for name, calls in each.items() if name not in OUR_OWN} == {
        "write": writes,
        "epoll_ctl": 2.0,
        # Three to fill both lines, and three to empty them; two more until the job in front is there.
        "epoll_wait": {"functions": 8.0, "commands": 6.0}[kind],
        "read": 2.0,
        "poll": 2.0,
    }
