"""Memory that a pool and one of its Python children share: what is big goes through it, past the socket.

Both sides use this module, so it imports C modules only. The memory is a file without a name (memfd), which the child
inherits. Each side maps it when it first needs it, writes the buffers of a message one after the other, and sends the
message by the socket; the other side copies them out before it does anything else. No view of the arena is ever given
to anybody: what a function or a caller gets is memory of its own, of the same kinds as by the socket. Nobody can see
what another job put there, whatever he keeps.

Whose turn it is to write follows from the messages. The pool writes for a job while nothing else is under way to or
from this child. The child writes for an answer when all that it wrote before has been taken, which the pool notes in
the arena's first bytes (`TAKEN`); where it hasn't yet, in the middle of a stream, that answer takes the socket.

The file grows by doubling and can't be made smaller (it is sealed), so a mapping stays good whatever a job does to the
descriptor. Its memory is allocated before it is written to, a step ahead: where there is none, that is an error then,
and no SIGBUS in the middle of a copy. `give_back` returns the memory to the system and keeps the file.
"""

import errno
import os
import sys
from io import BytesIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from mmap import mmap
    from typing import Final

IN_ARENA: "Final" = 256 * 1024
"""From this many bytes on, all of a message together, buffers go through the arena: below, the socket is as fast."""

ALIGNED: "Final" = 64
"""Each buffer begins at a multiple of this: a line of the processor's cache, and what vector instructions like."""

TAKEN: "Final" = ALIGNED
"""The first buffer's place. Before it stands how many answers the pool has taken out, u64."""

SLICE: "Final" = 4 * 1024 * 1024
"""Bytes that the pool copies before other tasks get their turn: about a millisecond."""

AT_ONCE: "Final" = 1 << 63
"""Instead of `SLICE`, where nobody else waits for a turn."""

SMALLEST: "Final" = 1024 * 1024
"""Of the file: then come its doubles."""

KEPT_FROM: "Final" = 1024 * 1024
"""Smaller memory comes and goes at no cost that could be seen."""

KEPT_BYTES: "Final" = 256 * 1024 * 1024
KEPT_COUNT: "Final" = 8
"""As many bytes and pieces of memory are kept for what comes next, in the pool and in each child."""

KEPT_FOR: "Final" = 10.0
"""Seconds: what has not been used for so long is given back."""

KEPT_JOBS: "Final" = 64
"""Jobs that need none of it: then a child that is never idle gives it back too."""

_PAGE: "Final" = os.sysconf("SC_PAGE_SIZE")
_BLOCK: "Final" = 512  # the unit of st_blocks, whatever st_blksize says


class Arena:
    """One side of the shared memory. `used` is how much of it has been in use since it was last given back."""

    __slots__ = ("_end", "_fd", "_file", "_map", "_mapped", "_sure", "sent", "taken", "used", "uses")

    def __init__(self, fd: int) -> None:
        """Own the descriptor, whose file is fresh. Raise `OSError` where it is none."""
        status = os.fstat(fd)
        self._fd = fd
        self._file = status.st_dev, status.st_ino
        self._map: mmap | None = None
        self._mapped = 0
        self._sure = 0
        self._end = 0
        self.used = 0
        self.uses = 0
        self.sent = 0
        self.taken = 0

    # writing

    def renew(self, end: int) -> None:
        """Begin to write anew, so many bytes in the end: the other side may have given the memory back meanwhile."""
        self._sure = 0
        self._end = end
        self.uses += 1

    def write(self, at: int, data: "memoryview") -> None:
        """Write bytes to a place. Raise `OSError` or `ImportError` where the memory can't be had."""
        end = at + data.nbytes
        if end > self._sure:
            self._reserve(end)
        assert self._map is not None
        with memoryview(self._map) as whole:
            whole[at:end] = data

    def _reserve(self, end: int) -> None:
        """Have memory for the first `end` bytes, and a mapping for all that will come."""
        status = self._status()
        if status.st_size < self._end:
            size = max(SMALLEST, status.st_size)
            while size < self._end:
                size *= 2
            os.ftruncate(self._fd, size)
        self._reach(self._end)
        # What is allocated is always the file's beginning.
        have = status.st_blocks * _BLOCK // _PAGE * _PAGE
        if have < end:
            os.posix_fallocate(self._fd, have, end - have)
            if self._status().st_blocks * _BLOCK < end:
                raise OSError(errno.EOPNOTSUPP, "this system does not say how much memory a file has")
        self._sure = max(have, end)

    @property
    def free(self) -> bool:
        """Whether the pool has taken all that this child wrote."""
        if not self.sent:
            return True
        assert self._map is not None
        with memoryview(self._map) as whole:
            return int.from_bytes(whole[:8], "little") == self.sent

    # reading

    def check(self, end: int) -> None:
        """Raise ValueError where the first `end` bytes are not there: not even their memory is, so nobody wrote it."""
        status = self._status()
        if status.st_size < end or status.st_blocks * _BLOCK < end:
            raise ValueError(f"the arena has no {end:,} bytes")
        self.used = max(self.used, end)
        self.uses += 1

    def view(self, at: int, size: int) -> "memoryview":
        """Return a view of a place, to be released before anything else is done here."""
        try:
            self._reach(at + size)
        except (OSError, ImportError):
            return memoryview(self._read(at, size))  # there is no room left to map it
        assert self._map is not None
        with memoryview(self._map) as whole:
            return whole[at : at + size]

    def _read(self, at: int, size: int) -> bytearray:
        found = bytearray(size)
        done = 0
        with memoryview(found) as space:
            while done < size:
                with space[done:] as rest:
                    count = os.preadv(self._fd, [rest], at + done)
                if not count:
                    raise OSError(errno.EIO, "the arena became smaller")
                done += count
        return found

    def note_taken(self) -> None:
        """Tell the child that one more of its answers has been taken out.

        A system call, although the memory is mapped: so no processor makes this visible before the copy has been read.
        """
        self.taken += 1
        try:  # noqa: SIM105 - contextlib takes long to import
            os.pwrite(self._fd, self.taken.to_bytes(8, "little"), 0)
        except OSError:
            pass  # a limit to the size of files that leaves no 8 bytes: the next answers take the socket

    # both

    def give_back(self) -> None:
        """Return all memory to the system but the first page. Only while nobody writes and nothing waits to be read."""
        if self._map is not None and self._mapped > _PAGE:
            from mmap import MADV_REMOVE  # Linux has it, and only there is an arena

            self._map.madvise(MADV_REMOVE, _PAGE)
            self._sure = 0
            self.used = 0

    def close(self) -> None:
        """Let go of it; a second call is harmless."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _status(self) -> os.stat_result:
        status = os.fstat(self._fd)
        if (status.st_dev, status.st_ino) != self._file:
            raise OSError(errno.EBADF, "a job closed the arena's descriptor")  # and its number means another file now
        return status

    def _reach(self, end: int) -> None:
        """Map the file as it is now, where the mapping does not reach so far."""
        self.used = max(self.used, end)
        if end <= self._mapped:
            return
        size = self._status().st_size
        held: list[int] = []
        try:
            # A mapping has a descriptor of its own. Where one of 0, 1 and 2 is closed it would get that number.
            while not held or held[-1] < 3:
                held.append(os.open(os.devnull, os.O_RDWR))
            fresh = _map(self._fd, size)
        finally:
            for fd in held:
                os.close(fd)
        if self._map is not None:
            self._map.close()
        self._map, self._mapped = fresh, size


def _map(fd: int, size: int) -> "mmap":
    from mmap import mmap  # not before something big comes: most workers never need it

    return mmap(fd, size)


class Filling:
    """The buffers of one message on their way into the arena."""

    __slots__ = ("_arena", "_at", "_buffers", "_done", "_index")

    def __init__(self, arena: Arena, buffers: "Sequence[memoryview]") -> None:
        self._arena = arena
        self._buffers = buffers
        self._index = 0
        self._done = 0
        self._at = TAKEN
        end = at = TAKEN
        for buffer in buffers:
            end = at + buffer.nbytes
            at = behind(at, buffer.nbytes)
        arena.renew(end)

    def go_on(self, most: int = AT_ONCE) -> bool:
        """Copy at most so many bytes; True when all are there. Raise as `Arena.write` does: then nothing is sent."""
        while self._index < len(self._buffers):
            if not most:
                return False
            buffer = self._buffers[self._index]
            count = min(most, buffer.nbytes - self._done)
            with buffer[self._done : self._done + count] as piece:
                self._arena.write(self._at + self._done, piece)
            self._done += count
            most -= count
            if self._done == buffer.nbytes:
                self._at = behind(self._at, buffer.nbytes)
                self._index += 1
                self._done = 0
        return True


class Kept:
    """Memory that was handed out before, for the next buffer of the same size, once nobody else holds it.

    A fresh page of memory costs ten times as much as a copy into it: the system has to find it, clear it and map it,
    for every 4 KiB. Up to some 32 MiB the C library keeps what is freed, beyond that it does not.

    Nobody else holds a `bytearray` when its reference count says so: it has no weak references, the garbage collector
    does not know it, and an array or a view over it holds a reference. `bytes` are not kept: they must never change.
    """

    __slots__ = ("_held", "_most", "age")

    def __init__(self, most: int = KEPT_BYTES) -> None:
        """Keep at most so many bytes."""
        self._held: list[bytearray] = []
        self._most = most if _COUNTS else 0
        self.age = 0

    def __bool__(self) -> bool:
        return bool(self._held)

    @property
    def sizes(self) -> list[int]:
        """How many bytes each piece has, the oldest first."""
        return [len(held) for held in self._held]

    def take(self, size: int) -> bytearray | None:
        """Return memory of just this size, with anything in it, if there is any."""
        held = self._held
        for index in range(len(held)):
            if len(held[index]) == size and _references(held, index) == _FREE:
                return held.pop(index)
        return None

    def note(self, memory: bytearray) -> None:
        """Keep memory that is being handed out, in place of what was handed out before where it becomes too much."""
        size = len(memory)
        if not KEPT_FROM <= size <= self._most:
            return
        self.age = 0
        held = self._held
        total = size + sum(self.sizes)
        while held and (total > self._most or len(held) >= KEPT_COUNT):
            total -= len(held.pop(0))
        held.append(memory)

    def grow_older(self) -> None:
        """Count a job; give back what so many jobs did not need."""
        self.age += 1
        if self.age > KEPT_JOBS:
            self.clear()

    def keep_nothing(self) -> None:
        """Keep nothing from now on."""
        self._most = 0
        self.clear()

    def clear(self) -> None:
        """Give everything back."""
        self._held.clear()
        self.age = 0


def _references(held: list[bytearray], index: int) -> int:
    return sys.getrefcount(held[index])


_FREE: "Final" = _references([bytearray()], 0)
"""What Python counts for memory that only the list holds: asked here, as it depends on the version."""

_COUNTS: "Final" = sys.implementation.name == "cpython" and "t" not in getattr(sys, "abiflags", "")
"""Whether that proves anything: without the GIL each thread counts for itself."""


class Drawing:
    """The buffers of one message on their way out of the arena."""

    __slots__ = ("_arena", "_at", "_done", "_kept", "_table", "_target", "buffers")

    def __init__(self, arena: Arena, table: "Sequence[int]", kept: Kept) -> None:
        """Take the table of the message. Raise ValueError where the arena has not what it says."""
        end = at = TAKEN
        for number in table:
            end = at + number // 2
            at = behind(at, number // 2)
        arena.check(end)
        self._arena = arena
        self._table = table
        self._kept = kept
        self._at = TAKEN
        self._done = 0
        self._target: BytesIO | bytearray | None = None
        self.buffers: list[bytes | bytearray] = []

    def go_on(self, most: int = AT_ONCE) -> bool:
        """Copy at most so many bytes; True when `buffers` has them all. Raise MemoryError where there is no room."""
        while len(self.buffers) < len(self._table):
            size, read_only = divmod(self._table[len(self.buffers)], 2)
            if size and not most:
                return False
            if self._target is None and size <= most:
                self._finish(self._whole(size, read_only=bool(read_only)), size)
                most -= size
                continue
            most -= self._go_on_with(size, most, read_only=bool(read_only))
        return True

    def _whole(self, size: int, *, read_only: bool) -> bytes | bytearray:
        with self._arena.view(self._at, size) as view:
            if read_only:
                return bytes(view)
            memory = self._kept.take(size)
            if memory is None:
                return bytearray(view)
            with memoryview(memory) as space:
                space[:] = view
            return memory

    def _go_on_with(self, size: int, most: int, *, read_only: bool) -> int:
        """Copy the next slice of a large buffer; return how many bytes that was."""
        target = self._target
        if target is None:
            # Neither of them touches its memory before the slices come: that would be a copy's time, at once.
            target = self._target = BytesIO(bytes(size)) if read_only else self._kept.take(size) or bytearray()
        done = self._done
        count = min(most, size - done)
        with self._arena.view(self._at + done, count) as view:
            if isinstance(target, bytearray) and len(target) == done:
                target += view
            else:
                # A view that was kept would keep its owner from being resized, or handed out.
                with target.getbuffer() if isinstance(target, BytesIO) else memoryview(target) as space:
                    space[done : done + count] = view
        self._done += count
        if self._done == size:
            # The bytes inside a BytesIO come out as they are, not as a copy.
            self._finish(target.getvalue() if isinstance(target, BytesIO) else target, size)
        return count

    def _finish(self, buffer: bytes | bytearray, size: int) -> None:
        if isinstance(buffer, bytearray):
            self._kept.note(buffer)
        self.buffers.append(buffer)
        self._at = behind(self._at, size)
        self._done = 0
        self._target = None


def behind(at: int, size: int) -> int:
    """Return where the next buffer begins after one of this size."""
    return (at + size + ALIGNED - 1) // ALIGNED * ALIGNED
