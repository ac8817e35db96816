"""Messages between a pool and its own Python child, without I/O.

Both sides use this module, so it imports nothing but C modules, `_goridge` and `_arena`. Command workers speak goridge,
which any language can; this dialect is private to us and has what goridge lacks: an id on every message, sizes of 64
bits, and buffers that travel beside a pickle instead of inside it (pickle protocol 5, out of band), each read straight
into memory of its own. What is large goes through memory that both sides have (`_arena.py`).

A message is a header, a table of buffer sizes, a body, and the buffers:

    magic  u32   always the same; what a job writes here by mistake is no message
    kind   u8    one of the constants below
    place  u8    0 where the buffers follow, 1 where they lie in the arena
    errno  u8    in an answer whose buffers follow although they are large: why the arena could not be had
    -      1     zero
    id     u32   of the job; an answer carries that of its call, so no answer can reach another job
    split  u32   where the body's first part ends, where it has two
    count  u32   how many buffers there are
    size   u64   of the body
    table        a u64 for each buffer: twice its size, and 1 more where it was read-only (bytes)

In the arena the first buffer begins at byte 64, each of the others at the next multiple of 64 behind the one before.

All numbers are little-endian.
"""

from collections import deque
from io import BytesIO
from struct import Struct

from ._arena import AT_ONCE, Drawing, Kept
from ._goridge import SHOWN, FrameError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Final, TypeAlias

    from ._arena import Arena

    Buffer: TypeAlias = bytes | bytearray
    Link: TypeAlias = tuple[
        BaseException, BaseException | None, BaseException | None, bool, tuple[object, ...], list[str] | None
    ]

MAGIC: "Final" = 0x0A54_779D  # b"\x9dwT\n": no text in ASCII or UTF-8 begins like this

# From the pool.
HELLO: "Final" = 1
CALL: "Final" = 2
STREAM: "Final" = 3
STOP_STREAM: "Final" = 4
STOP: "Final" = 5
CALLS: "Final" = 6
"""A chunk: a function and the arguments of many calls, by columns (`split` is not 0), or whole small calls, one after
the other."""
LOOK: "Final" = 7
"""There are packets: for a child that may wait on its relay."""
# From the child.
READY: "Final" = 16
RESULT: "Final" = 17
PART: "Final" = 18
END: "Final" = 19
ERROR: "Final" = 20
REFUSED: "Final" = 21
SOME: "Final" = 22
"""Results of a chunk, or one alone that has buffers; more follow."""
DONE: "Final" = 23
"""A chunk is over; see `_region.DONE_HEAD`."""

FROM_POOL: "Final" = frozenset((HELLO, CALL, STREAM, STOP_STREAM, STOP, CALLS, LOOK))
FROM_CHILD: "Final" = frozenset((READY, RESULT, PART, END, ERROR, REFUSED, SOME, DONE))

JOINED: "Final" = 32 * 1024
"""Up to this many bytes a body is copied behind its header and written at once; a larger one is not copied."""

MOST_PACKET: "Final" = 16 * 1024
"""Bytes that a packet has at most: jobs that lie behind others are smaller (PIPE_BUF)."""

OUT_OF_BAND: "Final" = 32 * 1024
"""From this many bytes on a buffer travels beside the pickle: below, copying it costs less than a system call more."""

MOST_BUFFERS: "Final" = 1 << 16
"""As many buffers travel beside one pickle; the rest goes inside it."""

_HEADER = Struct("<IIIIIQ")  # kind, place, errno and the zero as one number: in most messages it is the kind
_SIZE: "Final" = _HEADER.size
_COUNT: "Final" = slice(16, 20)
"""Where a message has the number of its buffers."""

GATHERED: "Final" = 512
"""Pieces written by one system call: half of what Linux takes (IOV_MAX)."""

_unpack = _HEADER.unpack_from
_pack = _HEADER.pack


class Message:
    """One message: `body` has two parts where `split` is not 0; `buffers` are what the pickle in it refers to."""

    __slots__ = ("body", "buffers", "id", "kind", "split")

    def __init__(self, kind: int, id_: int, split: int, body: bytes, buffers: "Sequence[Buffer]" = ()) -> None:
        self.kind = kind
        self.id = id_
        self.split = split
        self.body = body
        self.buffers = buffers

    def __repr__(self) -> str:
        return f"Message(kind={self.kind}, id={self.id}, {len(self.body)} bytes, {len(self.buffers)} buffers)"


def encode(
    kind: int, id_: int = 0, body: bytes = b"", buffers: "Sequence[memoryview]" = (), split: int = 0
) -> "tuple[bytes | memoryview, ...]":
    """Encode a message, as pieces to be written one after the other; buffers are flat and are not copied."""
    size = len(body)
    head = _pack(MAGIC, kind, id_, split, len(buffers), size)
    if not buffers:
        return (head + body,) if size <= JOINED else (head, memoryview(body))
    table = b"".join([(2 * view.nbytes + view.readonly).to_bytes(8, "little") for view in buffers])
    return head + table + body, *buffers


def buffers_of(pieces: "Sequence[bytes | memoryview]") -> "Sequence[memoryview]":
    """Return the buffers of an encoded message."""
    if len(pieces) == 1 or not any(pieces[0][_COUNT]):
        return ()
    return pieces[1:]  # type: ignore[return-value]


def placed(pieces: "Sequence[bytes | memoryview]") -> "tuple[bytes | memoryview, ...]":
    """Say in an encoded message that its buffers lie in the arena; return what is to be written then."""
    head = pieces[0]
    first = b"".join((head[:5], b"\x01", head[6:_SIZE]))
    return (first, memoryview(head)[_SIZE:])


def excused(pieces: "Sequence[bytes | memoryview]", errno: int) -> "tuple[bytes | memoryview, ...]":
    """Say in an encoded message why its buffers don't lie in the arena."""
    head = pieces[0]
    return (b"".join((head[:6], bytes((errno & 0xFF,)), head[7:])), *pieces[1:])


def drop_sent(pieces: "deque[bytes | memoryview]", count: int) -> None:
    """Take so many bytes from the front of what is to be sent."""
    while pieces and count >= len(pieces[0]):
        count -= len(pieces.popleft())
    if count:
        pieces[0] = memoryview(pieces[0])[count:]


def split_calls(body: bytes) -> "Iterator[Message]":
    """Take apart the whole calls of a chunk, one by one."""
    at = 0
    while at < len(body):
        _, kind, id_, split, _, size = _unpack(body, at)
        at += _SIZE + size
        yield Message(kind, id_, split, body[at - size : at])


class Decoder:
    """Bytes in, messages out, for one direction of one connection.

    `receive` takes what was read. In the middle of something large, `space` is where the next bytes belong: read
    straight into it, release it, and say how many there were with `filled`. What begins with `MAGIC` comes
    from a child of ours, so the sizes it announces are believed, up to the limit. Buffers in the `arena` are taken out
    of it by `next_message`, each time `most` bytes: as long as `drawing`, call it again.
    """

    __slots__ = (
        "_arena",
        "_at",
        "_bounds",
        "_drawing",
        "_error",
        "_held",
        "_kept",
        "_legal",
        "_limit",
        "_message",
        "_places",
        "_ready",
        "_size",
        "_target",
        "_whole",
        "excuse",
        "most",
        "taken",
    )

    def __init__(
        self,
        legal: "frozenset[int]",
        limit: int,
        arena: "Arena | None" = None,
        kept: "Kept | None" = None,
        most: int = AT_ONCE,
    ) -> None:
        self.most = most
        self.excuse = 0
        """The errno by which the other side said last why it did without the arena."""
        self._arena = arena
        self._kept = Kept(0) if kept is None else kept
        self._drawing: Drawing | None = None
        self._places: list[int] = []
        self._legal = legal
        self._limit = limit
        self._ready: deque[Message] = deque()
        self._held: bytes = b""
        self._message: Message | None = None
        self._bounds: list[int] = []
        self._whole: list[Buffer] = []
        self._target: bytearray | BytesIO | None = None
        self._size = 0
        self._at = 0
        self._error: FrameError | None = None
        self.taken = 0

    def next_message(self) -> Message | None:
        """Return the next whole message, None where bytes are missing, or raise `FrameError`."""
        if self._ready:
            return self._ready.popleft()
        if self._drawing is not None:
            self._draw()
            if self._ready:
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        return None

    @property
    def drawing(self) -> bool:
        """Whether there is more to be taken out of the arena, for a message that has arrived."""
        return self._drawing is not None

    @property
    def pending(self) -> bool:
        """Whether bytes have arrived that are no part of a message taken yet."""
        return bool(self._ready or self._held or self._message is not None)

    @property
    def leftover(self) -> bytes:
        """The first of what has arrived and was not taken."""
        return beginning(self._ready[0]) if self._ready else self._held

    def drop(self) -> None:
        """Drop what has arrived and is no part of a message taken yet."""
        self._ready.clear()
        self._held = b""
        self._message = self._target = self._drawing = None
        self._whole = []

    def take_whole(self, data: bytes) -> Message | None:
        """Take bytes from the wire where they are one whole small message and nothing else, the usual case.

        Return None where they aren't, or where something else is pending, and take nothing.
        """
        size = len(data) - _SIZE
        if size < 0 or self._held or self._message is not None or self._ready:
            return None
        magic, kind, id_, split, count, announced = _unpack(data)
        if magic != MAGIC or announced != size or count or split > size or kind not in self._legal:
            return None
        return None if size > self._limit else Message(kind, id_, split, data[_SIZE:])

    def take_front(self, data: bytes, at: int) -> Message | None:
        """Take the whole small message that begins here, where there is one; `taken` is its size then."""
        end = at + _SIZE
        if len(data) < end:
            return None
        magic, kind, id_, split, count, announced = _unpack(data, at)
        self.taken = _SIZE + announced
        if magic != MAGIC or count or split > announced or end + announced > len(data) or kind not in self._legal:
            return None
        return None if announced > self._limit else Message(kind, id_, split, data[end : end + announced])

    def receive(self, data: bytes) -> None:
        """Take bytes from the wire."""
        view = memoryview(data)
        while view and self._error is None and self._drawing is None:
            space = self.space
            if space is not None:
                count = min(len(space), len(view))
                space[:count] = view[:count]
                space.release()
                view = view[count:]
                self.filled(count)
            else:
                view = self._parse_head(view)
        if view:
            self._held += view

    @property
    def space(self) -> memoryview | None:
        """Where the next bytes belong, None where that is not known before they have been looked at."""
        # A view that was kept would be found by the garbage collector together with its target, at the end of a
        # connection, and CPython does not survive that everywhere (cpython issues 111049, 111331).
        target = self._target
        if target is None:
            return None
        with target.getbuffer() if isinstance(target, BytesIO) else memoryview(target) as view:
            return view[self._at :]

    def filled(self, count: int) -> None:
        """Note that this many bytes were read into `space`."""
        self._at += count
        if self._target is not None and self._at == self._size:
            self._next_target()

    def _parse_head(self, view: memoryview) -> memoryview:
        """Take a header and its table from the front, as far as they are there; return the rest."""
        held = self._held + view
        if len(held) < _SIZE:
            if held[:4] != MAGIC.to_bytes(4, "little")[: len(held)]:
                self._refuse(held, "these bytes begin no message")
            self._held = held
            return view[:0]
        magic, word, id_, split, count, size = _unpack(held)
        kind, more = word & 0xFF, word >> 8
        end = _SIZE + 8 * count
        if magic != MAGIC or kind not in self._legal:
            self._refuse(held, "these bytes begin no message")
        elif split > size or count > MOST_BUFFERS or more >> 16 or (more & 0xFF) > (count > 0):
            self._refuse(held, "the numbers of the header don't fit together")
        elif len(held) >= end:
            table = [int.from_bytes(held[at : at + 8], "little") for at in range(_SIZE, end, 8)]
            total = size + sum(number // 2 for number in table)
            if total > self._limit:
                self._refuse(held, f"a message of {total:,} bytes is larger than max_frame_size ({self._limit:,})")
            else:
                self._message = Message(kind, id_, split, b"")
                self.excuse = more >> 8 or self.excuse
                self._places = table if more & 0xFF else []
                self._bounds = [2 * size + 1] if more & 0xFF else [2 * size + 1, *table]
                used = end - len(self._held)
                self._held = b""
                self._next_target()
                return view[used:]
        self._held = held
        return view[:0]

    def _next_target(self) -> None:
        """Go on to the next of the body and the buffers that has any bytes; past the last, the message is whole."""
        target = self._target
        if target is not None:
            # The bytes inside a BytesIO come out as they are, not as a copy.
            self._whole.append(target.getvalue() if isinstance(target, BytesIO) else target)
            self._target = None
        while len(self._whole) < len(self._bounds):
            size, read_only = divmod(self._bounds[len(self._whole)], 2)
            if not size:
                self._whole.append(b"" if read_only else bytearray())
                continue
            try:
                self._target = BytesIO(bytes(size)) if read_only else bytearray(size)
            except (MemoryError, OverflowError):
                self._message = None
                self._whole = []
                self._refuse(b"", f"there is no memory for {size:,} bytes of a message")
                return
            self._at = 0
            self._size = size
            return
        message = self._message
        assert message is not None
        body, *message.buffers = self._whole
        assert type(body) is bytes
        message.body = body
        self._whole = []
        if self._places:
            self._begin_drawing()
        else:
            self._ready.append(message)
            self._message = None

    def _begin_drawing(self) -> None:
        try:
            if self._arena is None:
                raise ValueError("there is no arena")
            self._drawing = Drawing(self._arena, self._places, self._kept)
        except ValueError as error:
            self._message = None
            self._refuse(b"", f"the buffers of a message are not where it says: {error}")

    def _draw(self) -> None:
        """Take the next of a message's buffers out of the arena; with the last, the message is whole."""
        drawing, message = self._drawing, self._message
        assert drawing is not None
        assert message is not None
        try:
            if not drawing.go_on(self.most):
                return
        except (MemoryError, OverflowError):
            self._refuse(b"", "there is no memory for the buffers of a message")
        else:
            message.buffers = drawing.buffers
            self._ready.append(message)
        self._drawing = self._message = None
        held, self._held = self._held, b""
        self.receive(held)

    def _refuse(self, held: bytes, reason: str) -> None:
        self._error = FrameError(reason, held)


def beginning(message: Message) -> bytes:
    """Return the first bytes of a message, as they came, for an error to show."""
    head = _pack(MAGIC, message.kind, message.id, message.split, len(message.buffers), len(message.body))
    return head if message.buffers else head + message.body[:SHOWN]


def in_short(error: BaseException) -> str:
    """Show an exception on one line, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException as another:
        return f"{type(error).__name__}, which can't be shown ({type(another).__name__})"


def links(error: BaseException) -> "list[Link]":
    """List an exception and all that hang on it (causes, contexts, members of groups), each with what hangs on it.

    Arguments and notes stand beside each: a class may lose them as it pickles itself, or change them in `__init__`.
    """
    found = [error]
    for one in found:
        nearby: list[BaseException | None] = [one.__cause__, one.__context__, *members(one)]
        found += [other for other in nearby if other is not None and not any(other is known for known in found)]
    return [link(one, one.__cause__, one.__context__) for one in found]


def link(one: BaseException, cause: BaseException | None = None, context: BaseException | None = None) -> "Link":
    """Describe one exception, with what hangs on it."""
    return one, cause, context, one.__suppress_context__, one.args, getattr(one, "__notes__", None)


def restore(found: "Sequence[Link]") -> BaseException:
    """Hang exceptions together again, as `links` found them; return the first."""
    for error, cause, context, suppress, arguments, notes in found:
        error.__cause__, error.__context__, error.__suppress_context__ = cause, context, suppress
        if error.args != arguments:
            error.args = arguments
        if notes is not None:
            error.__notes__ = notes
    return found[0][0]


def members(error: BaseException) -> "tuple[BaseException, ...]":
    """Return what an exception group holds; nothing for any other exception."""
    held: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return held if issubclass(type(error), BaseExceptionGroup) else ()
