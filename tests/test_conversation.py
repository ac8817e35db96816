"""The conversation with one worker: every event in every stage, and the lies a worker can tell."""

import os
from collections import deque
from typing import Final

import pytest

from trio_workers._conversation import (
    HANDSHAKE_LIMIT,
    PONG_FRAME,
    STOP_STREAM,
    Conversation,
    Event,
    Failed,
    Part,
    Replied,
    Shaken,
    Stage,
    StopAsked,
)
from trio_workers._goridge import (
    ERROR,
    MORE,
    NONE,
    PING,
    PONG,
    PROTOCOLS,
    STOP,
    STREAM_STOP,
    FrameError,
    context_frame_3,
    encode_control,
    encode_error,
    encode_reply,
    frame_1,
    frame_2,
    frame_3,
)

LIMIT: Final = 10_000
OLD: Final = ("goridge-1", "goridge-2")
STAGES: Final = [
    (protocol, stage)
    for protocol in PROTOCOLS
    for stage in Stage
    if stage is not (Stage.STREAMING if protocol in OLD else Stage.BODY)  # the one that this dialect has not
]


def old_frame(protocol: str, flags: int, body: bytes = b"") -> bytes:
    return (frame_1 if protocol == "goridge-1" else frame_2)(flags, body)


def shaken(protocol: str) -> Conversation:
    """A conversation whose handshake is done."""
    conversation = Conversation(protocol, LIMIT)
    conversation.receive(encode_control(protocol, b'{"pid":7}'))
    assert conversation.next_event() == Shaken(7)
    return conversation


def in_stage(protocol: str, stage: Stage) -> Conversation:
    """A conversation brought to a stage by what a worker would send."""
    if stage is Stage.SHAKING:
        return Conversation(protocol, LIMIT)
    conversation = shaken(protocol)
    if stage is not Stage.IDLE:
        conversation.begin_job()
    if stage is Stage.BODY:
        conversation.receive(old_frame(protocol, 0x14, b"first"))
        assert conversation.next_event() is None
    if stage is Stage.STREAMING:
        conversation.receive(context_frame_3(0, b"", b"first", MORE))
        assert conversation.next_event() == Part(b"", b"first")
    assert conversation.stage is stage
    assert not conversation.pending
    assert not conversation.answers
    return conversation


# --- the table: what each frame is in each stage --------------------------------------------------------------------

FRAMES_3: Final = {
    "handshake": frame_3(0x09, b'{"pid":7}'),
    "handshake without codec": frame_3(0x01, b'{"pid":7}'),
    "handshake with a ping": frame_3(0x09, b'{"pid":7}', PING),
    "reply": context_frame_3(0, b"ctx", b"body"),
    "empty reply": context_frame_3(0, b"", b""),
    "reply with a ping": context_frame_3(0, b"ctx", b"body", PING),
    "part": context_frame_3(0, b"ctx", b"body", MORE),
    "part with a ping": context_frame_3(0, b"ctx", b"body", MORE | PING),
    "error": frame_3(ERROR, b"boom"),
    "error with a codec": frame_3(ERROR | 4, b"boom"),
    "error with a ping": frame_3(ERROR, b"boom", PING),
    "error with more": frame_3(ERROR, b"boom", MORE),
    "stop request": context_frame_3(0, STOP, b""),
    "stop with a body": context_frame_3(0, STOP, b"body"),
    "stop as a body": context_frame_3(0, b"", STOP),
    "part that says stop": context_frame_3(0, STOP, b"", MORE),
    "pong": frame_3(0, b"", PONG),
    "stop the stream": frame_3(0, b"", STREAM_STOP),
    "reply with a pong": context_frame_3(0, b"ctx", b"body", PONG),
    "reply with stop the stream": context_frame_3(0, b"ctx", b"body", STREAM_STOP),
    "reply without options": frame_3(0, b"body"),
    "text": b"Hello from print\n",
}
Outcome = tuple[Event | None, Stage]
OUTCOMES_3: Final[dict[tuple[Stage, str], Outcome]] = {
    (Stage.SHAKING, "handshake"): (Shaken(7), Stage.IDLE),
    (Stage.SHAKING, "handshake without codec"): (Shaken(7), Stage.IDLE),
    (Stage.WAITING, "reply"): (Replied(b"ctx", b"body"), Stage.IDLE),
    (Stage.WAITING, "empty reply"): (Replied(b"", b""), Stage.IDLE),
    (Stage.WAITING, "reply with a ping"): (Replied(b"ctx", b"body"), Stage.IDLE),
    (Stage.WAITING, "part"): (Part(b"ctx", b"body"), Stage.STREAMING),
    (Stage.WAITING, "part with a ping"): (Part(b"ctx", b"body"), Stage.STREAMING),
    (Stage.WAITING, "error"): (Failed(b"boom"), Stage.IDLE),
    (Stage.WAITING, "error with a codec"): (Failed(b"boom"), Stage.IDLE),
    (Stage.WAITING, "error with a ping"): (Failed(b"boom"), Stage.IDLE),
    (Stage.WAITING, "stop request"): (StopAsked(), Stage.IDLE),
    (Stage.WAITING, "stop with a body"): (Replied(STOP, b"body"), Stage.IDLE),
    (Stage.WAITING, "stop as a body"): (Replied(b"", STOP), Stage.IDLE),
    (Stage.WAITING, "part that says stop"): (Part(STOP, b""), Stage.STREAMING),
    (Stage.STREAMING, "reply"): (Replied(b"ctx", b"body", True), Stage.IDLE),
    (Stage.STREAMING, "empty reply"): (Replied(b"", b"", True), Stage.IDLE),
    (Stage.STREAMING, "reply with a ping"): (Replied(b"ctx", b"body", True), Stage.IDLE),
    (Stage.STREAMING, "part"): (Part(b"ctx", b"body"), Stage.STREAMING),
    (Stage.STREAMING, "part with a ping"): (Part(b"ctx", b"body"), Stage.STREAMING),
    (Stage.STREAMING, "error"): (Failed(b"boom"), Stage.IDLE),
    (Stage.STREAMING, "error with a codec"): (Failed(b"boom"), Stage.IDLE),
    (Stage.STREAMING, "error with a ping"): (Failed(b"boom"), Stage.IDLE),
    # The job has run by then: what says stop in the middle of a stream is a context like any other.
    (Stage.STREAMING, "stop request"): (Replied(STOP, b"", True), Stage.IDLE),
    (Stage.STREAMING, "stop with a body"): (Replied(STOP, b"body", True), Stage.IDLE),
    (Stage.STREAMING, "stop as a body"): (Replied(b"", STOP, True), Stage.IDLE),
    (Stage.STREAMING, "part that says stop"): (Part(STOP, b""), Stage.STREAMING),
}

FRAMES_OLD: Final = {
    "handshake": (0x10, b'{"pid":7}'),
    "raw handshake": (0x14, b'{"pid":7}'),
    "context": (0x14, b"ctx"),
    "empty context": (0x14, b""),
    "no context": (0x12, b""),
    "no context with a size": (0x12, b"ctx"),
    "body": (0x04, b"body"),
    "empty body": (0x04, b""),
    "no body": (NONE, b""),
    "no body with a size": (NONE, b"body"),
    "error": (0x1C, b"boom"),
    "error without raw": (0x18, b"boom"),
    "error that is no control": (0x0C, b"boom"),
    "job body": (0x00, b"body"),
    "unknown flags": (0x24, b"body"),
    "text": (ord("H"), b"ello from print\n"),
}
OUTCOMES_OLD: Final[dict[tuple[Stage, str], Outcome]] = {
    (Stage.SHAKING, "handshake"): (Shaken(7), Stage.IDLE),
    (Stage.SHAKING, "raw handshake"): (Shaken(7), Stage.IDLE),
    # In WAITING a raw control frame is a context, whatever it says.
    (Stage.WAITING, "raw handshake"): (None, Stage.BODY),
    (Stage.WAITING, "context"): (None, Stage.BODY),
    (Stage.WAITING, "empty context"): (None, Stage.BODY),
    (Stage.WAITING, "no context"): (None, Stage.BODY),
    (Stage.WAITING, "error"): (Failed(b"boom"), Stage.IDLE),
    (Stage.BODY, "body"): (Replied(b"first", b"body"), Stage.IDLE),
    (Stage.BODY, "empty body"): (Replied(b"first", b""), Stage.IDLE),
    (Stage.BODY, "no body"): (Replied(b"first", b""), Stage.IDLE),
}


def check(conversation: Conversation, data: bytes, outcome: Outcome | None) -> None:
    stage = conversation.stage
    conversation.receive(data)
    if outcome is None:
        with pytest.raises(FrameError):
            conversation.next_event()
        assert conversation.stage is stage
        return
    event, after = outcome
    found = conversation.next_event()
    assert (found, type(found)) == (event, type(event))
    assert conversation.stage is after
    assert not conversation.pending
    assert conversation.next_event() is None


@pytest.mark.parametrize("name", FRAMES_3)
@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.BODY])
def test_each_frame_in_each_stage_of_goridge_3(stage: Stage, name: str) -> None:
    """What the table lists leads where it says, and everything else is refused."""
    conversation = in_stage("goridge-3", stage)
    outcome = OUTCOMES_3.get((stage, name))
    check(conversation, FRAMES_3[name], outcome)
    if outcome is not None:
        assert list(conversation.answers) == [PONG_FRAME] * ("ping" in name)


@pytest.mark.parametrize("name", FRAMES_OLD)
@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.STREAMING])
@pytest.mark.parametrize("protocol", OLD)
def test_each_frame_in_each_stage_of_the_older_dialects(protocol: str, stage: Stage, name: str) -> None:
    """What the table lists leads where it says, and everything else is refused."""
    conversation = in_stage(protocol, stage)
    check(conversation, old_frame(protocol, *FRAMES_OLD[name]), OUTCOMES_OLD.get((stage, name)))
    assert not conversation.answers


@pytest.mark.parametrize(("protocol", "stage"), STAGES)
def test_a_job_begins_where_the_worker_is_idle(protocol: str, stage: Stage) -> None:
    """A second job on a relay that owes an answer is a mistake of ours, and seen as one."""
    conversation = in_stage(protocol, stage)
    if stage is Stage.IDLE:
        conversation.begin_job()
        assert conversation.stage is Stage.WAITING
    else:
        with pytest.raises(FrameError):
            conversation.begin_job()
        assert conversation.stage is stage


@pytest.mark.parametrize(("protocol", "stage"), STAGES)
def test_the_first_byte_is_judged_at_once(protocol: str, stage: Stage) -> None:
    """In every stage one byte is enough to tell what can't begin a frame; while idle nothing can."""
    legal = {
        Stage.SHAKING: ({0x10, 0x14}, {0x13}),
        Stage.IDLE: (set[int](), set[int]()),
        Stage.WAITING: ({0x14, 0x12, 0x1C}, {0x13, 0x14}),
        Stage.BODY: ({0x04, 0x02}, set[int]()),
        Stage.STREAMING: (set[int](), {0x13, 0x14}),
    }[stage][protocol == "goridge-3"]
    for first in range(256):
        conversation = in_stage(protocol, stage)
        conversation.receive(bytes((first,)))
        assert conversation.pending
        if first in legal:
            assert conversation.next_event() is None
            assert conversation.leftover == bytes((first,))
        else:
            with pytest.raises(FrameError) as caught:
                conversation.next_event()
            assert caught.value.received == bytes((first,))


# --- handshake ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_pool_tells_its_pid(protocol: str) -> None:
    """The pool speaks first, and says who it is."""
    conversation = Conversation(protocol, LIMIT)
    assert conversation.handshake() == encode_control(protocol, b'{"pid":%d}' % os.getpid())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_pool_says_stop(protocol: str) -> None:
    """The frame that ends a worker softly."""
    assert Conversation(protocol, LIMIT).stop() == encode_control(protocol, STOP)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("payload", [b'{"pid":1}', b' { "pid" : 4194304 } ', b'{"version":"1","pid":99,"more":[]}'])
def test_a_handshake_is_json_with_a_pid(protocol: str, payload: bytes) -> None:
    """White space and other keys are the worker's own affair."""
    conversation = Conversation(protocol, LIMIT)
    conversation.receive(encode_control(protocol, payload))
    assert isinstance(conversation.next_event(), Shaken)


LIES: Final = {
    "nothing": b"",
    "no JSON": b"hello",
    "half of it": b'{"pid":',
    "not UTF-8": b'{"pid":"\xff"}',
    "a list": b"[7]",
    "a number": b"7",
    "null": b"null",
    "another key": b'{"stop":true}',
    "a text": b'{"pid":"7"}',
    "a float": b'{"pid":7.0}',
    "true": b'{"pid":true}',
    "no pid": b'{"pid":null}',
    "zero": b'{"pid":0}',
    "negative": b'{"pid":-7}',
    "no number": b'{"pid":NaN}',
    "infinity": b'{"pid":Infinity}',
    "larger than any pid": b'{"pid":2147483648}',
    "huge": b'{"pid":' + b"9" * 900 + b"}",
    "deep": b"[" * 900,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("lie", LIES)
def test_a_handshake_that_is_none(protocol: str, lie: str) -> None:
    """What is no pid is refused, and the error shows it."""
    conversation = Conversation(protocol, LIMIT)
    conversation.receive(encode_control(protocol, LIES[lie]))
    with pytest.raises(FrameError, match="handshake") as caught:
        conversation.next_event()
    assert caught.value.received == LIES[lie]
    assert conversation.stage is Stage.SHAKING


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stranger_gets_little_memory(protocol: str) -> None:
    """Before the handshake a frame is small, whatever `max_frame_size` is; after it, that is the limit."""
    payload = b'{"pid":7}'.ljust(HANDSHAKE_LIMIT)
    conversation = Conversation(protocol, LIMIT)
    conversation.receive(encode_control(protocol, payload))
    assert conversation.next_event() == Shaken(7)
    conversation.begin_job()
    conversation.receive(encode_error(protocol, bytes(LIMIT)))
    assert conversation.next_event() == Failed(bytes(LIMIT))
    conversation.begin_job()
    conversation.receive(encode_error(protocol, bytes(LIMIT + 1)))
    with pytest.raises(FrameError, match="max_frame_size"):
        conversation.next_event()

    conversation = Conversation(protocol, LIMIT)
    conversation.receive(encode_control(protocol, payload + b" "))
    with pytest.raises(FrameError, match="1,025"):
        conversation.next_event()


# --- whole jobs -----------------------------------------------------------------------------------------------------


def events_of(conversation: Conversation) -> list[Event]:
    events: list[Event] = []
    while (event := conversation.next_event()) is not None:
        events.append(event)
    return events


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_job_after_job(protocol: str, chunk: int) -> None:
    """Replies, errors and a request to stop, in whatever pieces they come."""
    conversation = shaken(protocol)
    for data, event in (
        (encode_reply(protocol, b"ctx", b"body"), Replied(b"ctx", b"body")),
        (encode_reply(protocol, b"", b""), Replied(b"", b"")),
        (encode_error(protocol, b"boom"), Failed(b"boom")),
        (encode_error(protocol, b""), Failed(b"")),
        (encode_reply(protocol, b"", STOP), Replied(b"", STOP)),
        (encode_reply(protocol, STOP, b"body"), Replied(STOP, b"body")),
        (encode_reply(protocol, b"", b"last"), Replied(b"", b"last")),
        (encode_reply(protocol, STOP, b""), StopAsked()),
    ):
        conversation.begin_job()
        found: list[Event] = []
        for start in range(0, len(data), chunk):
            assert not found
            conversation.receive(data[start : start + chunk])
            found += events_of(conversation)
        assert found == [event]
        assert type(found[0]) is type(event)
        assert conversation.stage is Stage.IDLE


ANSWERS: Final = [
    (Replied(b"ctx", b"body"), lambda protocol: encode_reply(protocol, b"ctx", b"body")),
    (Failed(b"boom"), lambda protocol: encode_error(protocol, b"boom")),
    (Replied(b"", b""), lambda protocol: encode_reply(protocol, b"", b"")),
    (StopAsked(), lambda protocol: encode_reply(protocol, STOP, b"")),
    (Replied(b"c", b"last"), lambda protocol: encode_reply(protocol, b"c", b"last")),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_jobs_behind_one_another(protocol: str, chunk: int) -> None:
    """Answers come in their order, in whatever pieces; the worker is idle when the last has come, and not before."""
    conversation = shaken(protocol)
    conversation.begin_job()
    for _ in ANSWERS[1:]:
        conversation.begin_behind()
    data = b"".join(encode(protocol) for _, encode in ANSWERS)
    found: list[Event] = []
    for start in range(0, len(data), chunk):
        conversation.receive(data[start : start + chunk])
        while (event := conversation.next_event()) is not None:
            found.append(event)
            assert conversation.stage is (Stage.IDLE if len(found) == len(ANSWERS) else Stage.WAITING)
    assert [(type(event), event) for event in found] == [(type(event), event) for event, _ in ANSWERS]
    assert not conversation.pending
    conversation.begin_job()
    with pytest.raises(FrameError):
        conversation.begin_job()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_reply_too_many_behind_others(protocol: str) -> None:
    """It is no reply: nobody is left whose it could be."""
    conversation = shaken(protocol)
    conversation.begin_job()
    conversation.begin_behind()
    reply = encode_reply(protocol, b"", b"one")
    conversation.receive(3 * reply)
    assert [conversation.next_event() for _ in range(2)] == [Replied(b"", b"one")] * 2
    assert conversation.stage is Stage.IDLE
    assert conversation.pending
    with pytest.raises(FrameError) as caught:
        conversation.next_event()
    assert caught.value.received.startswith(reply[:1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_job_behind_answers_that_are_not_told_of_yet(protocol: str) -> None:
    """All have been taken apart, and what comes behind them is awaited."""
    conversation = shaken(protocol)
    conversation.begin_job()
    conversation.receive(encode_reply(protocol, b"", b"one"))
    assert conversation.next_event() == Replied(b"", b"one")
    conversation.begin_behind()
    assert conversation.stage is Stage.WAITING
    conversation.receive(encode_reply(protocol, b"", b"two"))
    assert conversation.next_event() == Replied(b"", b"two")
    assert conversation.stage is Stage.IDLE


def test_a_stream_with_jobs_behind_it() -> None:
    """Its parts are its own; the next job's turn comes with its last frame."""
    conversation = shaken("goridge-3")
    conversation.begin_job()
    conversation.begin_behind()
    conversation.receive(
        context_frame_3(0, b"", b"1", MORE)
        + context_frame_3(0, b"", b"2", MORE)
        + context_frame_3(0, b"", b"3")
        + context_frame_3(0, b"", b"next")
    )
    stages = []
    for event in (Part(b"", b"1"), Part(b"", b"2"), Replied(b"", b"3", True), Replied(b"", b"next")):
        assert conversation.next_event() == event
        stages.append(conversation.stage)
    assert stages == [Stage.STREAMING, Stage.STREAMING, Stage.WAITING, Stage.IDLE]


BEHIND: Final = {
    "nothing": b"",
    "half a header": context_frame_3(0, b"", b"three")[:11],
    "half a reply": context_frame_3(0, b"c", b"three")[:-1],
    "an error": encode_error("goridge-3", b"boom"),
    "a part": context_frame_3(0, b"", b"three", MORE),
    "a ping": context_frame_3(0, b"", b"three", PING),
    "a stop request": context_frame_3(0, STOP, b""),
    "a control frame": encode_control("goridge-3", STOP),
    "a pong": frame_3(0, b"", PONG),
    "too large": context_frame_3(0, b"", bytes(LIMIT + 1)),
    "a wrong sum": bytes([*context_frame_3(0, b"", b"three")[:6], 0, *context_frame_3(0, b"", b"three")[7:]]),
    "reserved bits": bytes([*context_frame_3(0, b"", b"three")[:11], 1, *context_frame_3(0, b"", b"three")[12:]]),
    "unknown flags": context_frame_3(0x02, b"", b"three"),
    "text": b"Hello from print\n",
}


@pytest.mark.parametrize("what", BEHIND)
def test_several_at_once(what: str) -> None:
    """The short cut takes the plain replies in front; the long way judges what is behind, in the same stage."""
    conversation, longer = shaken("goridge-3"), shaken("goridge-3")
    front = context_frame_3(0, b"ctx", b"one") + context_frame_3(0, b"", b"")
    data = front + BEHIND[what]
    for one in (conversation, longer):
        one.begin_job()
        for _ in range(3):
            one.begin_behind()
    events: deque[Event] = deque()
    assert conversation.take_several(data, events) == len(front)
    assert list(events) == [Replied(b"ctx", b"one"), Replied(b"", b"")]
    assert conversation.stage is Stage.WAITING
    longer.receive(data)
    assert [longer.next_event(), longer.next_event()] == list(events)

    def rest(of: Conversation) -> object:
        try:
            return of.next_event(), of.stage, list(of.answers), of.pending
        except FrameError as error:
            return str(error)

    conversation.receive(BEHIND[what])
    assert rest(conversation) == rest(longer)


def test_no_more_at_once_than_there_are_jobs() -> None:
    """A reply too many is left over."""
    conversation = shaken("goridge-3")
    conversation.begin_job()
    conversation.begin_behind()
    reply = context_frame_3(0, b"", b"one")
    events: deque[Event] = deque()
    assert conversation.take_several(3 * reply, events) == 2 * len(reply)
    assert list(events) == [Replied(b"", b"one")] * 2
    assert conversation.stage is Stage.IDLE
    conversation.receive(reply)
    with pytest.raises(FrameError):
        conversation.next_event()


@pytest.mark.parametrize(("protocol", "stage"), STAGES)
def test_the_short_cut_is_for_goridge_3_in_waiting(protocol: str, stage: Stage) -> None:
    """Elsewhere it takes nothing."""
    conversation = in_stage(protocol, stage)
    events: deque[Event] = deque()
    for spoken in {protocol, "goridge-3"}:
        reply = encode_reply(spoken, b"", b"one")
        taken = conversation.take_several(reply, events)
        assert taken == (len(reply) if (protocol, stage) == ("goridge-3", Stage.WAITING) else 0)
        assert len(events) == bool(taken)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_reply_too_many(protocol: str) -> None:
    """The worst fault of all: a second answer is seen as soon as it is there, and is nobody's reply."""
    conversation = shaken(protocol)
    conversation.begin_job()
    second = encode_reply(protocol, b"", b"two")
    conversation.receive(encode_reply(protocol, b"", b"one") + second)
    assert conversation.next_event() == Replied(b"", b"one")
    assert conversation.pending
    assert conversation.leftover == second
    with pytest.raises(FrameError) as caught:
        conversation.next_event()
    assert caught.value.received == second


def test_a_stream_in_one_chunk() -> None:
    """Parts come one by one, each ping is answered by a pong, and the last frame ends it."""
    conversation = in_stage("goridge-3", Stage.WAITING)
    conversation.receive(
        context_frame_3(0, b"a", b"1", MORE)
        + context_frame_3(0, b"b", b"2", MORE | PING)
        + context_frame_3(0, b"", b"3", MORE | PING)
        + context_frame_3(0, b"", b"", PING)
    )
    assert events_of(conversation) == [Part(b"a", b"1"), Part(b"b", b"2"), Part(b"", b"3"), Replied(b"", b"", True)]
    assert list(conversation.answers) == [PONG_FRAME] * 3
    conversation.begin_job()


def test_an_error_ends_a_stream() -> None:
    """After it the worker is idle."""
    conversation = in_stage("goridge-3", Stage.STREAMING)
    conversation.receive(encode_error("goridge-3", b"boom"))
    assert conversation.next_event() == Failed(b"boom")
    conversation.begin_job()


def test_the_frames_that_answer() -> None:
    """Pong and stop-the-stream, as on the wire's page."""
    assert bytes.fromhex("13 00 00000000 96d18034 08 00") == PONG_FRAME
    assert bytes.fromhex("13 00 00000000 96d18034 02 00") == STOP_STREAM


@pytest.mark.parametrize("protocol", OLD)
def test_nothing_of_a_context_outlives_its_reply(protocol: str) -> None:
    """The next reply's context is its own."""
    conversation = shaken(protocol)
    conversation.begin_job()
    conversation.receive(encode_reply(protocol, b"ctx", b"one"))
    assert conversation.next_event() == Replied(b"ctx", b"one")
    conversation.begin_job()
    conversation.receive(old_frame(protocol, 0x12) + old_frame(protocol, 4, b"two"))
    assert conversation.next_event() == Replied(b"", b"two")


def test_it_says_where_it_is() -> None:
    """`repr` shows dialect and stage."""
    assert repr(Conversation("goridge-2", LIMIT)) == "<Conversation goridge-2: waiting for the handshake>"
    assert repr(shaken("goridge-3")) == "<Conversation goridge-3: idle>"
