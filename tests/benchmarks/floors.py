"""The least that something large can cost between two processes: no pool, no frames, no pickle.

Opened like the pools of functions (`function_pools`), and as there a call returns what it was given. The function is
not called: the other process only copies.
"""

import contextlib
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.benchmarks.function_pools import Blocking, Candidate

MIRROR = """
import mmap, os, sys
fd, asked, answered, size, fresh = map(int, sys.argv[1:])
shared = memoryview(mmap.mmap(fd, size))
private = memoryview(bytearray(size))
while os.read(asked, 1):
    if fresh:
        private = memoryview(bytes(shared))
    else:
        private[:] = shared
    shared[:] = private
    os.write(answered, b"x")
"""
ECHO = """
import socket, sys
fd, size = map(int, sys.argv[1:])
with socket.socket(fileno=fd) as link:
    view = memoryview(bytearray(size))
    while count := link.recv_into(view):
        while count < size:
            count += link.recv_into(view[count:])
        link.sendall(view)
"""


def run(program: str, *numbers: int, fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", program, *map(str, map(int, numbers))], pass_fds=fds)


def refuse(*args: object) -> object:
    raise AssertionError("a floor has one call at a time")


@contextmanager
def open_when_called(
    start: Callable[[contextlib.ExitStack, int], Callable[[memoryview], memoryview]],
) -> Iterator[Blocking]:
    """Start the other process at the first call, whose size is that of all calls."""
    with contextlib.ExitStack() as stack:
        carry: Callable[[memoryview], memoryview] | None = None

        def call(fn: object, value: object) -> memoryview:
            nonlocal carry
            view = memoryview(value).cast("B")  # type: ignore[arg-type]
            if carry is None:
                carry = start(stack, len(view))
            return carry(view)

        yield Blocking(call, None, refuse, refuse)  # type: ignore[arg-type]


def start_mirror(stack: contextlib.ExitStack, size: int, *, fresh: bool) -> Callable[[memoryview], memoryview]:
    fd = os.memfd_create("bench")
    os.truncate(fd, size)
    mapped = mmap.mmap(fd, size)
    shared, private = memoryview(mapped), memoryview(bytearray(size))
    (asked, ask), (answer, answered) = os.pipe(), os.pipe()
    process = run(MIRROR, fd, asked, answered, size, fresh, fds=(fd, asked, answered))
    stack.callback(process.wait)
    for end in (fd, asked, answered):
        os.close(end)
    for end in (ask, answer):
        stack.callback(os.close, end)

    def carry(view: memoryview) -> memoryview:
        shared[:] = view
        os.write(ask, b"x")
        os.read(answer, 1)
        if fresh:
            return memoryview(bytes(shared))
        private[:] = shared
        return private

    return carry


def start_echo(stack: contextlib.ExitStack, size: int) -> Callable[[memoryview], memoryview]:
    ours, theirs = socket.socketpair()
    process = run(ECHO, theirs.fileno(), size, fds=(theirs.fileno(),))
    stack.callback(process.wait)
    theirs.close()
    stack.callback(ours.close)
    private = memoryview(bytearray(size))

    def carry(view: memoryview) -> memoryview:
        ours.sendall(view)
        count = 0
        while count < size:
            count += ours.recv_into(private[count:])
        return private

    return carry


def floor(
    name: str, start: Callable[[contextlib.ExitStack, int], Callable[[memoryview], memoryview]], one: str
) -> Candidate:
    return Candidate(
        name, "mmap", start="-", one=one, many="-", open_blocking=lambda workers: open_when_called(start)
    )  # fmt: skip


BARE_COPY = floor(
    "bare copy through mapped memory",
    lambda stack, size: start_mirror(stack, size, fresh=False),
    "four copies: into a mapping of both processes, out into memory that is kept, and back; a byte in a pipe tells",
)
FRESH_COPY = floor(
    "bare copy, out into fresh memory",
    lambda stack, size: start_mirror(stack, size, fresh=True),
    "the same, each time out into memory newly allocated, as every result of a pool is",
)
BARE_ECHO = floor("bare echo over a socketpair", start_echo, "`sendall`, `recv_into` memory that is kept, at both ends")
FLOORS = (BARE_COPY, FRESH_COPY, BARE_ECHO)
