"""The table of endings: where a job was, what happened, and how it ended for its caller and for its worker.

One test for each cell of the table on the docs' page "What happens when …", with real processes. The worker is a
puppet: it brings a job to one of the six places and holds it there until a signal tells it how to go on. Its
replacement answers everything at once. What takes time is not waited for: the tests put the pool's clock forward.
"""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing

from trio_workers import (
    Config,
    JobTimeout,
    Limits,
    Payload,
    Pool,
    Restart,
    RestartLimitExceeded,
    Worker,
    WorkerError,
    WorkerEvent,
    _core,
    open_pool,
)

ROOT: Final = Path(__file__).parent.parent
PLACES: Final = ("waiting", "written", "running", "answered", "streaming", "leased")
ROWS: Final = (
    "cancel",
    "crash",
    "stop-request",
    "ttl",
    "exec-ttl",
    "max-memory",
    "hard-memory",
    "resize",
    "reset",
    "debug",
    "close",
    "error",
    "give-up",
)

LEAP: Final = 15.0
"""Seconds of a `ttl`, of an `exec_ttl` and between two looks at the memory, by which the clock is put forward; no test
takes so long before it does."""

MOST_MEMORY: Final = 48 << 20
"""Bytes: a puppet is below it until it is told to grow."""

PUPPET: Final = """
import os, signal, sys
from trio_workers._goridge import MORE, STOP, Decoder, encode_control, encode_reply

note, life = sys.argv[1], int(sys.argv[2])
signals = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
decoder = Decoder("goridge-3", 1 << 30, frozenset((0x13, 0x14)), frozenset(range(256)))
ballast = []


def say(text):
    with open(note, "a") as file:
        file.write(f"{life} {text}\\n")


def send(body, context=b"", bits=0):
    os.write(1, encode_reply("goridge-3", context, body, bits))


def next_frame():
    while (frame := decoder.next_frame()) is None:
        data = os.read(0, 4096)
        if not data:
            sys.exit(0)
        decoder.receive(data)
    return frame


def asked_to_stop():
    if life > 1:
        return False
    while (number := signal.sigwait(signals)) == signal.SIGALRM:
        ballast.append(b"x" * (64 << 20))
        say("has grown")
    return number == signal.SIGUSR2


while True:
    # A large job is held before the rest of it is read.
    head = os.read(0, 4096)
    if not head:
        sys.exit(0)
    decoder.receive(head)
    if b"written" in head:
        say("holds written")
        if asked_to_stop():
            send(b"", STOP)
            signal.pause()
    frame = next_frame()
    if frame.flags & 1:
        if b"stop" in frame.body:
            sys.exit(0)
        os.write(1, encode_control("goridge-3", b'{"pid":%d}' % os.getpid()))
        continue
    word = frame.body.split()[0].decode()
    say(f"has {word}")
    if word == "answered":
        send(b"done")
        say("answers")
        if asked_to_stop():
            send(b"", STOP)
            say("answers again")
    elif word == "streaming":
        send(b"one", bits=MORE)
        send(*((b"", STOP) if asked_to_stop() else (b"done",)))
    elif word in ("running", "leased"):
        send(*((b"", STOP) if asked_to_stop() else (b"done",)))
    else:
        send(b"done")
"""


@attrs.define(eq=False)
class Caller:
    """Somebody with a job, in a task tree of his own."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    go_on: trio.Event = attrs.field(factory=trio.Event)
    bodies: list[bytes] = attrs.field(factory=list)
    contexts: list[bytes] = attrs.field(factory=list)
    error: Exception | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, pool: Pool, place: str) -> None:
        with self.scope:
            try:
                await self._run(pool, place)
            except Exception as error:
                self.error = error
        self.over.set()

    async def _run(self, pool: Pool, place: str) -> None:
        job = Payload(place.encode() + (b" " * 1_000_000 if place == "written" else b""))
        if place == "leased":
            async with pool.lease() as worker:
                self._take(await worker.exec(job))
        elif place in ("answered", "streaming"):
            async with pool.stream(job) as parts:
                if place == "answered":
                    await self.go_on.wait()  # nobody reads, so the answer lies on the relay
                async for part in parts:
                    self._take(part)
        else:
            self._take(await pool.exec(job))

    def _take(self, reply: Payload) -> None:
        self.bodies.append(reply.body)
        self.contexts.append(reply.context)

    @property
    def outcome(self) -> str:
        assert self.over.is_set()
        if self.error is not None:
            return type(self.error).__name__
        return "Cancelled" if self.scope.cancelled_caught else "reply"


@attrs.define
class Scene:
    """A pool with a job at one of the six places, and the worker that has it (`waiting`: on which it waits)."""

    place: str
    note: Path
    pool: Pool
    caller: Caller
    holder: Worker
    breaks: Callable[[], None]
    created: list[Worker]
    other: Worker | None = None
    lives_on: bool = False

    @property
    def fate(self) -> str:
        """What became of the holder, before the end of the pool."""
        return "READY" if self.lives_on else self.holder.state.value.name

    def notes(self, text: str) -> int:
        """How often the puppets noted this."""
        return self.note.read_text().splitlines().count(text)

    @property
    def times_read(self) -> int:
        """How many workers have had the whole job."""
        return sum(line.endswith(f" has {self.place}") for line in self.note.read_text().splitlines())

    def signal(self, number: signal.Signals) -> None:
        assert self.holder.pid is not None
        os.kill(self.holder.pid, number)

    def release(self) -> None:
        """Let the job go on as if nothing had happened."""
        for worker in (self.holder, self.other):
            if worker in self.pool.workers and worker.pid is not None:
                os.kill(worker.pid, signal.SIGUSR1)
        self.caller.go_on.set()

    async def release_to_the_end(self) -> None:
        """Let the job go on, until its caller and the worker that had it are gone."""
        self.release()
        await self.caller.over.wait()
        await until(lambda: self.holder not in self.pool.workers)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - of other processes and files, which set no event
        await trio.sleep(0.002)


async def leap(seconds: float) -> None:
    """Put the clock forward, and let the pool see it."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked()


@contextlib.asynccontextmanager
async def scene(
    place: str, tmp_path: Path, nursery: trio.Nursery, num_workers: int = 1, **fields: Any
) -> AsyncIterator[Scene]:
    """Bring a job to its place. Of several workers that of the highest slot has it."""
    note = tmp_path / "note"
    note.touch()
    lives: dict[int, itertools.count[int]] = {}
    broken = False

    def command(slot: int) -> list[str]:
        life = next(lives.setdefault(slot, itertools.count(1)))
        return [sys.executable, "-c", "raise SystemExit(1)" if broken else PUPPET, str(note), str(life)]

    def breaks() -> None:
        nonlocal broken
        broken = True

    created: list[Worker] = []

    def observe(event: WorkerEvent, worker: Worker | None, _: object) -> None:
        if event is WorkerEvent.CREATED and worker is not None:
            created.append(worker)

    config = Config(
        command=command,
        num_workers=num_workers,
        env={"PYTHONPATH": str(ROOT)},
        destroy_timeout=10,
        allocate_timeout=4 * LEAP,
        restart=Restart(give_up_after=1),
        **fields,
    )
    caller = Caller()
    async with open_pool(config, observer=observe) as pool:
        if num_workers > 1 and created[0].slot == 0:
            await pool.exec(Payload(b"before"))  # they take their turns
        if place == "waiting":
            others = [Caller() for _ in range(num_workers)]
            for other in others:
                nursery.start_soon(other.run, pool, "running")
            await until(lambda: note.read_text().count("has running") == num_workers)
            nursery.start_soon(caller.run, pool, place)
            await until(lambda: pool.statistics().waiting == 1)
        else:
            nursery.start_soon(caller.run, pool, place)
            sign = {"written": "holds written", "answered": "answers"}.get(place, f"has {place}")
            await until(lambda: sign in note.read_text())
            if place == "streaming":
                await until(lambda: caller.bodies)
        holder = [worker for worker in pool.workers if worker.current is not None][-1]
        await trio.testing.wait_all_tasks_blocked()
        yield Scene(place, note, pool, caller, holder, breaks, created)


async def cancel(place: str, tmp_path: Path) -> Scene:
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery) as here:
        here.caller.scope.cancel()
        await here.caller.over.wait()
        here.release()
        await check_the_pool(here)
    return here


async def crash(place: str, tmp_path: Path) -> Scene:
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery) as here:
        here.signal(signal.SIGKILL)
        await until(lambda: here.holder not in here.pool.workers)
        here.caller.go_on.set()
        await here.caller.over.wait()
        await check_the_pool(here)
    return here


async def stop_request(place: str, tmp_path: Path) -> Scene:
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery) as here:
        here.signal(signal.SIGUSR2)
        if place == "answered":
            await until(lambda: here.notes("1 answers again"))
        here.caller.go_on.set()
        await here.caller.over.wait()
        await check_the_pool(here)
    return here


async def ttl(place: str, tmp_path: Path) -> Scene:
    """The worker comes of age."""
    limits = Limits(ttl=LEAP, jitter=0)
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery, limits=limits) as here:
        await leap(LEAP)
        await replace_by_plan(here)
    return here


async def exec_ttl(place: str, tmp_path: Path) -> Scene:
    """The job runs for too long; where it waits, the one before it does."""
    limits = Limits(exec_ttl=LEAP)
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery, limits=limits) as here:
        await leap(LEAP)
        here.caller.go_on.set()
        await here.release_to_the_end()
        await check_the_pool(here)
    return here


async def max_memory(place: str, tmp_path: Path) -> Scene:
    """The worker grows, and is found too large twice."""
    limits = Limits(max_memory=MOST_MEMORY)
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery, limits=limits) as here:
        await grow(here)
        await leap(LEAP)
        assert here.pool.statistics().memory[here.holder.slot] > MOST_MEMORY
        await leap(LEAP)
        await replace_by_plan(here)
    return here


async def hard_memory(place: str, tmp_path: Path) -> Scene:
    """The worker grows, and is found too large once."""
    limits = Limits(hard_memory=MOST_MEMORY)
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery, limits=limits) as here:
        await grow(here)
        await leap(LEAP)
        here.caller.go_on.set()
        await here.release_to_the_end()
        await check_the_pool(here)
    return here


async def grow(here: Scene) -> None:
    here.signal(signal.SIGALRM)
    await until(lambda: here.notes("1 has grown"))


async def replace_by_plan(here: Scene) -> None:
    """The successor comes up beside the worker that has the job; not beside a lease, but after it."""
    if here.place == "leased":
        assert here.created == [here.holder]
    else:
        await until(lambda: len(here.created) == 2)
        assert here.pool.statistics().starting == 1  # it stands by
        assert here.holder.current is not None
    await here.release_to_the_end()
    await check_the_pool(here)


async def resize(place: str, tmp_path: Path) -> Scene:
    """The pool shrinks, and it is this worker that goes."""
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery, num_workers=2) as here:
        assert here.holder.slot == 1
        nursery.start_soon(here.pool.resize, 1)
        await until(lambda: here.pool.statistics().target == 1)
        assert here.holder.current is not None
        if place == "waiting":
            here.signal(signal.SIGUSR1)
            await until(lambda: here.holder not in here.pool.workers)
            assert here.pool.statistics().waiting == 1  # the worker that went was not given the job
            (here.other,) = here.pool.workers
        await here.release_to_the_end()
        await check_the_pool(here)
    return here


async def reset(place: str, tmp_path: Path) -> Scene:
    """A new release is rolled out."""
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery) as here:
        is_over = trio.Event()

        async def roll_out() -> None:
            await here.pool.reset(attrs.evolve(here.pool.config, name="new"))
            assert here.holder not in here.pool.workers
            is_over.set()

        nursery.start_soon(roll_out)
        await until(lambda: here.pool.config.name == "new")
        await trio.testing.wait_all_tasks_blocked()
        await replace_by_plan(here)
        await is_over.wait()
    return here


async def debug(place: str, tmp_path: Path) -> Scene:
    """Each job has a process of its own, and goes its way."""
    async with trio.open_nursery() as nursery, scene(place, tmp_path, nursery, debug=True) as here:
        assert here.pool.workers == (here.holder,)  # and no second place
        await here.release_to_the_end()
        assert (await here.pool.exec(Payload(b"afterwards"))).body == b"done"
        await until(lambda: not here.pool.workers)
        assert len({worker.pid for worker in here.created}) == (3 if place == "waiting" else 2)
    return here


async def check_the_pool(here: Scene) -> None:
    """The pool goes on: a new job gets its own answer, and a worker that stays is free."""
    reply = await here.pool.exec(Payload(b"afterwards"))
    assert reply.body == b"done"
    await until(lambda: here.pool.statistics().idle == len(here.pool.workers) == 1)
    here.lives_on = here.pool.workers == (here.holder,)


async def close(place: str, tmp_path: Path) -> Scene:
    async with trio.open_nursery() as nursery:
        async with scene(place, tmp_path, nursery) as here:
            nursery.start_soon(release_when_closing, here)
        assert here.caller.over.is_set()
    return here


async def release_when_closing(here: Scene) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await here.pool.exec(Payload(b"late"))
    await trio.testing.wait_all_tasks_blocked()
    here.release()


class Left(Exception):
    """How the block is left."""


async def error(place: str, tmp_path: Path) -> Scene:
    async with trio.open_nursery() as nursery:
        with pytest.raises(Left):
            async with scene(place, tmp_path, nursery) as here:
                raise Left
        here.caller.go_on.set()
    return here


async def give_up(place: str, tmp_path: Path) -> Scene:
    async with trio.open_nursery() as nursery:
        with pytest.raises(RestartLimitExceeded) as caught:
            async with scene(place, tmp_path, nursery, num_workers=2) as here:
                here.breaks()
                other = next(worker for worker in here.pool.workers if worker is not here.holder)
                assert other.pid is not None
                os.kill(other.pid, signal.SIGKILL)
                await trio.sleep_forever()
        here.caller.go_on.set()
        await here.caller.over.wait()
        if here.caller.error is not None:
            assert here.caller.error.__cause__ is caught.value
    return here


HAPPENS: Final[dict[str, Callable[[str, Path], Awaitable[Scene]]]] = {
    "cancel": cancel,
    "crash": crash,
    "stop-request": stop_request,
    "ttl": ttl,
    "exec-ttl": exec_ttl,
    "max-memory": max_memory,
    "hard-memory": hard_memory,
    "resize": resize,
    "reset": reset,
    "debug": debug,
    "close": close,
    "error": error,
    "give-up": give_up,
}

# What the caller gets, what becomes of the worker, and how many workers have had the whole job.
EXPECTED: Final = {
    ("cancel", "waiting"): ("Cancelled", "READY", 0),
    ("cancel", "written"): ("Cancelled", "ERRORED", 0),
    ("cancel", "running"): ("Cancelled", "ERRORED", 1),
    ("cancel", "answered"): ("Cancelled", "READY", 1),
    ("cancel", "streaming"): ("Cancelled", "ERRORED", 1),
    ("cancel", "leased"): ("Cancelled", "ERRORED", 1),
    ("crash", "waiting"): ("reply", "ERRORED", 1),
    ("crash", "written"): ("reply", "ERRORED", 1),
    ("crash", "running"): ("WorkerCrashed", "ERRORED", 1),
    ("crash", "answered"): ("reply", "ERRORED", 1),
    ("crash", "streaming"): ("WorkerCrashed", "ERRORED", 1),
    ("crash", "leased"): ("WorkerCrashed", "ERRORED", 1),
    ("stop-request", "waiting"): ("reply", "STOPPED", 1),
    ("stop-request", "written"): ("reply", "ERRORED", 1),
    ("stop-request", "running"): ("reply", "STOPPED", 2),
    ("stop-request", "answered"): ("reply", "ERRORED", 1),
    ("stop-request", "streaming"): ("reply", "READY", 1),
    ("stop-request", "leased"): ("WorkerError", "STOPPED", 1),
    **{
        (row, place): ("reply", "STOPPED", 1)
        for row in ("ttl", "max-memory", "resize", "reset", "debug")
        for place in PLACES
    },
    ("exec-ttl", "waiting"): ("reply", "ERRORED", 1),
    ("exec-ttl", "written"): ("reply", "ERRORED", 1),
    ("exec-ttl", "running"): ("JobTimeout", "ERRORED", 1),
    ("exec-ttl", "answered"): ("reply", "ERRORED", 1),
    ("exec-ttl", "streaming"): ("JobTimeout", "ERRORED", 1),
    ("exec-ttl", "leased"): ("JobTimeout", "ERRORED", 1),
    ("hard-memory", "waiting"): ("reply", "ERRORED", 1),
    ("hard-memory", "written"): ("reply", "ERRORED", 1),
    ("hard-memory", "running"): ("WorkerError", "ERRORED", 1),
    ("hard-memory", "answered"): ("reply", "ERRORED", 1),
    ("hard-memory", "streaming"): ("WorkerError", "ERRORED", 1),
    ("hard-memory", "leased"): ("WorkerError", "ERRORED", 1),
    **{("close", place): ("reply", "STOPPED", 1) for place in PLACES},
    **{(row, "waiting"): ("ClosedResourceError", "ERRORED", 0) for row in ("error", "give-up")},
    **{(row, "written"): ("ClosedResourceError", "ERRORED", 0) for row in ("error", "give-up")},
    **{(row, "running"): ("ClosedResourceError", "ERRORED", 1) for row in ("error", "give-up")},
    **{(row, "answered"): ("reply", "ERRORED", 1) for row in ("error", "give-up")},
    **{(row, "streaming"): ("ClosedResourceError", "ERRORED", 1) for row in ("error", "give-up")},
    **{(row, "leased"): ("ClosedResourceError", "ERRORED", 1) for row in ("error", "give-up")},
}


@pytest.mark.faults
@pytest.mark.limit(60 + 2 * LEAP)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", ROWS)
async def test_ending(
    row: str, place: str, tmp_path: Path, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promises 1 to 6: the cell of the table of endings."""
    monkeypatch.setattr(_core, "READ_MEMORY_EVERY", LEAP)  # so that nobody looks while a worker grows
    with trio.fail_after(50 + 2 * LEAP):
        here = await HAPPENS[row](place, tmp_path)
    caller = here.caller
    assert (caller.outcome, here.fate, here.times_read) == EXPECTED[row, place], caller.error
    if caller.outcome == "reply":
        assert caller.bodies[-1] == b"" if (row, place) == ("stop-request", "streaming") else b"done"
    if place == "streaming":
        assert caller.bodies[0] == b"one"
    if row == "crash" and isinstance(caller.error, WorkerError):
        assert (caller.error.started, caller.error.phase, caller.error.signal) == (True, place, signal.SIGKILL)
    if isinstance(caller.error, JobTimeout):
        assert (caller.error.started, caller.error.pid) == (True, here.holder.pid)
    if row == "hard-memory" and isinstance(caller.error, WorkerError):
        assert type(caller.error) is WorkerError
        assert (caller.error.started, caller.error.phase) == (True, "memory")
        assert (caller.error.pid, caller.error.signal) == (here.holder.pid, signal.SIGKILL)
    if (row, place) == ("stop-request", "leased"):
        assert isinstance(caller.error, WorkerError)
        assert (caller.error.started, caller.error.phase) == (False, "retiring")
    if (row, place) == ("stop-request", "streaming"):
        assert caller.contexts[-1] == b'{"stop":true}'


DEAF: Final = """
import os, signal
from trio_workers._goridge import encode_control

os.read(0, 4096)
os.write(1, encode_control("goridge-3", b'{"pid":%d}' % os.getpid()))
signal.pause()
"""


@pytest.mark.limit(60 + 3 * LEAP)
async def test_job_that_nobody_reads(clock: trio.testing.MockClock) -> None:
    """Promise 3: a job too large for the pipe that no worker reads in time goes on so often and no further."""
    config = Config(
        command=[sys.executable, "-c", DEAF],
        num_workers=1,
        env={"PYTHONPATH": str(ROOT)},
        limits=Limits(exec_ttl=LEAP),
    )
    caller = Caller()
    seen: list[Worker] = []
    with trio.fail_after(50 + 3 * LEAP):
        async with trio.open_nursery() as nursery, open_pool(config) as pool:
            nursery.start_soon(caller.run, pool, "written")
            for _ in range(3):
                await until(lambda: any(worker.current for worker in set(pool.workers).difference(seen)))
                seen.extend(set(pool.workers).difference(seen))
                await leap(LEAP)
            await caller.over.wait()
            nursery.cancel_scope.cancel()
            assert pool.statistics().exits["exec_ttl"] == 3
    assert isinstance(caller.error, JobTimeout)
    assert (caller.error.started, caller.error.pid) == (False, seen[-1].pid)
