"""The conversation with a Python child, and the line that carries it: every answer in every stage, and the lies."""

import mmap
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import pytest
import trio

from trio_workers import _platform
from trio_workers._arena import SLICE, Arena, Filling, Kept
from trio_workers._call_line import CallConversation, CallLine, CallRelay
from trio_workers._calls import (
    CALL,
    CALLS,
    DONE,
    END,
    ERROR,
    FROM_CHILD,
    FROM_POOL,
    HELLO,
    PART,
    READY,
    REFUSED,
    RESULT,
    SOME,
    STOP,
    STOP_STREAM,
    STREAM,
    Decoder,
    Message,
    encode,
    placed,
)
from trio_workers._conversation import Event, Failed, Part, Refused, Replied, Shaken, Stage
from trio_workers._goridge import FrameError
from trio_workers._region import DONE_HEAD, RESULTS, SIZE, Region
from trio_workers._relay import READ_SIZE, READS_IN_A_ROW, FdRelay, LineEnded

LIMIT: Final = 64 << 20
HELLO_BODY: Final = b"all that a child must know"
PID: Final = 4321
SHAKEN: Final = b"".join(encode(READY, 0, PID.to_bytes(8, "little")))
STAGES: Final = [stage for stage in Stage if stage is not Stage.BODY]  # which this dialect has not

Pieces = Sequence[bytes | memoryview]


def whole(kind: int, id_: int, body: bytes = b"", buffers: Sequence[bytes | bytearray] = (), split: int = 0) -> bytes:
    return b"".join(encode(kind, id_, body, [memoryview(buffer) for buffer in buffers], split))


def call(id_: int, body: bytes = b"call", buffers: Sequence[bytes | bytearray] = ()) -> Pieces:
    return encode(CALL, id_, body, [memoryview(buffer) for buffer in buffers])


def shown(event: Event | None) -> object:
    """An event in a form that compares: what came in, not in which kind of memory."""
    if isinstance(event, Replied | Part):
        return type(event)(event.context, bytes(event.body), *event[2:-1], [bytes(buffer) for buffer in event.buffers])  # type: ignore[arg-type]
    return event


def replied(body: bytes, *buffers: bytes, streamed: bool = False) -> object:
    return shown(Replied(b"", body, streamed, buffers))


def part(body: bytes, *buffers: bytes) -> object:
    return shown(Part(b"", body, buffers))


def in_stage(stage: Stage, id_: int = 7) -> CallConversation:
    """A conversation brought to a stage by what a child would send."""
    conversation = CallConversation(HELLO_BODY, LIMIT)
    if stage is Stage.SHAKING:
        return conversation
    conversation.receive(SHAKEN)
    assert conversation.next_event() == Shaken(PID)
    if stage is not Stage.IDLE:
        conversation.begin_job(call(id_))
    if stage is Stage.STREAMING:
        conversation.receive(whole(PART, id_, b"first"))
        assert shown(conversation.next_event()) == part(b"first")
    assert conversation.stage is stage
    assert not conversation.pending
    assert not conversation.answers
    return conversation


# --- the table ------------------------------------------------------------------------------------------------------

ANSWERS: Final = {
    "ready": (READY, PID.to_bytes(8, "little"), 0),
    "result": (RESULT, b"body", 0),
    "empty result": (RESULT, b"", 0),
    "part": (PART, b"body", 0),
    "end": (END, b"", 0),
    "error": (ERROR, b"textexception", 4),
    "error without exception": (ERROR, b"text", 4),
    "refused": (REFUSED, b"textexception", 4),
    "some results": (SOME, b"results", 0),  # these two only answer a chunk
    "a chunk's end": (DONE, DONE_HEAD.pack(1, 7, 1000) + b"results", 0),
}
OUTCOMES: Final[dict[tuple[Stage, str], tuple[object, Stage]]] = {
    (Stage.SHAKING, "ready"): (Shaken(PID), Stage.IDLE),
    (Stage.WAITING, "result"): (replied(b"body"), Stage.IDLE),
    (Stage.WAITING, "empty result"): (replied(b""), Stage.IDLE),
    (Stage.WAITING, "part"): (part(b"body"), Stage.STREAMING),
    (Stage.WAITING, "end"): (replied(b"", streamed=True), Stage.IDLE),
    (Stage.WAITING, "error"): (Failed(b"text", b"exception"), Stage.IDLE),
    (Stage.WAITING, "error without exception"): (Failed(b"text", b""), Stage.IDLE),
    (Stage.STREAMING, "result"): (replied(b"body"), Stage.IDLE),
    (Stage.STREAMING, "empty result"): (replied(b""), Stage.IDLE),
    (Stage.STREAMING, "part"): (part(b"body"), Stage.STREAMING),
    (Stage.STREAMING, "end"): (replied(b"", streamed=True), Stage.IDLE),
    (Stage.STREAMING, "error"): (Failed(b"text", b"exception"), Stage.IDLE),
    (Stage.STREAMING, "error without exception"): (Failed(b"text", b""), Stage.IDLE),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_every_answer_in_every_stage(stage: Stage, answer: str, chunk: int) -> None:
    """What the table lists leads where it says; anything else is an error, and leads nowhere."""
    kind, body, split = ANSWERS[answer]
    conversation = in_stage(stage)
    data = whole(kind, 7 if stage in (Stage.WAITING, Stage.STREAMING) else 0, body, split=split)
    for start in range(0, len(data), chunk):
        assert conversation.next_event() is None
        conversation.receive(data[start : start + chunk])
    if (stage, answer) == (Stage.SHAKING, "refused"):
        with pytest.raises(Refused, match="could not become ready") as refused:
            conversation.next_event()
        assert (refused.value.message, refused.value.exception) == (b"text", b"exception")
    elif (stage, answer) in OUTCOMES:
        event, after = OUTCOMES[stage, answer]
        assert shown(conversation.next_event()) == event
        assert conversation.stage is after
        assert not conversation.pending
    else:
        with pytest.raises(FrameError, match=f"can't come while {stage.value}") as caught:
            conversation.next_event()
        # That it could not become ready is something to be said before it was, and nothing afterwards.
        assert not isinstance(caught.value, Refused)
        assert conversation.stage is stage


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_short_cut_leads_to_the_same_place(stage: Stage, answer: str) -> None:
    """`take_whole` gives the event that `receive` and `next_event` give, declines, or raises the same error."""
    kind, body, split = ANSWERS[answer]
    data = whole(kind, 7 if stage in (Stage.WAITING, Stage.STREAMING) else 0, body, split=split)
    long_way, short_cut = in_stage(stage), in_stage(stage)

    def by_the_long_way(conversation: CallConversation) -> object:
        conversation.receive(data)
        return shown(conversation.next_event())

    def by_the_short_cut(conversation: CallConversation) -> object:
        event = conversation.take_whole(data)
        return by_the_long_way(conversation) if event is None else shown(event)

    def outcome(way: object, conversation: CallConversation) -> object:
        try:
            return way(conversation)  # type: ignore[operator]
        except FrameError as error:
            return type(error), str(error)

    assert outcome(by_the_long_way, long_way) == outcome(by_the_short_cut, short_cut)
    assert long_way.stage is short_cut.stage


@pytest.mark.parametrize("stage", [Stage.WAITING, Stage.STREAMING])
@pytest.mark.parametrize("kind", [RESULT, PART, END, ERROR])
@pytest.mark.parametrize("id_", [0, 6, 8, 2**32 - 1])
@pytest.mark.parametrize("short_cut", [False, True])
def test_an_answer_to_another_job(stage: Stage, kind: int, id_: int, short_cut: bool) -> None:
    """The worst fault of all: what answers another job is nobody's result, and the error names both."""
    conversation = in_stage(stage, id_=7)
    with pytest.raises(FrameError, match=f"it answered job {id_}, but it was given job 7"):
        if not short_cut or conversation.take_whole(whole(kind, id_, b"secret")) is None:
            conversation.receive(whole(kind, id_, b"secret"))
            conversation.next_event()
    assert conversation.stage is stage


@pytest.mark.parametrize("stage", [Stage.SHAKING, Stage.IDLE])
def test_an_answer_to_a_job_before_there_is_one(stage: Stage) -> None:
    """No id is right before the first job."""
    conversation = in_stage(stage)
    conversation.receive(whole(RESULT, 7, b"body"))
    with pytest.raises(FrameError, match="it answered job 7"):
        conversation.next_event()


def test_an_answer_to_the_job_before() -> None:
    """A worker that answers twice: the second answer is no answer to the next job."""
    conversation = in_stage(Stage.WAITING, id_=7)
    conversation.receive(whole(RESULT, 7, b"one"))
    assert shown(conversation.next_event()) == replied(b"one")
    conversation.begin_job(call(8))
    conversation.receive(whole(RESULT, 7, b"one again"))
    with pytest.raises(FrameError, match="it answered job 7, but it was given job 8"):
        conversation.next_event()


def test_one_answer_too_many() -> None:
    """It is seen as soon as it is there: it is pending, and what it is can be shown."""
    conversation = in_stage(Stage.WAITING)
    second = whole(RESULT, 7, b"two")
    conversation.receive(whole(RESULT, 7, b"one") + second)
    assert shown(conversation.next_event()) == replied(b"one")
    assert conversation.pending
    assert conversation.leftover
    assert second.startswith(conversation.leftover)


def test_text_instead_of_an_answer() -> None:
    """What a job wrote on the relay is shown."""
    conversation = in_stage(Stage.WAITING)
    conversation.receive(b"Hello")
    with pytest.raises(FrameError, match="begin no message; the bytes received begin b'Hello'"):
        conversation.next_event()


def test_no_job_while_one_runs() -> None:
    """One at a time."""
    conversation = in_stage(Stage.WAITING)
    with pytest.raises(FrameError, match="job can't come while waiting for the reply"):
        conversation.begin_job(call(8))
    with pytest.raises(FrameError, match="job can't come while in the middle of a streamed reply"):
        in_stage(Stage.STREAMING).begin_job(call(8))
    with pytest.raises(FrameError, match="job can't come while waiting for the handshake"):
        in_stage(Stage.SHAKING).begin_job(call(8))


def decoded(data: bytes) -> Message:
    decoder = Decoder(FROM_POOL, LIMIT)
    decoder.receive(data)
    message = decoder.next_message()
    assert message is not None
    assert not decoder.pending
    return message


def test_what_the_pool_says() -> None:
    """The hello carries what the child must know; the stop of a stream names its job."""
    conversation = in_stage(Stage.STREAMING, id_=2**32 - 1)
    hello = decoded(conversation.handshake())
    assert (hello.kind, hello.id, hello.body) == (HELLO, 0, HELLO_BODY)
    stop = decoded(conversation.stop())
    assert (stop.kind, stop.id, stop.body) == (STOP, 0, b"")
    stop = decoded(conversation.stop_stream())
    assert (stop.kind, stop.id, stop.body) == (STOP_STREAM, 2**32 - 1, b"")


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_job_after_job(chunk: int) -> None:
    """Results, errors and streams one after the other, in whatever pieces they come."""
    conversation = in_stage(Stage.IDLE)
    for id_, data, expected in (
        (1, whole(RESULT, 1, b"body"), [replied(b"body")]),
        (2, whole(RESULT, 2, b"body", [bytearray(b"one"), b"two"]), [replied(b"body", b"one", b"two")]),
        (3, whole(ERROR, 3, b"boom", split=4), [Failed(b"boom")]),
        (4, whole(PART, 4, b"1", [b"with"]) + whole(PART, 4, b"2") + whole(END, 4), None),
        (5, whole(PART, 5, b"1") + whole(ERROR, 5, b"boom", split=2), [part(b"1"), Failed(b"bo", b"om")]),
        (6, whole(END, 6), [replied(b"", streamed=True)]),
        (0, whole(RESULT, 0), [replied(b"")]),
    ):
        if expected is None:
            expected = [part(b"1", b"with"), part(b"2"), replied(b"", streamed=True)]
        conversation.begin_job(call(id_))
        found: list[object] = []
        for start in range(0, len(data), chunk):
            conversation.receive(data[start : start + chunk])
            while (event := conversation.next_event()) is not None:
                found.append(shown(event))
        assert found == expected
        assert conversation.stage is Stage.IDLE
        assert not conversation.pending


def test_drop() -> None:
    """What a dead worker left in the middle of a message goes."""
    conversation = in_stage(Stage.WAITING)
    conversation.receive(whole(RESULT, 7, b"body")[:-1])
    assert conversation.pending
    conversation.drop()
    assert not conversation.pending
    assert conversation.leftover == b""
    assert conversation.space is None


def test_it_says_where_it_is() -> None:
    """`repr` shows the stage."""
    assert repr(in_stage(Stage.IDLE)) == "<CallConversation: idle>"
    assert repr(in_stage(Stage.STREAMING)) == "<CallConversation: in the middle of a streamed reply>"


# --- jobs behind one another ----------------------------------------------------------------------------------------


def with_jobs(*ids: int) -> CallConversation:
    """A conversation in which these jobs are on their way, the first in front."""
    conversation = in_stage(Stage.WAITING, ids[0])
    for id_ in ids[1:]:
        conversation.begin_behind(call(id_))
    assert conversation.stage is Stage.WAITING
    return conversation


MIXED: Final = (
    whole(RESULT, 1, b"one"),
    whole(ERROR, 2, b"boom", split=2),
    whole(PART, 3, b"1"),
    whole(PART, 3, b"2", [b"with"]),
    whole(END, 3),
    whole(RESULT, 4, b"four", [bytearray(b"buffer"), b"other"]),
    whole(RESULT, 5, bytes(50_000)),
    whole(RESULT, 6),
)
MIXED_EVENTS: Final = [
    replied(b"one"),
    Failed(b"bo", b"om"),
    part(b"1"),
    part(b"2", b"with"),
    replied(b"", streamed=True),
    replied(b"four", b"buffer", b"other"),
    replied(bytes(50_000)),
    replied(b""),
]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 1 << 20])
def test_answers_come_in_the_order_of_the_jobs(chunk: int) -> None:
    """Of every kind, in whatever pieces; the worker is idle when the last has been answered, and not before."""
    conversation = with_jobs(1, 2, 3, 4, 5, 6)
    data = b"".join(MIXED)
    found: list[object] = []
    for start in range(0, len(data), chunk):
        conversation.receive(data[start : start + chunk])
        while (event := conversation.next_event()) is not None:
            found.append(shown(event))
            assert (conversation.stage is Stage.IDLE) == (len(found) == len(MIXED))
            assert (conversation.stage is Stage.STREAMING) == (len(found) in (3, 4))
    assert found == MIXED_EVENTS
    assert not conversation.pending
    assert not conversation.ids


@pytest.mark.parametrize("kind", [RESULT, ERROR, PART])
@pytest.mark.parametrize("given", [1, 2, 3, 7])
def test_an_answer_out_of_turn(given: int, kind: int) -> None:
    """To one that has been answered, to one whose turn it is not, to none: it is nobody's, and the error names both."""
    conversation = with_jobs(1, 2, 3)
    conversation.receive(whole(RESULT, 1, b"one") + whole(kind, given, b"secret"))
    assert shown(conversation.next_event()) == replied(b"one")
    if given == 2:
        assert conversation.next_event() is not None
        return
    with pytest.raises(FrameError, match=f"it answered job {given}, but it was given job 2"):
        conversation.next_event()
    assert list(conversation.ids) == [2, 3]


def test_a_job_behind_answers_that_are_not_told_of_yet() -> None:
    """All that were on their way have been taken apart: what comes behind them is awaited all the same."""
    conversation = with_jobs(1, 2)
    events: deque[Event] = deque()
    data = whole(RESULT, 1, b"one") + whole(RESULT, 2, b"two")
    assert conversation.take_several(data, events) == len(data)
    assert conversation.stage is Stage.IDLE
    conversation.begin_behind(call(3))
    assert conversation.stage is Stage.WAITING
    assert conversation.take_whole(whole(RESULT, 3, b"three")) == Replied(b"", b"three")
    assert conversation.stage is Stage.IDLE


BEHIND_TWO: Final = {
    "nothing": b"",
    "half a header": whole(RESULT, 3, b"three")[:20],
    "half a result": whole(RESULT, 3, b"three")[:-1],
    "an error": whole(ERROR, 3, b"boom", split=4),
    "a part": whole(PART, 3, b"part"),
    "a result with buffers": whole(RESULT, 3, b"three", [b"buffer"]),
    "an answer to another": whole(RESULT, 4, b"four"),
    "text": b"Hello from print, which is longer than a header\n",
    "a call": whole(CALL, 3, b"call"),
}


@pytest.mark.parametrize("what", BEHIND_TWO)
def test_several_at_once(what: str) -> None:
    """The short cut takes the small results in front, one for each job; it leaves what comes behind to the long way."""
    conversation = with_jobs(1, 2, 3)
    events: deque[Event] = deque()
    front = whole(RESULT, 1, b"one") + whole(RESULT, 2, b"")
    assert conversation.take_several(front + BEHIND_TWO[what], events) == len(front)
    assert [shown(event) for event in events] == [replied(b"one"), replied(b"")]
    assert list(conversation.ids) == [3]
    assert conversation.stage is Stage.WAITING
    assert not conversation.pending


def test_no_more_at_once_than_there_are_jobs() -> None:
    """An answer too many is left over, whatever its id."""
    conversation = with_jobs(1, 2)
    events: deque[Event] = deque()
    front = whole(RESULT, 1, b"one") + whole(RESULT, 2, b"two")
    assert conversation.take_several(front + whole(RESULT, 2, b"again"), events) == len(front)
    assert len(events) == 2
    assert conversation.stage is Stage.IDLE


# --- the line, over a socket pair -----------------------------------------------------------------------------------


class Counting(FdRelay):
    """A relay that notes how it was read."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, fd, kind="unix")
        self.reads: list[tuple[str, int]] = []

    def read_now(self, size: int) -> bytes | None:
        data = super().read_now(size)
        if data:
            self.reads.append(("received", len(data)))
        return data

    def read_into(self, space: memoryview) -> int | None:
        count = super().read_into(space)
        if count:
            self.reads.append(("in place", count))
        return count


@contextmanager
def lines() -> Iterator[tuple[CallLine, socket.socket]]:
    """A line, and the child's end of its relay."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    relay = Counting(ours.detach())
    with theirs:
        try:
            yield CallLine(relay, CallConversation(HELLO_BODY, LIMIT)), theirs
        finally:
            relay.close()


@contextmanager
def ready_lines() -> Iterator[tuple[CallLine, socket.socket]]:
    """A line whose handshake is done."""
    with lines() as (line, theirs):
        theirs.sendall(SHAKEN)
        assert line.read() == Shaken(PID)
        yield line, theirs


def reads_of(line: CallLine) -> list[tuple[str, int]]:
    assert isinstance(line.relay, Counting)
    return line.relay.reads


async def next_event(line: CallLine) -> Event:
    while True:
        await line.relay.wait_readable()
        event = line.read()
        if event is not None:
            return event


async def test_handshake() -> None:
    """The hello goes out, the child's pid comes back."""
    with lines() as (line, theirs):
        theirs.sendall(SHAKEN)
        await line.shake_hands()
        assert line.peer == PID
        hello = decoded(theirs.recv(READ_SIZE))
        assert (hello.kind, hello.body) == (HELLO, HELLO_BODY)
        assert line.clean


async def test_refused_handshake() -> None:
    """A child that can't become ready says why, and the line keeps it."""
    with lines() as (line, theirs):
        theirs.sendall(whole(REFUSED, 0, b"textexception", split=4))
        with pytest.raises(Refused) as caught:
            await line.shake_hands()
        assert line.fault is caught.value
        assert (caught.value.message, caught.value.exception) == (b"text", b"exception")


async def test_refused_in_its_last_moment() -> None:
    """Also where it is read only after the child's death."""
    with lines() as (line, theirs):
        theirs.sendall(whole(REFUSED, 0, b"textexception", split=4))
        theirs.close()
        line.finish()
        assert isinstance(line.fault, Refused)
        assert line.fault.message == b"text"


async def test_a_small_answer_is_one_read() -> None:
    """The usual case."""
    with ready_lines() as (line, theirs):
        reads_of(line).clear()
        assert line.begin(call(1)) is None
        assert line.whole
        assert decoded(theirs.recv(READ_SIZE)).body == b"call"
        theirs.sendall(whole(RESULT, 1, b"body"))
        assert shown(line.read()) == replied(b"body")
        assert line.started is True
        assert line.clean
        assert len(reads_of(line)) == 1


@pytest.mark.parametrize(
    ("body", "buffers"),
    [
        (bytes(3 << 20), []),
        (b"small", [bytearray(range(256)) * (12 << 10)]),
        (b"small", [bytes(range(256)) * (4 << 10), bytearray(b"x"), bytearray(2 << 20)]),
        (bytes(9 << 20), []),
    ],
    ids=["body", "buffer", "buffers", "more than is read in a row"],
)
async def test_a_large_answer_is_read_in_place(body: bytes, buffers: list[bytes | bytearray]) -> None:
    """What is large is read where it stays; other tasks get their turn in between; buffers are of their own kind."""
    data = whole(RESULT, 1, body, buffers)
    with ready_lines() as (line, theirs):
        assert line.begin(call(1)) is None
        reads_of(line).clear()
        theirs.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs.dup()))
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            event = await next_event(line)
        assert shown(event) == replied(body, *map(bytes, buffers))
        assert isinstance(event, Replied)
        assert [memoryview(buffer).readonly for buffer in event.buffers] == [
            type(buffer) is bytes for buffer in buffers
        ]
        assert line.clean
        in_place = sum(count for how, count in reads_of(line) if how == "in place")
        received = [count for how, count in reads_of(line) if how == "received"]
        assert in_place + sum(received) == len(data)
        # Only what is read before the sizes are known is copied: once at the start, not once for each piece.
        assert len(received) == 1
        assert received[0] <= READ_SIZE


async def test_a_long_answer_leaves_others_their_turn() -> None:
    """`read` comes back after some reads, though there is more."""
    with ready_lines() as (line, theirs):
        assert line.begin(call(1)) is None
        theirs.sendall(whole(RESULT, 1, bytes(100_000))[:100])
        data = whole(RESULT, 1, bytes(100_000))
        at = 100
        assert line.read() is None
        # Each small piece is a read of its own, so the bound is met with little data.
        relay = line.relay
        assert isinstance(relay, Counting)
        reads: list[int] = []

        def read_into(space: memoryview) -> int | None:
            nonlocal at
            space[:1] = data[at : at + 1]
            at += 1
            reads.append(1)
            return 1

        relay.read_into = read_into  # type: ignore[method-assign]
        assert line.read() is None
        assert len(reads) == READS_IN_A_ROW


async def test_parts_are_taken_one_by_one() -> None:
    """Parts that came in one read come out in their order; the line has more until the last is taken."""
    with ready_lines() as (line, theirs):
        assert line.begin(encode(STREAM, 1, b"stream")) is None
        theirs.sendall(whole(PART, 1, b"one") + whole(PART, 1, b"two", [b"buffer"]) + whole(END, 1))
        assert shown(line.read()) == part(b"one")
        assert line.has_more
        assert shown(line.take()) == part(b"two", b"buffer")
        assert shown(line.take()) == replied(b"", streamed=True)
        assert not line.has_more
        assert line.take() is None
        assert line.clean


async def test_stop_stream() -> None:
    """The stop goes to the child with the job's id, and only in the middle of a stream."""
    with ready_lines() as (line, theirs):
        assert line.begin(encode(STREAM, 9, b"stream")) is None
        line.stop_stream()
        assert decoded(theirs.recv(READ_SIZE)).kind == STREAM
        theirs.sendall(whole(PART, 9, b"one"))
        assert shown(line.read()) == part(b"one")
        line.stop_stream()
        stop = decoded(theirs.recv(READ_SIZE))
        assert (stop.kind, stop.id) == (STOP_STREAM, 9)
        theirs.sendall(whole(END, 9))
        assert shown(line.read()) == replied(b"", streamed=True)
        assert line.clean


@pytest.mark.parametrize("buffers", [[], [bytearray(b"x" * (2 << 20)), b"y" * 100_000]], ids=["body", "buffers"])
async def test_a_large_job_is_written_as_the_child_reads(buffers: list[bytes | bytearray]) -> None:
    """What the socket does not take at once goes out piece by piece, and arrives whole."""
    body = b"z" * (1 << 20)
    with ready_lines() as (line, theirs):
        assert line.begin(call(1, body, buffers)) is None
        assert not line.whole
        assert line.started is False
        decoder = Decoder(FROM_POOL, LIMIT)

        async def read() -> Message:
            while (message := decoder.next_message()) is None:
                decoder.receive(await trio.to_thread.run_sync(theirs.recv, READ_SIZE))
            return message

        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.flush)
            message = await read()
        assert line.whole
        assert (message.kind, message.id, message.body) == (CALL, 1, body)
        assert list(message.buffers) == buffers


def three_jobs(line: CallLine) -> None:
    assert line.begin(call(1)) is None
    for id_ in (2, 3):
        assert line.begin_ahead(call(id_))
    line.flush_behind()


def take_all(line: CallLine, count: int) -> list[object]:
    """Take so many answers, as the exchange does: what has been read first, then what is there."""
    found: list[object] = []
    for _ in range(100):
        event = line.take() or line.read()
        if event is not None:
            found.append(shown(event))
            line.turn(more=bool(line.conversation.ids))  # type: ignore[attr-defined]
        if len(found) == count:
            break
    return found


async def test_answers_in_a_row_are_one_read() -> None:
    """Each for its own job, whatever kind they are; the last leaves the line clean."""
    with ready_lines() as (line, theirs):
        three_jobs(line)
        reads_of(line).clear()
        theirs.sendall(whole(RESULT, 1, b"one") + whole(RESULT, 2, b"two") + whole(ERROR, 3, b"boom", split=4))
        assert shown(line.read()) == replied(b"one")
        assert line.has_more
        assert shown(line.take()) == replied(b"two")
        assert line.has_more
        assert shown(line.take()) == Failed(b"boom")
        assert not line.has_more
        assert line.clean
        assert len(reads_of(line)) == 1


@pytest.mark.parametrize("cut", [1, 27, 28, 31, 32, 60, 70])
async def test_answers_in_two_halves(cut: int) -> None:
    """Wherever the first read ends."""
    answers = whole(RESULT, 1, b"one") + whole(RESULT, 2, b"two") + whole(RESULT, 3, b"three")
    expected = [replied(b"one"), replied(b"two"), replied(b"three")]
    with ready_lines() as (line, theirs):
        three_jobs(line)
        theirs.sendall(answers[:cut])
        ready = cut // 31
        assert take_all(line, ready) == expected[:ready]
        assert line.read() is None
        assert line.has_more == (cut % 31 > 0)
        theirs.sendall(answers[cut:])
        assert take_all(line, 3 - ready) == expected[ready:]
        assert line.clean


@pytest.mark.parametrize("first", [True, False])
async def test_a_large_answer_among_small_ones(first: bool) -> None:
    """Its body and buffers are read in place, and what comes behind it is not read into them."""
    buffers: list[bytes | bytearray] = [bytearray(b"x" * 70_000), b"y" * 70_000]
    large = whole(RESULT, 1 if first else 2, b"large" * 10_000, buffers)
    small = whole(RESULT, 2 if first else 1, b"small")
    answers = [large, small] if first else [small, large]
    expected = [replied(b"large" * 10_000, *map(bytes, buffers)), replied(b"small")]
    with ready_lines() as (line, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        three_jobs(line)
        theirs.sendall(b"".join(answers) + whole(RESULT, 3, b"last"))
        assert take_all(line, 3) == [*(expected if first else expected[::-1]), replied(b"last")]
        assert line.clean


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")
@pytest.mark.parametrize("before", [False, True])
async def test_an_answer_through_the_arena_among_small_ones(before: bool) -> None:
    """What comes behind it is told of when it has been taken out, slice by slice."""
    fd = _platform.HERE.shared_file()
    ours, theirs = Arena(fd), Arena(os.dup(fd))
    one, other = socket.socketpair()
    one.setblocking(False)
    relay = CallRelay(one.detach(), ours, lambda where, number: None)
    line = CallLine(relay, CallConversation(HELLO_BODY, LIMIT, ours, Kept()))
    try:
        other.sendall(SHAKEN)
        assert line.read() == Shaken(PID)
        three_jobs(line)
        large = bytes(range(256)) * (SLICE // 256 * 2 + 1)
        pieces = encode(RESULT, 2 if before else 1, b"large", [memoryview(large)])
        assert Filling(theirs, [memoryview(large)]).go_on()
        theirs.sent += 1
        answers = [b"".join(placed(pieces)), whole(RESULT, 1 if before else 2, b"small")]
        expected = [replied(b"large", large), replied(b"small")]
        other.sendall(b"".join(answers[:: -1 if before else 1]) + whole(RESULT, 3, b"last"))
        assert take_all(line, 3) == [*expected[:: -1 if before else 1], replied(b"last")]
        assert line.clean
        assert theirs.free
    finally:
        line.close()
        theirs.close()
        other.close()


@pytest.mark.parametrize("lie", ["text", "large answer to another job", "second handshake"])
async def test_a_lie_behind_answers(lie: str) -> None:
    """What came before it counts; then the line is at fault, and says so to whoever is in front."""
    data, reason = LIES[lie]
    with ready_lines() as (line, theirs):
        assert line.begin(call(3)) is None
        for id_ in (4, 5):
            assert line.begin_ahead(call(id_))
        line.flush_behind()
        theirs.sendall(whole(RESULT, 3, b"3") + whole(RESULT, 4, b"4") + data)
        assert shown(line.read()) == replied(b"3")
        assert shown(line.take()) == replied(b"4")
        with pytest.raises(FrameError, match=reason) as caught:
            line.take()
        assert line.fault is caught.value


LIES: Final = {
    "answer to another job": (whole(RESULT, 6, b"secret"), "it answered job 6, but it was given job 5"),
    "error of another job": (whole(ERROR, 6, b"secret", split=6), "it answered job 6, but it was given job 5"),
    "large answer to another job": (whole(RESULT, 6, bytes(50_000)), "it answered job 6, but it was given job 5"),
    "buffers of another job": (whole(RESULT, 6, b"", [b"secret"]), "it answered job 6, but it was given job 5"),
    "second handshake": (whole(READY, 5, bytes(8)), "Shaken can't come while waiting for the reply"),
    "refusal": (whole(REFUSED, 5, b"no", split=2), "can't come while waiting for the reply"),
    "text": (b"Hello from print\n", "begin no message; the bytes received begin b'Hello from print"),
    "call": (whole(CALL, 5, b"call"), "begin no message"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_the_lines_fault(lie: str) -> None:
    """The error leaves `read`, and the line keeps it, for whoever asks what was wrong with this worker."""
    data, reason = LIES[lie]
    with ready_lines() as (line, theirs):
        assert line.begin(call(5)) is None
        theirs.sendall(data)
        with pytest.raises(FrameError, match=reason) as caught:
            line.read()
        assert line.fault is caught.value
        assert line.started is True  # it answered, if not well
        assert line.take() is None


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_of_a_dead_worker(lie: str) -> None:
    """What it said last is judged in the same way."""
    data, reason = LIES[lie]
    with ready_lines() as (line, theirs):
        assert line.begin(call(5)) is None
        theirs.sendall(data)
        theirs.close()
        line.finish()
        assert line.fault is not None
        assert reason in str(line.fault)
        assert not line.events


@pytest.mark.parametrize(
    "more", [b"x", b"Hello\n", whole(RESULT, 5, b"again"), whole(PART, 5), whole(RESULT, 5, bytes(90_000))[:-1]]
)
async def test_more_than_an_answer(more: bytes) -> None:
    """The answer counts; the line is not clean, so it carries no other job."""
    with ready_lines() as (line, theirs):
        assert line.begin(call(5)) is None
        theirs.sendall(whole(RESULT, 5, b"answer") + more)
        assert shown(line.read()) == replied(b"answer")
        assert not line.clean
        assert line.has_more


async def test_bytes_that_no_job_asked_for() -> None:
    """They are seen before a job is written, and the job is not."""
    with ready_lines() as (line, theirs):
        theirs.sendall(whole(RESULT, 1, b"for the job to come"))
        assert "bytes came that no job asked for" in str(line.begin(call(1)))
        assert line.fault is not None
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


@pytest.mark.parametrize("cut", [0, 1, 27, 28, 40, 43, 44, 100_000, -1])
@pytest.mark.parametrize("at_once", [False, True])
async def test_an_end_in_the_middle(cut: int, at_once: bool) -> None:
    """Wherever a child dies, the line is at its end, and what it left makes no event."""
    data = whole(RESULT, 5, b"body", [bytearray(60_000), bytes(60_000)])
    with ready_lines() as (line, theirs):
        assert line.begin(call(5)) is None
        theirs.recv(READ_SIZE)
        theirs.sendall(data[:cut])
        if not at_once:
            assert line.read() is None
        theirs.close()
        with pytest.raises(LineEnded):
            line.read()
        assert line.has_more == (cut != 0)
        line.finish()
        assert line.take() is None
        assert line.started is True
        line.forget()
        assert not line.has_more


async def test_last_words() -> None:
    """What a child said before it died is kept for the job whose turn it is, large as it may be."""
    with ready_lines() as (line, theirs):
        assert line.begin(encode(STREAM, 5, b"stream")) is None
        theirs.recv(READ_SIZE)
        theirs.sendall(whole(PART, 5, b"one", [bytes(70_000)]) + whole(PART, 5, b"two") + whole(END, 5)[:-1])
        theirs.close()
        line.finish()
        assert [shown(event) for event in line.events] == [part(b"one", bytes(70_000)), part(b"two")]
        assert line.fault is None
        assert line.has_more


async def test_a_job_that_was_never_read() -> None:
    """A child that dies with its job unread has not started it."""
    with ready_lines() as (line, theirs):
        assert line.begin(call(5)) is None
        theirs.close()
        with pytest.raises(LineEnded):
            line.read()
        assert line.started is False


# chunks


def with_chunk(region: Region | None) -> CallConversation:
    conversation = CallConversation(HELLO_BODY, LIMIT, region=region)
    conversation.receive(SHAKEN)
    assert conversation.next_event() == Shaken(PID)
    conversation.begin_job(encode(CALLS, 7, b"calls", split=1))
    assert conversation.stage is Stage.WAITING
    return conversation


def test_the_results_of_a_chunk() -> None:
    """They are copied from the region when the end is read, behind the parts that came before; the next job is none."""
    region = Region()
    memory = mmap.mmap(region.fd, SIZE)
    memory[RESULTS : RESULTS + 9] = b"in common"
    conversation = with_chunk(region)
    head = DONE_HEAD.pack(3, 9, 1000)
    data = whole(SOME, 7, b"some") + whole(SOME, 7, b"one", [bytes(70_000)]) + whole(DONE, 7, head)
    assert conversation.take_whole(data) is None
    conversation.receive(data)
    assert shown(conversation.next_event()) == part(b"some")
    assert shown(conversation.next_event()) == part(b"one", bytes(70_000))
    event = conversation.next_event()
    memory[RESULTS : RESULTS + 9] = b"of others"
    assert shown(event) == replied(head + b"in common")
    assert conversation.stage is Stage.IDLE
    conversation.begin_job(call(8))
    assert conversation.take_whole(whole(RESULT, 8, b"result")) == Replied(b"", b"result")
    memory.close()
    region.close()


@pytest.mark.parametrize("with_region", [True, False])
def test_results_that_came_with_the_end(with_region: bool) -> None:
    """A child without a region sends them behind the head."""
    region = Region() if with_region else None
    conversation = with_chunk(region)
    body = DONE_HEAD.pack(1, 7, 1000) + b"results"
    conversation.receive(whole(DONE, 7, body))
    assert shown(conversation.next_event()) == replied(body)
    if region is not None:
        region.close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_answer_to_a_chunk(answer: str) -> None:
    """A chunk has parts, an end, or an error; anything else breaks the protocol, by the short cut as well."""
    kind, body, split = ANSWERS[answer]
    conversation = with_chunk(None)
    data = whole(kind, 7, body, split=split)
    assert conversation.take_whole(data) is None
    conversation.receive(data)
    if kind in (SOME, DONE, ERROR):
        assert conversation.next_event() is not None
    else:
        with pytest.raises(FrameError, match="can't come while"):
            conversation.next_event()


def test_an_end_without_its_head() -> None:
    """What is too short for one is no end."""
    conversation = with_chunk(None)
    conversation.receive(whole(DONE, 7, b"short"))
    with pytest.raises(FrameError, match="can't come while"):
        conversation.next_event()


def test_every_kind_is_here() -> None:
    """The table of answers names each kind that a child may send."""
    assert {kind for kind, _, _ in ANSWERS.values()} == FROM_CHILD
