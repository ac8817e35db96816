"""Workers without processes, for tests: of your own code, and of this package.

    from trio_workers import Config, Payload, open_pool
    from trio_workers.testing import Crash, MemoryFactory

    async def handler(job):
        if job.body == b"die":
            raise Crash(-9)
        return job.body.upper()

    async def test_shouting():
        cfg = Config(command=["any"], num_workers=2, factory=MemoryFactory(handler))
        async with open_pool(cfg) as pool:
            assert (await pool.exec(Payload(b"hello"))).body == b"HELLO"

Everything of the pool runs as it does with processes, down to the bytes on the wire, but each worker is a task, on
whatever clock the test has: under `trio.testing.autojump_clock` a `boot_timeout` of a minute is over at once.
"""

import errno
import inspect
import itertools
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Any, Final, TypeAlias, TypeGuard, TypeVar

import attrs
import trio

from ._conversation import Conversation
from ._factories import Factory, Spawner
from ._goridge import encode_control
from ._process import Launch, StderrLog, WorkerProcess
from ._relay import Line, Relay
from .child import STOP_REQUEST, Job, Reply
from .child import _describe as describe  # pyright: ignore[reportPrivateUsage]
from .child import _encode as encode  # pyright: ignore[reportPrivateUsage]
from .child._relay import Relay as WorkersRelay

__all__ = ["BadBoot", "Crash", "MemoryFactory"]

CAPACITY: Final = 64 * 1024
"""Bytes that a memory relay holds in each direction: as many as a pipe by default."""

_PIDS: Final = itertools.count(2**22 + 1)  # above the largest pid of Linux, so that a signal can't hit anybody

T = TypeVar("T")
Part: TypeAlias = bytes | bytearray | memoryview | Reply | None
Handler: TypeAlias = Callable[[Job], Awaitable[Part] | AsyncGenerator[Part]]
Boot: TypeAlias = Callable[[int], Awaitable[object]]


class Crash(Exception):
    """Raised by a handler: its worker's process ends at once.

    `returncode` is its exit status, or minus the number of the signal that ended it; `stderr` the last it wrote there.
    """

    def __init__(self, returncode: int = 1, *, stderr: str = "") -> None:
        super().__init__(returncode)
        self.returncode = returncode
        self.stderr = stderr


class BadBoot(Exception):
    """Raised by `boot`: the worker ends with status 1 before it is ready.

    Raised by a handler: its worker ends, and the next one in its slot does not become ready. `stderr` is the last they
    write there.
    """

    def __init__(self, stderr: str = "") -> None:
        super().__init__(stderr)
        self.stderr = stderr


def _check_callable(_: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    if not callable(value):
        raise TypeError(f"MemoryFactory.{attribute.name} must be an async function, not {type(value).__name__}")


@attrs.frozen
class MemoryFactory(Factory):
    """Workers in this process: `Config(command=["any"], factory=MemoryFactory(handler))`.

    `async handler(job)` gets a `trio_workers.child.Job` (`body`, `context`) and returns what a handler of
    `trio_workers.child.serve` returns: bytes-like, a `Reply`, None or `STOP_REQUEST`. An async generator function
    streams its parts; it is closed when the caller has had enough. An `Exception` is a job error with its traceback;
    `Crash` and `BadBoot` are the two faults a worker can have. Other exceptions, such as KeyboardInterrupt, leave
    `open_pool`.

    `async boot(slot)` is run for each worker before its handshake: for one that is slow to start, or never is
    (`BadBoot`).

    A worker is a task in the pool's nursery. As with a process nothing but a kill cancels it, with returncode -9. Its
    pid is made up, and larger than any real one. Command, environment and directory of the `Config` are not looked at.
    """

    handler: Handler = attrs.field(validator=_check_callable)
    boot: Boot | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(_check_callable))
    _capacity: int = attrs.field(default=CAPACITY, kw_only=True, alias="_capacity", repr=False)

    async def open(self, nursery: trio.Nursery) -> Spawner:
        """Open it: its workers' tasks go into `nursery`."""
        await trio.lowlevel.checkpoint()
        return _MemorySpawner(self.handler, self.boot, self._capacity, nursery)


class _MemorySpawner(Spawner):
    def __init__(self, handler: Handler, boot: Boot | None, capacity: int, nursery: trio.Nursery) -> None:
        self.handler = handler
        self.boot = boot
        self.capacity = capacity
        self.bad_slots: dict[int, BadBoot] = {}
        """Slots whose next boot is to fail."""
        self._nursery = nursery
        self._relays: dict[WorkerProcess, Relay] = {}

    async def spawn(self, launch: Launch) -> WorkerProcess:
        await trio.lowlevel.checkpoint()
        process = _MemoryProcess(self, launch)
        self._relays[process] = process.relay
        self._nursery.start_soon(process.run, name=f"<memory worker {launch.label}>")
        return process

    async def connect(self, process: WorkerProcess, launch: Launch) -> Line:
        await trio.lowlevel.checkpoint()
        return Line(self._relays.pop(process), Conversation(launch.protocol, launch.max_frame_size))

    def close(self) -> None:
        self._relays.clear()


class _Pipe:
    """Bytes in one direction."""

    def __init__(self, capacity: int) -> None:
        self.data = bytearray()
        self.capacity = capacity
        self.writer_gone = False
        self.reader_gone = False
        self.lot = trio.lowlevel.ParkingLot()

    @property
    def readable(self) -> bool:
        return bool(self.data) or self.writer_gone

    @property
    def writable(self) -> bool:
        return len(self.data) < self.capacity or self.reader_gone

    def write(self, data: bytes | memoryview) -> int:
        if self.reader_gone:
            raise BrokenPipeError(errno.EPIPE, "nobody reads this any more")
        taken = memoryview(data)[: max(0, self.capacity - len(self.data))]
        self.data += taken
        self.lot.unpark_all()
        return len(taken)

    def read(self, size: int) -> bytes | None:
        if not self.readable:
            return None
        data = bytes(self.data[:size])
        del self.data[:size]
        self.lot.unpark_all()
        return data

    def leave(self, *, writer: bool) -> None:
        if writer:
            self.writer_gone = True
        else:
            self.reader_gone = True
        self.lot.unpark_all()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that someone else brings about: a full checkpoint, one pass where it is met already."""
        if condition():
            await trio.lowlevel.checkpoint()
        while not condition():
            await self.lot.park()


class _MemoryRelay(Relay):
    """The pool's end."""

    wakes = True

    def __init__(self, there: _Pipe, back: _Pipe) -> None:
        self._there = there
        self._back = back
        self._wakes = 0

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._there.data)} bytes there, {len(self._back.data)} back"
        return f"<memory relay: {state}>"

    def write_now(self, data: bytes | memoryview) -> int:
        if self.closed:
            raise BrokenPipeError(errno.EPIPE, "this relay is closed")
        return self._there.write(data)

    def read_now(self, size: int) -> bytes | None:
        return b"" if self.closed else self._back.read(size)

    def has_input(self) -> bool:
        return self.closed or self._back.readable

    async def wait_readable(self) -> None:
        await self._wait(self._back, lambda: self._back.readable)

    async def wait_writable(self) -> None:
        await self._wait(self._there, lambda: self._there.writable)

    async def _wait(self, pipe: _Pipe, condition: Callable[[], bool]) -> None:
        wakes = -1 if self.closed else self._wakes
        await pipe.wait(lambda: condition() or self._wakes != wakes)
        if self._wakes != wakes:
            raise trio.ClosedResourceError("this relay is closed")

    def wake(self) -> None:
        self._wakes += 1
        self._there.lot.unpark_all()
        self._back.lot.unpark_all()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.wake()
        self._there.leave(writer=True)
        self._back.leave(writer=False)

    def unread(self) -> bool:
        return bool(self._there.data)


class _MemoryProcess(WorkerProcess):
    """A worker as a task: what the pool sees of it, and its life."""

    def __init__(self, spawner: _MemorySpawner, launch: Launch) -> None:
        there, back = _Pipe(spawner.capacity), _Pipe(spawner.capacity)
        self.pid = next(_PIDS)
        self.relay = _MemoryRelay(there, back)
        self._spawner = spawner
        self._launch = launch
        self._there = there
        self._back = back
        self._wire = _Wire(self.pid, there, back, launch.protocol)
        self._stderr = StderrLog(launch, self.pid)
        self._scope = trio.CancelScope(shield=True)
        self._ended = trio.Event()
        self._returncode: int | None = None

    def __repr__(self) -> str:
        return f"<memory worker {self._launch.label} {self.pid}{', ended' if self._ended.is_set() else ''}>"

    # what the pool sees

    async def wait_exit(self) -> None:
        await self._ended.wait()

    def kill(self) -> None:
        self._scope.cancel()

    def peek(self) -> int | None:
        return self._returncode

    async def drain_stderr(self) -> None:
        await trio.lowlevel.checkpoint()  # what is written there goes to the log at once

    def finish(self) -> None:
        self._stderr.finish()

    def reap(self) -> int | None:
        return self._returncode

    @property
    def stderr_tail(self) -> str:
        return self._stderr.tail

    # its life

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        returncode = 1
        try:
            with self._scope:
                returncode = await self._live()
        finally:
            self._returncode = -9 if self._scope.cancel_called else returncode
            self._back.leave(writer=True)
            self._there.leave(writer=False)
            self._ended.set()

    async def _live(self) -> int:
        slot, spawner = self._launch.slot, self._spawner
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if slot in spawner.bad_slots:
                raise spawner.bad_slots.pop(slot)
            if spawner.boot is not None:
                await _call_user(spawner.boot, slot)
            while (job := await self._next_job()) is not None:
                try:
                    await self._do(job)
                except BadBoot as fault:
                    spawner.bad_slots[slot] = fault
                    raise
        except Crash as fault:
            self._stderr.receive(fault.stderr.encode())
            return fault.returncode
        except BadBoot as fault:
            self._stderr.receive(fault.stderr.encode())
            return 1
        except BrokenPipeError:
            return 0  # the pool does not listen any more
        except Exception as error:
            self._stderr.receive("".join(traceback.format_exception(error)).encode())
            return 1
        return 0

    async def _next_job(self) -> Job | None:
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()  # who has been killed reads no more
            try:
                payload = self._wire.next_job()
            except trio.WouldBlock:
                await self._there.wait(lambda: self._there.readable)
            else:
                return None if payload is None else Job(*payload)

    async def _do(self, job: Job) -> None:
        wire = self._wire
        parts: AsyncGenerator[Part] | None = None
        data = b""
        try:
            answer = self._spawner.handler(job)
            if not _is_generator(answer):
                if not inspect.isawaitable(answer):
                    raise TypeError(f"a handler must be an async function; this one returned {type(answer).__name__}")
                data = encode(wire, await _wait_for_user(answer))
            elif wire.protocol == "goridge-3":
                parts = answer
            else:
                await answer.aclose()
                raise TypeError(f"this handler streams, and streams need goridge-3; the pool speaks {wire.protocol}")
        except (Crash, BadBoot):
            raise
        except Exception as error:
            data = _job_error(wire, error)
        if parts is not None:
            data = await self._stream(parts)
        await self._send(data)

    async def _stream(self, parts: AsyncGenerator[Part]) -> bytes:
        """Send the parts of a stream, and return its last frame."""
        wire = self._wire
        while True:
            try:
                if wire.stream_stop_asked():
                    await parts.aclose()
                    return wire.reply(b"", b"")
                part = await _wait_for_user(anext(parts))
                if part is STOP_REQUEST:
                    raise TypeError("STOP_REQUEST says that the job did not run, so it can't be a part of a stream")
                data = encode(wire, part, more=True)
            except StopAsyncIteration:
                return wire.reply(b"", b"")
            except (Crash, BadBoot):
                raise
            except Exception as error:
                await parts.aclose()
                return _job_error(wire, error)
            try:
                await self._send(data)
            except BaseException:
                await parts.aclose()
                raise

    async def _send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()  # who has been killed writes no more
        unsent = memoryview(data)
        while unsent := unsent[self._back.write(unsent) :]:
            await self._back.wait(lambda: self._back.writable)


class _Wire(WorkersRelay):
    """The worker's end: that of a real worker, but `next_job` raises `trio.WouldBlock` where that one would wait."""

    __slots__ = ("_back", "_pid", "_there")

    def __init__(self, pid: int, there: _Pipe, back: _Pipe, protocol: str) -> None:
        super().__init__(-1, -1, protocol)
        self._pid = pid
        self._there = there
        self._back = back
        self._poll = lambda _: [(0, 0)] if there.readable else []

    def _read(self, size: int) -> int:
        data = self._there.read(size)
        if data is None:
            raise trio.WouldBlock
        if data:
            self._decoder.receive(data)
        else:
            self._ended = True
        return len(data)

    def write(self, data: bytes) -> bool:
        # All that `next_job` writes is the handshake, with the pid of this process in it.
        self._back.data += encode_control(self.protocol, b'{"pid":%d}' % self._pid)
        self._back.lot.unpark_all()
        return True


def _is_generator(answer: object) -> TypeGuard[AsyncGenerator[Part]]:
    return hasattr(answer, "__anext__")


@trio.lowlevel.disable_ki_protection
async def _call_user(function: Callable[[int], Awaitable[T]], slot: int) -> T:
    return await function(slot)


@trio.lowlevel.disable_ki_protection
async def _wait_for_user(answer: Awaitable[T]) -> T:
    return await answer


def _job_error(wire: _Wire, error: Exception) -> bytes:
    # Our own frames say nothing about the handler.
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    return wire.error(describe(error.with_traceback(trace)))
