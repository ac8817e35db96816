"""Jobs from files and pipes, replies to stdout, without a thread for each line and without blocking the event loop.

What stdin and stdout lead to is often shared: with a shell, with the other programs of a pipeline. So their flags are
left as they are (O_NONBLOCK would hold for all of them, and stay after us); instead nothing is read or written that
could block, which depends on what it is:

- a pipe is read when it has something, and written in parts of at most PIPE_BUF bytes when there is room: by POSIX that
  doesn't block;
- files and devices such as /dev/null never make anyone wait, and epoll refuses them: they are read and written at once;
- a terminal and a socket may be written to by a thread alone, which is left behind if somebody ends us meanwhile.
"""

import base64
import binascii
import json
import os
import select
import stat
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import attrs
import trio

from .._errors import JobError, WorkersError
from .._model import Payload, payload_of
from ._errors import CommandError, Misuse
from ._top_view import printable

BLOCK: Final = 64 * 1024
"""Bytes read at once: what a pipe holds, unless somebody made it grow."""

HEAD: Final = 40
"""Bytes of a job that are kept for the case that it fails, so that the line about it says which one it was."""

LONGEST_ERROR: Final = 2000
"""Characters of an error that are shown."""

STDIN: Final = "-"


class ReaderGone(Exception):
    """Whoever read our stdout does so no more, such as `head` which has seen enough."""


@attrs.define(slots=True)
class Ticket:
    """What is kept of a job while it runs: its number, from 1, and how it begins; and what was wrong with its line."""

    number: int
    head: bytes
    wrong: str | None = None

    def __str__(self) -> str:
        shown = printable(self.head.decode("utf-8", "backslashreplace"))
        return f"job {self.number} ({shown}{'...' if len(self.head) >= HEAD else ''})"


# in


def check_inputs(names: Sequence[str]) -> None:
    """Raise `Misuse` that names the file which can't be read, before anything was begun."""
    for name in names:
        if name == STDIN:
            try:
                os.fstat(0)
            except OSError:
                raise Misuse("stdin is closed; give a file of jobs by --input FILE") from None
        elif Path(name).is_dir():
            raise Misuse(f"--input {name}: is a directory")
        elif not Path(name).exists():
            raise Misuse(f"--input {name}: no such file")
        elif not os.access(name, os.R_OK):
            raise Misuse(f"--input {name}: permission denied")


def size_of(names: Sequence[str]) -> int | None:
    """Return how many bytes of jobs there are; None where that can't be known before they were read."""
    found = [os.fstat(0) if name == STDIN else Path(name).stat() for name in names]
    return sum(one.st_size for one in found) if all(stat.S_ISREG(one.st_mode) for one in found) else None


async def read_blocks(fd: int) -> AsyncGenerator[bytes]:
    """Read to the end, as it comes. Cancelling loses nothing. OSError where it can't be read."""
    waits = not stat.S_ISREG(os.fstat(fd).st_mode)
    while True:
        if waits:
            try:
                await trio.lowlevel.wait_readable(fd)
            except PermissionError:
                waits = False  # a device that epoll refuses, for it never makes anyone wait
        else:
            await trio.lowlevel.checkpoint()
        try:
            block = os.read(fd, BLOCK)
        except BlockingIOError:
            continue  # somebody else made it non-blocking, and was faster
        if not block:
            return
        yield block


@attrs.frozen
class TooLong:
    """Stands for a line that was not kept, for it had more bytes than a job may have."""

    head: bytes
    size: int


class Splitter:
    """Cuts blocks into lines, and keeps no more of one than `longest` bytes."""

    def __init__(self, separator: bytes, longest: int) -> None:
        self._separator = separator
        self._longest = longest
        self._rest = bytearray()
        self._size = 0

    def feed(self, block: bytes) -> Iterator[bytes | TooLong]:
        """Give the lines that end in this block."""
        first, *others = block.split(self._separator)
        self._add(first)
        if not others:
            return
        yield self._take()
        last = others.pop()
        for line in others:
            yield line if len(line) <= self._longest else TooLong(line[:HEAD], len(line))
        self._add(last)

    def end(self) -> Iterator[bytes | TooLong]:
        """Give the last line, where no separator stands after it."""
        if self._size:
            yield self._take()

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._longest:
            self._rest += part
        else:
            if len(self._rest) < HEAD:
                self._rest += part[:HEAD]
            del self._rest[HEAD:]

    def _take(self) -> bytes | TooLong:
        size, line = self._size, bytes(self._rest)
        self._rest.clear()
        self._size = 0
        return line if size <= self._longest else TooLong(line, size)


Parse = Callable[[bytes], Payload | None]
"""Makes a job of a line; None for a line that is none. Raise ValueError for what can't be one."""


async def read_jobs(
    names: Sequence[str], separator: bytes, longest: int, parse: Parse, progress: Callable[[int], None]
) -> AsyncGenerator[tuple[Ticket, Payload | None]]:
    """Read the jobs of all files, one after the other; None in the place of one that can't be sent.

    `progress(bytes)` is called for each block. A file that can't be read on is a `CommandError`.
    """
    number = 0
    for name in names:
        fd = 0
        try:
            if name != STDIN:
                # O_NONBLOCK, or opening a named pipe would wait for somebody to write to it, and all else with it.
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            splitter = Splitter(separator, longest)
            async for block in read_blocks(fd):
                progress(len(block))
                for line in splitter.feed(block):
                    job = _job(number + 1, line, longest, parse)
                    if job is not None:
                        number += 1
                        yield job
            for line in splitter.end():
                job = _job(number + 1, line, longest, parse)
                if job is not None:
                    number += 1
                    yield job
        except OSError as error:
            raise CommandError(f"{'stdin' if name == STDIN else name}: {error.strerror}") from None
        finally:
            if fd:
                os.close(fd)


def _job(number: int, line: bytes | TooLong, longest: int, parse: Parse) -> tuple[Ticket, Payload | None] | None:
    if isinstance(line, TooLong):
        return Ticket(number, line.head, f"has {line.size:,} bytes, and at most {longest:,} are taken"), None
    try:
        payload = parse(line)
    except ValueError as error:
        return Ticket(number, line[:HEAD], str(error)), None
    return None if payload is None else (Ticket(number, line[:HEAD]), payload)


def parse_line(line: bytes) -> Payload:
    """Take a line as it is."""
    return payload_of(line, b"")


_KEYS: Final = {"body": False, "body_base64": True, "context": False, "context_base64": True}


def parse_json(line: bytes) -> Payload | None:
    """Take a line as `{"body": "...", "context": "..."}`, or with `body_base64` for what is no text."""
    if not line.strip():
        return None
    try:
        found: object = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError('is no JSON object such as {"body": "..."}')
    parts: dict[str, bytes] = {}
    for key, value in cast("dict[str, object]", found).items():
        if key not in _KEYS:
            raise ValueError(f"has a key {key!r}; those known are {', '.join(_KEYS)}")
        part = key.removesuffix("_base64")
        if part in parts:
            raise ValueError(f"has {part} and {part}_base64; one of them, please")
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a string, not {type(value).__name__}")
        try:
            parts[part] = base64.b64decode(value, validate=True) if _KEYS[key] else value.encode()
        except binascii.Error as error:
            raise ValueError(f"{key} is no base64: {error}") from None
        except UnicodeEncodeError:
            raise ValueError(f"{key} holds half a surrogate pair; {key}_base64 takes any bytes") from None
    return payload_of(parts.get("body", b""), parts.get("context", b""))


# out


def say(error: BaseException) -> str:
    """Say an error in one line: of a traceback that came from the worker the last one, where the error itself is.

    What a terminal would act on stands escaped: the text may be a worker's own.
    """
    lines = str(error).strip().split("\n")
    text = lines[-1] if lines[0].startswith("Traceback (most recent call last)") else lines[0]
    kind = type(error).__name__
    return f"{kind}: {printable(text.strip(), LONGEST_ERROR)}" if text else kind


def format_json(ticket: Ticket, outcome: Payload | Exception) -> bytes:
    """Write a reply, or an error, as a line of JSON. The job's number is in it."""
    answer: dict[str, Any] = {"job": ticket.number}
    if isinstance(outcome, Payload):
        for part, value in (("body", outcome.body), ("context", outcome.context)):
            if value or part == "body":
                try:
                    answer[part] = value.decode()
                except UnicodeDecodeError:
                    answer[f"{part}_base64"] = base64.b64encode(value).decode()
    else:
        answer["error"] = ticket.wrong or str(outcome)
        answer["kind"] = "BadLine" if ticket.wrong else type(outcome).__name__
        if isinstance(outcome, WorkersError) and not isinstance(outcome, JobError):
            answer["started"] = getattr(outcome, "started", None)
    return json.dumps(answer, ensure_ascii=False).encode()


class Output:
    """Writes to a file descriptor without blocking the event loop, whatever it leads to, and leaves its flags alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        mode = os.fstat(fd).st_mode
        self._pipe = stat.S_ISFIFO(mode)
        self._at_once = stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(fd))

    async def write(self, data: bytes | bytearray) -> None:
        """Write everything. Raise `ReaderGone` where nobody reads it, `CommandError` where it can't be written."""
        rest = memoryview(bytes(data))
        try:
            if not rest:
                await trio.lowlevel.checkpoint()
            while rest:
                if self._at_once:
                    await trio.lowlevel.checkpoint()
                    written = os.write(self._fd, rest)
                elif self._pipe:
                    await trio.lowlevel.wait_writable(self._fd)
                    written = self._write_some(rest[: select.PIPE_BUF])
                else:
                    written = await trio.to_thread.run_sync(os.write, self._fd, rest[:BLOCK], abandon_on_cancel=True)
                rest = rest[written:]
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            raise CommandError(f"stdout: {error.strerror}") from None

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0  # somebody else made it non-blocking, and was faster


__all__ = [
    "HEAD",
    "STDIN",
    "Output",
    "ReaderGone",
    "Splitter",
    "Ticket",
    "TooLong",
    "check_inputs",
    "format_json",
    "parse_json",
    "parse_line",
    "read_blocks",
    "read_jobs",
    "say",
    "size_of",
]
