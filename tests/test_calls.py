"""Messages between a pool and its Python child: whatever is encoded arrives, however it is cut; no lie is believed."""

import os
import struct
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_workers._calls import (
    CALL,
    END,
    ERROR,
    FROM_CHILD,
    FROM_POOL,
    HELLO,
    JOINED,
    MAGIC,
    MOST_BUFFERS,
    PART,
    READY,
    RESULT,
    STOP,
    STREAM,
    Decoder,
    Message,
    encode,
)
from trio_workers._goridge import FrameError

LIMIT: Final = 1 << 20
UNLIMITED: Final = 1 << 63
HEADER: Final = 28
ALL: Final = FROM_POOL | FROM_CHILD

Said = tuple[int, int, int, bytes, list[tuple[bytes, str]]]
"""What a message says: kind, id, split, body, and each buffer with whether it can be written to."""


def of_kind(buffer: bytes | bytearray | memoryview) -> tuple[bytes, str]:
    return bytes(buffer), "read-only" if memoryview(buffer).readonly else "writable"


def said(message: Message) -> Said:
    assert type(message.body) is bytes
    return message.kind, message.id, message.split, message.body, list(map(of_kind, message.buffers))


def whole(
    kind: int, id_: int = 0, body: bytes = b"", buffers: Sequence[bytes | bytearray] = (), split: int = 0
) -> bytes:
    return b"".join(encode(kind, id_, body, [memoryview(buffer) for buffer in buffers], split))


def header(
    *, magic: int = MAGIC, kind: int = RESULT, id_: int = 1, split: int = 0, count: int = 0, size: int = 0
) -> bytes:
    return struct.pack("<IB3xIIIQ", magic, kind, id_, split, count, size)


def table(*sizes: int, readonly: bool = False) -> bytes:
    return b"".join((2 * size + readonly).to_bytes(8, "little") for size in sizes)


def messages_of(decoder: Decoder) -> Iterator[Message]:
    while (message := decoder.next_message()) is not None:
        yield message


def feed(decoder: Decoder, data: bytes, *, in_place: bool) -> None:
    """Give a decoder bytes, as one that only receives does, or as one that reads what is large in place."""
    view = memoryview(data)
    while view:
        space = decoder.space if in_place else None
        if space is None:
            # A reader in place looks after each read; what belongs into the space may be behind the header already.
            decoder.receive(bytes(view))
            return
        count = min(len(space), len(view))
        space[:count] = view[:count]
        space.release()
        view = view[count:]
        decoder.filled(count)


# --- whatever is encoded arrives ------------------------------------------------------------------------------------


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, Said]:
    kind = draw(st.sampled_from(sorted(ALL)))
    id_ = draw(st.integers(0, 2**32 - 1))
    body = draw(st.binary(max_size=80))
    split = draw(st.integers(0, len(body)))
    buffers: list[bytes | bytearray] = draw(
        st.lists(st.binary(max_size=60) | st.binary(max_size=60).map(bytearray), max_size=4)
    )
    expected = kind, id_, split, body, list(map(of_kind, buffers))
    return whole(kind, id_, body, buffers, split), expected


@given(st.lists(messages(), max_size=5), st.lists(st.integers(1, 50), min_size=1), st.booleans(), st.booleans())
def test_any_messages_in_any_pieces(
    sent: list[tuple[bytes, Said]], sizes: list[int], in_place: bool, at_once: bool
) -> None:
    """A message is there with its last byte and not before it; what arrives is what was sent, buffers by their kind."""
    stream = b"".join(data for data, _ in sent)
    ends: list[int] = []
    for data, _ in sent:
        ends.append((ends[-1] if ends else 0) + len(data))
    decoder = Decoder(ALL, LIMIT)
    found: list[Said] = []
    at, turn = 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        turn += 1
        feed(decoder, stream[at : at + size], in_place=in_place)
        at = min(at + size, len(stream))
        if at_once:
            found += map(said, messages_of(decoder))
            assert len(found) == sum(end <= at for end in ends)
            assert decoder.pending == (at not in {0, *ends})
    found += map(said, messages_of(decoder))
    assert found == [expected for _, expected in sent]
    assert not decoder.pending
    assert decoder.leftover == b""
    assert decoder.space is None


@pytest.mark.parametrize("size", [0, 1, JOINED - HEADER, JOINED - 1, JOINED, JOINED + 1, 300_000])
@pytest.mark.parametrize("buffers", [(), (JOINED + 1,), (0, 1, 100_000)], ids=str)
@pytest.mark.parametrize("chunk", [1000, 65536, 1 << 30])
@pytest.mark.parametrize("in_place", [False, True])
def test_sizes_around_every_border(size: int, buffers: tuple[int, ...], chunk: int, in_place: bool) -> None:
    """The ways that bodies and buffers take by their size lead to the same message."""
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    parts = [bytearray(index % 251 for index in range(number)) for number in buffers]
    data = whole(RESULT, 7, body, parts, size // 2) + whole(END, 8)
    decoder = Decoder(ALL, LIMIT)
    for start in range(0, len(data), chunk):
        feed(decoder, data[start : start + chunk], in_place=in_place)
    first, second = messages_of(decoder)
    assert said(first) == (RESULT, 7, size // 2, body, list(map(of_kind, parts)))
    assert said(second) == (END, 8, 0, b"", [])


def test_most_buffers() -> None:
    """As many buffers as are allowed arrive, each with its own bytes."""
    buffers = [number.to_bytes(4, "little") for number in range(MOST_BUFFERS)]
    decoder = Decoder(ALL, LIMIT)
    decoder.receive(whole(CALL, 1, b"body", buffers))
    message = decoder.next_message()
    assert message is not None
    assert list(message.buffers) == buffers


def test_buffers_are_not_copied_to_be_sent() -> None:
    """The pieces are the buffers themselves, and a large body is not copied behind its header."""
    buffer = bytearray(b"x" * 100)
    head, piece = encode(RESULT, 1, b"body", [memoryview(buffer)])
    assert isinstance(piece, memoryview)
    assert piece.obj is buffer
    assert bytes(head).endswith(b"body")
    body = b"y" * (JOINED + 1)
    head, piece = encode(RESULT, 1, body)
    assert isinstance(piece, memoryview)
    assert piece.obj is body
    assert len(head) == HEADER


def test_a_small_message_is_one_piece() -> None:
    """It takes one write."""
    assert len(encode(RESULT, 1, b"x" * JOINED)) == 1
    assert len(encode(STOP)) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_each_buffer_is_memory_of_its_own(in_place: bool) -> None:
    """Writable buffers are separate and can be written to; read-only ones come as bytes."""
    decoder = Decoder(ALL, LIMIT)
    feed(decoder, whole(RESULT, 1, b"body", [bytearray(b"one"), b"two", bytearray(b"three")]), in_place=in_place)
    message = decoder.next_message()
    assert message is not None
    one, two, three = map(memoryview, message.buffers)
    assert [type(buffer) for buffer in message.buffers if memoryview(buffer).readonly] == [bytes]
    one[:] = b"ONE"
    three[:] = b"THREE"
    assert list(message.buffers) == [b"ONE", b"two", b"THREE"]
    with pytest.raises(TypeError):
        two[:] = b"TWO"
    assert decoder.space is None


def test_a_message_says_what_it_is() -> None:
    """`repr` shows sizes, not contents."""
    assert repr(Message(RESULT, 7, 0, b"abc", [b"d"])) == "Message(kind=17, id=7, 3 bytes, 1 buffers)"


def test_kinds_have_one_direction() -> None:
    """No kind is legal in both directions, and none of them is a letter."""
    assert not FROM_POOL & FROM_CHILD
    assert all(0 < kind < 32 for kind in ALL)


def test_no_text_begins_as_a_message_does() -> None:
    """The magic is no UTF-8, so nothing that a job prints on the relay passes for a message."""
    with pytest.raises(UnicodeDecodeError):
        MAGIC.to_bytes(4, "little").decode()


# --- a whole small message, the usual case --------------------------------------------------------------------------


@given(messages())
def test_take_whole_agrees(sent: tuple[bytes, Said]) -> None:
    """What `take_whole` takes is what `receive` makes of the same bytes; what it declines it leaves untouched."""
    data, expected = sent
    decoder = Decoder(ALL, LIMIT)
    message = decoder.take_whole(data)
    assert (message is None) == bool(expected[4])
    if message is None:
        decoder.receive(data)
        message = decoder.next_message()
        assert message is not None
    assert said(message) == expected
    assert not decoder.pending


@given(messages(), st.data())
def test_take_whole_takes_whole_messages_only(sent: tuple[bytes, Said], data: st.DataObject) -> None:
    """Neither a part, nor more than one message, nor anything while something is pending."""
    frame, expected = sent
    decoder = Decoder(ALL, LIMIT)
    cut = data.draw(st.integers(0, len(frame) - 1))
    assert decoder.take_whole(frame[:cut]) is None
    assert decoder.take_whole(frame + frame) is None
    assert not decoder.pending
    decoder.receive(frame[:cut])
    if cut:
        assert decoder.take_whole(whole(END)) is None
    decoder.receive(frame[cut:])
    assert decoder.take_whole(whole(END)) is None
    assert [said(message) for message in messages_of(decoder)] == [expected]


# --- lies -----------------------------------------------------------------------------------------------------------

BEGINS_NONE: Final = "these bytes begin no message"
DONT_FIT: Final = "the numbers of the header don't fit together"
LIES: Final[dict[str, tuple[bytes, str]]] = {
    "wrong magic": (header(magic=MAGIC ^ 1 << 31), BEGINS_NONE),
    "no magic": (bytes(HEADER), BEGINS_NONE),
    "kind 0": (header(kind=0), BEGINS_NONE),
    "kind of nobody": (header(kind=99), BEGINS_NONE),
    "kind of the other side": (header(kind=CALL), BEGINS_NONE),
    "largest kind": (header(kind=255), BEGINS_NONE),
    "split behind the body": (header(split=1), DONT_FIT),
    "split far behind the body": (header(split=2**32 - 1, size=5) + b"hello", DONT_FIT),
    "a buffer too many": (header(count=MOST_BUFFERS + 1), DONT_FIT),
    "buffers without end": (header(count=2**32 - 1), DONT_FIT),
    "a body over the limit": (header(size=LIMIT + 1), r"1,048,577 bytes is larger than max_frame_size \(1,048,576\)"),
    "a huge body": (header(size=2**64 - 1), "larger than max_frame_size"),
    "a buffer over the limit": (header(count=1) + table(LIMIT + 1), "1,048,577 bytes is larger than max_frame_size"),
    "a huge buffer": (header(count=1) + table(2**63 - 1, readonly=True), "larger than max_frame_size"),
    "over the limit in sum": (
        header(count=2, size=LIMIT - 2) + table(1, 2),
        "1,048,577 bytes is larger than max_frame_size",
    ),
    "text": (b"Hello from print\n", BEGINS_NONE),
    "long text": (b"Hello from print, and more of it than any header takes\n" * 20, BEGINS_NONE),
    "one letter": (b"H", BEGINS_NONE),
    "zeros": (bytes(100), BEGINS_NONE),
}


@pytest.mark.parametrize("chunk", [1, 3, HEADER, 1 << 30])
@pytest.mark.parametrize("before", [b"", whole(PART, 5, b"a part before it")], ids=["first", "behind another"])
@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, before: bytes, chunk: int) -> None:
    """Each is refused, at once and for ever; the error shows its bytes; the message before it is not lost."""
    data, reason = LIES[lie]
    decoder = Decoder(FROM_CHILD, LIMIT)
    stream = before + data
    for start in range(0, len(stream), chunk):
        feed(decoder, stream[start : start + chunk], in_place=True)
    if before:
        message = decoder.next_message()
        assert message is not None
        assert said(message) == (PART, 5, 0, b"a part before it", [])
    for _ in range(2):
        with pytest.raises(FrameError, match=reason) as caught:
            decoder.next_message()
        assert caught.value.received
        assert data.startswith(caught.value.received)
    assert decoder.pending
    assert decoder.leftover.startswith(caught.value.received)
    assert decoder.space is None
    decoder.receive(whole(END))
    with pytest.raises(FrameError, match=reason):
        decoder.next_message()
    assert decoder.take_whole(whole(END)) is None


@pytest.mark.parametrize("lie", LIES)
def test_take_whole_takes_no_lie(lie: str) -> None:
    """The usual case's short cut checks what the long way checks."""
    data, _ = LIES[lie]
    decoder = Decoder(FROM_CHILD, LIMIT)
    assert decoder.take_whole(data) is None
    assert not decoder.pending


@given(st.binary(min_size=1, max_size=100), st.integers(1, 100))
def test_noise(data: bytes, chunk: int) -> None:
    """Bytes that begin no message are refused with the first of them that is wrong."""
    decoder = Decoder(FROM_CHILD, LIMIT)
    magic = MAGIC.to_bytes(4, "little")
    wrong = next((index for index in range(4) if index < len(data) and data[index] != magic[index]), None)
    if wrong is None:
        return
    for start in range(0, wrong + 1, chunk):
        assert decoder.next_message() is None
        decoder.receive(data[start : start + chunk])
    with pytest.raises(FrameError, match=BEGINS_NONE):
        decoder.next_message()


@given(st.integers(0, HEADER - 1), st.binary(min_size=1, max_size=1), st.booleans())
def test_one_wrong_byte_in_a_header(at: int, byte: bytes, in_place: bool) -> None:
    """Whatever a header says, it is refused, waits for its bytes or is taken: nothing else comes out of it."""
    data = bytearray(whole(RESULT, 1, b"12345678"))
    data[at : at + 1] = byte
    decoder = Decoder(FROM_CHILD, LIMIT)
    feed(decoder, bytes(data), in_place=in_place)
    try:
        found = list(messages_of(decoder))
    except FrameError as error:
        assert error.received in bytes(data)  # of a shorter message the rest is too much
    else:
        assert all(message.kind in FROM_CHILD for message in found)
        assert found or decoder.pending


@pytest.mark.parametrize("legal", [FROM_POOL, FROM_CHILD], ids=["from the pool", "from the child"])
@pytest.mark.parametrize("kind", sorted(ALL))
@pytest.mark.parametrize("more", [b"", b"body"])
def test_each_kind_in_its_direction(legal: frozenset[int], kind: int, more: bytes) -> None:
    """A kind is taken from the side that it belongs to, and from no other."""
    decoder = Decoder(legal, LIMIT)
    decoder.receive(whole(kind, 1, more))
    if kind in legal:
        message = decoder.next_message()
        assert message is not None
        assert said(message) == (kind, 1, 0, more, [])
    else:
        with pytest.raises(FrameError, match=BEGINS_NONE):
            decoder.next_message()


@pytest.mark.parametrize("where", ["body", "buffer", "in sum"])
def test_the_limit_itself(where: str) -> None:
    """A message of exactly `max_frame_size` bytes is taken: the body and its buffers count, the header does not."""
    body, buffers = {
        "body": (bytes(LIMIT), []),
        "buffer": (b"", [bytearray(LIMIT)]),
        "in sum": (b"1234", [b"56", bytearray(LIMIT - 6)]),
    }[where]
    decoder = Decoder(FROM_CHILD, LIMIT)
    decoder.receive(whole(RESULT, 1, body, buffers))
    message = decoder.next_message()
    assert message is not None
    assert said(message)[3:] == (body, list(map(of_kind, buffers)))


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_of(decoder: Decoder, data: bytes) -> int:
    """Bytes that taking this allocated at most."""
    tracemalloc.start()
    try:
        decoder.receive(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        header(size=256 << 20),
        header(count=1) + table(256 << 20),
        header(count=3, size=100) + table(1, 256 << 20, 2, readonly=True),
        header(split=1 << 31, size=1 << 30),
        header(count=MOST_BUFFERS + 1),
        header(count=MOST_BUFFERS),
    ],
    ids=["body", "buffer", "buffers", "split", "too many buffers", "a table that does not come"],
)
def test_nothing_is_allocated_unchecked(data: bytes) -> None:
    """An announced size is checked before there is any memory for it."""
    assert peak_of(Decoder(FROM_CHILD, LIMIT), data) < 1 << 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "data", [header(size=256 << 20), header(count=1) + table(256 << 20, readonly=True)], ids=["body", "buffer"]
)
def test_memory_grows_with_what_arrives(data: bytes) -> None:
    """A size that is announced costs nothing before its bytes come: of a body, and of a buffer that is read-only."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    decoder = Decoder(FROM_CHILD, UNLIMITED)
    decoder.receive(data + b"the first bytes")
    assert decoder.pending
    assert resident() - before < 64 << 20


@pytest.mark.parametrize(
    "data",
    [header(size=1 << 60), header(size=(1 << 63) - 1), header(count=1) + table(1 << 61), header(size=1 << 63)],
    ids=["body", "as large as a size can be", "buffer", "larger than a size can be"],
)
@pytest.mark.parametrize("chunk", [7, 1 << 30])
def test_more_than_there_is_memory(data: bytes, chunk: int) -> None:
    """Without a limit, what no memory can hold is refused; the message before it is not lost, the process lives on."""
    decoder = Decoder(FROM_CHILD, UNLIMITED)
    data = whole(PART, 5, b"before") + data
    for start in range(0, len(data), chunk):
        decoder.receive(data[start : start + chunk])
    message = decoder.next_message()
    assert message is not None
    assert said(message) == (PART, 5, 0, b"before", [])
    with pytest.raises(FrameError, match=r"there is no memory for [0-9,]+ bytes of a message"):
        decoder.next_message()
    assert decoder.space is None
    decoder.receive(whole(END))
    with pytest.raises(FrameError, match="there is no memory"):
        decoder.next_message()


def test_a_message_taken_is_not_held() -> None:
    """The decoder keeps nothing of a message that was taken."""
    decoder = Decoder(FROM_CHILD, LIMIT)
    decoder.receive(whole(RESULT, 1, bytes(LIMIT // 2), [bytearray(1000)]))
    message = decoder.next_message()
    assert message is not None
    body, (buffer,) = message.body, message.buffers
    before = sys.getrefcount(body), sys.getrefcount(buffer)
    decoder = Decoder(FROM_CHILD, LIMIT)  # with the old one everything that it held is gone
    assert (sys.getrefcount(body), sys.getrefcount(buffer)) == before


# --- what is pending, left over, dropped ----------------------------------------------------------------------------

MESSAGE: Final = whole(RESULT, 1, b"body", [bytearray(b"buffer one"), b"two"], 2)


@pytest.mark.parametrize("cut", range(len(MESSAGE) + 1))
@pytest.mark.parametrize("in_place", [False, True])
def test_drop_at_every_byte(cut: int, in_place: bool) -> None:
    """After a drop nothing is pending, and the next message is taken as if it were the first."""
    decoder = Decoder(FROM_CHILD, LIMIT)
    feed(decoder, MESSAGE[:cut], in_place=in_place)
    assert decoder.pending == (cut > 0)
    decoder.drop()
    assert not decoder.pending
    assert decoder.leftover == b""
    assert decoder.space is None
    assert decoder.next_message() is None
    feed(decoder, MESSAGE, in_place=in_place)
    message = decoder.next_message()
    assert message is not None
    assert said(message) == (RESULT, 1, 2, b"body", [(b"buffer one", "writable"), (b"two", "read-only")])
    assert not decoder.pending


def test_drop_drops_whole_messages() -> None:
    """Those that nobody has taken yet are dropped as well, with what is behind them."""
    decoder = Decoder(FROM_CHILD, LIMIT)
    decoder.receive(MESSAGE * 3 + MESSAGE[:30])
    assert decoder.next_message() is not None
    decoder.drop()
    assert not decoder.pending
    assert decoder.next_message() is None


@pytest.mark.parametrize("cut", range(HEADER))
def test_part_of_a_header_is_left_over(cut: int) -> None:
    """What has come and is no message yet can be shown."""
    decoder = Decoder(FROM_CHILD, LIMIT)
    decoder.receive(MESSAGE[:cut])
    assert decoder.leftover == MESSAGE[:cut]
    assert decoder.next_message() is None


@pytest.mark.parametrize("kind", [HELLO, STREAM, READY, ERROR])
def test_text_behind_a_message_is_left_over(kind: int) -> None:
    """The message counts; what is behind it is shown and is pending."""
    decoder = Decoder(ALL, LIMIT)
    decoder.receive(whole(kind, 1, b"body") + b"Hello from print\n")
    assert decoder.next_message() is not None
    assert decoder.pending
    assert decoder.leftover == b"Hello from print\n"


def test_filling_a_space_piece_by_piece() -> None:
    """The space shrinks by what was read into it, and goes on to the next buffer where one is full."""
    decoder = Decoder(FROM_CHILD, LIMIT)
    data = whole(RESULT, 1, b"", [bytearray(b"abc"), bytearray(), b"de"])
    decoder.receive(data[:-5])
    sizes: list[int] = []
    for byte in data[-5:]:
        space: Any = decoder.space
        sizes.append(len(space))
        space[0] = byte
        space.release()
        decoder.filled(1)
    assert sizes == [3, 2, 1, 2, 1]
    message = decoder.next_message()
    assert message is not None
    assert list(message.buffers) == [b"abc", b"", b"de"]
