"""Frames of the three dialects, byte by byte."""

import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_workers._goridge import (
    BARE_3,
    CONTROL,
    ERROR,
    JOB_3,
    MORE,
    NONE,
    OLD_CONTROL,
    OLD_ERROR,
    PING,
    PIPE_BUF,
    PONG,
    PROTOCOLS,
    RAW,
    SHOWN,
    STOP,
    STREAM_STOP,
    Decoder,
    Frame,
    FrameError,
    context_frame_3,
    encode_control,
    encode_error,
    encode_job,
    encode_reply,
    frame_1,
    frame_2,
    frame_3,
    printable,
)

ANY_3: Final = frozenset((BARE_3, JOB_3))
ANY_BITS: Final = frozenset((0, MORE, STREAM_STOP, PING, PONG, MORE | PING))
ANY_OLD: Final = frozenset(
    (0, RAW, NONE, OLD_CONTROL, OLD_CONTROL | RAW, OLD_CONTROL | NONE, OLD_CONTROL | OLD_ERROR | RAW)
)
LIMIT: Final = 1 << 20


def decoder(protocol: str, limit: int = LIMIT) -> Decoder:
    return Decoder(protocol, limit, ANY_3 if protocol == "goridge-3" else ANY_OLD, ANY_BITS)


def decode(protocol: str, data: bytes, limit: int = LIMIT) -> list[Frame]:
    """All frames of `data`, which must be whole."""
    decoding = decoder(protocol, limit)
    decoding.receive(data)
    frames = list(drain(decoding))
    assert not decoding.pending
    return frames


def drain(decoding: Decoder) -> Iterator[Frame]:
    while (frame := decoding.next_frame()) is not None:
        yield frame


def refusal(protocol: str, data: bytes, limit: int = LIMIT) -> FrameError:
    """The error that `data` is refused with."""
    decoding = decoder(protocol, limit)
    decoding.receive(data)
    with pytest.raises(FrameError) as caught:
        list(drain(decoding))
    assert data.startswith(caught.value.received)
    assert printable(caught.value.received) in str(caught.value)
    return caught.value


def with_checksum(start: bytes, rest: bytes) -> bytes:
    """A goridge-3 header whose CRC is right whatever it says."""
    return start + zlib.crc32(start).to_bytes(4, "little") + rest


def job(protocol: str, context: bytes, body: bytes) -> bytes:
    return b"".join(encode_job(protocol, context, body))


# --- the examples of "The wire", each: what makes it, its bytes, what it decodes to -----------------------------------

PID: Final = b'{"pid":42}'
EXAMPLES: Final[list[tuple[str, bytes, str, list[Frame]]]] = [
    # goridge-1
    (
        "goridge-1",
        encode_control("goridge-1", PID),
        "10 0a00000000000000 7b22706964223a34327d",
        [Frame(0x10, 0, b"", PID)],
    ),
    ("goridge-1", frame_1(0x14, b"ctx"), "14 0300000000000000 637478", [Frame(0x14, 0, b"", b"ctx")]),
    ("goridge-1", frame_1(0, b"hello"), "00 0500000000000000 68656c6c6f", [Frame(0, 0, b"", b"hello")]),
    ("goridge-1", frame_1(0x12, b""), "12 0000000000000000", [Frame(0x12, 0, b"", b"")]),
    ("goridge-1", frame_1(4, b"hello"), "04 0500000000000000 68656c6c6f", [Frame(4, 0, b"", b"hello")]),
    ("goridge-1", encode_error("goridge-1", b"boom"), "1c 0400000000000000 626f6f6d", [Frame(0x1C, 0, b"", b"boom")]),
    (
        "goridge-1",
        encode_control("goridge-1", STOP),
        "10 0d00000000000000 7b2273746f70223a747275657d",
        [Frame(0x10, 0, b"", STOP)],
    ),
    (
        "goridge-1",
        job("goridge-1", b"ctx", b"hello"),
        "14 0300000000000000 637478 00 0500000000000000 68656c6c6f",
        [Frame(0x14, 0, b"", b"ctx"), Frame(0, 0, b"", b"hello")],
    ),
    (
        "goridge-1",
        encode_reply("goridge-1", b"", b"hello"),
        "12 0000000000000000 04 0500000000000000 68656c6c6f",
        [Frame(0x12, 0, b"", b""), Frame(4, 0, b"", b"hello")],
    ),
    # goridge-2
    (
        "goridge-2",
        encode_control("goridge-2", PID),
        "10 0a00000000000000 000000000000000a 7b22706964223a34327d",
        [Frame(0x10, 0, b"", PID)],
    ),
    ("goridge-2", frame_2(0x14, b"ctx"), "14 0300000000000000 0000000000000003 637478", [Frame(0x14, 0, b"", b"ctx")]),
    (
        "goridge-2",
        frame_2(0, b"hello"),
        "00 0500000000000000 0000000000000005 68656c6c6f",
        [Frame(0, 0, b"", b"hello")],
    ),
    ("goridge-2", frame_2(0x12, b""), "12 0000000000000000 0000000000000000", [Frame(0x12, 0, b"", b"")]),
    (
        "goridge-2",
        frame_2(4, b"hello"),
        "04 0500000000000000 0000000000000005 68656c6c6f",
        [Frame(4, 0, b"", b"hello")],
    ),
    (
        "goridge-2",
        encode_error("goridge-2", b"boom"),
        "1c 0400000000000000 0000000000000004 626f6f6d",
        [Frame(0x1C, 0, b"", b"boom")],
    ),
    (
        "goridge-2",
        encode_control("goridge-2", STOP),
        "10 0d00000000000000 000000000000000d 7b2273746f70223a747275657d",
        [Frame(0x10, 0, b"", STOP)],
    ),
    (
        "goridge-2",
        job("goridge-2", b"ctx", b"hello"),
        "14 0300000000000000 0000000000000003 637478 00 0500000000000000 0000000000000005 68656c6c6f",
        [Frame(0x14, 0, b"", b"ctx"), Frame(0, 0, b"", b"hello")],
    ),
    (
        "goridge-2",
        encode_reply("goridge-2", b"", b"hello"),
        "12 0000000000000000 0000000000000000 04 0500000000000000 0000000000000005 68656c6c6f",
        [Frame(0x12, 0, b"", b""), Frame(4, 0, b"", b"hello")],
    ),
    # goridge-3
    (
        "goridge-3",
        encode_control("goridge-3", PID),
        "13 09 0a000000 83532d56 00 00 7b22706964223a34327d",
        [Frame(9, 0, b"", PID)],
    ),
    (
        "goridge-3",
        job("goridge-3", b"ctx", b"hello"),
        "14 04 08000000 016fb119 00 00 03000000 63747868656c6c6f",
        [Frame(4, 0, b"ctx", b"hello")],
    ),
    (
        "goridge-3",
        job("goridge-3", b"", b"hello"),
        "14 04 05000000 dcb7dbeb 00 00 00000000 68656c6c6f",
        [Frame(4, 0, b"", b"hello")],
    ),
    (
        "goridge-3",
        encode_reply("goridge-3", b"", b"hello"),
        "14 00 05000000 1c115b1e 00 00 00000000 68656c6c6f",
        [Frame(0, 0, b"", b"hello")],
    ),
    (
        "goridge-3",
        encode_error("goridge-3", b"boom"),
        "13 40 04000000 881e11e3 00 00 626f6f6d",
        [Frame(0x40, 0, b"", b"boom")],
    ),
    (
        "goridge-3",
        encode_control("goridge-3", STOP),
        "13 09 0d000000 3a6bfacb 00 00 7b2273746f70223a747275657d",
        [Frame(9, 0, b"", STOP)],
    ),
    (
        "goridge-3",
        encode_reply("goridge-3", b"", b"part", MORE),
        "14 00 04000000 7976e7a6 01 00 00000000 70617274",
        [Frame(0, 1, b"", b"part")],
    ),
    (
        "goridge-3",
        encode_reply("goridge-3", b"", b"part", MORE | PING),
        "14 00 04000000 7976e7a6 05 00 00000000 70617274",
        [Frame(0, 5, b"", b"part")],
    ),
    ("goridge-3", frame_3(0, b"", PONG), "13 00 00000000 96d18034 08 00", [Frame(0, 8, b"", b"")]),
    ("goridge-3", frame_3(0, b"", STREAM_STOP), "13 00 00000000 96d18034 02 00", [Frame(0, 2, b"", b"")]),
]
EXAMPLE_IDS: Final = [f"{protocol}: {shown}" for protocol, _, shown, _ in EXAMPLES]


@pytest.mark.parametrize(("protocol", "encoded", "shown", "frames"), EXAMPLES, ids=EXAMPLE_IDS)
def test_an_example_of_the_wire_is_encoded(protocol: str, encoded: bytes, shown: str, frames: list[Frame]) -> None:
    """What we write is what the wire's page shows."""
    assert encoded == bytes.fromhex(shown)


@pytest.mark.parametrize(("protocol", "encoded", "shown", "frames"), EXAMPLES, ids=EXAMPLE_IDS)
def test_an_example_of_the_wire_is_decoded(protocol: str, encoded: bytes, shown: str, frames: list[Frame]) -> None:
    """What the wire's page shows is understood."""
    assert decode(protocol, bytes.fromhex(shown)) == frames


@pytest.mark.parametrize(("protocol", "encoded", "shown", "frames"), EXAMPLES, ids=EXAMPLE_IDS)
def test_an_example_comes_byte_by_byte(protocol: str, encoded: bytes, shown: str, frames: list[Frame]) -> None:
    """Nothing is taken before it is whole, and nothing is held back once it is."""
    decoding = decoder(protocol)
    found: list[Frame] = []
    for number, byte in enumerate(encoded):
        assert len(found) < len(frames), f"complete after {number} of {len(encoded)} bytes"
        decoding.receive(bytes((byte,)))
        found += drain(decoding)
    assert found == frames


# --- any frame ------------------------------------------------------------------------------------------------------

small = st.binary(max_size=40)


@st.composite
def frames_of(draw: st.DrawFn, protocol: str) -> tuple[bytes, list[Frame]]:
    """A frame of any kind, encoded, and what it decodes to."""
    body, context = draw(small), draw(small)
    if protocol != "goridge-3":
        flags = draw(st.sampled_from(sorted(ANY_OLD)))
        if flags & NONE:
            body = b""
        encode = frame_1 if protocol == "goridge-1" else frame_2
        return encode(flags, body), [Frame(flags, 0, b"", body)]
    kind = draw(st.sampled_from(("control", "error", "payload", "bare")))
    if kind == "control":
        return encode_control(protocol, body), [Frame(CONTROL | 8, 0, b"", body)]
    if kind == "error":
        return encode_error(protocol, body), [Frame(ERROR, 0, b"", body)]
    if kind == "bare":
        bits = draw(st.sampled_from((STREAM_STOP, PING, PONG)))
        return frame_3(0, b"", bits), [Frame(0, bits, b"", b"")]
    flags, bits = draw(st.sampled_from((0, 4, 8, 0x10, 0x20, 0x80))), draw(st.sampled_from(sorted(ANY_BITS)))
    return context_frame_3(flags, context, body, bits), [Frame(flags, bits, context, body)]


with_protocol = st.sampled_from(PROTOCOLS)


@given(data=st.data(), protocol=with_protocol)
def test_a_frame_split_at_every_byte(data: st.DataObject, protocol: str) -> None:
    """Where the reads cut a frame makes no difference."""
    encoded, frames = data.draw(frames_of(protocol))
    for cut in range(len(encoded) + 1):
        decoding = decoder(protocol)
        decoding.receive(encoded[:cut])
        found = list(drain(decoding))
        assert found == (frames if cut == len(encoded) else [])
        assert decoding.leftover == (b"" if cut == len(encoded) else encoded[:cut])
        decoding.receive(encoded[cut:])
        assert found + list(drain(decoding)) == frames
        assert not decoding.pending


@given(data=st.data(), protocol=with_protocol)
def test_many_frames_in_any_chunks(data: st.DataObject, protocol: str) -> None:
    """Many frames in one chunk, or in any others, are the same frames."""
    drawn = data.draw(st.lists(frames_of(protocol), min_size=1, max_size=8))
    encoded = b"".join(piece for piece, _ in drawn)
    frames = [frame for _, decoded in drawn for frame in decoded]
    assert decode(protocol, encoded) == frames
    decoding = decoder(protocol)
    found: list[Frame] = []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=6)))
    for start, end in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        decoding.receive(encoded[start:end])
        found += drain(decoding)
    assert found == frames
    assert not decoding.pending


@given(protocol=with_protocol, context=small, body=st.binary(max_size=300))
def test_a_job_and_a_reply_survive(protocol: str, context: bytes, body: bytes) -> None:
    """A job's and a reply's context and body come out as they went in."""
    for encoded in (job(protocol, context, body), encode_reply(protocol, context, body)):
        frames = decode(protocol, encoded)
        if protocol == "goridge-3":
            assert [(frame.context, frame.body) for frame in frames] == [(context, body)]
        else:
            assert [frame.body for frame in frames] == [context, body]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [0, 1, 4080, 4096, 65536, 3_000_000])
def test_the_pieces_of_a_job_are_its_frames(protocol: str, size: int) -> None:
    """However a job is cut into pieces for writing, joined they are the frames of its context and body."""
    body = bytes(size)
    frames = decode(protocol, job(protocol, b"ctx", body), limit=size + 3)
    assert [frame.body for frame in frames][-1] == body


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_memory_of_a_large_frame_goes_with_it(protocol: str) -> None:
    """A decoder keeps nothing of a frame that has been taken."""
    encoded = encode_error(protocol, bytes(8 << 20))
    decoding = decoder(protocol, 8 << 20)
    tracemalloc.start()
    try:
        for start in range(0, len(encoded), 65536):
            decoding.receive(encoded[start : start + 65536])
        frame = decoding.next_frame()
        assert frame is not None
        del frame
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


# --- lies -----------------------------------------------------------------------------------------------------------

GOOD_3: Final = context_frame_3(0, b"ctx", b"hello")
START_3: Final = GOOD_3[:6]


@pytest.mark.parametrize("position", range(10))
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_what_the_checksum_covers(position: int, bit: int) -> None:
    """Any flipped bit in the first ten bytes is seen before a size is believed."""
    data = bytearray(GOOD_3)
    data[position] ^= 1 << bit
    reason = refusal("goridge-3", bytes(data)).reason
    # Byte 0 as the bare header is legal as such: then the checksum tells.
    assert ("first byte" if position == 0 and data[0] not in ANY_3 else "CRC32") in reason


@pytest.mark.parametrize("first", [0x12, 0x10, 0x1F, 0x15, 0x1D, 0x03, 0x23, 0x24])
def test_a_count_of_options_that_no_frame_has(first: int) -> None:
    """No options where there must be one, 2 options, 13 options, another version: refused at the first byte."""
    start = bytes((first,)) + START_3[1:]
    assert "first byte" in refusal("goridge-3", with_checksum(start, b"\0\0" + bytes(52))).reason


def test_a_reply_without_options() -> None:
    """A payload frame has exactly one option."""
    for flags in (0, 4):
        assert "one option" in refusal("goridge-3", frame_3(flags, b"hello")).reason
        assert "one option" in refusal("goridge-3", frame_3(flags, b"")).reason
        assert "one option" in refusal("goridge-3", frame_3(flags, b"hello", PING)).reason


@pytest.mark.parametrize("flags", [CONTROL, ERROR, CONTROL | 8, ERROR | 4])
def test_a_control_or_error_frame_with_an_option(flags: int) -> None:
    """A control or error frame has no context."""
    assert "no options" in refusal("goridge-3", context_frame_3(flags, b"", b"hello")).reason


def test_every_value_of_the_flags() -> None:
    """At most one codec, and never control and error at once."""
    codecs = (0, 4, 8, 0x10, 0x20, 0x80)
    legal = {codec | kind for codec in codecs for kind in (0, CONTROL, ERROR)}
    for flags in range(256):
        data = frame_3(flags, b"hello") if flags & (CONTROL | ERROR) else context_frame_3(flags, b"", b"hello")
        if flags in legal:
            assert len(decode("goridge-3", data)) == 1
        else:
            assert "flags" in refusal("goridge-3", data).reason


def test_every_value_of_the_stream_bits() -> None:
    """Bits that may not come here are refused: the checksum does not cover them."""
    for bits in range(256):
        data = context_frame_3(0, b"", b"hello", bits)
        if bits in ANY_BITS:
            assert decode("goridge-3", data)[0].bits == bits
        else:
            assert "bytes 10 and 11" in refusal("goridge-3", data).reason


def test_every_value_of_byte_11() -> None:
    """Byte 11 is 0."""
    for value in range(1, 256):
        data = bytearray(GOOD_3)
        data[11] = value
        assert "bytes 10 and 11" in refusal("goridge-3", bytes(data)).reason


@pytest.mark.parametrize("split", [9, 10, 0xFFFF, 0xFFFFFFFF])
def test_a_context_longer_than_its_payload(split: int) -> None:
    """The checksum does not cover the option either."""
    data = GOOD_3[:12] + split.to_bytes(4, "little") + GOOD_3[16:]
    assert "longer than its payload" in refusal("goridge-3", data).reason


@pytest.mark.parametrize("size", [0, 4, 6, 1 << 40, (1 << 64) - 1])
def test_sizes_that_disagree(size: int) -> None:
    """goridge-2 says each size twice."""
    data = b"\x04" + (5).to_bytes(8, "little") + size.to_bytes(8, "big") + b"hello"
    assert "disagree" in refusal("goridge-2", data).reason


@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
@pytest.mark.parametrize("flags", [NONE, OLD_CONTROL | NONE])
def test_no_payload_with_a_size(protocol: str, flags: int) -> None:
    """A frame that says it has no payload has none."""
    frame = frame_1 if protocol == "goridge-1" else frame_2
    assert "without payload" in refusal(protocol, frame(flags, b"hello")).reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_size_over_the_limit(protocol: str) -> None:
    """The limit itself is legal, one byte more is not, and the error names the field."""
    assert decode(protocol, encode_error(protocol, bytes(100)), limit=100)[0].body == bytes(100)
    error = refusal(protocol, encode_error(protocol, bytes(101)), limit=100)
    assert "max_frame_size" in error.reason
    assert "101" in error.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_lie_is_judged_by_its_header_alone(protocol: str) -> None:
    """The payload of a frame that is too large is not waited for."""
    encoded = encode_error(protocol, bytes(101))
    error = refusal(protocol, encoded[: len(encoded) - 101], limit=100)
    assert "max_frame_size" in error.reason


@pytest.mark.parametrize("size", [1 << 40, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("protocol", ["goridge-1", "goridge-2"])
def test_a_size_that_no_memory_holds(protocol: str, size: int) -> None:
    """A size of 64 bits is a number to compare, nothing else."""
    data = b"\x04" + size.to_bytes(8, "little") + (size.to_bytes(8, "big") if protocol == "goridge-2" else b"")
    assert "max_frame_size" in refusal(protocol, data).reason


TEXTS: Final = [
    b"PHP Warning:  Undefined variable $x in /app/worker.php on line 3\n",
    b"Hello, world\n",
    b"\n",
    b"<br />\n<b>Notice</b>",
    b"Could not open input file: missing.php\n",
    b"\xef\xbb\xbf<?php",
    b"\x1b[31mred\x1b[0m",
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_judged_at_its_first_byte(protocol: str, text: bytes) -> None:
    """A stray print is refused at once, not taken for a length."""
    for data in (text[:1], text):
        error = refusal(protocol, data)
        assert "first byte" in error.reason
        assert error.received == data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_first_byte(protocol: str) -> None:
    """What may begin a frame is a short list, and one byte is enough to tell."""
    legal = ANY_3 if protocol == "goridge-3" else ANY_OLD
    for first in range(256):
        decoding = decoder(protocol)
        decoding.receive(bytes((first,)))
        if first in legal:
            assert decoding.next_frame() is None
        else:
            with pytest.raises(FrameError, match=f"{first:#04x}"):
                decoding.next_frame()


def test_text_behind_a_frame() -> None:
    """The error shows what came behind the last good frame, and only that."""
    decoding = decoder("goridge-3")
    decoding.receive(GOOD_3 + b"stray")
    assert decoding.next_frame() is not None
    with pytest.raises(FrameError) as caught:
        decoding.next_frame()
    assert caught.value.received == b"stray"
    assert "b'stray'" in str(caught.value)


def test_a_long_text_is_cut() -> None:
    """An error is a line or two, whatever was received."""
    message = str(refusal("goridge-3", b"x" * 100_000))
    assert len(message) < SHOWN + 200
    assert message.endswith("...")


def header(protocol: str, size: int) -> bytes:
    if protocol == "goridge-3":
        return with_checksum(bytes((JOB_3, 0)) + size.to_bytes(4, "little"), bytes(6))
    return b"\x04" + size.to_bytes(8, "little") + (size.to_bytes(8, "big") if protocol == "goridge-2" else b"")


def feed(decoding: Decoder, data: bytes) -> None:
    for byte in data:
        decoding.receive(bytes((byte,)))
        assert decoding.next_frame() is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("excess", [0, 1], ids=["of the largest size", "too large"])
def test_nothing_of_an_announced_size_is_allocated(protocol: str, excess: int) -> None:
    """Memory grows with what arrived, not with what was announced."""
    limit = 60 << 20
    data = header(protocol, limit + excess) + b"few"
    decoding = decoder(protocol, limit)
    tracemalloc.start()
    try:
        if excess:
            with pytest.raises(FrameError, match="max_frame_size"):
                feed(decoding, data)
        else:
            feed(decoding, data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_frame_shows_itself() -> None:
    """What a frame holds is seen in a failed assertion."""
    frame = Frame(4, 1, b"ctx", b"hello")
    assert repr(frame) == "Frame(flags=0x04, bits=0x01, context=b'ctx', body=b'hello')"
    assert frame != Frame(4, 1, b"ctx", b"other")
    assert frame != "a frame"


SIZES: Final = st.one_of(
    st.integers(0, 40), st.integers(PIPE_BUF - 40, PIPE_BUF + 40), st.integers(32 * 1024 - 80, 32 * 1024 + 80)
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(context=SIZES, body=SIZES)
def test_no_header_is_split(protocol: str, context: int, body: int) -> None:
    """A header begins the first piece, or is whole in a piece that a pipe takes whole or not at all."""
    pieces = [bytes(piece) for piece in encode_job(protocol, b"c" * context, b"b" * body)]
    assert all(pieces)
    data = b"".join(pieces)
    if protocol == "goridge-3":
        assert data == context_frame_3(RAW, b"c" * context, b"b" * body)
        headers = [(0, 16)]
    else:
        frame, size = (frame_1, 9) if protocol == "goridge-1" else (frame_2, 17)
        first = frame(OLD_CONTROL | RAW, b"c" * context)
        assert data == first + frame(0, b"b" * body)
        headers = [(0, size), (len(first), len(first) + size)]
    at = 0
    for number, piece in enumerate(pieces):
        end = at + len(piece)
        for begins, ends in headers:
            if begins < end and ends > at:
                assert at <= begins
                assert ends <= end
                # The beginning of the first piece, as far as an empty pipe takes it at once; or atomic as a whole.
                assert (number == 0 and ends <= PIPE_BUF) or len(piece) <= PIPE_BUF
        at = end
