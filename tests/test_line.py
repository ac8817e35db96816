"""What a `Line` writes and when, on a relay of bounded capacity: control frames never go into the middle of a job."""

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_workers._conversation import PONG_FRAME, STOP_STREAM, Conversation, Part, Replied
from trio_workers._goridge import MORE, PING, STOP, context_frame_3, encode_control, encode_job
from trio_workers._relay import Line, LineEnded, Relay

LIMIT: Final = 1 << 20
STOP_WORKER: Final = encode_control("goridge-3", STOP)


class Narrow(Relay):
    """A relay that takes as many bytes as there is room for."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.taken = bytearray()
        self.said = bytearray()
        self.broken = False

    def write_now(self, data: bytes | memoryview) -> int:
        assert len(data), "an empty write says 0, which means that the relay is full"
        if self.broken:
            raise BrokenPipeError
        piece = data[: self.room]
        self.room -= len(piece)
        self.taken += piece
        return len(piece)

    def read_now(self, size: int) -> bytes | None:
        data = bytes(self.said[:size])
        del self.said[:size]
        return data or (b"" if self.closed else None)

    def has_input(self) -> bool:
        return bool(self.said) or self.closed

    async def wait_readable(self) -> None:
        raise NotImplementedError

    async def wait_writable(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def ready(relay: Narrow) -> Line:
    """A line whose handshake is done."""
    line = Line(relay, Conversation("goridge-3", LIMIT))
    relay.said += encode_control("goridge-3", b'{"pid":1}')
    line.read()
    return line


def part(body: bytes, bits: int = MORE) -> bytes:
    return context_frame_3(0, b"", body, bits)


def job(body: bytes) -> bytes:
    return b"".join(encode_job("goridge-3", b"", body))


@pytest.mark.parametrize("room", [1, 15, 16, 17, 100])
def test_pong_waits_for_the_rest_of_the_job(room: int) -> None:
    """A ping that comes while a job is half written is answered behind the job."""
    relay = Narrow(room)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"x" * 200)) is None
    assert not line.whole
    relay.said += part(b"early", MORE | PING)
    assert line.read() == Part(b"", b"early")
    assert line.read() is None
    assert bytes(relay.taken) == job(b"x" * 200)[:room]
    relay.room = LIMIT
    assert line._push()
    assert line.whole
    assert bytes(relay.taken) == job(b"x" * 200) + PONG_FRAME
    relay.said += part(b"end", 0)
    assert line.read() == Replied(b"", b"end", True)
    assert line.clean


@pytest.mark.parametrize("room", [0, 1, 11])
def test_stop_stream_that_is_not_taken_at_once(room: int) -> None:
    """A relay that is full takes the frame later, when the line is read next: not before, not in part, and once."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"x")) is None
    relay.said += part(b"one")
    assert line.read() == Part(b"", b"one")
    relay.room = room
    line.stop_stream()
    assert bytes(relay.taken) == job(b"x") + STOP_STREAM[:room]
    relay.room = LIMIT
    relay.said += part(b"two") + part(b"", 0)
    assert line.read() == Part(b"", b"two")
    assert bytes(relay.taken) == job(b"x") + STOP_STREAM
    assert line.take() == Replied(b"", b"", True)
    assert line.clean


@pytest.mark.parametrize("room", [0, 1, 11])
def test_what_is_owed_goes_in_front_of_the_next_job(room: int) -> None:
    """A control frame of which a part is out is made whole before another job begins."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"x")) is None
    relay.room = room
    relay.said += part(b"end", PING)
    assert line.read() == Replied(b"", b"end", False)
    assert line.clean
    relay.room = LIMIT
    assert line.begin(encode_job("goridge-3", b"", b"y")) is None
    assert bytes(relay.taken) == job(b"x") + PONG_FRAME + job(b"y")


def test_stop_waits_for_the_rest_of_the_job() -> None:
    """The frame that ends a worker softly does not go into the middle of a job either."""
    relay = Narrow(20)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"x" * 200)) is None
    line.stop_worker()
    assert len(relay.taken) == 20
    relay.room = LIMIT
    assert line._push()
    assert bytes(relay.taken) == job(b"x" * 200) + STOP_WORKER


def test_owed_to_nobody() -> None:
    """Control frames that nobody reads any more are dropped: the end is told by the relay's other direction."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"x")) is None
    relay.broken = True
    relay.said += part(b"one", MORE | PING)
    assert line.read() == Part(b"", b"one")
    line.stop_stream()
    line.stop_worker()
    relay.close()
    with pytest.raises(LineEnded):
        line.read()


Step = tuple[str, int]
STEPS: Final = st.lists(
    st.one_of(
        st.tuples(st.just("room"), st.integers(0, 60)),
        st.tuples(st.just("part"), st.just(0)),
        st.tuples(st.just("ping"), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 80)),
        st.tuples(st.just("stop_stream"), st.just(0)),
    ),
    max_size=40,
)


@given(steps=STEPS)
def test_frames_stay_whole(steps: list[Step]) -> None:
    """However little the relay takes at a time, what it took is whole frames, jobs in their order, pongs counted."""
    relay = Narrow(10)
    line = ready(relay)
    jobs = [b"j" * 50]
    assert line.begin(encode_job("goridge-3", b"", jobs[0])) is None
    pings = stops = 0
    for what, number in steps:
        match what:
            case "room":
                relay.room += number
                line._push()
            case "part":
                relay.said += part(b"p")
                assert line.read() == Part(b"", b"p")
            case "ping":
                relay.said += part(b"p", MORE | PING)
                assert line.read() == Part(b"", b"p")
                pings += 1
            case "stop_stream":
                stops += line.conversation.stage.name == "STREAMING"
                line.stop_stream()
            case _:
                if not line.whole:
                    continue  # to answer what was not read is a fault
                relay.said += part(b"e", 0)
                assert isinstance(line.read(), Replied)
                jobs.append(b"%d" % len(jobs) * number)
                assert line.begin(encode_job("goridge-3", b"", jobs[-1])) is None
    relay.room = 1 << 20
    line._push()
    data = bytes(relay.taken)
    seen: list[bytes] = []
    counts = {PONG_FRAME: 0, STOP_STREAM: 0}
    while data:
        if data[:12] in counts:
            counts[data[:12]] += 1
            data = data[12:]
        else:
            whole = job(jobs[len(seen)])
            assert data.startswith(whole)
            seen.append(whole)
            data = data[len(whole) :]
    assert len(seen) == len(jobs)
    assert counts == {PONG_FRAME: pings, STOP_STREAM: stops}
