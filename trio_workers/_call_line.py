"""The pool's side of a conversation with its own Python child, and the lines that move what is small and what is large.

The stages and what may come in each are those of every conversation (`TABLE`); what differs is the messages
(`_calls.py`), and that an answer must carry the id of the job it answers.
"""

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Final, NamedTuple

import trio

from . import _platform
from ._arena import AT_ONCE, IN_ARENA, SLICE, Arena, Filling, Kept
from ._calls import (
    CALLS,
    DONE,
    END,
    ERROR,
    FROM_CHILD,
    GATHERED,
    HELLO,
    LOOK,
    MOST_PACKET,
    PART,
    READY,
    REFUSED,
    RESULT,
    SOME,
    STOP,
    STOP_STREAM,
    Decoder,
    Message,
    beginning,
    buffers_of,
    drop_sent,
    encode,
    placed,
)
from ._conversation import TABLE, Event, Failed, Part, Refused, Replied, Shaken, Stage
from ._goridge import FrameError
from ._region import DONE_HEAD, Region
from ._relay import READ_SIZE, READS_IN_A_ROW, FdRelay, Line, LineEnded

ID: Final = slice(8, 12)
"""Where a message has its id."""

_KIND: Final = 4
"""Where a message has its kind."""

_IDLE: Final = Stage.IDLE
_WAITING: Final = Stage.WAITING


class CallConversation:
    """One connection to a Python child: give it the bytes that came, take the events they make."""

    stray = "A job must leave alone the descriptors that it did not open: one of them is the pool's."

    def __init__(
        self,
        hello: bytes,
        max_frame_size: int,
        arena: Arena | None = None,
        kept: Kept | None = None,
        region: Region | None = None,
    ) -> None:
        self.region = region
        self.chunk: int | None = None
        """The id of the present job, where it is a chunk."""
        self.answers: deque[bytes] = deque()
        self.stage = Stage.SHAKING
        self._hello = hello
        self._decoder = Decoder(FROM_CHILD, max_frame_size, arena, kept, SLICE)
        self.ids: deque[int] = deque()
        self.latest = 0
        """The id of the last job that took the relay."""

    def __repr__(self) -> str:
        return f"<CallConversation: {self.stage.value}>"

    def handshake(self) -> bytes:
        """Return the message that opens the conversation: all that the child must know."""
        return _whole(HELLO, 0, self._hello)

    def stop(self) -> bytes:
        """Return the message that ends a worker softly."""
        return _whole(STOP, 0)

    def stop_stream(self) -> bytes:
        """Return the message that asks the child to end the stream it is in."""
        return _whole(STOP_STREAM, self.ids[0])

    def begin_job(self, frames: Sequence[bytes | memoryview]) -> None:
        """Note that a job is on its way to the child."""
        if self.stage is not _IDLE:
            raise FrameError(f"a job can't come while {self.stage.value}", self.leftover)
        self.stage = _WAITING
        self.latest = _id_of(frames[0])
        self.chunk = self.latest if frames[0][_KIND] == CALLS else None
        self.ids.append(self.latest)

    def begin_behind(self, frames: Sequence[bytes | memoryview]) -> None:
        """Note that another job is on its way to the child, behind those that it has not answered yet."""
        if self.stage is _IDLE:  # their answers have been taken apart, though not told of yet
            self.stage = _WAITING
        self.ids.append(_id_of(frames[0]))

    def take_whole(self, data: bytes) -> Event | None:
        """Take bytes from the child where they are a whole small result and nothing else, the usual case; else None."""
        if self.stage is not _WAITING or self.chunk is not None:
            return None
        message = self._decoder.take_whole(data)
        if message is None or message.kind != RESULT or message.id != self.ids[0]:
            return None
        self._end_job()
        return Replied(b"", message.body)

    def take_several(self, data: bytes, events: deque[Event]) -> int:
        """Take the small results at the front of these bytes, one after the other; return how many bytes they were."""
        at = 0
        ids, decoder = self.ids, self._decoder
        while ids and self.stage is _WAITING:
            message = decoder.take_front(data, at)
            if message is None or message.kind != RESULT or message.id != ids[0]:
                break
            at += decoder.taken
            self._end_job()
            events.append(Replied(b"", message.body))
        return at

    def _end_job(self) -> None:
        self.ids.popleft()
        self.stage = _WAITING if self.ids else _IDLE

    def receive(self, data: bytes) -> None:
        """Take bytes from the child."""
        self._decoder.receive(data)

    @property
    def space(self) -> memoryview | None:
        """Where the next bytes can be read into, None where they must be `receive`d."""
        return self._decoder.space

    def filled(self, count: int) -> None:
        """Note that this many bytes were read into `space`."""
        self._decoder.filled(count)

    @property
    def drawing(self) -> bool:
        """Whether an answer has arrived of which more is to be taken out of the arena, by `next_event`."""
        return self._decoder.drawing

    def hurry(self) -> None:
        """Take answers out of the arena in one go from now on."""
        self._decoder.most = AT_ONCE

    def take_excuse(self) -> int:
        """Return the errno by which the child said since the last time why it did without the arena, or 0."""
        excuse, self._decoder.excuse = self._decoder.excuse, 0
        return excuse

    @property
    def leftover(self) -> bytes:
        """What has arrived and belongs to no event yet."""
        return self._decoder.leftover

    @property
    def pending(self) -> bool:
        """Whether bytes have arrived that belong to no event yet."""
        return self._decoder.pending

    def drop(self) -> None:
        """Drop what has arrived and belongs to no event."""
        self._decoder.drop()

    def next_event(self) -> Event | None:
        """Return the next event, None where bytes are missing, or raise `FrameError`; `Refused` instead of `Shaken`."""
        message = self._decoder.next_message()
        if message is None:
            return None
        given = self.ids[0] if self.ids else 0
        if message.id != given:
            raise FrameError(f"it answered job {message.id}, but it was given job {given}", beginning(message))
        if message.kind == REFUSED and self.stage is Stage.SHAKING:
            raise Refused(message.body[: message.split], message.body[message.split :])
        event = _interpret(message) if self.chunk is None else self._interpret_of_chunk(message)
        stage = None if event is None else TABLE[self.stage].get(type(event))
        if event is None or stage is None:
            name = "a refusal" if event is None else type(event).__name__
            raise FrameError(f"{name} can't come while {self.stage.value}", beginning(message))
        self.stage = stage
        if stage is _IDLE and self.ids:
            self._end_job()
        return event

    def _interpret_of_chunk(self, message: Message) -> Event | None:
        kind, body = message.kind, message.body
        if kind == SOME:
            return Part(b"", body, message.buffers)
        if kind == DONE and len(body) >= DONE_HEAD.size:
            # Now, for the next job may have begun before the caller looks.
            if len(body) == DONE_HEAD.size and self.region is not None:
                body += self.region.results(DONE_HEAD.unpack(body)[1])
            return Replied(b"", body)
        return Failed(body[: message.split], body[message.split :]) if kind == ERROR else None


def _id_of(message: bytes | memoryview) -> int:
    return int.from_bytes(message[ID], "little")


def _whole(kind: int, id_: int, body: bytes = b"") -> bytes:
    return b"".join(encode(kind, id_, body))


_LOOK: Final = _whole(LOOK, 0)


def _interpret(message: Message) -> Event | None:
    kind, body = message.kind, message.body
    if kind == RESULT:
        return Replied(b"", body, False, message.buffers)
    if kind == PART:
        return Part(b"", body, message.buffers)
    if kind == END:
        return Replied(b"", b"", True)
    if kind == ERROR:
        return Failed(body[: message.split], body[message.split :])
    return Shaken(int.from_bytes(body, "little")) if kind == READY else None


class CallRelay(FdRelay):
    """The socket to a Python child, and the arena beside it.

    `complain` is told why the arena could not be had; `drawing` is set while an answer is being taken out of it: then
    there is something to read that no socket knows of.
    """

    drawing = False

    def __init__(self, fd: int, arena: Arena | None, complain: Callable[[str, int], None]) -> None:
        super().__init__(fd, fd, kind="unix")
        self.arena = arena
        self.complain = complain

    async def wait_readable(self) -> None:
        if self.drawing and not self.closed:
            await trio.lowlevel.checkpoint()
        else:
            await super().wait_readable()

    def close(self) -> None:
        super().close()
        if self.arena is not None:
            self.arena.close()


class CallLine(Line):
    """A line to a Python child.

    The buffers of a large job are copied into the arena, and then its message is written: so it can't begin before.
    A job that is given up while that goes on has not started.
    """

    __slots__ = ("_arena", "_calls", "_fds", "_filling", "_frames", "_note_large", "_overdue", "remains")

    def __init__(
        self, relay: FdRelay, conversation: CallConversation, note_large: Callable[[], None] = lambda: None
    ) -> None:
        """Own both. `note_large` is called when the arena is used."""
        super().__init__(relay, conversation)
        self._note_large = note_large
        self._fds = relay
        self._calls = conversation
        self._arena = relay.arena if isinstance(relay, CallRelay) else None
        self._filling: Filling | None = None
        self._frames: Sequence[bytes | memoryview] = ()
        self._overdue = False
        self.remains: tuple[int, tuple[int, int, bytes]] | None = None
        """Of a chunk that its worker died of: its id, and what `Region.remains` found."""

    # writing

    def begin(self, frames: Sequence[bytes | memoryview]) -> str | None:
        """See `Line.begin`."""
        if self._overdue:
            self.give_back()
        if len(frames) == 1:
            return super().begin(frames)
        if self._arena is not None:
            buffers = buffers_of(frames)
            if sum([view.nbytes for view in buffers]) >= IN_ARENA:
                self._filling = Filling(self._arena, buffers)
                self._frames = frames
                self._note_large()
        why = super().begin(frames)
        if why is not None:
            self._drop_filling()
        return why

    def _push(self) -> bool:
        if self._filling is not None and not self._fill():
            return False
        unsent = self._unsent
        while len(unsent) > 1:
            written = self._fds.write_gathered([*islice(unsent, GATHERED)])
            if not written:
                return False
            self._begun = True
            drop_sent(unsent, written)
        return super()._push()

    def _fill(self) -> bool:
        """Copy the next slice of a job into the arena; True when its message can be written."""
        filling, frames, relay = self._filling, self._frames, self._fds
        assert filling is not None
        assert isinstance(relay, CallRelay)
        if not relay.closed:
            try:
                if not filling.go_on(SLICE):
                    return False
            except (OSError, ImportError) as error:
                number = error.errno if isinstance(error, OSError) else None
                relay.complain("", number or errno.ENOSYS)  # and the buffers take the socket
                if self._arena is not None:
                    self._arena.give_back()  # part of it came before there was none left
            else:
                for _ in frames:
                    self._unsent.pop()
                self._unsent.extend(placed(frames))
        self._drop_filling()
        return True

    def _drop_filling(self) -> None:
        self._filling = None
        self._frames = ()

    # the arena

    def give_back(self) -> None:
        """Return the arena's memory to the system: now, where nothing is under way, else before the next job."""
        self._overdue = self._calls.stage is not _IDLE
        if self._arena is not None and not self._overdue:
            self._arena.give_back()

    @property
    def arena_uses(self) -> int:
        """How often the arena was used, in either direction."""
        return 0 if self._arena is None else self._arena.uses

    @property
    def shared_memory(self) -> int:
        """See `Line.shared_memory`."""
        return 0 if self._arena is None else self._arena.used

    def _note_arena(self, *, drew: bool) -> None:
        relay = self._fds
        if self._arena is None or not isinstance(relay, CallRelay):
            return
        relay.drawing = self._calls.drawing
        if drew and not relay.drawing:
            self._arena.note_taken()
            self._note_large()
        if excuse := self._calls.take_excuse():
            relay.complain(" in a worker", excuse)

    # chunks

    @property
    def has_region(self) -> bool:
        """Whether the child can account for chunks; else it runs one item of each."""
        return self._calls.region is not None

    def look(self) -> tuple[int, int, bytes]:
        """Look at the region while a chunk is under way; see `Region.remains`.

        What the child is writing now may be seen in part: only what was the same at the last look is to be believed.
        """
        region, chunk = self._calls.region, self._calls.chunk
        return (0, 0, b"") if region is None or chunk is None else region.remains(chunk)

    def finish(self) -> None:
        """See `Line.finish`: also keep what is left of a chunk, for the region goes with the process."""
        self._calls.hurry()
        super().finish()
        region, chunk = self._calls.region, self._calls.chunk
        if region is not None and chunk is not None:
            self.remains = chunk, region.remains(chunk)

    @property
    def started(self) -> bool | None:
        """See `Line.started`: of a chunk that no item has begun of, nothing has started, whoever has read it."""
        if self.remains is not None and self.whole:
            return self.remains[1][0] > 0
        return super().started

    # reading

    def read(self) -> Event | None:
        """See `Line.read`: large bodies and buffers are read straight into memory of their own."""
        if self._owed:
            self._pay()
        relay, calls = self._fds, self._calls
        if calls.drawing:
            return self._next_event()
        for _ in range(READS_IN_A_ROW):
            space = calls.space
            if space is None:
                data = relay.read_now(READ_SIZE)
                if data is None:
                    return None
                if not data:
                    raise LineEnded
                event = calls.take_whole(data)
                if event is not None:
                    self._answered = True
                    return event
                if len(calls.ids) > 1 and not calls.pending:
                    data = data[calls.take_several(data, self.events) :]
                    if self.events:
                        if data:
                            calls.receive(data)
                        self._answered = True
                        return self.events.popleft()
                calls.receive(data)
            else:
                count = relay.read_into(space)
                space.release()
                if count is None:
                    return None
                if not count:
                    raise LineEnded
                calls.filled(count)
            self._answered = True
            event = self._next_event()
            if event is not None or calls.drawing:
                return event
        return None

    def _next_event(self) -> Event | None:
        drew = self._calls.drawing
        try:
            return super()._next_event()
        finally:
            self._note_arena(drew=drew)

    def close(self) -> None:
        """See `Line.close`."""
        self._drop_filling()
        super().close()


class PacketLine(CallLine):
    """A line to a Python child that takes what lies behind another job as packets, each whole or not at all.

    One read of the child takes exactly one packet, and the pool holds a copy of the child's end, so what the child has
    not read can be taken back with certainty, while it lives and after its death. A job for a child that has nothing to
    do takes the relay, as in every line: only there it waits (in `recv`, who is killed may take a packet that comes
    meanwhile with him). So a job on the relay is always older than the packets, and none is sent before the child has
    read that one. A child that has gone to sleep before a packet came is woken by a `LOOK`.
    """

    __slots__ = ("_head_read", "_in_packet", "_packets", "_packets_fd", "_spare")

    def __init__(
        self,
        relay: FdRelay,
        conversation: CallConversation,
        packets: "Packets",
        note_large: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(relay, conversation, note_large)
        self._packets = packets.ours
        self._packets_fd = packets.ours.fileno()
        self._spare = packets.theirs
        self._in_packet = False
        self._head_read = False

    def begin(self, frames: Sequence[bytes | memoryview]) -> str | None:
        """See `Line.begin`."""
        self._in_packet = self._head_read = False
        return super().begin(frames)

    def begin_ahead(self, frames: Sequence[bytes | memoryview]) -> bool:
        """See `Line.begin_ahead`; also False where nobody can see whether the child is asleep."""
        return self.has_region and super().begin_ahead(frames)

    def flush_behind(self) -> None:
        """See `Line.flush_behind`: each job is a packet of its own."""
        if self.relay.closed:
            return
        if not self._in_packet and not self._head_read:
            if not self.whole or self.relay.unread() is not False:
                return  # the job in front has not been read: when its answer is there, at the latest
            self._head_read = True
        try:
            while self._behind:
                os.write(self._packets_fd, self._behind[0])
                self._set_off()
        except OSError:
            pass  # no room now, or the worker is gone, which whoever reads this line will see
        self._wake_child()

    def _wake_child(self) -> None:
        region = self._calls.region
        if region is not None and region.asleep(self._calls.latest):
            self._say(_LOOK)

    def _push_next(self) -> None:
        self._in_packet = self._head_read = False
        self._said = 0  # it came before this job
        self._calls.latest = _id_of(self._behind[0])
        super()._push_next()

    def take_back(self) -> Collection[int]:
        """See `Line.take_back`."""
        taken: dict[int, bytes] = {}
        with contextlib.suppress(OSError):  # there is no more
            while packet := self._spare.recv(MOST_PACKET, socket.MSG_DONTWAIT):
                taken[_id_of(packet)] = packet
        ids = self._calls.ids
        if ids and len(taken) == len(ids):
            self._packets.send(taken.pop(ids[0]))  # not even the job in front has been read: it stays
            self._wake_child()
        # The child may have read one while we did: the job in front is among ours then, and that one is not.
        self._calls.ids = deque(id_ for id_ in ids if id_ not in taken)
        self._under_way -= len(taken)
        found = [*taken, *map(_id_of, self._behind)]
        self._behind.clear()
        return found

    def is_of(self, job: Sequence[bytes | memoryview], ids: Collection[int]) -> bool:
        """See `Line.is_of`."""
        return bool(job) and _id_of(job[0]) in ids

    def turn(self, *, more: bool) -> None:
        """See `Line.turn`."""
        self._in_packet = True
        super().turn(more=more)

    @property
    def started(self) -> bool | None:
        """See `Line.started`."""
        if self.answered or not self._in_packet:
            return super().started
        return self._begun and not _platform.HERE.unread_packets(self._spare.fileno())

    def unread_jobs(self, sizes: Sequence[int]) -> list[bool | None]:
        """See `Line.unread_jobs`: what was unread has been taken back, but for the job in front."""
        unread: list[bool | None] = [False] * len(sizes)
        if sizes:
            started = self.started
            unread[0] = None if started is None else not started
        return unread

    def close(self) -> None:
        """See `Line.close`."""
        super().close()
        self._packets_fd = -1  # the number may be another file's from now on
        self._packets.close()
        self._spare.close()


class Packets(NamedTuple):
    """A pair of sockets for packets: our end, and a copy of the child's."""

    ours: socket.socket
    theirs: socket.socket
