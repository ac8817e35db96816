"""The pool's side of a conversation with one worker, without I/O.

Theory. A connection is always in one of five states, and what a frame *is* depends on the state it comes in: the
dialects have no message types of their own beyond control, error and payload. `TABLE` is the whole of it: for each
state, which events may come and where they lead. What the pool says (`begin_job`) moves along the same table. Jobs that
lie behind one another are counted: where one ends and another lies behind it, IDLE is passed by at once. An event
that the table does not list is a `FrameError`, whoever is to blame, and there is no way on from there: a connection
that has been refused once is never used again.

    SHAKING    the handshake is out, the worker's is awaited
    IDLE       the worker owes nothing; any byte from it is too many
    WAITING    a job is out, the first frame of its outcome is awaited
    BODY       goridge-1 and -2: the reply's context has come, its body is awaited
    STREAMING  goridge-3: a part has come and said that more follow

In goridge-3 a reply is one frame; in the older dialects two, so their WAITING goes through BODY. The pool's own frames
are encoded before a worker is known (`encode_job`), so that a job too large for `max_frame_size` fails where it was
submitted.
"""

import enum
import json
import os
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from ._goridge import (
    BARE_3,
    CONTROL,
    ERROR,
    JOB_3,
    MORE,
    NONE,
    OLD_CONTROL,
    OLD_ERROR,
    PING,
    PONG,
    RAW,
    STOP,
    STREAM_STOP,
    Decoder,
    Frame,
    FrameError,
    encode_control,
    frame_3,
)


class Shaken(NamedTuple):
    """The worker's half of the handshake: the pid it claims."""

    pid: int


class Replied(NamedTuple):
    """A whole reply, or the last part of a streamed one (`streamed`). `buffers`: of our own Python child's only."""

    context: bytes
    body: bytes
    streamed: bool = False
    buffers: Sequence[bytes | bytearray] = ()


class Part(NamedTuple):
    """A part of a streamed reply; more follow."""

    context: bytes
    body: bytes
    buffers: Sequence[bytes | bytearray] = ()


class Failed(NamedTuple):
    """A job error: the worker is fine. `exception`: the error itself, pickled, from our own Python child."""

    message: bytes
    exception: bytes = b""


class StopAsked(NamedTuple):
    """The worker did not run the job and asks to be replaced."""


class Refused(FrameError):
    """Our own Python child could not become ready: `message` says why, `exception` is the error itself, pickled."""

    def __init__(self, message: bytes, exception: bytes = b"") -> None:
        super().__init__("it could not become ready", b"")
        self.message = message
        self.exception = exception


Event = Shaken | Replied | Part | Failed | StopAsked


class Stage(enum.Enum):
    """Where a conversation is."""

    SHAKING = "waiting for the handshake"
    IDLE = "idle"
    WAITING = "waiting for the reply"
    BODY = "waiting for the reply's body"
    STREAMING = "in the middle of a streamed reply"


TABLE: Final[dict[Stage, dict[type[Event] | str, Stage]]] = {
    Stage.SHAKING: {Shaken: Stage.IDLE},
    Stage.IDLE: {"job": Stage.WAITING},
    Stage.WAITING: {
        "context": Stage.BODY,
        Replied: Stage.IDLE,
        Failed: Stage.IDLE,
        StopAsked: Stage.IDLE,
        Part: Stage.STREAMING,
    },
    Stage.BODY: {Replied: Stage.IDLE, StopAsked: Stage.IDLE},
    Stage.STREAMING: {Part: Stage.STREAMING, Replied: Stage.IDLE, Failed: Stage.IDLE},
}

# The first bytes that may come in each state. In the older dialects byte 0 is the flags, so they are judged whole.
_LEGAL_OLD: Final = {
    Stage.SHAKING: frozenset((OLD_CONTROL, OLD_CONTROL | RAW)),
    Stage.IDLE: frozenset[int](),
    Stage.WAITING: frozenset((OLD_CONTROL | RAW, OLD_CONTROL | NONE, OLD_CONTROL | OLD_ERROR | RAW)),
    Stage.BODY: frozenset((RAW, NONE)),
    Stage.STREAMING: frozenset[int](),
}
_LEGAL_3: Final = {
    Stage.SHAKING: frozenset((BARE_3,)),
    Stage.IDLE: frozenset[int](),
    Stage.WAITING: frozenset((BARE_3, JOB_3)),
    Stage.BODY: frozenset[int](),
    Stage.STREAMING: frozenset((BARE_3, JOB_3)),
}


class _Row:
    """A row of the table, ready for use: the stage, the first bytes legal in it, and the rows that events lead to."""

    __slots__ = ("legal", "moves", "stage")

    def __init__(self, stage: Stage, legal: frozenset[int]) -> None:
        self.stage = stage
        self.legal = legal
        self.moves: dict[type[Event] | str, _Row] = {}


def _rows(legal: dict[Stage, frozenset[int]]) -> _Row:
    rows = {stage: _Row(stage, legal[stage]) for stage in Stage}
    for stage, moves in TABLE.items():
        rows[stage].moves.update({what: rows[then] for what, then in moves.items()})
    return rows[Stage.SHAKING]


_START_OLD: Final = _rows(_LEGAL_OLD)
_START_3: Final = _rows(_LEGAL_3)
_SHAKING: Final = Stage.SHAKING
_IDLE: Final = Stage.IDLE
_WAITING: Final = Stage.WAITING
_STREAMING: Final = Stage.STREAMING
_NO_BITS: Final = frozenset((0,))
_REPLY_BITS: Final = frozenset((0, MORE, PING, MORE | PING))

HANDSHAKE_LIMIT: Final = 1024
"""Largest handshake believed, in bytes: `{"pid":N}` takes 20, and a stranger on a listener gets no more of our
memory."""

_STRAY_TEXT: Final = (
    "Text on the relay usually means that the program, or a warning of its interpreter, wrote to stdout; "
    "let it write to stderr instead."
)

STOP_STREAM: Final = frame_3(0, b"", STREAM_STOP)
PONG_FRAME: Final = frame_3(0, b"", PONG)


class Talk(Protocol):
    """What a `Line` needs of a conversation, in whatever dialect."""

    answers: deque[bytes]
    stray: str
    """What text on the relay usually means, and what to do about it."""

    @property
    def stage(self) -> Stage: ...
    @property
    def leftover(self) -> bytes: ...
    @property
    def pending(self) -> bool: ...
    def handshake(self) -> bytes: ...
    def stop(self) -> bytes: ...
    def stop_stream(self) -> bytes: ...
    def begin_job(self, frames: Sequence[bytes | memoryview]) -> None: ...
    def begin_behind(self, frames: Sequence[bytes | memoryview]) -> None: ...
    def take_several(self, data: bytes, events: deque[Event]) -> int: ...
    def receive(self, data: bytes) -> None: ...
    def next_event(self) -> Event | None: ...
    def drop(self) -> None: ...


class Conversation:
    """One connection's state: give it the bytes that came, take the events they make.

    `begin_job` tells it that the pool has begun to write a job. `answers` collects what the protocol obliges us to
    write back (pongs).
    """

    __slots__ = ("_behind", "_context", "_decoder", "_limit", "_old", "_row", "answers", "protocol", "stray")

    def __init__(self, protocol: str, max_frame_size: int) -> None:
        self.protocol: str = protocol
        self.stray: str = _STRAY_TEXT
        self.answers: deque[bytes] = deque()
        self._old = protocol != "goridge-3"
        self._row = _START_OLD if self._old else _START_3
        self._limit = max_frame_size
        self._context = b""
        self._behind = 0
        self._decoder = Decoder(protocol, HANDSHAKE_LIMIT, self._row.legal, _NO_BITS)

    def __repr__(self) -> str:
        return f"<Conversation {self.protocol}: {self.stage.value}>"

    @property
    def stage(self) -> Stage:
        """Where it is."""
        return self._row.stage

    def handshake(self) -> bytes:
        """Return the frame that opens the conversation: the pool's own pid."""
        return encode_control(self.protocol, b'{"pid":%d}' % os.getpid())

    def stop(self) -> bytes:
        """Return the frame that ends a worker softly."""
        return encode_control(self.protocol, STOP)

    def stop_stream(self) -> bytes:
        """Return the frame that asks the worker to end its streamed reply."""
        return STOP_STREAM

    def begin_job(self, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Note that a job is on its way to the worker."""
        self._move("job")

    def begin_behind(self, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Note that another job is on its way to the worker, behind those that it has not answered yet."""
        if self._row.stage is _IDLE:  # their answers have been taken apart, though not told of yet
            self._move("job")
        else:
            self._behind += 1

    def take_several(self, data: bytes, events: deque[Event]) -> int:
        """Take the whole plain replies at the front of these bytes; return how many bytes they were.

        Nothing else may be pending. What is none of the usual case is left to `receive`.
        """
        end = 0
        if self._row.stage is _WAITING and not self._old:
            for context, body, then in self._decoder.plain_replies(data, self._behind + 1):
                if not body and context == STOP:
                    break
                events.append(Replied(context, body))
                end = then
                self._move(Replied)
        return end

    def receive(self, data: bytes) -> None:
        """Take bytes from the worker."""
        self._decoder.receive(data)

    def next_event(self) -> Event | None:
        """Return the next event, None where bytes are missing, or raise `FrameError`."""
        while (frame := self._decoder.next_frame()) is not None:
            event = self._interpret_old(frame) if self._old else self._interpret(frame)
            if event is not None:
                return event
        return None

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

    def _move(self, what: type[Event] | str) -> None:
        row = self._row.moves.get(what)
        if row is None:
            name = what if isinstance(what, str) else what.__name__
            raise FrameError(f"{name} can't come while {self.stage.value}", self._decoder.leftover)
        if self._behind and row.stage is _IDLE:
            self._behind -= 1
            row = row.moves["job"]
        self._row = row
        self._decoder.legal = row.legal

    def _interpret(self, frame: Frame) -> Event | None:
        flags = frame.flags
        stage = self._row.stage
        event: Event
        if stage is _SHAKING:
            if not flags & CONTROL:
                raise FrameError("the handshake is not a control frame", frame.body)
            return self._shake(frame.body)
        if flags & CONTROL:
            raise FrameError(f"a control frame can't come while {self.stage.value}", frame.body)
        bits = frame.bits
        if bits & PING:
            self.answers.append(PONG_FRAME)
        if flags & ERROR:
            if bits & MORE:
                raise FrameError("an error frame can't say that more parts follow", frame.body)
            event = Failed(frame.body)
        elif bits & MORE:
            event = Part(frame.context, frame.body)
        elif stage is _WAITING and not frame.body and frame.context == STOP:
            event = StopAsked()
        else:
            event = Replied(frame.context, frame.body, stage is _STREAMING)
        self._move(type(event))
        return event

    def _interpret_old(self, frame: Frame) -> Event | None:
        flags = frame.flags
        if self.stage is _SHAKING:
            return self._shake(frame.body)
        event: Event
        if self.stage is _WAITING:
            if not flags & OLD_ERROR:
                self._context = frame.body
                self._move("context")
                return None
            event = Failed(frame.body)
        elif not frame.body and self._context == STOP:
            event = StopAsked()
        else:
            event = Replied(self._context, frame.body)
        self._context = b""
        self._move(type(event))
        return event

    def _shake(self, payload: bytes) -> Event:
        try:
            pid = json.loads(payload)["pid"]
        except (ValueError, TypeError, KeyError, RecursionError):
            pid = None
        if not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid < 1 << 31:
            raise FrameError('the handshake is not {"pid":N}', payload)
        self._move(Shaken)
        self._decoder.max_frame_size = self._limit
        self._decoder.legal_bits = _NO_BITS if self._old else _REPLY_BITS
        return Shaken(pid)
