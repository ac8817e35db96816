"""The line whose small jobs go as packets: what the child gets, what comes back from it, and what proves what."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests.test_call_line import LIMIT, SHAKEN, Pieces, call, decoded, replied, shown, whole
from trio_workers import _platform
from trio_workers._call_line import CallConversation, PacketLine, Packets
from trio_workers._calls import CALL, END, LOOK, MOST_PACKET, PART, RESULT, STOP, STOP_STREAM, STREAM, Message, encode
from trio_workers._conversation import Shaken, Stage
from trio_workers._goridge import FrameError
from trio_workers._relay import READ_SIZE, FdRelay, LineEnded

pytestmark = pytest.mark.skipif(not _platform.HERE.has_packets(), reason="needs SOCK_SEQPACKET")

HEAD: Final = 28
"""Bytes of a message's header."""
LARGE: Final = MOST_PACKET + 1000
"""Bytes of a call that fits into no packet."""


class Relay(FdRelay):
    """A relay that can be told to take nothing."""

    full = False

    def write_now(self, data: bytes | memoryview) -> int:
        return 0 if self.full else super().write_now(data)


class Child:
    """The other ends of a line."""

    def __init__(self, connection: socket.socket, packets: socket.socket) -> None:
        self.connection = connection
        self.packets = packets

    def packet(self) -> Message | bytes:
        """Read one packet: a job, or `LOOK`."""
        data = self.packets.recv(MOST_PACKET + 1)
        return data if data == LOOK else decoded(data)

    def job(self) -> int:
        """Read one job, as a child does; return its id."""
        found = self.packet()
        if isinstance(found, bytes):
            found = self.message()
        return found.id

    def message(self) -> Message:
        """Read the message on the relay."""
        data = self.connection.recv(LIMIT)
        return decoded(data)

    def unread(self) -> list[int | str]:
        """Read all packets that are there; return their jobs' ids."""
        found: list[int | str] = []
        self.packets.setblocking(False)
        try:
            while True:
                packet = self.packet()
                found.append("LOOK" if isinstance(packet, bytes) else packet.id)
        except BlockingIOError:
            return found

    def answer(self, *ids: int) -> None:
        """Answer these jobs in one write."""
        self.connection.sendall(b"".join(whole(RESULT, id_, b"%d" % id_) for id_ in ids))

    def die(self) -> None:
        """Close both ends, as the end of a process does; the pool's copy stays."""
        self.connection.close()
        self.packets.close()


class Scene:
    """A line whose handshake is done, and its child."""

    def __init__(self, line: PacketLine, child: Child, relay: Relay, conversation: CallConversation) -> None:
        self.line = line
        self.child = child
        self.relay = relay
        self.conversation = conversation

    def ids(self) -> list[int]:
        """The jobs that are on their way, and not answered."""
        return list(self.conversation.ids)

    def lend(self, *jobs: Pieces) -> None:
        for job in jobs:
            assert self.line.begin_ahead(job)
        self.line.flush_behind()

    def take(self, *ids: int) -> None:
        """Take the answers to these jobs, as the exchange does."""
        for number, id_ in enumerate(ids):
            event = self.line.take() or self.line.read()
            assert shown(event) == replied(b"%d" % id_)
            self.line.turn(more=number < len(ids) - 1 or bool(self.ids()))


@contextmanager
def scenes(buffer: int | None = None) -> Iterator[Scene]:
    """A scene; `buffer` is what the pool's packets may take, in the kernel's own count."""
    ours, theirs = socket.socketpair()
    packets, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    packets.setblocking(False)
    if buffer is not None:
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    relay = Relay((fd := ours.detach()), fd, kind="unix")
    child = Child(theirs, others.dup())
    conversation = CallConversation(b"hello", LIMIT)
    line = PacketLine(relay, conversation, Packets(packets, others))
    try:
        theirs.sendall(SHAKEN)
        assert isinstance(line.read(), Shaken)
        yield Scene(line, child, relay, conversation)
    finally:
        line.close()
        child.die()


# what goes where


@pytest.mark.parametrize("size", [HEAD, 100, MOST_PACKET])
async def test_a_small_job_is_a_packet(size: int) -> None:
    """It goes whole, and nothing on the relay."""
    with scenes() as it:
        job = encode(CALL, 7, b"x" * (size - HEAD))
        assert len(job[0]) == size
        assert it.line.begin(job) is None
        assert it.line.whole
        assert it.conversation.stage is Stage.WAITING
        found = it.child.packet()
        assert isinstance(found, Message)
        assert (found.kind, found.id, len(found.body)) == (CALL, 7, size - HEAD)
        it.child.connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            it.child.connection.recv(1)
        it.child.answer(7)
        it.take(7)
        assert it.line.clean
        assert it.conversation.stage is Stage.IDLE


@pytest.mark.parametrize(
    "job",
    [
        encode(CALL, 7, bytes(MOST_PACKET + 1 - HEAD)),
        encode(CALL, 7, bytes(100_000)),
        call(7, b"small", [bytes(50_000)]),
        encode(STREAM, 7, bytes(LARGE)),
    ],
    ids=["one byte too large", "two pieces", "buffers", "stream"],
)
async def test_a_large_job_goes_by_the_relay(job: Pieces) -> None:
    """Behind a packet that says so."""
    with scenes() as it:
        assert it.line.begin(job) is None
        assert it.child.packet() == LOOK
        found = it.child.message()
        assert (found.id, [found.body, *map(bytes, found.buffers)]) == (7, _parts(job))
        assert it.child.unread() == []


def _parts(job: Pieces) -> list[bytes]:
    message = decoded(b"".join(job))
    return [message.body, *map(bytes, message.buffers)]


async def test_a_packet_that_the_socket_does_not_take() -> None:
    """It is larger than what the system allows there: the job takes the relay."""
    with scenes(buffer=1) as it:
        assert it.line.begin(call(7, bytes(8000))) is None
        assert it.child.packet() == LOOK
        assert it.child.message().id == 7
        it.child.answer(7)
        it.take(7)
        assert it.line.begin(call(8)) is None
        assert it.child.job() == 8


async def test_what_is_owed_goes_first() -> None:
    """The stop of a stream that could not be written yet: the next job follows it on the relay, however small it is."""
    with scenes() as it:
        assert it.line.begin(encode(STREAM, 1, b"stream")) is None
        assert it.child.job() == 1
        it.child.connection.sendall(whole(PART, 1, b"part"))
        assert it.line.read() is not None
        it.relay.full = True
        it.line.stop_stream()
        it.child.connection.sendall(whole(END, 1))
        assert it.line.read() is not None
        it.relay.full = False
        assert it.line.begin(call(2)) is None
        assert it.child.packet() == LOOK
        data = it.child.connection.recv(READ_SIZE)
        stop = decoded(data[:HEAD])
        assert (stop.kind, stop.id, decoded(data[HEAD:]).id) == (STOP_STREAM, 1, 2)


# jobs ahead of their turn


async def test_jobs_behind_one_another() -> None:
    """Each is a packet of its own, in their order, written when all of a pass are there; answers come in that order."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        for id_ in (2, 3):
            assert it.line.begin_ahead(call(id_))
        assert it.child.unread() == [1]
        assert it.ids() == [1]
        it.line.flush_behind()
        assert it.child.unread() == [2, 3]
        assert it.ids() == [1, 2, 3]
        it.child.answer(1, 2)
        it.take(1, 2)
        assert not it.line.has_more
        assert it.conversation.stage is Stage.WAITING
        it.child.answer(3)
        it.take(3)
        assert it.line.clean
        assert it.conversation.stage is Stage.IDLE


async def test_is_last() -> None:
    """Whether another is on its way behind the one in front; what is not written is on no way."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        assert it.line.begin_ahead(call(2))
        assert it.line.is_last
        it.line.flush_behind()
        assert not it.line.is_last
        it.child.answer(1)
        it.take(1)
        assert it.line.is_last
        it.lend(call(3))
        assert not it.line.is_last
        it.line.take_back()
        assert it.line.is_last


async def test_a_line_that_is_full() -> None:
    """What does not fit waits until the child has read, and goes before what comes later."""
    with scenes(buffer=1) as it:
        assert it.line.begin(call(1, bytes(1000))) is None
        it.lend(*(call(id_, bytes(1000)) for id_ in range(2, 20)))
        written = it.ids()
        assert 1 <= len(written) < 19
        assert it.child.unread() == written
        read = written
        it.lend(call(20))  # which is small, and there is room
        while found := it.child.unread():
            read = [*read, *found]
            it.line.flush_behind()
        assert read == [*range(1, 21)]


@pytest.mark.parametrize("many", [1, 2])
async def test_the_next_one_in_turn_is_written_at_the_turn(many: int) -> None:
    """With all that were begun ahead and not written yet."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        for id_ in range(2, 2 + many):
            assert it.line.begin_ahead(call(id_))
        assert it.child.unread() == [1]
        it.child.answer(1)
        assert shown(it.line.read()) == replied(b"1")
        it.line.turn(more=True)
        assert it.child.unread() == list(range(2, 2 + many))
        assert it.line.started is True
        assert it.line.whole


async def test_the_next_one_takes_the_relay_where_it_must() -> None:
    """No packet of its size is taken here: at its turn it goes by the relay, in its own task's hands."""
    with scenes(buffer=1) as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2, bytes(8000)), call(3))
        assert it.child.unread() == [1]
        it.child.answer(1)
        assert shown(it.line.read()) == replied(b"1")
        it.line.turn(more=True)
        assert it.child.unread() == ["LOOK"]
        assert not it.line.whole
        assert it.line.started is False
        assert it.line._push()
        assert it.line.started is False
        assert it.child.message().id == 2
        it.line.flush_behind()
        assert it.child.unread() == [3]
        it.child.answer(2, 3)
        it.take(2, 3)
        assert it.line.clean


async def test_nothing_more_for_a_line_at_its_end() -> None:
    """Where the worker is known to have ended, or the relay is closed."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.line.ended = True
        assert not it.line.begin_ahead(call(2))
        it.line.ended = False
        it.line.close()
        assert not it.line.begin_ahead(call(2))


# taking back

TAKEN: Final = {
    "none has been read": (0, [2, 3, 4]),
    "the head has been read": (1, [2, 3, 4]),
    "one behind has been read": (2, [3, 4]),
    "two behind have been read": (3, [4]),
    "all have been read": (4, []),
}


@pytest.mark.parametrize("what", TAKEN)
@pytest.mark.parametrize("dead", [False, True])
async def test_take_back(what: str, dead: bool) -> None:
    """What the child has not read comes back, whether it lives or not; the one in front stays."""
    read, back = TAKEN[what]
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2), call(3), call(4))
        for number in range(read):
            assert it.child.job() == number + 1
        if dead:
            it.child.die()
        assert sorted(it.line.take_back()) == back
        left = [id_ for id_ in (1, 2, 3, 4) if id_ not in back]
        assert it.ids() == left
        assert it.line.take_back() == []
        if dead:
            return
        assert it.child.unread() == ([1] if read == 0 else [])
        it.child.answer(*left)
        it.take(*left)
        assert it.line.clean
        assert it.line.begin(call(5)) is None
        assert it.child.unread() == [5]


async def test_what_is_not_written_comes_back_too() -> None:
    """And is written no more."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2))
        assert it.line.begin_ahead(call(3))
        assert sorted(it.line.take_back()) == [2, 3]
        it.line.flush_behind()
        assert it.child.unread() == [1]
        assert it.ids() == [1]


async def test_whose_they_are() -> None:
    """Told by the ids in their frames."""
    with scenes() as it:
        jobs = [call(id_) for id_ in (1, 2, 3)]
        assert it.line.begin(jobs[0]) is None
        it.lend(*jobs[1:])
        it.child.job()
        it.child.job()
        ids = it.line.take_back()
        assert [it.line.is_of(job, ids) for job in jobs] == [False, False, True]


class Racing:
    """The pool's copy of the child's end, where the child reads in between."""

    def __init__(self, inner: socket.socket, between: Callable[[], object]) -> None:
        self.inner = inner
        self.between = between
        self.count = 0

    def recv(self, *args: Any) -> bytes:
        self.count += 1
        if self.count == 2:
            self.between()
        return self.inner.recv(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


async def test_the_head_itself_comes_back() -> None:
    """The child read the next one as the head was taken: that is in front now, and the head among what came back."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2), call(3))
        read: list[int] = []
        it.line._spare = Racing(it.line._spare, lambda: read.append(it.child.job()))  # type: ignore[assignment]
        assert sorted(it.line.take_back()) == [1, 3]
        assert read == [2]
        assert it.ids() == [2]
        assert it.child.unread() == []
        it.child.answer(2)
        it.take(2)
        assert it.line.clean


@pytest.mark.parametrize("looked", [False, True])
async def test_take_back_behind_a_head_on_the_relay(looked: bool) -> None:
    """The packet that announces it is no job: it stays, or it has been read; the others come back."""
    with scenes(buffer=1) as it:
        assert it.line.begin(call(1, bytes(8000))) is None
        it.lend(call(2), call(3))
        if looked:
            assert it.child.packet() == LOOK
        assert sorted(it.line.take_back()) == [2, 3]
        assert it.ids() == [1]
        assert it.child.unread() == ([] if looked else ["LOOK"])
        assert it.child.message().id == 1
        it.child.answer(1)
        it.take(1)
        assert it.line.clean


# what proves what

READ: Final[dict[str, tuple[int, bool]]] = {
    "nothing": (0, False),
    "the head": (1, True),
    "one behind too": (2, True),
}


@pytest.mark.parametrize("what", READ)
async def test_what_has_started(what: str) -> None:
    """After the child's death: the head is known by its packet, and what has not come back has started."""
    read, started = READ[what]
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2), call(3))
        for _ in range(read):
            it.child.job()
        it.child.die()
        it.line.take_back()
        with pytest.raises(LineEnded):
            it.line.read()
        it.line.finish()
        assert it.line.started is started
        stayed = len(it.ids())
        assert it.line.unread_jobs([100] * stayed) == [not started, *[False] * (stayed - 1)]
        assert it.line.answered is False


@pytest.mark.parametrize("what", ["nothing", "LOOK", "all"])
async def test_what_has_started_by_the_relay(what: str) -> None:
    """A large job has when its message was read, not when the packet was; whatever the child had before."""
    with scenes(buffer=1) as it:
        assert it.line.begin(call(9)) is None
        assert it.child.job() == 9
        it.child.answer(9)
        it.take(9)
        assert it.line.begin(call(1, bytes(8000))) is None
        it.lend(call(2))
        if what != "nothing":
            assert it.child.packet() == LOOK
        if what == "all":
            it.child.message()
        it.child.die()
        assert list(it.line.take_back()) == [2]
        with pytest.raises(LineEnded):
            it.line.read()
        assert it.line.started is (what == "all")
        assert it.line.unread_jobs([8000]) == [what != "all"]


async def test_what_has_started_behind_the_relay() -> None:
    """A small job behind a large one is known by its packet."""
    with scenes() as it:
        assert it.line.begin(call(1, bytes(LARGE))) is None
        it.lend(call(2))
        assert it.child.job() == 1
        it.child.answer(1)
        it.take(1)
        it.child.die()
        assert it.line.started is False
        assert it.line.unread_jobs([100]) == [True]


async def test_an_answer_is_proof_enough() -> None:
    """Of a child that said half a word, and left others unread."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2), call(3))
        it.child.job()
        it.child.answer(1)
        it.take(1)
        assert it.line.answered is False
        it.child.job()
        it.child.connection.sendall(whole(RESULT, 2, b"2")[:-1])
        it.child.die()
        it.line.finish()
        assert it.line.started is True
        assert it.line.answered is True


async def test_a_job_that_was_never_read() -> None:
    """Alone in its line."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.child.die()
        assert it.line.started is False


# the end


async def test_stop() -> None:
    """It comes as a packet, behind all that was written."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.line.stop_worker()
        assert it.child.job() == 1
        stop = it.child.packet()
        assert isinstance(stop, Message)
        assert (stop.kind, stop.body) == (STOP, b"")


async def test_stop_a_child_that_reads_nothing() -> None:
    """There is no room for it, and no error: who does not stop is killed when its time is up."""
    with scenes(buffer=1) as it:
        assert it.line.begin(call(1, bytes(3000))) is None
        it.lend(*(call(id_) for id_ in range(2, 30)))
        it.line.stop_worker()
        found = it.child.unread()
        assert found[0] == 1
        assert 0 not in found


async def test_close() -> None:
    """Twice is harmless, and a number that another file has by then is left alone."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        assert it.line.begin_ahead(call(2))
        it.line.close()
        it.line.close()
        one, other = socket.socketpair()
        with one, other:
            it.line.flush_behind()
            it.line.stop_worker()
            assert it.line.begin(call(3)) == "the relay is closed"
            for end in (one, other):
                end.setblocking(False)
                with pytest.raises(BlockingIOError):
                    end.recv(1)


@pytest.mark.parametrize("size", [10, LARGE])
async def test_bytes_that_no_job_asked_for(size: int) -> None:
    """They are seen before a job is written, and nothing of it is."""
    with scenes() as it:
        it.child.answer(1)
        assert "bytes came that no job asked for" in str(it.line.begin(call(1, bytes(size))))
        assert it.child.unread() == []


@pytest.mark.parametrize("size", [10, LARGE])
async def test_nobody_is_there(size: int) -> None:
    """The other end of the packets is closed everywhere: the line carries no job."""
    with scenes() as it:
        it.child.packets.close()
        it.line._spare.close()
        assert "the worker can't be given a job" in str(it.line.begin(call(1, bytes(size))))
        assert it.ids() == []


async def test_a_lie_behind_an_answer() -> None:
    """An answer to another job is nobody's; the one before it counts."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2), call(3))
        it.child.answer(1, 3)
        it.take(1)
        with pytest.raises(FrameError, match="it answered job 3, but it was given job 2"):
            it.line.take()
        assert it.line.fault is not None
        assert it.line.take() is None
