"""One OS process: how it starts, how it ends, and what becomes of its stderr."""

# ruff: noqa: ASYNC220, ASYNC222, ASYNC230 - tests may block for a moment, and wait for states that no event tells

import contextlib
import errno
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trio_workers import _platform, _process
from trio_workers._platform import ExitWatch, LifeLine, Linux, Platform, Portable
from trio_workers._process import (
    LINES_A_SECOND,
    LONGEST_LINE,
    TAIL_LINES,
    TAIL_SIZE,
    Launch,
    LineSplitter,
    OsProcess,
    StderrLog,
    readable,
    spawn_process,
)

PACKAGE_PARENT = str(Path(_process.__file__).parents[1])

LAUNCH = Launch(
    argv=("true",),
    env={"PATH": os.environ["PATH"], "SECRET": "hunter2"},
    slot=3,
    label="pool[3]",
    protocol="goridge-3",
    max_frame_size=1024,
)


@pytest.fixture(params=[Linux, Portable])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Platform:
    if request.param is Linux and sys.platform != "linux":
        pytest.skip("not on this system")
    here: Platform = request.param()
    monkeypatch.setattr(_platform, "HERE", here)
    return here


def shell(script: str) -> Launch:
    return attrs.evolve(LAUNCH, argv=("sh", "-c", script))


async def spawn(launch: Launch, stdout: int | None = None) -> OsProcess:
    with open(os.devnull, "rb") as nothing:
        return await spawn_process(launch, stdin=nothing.fileno(), stdout=stdout, limiter=trio.CapacityLimiter(1))


@contextlib.asynccontextmanager
async def running(launch: Launch, stdout: int | None = None) -> AsyncIterator[OsProcess]:
    """Run a process with its stderr drained; at the end it is killed and reaped, if the test has not done that."""
    process = await spawn(launch, stdout)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.drain_stderr)
            yield process
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait_exit()
            process.finish()
            process.reap()


async def run(launch: Launch) -> OsProcess:
    """Run a process to its own end."""
    async with running(launch) as process:
        await process.wait_exit()
    return process


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().partition(": ")[2] for record in caplog.records]


class Reports:
    """A pipe on which a worker's script says things, one a line."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        self._file = trio.lowlevel.FdStream(self._read_fd)
        self._data = b""

    async def line(self) -> str:
        while b"\n" not in self._data:
            more = await self._file.receive_some()
            assert more, "the worker ended without a word"
            self._data += more
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    async def pidfds(self, count: int) -> list[int]:
        """Read lines of pids, and open each; these may be no children of ours."""
        return [os.pidfd_open(int(pid)) for _ in range(count) for pid in (await self.line()).split()]

    async def aclose(self) -> None:
        os.close(self.write_fd)
        await self._file.aclose()


@pytest.fixture
async def reports() -> AsyncIterator[Reports]:
    reports = Reports()
    yield reports
    await reports.aclose()


async def all_gone(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)


# how it starts


def test_environment_is_never_shown() -> None:
    """A `repr` may land in a log; the environment holds secrets."""
    assert "hunter2" not in repr(LAUNCH)
    assert "pool[3]" in repr(LAUNCH)


async def test_program_gets_what_was_asked_for(
    platform: Platform, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Arguments, directory, the whole environment and nothing else; its own group; stdout beside stderr; no stdin."""
    launch = attrs.evolve(shell('echo "$0 $1 $SECRET $(env | wc -l) $(pwd)"; cat; ps -o pgid= -p $$'), cwd=tmp_path)
    process = await run(attrs.evolve(launch, argv=(*launch.argv, "a b", b"\xc3\xa9")))
    said = lines(caplog)
    assert said[0] == f"a b é hunter2 {said[0].split()[4]} {tmp_path}"
    assert int(said[0].split()[4]) <= 5  # PATH, SECRET, and what a shell adds: PWD, SHLVL, _
    assert int(said[1]) == process.pid


async def test_no_descriptor_is_inherited_but_the_life_line(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    """Also none that the application made inheritable."""
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)
    script = "import os; print([fd for fd in range(3, 200) if os.path.exists(f'/proc/self/fd/{fd}')])"
    try:
        await run(attrs.evolve(LAUNCH, argv=(sys.executable, "-S", "-c", script)))
    finally:
        os.close(read_fd)
        os.close(write_fd)
    (said,) = lines(caplog)
    assert len(eval(said)) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"argv": ("/no/such/program",)}, FileNotFoundError),
        ({"argv": ("no-such-program-anywhere",)}, FileNotFoundError),
        ({"argv": ("/etc/passwd",)}, PermissionError),
        ({"argv": ("/",)}, PermissionError),
        ({"cwd": "/no/such/directory"}, FileNotFoundError),
        ({"cwd": "/etc/passwd"}, NotADirectoryError),
        ({"argv": ("true", "a\0b")}, ValueError),
        ({"argv": ("true", "x" * 10_000_000)}, OSError),
        ({"env": {"A": "hunter2\0"}}, ValueError),
    ],
)
async def test_what_can_not_start(platform: Platform, change: dict[str, Any], error: type[Exception]) -> None:
    """The system's error comes through, without the environment, and nothing is left."""
    with pytest.raises(error) as caught:
        await spawn(attrs.evolve(LAUNCH, **change))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
async def test_system_refuses_to_fork(platform: Platform, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many processes, or no memory: the error comes through and nothing is left."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError) as caught:
        await spawn(LAUNCH)
    assert caught.value.errno == number


@pytest.mark.faults
async def test_out_of_descriptors(platform: Platform) -> None:
    """Whichever descriptor can't be had, EMFILE comes through and nothing is left; with enough of them it works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[bool] = []
    held: list[int] = []
    with open(os.devnull, "rb") as nothing:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 16, hard))
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(nothing.fileno()))
            for _ in range(12):
                process = None
                try:
                    process = await spawn_process(
                        LAUNCH, stdin=nothing.fileno(), stdout=None, limiter=trio.CapacityLimiter(1)
                    )
                except OSError as error:
                    assert error.errno == errno.EMFILE
                else:
                    await process.wait_exit()
                    process.finish()
                    assert process.reap() == 0
                outcomes.append(process is not None)
                os.close(held.pop())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("which", ["watch_exit", "arm"])
async def test_failure_right_after_the_spawn(platform: Platform, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can't be watched, or tied to the life line, is killed with its group and reaped at once."""
    pids: list[int] = []

    def fail(_: object, pid: int) -> ExitWatch:
        pids.append(pid)
        raise OSError(errno.EMFILE, "injected")

    monkeypatch.setattr(LifeLine if which == "arm" else type(platform), which, fail)
    with pytest.raises(OSError, match="injected"):
        await spawn(shell("sleep 1000 & wait"))
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)


async def test_cancelled_before_it_starts(platform: Platform) -> None:
    """Whoever waits for a turn can be cancelled; nothing was started then."""
    limiter = trio.CapacityLimiter(1)
    limiter.acquire_on_behalf_of_nowait("somebody")
    for delay in (False, True):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(spawn_with, limiter)
                if delay:
                    await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught


async def spawn_with(limiter: trio.CapacityLimiter) -> None:
    with open(os.devnull, "rb") as nothing:
        await spawn_process(LAUNCH, stdin=nothing.fileno(), stdout=None, limiter=limiter)


async def test_not_cancelled_once_begun(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel that comes while the thread spawns changes nothing: the process is handed over."""
    popen = subprocess.Popen
    scope = trio.CancelScope()

    def cancel_first(*args: Any, **kwargs: Any) -> Any:
        trio.from_thread.run_sync(scope.cancel)
        return popen(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", cancel_first)
    with scope:
        process = await spawn(LAUNCH)
    with trio.CancelScope(shield=True):
        await process.wait_exit()
    process.finish()
    assert process.reap() == 0


INTERRUPTED = """
import os, signal, subprocess, trio
from trio_workers._process import Launch, spawn_process

popen = subprocess.Popen

def interrupt_first(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return popen(*args, **kwargs)

subprocess.Popen = interrupt_first

async def main():
    launch = Launch(argv=("true",), env=os.environ, slot=0, label="x", protocol="goridge-3", max_frame_size=1)
    process = await spawn_process(launch, stdin=0, stdout=None, limiter=trio.CapacityLimiter(1))
    os.write(1, b"handed over, ")
    try:
        await process.wait_exit()
        await trio.sleep_forever()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait_exit()
        process.finish()
        os.write(1, b"reaped with %d" % process.reap())

trio.run(main)
"""


def test_interrupted_while_it_starts() -> None:
    """Ctrl-C during a spawn takes effect once the process is handed over."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
    )
    assert done.stdout.startswith(b"handed over, reaped with ")
    assert done.stderr.endswith(b"KeyboardInterrupt\n")


async def test_no_token_of_the_default_limiter(platform: Platform) -> None:
    """It starts and ends however many threads of the application are busy."""
    limiter = trio.to_thread.current_default_thread_limiter()
    borrowed = [object() for _ in range(int(limiter.total_tokens))]
    for borrower in borrowed:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        assert (await run(LAUNCH)).returncode == 0
    finally:
        for borrower in borrowed:
            limiter.release_on_behalf_of(borrower)


# how it ends


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", -signal.SIGKILL), ("kill -TERM $$", -signal.SIGTERM)],
)
async def test_exit_status(platform: Platform, script: str, status: int) -> None:
    """It is exact, there before the reap and the same ever after."""
    process = await spawn(shell(script))
    await process.wait_exit()
    assert process.peek() == status
    process.finish()
    assert process.peek() == status
    assert process.reap() == status
    assert process.reap() == status
    assert process.peek() == status
    assert f"reaped with {status}" in repr(process)
    await process.wait_exit()
    process.kill()
    process.finish()


async def test_status_taken_by_somebody_else(platform: Platform) -> None:
    """An application that waits for all its children leaves us None, and no hang."""
    process = await spawn(shell("exit 3"))
    assert os.waitpid(process.pid, 0)[0] == process.pid
    await process.wait_exit()
    process.finish()
    assert process.peek() is None
    assert process.reap() is None


async def test_reaped_too_early(platform: Platform) -> None:
    """That is a bug of the caller, and said so; nothing is lost by it."""
    async with running(shell("exec sleep 1000")) as process:
        assert process.peek() is None
        with pytest.raises(RuntimeError, match="has not ended"):
            process.reap()
    assert process.returncode == -signal.SIGKILL


async def test_somebody_is_told_of_the_reap(platform: Platform) -> None:
    """A spawner lets go of what it kept for the process, once."""
    process = await spawn(LAUNCH)
    told: list[int] = []
    process.at_reap(lambda: told.append(process.pid))
    await process.wait_exit()
    process.finish()
    assert told == []
    process.reap()
    process.reap()
    assert told == [process.pid]


async def test_kill_takes_the_group(platform: Platform, reports: Reports) -> None:
    """Children, grandchildren, and those that ignore every signal they can; twice is harmless."""
    script = "trap '' HUP INT TERM; sleep 1000 & one=$!; sh -c 'sleep 1000 & echo $$ $!; wait' & echo $one; wait"
    async with running(shell(script), reports.write_fd) as process:
        pidfds = await reports.pidfds(2)
        assert len(pidfds) == 3
        process.kill()
        process.kill()
        await all_gone(pidfds)
        await process.wait_exit()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("platform", [Linux], indirect=True)
async def test_kill_takes_a_leader_that_left_its_group(platform: Platform, reports: Reports) -> None:
    """The process itself is killed too, in whichever group it is."""
    script = (
        "import os, time; os.setpgid(0, os.getpgid(os.getppid())); print(os.getpid(), flush=True); time.sleep(1000)"
    )
    launch = attrs.evolve(LAUNCH, argv=(sys.executable, "-S", "-c", script))
    async with running(launch, reports.write_fd) as process:
        assert int(await reports.line()) == process.pid
        process.kill()
        await process.wait_exit()
    assert process.returncode == -signal.SIGKILL


async def test_group_dies_after_a_clean_exit(platform: Platform, reports: Reports) -> None:
    """A worker that exits leaves nothing behind."""
    async with running(shell("sleep 1000 & echo $!"), reports.write_fd) as process:
        pidfds = await reports.pidfds(1)
        await process.wait_exit()
        process.finish()
        await all_gone(pidfds)
        assert process.reap() == 0


@pytest.mark.faults
@pytest.mark.parametrize("doing", ["exec sleep 1000", "exec cat /dev/zero", "while :; do echo x; done"])
async def test_escaped_grandchild_can_not_make_us_hang(platform: Platform, reports: Reports, doing: str) -> None:
    """One in its own session holds stderr open, silent or writing for ever: EOF is not waited for."""
    async with running(shell(f"setsid sh -c 'echo $$; {doing} >&2' & wait"), reports.write_fd) as process:
        (pidfd,) = await reports.pidfds(1)
        process.kill()
        await process.wait_exit()
        process.finish()
        assert process.reap() == -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):  # with its stderr gone, one that writes ends by itself
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await all_gone([pidfd])


PARENT = """
import os, sys, trio
from trio_workers import _platform
from trio_workers._process import Launch, spawn_process

async def main():
    for slot, argv in enumerate(WORKERS):
        launch = Launch(argv=argv, env=os.environ, slot=slot, label="x", protocol="goridge-3", max_frame_size=1)
        await spawn_process(launch, stdin=0, stdout=1, limiter=trio.CapacityLimiter(1))
    os.write(1, b"\\n")  # an empty line: every life line is armed
    await trio.sleep_forever()

trio.run(main)
"""
SPIN_IN_C = "sum(range(10**12))"
IGNORE_ALL = """
import signal, time
for number in set(range(1, 65)) - {9, 19, 32, 33}:
    signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(1000)
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's life line")
@pytest.mark.parametrize("way", ["SIGKILL", "os._exit"])
async def test_no_orphans(reports: Reports, way: str) -> None:
    """The pool's process dies: idle, spinning (in Python, in C) and deaf workers and their children die with it."""
    programs = ["import time; time.sleep(1000)", "while True: pass", SPIN_IN_C, IGNORE_ALL]
    workers = [
        ("sh", "-c", 'sleep 1000 & echo $! $$; exec "$@"', "sh", sys.executable, "-S", "-c", program)
        for program in programs
    ]
    parent = PARENT.replace("WORKERS", repr(workers))
    if way == "os._exit":
        parent = parent.replace("await trio.sleep_forever()", "await trio.to_thread.run_sync(input); os._exit(0)")
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=reports.write_fd,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
    ) as popen:
        pidfds = await reports.pidfds(len(workers) + 1)
        assert len(pidfds) == 2 * len(workers)
        assert popen.stdin is not None
        if way == "SIGKILL":
            popen.kill()
        else:
            popen.stdin.write(b"\n")
        popen.stdin.close()
        await all_gone(pidfds)


# stderr, without I/O


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"\n", b"a\nb\n", b"x" * 50])))
def test_lines_do_not_depend_on_how_they_arrive(chunks: list[bytes]) -> None:
    """Any way of cutting the same bytes makes the same lines, each within its limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_process, "LONGEST_LINE", 20)
        splitter, whole = LineSplitter(), LineSplitter()
        found: list[bytes] = []
        for chunk in chunks:
            found += splitter.receive(chunk)
            assert len(splitter.unfinished) <= 20
        found += splitter.finish()
        data = b"".join(chunks)
        assert found == whole.receive(data) + whole.finish()
        expected = data.split(b"\n")
        if not expected[-1]:
            expected.pop()
        assert len(found) == len(expected)
        for line, original in zip(found, expected, strict=True):
            if len(original) <= 20:
                assert line == original
            else:
                assert line == original[:20] + b"... (%d more bytes)" % (len(original) - 20)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_what_is_logged_is_readable(line: bytes) -> None:
    """Nothing is left that ends a line, drives a terminal or can't be encoded, whatever the bytes were."""
    text = readable(line)
    assert not [char for char in text if unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") and char != "\t"]
    assert text.splitlines() == ([text] if text else [])
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"plain \xc3\xa9 \xf0\x9f\x90\x8d\ttab", "plain é 🐍\ttab"),
        (b"windows\r", "windows"),
        (b"50%\r100%", "50%\\x0d100%"),
        (b"\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        (b"nul \x00 del \x7f", "nul \\x00 del \\x7f"),
        ("c1 \x9b, line \u2028, bidi \u202e.".encode(), "c1 \\x9b, line \\u2028, bidi \\u202e."),
        (b"bad \xff utf-8", "bad \N{REPLACEMENT CHARACTER} utf-8"),
    ],
)
def test_escapes(line: bytes, text: str) -> None:
    """Control characters are shown and not sent on."""
    assert readable(line) == text


async def test_flood_is_counted(mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """A burst is logged, the rest counted, the gap said once, and then lines again: never a drip."""
    log = StderrLog(LAUNCH, 42)
    log.receive(b"x\n" * (LINES_A_SECOND + 100))
    assert len(caplog.records) == LINES_A_SECOND
    mock_clock.jump(0.9)
    log.receive(b"x\n" * 11)
    log.tick()
    assert len(caplog.records) == LINES_A_SECOND
    assert trio.current_time() < log.due < math.inf
    mock_clock.jump(log.due - trio.current_time())
    log.receive(b"after\n")
    assert lines(caplog)[LINES_A_SECOND:] == ["... 111 lines left out", "after"]
    assert log.due == math.inf
    log.receive(b"x\n" * LINES_A_SECOND)
    log.finish()
    assert lines(caplog)[-1] == "... 1 lines left out"


async def test_rate_of_the_log(mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """However the flood comes, no second sees more than twice the rate (and the notes of what was left out)."""
    log = StderrLog(LAUNCH, 42)
    times: list[float] = []
    for step in range(400):
        before = len(caplog.records)
        log.receive(b"x\n" * (7 if step % 100 > 80 else 300))
        times += [trio.current_time()] * (len(caplog.records) - before)
        mock_clock.jump(0.02)
    for start in times:
        assert sum(start <= time < start + 1 for time in times) <= 2 * LINES_A_SECOND + 2


async def test_slow_lines_are_never_left_out(
    mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that talks all the time, but within the rate, is logged whole."""
    log = StderrLog(LAUNCH, 42)
    for number in range(2000):
        log.receive(b"%d\n" % number)
        mock_clock.jump(1.01 / LINES_A_SECOND)
    assert lines(caplog) == [str(number) for number in range(2000)]


async def test_tail(mock_clock: trio.testing.MockClock) -> None:
    """The last lines, logged or not, an unfinished one with them, within a bound that counts what is shown."""
    log = StderrLog(LAUNCH, 42)
    assert log.tail == ""
    log.receive(b"".join(b"%d\n" % number for number in range(5000)) + b"half")
    assert log.tail.splitlines() == [str(number) for number in range(5001 - TAIL_LINES, 5000)] + ["half"]
    log.receive(b"\x00" * 100_000 + b"\n" + b"the end\n")
    assert len(log.tail) <= TAIL_SIZE
    assert log.tail.endswith("the end")


# stderr of a process


@pytest.fixture(autouse=True)
def log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trio_workers.worker")


async def test_lines_are_logged(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    """One record a line, visible by default, with who said it; a last one without newline too."""
    process = await run(shell("printf 'one\\n\\ntwo \\033[1m\\nbad \\377 three' >&2"))
    assert process.stderr_tail == "one\n\ntwo \\x1b[1m\nbad \N{REPLACEMENT CHARACTER} three"
    assert [record.getMessage() for record in caplog.records] == [
        f"pool[3] {process.pid}: {line}" for line in process.stderr_tail.split("\n")
    ]
    record = caplog.records[0]
    assert record.name == "trio_workers.worker"
    assert record.levelno == logging.WARNING
    assert (vars(record)["pool"], vars(record)["slot"], vars(record)["pid"]) == ("pool", 3, process.pid)


async def test_last_words_are_read_after_the_end(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody has read when the process ends is read by `finish`."""
    process = await spawn(shell("i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done; printf end"))
    await process.wait_exit()
    assert caplog.records == []
    process.finish()
    assert lines(caplog) == [*(f"line {number}" for number in range(300)), "end"]
    process.reap()


async def test_draining_ends_with_stderr(platform: Platform) -> None:
    """A worker may close its stderr and live on."""
    async with running(shell("exec 1>&- 2>&-; exec sleep 1000")) as process:
        pass
    process = await spawn(shell("echo bye; exec 1>&- 2>&-; exec sleep 1000"))
    await process.drain_stderr()
    assert process.stderr_tail == "bye"
    await process.drain_stderr()
    process.kill()
    await process.wait_exit()
    process.finish()
    process.reap()


async def test_draining_ends_at_the_end(platform: Platform, reports: Reports) -> None:
    """`finish` wakes the task that drains, though an escaped grandchild holds stderr open."""
    process = await spawn(shell("setsid sh -c 'echo $$; exec sleep 1000' & wait"), reports.write_fd)
    pid = int(await reports.line())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.drain_stderr)
        await trio.testing.wait_all_tasks_blocked()
        process.kill()
        await process.wait_exit()
        process.finish()
        process.reap()
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await all_gone([pidfd])


async def count_passes(passes: list[int]) -> None:
    while True:
        await trio.lowlevel.checkpoint()
        passes[0] += 1


@pytest.fixture
def unpatient_memory() -> Iterator[None]:
    """Fail if the peak of our memory grows by more than 30 MB."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = peak()
    yield
    assert peak() - before < 30_000


def peak() -> int:
    """Return the peak of our resident memory in KiB."""
    with open("/proc/self/status") as file:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", file.read())[0])


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("line", ["", "a line of some length, as a worker may write it", "x"])
async def test_200_megabytes(line: str, caplog: pytest.LogCaptureFixture, unpatient_memory: None) -> None:
    """An endless line, or millions of them: bounded memory, each line counted once, and others get their turn."""
    size = 200_000_000 if len(line) != 1 else 10_000_000
    script = f"yes '{line}' | head -c {size} >&2" if line else f"head -c {size} /dev/zero | tr '\\0' x >&2"
    passes = [0]
    async with running(shell(script)) as process, trio.open_nursery() as nursery:
        nursery.start_soon(count_passes, passes)
        await process.wait_exit()
        nursery.cancel_scope.cancel()
    assert passes[0] > size / _process.STDERR_READ / 2
    said = lines(caplog)
    left_out = sum(int(text.split()[1].replace(",", "")) for text in said if text.endswith("lines left out"))
    logged = sum(not text.endswith("lines left out") for text in said)
    assert logged + left_out == (math.ceil(size / (len(line) + 1)) if line else 1)
    if line:
        assert left_out > logged
    else:
        assert said == ["x" * LONGEST_LINE + f"... ({size - LONGEST_LINE:,} more bytes)"]
