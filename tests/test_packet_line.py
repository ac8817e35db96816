"""The line that takes what lies behind a job as packets: what the child gets, what comes back, and what proves what."""

import faulthandler
import os
import socket
import struct
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
from trio_workers._region import ASLEEP, Region
from trio_workers._relay import READ_SIZE, FdRelay, LineEnded
from trio_workers.child._functions import Child as RealChild

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

    def packet(self) -> int:
        """Read one packet; return its job's id."""
        return decoded(self.packets.recv(MOST_PACKET + 1)).id

    def message(self) -> Message:
        """Read the message on the relay."""
        return decoded(self.connection.recv(LIMIT))

    def said(self) -> list[tuple[int, int]]:
        """Read what is on the relay: the kinds and the ids of the messages, which have no bodies."""
        try:
            data = self.connection.recv(READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        messages = [decoded(data[at : at + HEAD]) for at in range(0, len(data), HEAD)]
        return [(message.kind, message.id) for message in messages]

    def unread(self) -> list[int]:
        """Read all packets that are there; return their jobs' ids."""
        found: list[int] = []
        self.packets.setblocking(False)
        try:
            while True:
                found.append(self.packet())
        except BlockingIOError:
            self.packets.setblocking(True)
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

    def __init__(
        self, line: PacketLine, child: Child, relay: Relay, conversation: CallConversation, region: Region
    ) -> None:
        self.line = line
        self.child = child
        self.relay = relay
        self.conversation = conversation
        self.region = region

    def ids(self) -> list[int]:
        """The jobs that are on their way, and not answered."""
        return list(self.conversation.ids)

    def begin(self, job: Pieces) -> None:
        """Begin a job, and let the child read it."""
        assert self.line.begin(job) is None
        assert self.child.message().id == self.ids()[0]

    def sleep(self, latest: int) -> None:
        """Let the child say that it sleeps, and which job it read from the relay last; 0: it is awake."""
        struct.pack_into("I", self.region._memory, 4 * ASLEEP, latest)

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
    region = Region()
    conversation = CallConversation(b"hello", LIMIT, region=region)
    line = PacketLine(relay, conversation, Packets(packets, others))
    try:
        theirs.sendall(SHAKEN)
        assert isinstance(line.read(), Shaken)
        yield Scene(line, child, relay, conversation, region)
    finally:
        line.close()
        child.die()
        region.close()


# what goes where


@pytest.mark.parametrize(
    "job",
    [
        encode(CALL, 7),
        encode(CALL, 7, b"small"),
        encode(CALL, 7, bytes(LARGE)),
        encode(CALL, 7, bytes(100_000)),
        call(7, b"small", [bytes(50_000)]),
        encode(STREAM, 7, bytes(LARGE)),
    ],
    ids=["empty", "small", "large", "two pieces", "buffers", "stream"],
)
async def test_a_job_for_an_idle_child_goes_by_the_relay(job: Pieces) -> None:
    """Whatever its size, and there is no packet: the child waits there, and whoever is killed in `recv` takes none."""
    with scenes() as it:
        it.sleep(5)
        assert it.line.begin(job) is None
        assert it.line.whole
        assert it.conversation.stage is Stage.WAITING
        assert it.conversation.latest == 7
        found = it.child.message()
        assert (found.id, [found.body, *map(bytes, found.buffers)]) == (7, _parts(job))
        assert it.child.unread() == []


def _parts(job: Pieces) -> list[bytes]:
    message = decoded(b"".join(job))
    return [message.body, *map(bytes, message.buffers)]


async def test_what_is_owed_goes_first() -> None:
    """The stop of a stream that could not be written yet: the next job follows it on the relay."""
    with scenes() as it:
        it.begin(encode(STREAM, 1, b"stream"))
        it.child.connection.sendall(whole(PART, 1, b"part"))
        assert it.line.read() is not None
        it.relay.full = True
        it.line.stop_stream()
        it.child.connection.sendall(whole(END, 1))
        assert it.line.read() is not None
        it.relay.full = False
        assert it.line.begin(encode(CALL, 2)) is None
        assert it.child.said() == [(STOP_STREAM, 1), (CALL, 2)]


# jobs ahead of their turn


async def test_jobs_behind_one_another() -> None:
    """Each is a packet of its own, in their order, written when all of a pass are there; answers come in that order."""
    with scenes() as it:
        it.begin(call(1))
        for id_ in (2, 3):
            assert it.line.begin_ahead(call(id_))
        assert it.child.unread() == []
        assert it.ids() == [1]
        it.line.flush_behind()
        assert it.child.unread() == [2, 3]
        assert it.child.said() == []
        assert it.ids() == [1, 2, 3]
        it.child.answer(1, 2)
        it.take(1, 2)
        assert not it.line.has_more
        assert it.conversation.stage is Stage.WAITING
        it.child.answer(3)
        it.take(3)
        assert it.line.clean
        assert it.conversation.stage is Stage.IDLE


async def test_they_wait_until_the_head_has_been_read() -> None:
    """What is behind a job that lies on the relay is no packet before the child has read that one."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(call(2), call(3))
        assert it.child.unread() == []
        assert it.ids() == [1]
        assert it.line.is_last
        assert it.child.message().id == 1
        it.lend(call(4))
        assert it.child.unread() == [2, 3, 4]
        assert it.ids() == [1, 2, 3, 4]


async def test_they_wait_until_the_head_has_been_written() -> None:
    """A relay that takes nothing has nothing unread either: that says nothing of a job that is not on it yet."""
    with scenes() as it:
        it.relay.full = True
        assert it.line.begin(call(1)) is None
        it.lend(call(2))
        assert it.child.unread() == []
        it.relay.full = False
        assert it.line._push()
        it.line.flush_behind()
        assert it.child.unread() == []
        assert it.child.message().id == 1
        it.line.flush_behind()
        assert it.child.unread() == [2]


async def test_behind_a_packet_nothing_waits() -> None:
    """Once the one on the relay is answered: whether the child has read the packets before or not."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2))
        it.child.answer(1)
        it.take(1)
        it.lend(call(3))
        assert it.child.unread() == [2, 3]


async def test_none_without_a_region() -> None:
    """Nobody could see whether the child is asleep: such a line has one job."""
    with scenes() as it:
        it.begin(call(1))
        it.conversation.region = None
        assert not it.line.begin_ahead(call(2))
        it.line.flush_behind()
        assert it.child.unread() == []
        assert it.child.said() == []
        it.conversation.region = it.region
        assert it.line.begin_ahead(call(2))


@pytest.mark.parametrize(("asleep", "said"), [(9, [(LOOK, 0)]), (8, []), (0, [])], ids=["asleep", "older", "awake"])
async def test_a_sleeping_child_is_woken(asleep: int, said: list[tuple[int, int]]) -> None:
    """By a message, if it sleeps after the last job that took the relay. If it slept before, it has one to read."""
    with scenes() as it:
        it.begin(call(8))
        it.child.answer(8)
        it.take(8)
        it.begin(call(9))
        it.sleep(asleep)
        it.lend(call(10))
        assert it.child.said() == said
        assert it.child.unread() == [10]


async def test_a_child_whose_relay_is_unread_is_not_woken() -> None:
    """There is nothing for it yet but what it finds there."""
    with scenes() as it:
        assert it.line.begin(call(9)) is None
        it.sleep(9)
        it.lend(call(10))
        assert it.child.message().id == 9
        assert it.child.said() == []


async def test_is_last() -> None:
    """Whether another is on its way behind the one in front; what is not written is on no way."""
    with scenes() as it:
        it.begin(call(1))
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
        it.begin(call(1))
        it.lend(*(call(id_, bytes(1000)) for id_ in range(2, 20)))
        written = it.ids()[1:]
        assert 1 <= len(written) < 18
        assert it.child.unread() == written
        read = written
        it.lend(call(20))  # which is small, and there is room
        while found := it.child.unread():
            read = [*read, *found]
            it.line.flush_behind()
        assert read == [*range(2, 21)]


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("asleep", [False, True])
async def test_the_next_one_in_turn_is_written_at_the_turn(many: int, asleep: bool) -> None:
    """With all that were begun ahead and not written yet; a child that went to sleep meanwhile is woken."""
    with scenes() as it:
        assert it.line.begin(call(1)) is None
        it.lend(*(call(id_) for id_ in range(2, 2 + many)))
        assert it.child.message().id == 1
        it.child.answer(1)
        it.sleep(1 if asleep else 0)
        assert it.child.unread() == []
        assert shown(it.line.read()) == replied(b"1")
        it.line.turn(more=True)
        assert it.child.said() == ([(LOOK, 0)] if asleep else [])
        assert it.child.unread() == list(range(2, 2 + many))
        assert it.line.started is True
        assert it.line.whole
        assert it.conversation.latest == 1


async def test_the_next_one_takes_the_relay_where_it_must() -> None:
    """No packet of its size is taken here: at its turn it goes by the relay, in its own task's hands."""
    with scenes(buffer=1) as it:
        it.begin(call(1))
        it.lend(call(2, bytes(8000)), call(3))
        assert it.child.unread() == []
        it.child.answer(1)
        assert shown(it.line.read()) == replied(b"1")
        it.line.turn(more=True)
        assert not it.line.whole
        assert it.line.started is False
        assert it.conversation.latest == 2
        it.line.flush_behind()
        assert it.child.unread() == []  # the one in front has not even been written
        assert it.line._push()
        assert it.line.started is False
        it.line.flush_behind()
        assert it.child.unread() == []
        assert it.child.message().id == 2
        assert it.line.started is True
        it.sleep(1)
        it.line.flush_behind()
        assert it.child.said() == []
        assert it.child.unread() == [3]
        it.child.answer(2, 3)
        it.take(2, 3)
        assert it.line.clean


async def test_a_look_is_no_part_of_the_job_behind_it() -> None:
    """What was said to wake a child says nothing of a job that took the relay later: unread, it has not started."""
    with scenes(buffer=1) as it:
        it.begin(call(1))
        it.sleep(1)
        it.lend(call(2))
        assert it.child.unread() == [2]
        it.lend(call(3, bytes(8000)))
        it.child.answer(1)
        it.take(1)
        it.child.answer(2)
        assert shown(it.line.read()) == replied(b"2")
        it.line.turn(more=True)
        assert it.line._push()
        assert it.line.started is False
        it.child.die()
        with pytest.raises(LineEnded):
            it.line.read()
        assert it.line.started is False


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
    "nothing has been read": (0, [2, 3, 4]),
    "the head has been read": (1, [2, 3, 4]),
    "one behind has been read": (2, [3, 4]),
    "two behind have been read": (3, [4]),
    "all have been read": (4, []),
}


@pytest.mark.parametrize("what", TAKEN)
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("packet", [False, True])
async def test_take_back(what: str, dead: bool, packet: bool) -> None:
    """What the child has not read comes back, whether it lives or not; the one in front stays, a packet or not."""
    read, back = TAKEN[what]
    with scenes() as it:
        if packet:
            it.begin(call(9))
            it.lend(*(call(id_) for id_ in (1, 2, 3, 4)))
            it.child.answer(9)
            it.take(9)
            for number in range(read):
                assert it.child.packet() == number + 1
        else:
            assert it.line.begin(call(1)) is None
            if read:
                assert it.child.message().id == 1
            it.lend(call(2), call(3), call(4))
            for number in range(1, read):
                assert it.child.packet() == number + 1
        if dead:
            it.child.die()
        assert sorted(it.line.take_back()) == back
        left = [id_ for id_ in (1, 2, 3, 4) if id_ not in back]
        assert it.ids() == left
        assert it.line.take_back() == []
        if dead:
            return
        assert it.child.unread() == ([1] if packet and not read else [])
        if not packet and not read:
            assert it.child.message().id == 1
        assert it.child.said() == []
        it.child.answer(*left)
        it.take(*left)
        assert it.line.clean
        it.begin(call(5))
        assert it.child.unread() == []


@pytest.mark.parametrize(("asleep", "said"), [(9, [(LOOK, 0)]), (8, []), (0, [])], ids=["asleep", "older", "awake"])
async def test_who_looked_in_vain_is_woken(asleep: int, said: list[tuple[int, int]]) -> None:
    """A packet that was taken and is put back: a child that went to sleep in between would not see it."""
    with scenes() as it:
        it.begin(call(9))
        it.lend(call(1), call(2))
        it.child.answer(9)
        it.take(9)
        it.line._spare = Racing(it.line._spare, lambda: it.sleep(asleep))  # type: ignore[assignment]
        assert list(it.line.take_back()) == [2]
        assert it.child.said() == said
        assert it.child.unread() == [1]


async def test_nobody_is_woken_for_what_is_gone() -> None:
    """Behind a head on the relay there is nothing to look for."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2))
        it.sleep(1)
        assert list(it.line.take_back()) == [2]
        assert it.child.said() == []


async def test_what_is_not_written_comes_back_too() -> None:
    """And is written no more."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2))
        assert it.line.begin_ahead(call(3))
        assert sorted(it.line.take_back()) == [2, 3]
        it.line.flush_behind()
        assert it.child.unread() == []
        assert it.ids() == [1]


async def test_whose_they_are() -> None:
    """Told by the ids in their frames."""
    with scenes() as it:
        jobs = [call(id_) for id_ in (1, 2, 3)]
        it.begin(jobs[0])
        it.lend(*jobs[1:])
        assert it.child.packet() == 2
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
        it.begin(call(9))
        it.lend(call(1), call(2), call(3))
        it.child.answer(9)
        it.take(9)
        read: list[int] = []
        it.line._spare = Racing(it.line._spare, lambda: read.append(it.child.packet()))  # type: ignore[assignment]
        assert sorted(it.line.take_back()) == [1, 3]
        assert read == [2]
        assert it.ids() == [2]
        assert it.child.unread() == []
        it.child.answer(2)
        it.take(2)
        assert it.line.clean


# what proves what

READ: Final[dict[str, tuple[int, bool]]] = {
    "nothing": (0, False),
    "the head": (1, True),
    "one behind too": (2, True),
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("packet", [False, True])
async def test_what_has_started(what: str, packet: bool) -> None:
    """After the child's death: the head is known by the way that it took, and what has not come back has started."""
    read, started = READ[what]
    with scenes() as it:
        if packet:
            it.begin(call(9))
            it.lend(call(1), call(2), call(3))
            it.child.answer(9)
            it.take(9)
        else:
            assert it.line.begin(call(1)) is None
            if read:
                it.child.message()
            it.lend(call(2), call(3))
        for _ in range(read if packet else read - 1):
            it.child.packet()
        it.child.die()
        it.line.take_back()
        with pytest.raises(LineEnded):
            it.line.read()
        it.line.finish()
        assert it.line.started is started
        stayed = len(it.ids())
        assert stayed == max(read, 1)
        assert it.line.unread_jobs([100] * stayed) == [not started, *[False] * (stayed - 1)]
        assert it.line.answered is False


async def test_what_has_started_behind_the_relay() -> None:
    """A job behind one on the relay is known by its packet."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2))
        it.child.answer(1)
        it.take(1)
        it.child.die()
        assert it.line.started is False
        assert it.line.unread_jobs([100]) == [True]


async def test_an_answer_is_proof_enough() -> None:
    """Of a child that said half a word, and left others unread."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2), call(3))
        it.child.answer(1)
        it.take(1)
        assert it.line.answered is False
        assert it.child.packet() == 2
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
        with pytest.raises(LineEnded):
            it.line.read()
        assert it.line.started is False


# the end


async def test_stop() -> None:
    """It goes by the relay, where the child waits; no packet says it."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2))
        it.line.stop_worker()
        assert it.child.unread() == [2]
        assert it.child.said() == [(STOP, 0)]


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


async def test_nobody_is_there() -> None:
    """The other end of the packets is closed everywhere: nothing more is on its way, and there is no error here."""
    with scenes() as it:
        it.begin(call(1))
        it.child.packets.close()
        it.line._spare.close()
        it.lend(call(2))
        assert it.ids() == [1]


async def test_a_lie_behind_an_answer() -> None:
    """An answer to another job is nobody's; the one before it counts."""
    with scenes() as it:
        it.begin(call(1))
        it.lend(call(2), call(3))
        it.child.answer(1, 3)
        it.take(1)
        with pytest.raises(FrameError, match="it answered job 3, but it was given job 2"):
            it.line.take()
        assert it.line.fault is not None
        assert it.line.take() is None


# the child's end


class Spied:
    """A socket of the child's: before each `recv`, something may happen."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner = inner
        self.before: list[Callable[[], object]] = []
        """What happens before each of the next ones, and with the last of them gone, nothing."""
        self.count = 0

    def recv(self, *args: Any) -> bytes:
        self.count += 1
        if self.before:
            self.before.pop(0)()
        return self.inner.recv(*args)

    def recv_into(self, space: memoryview) -> int:
        self.before.pop(0)()
        return self.inner.recv_into(space)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class ChildScene:
    """A child in this process, and the pool's ends."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.relay, relay = socket.socketpair()
        self.packets, packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs = Spied(relay)
        self.their_packets = Spied(packets)
        self.child = RealChild(self.theirs, self.their_packets, os.dup(region.fd))  # type: ignore[arg-type]
        self.found: list[int] = []

    def asleep(self) -> int:
        """The id by which the child says that it sleeps, or 0."""
        found: int = struct.unpack_from("I", self.region._memory, 4 * ASLEEP)[0]
        return found

    def note(self) -> None:
        """Note by which id it says now that it sleeps."""
        self.found.append(self.asleep())

    def job(self) -> int:
        """Take the next job; afterwards the child is awake."""
        message = self.child.next_job()
        assert message is not None
        assert self.asleep() == 0
        return message.id

    def close(self) -> None:
        for end in (self.relay, self.packets, self.theirs.inner, self.their_packets.inner):
            end.close()
        os.close(self.child._log)
        mapped = self.child._region.obj
        self.child._words.release()
        self.child._region.release()
        mapped.close()  # type: ignore[attr-defined]
        self.region.close()


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildScene]:
    monkeypatch.setattr(faulthandler, "enable", lambda *_: None)  # that is of a whole process, and this is ours
    scene = ChildScene(Region())
    yield scene
    scene.close()


def test_packets_before_sleep(there: ChildScene) -> None:
    """What lies behind a job is taken without a look at the relay, and without a word that it sleeps."""
    there.relay.sendall(whole(CALL, 5))
    assert there.job() == 5
    looked = there.theirs.count
    there.their_packets.before = [there.note, there.note]
    for id_ in (6, 7):
        there.packets.send(whole(CALL, id_))
    assert [there.job(), there.job()] == [6, 7]
    assert there.theirs.count == looked
    assert there.found == [0, 0]


def test_a_child_says_that_it_sleeps(there: ChildScene) -> None:
    """By the last job that it read from its relay: not by a packet, and not by what is no job."""
    there.theirs.before = [there.note] * 6
    there.relay.sendall(whole(CALL, 5))
    assert there.job() == 5
    assert there.found == [0]  # there was none before
    there.packets.send(whole(CALL, 6))
    assert there.job() == 6
    there.theirs.before[0] = lambda: (
        there.note(),
        there.packets.send(whole(CALL, 7)),
        there.relay.send(whole(LOOK, 0)),
    )
    assert there.job() == 7
    assert there.found == [0, 5]
    there.theirs.before[0] = lambda: (there.note(), there.relay.send(whole(LOOK, 0)))
    there.theirs.before[1] = lambda: (there.note(), there.relay.send(whole(STOP_STREAM, 4)))
    there.theirs.before[2] = lambda: (there.note(), there.relay.send(whole(CALL, 8)))
    assert there.job() == 8
    assert there.found == [0, 5, 5, 5, 5]
    there.theirs.before[0] = lambda: (there.note(), there.relay.send(whole(STOP, 0)))
    message = there.child.next_job()
    assert message is not None
    assert message.kind == STOP
    assert there.found[5:] == [8]


def test_a_child_looks_once_more(there: ChildScene) -> None:
    """A packet that came before the pool could see that it sleeps is announced by nobody."""
    there.relay.sendall(whole(CALL, 5))
    assert there.job() == 5
    looked = there.theirs.count
    there.their_packets.before = [lambda: None, lambda: (there.note(), there.packets.send(whole(CALL, 6)))]
    assert there.job() == 6
    assert there.found == [5]
    assert there.theirs.count == looked


def test_a_child_without_a_pool(there: ChildScene) -> None:
    """It ends, and does not sleep."""
    there.relay.sendall(whole(CALL, 5))
    assert there.job() == 5
    there.theirs.before = [lambda: (there.note(), there.relay.close())]
    assert there.child.next_job() is None
    assert there.found == [5]
    assert there.asleep() == 0


@pytest.mark.parametrize("first", [LOOK, STOP_STREAM])
def test_what_is_read_goes_before_packets(there: ChildScene, first: int) -> None:
    """A job behind what is none, in one read: it is older than the packets."""
    there.theirs.before = [lambda: there.packets.send(whole(CALL, 6))]
    there.relay.sendall(whole(first, 0) + whole(CALL, 5))
    assert [there.job(), there.job()] == [5, 6]


def test_what_is_half_read_goes_before_packets(there: ChildScene) -> None:
    """The rest of it is waited for, and nobody is told that the child sleeps: it has something to read."""
    job = whole(CALL, 5, b"body")
    there.theirs.before = [
        lambda: there.packets.send(whole(CALL, 6)),
        lambda: (there.note(), there.relay.send(job[HEAD + 1 :])),
    ]
    there.relay.sendall(whole(LOOK, 0) + job[: HEAD + 1])
    assert [there.job(), there.job()] == [5, 6]
    assert there.found == [0]


def test_what_a_stream_found_goes_before_packets(there: ChildScene) -> None:
    """The next job was read while it looked for its stop."""
    there.relay.sendall(whole(CALL, 5))
    there.packets.send(whole(CALL, 6))
    assert not there.child._stream_stop_asked(4)
    assert [there.job(), there.job()] == [5, 6]
