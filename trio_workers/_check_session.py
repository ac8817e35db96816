"""One process of a worker that is being checked: its start, its relay, what it said, and why it said nothing.

It plays the pool's part over a relay of its own, because it does what a pool never does: write a frame byte by byte,
close one direction alone, ask once more after the end. Each fault leaves as `Wrong`, which says what to mend.
"""

import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, Literal, TypeVar

import attrs
import trio

from . import _identity, _platform
from ._config import Config, check_argv, check_env
from ._conversation import Conversation, Event, Failed, Part, Replied, Shaken, Stage, StopAsked
from ._diagnosis import SHOWN, Diagnosis, diagnose, frames_in_front, show
from ._errors import how_it_ended
from ._factories import PipeFactory, with_relay
from ._goridge import FrameError, encode_job
from ._process import Launch, OsProcess, spawn_process
from ._relay import LAST_WORDS, READ_SIZE
from ._sockets import SocketFactory

T = TypeVar("T")

ANSWER_WITHIN: Final = 5.0
"""Seconds for an answer where `Limits.exec_ttl` sets none: a hanging worker is told of while somebody looks on."""

KEPT: Final = 64 * 1024
"""Bytes kept of what a broken worker writes."""

PIECE_TAKEN_WITHIN: Final = 1.0
"""Seconds for a worker to take a piece of a frame out of its pipe, before the next is written behind it."""

PARTS: Final = 100
"""Parts of a streamed answer that are taken before the worker is asked to stop it."""

PARTS_SHOWN: Final = 3
"""Parts of a streamed answer that are shown: enough to see what they are."""


# the relay


def relay_of(config: Config) -> str:
    match config.factory:
        case PipeFactory(transport):
            return "pipes" if transport == "pipe" else "socketpair"
        case SocketFactory(address):
            return address.partition(":")[0]
        case other:
            raise TypeError(f"a worker is checked over a PipeFactory or a SocketFactory, not {type(other).__name__}")


@attrs.frozen
class Place:
    """Where workers connect to: the address they are told, and the listening socket."""

    url: str
    listener: trio.SocketListener


@contextlib.asynccontextmanager
async def listen(factory: object) -> AsyncGenerator[Place | None]:
    if not isinstance(factory, SocketFactory):
        yield None
        return
    scheme, _, rest = factory.address.partition("://")
    if scheme == "unix":
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            _platform.HERE.bind_private(sock, rest)
            undo.callback(os.unlink, rest)
            sock.listen()
            yield Place(factory.address, trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
        return
    name, _, port = rest.rpartition(":")
    host = "127.0.0.1" if name == "localhost" else name.strip("[]")
    (listener,) = await trio.open_tcp_listeners(int(port), host=host)
    async with listener:
        bound: tuple[str, int] = listener.socket.getsockname()[:2]
        told, number = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound[0], bound[0]), bound[1]
        yield Place(f"tcp://[{told}]:{number}" if ":" in told else f"tcp://{told}:{number}", listener)


class Wire:
    """The relay's bytes. Unlike a pool's it can close one direction alone."""

    def __init__(self, read_fd: int, write_fd: int, kind: str) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._kind = kind
        self.counts: bool = kind == "pipe"  # whether `unread` is a number of bytes

    def write_now(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self._write_fd, data)
        except BlockingIOError:
            return 0

    def read_now(self) -> bytes | None:
        if self._read_fd < 0:
            return b""
        try:
            return os.read(self._read_fd, READ_SIZE)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self._read_fd)

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._write_fd)

    def unread(self) -> int | None:
        """How many bytes the worker has not read yet, more or less; None where nobody can know."""
        if self._write_fd < 0 or self._kind == "tcp":
            return None
        return _platform.HERE.unread_bytes(self._write_fd, "unix" if self._kind == "unix" else "")

    def close_write(self) -> None:
        """Let the worker see the end of its relay."""
        if self._read_fd == self._write_fd:
            fd = os.dup(self._write_fd)
            with socket.socket(fileno=fd) as sock, contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        elif self._write_fd >= 0:
            trio.lowlevel.notify_closing(self._write_fd)
            os.close(self._write_fd)
            self._write_fd = -1

    def close(self) -> None:
        for fd in {self._read_fd, self._write_fd} - {-1}:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        self._read_fd = self._write_fd = -1


# one process


class Wrong(Exception):
    """A check ends here: this is what is wrong. `cause` is a kind of `Diagnosis`, or start, silent, died or closed."""

    def __init__(self, cause: str, found: str, mend: str) -> None:
        super().__init__(found)
        self.cause = cause
        self.found = found
        self.mend = mend


@attrs.frozen
class Answer:
    """The answer to one job: its end, how many parts came before, and the first of these."""

    end: Replied | Failed | StopAsked
    parts: int = 0
    first_parts: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        streamed = ""
        if self.parts:
            begins = ", ".join(show(part) for part in self.first_parts)
            streamed = f"parts ({self.parts + 1:,}: {begins}, ...; `Pool.stream` takes them), at the end "
        match self.end:
            case Replied(context, body):
                context_said = f", context {show(context)}" if context else ""
                return f"{streamed or 'replied '}{show(body)} ({len(body):,} bytes){context_said}"
            case Failed(message):
                return f"{streamed}job error {show(message)}"
            case StopAsked():
                return "asked to be replaced"

    @property
    def body(self) -> bytes | None:
        """The reply's body, None where there was another answer."""
        return self.end.body if isinstance(self.end, Replied) else None

    @property
    def context(self) -> bytes:
        """The reply's context."""
        return self.end.context if isinstance(self.end, Replied) else b""


class Session:
    """One process, from its start to its end, and what it said."""

    def __init__(
        self, process: OsProcess, launch: Launch, relay: str, answer_within: float, leave_within: float
    ) -> None:
        self.process = process
        self.protocol = launch.protocol
        self.limit = launch.max_frame_size
        self.boot_timeout = launch.boot_timeout
        self.relay = relay
        self.answer_within = answer_within
        self.leave_within = leave_within
        self.wire: Wire | None = None
        self.conversation = Conversation(launch.protocol, launch.max_frame_size)
        self.events: deque[Event] = deque()
        self.fault: FrameError | None = None
        self.fault_stage = Stage.SHAKING
        self.raw = bytearray()  # what came since the last event, as far as it is kept
        self.at_end = False
        self.exited = False
        self.sent = b""
        self.news = trio.Event()
        self._written = 0

    # what runs in the background

    def tell_news(self) -> None:
        news, self.news = self.news, trio.Event()
        news.set()

    async def watch_exit(self) -> None:
        await self.process.wait_exit()
        self.exited = True
        self.tell_news()

    async def read(self) -> None:
        assert self.wire is not None
        try:
            while not self.at_end:  # also what is kept no more: who can't write can't leave
                await self.wire.wait_readable()
                self.take()
        except trio.ClosedResourceError:
            return

    def take(self) -> bool:
        """Read once, without waiting; False where nothing was there."""
        assert self.wire is not None
        data = self.wire.read_now()
        if data is None or self.at_end:
            return False
        if data:
            self._receive(data)
        else:
            self.at_end = True
        self.tell_news()
        return not self.at_end

    def drain(self) -> None:
        """Read what is left, when the process has ended; what outlives it may write on for ever."""
        for _ in range(LAST_WORDS // READ_SIZE):
            if not self.take():
                break

    def _receive(self, data: bytes) -> None:
        self.raw += data[: KEPT - len(self.raw)]
        if self.fault is not None:
            return
        self.conversation.receive(data)
        self.fault_stage = self.conversation.stage
        streamed = False
        try:
            while (event := self.conversation.next_event()) is not None:
                self.events.append(event)
                streamed = isinstance(event, Part)
                if not streamed:  # of which there may be thousands in what was read, and looking costs a copy of it
                    self.raw[:] = self.conversation.leftover[:KEPT]
                self.fault_stage = self.conversation.stage
        except FrameError as error:
            self.fault = error
        if streamed:
            self.raw[:] = self.conversation.leftover[:KEPT]
        assert self.wire is not None
        while self.conversation.answers:
            pong = self.conversation.answers.popleft()
            with contextlib.suppress(OSError):
                self.wire.write_now(pong)

    # what a check does

    async def shake_hands(self) -> int:
        """Exchange the handshakes; return the pid that the worker claims."""
        frame = self.conversation.handshake()
        self._written = len(frame)
        await self.send(frame, self.boot_timeout)
        event = await self._next_event(self.boot_timeout, "the handshake")
        assert isinstance(event, Shaken)
        return event.pid

    async def ask(self, body: bytes, context: bytes = b"", *, split: Literal["", "header", "payload"] = "") -> Answer:
        """Hand in a job and take its answer."""
        self.judge()
        frames = encode_job(self.protocol, context, body)
        self.sent = context + body
        try:
            self.conversation.begin_job(frames)
        except FrameError as error:
            self.fault = error
            self.judge()
        self._written = sum(map(len, frames))
        deadline = trio.current_time() + self.answer_within
        parts = 0
        first_parts: tuple[bytes, ...] = ()
        if split:
            await self._send_split(b"".join(frames), split)
            deadline = trio.current_time() + self.answer_within
        else:
            await self.send(b"".join(frames), self.answer_within)
        while True:
            event = await self._next_event(deadline - trio.current_time(), "the job")
            match event:
                case Part():
                    parts += 1
                    if parts <= PARTS_SHOWN:
                        first_parts = (*first_parts, event.body)
                    if parts == PARTS:
                        await self.send(self.conversation.stop_stream(), self.leave_within)
                        deadline = trio.current_time() + self.leave_within
                case Shaken():
                    raise AssertionError("the conversation is shaken but once")
                case Replied() | Failed() | StopAsked():
                    return Answer(event, parts, first_parts)

    async def send(self, data: bytes, seconds: float) -> None:
        """Write all of it, or return where time is over or nobody reads: what is read tells more."""
        assert self.wire is not None
        rest = memoryview(data)
        with trio.move_on_after(seconds), contextlib.suppress(OSError, trio.ClosedResourceError):
            while rest:
                written = self.wire.write_now(rest)
                rest = rest[written:]
                if not written:
                    await self.wire.wait_writable()
        await trio.lowlevel.checkpoint()

    async def _send_split(self, data: bytes, split: str) -> None:
        """Write a job so that its headers, or its payloads, arrive byte by byte, and the others in one piece."""
        patient = True
        until = trio.current_time() + self.answer_within
        at = 0
        for size in _split(data, self.protocol, split):
            await self.send(data[at : at + size], self.answer_within)
            at += size
            if self.fault or self.at_end or self.exited:
                return
            patient = patient and trio.current_time() < until and await self._taken()

    async def _taken(self) -> bool:
        """Wait until the worker has read what was written: the next piece shall come alone."""
        assert self.wire is not None
        with trio.move_on_after(PIECE_TAKEN_WITHIN):
            if self.wire.unread() is None:
                await trio.sleep(0.005)  # nobody can know
                return True
            while self.wire.unread() and not self.exited:  # noqa: ASYNC110 - no event tells of that
                await trio.sleep(0.0005)
            return True
        return False

    async def _next_event(self, seconds: float, asked: str) -> Event:
        with trio.move_on_after(max(0.0, seconds)):
            while True:
                if self.exited:
                    self.drain()
                if self.events:
                    return self.events.popleft()
                if self.fault is not None:
                    await self._let_finish()
                    self.judge()
                if self.at_end or self.exited:
                    break
                await self.news.wait()
        if self.events:
            return self.events.popleft()
        if self.at_end or self.exited:
            await self._died(asked)
        await self._silent(asked)
        raise AssertionError("both end in an exception")

    async def _let_finish(self) -> None:
        """Let a broken worker say all it has to say, for a moment: it may be about to end, after its relay has."""
        size = -1
        with trio.move_on_after(1.0):
            while not self.exited and (self.at_end or len(self.raw) != size):
                size = len(self.raw)
                with trio.move_on_after(0.1):
                    await self.news.wait()

    def judge(self) -> None:
        """Raise what is wrong about the bytes that came, if there is anything."""
        if self.fault is None:
            return
        found = self.diagnose()
        ended = f" Then it {how_it_ended(self.process.peek())}." if self.exited and found.kind == "stray" else ""
        raise Wrong(found.kind, found.found + ended, found.mend)

    def diagnose(self) -> Diagnosis:
        """Say what the bytes are that are no answer."""
        assert self.fault is not None
        return diagnose(
            bytes(self.raw),
            self.protocol,
            self.limit,
            reason=self.fault.reason,
            after_answer=self.fault_stage is Stage.IDLE,
            shaken=self.fault_stage is not Stage.SHAKING,
            sent=self.sent,
            relay="pipes" if self.relay in ("pipes", "socketpair") else self.relay,
        )

    async def _died(self, asked: str) -> None:
        """Raise that the relay ended, and why, before there was an answer."""
        with trio.move_on_after(self.leave_within):
            while not self.exited:
                await self.news.wait()
        self.drain()
        self.judge()
        if not self.exited:
            raise Wrong(
                "closed",
                f"It closed its side of the relay before it answered {asked}, and runs on.",
                "Keep stdout (or the socket) open until the stop frame or the end of stdin.",
            )
        self.process.finish()
        how = how_it_ended(self.process.peek())
        said = f" Its last words on stderr: {show_tail(self.process.stderr_tail)}" if self.process.stderr_tail else ""
        wrote = f" On the relay stood {show(bytes(self.raw))}." if self.raw else ""
        mend = {
            "the handshake": "It must live on after its start: begin with a loop that reads frames. Try it by hand: "
            "what it says on stderr is the cause as a rule.",
            "the job": "Report what goes wrong in a job as a job error (an error frame), and read the next job; leave "
            "only on the stop frame and at the end of the relay.",
        }[asked]
        raise Wrong("died", f"It {how} before it answered {asked}.{wrote}{said}", mend)

    async def _silent(self, asked: str) -> None:
        """Raise that no answer came, and why, as far as it shows once the worker sees the end of its relay."""
        assert self.wire is not None
        seconds = self.boot_timeout if asked == "the handshake" else self.answer_within
        found = f"No answer to {asked} within {seconds:g} s"
        if self.raw:
            raise Wrong(
                "size",
                f"{found}: a frame began and did not come to its end. {_announced(bytes(self.raw), self.protocol)}",
                "Is the size in the header right (bytes, not characters; in goridge-3 with the context)? Is all of the "
                "frame written, and flushed?",
            )
        unread = self.wire.unread()
        if unread:
            deaf = self.wire.counts and self._written == unread
            some = f"{unread:,} bytes" if self.wire.counts else "some bytes"
            what = "it has read nothing" if deaf else f"it has not read all of it, {some} lie unread"
            raise Wrong(
                "deaf" if deaf else "silent",
                f"{found}: {what}.",
                "It is busy with something else, or does not read its relay. If it only needs longer, give it the "
                "time: --boot-timeout to start, --timeout to answer.",
            )
        self.wire.close_write()
        with trio.move_on_after(self.leave_within):
            while not (self.events or self.fault or self.at_end or self.exited):
                await self.news.wait()
        self.drain()
        if self.events:
            raise Wrong(
                "buffered",
                f"{found}: it came when stdin was closed, and not before.",
                "Its output is buffered: flush after each answer. Or its input is: read what a frame holds, and not "
                "until a buffer is full.",
            )
        raise Wrong(
            "silent",
            f"{found}: it read what was written, and said nothing.",
            "Does it write its answer, and flush it? Does it wait for more bytes than a frame has, as a worker of "
            "another dialect does? If it only needs longer, raise --timeout.",
        )

    async def leave(self, *, by: Literal["stop", "end", "kill"]) -> int | None:
        """End the worker, and read all it still has to say; its exit status where it ended by itself in time."""
        assert self.wire is not None
        if by == "stop":
            await self.send(self.conversation.stop(), self.leave_within)
        elif by == "end":
            self.wire.close_write()
        if by != "kill":
            with trio.move_on_after(self.leave_within):
                while not self.exited:
                    await self.news.wait()
        status = self.process.peek() if self.exited else None
        if not self.exited:
            self.process.kill()
            await self.process.wait_exit()
        self.process.finish()
        self.drain()
        return status


def show_tail(text: str) -> str:
    """Show the last lines of stderr on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(line[: 2 * SHOWN] for line in lines[-3:])


def _announced(raw: bytes, protocol: str) -> str:
    """Say how long the frame in hand says that it is, and how much of it came."""
    count, rest = frames_in_front(raw, protocol, 1 << 62)
    header = {"goridge-1": 9, "goridge-2": 17, "goridge-3": 12}[protocol]
    if count and not rest:
        return "The context came, and not the body, which is a frame of its own."
    if len(rest) < header:
        return f"Its header has {header} bytes, and {len(rest)} came: {rest.hex(' ')}."
    if protocol == "goridge-3":
        header += 4 * ((rest[0] & 0x0F) - 3)
        size = int.from_bytes(rest[2:6], "little")
    else:
        size = int.from_bytes(rest[1:9], "little")
    came = f"{len(rest) - header:,}" if len(raw) < KEPT else f"{KEPT:,} or more"
    return f"Its header announces {size:,} bytes, and {came} came."


def _split(data: bytes, protocol: str, split: str) -> list[int]:
    """Return the sizes of the pieces of a job's frames, with its headers, or its payloads, in single bytes."""
    sizes: list[int] = []
    at = 0
    while at < len(data):
        if protocol == "goridge-3":
            header, size = 12, 4 + int.from_bytes(data[at + 2 : at + 6], "little")
        else:
            header, size = (9 if protocol == "goridge-1" else 17), int.from_bytes(data[at + 1 : at + 9], "little")
        sizes += [1] * header if split == "header" else [header]
        sizes += [1] * size if split == "payload" else [size] * bool(size)
        at += header + size
    return sizes


# starting one


async def run_session(
    config: Config,
    protocol: str,
    place: Place | None,
    limiter: trio.CapacityLimiter,
    check: Callable[[Session], Awaitable[T]],
) -> T:
    """Start a process, run a check on it, and end it, whatever happens. Raise what the check raises, and `OSError`."""
    added = config.env(0) if callable(config.env) else config.env
    own = {"TRIO_WORKERS_SLOT": "0", "TRIO_WORKERS_PROTOCOL": protocol}
    launch = Launch(
        argv=check_argv(config.command(0) if callable(config.command) else config.command),
        env={**os.environ, **check_env(added or {}), **own},
        cwd=config.cwd,
        slot=0,
        label="check[0]",
        protocol=protocol,
        max_frame_size=config.max_frame_size,
        boot_timeout=config.boot_timeout,
    )
    launch = with_relay(launch, "pipes" if place is None else place.url)
    outcome: list[T] = []
    wrong: Wrong | OSError | None = None
    async with trio.open_nursery() as nursery:
        try:
            outcome.append(await _live(config, launch, place, limiter, check, nursery))
        except (Wrong, OSError) as error:  # taken out of the nursery, which would make a group of it
            wrong = error
        nursery.cancel_scope.cancel()
    if wrong is not None:
        raise wrong
    return outcome[0]


@trio.lowlevel.enable_ki_protection
async def _live(
    config: Config,
    launch: Launch,
    place: Place | None,
    limiter: trio.CapacityLimiter,
    check: Callable[[Session], Awaitable[T]],
    nursery: trio.Nursery,
) -> T:
    relay = relay_of(config)
    with contextlib.ExitStack() as owned, contextlib.ExitStack() as the_childs:
        wire: Wire | None = None
        stdout: int | None = None
        if place is not None:
            stdin = os.open(os.devnull, os.O_RDONLY)
        elif relay == "socketpair":
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            fd = ours.detach()
            wire = Wire(fd, fd, "unix")
            stdin = stdout = theirs.detach()
        else:
            stdin, write_fd = os.pipe()
            read_fd, stdout = os.pipe()
            os.set_blocking(write_fd, False)
            os.set_blocking(read_fd, False)
            wire = Wire(read_fd, write_fd, "pipe")
        the_childs.callback(os.close, stdin)
        if stdout is not None and stdout != stdin:
            the_childs.callback(os.close, stdout)
        if wire is not None:
            owned.callback(wire.close)
        process = await spawn_process(launch, stdin=stdin, stdout=stdout, limiter=limiter)
        try:
            the_childs.close()
            within = config.limits.exec_ttl or ANSWER_WITHIN
            session = Session(process, launch, relay, within, max(0.1, config.destroy_timeout))
            nursery.start_soon(process.drain_stderr)
            nursery.start_soon(session.watch_exit)
            if wire is None:
                assert place is not None
                wire = await _accept(session, place, limiter)
                owned.callback(wire.close)
            session.wire = wire
            nursery.start_soon(session.read)
            return await check(session)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):  # SIGKILL has been sent
                await process.wait_exit()
            process.finish()
            process.reap()


async def _accept(session: Session, place: Place, limiter: trio.CapacityLimiter) -> Wire:
    """Wait for the connection of this process; what others make is closed."""
    found: list[Wire] = []

    async def connect(nursery: trio.Nursery) -> None:
        found.append(await _accept_one(session.process.pid, place, limiter))
        nursery.cancel_scope.cancel()

    try:
        with trio.move_on_after(session.boot_timeout):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect, nursery)
                while not session.exited:
                    await session.news.wait()
                nursery.cancel_scope.cancel()
    except BaseException:
        for wire in found:
            wire.close()
        raise
    if found:
        return found[0]
    if session.exited:
        session.process.finish()
        tail = session.process.stderr_tail
        said = f" Its last words on stderr: {show_tail(tail)}" if tail else ""
        raise Wrong(
            "died",
            f"It {how_it_ended(session.process.peek())} before it connected.{said}",
            f"It must connect to the address in RR_RELAY (here {place.url}), and live on.",
        )
    raise Wrong(
        "unconnected",
        f"It did not connect to RR_RELAY ({place.url}) within {session.boot_timeout:g} s.",
        "It must connect to the address in RR_RELAY. One that speaks over stdin and stdout alone is checked with "
        "--relay pipes.",
    )


async def _accept_one(group: int, place: Place, limiter: trio.CapacityLimiter) -> Wire:
    while True:
        connection = (await place.listener.accept()).socket
        try:
            whose = await _identity.group_of(connection, {group}, limiter=limiter)
        except OSError:
            whose = _identity.Verdict.STRANGER
        except BaseException:
            connection.close()
            raise
        if whose is _identity.Verdict.STRANGER:
            connection.close()
            continue
        kind = "unix" if connection.family == socket.AF_UNIX else "tcp"
        fd = connection.detach()
        return Wire(fd, fd, kind)
