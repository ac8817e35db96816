"""What a job costs that finds a worker free: counted, not timed."""

import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from tests.support import require
from trio_workers import Config, Payload, PipeFactory, Pool, open_pool, open_python_pool

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


def config(transport: str, protocol: str = "goridge-3") -> Config:
    return Config(
        command=WORKER,
        env={"PYTHONPATH": str(ROOT)},
        num_workers=1,
        boot_timeout=30.0,
        factory=PipeFactory(transport=transport),
        protocol=protocol,
    )


async def quiet(pool: Pool) -> None:
    """Wait until whatever the opening has left to do is done."""
    await trio.testing.wait_all_tasks_blocked(0.05)


@pytest.mark.parametrize("transport", ["pipe", "socketpair"])
@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2", "goridge-3"])
async def test_passes_of_the_run_loop(transport: str, protocol: str) -> None:
    """Speed: an `exec` that finds a worker free takes one pass of the run loop and one step of its own task alone."""
    async with open_pool(config(transport, protocol)) as pool:
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


APPLICATION: Final = """
import sys
import trio
import trio.testing
from trio_workers import Config, Payload, PipeFactory, open_pool

async def main():
    config = Config(command=sys.argv[3:], num_workers=1, factory=PipeFactory(sys.argv[2]))
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


def system_calls(jobs: int, transport: str, report: Path) -> Counter[str]:
    """The system calls of an application's main thread, by name."""
    strace = [require("strace"), "-c", "-U", "calls,name", "-o", str(report)]
    program = FUNCTIONS if transport == "functions" else APPLICATION
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


@pytest.mark.parametrize("transport", ["pipe", "socketpair", "functions"])
def test_system_calls(transport: str, tmp_path: Path) -> None:
    """Speed: a job that finds a worker free takes write, epoll_ctl, epoll_wait and read once each, and one poll."""
    system_calls(1, transport, tmp_path / "first")  # so that what is compiled once is compiled in neither of the others
    some = system_calls(500, transport, tmp_path / "some")
    more = system_calls(1500, transport, tmp_path / "more")
    each = {name: round((more[name] - some[name]) / 1000, 1) for name in {*some, *more}}
    assert {name: calls for name, calls in each.items() if calls} == {
        "write": 1.0,
        "epoll_ctl": 1.0,
        "epoll_wait": 1.0,
        "read": 1.0,
        "poll": 1.0,
    }
