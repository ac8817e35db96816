"""The pool's side of a conversation with its own Python child, and its lines: large answers are read in place.

The stages and what may come in each are those of every conversation (`TABLE`); what differs is the messages
(`_calls.py`), and that an answer must carry the id of the job it answers.
"""

import contextlib
import socket
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from . import _platform
from ._calls import (
    END,
    ERROR,
    FROM_CHILD,
    HELLO,
    LOOK,
    MOST_PACKET,
    PART,
    READY,
    REFUSED,
    RESULT,
    STOP,
    STOP_STREAM,
    Decoder,
    Message,
    beginning,
    encode,
)
from ._conversation import TABLE, Event, Failed, Part, Refused, Replied, Shaken, Stage
from ._goridge import FrameError
from ._relay import READ_SIZE, READS_IN_A_ROW, FdRelay, Line, LineEnded

_ID: Final = slice(8, 12)
"""Where a message has its id."""

_IDLE: Final = Stage.IDLE
_WAITING: Final = Stage.WAITING


class CallConversation:
    """One connection to a Python child: give it the bytes that came, take the events they make."""

    stray = "A job must leave alone the descriptors that it did not open: one of them is the pool's."

    def __init__(self, hello: bytes, max_frame_size: int) -> None:
        self.answers: deque[bytes] = deque()
        self.stage = Stage.SHAKING
        self._hello = hello
        self._decoder = Decoder(FROM_CHILD, max_frame_size)
        self.ids: deque[int] = deque()

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
        if self.stage is _IDLE:
            self.stage = _WAITING
        elif not self.ids:
            raise FrameError(f"a job can't come while {self.stage.value}", self.leftover)
        self.ids.append(_id_of(frames[0]))

    def take_whole(self, data: bytes) -> Event | None:
        """Take bytes from the child where they are a whole small result and nothing else, the usual case; else None."""
        if self.stage is not _WAITING:
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
        event = _interpret(message)
        stage = None if event is None else TABLE[self.stage].get(type(event))
        if event is None or stage is None:
            name = "a refusal" if event is None else type(event).__name__
            raise FrameError(f"{name} can't come while {self.stage.value}", beginning(message))
        self.stage = stage
        if stage is _IDLE and self.ids:
            self._end_job()
        return event


def _id_of(message: bytes | memoryview) -> int:
    return int.from_bytes(message[_ID], "little")


def _whole(kind: int, id_: int, body: bytes = b"") -> bytes:
    return b"".join(encode(kind, id_, body))


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


class CallLine(Line):
    """A line to a Python child."""

    __slots__ = ("_calls", "_fds")

    def __init__(self, relay: FdRelay, conversation: CallConversation) -> None:
        super().__init__(relay, conversation)
        self._fds = relay
        self._calls = conversation

    def read(self) -> Event | None:
        """See `Line.read`: large bodies and buffers are read straight into memory of their own."""
        if self._owed:
            self._pay()
        relay, calls = self._fds, self._calls
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
            if event is not None:
                return event
        return None


class PacketLine(CallLine):
    """A line to a Python child whose small jobs go as packets, each whole or not at all, beside the relay.

    One read of the child takes exactly one packet, and the pool holds a copy of the child's end, so what the child has
    not read can be taken back with certainty, while it lives and after its death. What is no small job goes over the
    relay, behind a packet that says so (`LOOK`).
    """

    __slots__ = ("_in_packet", "_packets", "_spare")

    def __init__(self, relay: FdRelay, conversation: CallConversation, packets: "Packets") -> None:
        super().__init__(relay, conversation)
        self._packets = packets.ours
        self._spare = packets.theirs
        self._in_packet = False

    def begin(self, frames: Sequence[bytes | memoryview]) -> str | None:
        """See `Line.begin`."""
        relay = self.relay
        small = len(frames) == 1 and len(frames[0]) <= MOST_PACKET
        if small and not self._owed and not relay.closed:
            self._begun = self._answered = False
            if relay.has_input():
                return self._stale()
            try:
                self._packets.send(frames[0])
            except OSError as error:
                return f"the worker can't be given a job ({error})"
            self._calls.begin_job(frames)
            self._begun = self._in_packet = True
            return None
        self._in_packet = False
        if relay.closed:
            return "the relay is closed"
        if relay.has_input():
            return self._stale()
        try:
            self._packets.send(LOOK)
        except OSError as error:
            return f"the worker can't be given a job ({error})"
        return super().begin(frames)

    def begin_ahead(self, frames: Sequence[bytes | memoryview]) -> bool:
        """See `Line.begin_ahead`."""
        try:
            self._packets.send(frames[0])
        except OSError:
            return False
        self._calls.begin_job(frames)
        return True

    def take_back(self) -> Collection[int]:
        """See `Line.take_back`."""
        taken: dict[int, bytes] = {}
        with contextlib.suppress(OSError):  # there is no more
            while packet := self._spare.recv(MOST_PACKET, socket.MSG_DONTWAIT):
                taken[_id_of(packet)] = packet
        ids = self._calls.ids
        if ids and len(taken) == len(ids):
            self._packets.send(taken.pop(ids[0]))  # not even the job in front has been read: it stays
        # The child may have read one while we did: the job in front is among ours then, and that one is not.
        self._calls.ids = deque(id_ for id_ in ids if id_ not in taken)
        return taken

    def is_of(self, job: Sequence[bytes | memoryview], ids: Collection[int]) -> bool:
        """See `Line.is_of`."""
        return _id_of(job[0]) in ids

    def turn(self) -> None:
        """See `Line.turn`."""
        self._answered = self._calls.pending
        self._in_packet = True

    def stop_worker(self) -> None:
        """See `Line.stop_worker`."""
        with contextlib.suppress(OSError):  # then it has read nothing for long, and is killed when its time is up
            self._packets.send(self._calls.stop())

    @property
    def started(self) -> bool | None:
        """See `Line.started`."""
        if self._answered or not self._in_packet:
            return super().started
        return self._begun and not _platform.HERE.unread_packets(self._spare.fileno())

    def unread_jobs(self, sizes: Sequence[int]) -> list[bool | None]:
        """See `Line.unread_jobs`: what was unread has been taken back, but for the job in front."""
        unread: list[bool | None] = [False] * len(sizes)
        if sizes and _platform.HERE.unread_packets(self._spare.fileno()):
            unread[0] = True
        return unread

    def close(self) -> None:
        """See `Line.close`."""
        super().close()
        self._packets.close()
        self._spare.close()


class Packets(NamedTuple):
    """A pair of sockets for packets: our end, and a copy of the child's."""

    ours: socket.socket
    theirs: socket.socket
