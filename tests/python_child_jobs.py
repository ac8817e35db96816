"""Jobs that look at the child they run in, and how a test runs a program that opens a pool of its own.

Workers import this module, so it needs the core of the standard library only; a job imports itself what it needs more.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# what is printed


def print_to_stdout(text: str) -> None:
    print(text)


def print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def write_to_descriptor_1(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write_to_descriptor_2(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def write_to_buffer(text: str) -> None:
    """Write past the text layer, and don't flush."""
    sys.stdout.buffer.write(f"{text}\n".encode())


def write_from_c(text: str) -> None:
    """Print as a library in C does: into the buffer of its own stdout, without a flush."""
    import ctypes

    ctypes.CDLL(None).printf(b"%s\n", text.encode())


def write_from_subprocess(text: str) -> None:
    import subprocess

    subprocess.run(["echo", text], check=True)


def write_from_subprocess_to_stderr(text: str) -> None:
    import subprocess

    subprocess.run(["sh", "-c", 'echo "$1" >&2', "sh", text], check=True)


def write_from_shell(text: str) -> None:
    assert os.system(f"echo '{text}'") == 0


def write_from_thread(text: str) -> None:
    import threading

    thread = threading.Thread(target=print, args=(text,))
    thread.start()
    thread.join()


def write_from_fork(text: str) -> None:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    else:
        print(text)


WRITERS: Final = (
    print_to_stdout,
    print_to_stderr,
    write_to_descriptor_1,
    write_to_descriptor_2,
    write_to_buffer,
    write_from_c,
    write_from_subprocess,
    write_from_subprocess_to_stderr,
    write_from_shell,
    write_from_thread,
    write_from_fork,
)


def print_in_pieces(*pieces: str) -> None:
    for piece in pieces:
        print(piece, end="")


# descriptors


def read_stdin() -> tuple[str, bytes, str]:
    return sys.stdin.read(), os.read(0, 1), os.readlink("/proc/self/fd/0")


def ask() -> str:
    return input("a prompt ")


def stdin_of_subprocess() -> bytes:
    import subprocess

    return subprocess.run(["cat"], check=True, stdout=subprocess.PIPE).stdout


def close_descriptors(*numbers: int) -> int:
    for number in numbers:
        os.close(number)
    return os.getpid()


def close_streams() -> int:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
    return os.getpid()


def lose_streams() -> int:
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    return os.getpid()


def close_all_from(first: int) -> int:
    """Close what a program closes that makes itself a daemon."""
    os.closerange(first, 4096)
    return os.getpid()


def open_file(path: str) -> int:
    with open(path, "w") as file:
        return file.fileno()


def close_and_open_file(number: int, path: str) -> int:
    os.close(number)
    return open_file(path)


def standard_descriptors() -> list[str]:
    return [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]


_LIST_DESCRIPTORS: Final = """
import os
for name in os.listdir("/proc/self/fd"):
    try:
        print(name, os.readlink(f"/proc/self/fd/{name}"))
    except OSError:
        pass
"""


def descriptors_of_program() -> dict[int, str]:
    """Return the descriptors of a program that was started without closing any, and what they lead to."""
    read, write = os.pipe()
    with open(read) as file:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _LIST_DESCRIPTORS],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
        )
        os.close(write)
        lines = file.read().splitlines()
    os.waitpid(pid, 0)
    return {int(name): link for name, _, link in (line.partition(" ") for line in lines)}


# forks


def fork_and_return() -> str:
    pid = os.fork()
    if not pid:
        return "the fork's answer"
    return f"it ended with {_status_of(pid)}"


def fork_and_raise(error: BaseException) -> str:
    pid = os.fork()
    if not pid:
        raise error
    return f"it ended with {_status_of(pid)}"


def fork_and_return_what_has_no_pickle() -> object:
    pid = os.fork()
    if not pid:
        return lambda: None
    return f"it ended with {_status_of(pid)}"


class ForksWhenPickled:
    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        pid = os.fork()
        return str, (f"it ended with {_status_of(pid)}" if pid else "the fork's answer",)


def return_what_forks_when_pickled() -> object:
    return ForksWhenPickled()


class ForksWhenUnpickled:
    """An argument that forks on arrival."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return fork_and_return, ()


def echo(value: Any) -> Any:
    return value


def fork_in_stream(what: str) -> Iterator[str]:
    """Yield, and fork in between; the fork goes on, ends, or fails."""
    yield "first"
    pid = os.fork()
    if not pid:
        if what == "raises":
            raise ValueError("raised in the fork")
        if what == "ends":
            return
        yield "the fork's second"
        yield "the fork's third"
        return
    yield f"it ended with {_status_of(pid)}"
    yield "last"


def fork_when_closed() -> Iterator[int]:
    number = 0
    try:
        while True:
            yield number
            number += 1
    finally:
        pid = os.fork()
        if pid:
            _status_of(pid)


def leave_forks(count: int) -> str:
    """Leave forks that come out of the job after the job has answered, and during the next ones."""
    for _ in range(count):
        if not os.fork():
            time.sleep(0.005)
            return "the fork's answer"
    return "the worker's answer"


def fork_when_asked_to_begin() -> None:
    """An initializer that comes back twice."""
    pid = os.fork()
    if pid:
        _status_of(pid)


def start_sleeper() -> int:
    """Leave a program running; return its pid."""
    return os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)


def reap_all() -> list[int]:
    """Wait for all that was forked before; return how they ended."""
    found: list[int] = []
    while True:
        try:
            found.append(os.waitstatus_to_exitcode(os.wait()[1]))
        except ChildProcessError:
            return found


def _status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# other processes, and threads


def square(number: int) -> int:
    return number * number


def put_square(queue: Any, number: int) -> None:
    queue.put((square(number), os.getpid()))


def square_in_process(method: str, number: int) -> tuple[int, bool, int | None]:
    """Return the result of another process, whether it was another one, and how it ended."""
    import multiprocessing

    context: Any = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=put_square, args=(queue, number))
    process.start()
    result, pid = queue.get()
    process.join()
    return result, pid not in (os.getpid(), os.getppid()), process.exitcode


def squares_in_pool(method: str, count: int) -> list[int]:
    import multiprocessing

    with multiprocessing.get_context(method).Pool(1) as pool:
        results = pool.map(square, range(count))
        pool.close()
        pool.join()
    return results


def squares_in_executor(count: int) -> list[int]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(square, range(count)))


def squares_in_threads(count: int) -> list[int]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(square, range(count)))


def output_of_subprocess(text: str) -> str:
    import subprocess

    program = "import sys; print(sys.stdin.read().upper(), end='')"
    return subprocess.run(
        [sys.executable, "-c", program], input=text, capture_output=True, text=True, check=True
    ).stdout


class _Nameless:
    """What says by a name alone where it is, as objects of C extensions may: pickle looks for it in every module."""

    __module__ = None  # type: ignore[assignment]

    def __reduce__(self) -> str:
        return "NAMELESS"


NAMELESS: Final = _Nameless()


def return_what_has_no_module() -> object:
    return NAMELESS


def use_multiprocessing() -> None:
    """Import what takes `__main__` for `__mp_main__`."""
    import multiprocessing

    multiprocessing.get_context("spawn")


# the interpreter


def describe_interpreter() -> dict[str, Any]:
    """Say what an interpreter was told when it started, in what json can hold."""
    import warnings

    try:
        assert not sys.path
        asserts = False
    except AssertionError:
        asserts = True
    return {
        "flags": str(sys.flags),
        "filters": [str(one) for one in warnings.filters],
        "options": dict(sys._xoptions),
        "asserts": asserts,
        "docstrings": describe_interpreter.__doc__ is not None,
        "prefixes": [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.executable],
        "pycache": sys.pycache_prefix,
        "encoding": sys.getfilesystemencoding(),
    }


def look_at(expression: str) -> Any:
    """Evaluate an expression in the worker."""
    return eval(expression, {"os": os, "sys": sys})


def file_of_module(name: str) -> str | None:
    """Import a module and say where it was found."""
    import importlib

    return getattr(importlib.import_module(name), "__file__", None)


def die(status: int) -> NoReturn:
    os._exit(status)


# programs

LONGEST_RUN: Final = 45.0
"""Seconds a program may take, on a loaded machine: less than a test, so that what it has started is ended, too."""


class Finished(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def run_program(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    input: str = "",
) -> Finished:
    """Run a program to its end, in a session of its own, and fail where a process of that is left."""
    import subprocess

    # What a machine tells every interpreter is not for these.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**inherited, "PYTHONPATH": ROOT, **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            stdout, stderr = program.communicate(input, timeout=LONGEST_RUN)
        except BaseException:
            program.kill()
            raise
        finally:
            left = end_session(program.pid)
    assert not left, f"left by a program: {left}\n{stderr}"
    return Finished(program.returncode, stdout, stderr)


def end_session(session: int) -> dict[int, str]:
    """Return the processes of a session that don't end, and kill them. What was killed may still be about to end."""
    deadline = time.monotonic() + 10
    while (left := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def _members(session: int) -> dict[int, str]:
    """Return the processes of a session, zombies apart, which are for others to reap."""
    found: dict[int, str] = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            state, _, _, its_session = stat.rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found[int(directory.name)] = (directory / "cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue  # it has ended meanwhile
    return found
