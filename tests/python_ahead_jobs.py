"""Functions that the tests of jobs ahead of their turn run in workers of a Python pool."""

from __future__ import annotations

import os
import sys
import threading

from tests.python_pool_jobs import end_at, hang, is_stream, note, wait_until

TYPE_CHECKING = False  # not even typing: it takes a worker as long as all else here
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn


def act(number: int, path: str, how: str = "", go: str = "") -> Any:
    """Note the number, wait for the file `go` where one is named, and return the number, or end as `end_at` does."""
    note(path, number)
    if go:
        wait_until(lambda: os.path.exists(go))
    if how == "hang":
        hang(os.devnull)
    return end_at(number, "", {number: how}) if how else number


class Act:
    """A call that notes the numbers of its items in this file, and returns them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, number: int) -> int:
        note(self.path, number)
        return number


def act_and_say(number: int, path: str, size: int = 0, given: object = b"") -> tuple[int, int, object]:
    """Note the number and the pid, and return the number, a buffer of this size, and what was given."""
    note(path, f"{number} {os.getpid()}")
    return number, os.getpid(), bytearray(size) if size else given


def count(number: int, path: str, parts: int) -> Iterator[tuple[int, int]]:
    note(path, number)
    for part in range(parts):
        yield number, part


def grow(number: int, path: str, size: int, go: str) -> NoReturn:
    """Note the number, take so much memory, and keep it for ever."""
    note(path, number)
    wait_until(lambda: os.path.exists(go))
    ballast = bytearray(b"x") * size
    hang(os.devnull, ballast)


def sockets(*, stream: bool) -> list[int]:
    """The sockets of this process: the relay is a stream, jobs come as packets."""
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:") and is_stream(int(name)) == stream:
            found.append(int(name))
    return found


def close_sockets(number: int, path: str, go: str, *kinds: bool) -> int:
    """Note the number, wait, and close the packets' socket (False), the relay (True), or both."""
    note(path, number)
    wait_until(lambda: os.path.exists(go))
    for kind in kinds:
        for fd in sockets(stream=kind):
            os.close(fd)
    return number


def steal(number: int, path: str, go: str) -> int:
    """Note the number, wait, and read a packet that is for the worker itself; return how many bytes it had."""
    import socket

    note(path, number)
    wait_until(lambda: os.path.exists(go))
    (fd,) = sockets(stream=False)
    with socket.socket(fileno=os.dup(fd)) as sock:
        return len(sock.recv(1 << 16, socket.MSG_DONTWAIT))


def write_packets(number: int, path: str, go: str) -> int:
    """Note the number, wait, and send packets to the pool, which asked for none, until there is no room for more."""
    import socket

    note(path, number)
    wait_until(lambda: os.path.exists(go))
    (fd,) = sockets(stream=False)
    sent = 0
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            while True:
                sock.send(bytes(1000), socket.MSG_DONTWAIT)
                sent += 1
        except BlockingIOError:
            return sent


def fork_and_leave(number: int, path: str, go: str, children: str) -> int:
    """Note the number, wait, and leave a child behind that has all our descriptors and sleeps for ever."""
    import signal

    note(path, number)
    wait_until(lambda: os.path.exists(go))
    if not os.fork():
        signal.alarm(1000)
        note(children, os.getpid())
        while True:
            signal.pause()
    wait_until(lambda: os.path.exists(children) and os.path.getsize(children))
    return number


def fork_and_return(number: int, path: str, go: str) -> int:
    """Note the number, wait, and return twice: in the worker and in a child of it."""
    note(path, number)
    wait_until(lambda: os.path.exists(go))
    os.fork()
    return number


def print_much(number: int, path: str, go: str) -> int:
    note(path, number)
    wait_until(lambda: os.path.exists(go))
    print("x" * 1000, flush=True)
    sys.stderr.write("unfinished")
    return number


def leave_threads(number: int, path: str, go: str) -> int:
    """Note the number, wait, and leave threads behind."""
    note(path, number)
    wait_until(lambda: os.path.exists(go))
    for _ in range(5):
        threading.Thread(target=wait_until, args=(lambda: False,), daemon=True).start()
    return number


def close_standard_streams(number: int, path: str, go: str) -> int:
    note(path, number)
    wait_until(lambda: os.path.exists(go))
    os.closerange(0, 3)
    return number
