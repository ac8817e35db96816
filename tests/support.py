"""What several test modules share."""

import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from trio_workers import Config, Payload, Pool, PythonPool, Restart, Worker, WorkerEvent

ROOT: Final = Path(__file__).parent.parent


def under_ci() -> bool:
    """Whether ``CI`` says that this machine must have everything the tests need."""
    return os.environ.get("CI", "").lower() in {"1", "true"}


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what no event tells of."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - it may be of other processes, or of files
            await trio.sleep(0.002)


def require(program: str) -> str:
    """Return the path of an interpreter; without it the test is skipped, or fails where ``CI=true``."""
    path = shutil.which(program)
    if path is not None:
        return path
    reason = f"needs {program}, which is not on PATH"
    if under_ci():
        pytest.fail(f"{reason}; under CI=true nothing may be missing", pytrace=False)
    pytest.skip(reason)


RELEASE: Final = """
import os, sys, time
from trio_workers.child import STOP_REQUEST, serve

release, *ledger = sys.argv[1:]
held = []

def note(text):
    if ledger:
        with open(ledger[0], "ab", 0) as file:
            file.write(text.encode() + b"\\n")

def stream(count, answer):
    for number in range(count):
        yield answer
        time.sleep(0.01)

def handle(job):
    what, _, argument = job.body.decode().partition(" ")
    note(f"begin {os.getpid()} {argument}")
    answer = f"{release} {os.getpid()} {argument}".encode()
    if what == "sleep":
        time.sleep(float(argument.split()[0]))
    elif what == "hang":
        print("hangs now", file=sys.stderr, flush=True)
        time.sleep(1000)
    elif what == "exit":
        os._exit(int(argument))
    elif what == "stop":
        return STOP_REQUEST
    elif what in ("grow", "hoard"):
        held.append(bytearray(b"x") * (int(argument) << 20))
        if what == "hoard":
            time.sleep(1000)
    elif what == "env":
        return os.environ[argument].encode()
    elif what == "stream":
        return stream(int(argument), answer)
    return answer

serve(handle)
"""
"""A worker that says which release it is, and notes in a ledger what it begins."""


def release(name: str, /, *ledger: Path, **fields: Any) -> Config:
    """A pool of workers as real processes, all of one release."""
    fields = {
        "num_workers": 2,
        "allocate_timeout": 30.0,
        "destroy_timeout": 10.0,
        "boot_timeout": 30.0,
        "env": {"PYTHONPATH": str(ROOT)},
        "restart": Restart(initial=0.02),
        **fields,
    }
    return Config(command=[sys.executable, "-S", "-c", RELEASE, name, *map(str, ledger)], **fields)


async def ask_release(pool: Pool | Worker, text: str = "say") -> str:
    """Run a job, and return the release of the worker that it was done by."""
    return (await pool.exec(Payload(text.encode()))).body.decode().split()[0]


class Floor:
    """An observer and a watchman: how few workers a pool ever had at work or free, and how many at most in all.

    An observer that raises is only logged, so it is noted here and looked at by the test.
    """

    def __init__(self) -> None:
        self.pool: Pool | PythonPool | None = None
        self.lowest = sys.maxsize
        self.highest = 0
        self.looks = 0
        self.bad_sums: list[str] = []
        self.events: list[tuple[str, int | None, object]] = []

    def __call__(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        self.events.append((event.name, None if worker is None else worker.pid, context))
        self.look()

    def of(self, name: str) -> list[Any]:
        """The contexts of all events of a kind."""
        return [context for event, _, context in self.events if event == name]

    def look(self) -> None:
        """Look at the pool as it is."""
        if self.pool is None:
            return
        now = self.pool.statistics()
        self.looks += 1
        self.lowest = min(self.lowest, now.idle + now.busy + now.leased)
        self.highest = max(self.highest, len(self.pool.workers))
        if now.idle + now.busy + now.starting + now.leased + now.stopping != len(self.pool.workers):
            self.bad_sums.append(repr(now))

    @contextlib.asynccontextmanager
    async def watch(self, pool: Pool | PythonPool, every: float = 0.001) -> AsyncIterator[None]:
        """Look at each event, and in between, for the time of the block."""
        self.pool = pool
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sample, every)
            yield
            nursery.cancel_scope.cancel()
            self.pool = None
        assert self.looks
        assert not self.bad_sums

    async def _sample(self, every: float) -> None:
        while True:
            self.look()
            await trio.sleep(every)
