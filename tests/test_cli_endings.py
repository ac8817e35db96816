"""How a command ends, whatever nurseries make of its error: one line, an exit code, and no traceback."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.support import ROOT
from trio_workers import Config
from trio_workers.cli import _app, _check, _reach
from trio_workers.cli._errors import CommandError, Misuse
from trio_workers.cli._watching import run_trio

if TYPE_CHECKING:
    from _typeshed import TraceFunction

PROGRAM: Final = """
import signal, sys
import rich.console, trio
from trio_workers.cli import _app

signal.signal(signal.SIGINT, signal.default_int_handler)

@_app.app.command
def hang():
    async def tell():
        print("up", flush=True)
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            # By a task, for trio's own nursery is misnested where it is hit while its block is left.
            nursery.start_soon(tell)
    trio.run(main)

@_app.app.command
def pour(lines: int):
    for _ in range(lines):
        print("a line that somebody may read")

@_app.app.command
def pour_by_rich(lines: int):
    console = rich.console.Console()
    for _ in range(lines // 100 + 1):
        console.print("a line that somebody may read")

@_app.app.command
def pour_in_a_nursery(lines: int, by_rich: bool = False):
    async def child():
        (pour_by_rich if by_rich else pour)(lines)
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
    trio.run(main)

sys.exit(_app.run())
"""


def start(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start the program with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
        env={"PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupt_in_a_nursery() -> None:
    """Ctrl-C comes out of a nursery in a group, and is 130 all the same."""
    with start("hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == 130


def run_in_check(main: Callable[[], Awaitable[None]]) -> None:
    """Run it in the place of the checker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_check, "check_worker", lambda config, **rest: main())
        _check._run(Config(command=["true"]), jobs=[], expect=[], failing_job=None, big=0, quiet=True)


@pytest.mark.faults
@pytest.mark.parametrize("run", [partial(run_trio, interrupted=lambda: "interrupted"), _reach.run, run_in_check])
def test_interrupt_anywhere(run: Callable[[Callable[[], Awaitable[None]]], object]) -> None:
    """Ctrl-C before whichever instruction of a command ends it as Ctrl-C does, also where a nursery is left."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    left = 0

    def trace(frame: FrameType, event: str, argument: object) -> "TraceFunction | None":
        if frame.f_code is not main.__code__:
            return None
        frame.f_trace_opcodes = True
        return trace_instruction

    def trace_instruction(frame: FrameType, event: str, argument: object) -> "TraceFunction":
        nonlocal left
        if event == "opcode":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace_instruction

    for instruction in itertools.count():  # before the 0th it does not strike: 3.12 traces from the second call on
        left = instruction
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run(main)
        except BaseException as error:
            assert _app._ending(error) == 130, repr(error)
        else:
            if instruction:
                assert left > 0, f"the interrupt before instruction {instruction} was lost"
                break  # it has fewer
        finally:
            sys.settrace(before)
    assert instruction > 20


@pytest.mark.parametrize("command", ["pour", "pour-by-rich", "pour-in-a-nursery", "pour-in-a-nursery --by-rich"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads(command: str, lines: int) -> None:
    """`| head` ends a command without a word, and so does whoever goes before its only line is written."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = start(*command.split(), str(lines), stdout=writing)
    finally:
        os.close(writing)
    with process:
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.fixture
def fail() -> Iterator[list[BaseException]]:
    """A command `fail` that raises these, each in a task of a nursery of its own."""
    errors: list[BaseException] = []

    async def raise_it(error: BaseException) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_one, error)

    async def raise_one(error: BaseException) -> None:
        raise error

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for error in errors:
                nursery.start_soon(raise_it, error)

    def command() -> None:
        trio.run(main)

    _app.app.command(command, name="fail")
    yield errors
    del _app.app["fail"]


@pytest.mark.parametrize(("error", "code"), [(Misuse("no such file: x"), 2), (CommandError("it did not"), 1)])
def test_error_of_a_command_in_a_nursery(
    error: CommandError, code: int, fail: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """However deep it lies, it is one line and its own exit code."""
    fail.append(error)
    assert _app.run(["fail"]) == code
    assert capsys.readouterr() == ("", f"trio-workers: {error}\n")


def test_a_full_stdout_in_a_nursery(
    fail: list[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a task writes, it is one line."""
    monkeypatch.setattr(_app, "_drop_the_rest", lambda stdout: None)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    fail.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert _app.run(["fail"]) == 1
    assert capsys.readouterr().err == "trio-workers: stdout: No space left on device\n"


def test_a_bug_in_a_nursery(fail: list[BaseException]) -> None:
    """A bug has its traceback, also beside an error of the command."""
    fail += [RuntimeError("a bug"), Misuse("no such file: x")]
    with pytest.RaisesGroup(pytest.RaisesGroup(RuntimeError), pytest.RaisesGroup(Misuse)):
        _app.run(["fail"])


def test_a_broken_pipe_of_another_kind(fail: list[BaseException]) -> None:
    """A pipe that breaks elsewhere is no matter of stdout."""
    fail.append(BrokenPipeError("to a worker"))
    with pytest.RaisesGroup(pytest.RaisesGroup(BrokenPipeError)):
        _app.run(["fail"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check", "--", "true"]])
def test_stdout_that_is_full(arguments: list[str]) -> None:
    """What can't be written is one line and exit code 1, and the interpreter has nothing to add at its end."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trio_workers", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "trio-workers: stdout: No space left on device\n")


def test_stdout_that_is_closed() -> None:
    """Nothing is tried where there is no stdout: exit code 2, and one line."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m trio_workers check -- true >&-', sys.executable],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("trio-workers: stdout is closed")
