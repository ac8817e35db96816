"""Memory that a pool shares with one Python child: where the child keeps account of a chunk while it runs it.

A chunk is many calls in one message. A worker that dies in the middle of one must cost the call it was in and no other:
the results before it are there, and what comes after it can be proved not to have begun. So the child writes here, for
the chunk under way:

    id     u32   of the chunk; what is here is of no other
    first  u32   the item whose result comes first below; those before it have gone over the relay
    asleep u32   no part of that account: see `ASLEEP`
    begun        a u32 for each item: 0, or where the results before it end and 1 more, written when the item begins
    results      one after the other

A result is pickled alone, without the byte that ends a pickle, so that any number of them in a row are one pickle of a
list (`as_list`). What has a type in `PLAIN` is there as itself. Every `bytes` is the pickle of some other result,
and every `bytearray` a pickle of what an item raised: the traceback, and the exception itself or `b""`.

A process's own stores are seen in their order by whoever looks after its death, so an item that has begun says that the
results of all before it are whole. Nothing here is read while the child runs a chunk: the message that ends the chunk
says how many bytes of results there are, and they are copied before another job can begin.

Both sides use this module, so it imports C modules only.
"""

import mmap
import os
from struct import Struct
from sys import byteorder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


SIZE: "Final" = 256 * 1024
"""Bytes of it all: a page of it takes memory when it is first written to, and most chunks need few."""

RESULTS: "Final" = 16 * 1024
"""Where the results begin."""

FIRST: "Final" = 1
"""The word with the item whose result comes first."""

ASLEEP: "Final" = 2
"""The word in which a child that is about to wait says so, by the id of the last job that it read from its relay. 0: it
is awake. Who writes a packet for it looks here, and wakes it by a message if need be."""

BEGUN: "Final" = 3
"""The word of the first item."""

MOST_ITEMS: "Final" = RESULTS // 4 - BEGUN
"""As many items may a chunk have."""

LAST_PLACE: "Final" = SIZE - 16
"""The last place for a result: from there on one that is packed (`SMALL_INT`, `FLOAT`) might have no room."""

BUDGET: "Final" = 0.005
"""Seconds after which a child begins no further item of a chunk, and gives back the rest: nobody waits for much longer
for a result that is there, whatever the items take that were thought to be as quick as the ones before."""

PLAIN: "Final" = frozenset((int, float, bool, str, type(None)))
"""Types whose values can always be pickled, refer to nothing else, and of which nobody sees whether they are shared."""

_ASLEEP: "Final" = slice(4 * ASLEEP, 4 * ASLEEP + 4)

SMALL_INT = Struct("<ci")
"""How an int of 32 bits is pickled: b"J" and the number. Three times as fast as `pickle.dumps`."""

SMALL: "Final" = 1 << 31
"""Where ints are no longer small, above; below, the last small one is minus this."""

FLOAT = Struct(">cd")
"""How a float is pickled: b"G" and the number."""

DONE_HEAD = Struct("<IIQ")
"""How the message that ends a chunk begins: how many items were run, how many bytes of results are in the region, and
how many nanoseconds it took. What follows are results that could not be left there."""


class Region:
    """The pool's end. `fd` is for the child to inherit; `release_fd` when it has."""

    def __init__(self) -> None:
        """Make one. Raise OSError where the system has no memory or no place for it."""
        self.fd = _anonymous_file()
        try:
            self._memory = mmap.mmap(self.fd, SIZE)
        except BaseException:
            self.release_fd()
            raise

    def __repr__(self) -> str:
        return f"<Region: {'closed' if self._memory.closed else f'{SIZE} bytes'}>"

    def release_fd(self) -> None:
        """Close the descriptor, which the mapping does not need."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def close(self) -> None:
        """Let go of it all. Twice is harmless."""
        self.release_fd()
        self._memory.close()

    def asleep(self, latest: int) -> bool:
        """Whether the child waits for a message, having read all on its relay up to this job."""
        return self._memory[_ASLEEP] == latest.to_bytes(4, byteorder)

    def results(self, size: int) -> bytes:
        """Copy the results of a chunk that has ended."""
        return self._memory[RESULTS : RESULTS + size]

    def remains(self, id_: int) -> "tuple[int, int, bytes]":
        """After the child's death: how many items of this chunk had begun, which result is first, and the results.

        The results are those of all items that begun but for the last of them, which was hit.
        """
        with memoryview(self._memory) as whole, whole[:RESULTS].cast("I") as words:
            if words[0] != id_:
                return 0, 0, b""
            begun, above = 0, MOST_ITEMS
            while begun < above:
                middle = (begun + above) // 2
                if words[BEGUN + middle]:
                    begun = middle + 1
                else:
                    above = middle
            first = words[FIRST]
            # That of the first itself may still count from an earlier first.
            end = words[BEGUN + begun - 1] - 1 if begun - 1 > first else 0
        return begun, first, self.results(end)


def as_list(results: bytes) -> bytes:
    """Turn results in a row into the pickle of one list."""
    return b"\x80\x05(%bl." % results  # protocol 5, a mark, the values, all from the mark on, the end


def _anonymous_file() -> int:
    """Make a file without a name, as large as a region."""
    in_memory = hasattr(os, "memfd_create")
    if in_memory:
        fd = os.memfd_create("trio_workers region")
    else:
        import tempfile

        fd, path = tempfile.mkstemp(prefix="trio_workers-")
        os.unlink(path)
    try:
        os.ftruncate(fd, SIZE)
        if not in_memory and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, SIZE)  # a disk that is full must say so here, and not by a signal to the child
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_in_child(fd: int) -> "tuple[memoryview, memoryview]":
    """In the child: map the region, or memory of its own where the pool has none (-1); return it and its words."""
    memory = memoryview(mmap.mmap(fd, SIZE))
    if fd >= 0:
        os.close(fd)
    return memory, memory[:RESULTS].cast("I")
