"""Functions that the tests of Python pools run as jobs.

Workers import this module, so it needs the core of the standard library only. What a single job needs, it imports
itself.
"""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import threading
import time

TYPE_CHECKING = False  # not even typing: it takes a worker as long as all else here
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType
    from typing import Any, NoReturn

FOREVER = 1000.0

kept: dict[str, object] = {}
"""What jobs leave behind in the process."""

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="fresh")


def note(path: str | Path, text: object) -> None:
    """Add a line to a file, in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.002)


# results and errors


def echo(value: Any) -> Any:
    return value


def add(*numbers: int, plus: int = 0) -> int:
    return sum(numbers) + plus


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def fail_on(number: int, *bad: int) -> int:
    if number in bad:
        raise ValueError(f"bad {number}")
    return number


def square(number: int) -> int:
    return number * number


def note_pid(path: str) -> None:
    note(path, os.getpid())


def give_pid(_: object = None) -> int:
    return os.getpid()


def stay(started: str, go: str) -> int:
    """Note the pid, wait until somebody makes the file `go`, and return the pid."""
    note(started, os.getpid())
    wait_until(lambda: os.path.exists(go))
    return os.getpid()


def hang(started: str, *_: object) -> NoReturn:
    note(started, os.getpid())
    while True:
        time.sleep(FOREVER)


def stay_or_echo(item: tuple[Any, Any]) -> object:
    started, go = item
    return stay(started, go) if isinstance(started, str) else item


def meet(path: str, number: int) -> int:
    """Return when as many processes have come here at once."""
    note(path, os.getpid())

    def count() -> int:
        with open(path, encoding="utf-8") as file:
            return len(file.readlines())

    wait_until(lambda: count() == number)
    return os.getpid()


def end_on(number: int, how: str) -> int:
    """Return what is not divisible by 3; else fail, crash or exit."""
    if number % 3:
        return number
    if how == "crash":
        os._exit(5)
    if how == "exit":
        sys.exit(5)
    raise ValueError(f"bad {number}")


def give_lock(number: int) -> object:
    return threading.Lock() if number == 1 else number


def hang_for(number: int, started: str) -> int:
    """Return even numbers at once, and hang for odd ones."""
    if number % 2:
        hang(started)
    return number


def keep(name: str, value: object) -> int:
    kept[name] = value
    return os.getpid()


def recall(name: str) -> object:
    return kept.get(name)


async def asynchronous() -> None: ...


class Adder:
    """An object that can be called, and pickled."""

    def __call__(self, value: int) -> int:
        return value + 1

    def method(self, value: int) -> int:
        return value + 2


# what a job sees


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def set_variable(value: str) -> str:
    """Set the context variable, and return what it was."""
    before = variable.get()
    variable.set(value)
    return before


def set_variable_and_stream(value: str) -> Iterator[str]:
    """Set the context variable, and yield what it is before, after, and one part later."""
    yield variable.get()
    variable.set(value)
    yield variable.get()
    yield variable.get()


# initializers


def initialize(path: str, *values: object) -> None:
    kept["initialized"] = values
    note(path, os.getpid())


def initialize_slowly(path: str) -> None:
    """Note the pid, and wait as long as there is a file with the suffix ".wait"."""
    note(path, os.getpid())
    wait_until(lambda: not os.path.exists(f"{path}.wait"))


def initialize_context(value: str) -> None:
    variable.set(value)


def initialize_loudly(text: str) -> None:
    print(f"{text} out")
    print(f"{text} unfinished", end="")
    print(f"{text} err", file=sys.stderr)


def initialize_and_fail(text: str) -> None:
    print(f"before {text}", file=sys.stderr)
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise ValueError(text) from error


def initialize_but_once(path: str) -> None:
    """Succeed the first time, and fail as long as there is a file with the suffix ".fail"."""
    if os.path.exists(f"{path}.fail"):
        note(path, "failed")
        raise RuntimeError("not again")
    note(path, "succeeded")


class Unsendable(Exception):
    """An exception that comes back from pickle as an error."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def initialize_and_raise_unsendable() -> None:
    raise Unsendable("first", "second")


# streams


def count(number: int) -> Iterator[int]:
    yield from range(number)


def count_and_fail(number: int) -> Iterator[int]:
    yield from range(number)
    raise ValueError(f"after {number}")


def count_and_crash(number: int, status: int, go: str) -> Iterator[int]:
    """Yield so many, wait until somebody makes the file `go`, and exit."""
    yield from range(number)
    wait_until(lambda: os.path.exists(go))
    os._exit(status)


def count_and_stay(number: int, started: str, go: str) -> Iterator[int]:
    yield from range(number)
    yield stay(started, go)


def count_and_hang(number: int, started: str) -> Iterator[int]:
    yield from range(number)
    hang(started)


def give_list(number: int) -> list[int]:
    return list(range(number))


def give_iterator(number: int) -> Iterator[int]:
    return iter(range(number))


def flood(path: str, size: int) -> Iterator[bytes]:
    """Yield parts of this size without end, with a byte to a file for each; note in another how it ends."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    part = os.urandom(size)
    try:
        while True:
            os.write(fd, b".")
            yield part
    except GeneratorExit:
        note(f"{path}.end", "closed")
        raise
    finally:
        os.close(fd)


def part_without_pickle(number: int) -> Iterator[object]:
    yield from range(number)
    yield threading.Lock()


def hang_on_close(path: str) -> Iterator[int]:
    try:
        yield 1
        yield 2
    finally:
        note(path, "closing")
        time.sleep(FOREVER)


def go_on_after_close(path: str) -> Iterator[int]:
    number = 0
    while True:
        try:
            yield number
        except GeneratorExit:
            note(path, "asked to close")
        number += 1


def fail_on_close() -> Iterator[int]:
    try:
        yield 1
        yield 2
    finally:
        raise ValueError("while it closed")


# ends


def say_and_exit(text: str, status: int) -> NoReturn:
    print(text, file=sys.stderr)
    os._exit(status)


def flood_and_exit(lines: int) -> NoReturn:
    for number in range(lines):
        print(f"line {number}")
    os._exit(9)


def segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def segfault_in_a_thread() -> None:
    thread = threading.Thread(target=segfault)
    thread.start()
    thread.join()


def segfault_without_stderr() -> None:
    os.close(2)
    os.close(1)
    segfault()


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(FOREVER)


def close_relay() -> None:
    """Close whatever socket there is, and go on."""
    for fd in relays():
        os.close(fd)
    time.sleep(FOREVER)


def relays() -> list[int]:
    """The relay's descriptor: the only socket of the process that is a stream."""
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:") and is_stream(int(name)):
            found.append(int(name))
    return found


def is_stream(fd: int) -> bool:
    import socket

    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.type == socket.SOCK_STREAM


def write_to_relay(data: bytes) -> str:
    (fd,) = relays()
    os.write(fd, data)
    return "and the true answer"


def write_to_relay_and_exit(data: bytes) -> NoReturn:
    write_to_relay(data)
    os._exit(7)


def write_to_relay_later(data: bytes, go: str, done: str) -> None:
    """Leave a thread behind that writes to the relay when it is told to."""

    def write() -> None:
        wait_until(lambda: os.path.exists(go))
        write_to_relay(data)
        note(done, "written")

    threading.Thread(target=write, daemon=True).start()


def forge_answer(value: object, go: str | None = None) -> str:
    """Answer this job, as the child would do; wait if told to; and then let the child answer as well."""
    import pickle

    frame: FrameType | None = sys._getframe()
    while frame is not None and "id_" not in frame.f_locals:
        frame = frame.f_back
    assert frame is not None
    from trio_workers._calls import RESULT, encode

    for piece in encode(RESULT, frame.f_locals["id_"], pickle.dumps(value, 5)):
        write_to_relay(bytes(piece))
    if go is not None:
        wait_until(lambda: os.path.exists(go))
    return "true"


# jobs that hold out, and what they leave behind


def spin_in_c(started: str) -> int:
    """Compute something that takes for ever, in C and with the interpreter's lock held."""
    note(started, os.getpid())
    return 7 ** int("1000000000")


def spin_in_c_with_child(started: str, children: str) -> int:
    start_child(children)
    return spin_in_c(started)


def pause_in_c(started: str) -> None:
    import ctypes

    note(started, os.getpid())
    ctypes.PyDLL(None).pause()


def match_for_ever(started: str) -> None:
    import re

    note(started, os.getpid())
    re.match("(a+)+b", "a" * 100)


def sum_for_ever(started: str) -> int:
    note(started, os.getpid())
    return sum(range(1 << 60))


def deaf(started: str) -> NoReturn:
    import signal

    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    hang(started)


def start_child(path: str) -> int:
    """Start a program that sleeps, note its pid, and leave it behind."""
    import subprocess

    child = subprocess.Popen(["sleep", "1000"])
    child.returncode = 0  # no warning that it still runs
    note(path, child.pid)
    return child.pid


def stay_with_child(started: str, go: str, children: str) -> int:
    """Like `stay`, with a program that runs meanwhile; return its status, minus the signal's number."""
    import subprocess

    with subprocess.Popen(["sleep", "1000"]) as child:
        note(children, child.pid)
        stay(started, go)
        status = child.poll()
        child.kill()
    return 0 if status is None else status


def hang_with_child(started: str, children: str) -> NoReturn:
    start_child(children)
    hang(started)


def leave_thread(started: str) -> None:
    """Leave a thread behind that runs for ever and is no daemon."""
    threading.Thread(target=hang, args=(started,)).start()
    wait_until(lambda: os.path.exists(started))


def leave_daemon_thread(started: str) -> None:
    threading.Thread(target=hang, args=(started,), daemon=True).start()
    wait_until(lambda: os.path.exists(started))


def leave_executor_thread(started: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    kept["executor"] = executor = ThreadPoolExecutor(1)
    executor.submit(hang, started)
    wait_until(lambda: os.path.exists(started))


def at_exit(function: Callable[..., object], *args: object) -> None:
    import atexit

    atexit.register(function, *args)


def print_unfinished(text: str) -> None:
    """Print a line that has no end, to a stream that then waits for it."""
    sys.stdout.write(text)


def keep_open(path: str, text: str) -> None:
    """Write to a file that is neither closed nor flushed: the interpreter does that in the end."""
    kept["file"] = file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    at_exit(file.close)
    file.write(text)


def child_hears_interrupt() -> int:
    """Start a program, interrupt it, and return its status."""
    import signal
    import subprocess

    with subprocess.Popen(["sleep", "1000"]) as child:
        child.send_signal(signal.SIGINT)
        return child.wait()


# large things


def size_of(value: bytes | str) -> int:
    return len(value)


def give_text(size: int, started: str, go: str) -> str:
    """Return what is no buffer, and takes the socket whatever its size."""
    stay(started, go)
    return "x" * size


def give_buffer(size: int) -> list[Any]:
    """Return a writable buffer, in a list."""
    import pickle

    return [pickle.PickleBuffer(bytearray(size))]


def tie(values: list[Any]) -> int:
    """Make garbage that only the collector can find, have it found, and return our pid."""
    import gc

    values.append(values)
    del values
    gc.collect()
    return os.getpid()


# pools in jobs


def nested(values: list[int]) -> list[int]:
    """Run a pool inside a job, in a run of trio of its own."""
    import trio

    from trio_workers import open_python_pool

    async def main() -> list[int]:
        async with open_python_pool(2) as pool, pool.map(square, values) as results:
            return [result async for result in results]

    return trio.run(main)


def nested_crash(status: int) -> NoReturn:
    """Let a crash in a pool of our own be our own error."""
    import trio

    from trio_workers import open_python_pool

    async def main() -> None:
        async with open_python_pool(1) as pool:
            await pool.run_sync(say_and_exit, "inner words", status)

    trio.run(main)
    raise AssertionError


def nested_pids(started: str, depth: int) -> NoReturn:
    """Note our pid, open a pool and do the same there, to this depth."""
    note(started, os.getpid())
    if not depth:
        hang(f"{started}.deepest")
    import trio

    from trio_workers import open_python_pool

    async def main() -> None:
        async with open_python_pool(1) as pool:
            await pool.run_sync(nested_pids, started, depth - 1)

    trio.run(main)
    raise AssertionError


partial_add = functools.partial(add, 1, plus=2)


# items of a chunk


def end_at(number: int, path: str, ends: dict[int, str]) -> object:
    """Note each number as it begins, and return it; end the process, or raise, where that is said of the number."""
    if path:
        note(path, number)
    how = ends.get(number)
    if how is None:
        return number
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "segfault":
        segfault()
    if how == "fork":
        return os.fork()
    if how == "lock":
        return threading.Lock()
    if how == "relay":
        write_to_relay(b"this is no message of ours")
    raise ValueError(f"bad {number}")


def numbered_text(number: int, size: int) -> str:
    """A result of that size, that can be told from others."""
    return f"{number:08}" + "x" * (size - 8)


def give_text_or_exit(number: int, size: int, at: int, started: str = "") -> str:
    """The same, but for one that ends the process, or never ends."""
    if number == at:
        if started:
            hang(started)
        os._exit(7)
    return numbered_text(number, size)


def dawdle_then_hang(number: int, at: int, started: str) -> int:
    """The first takes longer than a chunk may, and another never ends."""
    if number == 0:
        time.sleep(0.02)
    if number == at:
        hang(started)
    return number


def give_value(number: int) -> object:
    """Results of many types."""
    big = 1 << 31
    values = (
        number, -number, float(number), None, True, False, "", "text", "\ud800", b"", b"bytes", bytearray(b"array"),
        (number,), [], {number: "x"}, 1 << 80, 2.5 + 1j, big - 1, big, -big, -big - 1, float("inf"), b"x" * 100_000,
        bytearray(b"y" * 300_000), "z" * 300_000, print, ValueError("a value"),
    )  # fmt: skip
    return values[number % len(values)]


def append(values: list[int], number: int) -> list[int]:
    """Change an argument, and return it."""
    values.append(number)
    return values


def set_and_get_variable(number: int) -> str:
    """What a context variable was before it was set."""
    before = variable.get("unset")
    variable.set(str(number))
    return before


def nap(number: int, seconds: float) -> int:
    """Sleep, and say in which process."""
    time.sleep(seconds)
    return os.getpid()


def nap_at(number: int, at: int, seconds: float) -> int:
    """Return the number; one of them takes its time."""
    if number == at:
        time.sleep(seconds)
    return number


def close_standard_streams(number: int, seconds: float) -> list[bool]:
    """Say which of them are open, close them, and take as long as to have them opened again."""
    found = [os.path.exists(f"/proc/self/fd/{fd}") for fd in range(3)]
    os.closerange(0, 3)
    time.sleep(seconds)
    return found
