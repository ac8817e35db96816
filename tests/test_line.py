"""What a `Line` writes and when, on a relay of bounded capacity: control frames never go into the middle of a job."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_workers._conversation import PONG_FRAME, STOP_STREAM, Conversation, Part, Replied, Stage
from trio_workers._goridge import MORE, PING, PIPE_BUF, STOP, context_frame_3, encode_control, encode_job
from trio_workers._relay import FdRelay, Line, LineEnded, Relay

LIMIT: Final = 1 << 20
STOP_WORKER: Final = encode_control("goridge-3", STOP)


class Narrow(Relay):
    """A relay that takes as many bytes as there is room for."""

    wakes = True

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


# jobs ahead of their turn


def reply(body: bytes, bits: int = 0) -> bytes:
    return context_frame_3(0, b"", body, bits)


def lend(line: Line, *bodies: bytes) -> None:
    for body in bodies:
        assert line.begin_ahead(encode_job("goridge-3", b"", body))
    line.flush_behind()


def take(line: Line, *bodies: bytes, more: bool = True) -> None:
    """Take these answers, as the exchange does; `more`: there are jobs behind the last."""
    for number, body in enumerate(bodies):
        assert (line.take() or line.read()) == Replied(b"", body)
        line.turn(more=more or number < len(bodies) - 1)


def test_jobs_that_are_begun_ahead_are_written_together() -> None:
    """When all of a pass are there, in their order; answers come in that order, several in one read."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    for body in (b"two", b"three"):
        assert line.begin_ahead(encode_job("goridge-3", b"", body))
    assert bytes(relay.taken) == job(b"one")
    assert line.is_last
    line.flush_behind()
    assert bytes(relay.taken) == job(b"one") + job(b"two") + job(b"three")
    assert not line.is_last
    relay.said += reply(b"1") + reply(b"2")
    take(line, b"1", b"2")
    assert line.is_last
    assert not line.has_more
    relay.said += reply(b"3")
    take(line, b"3", more=False)
    assert line.clean


def test_writes_are_whole_frames_of_no_more_than_a_pipe_takes_at_once() -> None:
    """Small ones together, up to PIPE_BUF; none is cut."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    writes: list[bytes] = []
    write_now = relay.write_now
    relay.write_now = lambda data: (writes.append(bytes(data)), write_now(data))[1]  # type: ignore[method-assign]
    head = len(job(b""))
    whole = [b"a" * (PIPE_BUF - head)]
    together = [b"b" * 1000, b"c" * 1000, b"d" * (PIPE_BUF - 3 * head - 2000)]
    too_much = [b"e" * 100, b"f" * (PIPE_BUF + 1 - 2 * head - 100)]
    lend(line, *whole, *together, *too_much, b"last")
    assert writes == [job(*whole), b"".join(map(job, together)), job(too_much[0]), job(too_much[1]) + job(b"last")]
    assert len(writes[0]) == len(writes[1]) == PIPE_BUF


@pytest.mark.parametrize("room", [0, 1, 17, 20])
def test_a_relay_that_takes_a_part(room: int) -> None:
    """Of several that go together: no other goes in between, and the rest is written when its turn has come."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    relay.room = room
    lend(line, b"two", b"three")
    assert line.whole == (room == 0)
    assert line.is_last == (room == 0)  # what is begun is on its way
    lend(line, b"four")
    if room:
        relay.room = LIMIT
        line.flush_behind()
    assert bytes(relay.taken) == (job(b"one") + job(b"two") + job(b"three"))[: len(job(b"one")) + room]
    relay.room = LIMIT
    relay.said += reply(b"1")
    take(line, b"1")
    assert line._push()
    line.flush_behind()
    assert bytes(relay.taken) == job(b"one") + job(b"two") + job(b"three") + job(b"four")
    relay.said += reply(b"2") + reply(b"3") + reply(b"4")
    take(line, b"2", b"3", b"4", more=False)
    assert line.clean


def test_a_pong_does_not_go_into_the_middle_of_a_job_that_lies_behind() -> None:
    """It waits for the rest of that; and no job goes into the middle of a pong."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    relay.room = 5
    lend(line, b"two")
    relay.said += reply(b"1", PING)
    take(line, b"1")
    relay.room = 3 + len(job(b"two")) - 5
    assert line._push()
    assert bytes(relay.taken) == job(b"one") + job(b"two") + PONG_FRAME[:3]
    relay.room = LIMIT
    lend(line, b"three")
    assert bytes(relay.taken) == job(b"one") + job(b"two") + PONG_FRAME[:3]
    relay.said += reply(b"2")
    take(line, b"2")
    assert line._push()
    assert bytes(relay.taken) == job(b"one") + job(b"two") + PONG_FRAME + job(b"three")


def test_the_next_in_turn_where_nothing_could_be_written() -> None:
    """A pong of which a part is out keeps all others back; at its turn the next job follows it, its own task writes."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    assert line.begin_ahead(encode_job("goridge-3", b"", b"two"))
    assert line.begin_ahead(encode_job("goridge-3", b"", b"three"))
    relay.room = 5
    relay.said += reply(b"1", PING)
    assert line.read() == Replied(b"", b"1")
    assert bytes(relay.taken) == job(b"one") + PONG_FRAME[:5]
    line.turn(more=True)
    assert bytes(relay.taken) == job(b"one") + PONG_FRAME[:5]
    assert (line.whole, line.started, line.is_last) == (False, False, True)
    assert line.conversation.stage is Stage.WAITING
    relay.room = LIMIT
    assert line._push()
    line.flush_behind()
    assert bytes(relay.taken) == job(b"one") + PONG_FRAME + job(b"two") + job(b"three")
    relay.said += reply(b"2") + reply(b"3")
    take(line, b"2", b"3", more=False)
    assert line.clean


def test_the_next_in_turn_is_written_at_the_turn() -> None:
    """With all that lie behind it, where the exchange has not written them yet."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    for body in (b"two", b"three"):
        assert line.begin_ahead(encode_job("goridge-3", b"", body))
    relay.said += reply(b"1")
    take(line, b"1")
    assert bytes(relay.taken) == job(b"one") + job(b"two") + job(b"three")
    assert line.whole
    assert not line.is_last


def test_nothing_is_written_at_a_turn_that_nobody_has() -> None:
    """Those behind have been taken out of the line by the roster, which is about to be told here as well."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    assert line.begin_ahead(encode_job("goridge-3", b"", b"two"))
    relay.said += reply(b"1")
    take(line, b"1", more=False)
    assert bytes(relay.taken) == job(b"one")
    assert len(line.take_back()) == 1
    assert line.conversation.stage is Stage.IDLE


def test_what_is_not_written_can_be_taken_back() -> None:
    """And nothing else: what a pipe has, it has."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    jobs = [encode_job("goridge-3", b"", body) for body in (b"one", b"two", b"three", b"four")]
    assert line.begin(jobs[0]) is None
    assert line.begin_ahead(jobs[1])
    line.flush_behind()
    for frames in jobs[2:]:
        assert line.begin_ahead(frames)
    ids = line.take_back()
    # The one in front may have let go of its frames: a reply in parts that its caller did not want.
    assert not line.is_of((), ids)
    assert [line.is_of(frames, ids) for frames in jobs] == [False, False, True, True]
    line.flush_behind()
    assert bytes(relay.taken) == job(b"one") + job(b"two")
    assert not line.take_back()
    relay.said += reply(b"1") + reply(b"2")
    take(line, b"1", b"2", more=False)
    assert line.clean


def test_no_job_ahead_where_a_reader_can_not_be_woken() -> None:
    """Nor on a line whose worker has ended, or that is closed."""
    for name, where in (("wakes", "relay"), ("ended", "line"), ("closed", "relay")):
        relay = Narrow(LIMIT)
        line = ready(relay)
        assert line.begin(encode_job("goridge-3", b"", b"one")) is None
        setattr(relay if where == "relay" else line, name, name != "wakes")
        assert not line.begin_ahead(encode_job("goridge-3", b"", b"two"))
        line.flush_behind()
        assert bytes(relay.taken) == job(b"one")


def test_nobody_reads_what_lies_behind() -> None:
    """No error: whoever reads the line sees its end."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    relay.broken = True
    lend(line, b"two")
    relay.close()
    with pytest.raises(LineEnded):
        line.read()


def test_what_lies_behind_goes_with_the_line() -> None:
    """A line that is closed holds nothing."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    assert line.begin_ahead(encode_job("goridge-3", b"", b"two"))
    line.close()
    line.close()
    assert not line.take_back()
    line.flush_behind()
    assert bytes(relay.taken) == job(b"one")


def test_half_an_answer_is_that_of_the_job_in_front() -> None:
    """`answered` is about that one, whichever read brought the bytes."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    lend(line, b"two")
    assert not line.answered
    relay.said += reply(b"1") + reply(b"2")[:5]
    take(line, b"1")
    assert line.answered
    relay.said += reply(b"2")[5:]
    assert line.read() == Replied(b"", b"2")
    lend(line, b"three")
    line.turn(more=True)
    assert not line.answered


def test_an_answer_inside_another() -> None:
    """What comes after half an answer is its rest, whatever it looks like."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    lend(line, b"two")
    body = b"begins like that" + reply(b"forged")
    data = reply(body)
    relay.said += data[: -len(reply(b"forged"))]
    assert line.read() is None
    relay.said += reply(b"forged") + reply(b"2")
    take(line, body, b"2", more=False)
    assert line.clean


def test_answers_that_a_dead_worker_left() -> None:
    """All of them are kept, in their order."""
    relay = Narrow(LIMIT)
    line = ready(relay)
    assert line.begin(encode_job("goridge-3", b"", b"one")) is None
    lend(line, b"two", b"three")
    relay.said += reply(b"1") + reply(b"2") + reply(b"3")[:-1]
    relay.close()
    line.finish()
    assert list(line.events) == [Replied(b"", b"1"), Replied(b"", b"2")]
    assert line.fault is None


# over a pipe


class Worker(NamedTuple):
    """The other ends of a line over pipes."""

    jobs: int
    answers: int

    def read(self, count: int) -> bytes:
        data = os.read(self.jobs, count)
        assert len(data) == count
        return data

    def say(self, data: bytes) -> None:
        assert os.write(self.answers, data) == len(data)


@contextmanager
def pipes() -> Iterator[tuple[Line, Worker]]:
    """A line over pipes whose handshake is done, and its worker."""
    (theirs, write_fd), (read_fd, answers) = os.pipe(), os.pipe()
    os.set_blocking(write_fd, False)
    os.set_blocking(read_fd, False)
    relay = FdRelay(read_fd, write_fd, kind="pipe")
    line = Line(relay, Conversation("goridge-3", LIMIT))
    worker = Worker(theirs, answers)
    try:
        worker.say(encode_control("goridge-3", b'{"pid":1}'))
        line.read()
        yield line, worker
    finally:
        line.close()
        os.close(theirs)
        os.close(answers)


BODIES: Final = (b"one", b"twice", b"thrice and more")
SIZES: Final = [len(job(body)) for body in BODIES]
ENDS: Final = [sum(SIZES[: number + 1]) for number in range(3)]


@pytest.mark.parametrize("read", sorted({0, 1, *ENDS, *(end - 1 for end in ENDS), *(end + 1 for end in ENDS[:2])}))
async def test_what_a_dead_worker_had_read(read: int) -> None:
    """Its pipe tells to the byte: a job whose last byte is unread has not started, any other was read whole."""
    with pipes() as (line, worker):
        assert line.begin(encode_job("goridge-3", b"", BODIES[0])) is None
        lend(line, *BODIES[1:])
        worker.read(read)
        assert line.unread_jobs(SIZES) == [read < end for end in ENDS]


@pytest.mark.parametrize("cut", [1, SIZES[2] - 1, SIZES[2], SIZES[2] + 1])
async def test_what_a_dead_worker_had_read_of_what_was_not_written_whole(cut: int) -> None:
    """What is still here was not read either, though all that was written was."""
    with pipes() as (line, worker):
        assert line.begin(encode_job("goridge-3", b"", BODIES[0])) is None
        write_now = line.relay.write_now
        line.relay.write_now = lambda data: write_now(data[:-cut])  # type: ignore[method-assign]
        lend(line, *BODIES[1:])
        worker.read(ENDS[-1] - cut)
        assert not line.whole
        assert line.unread_jobs(SIZES) == [False, cut > SIZES[2], True]


@pytest.mark.parametrize("read", [0, ENDS[0], ENDS[1] - 12, ENDS[1] - 11, ENDS[1], ENDS[1] + 1, ENDS[1] + 12])
async def test_what_a_dead_worker_had_read_beside_pongs(read: int) -> None:
    """They may be what is unread: only what is more than they are proves that a job was not read."""
    with pipes() as (line, worker):
        assert line.begin(encode_job("goridge-3", b"", BODIES[0])) is None
        lend(line, BODIES[1])
        worker.say(part(b"part", MORE | PING))
        assert line.read() == Part(b"", b"part")
        worker.read(read)
        left = ENDS[1] + len(PONG_FRAME) - read
        expected = [True if left - size > 12 else None if left - size > 0 else False for size in (SIZES[1], 0)]
        assert line.unread_jobs(SIZES[:2]) == expected


@pytest.mark.parametrize(
    ("read", "started"),
    [(ENDS[0], False), (ENDS[1] - 1, False), (ENDS[1], None), (ENDS[1] + 11, None), (ENDS[1] + 12, True)],
)
async def test_a_job_with_a_pong_behind_it(read: int, started: bool | None) -> None:
    """The pong answers the job before it. Unread, it proves nothing; more than it, everything."""
    with pipes() as (line, worker):
        assert line.begin(encode_job("goridge-3", b"", BODIES[0])) is None
        lend(line, BODIES[1])
        worker.say(reply(b"1", PING))
        take(line, b"1")
        worker.read(read)
        assert line.started is started


async def test_a_pipe_takes_jobs_whole_or_not_at_all() -> None:
    """However full it is: what did not fit is written when the worker has read."""
    with pipes() as (line, worker):
        capacity = fcntl.fcntl(worker.jobs, fcntl.F_SETPIPE_SZ, 4096)
        assert line.begin(encode_job("goridge-3", b"", b"one")) is None
        bodies = [b"%d" % number * 900 for number in range(9)]
        lend(line, *bodies)
        assert line.whole
        expected = job(b"one") + b"".join(map(job, bodies))
        found = b""
        while len(found) < len(expected):
            data = os.read(worker.jobs, capacity)
            found += data
            assert expected.startswith(found)
            # Only whole jobs are there.
            assert found in [expected[:end] for end in _ends(b"one", *bodies)]
            line.flush_behind()
        assert found == expected


def _ends(*bodies: bytes) -> list[int]:
    return [sum(len(job(body)) for body in bodies[: number + 1]) for number in range(len(bodies))]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_socket_proves_nothing_of_several(kind: str) -> None:
    """It counts no bytes that could be told apart."""
    one, other = socket.socketpair()
    one.setblocking(False)
    line = Line(FdRelay((fd := one.detach()), fd, kind=kind), Conversation("goridge-3", LIMIT))
    with other:
        other.sendall(encode_control("goridge-3", b'{"pid":1}'))
        line.read()
        assert line.begin(encode_job("goridge-3", b"", BODIES[0])) is None
        lend(line, *BODIES[1:])
        assert line.unread_jobs(SIZES) == [None, None, None]
        line.close()
