"""The table of endings: where a job was, what happened, and how it ended for its caller and for its worker.

One test for each cell of the table on the docs' page "What happens when …", with real processes. The worker is a
puppet: it brings a job to one of the six places and holds it there until a signal tells it how to go on. Its
replacement answers everything at once.
"""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
import trio.testing

from trio_workers import Config, Payload, Pool, Restart, RestartLimitExceeded, Worker, WorkerError, open_pool

ROOT: Final = Path(__file__).parent.parent
PLACES: Final = ("waiting", "written", "running", "answered", "streaming", "leased")
ROWS: Final = ("cancel", "crash", "stop-request", "close", "error", "give-up")

PUPPET: Final = """
import os, signal, sys
from trio_workers._goridge import MORE, STOP, Decoder, encode_control, encode_reply

note, life = sys.argv[1], int(sys.argv[2])
signals = {signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
decoder = Decoder("goridge-3", 1 << 30, frozenset((0x13, 0x14)), frozenset(range(256)))


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
    return life == 1 and signal.sigwait(signals) == signal.SIGUSR2


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
        if self.holder in self.pool.workers:
            self.signal(signal.SIGUSR1)
        self.caller.go_on.set()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - of other processes and files, which set no event
        await trio.sleep(0.002)


@contextlib.asynccontextmanager
async def scene(place: str, tmp_path: Path, nursery: trio.Nursery, num_workers: int = 1) -> AsyncIterator[Scene]:
    """Bring a job to its place."""
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

    config = Config(
        command=command,
        num_workers=num_workers,
        env={"PYTHONPATH": str(ROOT)},
        destroy_timeout=10,
        allocate_timeout=30,
        restart=Restart(give_up_after=1),
    )
    caller = Caller()
    async with open_pool(config) as pool:
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
        holder = next(worker for worker in pool.workers if worker.current is not None)
        await trio.testing.wait_all_tasks_blocked()
        yield Scene(place, note, pool, caller, holder, breaks)


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


HAPPENS: Final = {
    "cancel": cancel,
    "crash": crash,
    "stop-request": stop_request,
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
    **{("close", place): ("reply", "STOPPED", 1) for place in PLACES},
    **{(row, "waiting"): ("ClosedResourceError", "ERRORED", 0) for row in ("error", "give-up")},
    **{(row, "written"): ("ClosedResourceError", "ERRORED", 0) for row in ("error", "give-up")},
    **{(row, "running"): ("ClosedResourceError", "ERRORED", 1) for row in ("error", "give-up")},
    **{(row, "answered"): ("reply", "ERRORED", 1) for row in ("error", "give-up")},
    **{(row, "streaming"): ("ClosedResourceError", "ERRORED", 1) for row in ("error", "give-up")},
    **{(row, "leased"): ("ClosedResourceError", "ERRORED", 1) for row in ("error", "give-up")},
}


@pytest.mark.faults
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", ROWS)
async def test_ending(row: str, place: str, tmp_path: Path) -> None:
    """Promises 1 to 5: the cell of the table of endings."""
    here = await HAPPENS[row](place, tmp_path)
    caller = here.caller
    assert (caller.outcome, here.fate, here.times_read) == EXPECTED[row, place], caller.error
    if caller.outcome == "reply":
        assert caller.bodies[-1] == b"" if (row, place) == ("stop-request", "streaming") else b"done"
    if place == "streaming":
        assert caller.bodies[0] == b"one"
    if row == "crash" and isinstance(caller.error, WorkerError):
        assert (caller.error.started, caller.error.phase, caller.error.signal) == (True, place, signal.SIGKILL)
    if (row, place) == ("stop-request", "leased"):
        assert isinstance(caller.error, WorkerError)
        assert (caller.error.started, caller.error.phase) == (False, "retiring")
    if (row, place) == ("stop-request", "streaming"):
        assert caller.contexts[-1] == b'{"stop":true}'
