"""What runs in the workers of `test_python_arena.py`."""

import ast
import errno
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

kept: list[Any] = []


def echo(value: Any) -> Any:
    return value


def describe(value: Any) -> tuple[str, bool, int, bytes, bytes]:
    """Say what came: its type, whether it is read-only, its size, its first and its last bytes."""
    with memoryview(value) as view, view.cast("B") as flat:
        return type(value).__name__, flat.readonly, flat.nbytes, bytes(flat[:16]), bytes(flat[-16:])


def keep(value: Any) -> int:
    """Keep a value for good."""
    kept.append(value)
    return len(kept)


def keep_view(value: Any) -> int:
    """Keep nothing but a view of a part of it."""
    kept.append(memoryview(value)[1000:2000])
    return len(kept)


def what_is_kept() -> list[tuple[int, int, int]]:
    """Of each value that was kept: the smallest and the largest of its bytes, and how many there are."""
    return [(min(bytes(value)), max(bytes(value)), memoryview(value).nbytes) for value in kept]


def address(value: Any) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(value))


def filled(byte: int, size: int) -> Any:
    """Return a writable buffer, as an array comes."""
    return pickle.PickleBuffer(bytearray(bytes([byte])) * size)


def parts(sizes: list[int]) -> Iterator[Any]:
    for number, size in enumerate(sizes):
        yield [number, pickle.PickleBuffer(bytearray([number % 251]) * size), bytes([number % 251]) * size]


def fail_with(value: Any) -> None:
    raise ValueError("with a buffer", value)


def descriptors() -> list[str]:
    """What this process has open, but for the directory that says so."""
    found: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sorted(found)


def descriptors_of_program(value: Any) -> list[str]:
    """What a program has open that a job starts, of all that may be inherited."""
    program = "from tests import python_arena_jobs as jobs; print(jobs.descriptors())"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, close_fds=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    found: list[str] = ast.literal_eval(done.stdout)
    return found


def close_standard_streams(size: int) -> Any:
    """Leave 0, 1 and 2 closed, and answer with something large."""
    for fd in (0, 1, 2):
        os.close(fd)
    return filled(7, size)


def numbers_of_the_arena() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd") if "memfd:trio_workers (" in _link(name)]


def allocated(value: Any) -> tuple[Any, int]:
    """The value, and how many bytes of memory the arena has while the job runs that was sent it."""
    (size,) = {os.stat(f"/proc/self/fd/{number}").st_blocks * 512 for number in numbers_of_the_arena()}
    return value, size


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return ""


def limit_files(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refuse_to_allocate() -> None:
    """Be a worker on a system without memory for its arena."""

    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = refuse  # type: ignore[assignment]


def refuse_to_map() -> None:
    """Be a worker without addresses for its arena."""
    import mmap

    class Refusing:
        def __init__(self, *_: object) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    mmap.mmap = Refusing  # type: ignore[misc,assignment]


def shrink() -> int:
    """Try to make the arena smaller, as no job should; return the errno."""
    for number in numbers_of_the_arena():
        try:
            os.ftruncate(number, 0)
        except OSError as error:
            return error.errno or 0
    return 0


def lie(size: int) -> None:
    """Answer as the child does, with a message whose buffers are in no arena."""
    from trio_workers._calls import RESULT, encode, placed

    frame: Any = sys._getframe()
    while frame is not None and "id_" not in frame.f_locals:
        frame = frame.f_back
    pieces = encode(RESULT, frame.f_locals["id_"], b"", [memoryview(bytes(100)).cast("B")])
    head = pieces[0]
    # A table that says more than there is.
    grown = bytes(head[:28]) + (2 * size + 1).to_bytes(8, "little") + bytes(head[36:])
    for piece in placed([grown, pieces[1]]):
        if piece:
            frame.f_locals["self"]._connection.sendall(piece)
    threading.Event().wait()


def grow_without_memory(size: int) -> None:
    """Make the arena's file large without any memory in it, and say that an answer lies there."""
    for number in numbers_of_the_arena()[:1]:
        os.ftruncate(number, 4 * size)
    lie(size)


def note_size(path: str, value: Any) -> int:
    """Say that the job has begun."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    return len(value)


def give(size: int, started: str, go: str) -> Any:
    """Answer with something large, once told to."""
    import time

    with open(started, "a") as file:
        file.write(f"{os.getpid()}\n")
    while not os.path.exists(go):
        time.sleep(0.002)
    return filled(9, size)


def kept_sizes() -> list[int]:
    """How much memory the child keeps for what comes next."""
    frame: Any = sys._getframe()
    while frame is not None and "id_" not in frame.f_locals:
        frame = frame.f_back
    sizes: list[int] = frame.f_locals["self"]._kept.sizes
    return sizes
