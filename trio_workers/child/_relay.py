"""The worker's end of the relay: finds it, reads jobs from it and writes outcomes to it.

Blocking, on bare file descriptors. Imports cost start-up time, of every worker: see `trio_workers.child`.
"""

import os
import select

from .._goridge import (
    BARE_3,
    CONTROL,
    ERROR,
    JOB_3,
    MORE,
    NONE,
    OLD_CONTROL,
    PONG,
    PROTOCOLS,
    RAW,
    STOP,
    STREAM_STOP,
    Decoder,
    FrameError,
    encode_control,
    encode_error,
    encode_reply,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from .._goridge import Frame

READ_SIZE: "Final" = 65536
"""Bytes asked for in one read: what a pipe holds by default."""
LARGEST_READ: "Final" = 1 << 20
"""Reads grow up to this within one large frame: what an unprivileged user may grow a pipe to."""
NO_LIMIT: "Final" = 1 << 64
"""The pool bounds what it sends (`Config.max_frame_size`), so the worker needs no bound of its own."""

# The first bytes that may come from a pool. In the older dialects byte 0 is the flags; a job is a context, then a body.
_LEGAL_3: "Final" = frozenset((BARE_3, JOB_3))
_LEGAL_BITS: "Final" = frozenset((0, STREAM_STOP, PONG))
_LEGAL_OLD: "Final" = frozenset((OLD_CONTROL, OLD_CONTROL | RAW, OLD_CONTROL | NONE))
_LEGAL_OLD_BODY: "Final" = frozenset((0,))
# Before the handshake only a control frame may come.
_LEGAL_FIRST: "Final" = frozenset((BARE_3, OLD_CONTROL))


def open_relay(address: str, protocol: str) -> "Relay":
    """Open the relay that the environment names: `pipes`, `tcp://HOST:PORT` or `unix:///PATH`.

    Raises ValueError for an address or a dialect that does not exist, and OSError where nobody listens.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"TRIO_WORKERS_PROTOCOL is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
    if address == "pipes":
        return Relay(*_take_standard_streams(), protocol)
    _fill_standard_streams()
    fd = _connect(address)
    return Relay(fd, fd, protocol)


def _fill_standard_streams() -> None:
    # Where one of 0, 1 and 2 is closed, the next descriptor would take its number, and stray output its place.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)


def _take_standard_streams() -> "tuple[int, int]":
    # Private copies first; then whatever reads fd 0 finds its end, and whatever writes to fd 1 writes to stderr:
    # print, os.write, subprocesses, and libraries in C.
    for number in (0, 1):
        try:
            os.fstat(number)
        except OSError:
            raise RuntimeError(f"the relay is stdin and stdout, but descriptor {number} is closed") from None
    _fill_standard_streams()
    reader, writer = os.dup(0), os.dup(1)  # close-on-exec, as Python makes them
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    for fd in (reader, writer):
        os.set_blocking(fd, True)  # some parents hand over pipes that are not
    return reader, writer


def _connect(address: str) -> int:
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if not (scheme == "unix" and rest) and not (scheme == "tcp" and host and port.isdecimal()):
        raise ValueError(f"RR_RELAY is {address!r}; it must be pipes, tcp://HOST:PORT or unix:///PATH")
    import socket

    try:
        if scheme == "tcp":
            connection = socket.create_connection((host.strip("[]"), int(port)))
            # Otherwise Nagle meets the peer's delayed ACK: 40 ms for each job.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(rest)
            except BaseException:
                connection.close()
                raise
    except OSError as error:
        error.add_note(f"while connecting to the pool: RR_RELAY is {address!r}")
        raise
    return connection.detach()


class Relay:
    """One connection to the pool, in one dialect. Each writing method returns False once the pool is gone."""

    __slots__ = ("_ahead", "_context", "_decoder", "_ended", "_old", "_poll", "_reader", "_writer", "protocol")

    def __init__(self, reader: int, writer: int, protocol: str) -> None:
        self.protocol = protocol
        self._reader = reader
        self._writer = writer
        self._old = protocol != "goridge-3"
        self._decoder = Decoder(protocol, NO_LIMIT, _LEGAL_FIRST, _LEGAL_BITS)
        self._ahead: list[Frame] = []
        self._context = b""
        self._ended = False
        self._poll: Callable[[float], list[tuple[int, int]]] | None = None

    def next_job(self) -> "tuple[bytes, bytes] | None":
        """Wait for the next job's body and context; None when the pool says stop, or is gone.

        Answers the handshake on the way. Raises FrameError for what is not the dialect.
        """
        while (frame := self._next_frame()) is not None:
            if self._old:
                if frame.flags == OLD_CONTROL:
                    if not self._obey(frame):
                        return None
                elif frame.flags:
                    self._context = frame.body
                    self._decoder.legal = _LEGAL_OLD_BODY
                else:
                    context = self._context
                    self._context = b""
                    self._decoder.legal = _LEGAL_OLD
                    return frame.body, context
            elif frame.flags & CONTROL:
                if not self._obey(frame):
                    return None
            elif frame.flags & ERROR:
                raise FrameError("a pool sends no error frames", frame.body)
            elif not frame.bits:
                return frame.body, frame.context
            # else a pong, or the stop of a stream that had ended by itself: no job, and no harm
        return None

    def write(self, data: bytes) -> bool:
        """Write all of `data`."""
        try:
            sent = os.write(self._writer, data)
            while sent < len(data):
                with memoryview(data) as view:
                    sent += os.write(self._writer, view[sent:])
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def reply(self, context: bytes, body: bytes) -> bytes:
        """Encode a whole reply, or the last frame of a stream."""
        return encode_reply(self.protocol, context, body)

    def part(self, context: bytes, body: bytes) -> bytes:
        """Encode a part of a stream (goridge-3 only)."""
        return encode_reply(self.protocol, context, body, MORE)

    def error(self, message: bytes) -> bytes:
        """Encode a job error."""
        return encode_error(self.protocol, message)

    def stream_stop_asked(self) -> bool:
        """Look, without waiting, whether the pool has asked to end the running stream; other frames are kept."""
        if self._poll is None:
            poll = select.poll()
            poll.register(self._reader, select.POLLIN)
            self._poll = poll.poll
        while not self._ended and self._poll(0):
            self._read(READ_SIZE)
        asked = False
        while (frame := self._decoder.next_frame()) is not None:
            if not frame.bits:
                self._ahead.append(frame)
            elif frame.bits == STREAM_STOP:
                asked = True
        return asked

    def _next_frame(self) -> "Frame | None":
        if self._ahead:
            return self._ahead.pop(0)
        size = READ_SIZE
        while (frame := self._decoder.next_frame()) is None:
            # An end in the middle of a frame is an end as well: the pool was killed.
            if self._ended:
                return None
            if self._read(size) == size < LARGEST_READ:
                size *= 2
        return frame

    def _read(self, size: int) -> int:
        try:
            data = os.read(self._reader, size)
        except ConnectionResetError:
            data = b""
        if data:
            self._decoder.receive(data)
        else:
            self._ended = True
        return len(data)

    def _obey(self, frame: "Frame") -> bool:
        # The two control frames that exist are told apart without the json module, which takes 3 ms to import.
        compact = b"".join(frame.body.split())
        if compact == STOP:
            return False
        if not compact.startswith(b'{"pid":'):
            raise FrameError('a control frame is {"pid":N} or {"stop":true}', frame.body)
        self._decoder.legal = _LEGAL_OLD if self._old else _LEGAL_3
        return self.write(encode_control(self.protocol, b'{"pid":%d}' % os.getpid()))
