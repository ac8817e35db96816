"""The bytes of a conversation: over raw file descriptors, and over any trio stream.

A `Relay` moves bytes and knows nothing of frames. Its calls come in two kinds: `*_now` do what can be done at once and
never wait, `wait_*` wait and do nothing. That split is what makes a job cheap (write, `wait_readable`, read: one pass
of trio's run loop, where a stream's `send_all` and `receive_some` take two or three) and a hand-over possible: whoever
takes a reply writes the next job synchronously, before anybody is woken.

A `Line` is a relay together with its conversation, as a job sees it: write me, what came back, did I start.
"""

import errno
import logging
import os
import select
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Final

import trio

from . import _platform
from ._conversation import Event, Shaken, Stage, Talk
from ._goridge import PIPE_BUF, FrameError, printable

READ_SIZE: Final = 64 * 1024
"""Bytes asked for in one read: a pipe's default capacity, and below malloc's threshold for a fresh mapping."""

READS_IN_A_ROW: Final = 64
"""Reads of one large reply (4 MiB) before other tasks get their turn."""

STREAM_BUFFER: Final = 256 * 1024
"""Bytes that a `StreamRelay` holds in each direction: as many as a grown pipe."""

LAST_WORDS: Final = 4 * 1024 * 1024
"""Bytes read from a dead worker's relay: more than a pipe or socket holds, so that only a surviving grandchild who
keeps on writing is cut short."""

_log = logging.getLogger("trio_workers.relay")


class LineEnded(Exception):
    """The relay is at its end: the worker closed it, died, or we closed it."""


class Relay(ABC):
    """Bytes to and from one worker.

    `write_now` and `read_now` never wait; `wait_readable` and `wait_writable` are full checkpoints, can be cancelled,
    and raise `trio.ClosedResourceError` once `close` was called, also in those who wait already.
    """

    closed: bool = False
    unsent: bool = False
    """Whether bytes taken by `write_now` are still with us (only for streams, which send in the background of a
    wait)."""
    wakes: bool = False
    """Whether `wake` does what it says. A relay that can't gets no job ahead of its turn (`Config.read_ahead`)."""

    @abstractmethod
    def write_now(self, data: bytes | memoryview) -> int:
        """Write what can be written at once; return how many bytes that was, 0 where it would wait.

        Raise `OSError` where nobody reads any more.
        """

    @abstractmethod
    def read_now(self, size: int) -> bytes | None:
        """Return at most `size` bytes of what is there, None where there is nothing, `b""` at the end."""

    @abstractmethod
    def has_input(self) -> bool:
        """Whether bytes or the end are there to be read: true before a job is written means a worker out of step."""

    @abstractmethod
    async def wait_readable(self) -> None:
        """Wait until `read_now` has something to say."""

    @abstractmethod
    async def wait_writable(self) -> None:
        """Wait until `write_now` takes something."""

    @abstractmethod
    def close(self) -> None:
        """Close. Doing it twice is harmless."""

    def wake(self) -> None:
        """Wake who waits for this relay: somebody else may have read what he waits for.

        He may find nothing, or get `trio.ClosedResourceError` although it is open, and looks at his job.
        """
        return

    async def wait_for_rest(self) -> None:
        """Wait until what a dead worker had written has arrived; where `read_now` gets it at once, there is no wait."""
        return

    def unread(self) -> bool | None:
        """After the worker's death: did it leave bytes of ours unread? None where nobody can know."""
        return None

    def unread_bytes(self) -> int | None:
        """After the worker's death: how many bytes of ours did it leave unread? None where nobody can know."""
        return None


class FdRelay(Relay):
    """A relay over non-blocking file descriptors: two pipes, or one socket.

    Both numbers are -1 once closed, and only `close` closes them: a number that is used again belongs to another
    worker.
    """

    wakes = True

    def __init__(self, read_fd: int, write_fd: int, *, kind: str, quick_ack: bool = False) -> None:
        """Own the descriptors. `kind` is "pipe", "unix" or "tcp" and says what can be proved of unread bytes."""
        self.kind = kind
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._reset = False
        self._poll = select.poll()
        self._poll.register(read_fd, select.POLLIN)
        self._quick_ack = socket.socket(fileno=os.dup(read_fd)) if quick_ack else None

    def __repr__(self) -> str:
        return f"<FdRelay {self.kind}: {'closed' if self.closed else f'{self._read_fd}, {self._write_fd}'}>"

    def write_now(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self._write_fd, data)
        except BlockingIOError:
            return 0

    def write_gathered(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Write what can be written at once of these pieces, by one system call. Else as `write_now`."""
        try:
            return os.writev(self._write_fd, pieces)
        except BlockingIOError:
            return 0

    def read_now(self, size: int) -> bytes | None:
        if self._read_fd < 0:
            return b""
        if self._quick_ack is not None:
            # goridge-1 replies in up to four sends; without this, Nagle meets the delayed ACK and a job takes 44 ms.
            self._quick_ack.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        try:
            return os.read(self._read_fd, size)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            self._reset = True  # on a Unix socket: the peer died with bytes unread
            return b""

    def read_into(self, space: memoryview) -> int | None:
        """Read straight into memory; return how many bytes came, None where there is nothing, 0 at the end."""
        if self._read_fd < 0:
            return 0
        try:
            return os.readv(self._read_fd, [space])
        except BlockingIOError:
            return None
        except ConnectionResetError:
            self._reset = True
            return 0

    def has_input(self) -> bool:
        return bool(self._poll.poll(0))

    async def wait_readable(self) -> None:
        if self._read_fd < 0:
            raise trio.ClosedResourceError("this relay is closed")
        await trio.lowlevel.wait_readable(self._read_fd)

    async def wait_writable(self) -> None:
        if self._write_fd < 0:
            raise trio.ClosedResourceError("this relay is closed")
        await trio.lowlevel.wait_writable(self._write_fd)

    def close(self) -> None:
        self.closed = True
        if self._read_fd < 0:
            return
        fds = {self._read_fd, self._write_fd}
        self._read_fd = self._write_fd = -1
        for fd in fds:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        if self._quick_ack is not None:
            self._quick_ack.close()

    def wake(self) -> None:
        if self._read_fd >= 0:
            trio.lowlevel.notify_closing(self._read_fd)

    def unread_bytes(self) -> int | None:
        return _platform.HERE.unread_bytes(self._write_fd) if self.kind == "pipe" else None

    def unread(self) -> bool | None:
        if self.kind == "pipe":
            left = _platform.HERE.unread_bytes(self._write_fd)
            return None if left is None else left > 0
        if self.kind == "unix":
            if self._reset:
                return True
            left = _platform.HERE.unread_bytes(self._write_fd, "unix")
            return None if left is None else left > 0
        return None


class StreamRelay(Relay):
    """A relay over any trio stream, for factories of your own (a stream of an ssh library, say).

    A stream can't do anything at once, so two tasks stand between it and the pool, in the nursery given, each with a
    bounded buffer: the price is their passes of the run loop. They live until the relay is closed. Of a job's bytes
    nothing is proved once they are in the buffer.
    """

    wakes = True

    def __init__(self, stream: trio.abc.Stream, nursery: trio.Nursery) -> None:
        """Own the stream; `nursery` is the one that `Factory.open` was given."""
        self._stream = stream
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._ended = False
        self._broken = False
        self._wakes = 0
        self._waiters = trio.lowlevel.ParkingLot()
        self._pumps = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope(shield=True)
        nursery.start_soon(self._pump)

    @trio.lowlevel.enable_ki_protection
    async def _pump(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump_out)
                    await self._pump_in()
        except Exception:
            _log.exception("a stream raised an error of its own; its worker's relay is at its end")
        self._end()
        try:
            await trio.aclose_forcefully(self._stream)
        except Exception:
            _log.exception("a stream could not be closed")

    async def _pump_in(self) -> None:
        while True:
            while len(self._inbox) >= STREAM_BUFFER:
                await self._pumps.park()
            try:
                data = await self._stream.receive_some(READ_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                self._end()
                return
            self._inbox += data
            self._waiters.unpark_all()

    async def _pump_out(self) -> None:
        while True:
            while not self._outbox:
                await self._pumps.park()
            data = bytes(self._outbox)
            self._outbox.clear()
            self._waiters.unpark_all()
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._broken = True
                self._waiters.unpark_all()
                return

    def _end(self) -> None:
        self._ended = True
        self._waiters.unpark_all()

    def write_now(self, data: bytes | memoryview) -> int:
        if self._broken or self.closed:
            raise BrokenPipeError(errno.EPIPE, "nobody reads this stream any more")
        piece = data[: STREAM_BUFFER - len(self._outbox)]
        self._outbox += piece
        self._pumps.unpark_all()
        return len(piece)

    def read_now(self, size: int) -> bytes | None:
        if not self._inbox:
            return b"" if self._ended or self.closed else None
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        self._pumps.unpark_all()
        return data

    def has_input(self) -> bool:
        return bool(self._inbox) or self._ended or self.closed

    async def wait_readable(self) -> None:
        await self._wait(lambda: self.has_input())

    async def wait_writable(self) -> None:
        await self._wait(lambda: self._broken or len(self._outbox) < STREAM_BUFFER)

    async def _wait(self, ready: Callable[[], bool]) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this relay is closed")
        wakes = self._wakes
        await trio.lowlevel.checkpoint()
        while not ready() and self._wakes == wakes:
            await self._waiters.park()
            if self.closed:
                raise trio.ClosedResourceError("this relay is closed")

    def wake(self) -> None:
        self._wakes += 1
        self._waiters.unpark_all()

    async def wait_for_rest(self) -> None:
        while not self._ended:
            await self._waiters.park()

    def close(self) -> None:
        self.closed = True
        self._scope.cancel()
        self._waiters.unpark_all()


class Line:
    """A relay and its conversation, as a job sees them.

    A worker takes the jobs of its line one after the other. What is said of "the job" here is about the one in front;
    others may lie behind it (`begin_ahead`), whose turn comes when the one before is answered (`turn`).
    """

    __slots__ = (
        "_answered",
        "_begun",
        "_behind",
        "_owed",
        "_said",
        "_under_way",
        "_unsent",
        "awaits_flush",
        "conversation",
        "ended",
        "events",
        "fault",
        "peer",
        "relay",
    )

    def __init__(self, relay: Relay, conversation: Talk) -> None:
        self.relay: Relay = relay
        self.conversation: Talk = conversation
        self.peer: int | None = None
        """The pid that the worker's handshake claimed."""
        self.events: deque[Event] = deque()
        """What a dead worker had still said: read to the end when it died, taken by its job when that gets its turn."""
        self.fault: FrameError | None = None
        self._unsent: deque[bytes | memoryview] = deque()
        self._owed: deque[bytes | memoryview] = deque()
        self._behind: deque[bytes | memoryview] = deque()
        self._said = 0
        self._under_way = 0
        self.awaits_flush: bool = False
        """Whether the exchange will call `flush_behind`."""
        self.ended: bool = False
        """Whether the worker's process has ended: what it has read or not is being looked at."""
        self._begun = False
        self._answered = False

    def __repr__(self) -> str:
        return f"<Line {self.relay!r} {self.conversation!r}>"

    # writing

    @property
    def whole(self) -> bool:
        """Whether the last byte of the present job has been written."""
        return not self._unsent

    def begin(self, frames: Sequence[bytes | memoryview]) -> str | None:
        """Begin a job: write as much of it as the relay takes at once.

        Return None, or why this line can't carry a job any more; then not a byte of it was written.
        """
        relay = self.relay
        self._begun = self._answered = False
        if relay.closed:
            return "the relay is closed"
        if relay.has_input():
            return self._stale()
        self.conversation.begin_job(frames)
        self._said = 0
        self._under_way = 1
        if self._owed:
            self._unsent.extend(self._owed)
            self._owed.clear()
        try:
            if len(frames) == 1 and not self._unsent:
                frame = frames[0]  # the usual case, and nearly always it is taken whole
                written = relay.write_now(frame)
                self._begun = bool(written)
                if written != len(frame):
                    self._unsent.append(memoryview(frame)[written:] if written else frame)
            else:
                self._unsent.extend(frames)
                self._push()
        except OSError as error:
            if not self._begun:
                self._unsent.clear()
                return f"the worker does not read its relay any more ({error})"
        return None

    def begin_ahead(self, frames: Sequence[bytes | memoryview]) -> bool:
        """Begin a small job behind those that the worker has not answered yet, to be written by `flush_behind`.

        False where that can't be.
        """
        if self.ended or self.relay.closed or not self.relay.wakes:
            return False
        self._behind.extend(frames)
        return True

    def flush_behind(self) -> None:
        """Write jobs that were begun ahead, as far as the relay takes them: whole frames, at most PIPE_BUF bytes."""
        behind = self._behind
        while behind and not self._unsent and not self._owed and not self.relay.closed:
            frames = [behind[0]]
            size = len(behind[0])
            for frame in islice(behind, 1, None):
                size += len(frame)
                if size > PIPE_BUF:
                    break
                frames.append(frame)
            data = b"".join(frames)
            try:
                written = self.relay.write_now(data)
            except OSError:
                return  # whoever reads this line will see that it is at its end
            if not written:
                return
            for _ in frames:
                self._set_off()
            if written < len(data):
                self._unsent.append(memoryview(data)[written:])  # whose turn it is writes on

    def _set_off(self) -> bytes | memoryview:
        """Note that the next of those that were begun ahead is on its way."""
        frame = self._behind.popleft()
        self.conversation.begin_behind((frame,))
        self._under_way += 1
        return frame

    def take_back(self) -> Collection[int]:
        """Take back what the worker has not read yet, as far as that is known; return the ids of those jobs.

        Where none of them has been read the one in front stays; else that may be among them.
        """
        ids = [id(frame) for frame in self._behind]
        self._behind.clear()
        return ids

    def is_of(self, job: Sequence[bytes | memoryview], ids: Collection[int]) -> bool:
        """Whether one of these ids is that of a job with these frames; one that has none left is under way for long."""
        return bool(job) and id(job[0]) in ids

    def turn(self, *, more: bool) -> None:
        """Note that the job in front has been answered: it is the next one's turn, if there is `more`."""
        self._answered = False
        self._under_way -= 1
        if more and not self._under_way and self._behind:
            self.flush_behind()
            if not self._under_way:
                self._begun = False
                self._push_next()

    def _push_next(self) -> None:
        """Begin the next job although the relay takes nothing now: its own task writes it."""
        self._unsent.extend(self._owed)  # of which a part may be out
        self._owed.clear()
        self._unsent.append(self._set_off())

    def unread_jobs(self, sizes: Sequence[int]) -> list[bool | None]:
        """After the worker's death: for each of the jobs it had, whether it did not read it whole; None: not known."""
        left = self.relay.unread_bytes()
        if left is None:
            return [None] * len(sizes)
        left += sum(map(len, self._unsent))
        unread: deque[bool | None] = deque()
        for size in reversed(sizes):
            # Some of it may be control frames, wherever among the jobs they are.
            unread.appendleft(left > self._said or (None if left > 0 else False))
            left -= size
        return list(unread)

    def _stale(self) -> str:
        data = self.relay.read_now(READ_SIZE)
        if data is None or data == b"":
            return "the worker closed its relay"
        self.conversation.receive(data)
        self.fault = FrameError("bytes came that no job asked for", data)
        return str(self.fault)

    def _push(self) -> bool:
        """Write on, as far as the relay takes it; True when the job is whole."""
        unsent = self._unsent
        write = self.relay.write_now
        while unsent:
            piece = unsent[0]
            written = write(piece)
            if not written:
                return False
            self._begun = True
            if written == len(piece):
                unsent.popleft()
            else:
                unsent[0] = memoryview(piece)[written:]
        if self._owed:
            self._pay()
        return True

    def _pay(self) -> None:
        """Write the control frames that are owed, as far as the relay takes them: never into the middle of a job."""
        owed = self._owed
        while owed and not self._unsent:
            try:
                written = self.relay.write_now(owed[0])
            except OSError:
                owed.clear()  # nobody reads them any more
                return
            self._said += written
            if written == len(owed[0]):
                owed.popleft()
            elif written:
                owed[0] = memoryview(owed[0])[written:]
            else:
                return

    async def flush(self) -> None:
        """Write the rest of the job, waiting where the relay is full.

        Return too where nobody reads any more: that decides nothing until the relay has been read to its end, for the
        worker may have said why.
        """
        try:
            while not self._push():
                await self.relay.wait_writable()
        except (OSError, trio.ClosedResourceError):
            return

    def stop_stream(self) -> None:
        """Ask the worker to end the streamed reply it is in the middle of."""
        if self.conversation.stage is Stage.STREAMING:
            self._say(self.conversation.stop_stream())

    def stop_worker(self) -> None:
        """Ask the worker to end."""
        self._say(self.conversation.stop())

    def _say(self, frame: bytes) -> None:
        """Write a control frame now, or as soon as the relay takes it and no job is half written."""
        self._owed.append(frame)
        self._pay()

    # reading

    @property
    def has_more(self) -> bool:
        """Whether `take` may have something: bytes have been read that are no part of an event taken yet."""
        return bool(self.events) or self.conversation.pending

    def take(self) -> Event | None:
        """Return the next event of what has been read already."""
        if self.events:
            return self.events.popleft()
        if self.conversation.pending and self.fault is None:
            return self._next_event()
        return None

    def forget(self) -> None:
        """Drop what a dead worker left that makes no event: the beginning of a frame."""
        self.events.clear()
        self.conversation.drop()

    def read(self) -> Event | None:
        """Read what is there and return the next event, None where it isn't whole yet.

        Raise `LineEnded` at the end, and `FrameError` for bytes that are no frame.
        """
        if self._owed:
            self._pay()
        for _ in range(READS_IN_A_ROW):
            data = self.relay.read_now(READ_SIZE)
            if data is None:
                return None
            if not data:
                raise LineEnded
            self._answered = True
            if not self.conversation.pending:
                data = data[self.conversation.take_several(data, self.events) :]
            if data:
                self.conversation.receive(data)
            if self.events:
                return self.events.popleft()
            event = self._next_event()
            if event is not None:
                return event
        return None

    def _next_event(self) -> Event | None:
        try:
            event = self.conversation.next_event()
        except FrameError as error:
            self.fault = error
            raise
        answers = self.conversation.answers
        while answers:
            self._say(answers.popleft())
        return event

    async def shake_hands(self) -> None:
        """Exchange the handshakes, and set `peer`; no deadline here. Raise `FrameError` or `LineEnded` on failure."""
        self._unsent.append(self.conversation.handshake())
        await self.flush()
        event = None
        while event is None:
            try:
                await self.relay.wait_readable()
            except trio.ClosedResourceError:
                raise LineEnded from None
            event = self.read()
        assert isinstance(event, Shaken)
        self.peer = event.pid

    @property
    def is_last(self) -> bool:
        """Whether no other job is on its way behind the one in front."""
        return self._under_way <= 1

    @property
    def clean(self) -> bool:
        """Whether nothing trails behind a whole reply, and nothing of its job is unsent: the line can carry another."""
        return not self.conversation.pending and not self._unsent and not self.events

    # the end

    def finish(self) -> None:
        """Read what a dead worker left behind; afterwards `take` gives its events and `fault` says what was wrong."""
        total = 0
        while total < LAST_WORDS:
            data = self.relay.read_now(READ_SIZE)
            if not data:
                break
            total += len(data)
            self._answered = True
            self.conversation.receive(data)
        try:
            while self.fault is None and (event := self.conversation.next_event()) is not None:
                self.events.append(event)
        except FrameError as error:
            self.fault = error

    def close(self) -> None:
        """Close the relay, and let go of what could not be sent."""
        self.relay.close()
        self._unsent.clear()
        self._owed.clear()
        self._behind.clear()

    @property
    def started(self) -> bool | None:
        """Whether the present job started, as far as it can be proved once the worker is dead (or the line broken).

        False: its last byte was never read, so the worker can't have begun it. True: it was read whole, or answered in
        part.
        """
        if self.answered:
            return True
        if not self.whole or not self._begun:
            return False
        unread = self.relay.unread()
        if unread and self._said:
            left = self.relay.unread_bytes()
            unread = True if left is not None and left > self._said else None  # else it may be control frames
        return None if unread is None else not unread

    @property
    def answered(self) -> bool:
        """Whether the present job has been answered, at least in part."""
        return self._answered or self.conversation.pending

    @property
    def shared_memory(self) -> int:
        """How many bytes of the worker's resident memory, at most, are the pool's as well, and no doing of its jobs."""
        return 0

    def first_bytes(self) -> str:
        """Show what has arrived and was no frame, for an error; an empty string where there is nothing."""
        if self.fault is not None:
            return printable(self.fault.received)
        leftover = self.conversation.leftover
        return printable(leftover) if leftover else ""
