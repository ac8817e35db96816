"""Frames of the three goridge dialects, without I/O.

Both sides use this module: the pool, and a worker written in Python, which must start in milliseconds. So it imports
nothing but `select`, `struct` and `zlib`, and its types are spelled out for checkers only.

A dialect is two things: how a frame is laid out in bytes, and which frames may come next. The layout is here. Which
frames may come next is the reader's business (`_conversation.py` for the pool, `child` for the worker): it gives a
`Decoder` the set of legal first bytes. The first byte is judged when it arrives, the rest of a header when it is
whole, and nothing of an announced size is allocated before it has been checked. The layouts are those of goridge 2.0,
2.1.2 and 3.0 as published with RoadRunner; the docs' page "The wire" shows them byte by byte.
"""

import select
from struct import Struct
from zlib import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)  # not on Windows, where `_platform` says what is the matter

PROTOCOLS: "Final" = ("goridge-1", "goridge-2", "goridge-3")

STOP: "Final" = b'{"stop":true}'
"""Payload of the control frame that ends a worker softly, and the context of a worker's request to be replaced."""

# goridge-1 and goridge-2: byte 0 is the flags.
NONE: "Final" = 0x02
RAW: "Final" = 0x04
OLD_ERROR: "Final" = 0x08
OLD_CONTROL: "Final" = 0x10

# goridge-3: byte 0 is version and header length, byte 1 the flags, byte 10 the stream bits.
CONTROL: "Final" = 0x01
ERROR: "Final" = 0x40
CODECS: "Final" = frozenset((0x00, 0x04, 0x08, 0x10, 0x20, 0x80))
"""What may stand beside `CONTROL` and `ERROR`: no codec, or one of raw, json, msgpack, gob and protobuf."""
MORE: "Final" = 0x01
STREAM_STOP: "Final" = 0x02
PING: "Final" = 0x04
PONG: "Final" = 0x08

BARE_3: "Final" = 0x13
"""Byte 0 of a goridge-3 frame without options: control, error, and the bare pong and stop-the-stream frames."""
JOB_3: "Final" = 0x14
"""Byte 0 of a goridge-3 frame with one option, the length of the context: a job or a reply."""

JOINED: "Final" = 32 * 1024
"""Up to this many bytes a body is copied behind its header and written at once; a larger one is not copied."""

SHOWN: "Final" = 128
"""How many of the bytes received an error shows: a line of stray output or two, not a dump."""

_SIZE = Struct("<BQ")
_BIG = Struct(">Q")
_START_3 = Struct("<BBI")
_WHOLE_3 = Struct("<BBIIBB")
_WITH_OPTION_3 = Struct("<BBIIBBI")
_HEADER_LENGTHS = {"goridge-1": 9, "goridge-2": 17, "goridge-3": 12}


class FrameError(Exception):
    """Bytes that are no frame of the dialect: `reason` says why, `received` holds the first of them."""

    def __init__(self, reason: str, received: bytes) -> None:
        super().__init__(f"{reason}; the bytes received begin {printable(received)}")
        self.reason = reason
        self.received = received


class Frame:
    """One frame: `flags` as sent, `bits` (goridge-3's byte 10, else 0), `context` (goridge-3 only) and `body`."""

    __slots__ = ("bits", "body", "context", "flags")

    def __init__(self, flags: int, bits: int, context: bytes, body: bytes) -> None:
        self.flags = flags
        self.bits = bits
        self.context = context
        self.body = body

    def __repr__(self) -> str:
        return f"Frame(flags={self.flags:#04x}, bits={self.bits:#04x}, context={self.context!r}, body={self.body!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frame):
            return NotImplemented
        return (self.flags, self.bits, self.context, self.body) == (other.flags, other.bits, other.context, other.body)

    __hash__ = None  # type: ignore[assignment]


def printable(data: bytes) -> str:
    """Show bytes on one line: text as text, everything else escaped, cut after `SHOWN` bytes."""
    shown = repr(bytes(data[:SHOWN]))
    return shown + "..." if len(data) > SHOWN else shown


def frame_1(flags: int, body: bytes, size: int = 0) -> bytes:
    """Encode a goridge-1 frame: flags, size. With an empty body `size` may announce one that is written later."""
    return _SIZE.pack(flags, len(body) or size) + body


def frame_2(flags: int, body: bytes, size: int = 0) -> bytes:
    """Encode a goridge-2 frame: flags, size, the size again with its bytes the other way round; else as `frame_1`."""
    size = len(body) or size
    return _SIZE.pack(flags, size) + _BIG.pack(size) + body


def frame_3(flags: int, body: bytes, bits: int = 0) -> bytes:
    """Encode a goridge-3 frame without options."""
    size = len(body)
    return _WHOLE_3.pack(BARE_3, flags, size, crc32(_START_3.pack(BARE_3, flags, size)), bits, 0) + body


def context_frame_3(flags: int, context: bytes, body: bytes, bits: int = 0) -> bytes:
    """Encode a goridge-3 job or reply: one option, the length of the context."""
    split = len(context)
    size = split + len(body)
    checksum = crc32(_START_3.pack(JOB_3, flags, size))
    return b"".join((_WITH_OPTION_3.pack(JOB_3, flags, size, checksum, bits, 0, split), context, body))


def encode_control(protocol: str, payload: bytes) -> bytes:
    """Encode a control frame: the handshake or the stop."""
    if protocol == "goridge-3":
        return frame_3(CONTROL | 0x08, payload)
    return (frame_1 if protocol == "goridge-1" else frame_2)(OLD_CONTROL, payload)


def encode_job(protocol: str, context: bytes, body: bytes) -> "tuple[bytes | memoryview, ...]":
    """Encode a job, as pieces to be written one after the other.

    A header must reach the worker in one piece: PHP's pipe relay takes it with a single read and calls a short one
    fatal. A pipe takes a write of at most `PIPE_BUF` bytes whole or not at all, and an empty pipe takes the beginning
    of any write; so wherever a header does not come first in an empty pipe, it is in a piece of at most `PIPE_BUF`
    bytes.
    """
    if protocol == "goridge-3":
        split = len(context)
        size = split + len(body)
        head = _WITH_OPTION_3.pack(JOB_3, RAW, size, crc32(_START_3.pack(JOB_3, RAW, size)), 0, 0, split) + context
        return (head + body,) if size <= JOINED - 16 else _pieces(head, body)
    frame = frame_1 if protocol == "goridge-1" else frame_2
    first = frame(OLD_CONTROL | RAW, context)
    head = frame(0, b"", len(body))
    if len(first) + len(head) <= PIPE_BUF:
        return _pieces(first + head, body)
    return first, *_pieces(head, body, PIPE_BUF)


def _pieces(head: bytes, body: bytes, longest: int = JOINED) -> "tuple[bytes | memoryview, ...]":
    if not body or len(head) + len(body) <= longest:
        return (head + body,)  # never an empty piece, of which a write says 0 as it does where it would wait
    room = max(0, PIPE_BUF - len(head))
    return head + body[:room], memoryview(body)[room:]


def encode_reply(protocol: str, context: bytes, body: bytes, bits: int = 0) -> bytes:
    """Encode a worker's reply; `bits` may say that more parts follow (goridge-3 only)."""
    if protocol == "goridge-3":
        return context_frame_3(0, context, body, bits)
    frame = frame_1 if protocol == "goridge-1" else frame_2
    return frame(OLD_CONTROL | RAW if context else OLD_CONTROL | NONE, context) + frame(RAW, body)


def encode_error(protocol: str, message: bytes) -> bytes:
    """Encode a worker's job error."""
    if protocol == "goridge-3":
        return frame_3(ERROR, message)
    return (frame_1 if protocol == "goridge-1" else frame_2)(OLD_CONTROL | OLD_ERROR | RAW, message)


class Decoder:
    """Bytes in, frames out, for one direction of one connection.

    `legal` is the set of values that the first byte of the next frame may have; `legal_bits` the same for goridge-3's
    stream bits. Both belong to whoever knows what may come next, and may be changed between two frames.
    """

    __slots__ = ("_at", "_buffer", "_parse", "_size", "legal", "legal_bits", "max_frame_size")

    def __init__(
        self, protocol: str, max_frame_size: int, legal: "frozenset[int]", legal_bits: "frozenset[int]"
    ) -> None:
        self.legal = legal
        self.legal_bits = legal_bits
        self.max_frame_size = max_frame_size
        self._parse = self._parse_3 if protocol == "goridge-3" else self._parse_old
        self._size = _HEADER_LENGTHS[protocol]
        self._buffer: bytes | bytearray = b""
        self._at = 0

    def receive(self, data: bytes) -> None:
        """Take bytes from the wire."""
        if not self._buffer:
            self._buffer = data  # the usual case: nothing left over, so nothing to copy
            return
        if self._at or not isinstance(self._buffer, bytearray):
            self._buffer = bytearray(memoryview(self._buffer)[self._at :])
            self._at = 0
        self._buffer += data

    def next_frame(self) -> "Frame | None":
        """Return the next whole frame, None where bytes are missing, or raise `FrameError`."""
        if not self._buffer:
            return None
        at = self._at
        if self._buffer[at] not in self.legal:
            raise self._refuse(f"the first byte {self._buffer[at]:#04x} can't begin a frame here")
        return self._parse(at)

    def plain_replies(self, data: bytes, most: int) -> "list[tuple[bytes, bytes, int]]":
        """Look at the front of these bytes for goridge-3 replies, whole, correct and without stream bits.

        Return context, body and end of each, of at most so many. Nothing is taken.
        """
        found: list[tuple[bytes, bytes, int]] = []
        at, have, limit = 0, len(data), self.max_frame_size
        while at + 16 <= have and len(found) < most:
            first, flags, size, checksum, bits, reserved, split = _WITH_OPTION_3.unpack_from(data, at)
            start = at + 16
            end = start + size
            if (
                first != JOB_3
                or flags not in CODECS
                or bits
                or reserved
                or not split <= size <= limit
                or end > have
                or crc32(data[at : at + 6]) != checksum
            ):
                break
            found.append((data[start : start + split], data[start + split : end], end))
            at = end
        return found

    @property
    def leftover(self) -> bytes:
        """What has arrived and is no part of a frame taken yet."""
        return bytes(memoryview(self._buffer)[self._at :])

    @property
    def pending(self) -> bool:
        """Whether bytes have arrived that are no part of a frame taken yet."""
        return bool(self._buffer)

    def drop(self) -> None:
        """Drop what has arrived and is no part of a frame taken yet."""
        self._take(len(self._buffer))

    def _take(self, end: int) -> None:
        if end == len(self._buffer):
            self._buffer = b""  # a large frame's memory goes with the frame
            end = 0
        self._at = end

    def _refuse(self, reason: str) -> FrameError:
        return FrameError(reason, self.leftover)

    def _check_size(self, size: int) -> None:
        if size > self.max_frame_size:
            raise self._refuse(f"a frame of {size:,} bytes is larger than max_frame_size ({self.max_frame_size:,})")

    def _parse_3(self, at: int) -> "Frame | None":
        buffer = self._buffer
        have = len(buffer) - at
        if have < 12:
            return None
        if have >= 16:
            # The usual case, checked as a whole: a job or a reply. What fails here is looked at in detail below.
            first, flags, size, checksum, bits, reserved, split = _WITH_OPTION_3.unpack_from(buffer, at)
            start, end = at + 16, at + 16 + size
            if (
                first == JOB_3
                and flags in CODECS
                and bits in self.legal_bits
                and reserved == 0
                and split <= size <= self.max_frame_size
                and type(buffer) is bytes
                and end <= len(buffer)
                and crc32(buffer[at : at + 6]) == checksum
            ):
                self._take(end)
                return Frame(flags, bits, buffer[start : start + split], buffer[start + split : end])
        first, flags, size, checksum, bits, reserved = _WHOLE_3.unpack_from(buffer, at)
        if crc32(buffer[at : at + 6]) != checksum:
            raise self._refuse("the header's CRC32 is wrong")
        if reserved or bits not in self.legal_bits:
            raise self._refuse(f"bytes 10 and 11 of the header ({bits:#04x}, {reserved:#04x}) are not legal here")
        if (flags & ~(CONTROL | ERROR)) not in CODECS or flags & (CONTROL | ERROR) == CONTROL | ERROR:
            raise self._refuse(f"the flags {flags:#04x} are not legal")
        self._check_size(size)
        if first == JOB_3:
            if flags & (CONTROL | ERROR):
                raise self._refuse("a control or error frame has no options")
            if have < 16:
                return None
            split = int.from_bytes(buffer[at + 12 : at + 16], "little")
            if split > size:
                raise self._refuse(f"a context of {split:,} bytes is longer than its payload of {size:,}")
            start = at + 16
        else:
            if not flags & (CONTROL | ERROR) and (size or not bits & (STREAM_STOP | PING | PONG)):
                raise self._refuse("a job or a reply has one option, the length of its context; this one has none")
            split = 0
            start = at + 12
        end = start + size
        if len(buffer) < end:
            return None
        self._take(end)
        if type(buffer) is bytes:
            return Frame(flags, bits, buffer[start : start + split], buffer[start + split : end])
        with memoryview(buffer) as view:
            return Frame(flags, bits, bytes(view[start : start + split]), bytes(view[start + split : end]))

    def _parse_old(self, at: int) -> "Frame | None":
        buffer = self._buffer
        if len(buffer) - at < self._size:
            return None
        flags, size = _SIZE.unpack_from(buffer, at)
        if self._size == 17:
            (again,) = _BIG.unpack_from(buffer, at + 9)
            if size != again:
                raise self._refuse(f"the two sizes of the frame disagree ({size:,} and {again:,})")
        self._check_size(size)
        if flags & NONE and size:
            raise self._refuse(f"a frame without payload (flags {flags:#04x}) has a size of {size:,}")
        start = at + self._size
        end = start + size
        if len(buffer) < end:
            return None
        self._take(end)
        with memoryview(buffer) as view:
            return Frame(flags, 0, b"", bytes(view[start:end]))
