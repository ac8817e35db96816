"""One OS process: spawned in its own process group, its stderr drained from birth, killed whole, reaped exactly.

The order of an end is fixed: the process has ended (`wait_exit`; as a zombie it still pins its pid and group), the rest
of its group is killed and what is left on stderr is read (`finish`), and only then the exit status is taken (`reap`).
"""

import contextlib
import logging
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import attrs
import trio

from . import _platform
from ._platform import NOT_YET, ExitWatch, LifeLine, Platform

LONGEST_LINE: Final = 4096
"""Bytes of one line of stderr that are logged and kept: a long stack frame or a short dump. The rest is counted."""

TAIL_LINES: Final = 20
"""Lines of stderr kept for errors: a traceback's end."""

TAIL_SIZE: Final = 8 * 1024
"""Characters of stderr kept for errors, whatever the lines."""

LINES_A_SECOND: Final = 500
"""Lines of one worker's stderr that are logged in a second, and as many in a burst before: never more than 1,000 within
a second, which a log takes without drowning and a reader without missing the first cause."""

STDERR_READ: Final = 16 * 1024
"""Bytes read from stderr before other tasks get their turn: a few hundred lines take some milliseconds to log."""

STDERR_REST: Final = 1024 * 1024
"""Bytes read from stderr after the end: more than the pipe holds, and a bound to what a surviving grandchild writes."""

_log = logging.getLogger("trio_workers.worker")


@attrs.frozen(kw_only=True)
class Launch:
    """All that is needed to start one worker.

    `argv`, `env` (the whole environment) and `cwd` as for `subprocess.Popen`; `slot` is the worker's place in the pool;
    `label` names it in logs, like `pool[0]`; `protocol`, `max_frame_size` and `boot_timeout` are those of `Config`.
    """

    argv: tuple[str | bytes | os.PathLike[str], ...]
    env: Mapping[str, str] = attrs.field(repr=False)
    """Never shown in a `repr` or an error: it may hold secrets."""
    cwd: str | bytes | os.PathLike[str] | None = None
    slot: int
    label: str
    protocol: str
    max_frame_size: int
    boot_timeout: float = 60.0


class WorkerProcess(ABC):
    """What a pool needs of a worker's process. Factories of your own return one from `Spawner.spawn`.

    Its life: `drain_stderr` runs in a task of its own from birth; `wait_exit` until the end; then `finish`, `reap`.
    `kill` may be called at any time.
    """

    pid: int
    """The process id, also the id of its process group."""

    @abstractmethod
    async def wait_exit(self) -> None:
        """Wait until the process has ended. Its exit status is not taken. Can be cancelled, and called again."""

    @abstractmethod
    def kill(self) -> None:
        """Kill the process and its group at once (SIGKILL). Harmless a second time and after the end."""

    @abstractmethod
    def peek(self) -> int | None:
        """Return the exit status once the process has ended, without taking it.

        Minus the signal's number where a signal ended it; None while it runs, or where somebody else took the status.
        """

    def is_exiting(self) -> bool:
        """Return whether it is known to be on its way out.

        A pool asks that of a worker which closed its relay and has not ended yet, and gives it more time if so. Where
        nobody can say, False does no harm.
        """
        return False

    @abstractmethod
    async def drain_stderr(self) -> None:
        """Read stderr from birth and log it by lines, until its end or until cancelled. Runs in a task of its own."""

    @abstractmethod
    def finish(self) -> None:
        """After the end: kill what is left of the group, and read what is left on stderr. Never waits."""

    @abstractmethod
    def reap(self) -> int | None:
        """After `finish`: take the exit status and let go of everything. Never waits; a second call returns the same.

        Return None where somebody else in this process took the status.
        """

    @property
    @abstractmethod
    def stderr_tail(self) -> str:
        """The last lines written to stderr, for errors."""


class LineSplitter:
    """Bytes in, lines out, without I/O.

    A line is what stands before a newline, cut after `LONGEST_LINE` bytes with a note of how much was left out; so an
    endless line takes no more memory than that.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._lost = 0

    def receive(self, data: bytes) -> list[bytes]:
        """Take bytes and return the lines that they make whole."""
        first, *others = data.split(b"\n")
        self._hold(first)
        if not others:
            return []
        lines = [self._release()]
        last = others.pop()
        lines += [line if len(line) <= LONGEST_LINE else _cut(line[:LONGEST_LINE], len(line)) for line in others]
        self._hold(last)
        return lines

    def finish(self) -> list[bytes]:
        """Return a last line that has no newline, if there is one."""
        return [self._release()] if self._held else []

    @property
    def unfinished(self) -> bytes:
        """What has come of a line that has no newline yet."""
        return bytes(self._held)

    def _hold(self, piece: bytes) -> None:
        kept = piece[: LONGEST_LINE - len(self._held)]
        self._held += kept
        self._lost += len(piece) - len(kept)

    def _release(self) -> bytes:
        line = bytes(self._held)
        if self._lost:
            line = _cut(line, len(line) + self._lost)
        self._held.clear()
        self._lost = 0
        return line


def _cut(start: bytes, length: int) -> bytes:
    return b"%b... (%s more bytes)" % (start, f"{length - len(start):,}".encode())


_ESCAPES: Final = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (
        *range(0x09),
        *range(0x0A, 0x20),
        *range(0x7F, 0xA0),
        *(0x2028, 0x2029),  # line breaks to some readers
        *(0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # reorder what stands around them
    )
}
"""Characters that would let a worker forge log lines or drive a terminal. A tab does neither."""


def readable(line: bytes) -> str:
    """Show a line of a worker's output: UTF-8, what is none replaced, control characters escaped."""
    return line.removesuffix(b"\r").decode("utf-8", "replace").translate(_ESCAPES)


class StderrLog:
    """What becomes of the bytes of stderr: lines to the log, but not too many, and a tail kept for errors. No I/O."""

    def __init__(self, launch: Launch, pid: int) -> None:
        self._label = launch.label
        self._pid = pid
        name = launch.label.rpartition("[")[0] or launch.label
        self._extra = {"pool": name, "slot": launch.slot, "pid": pid, "reason": ""}
        self._splitter = LineSplitter()
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._tokens = float(LINES_A_SECOND)
        self._filled = trio.current_time()
        self._left_out = 0

    def receive(self, data: bytes) -> None:
        """Take what was read."""
        self._take(self._splitter.receive(data))

    def finish(self) -> None:
        """Log a last line that has no newline, and how many were left out."""
        self._take(self._splitter.finish())
        self._say_left_out()

    @property
    def due(self) -> float:
        """When `tick` has something to say, in trio's time; `inf` where it has not."""
        if not self._left_out:
            return float("inf")
        return self._filled + (LINES_A_SECOND - self._tokens) / LINES_A_SECOND

    def tick(self) -> None:
        """Say how many lines were left out, once the flood is over or has been quiet in the log for a second."""
        if self._left_out and trio.current_time() >= self.due:
            self._say_left_out()

    @property
    def tail(self) -> str:
        """The last lines, readable."""
        lines = [*self._tail]
        if unfinished := self._splitter.unfinished:
            lines = [*lines, unfinished][-TAIL_LINES:]
        return "\n".join(readable(line) for line in lines)[-TAIL_SIZE:]

    def _take(self, lines: list[bytes]) -> None:
        if not lines:
            return
        self._tail.extend(lines)
        self.tick()
        now = trio.current_time()
        self._tokens = min(LINES_A_SECOND, self._tokens + (now - self._filled) * LINES_A_SECOND)
        self._filled = now
        # Once lines were left out, all are until that has been said: a gap, then lines again, and not a drip.
        logged = 0 if self._left_out else min(len(lines), int(self._tokens))
        self._tokens -= logged
        self._left_out += len(lines) - logged
        for line in lines[:logged]:
            self._say(readable(line))

    def _say_left_out(self) -> None:
        if self._left_out:
            self._say(f"... {self._left_out:,} lines left out")
            self._left_out = 0

    def _say(self, text: str) -> None:
        _log.warning("%s %d: %s", self._label, self._pid, text, extra=self._extra)


class OsProcess(WorkerProcess):
    """A child process of ours. Made by `spawn_process` alone, which hands everything over to it."""

    def __init__(self, launch: Launch, pid: int, watch: ExitWatch, life_line: LifeLine, stderr_fd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.reaped = False
        self._launch = launch
        self._watch = watch
        self._life_line = life_line
        self._stderr_fd = stderr_fd
        self._stderr = StderrLog(launch, pid)
        self._at_reap: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        ended = f", reaped with {self.returncode}" if self.reaped else ""
        return f"<OsProcess {self._launch.label} {self.pid}{ended}>"

    def at_reap(self, callback: Callable[[], object]) -> None:
        """Call this when the process is reaped: for a spawner to let go of what it kept for the process."""
        self._at_reap.append(callback)

    @trio.lowlevel.enable_ki_protection
    async def wait_exit(self) -> None:
        """See `WorkerProcess.wait_exit`."""
        if self.reaped:
            await trio.lowlevel.checkpoint()
        else:
            await self._watch.wait()

    def kill(self) -> None:
        """See `WorkerProcess.kill`."""
        if not self.reaped:
            self._watch.kill_group()
            self._watch.kill_leader()  # which may have left its group

    def peek(self) -> int | None:
        """See `WorkerProcess.peek`."""
        if self.reaped:
            return self.returncode
        status = self._watch.peek()
        return None if status is NOT_YET else status

    def is_exiting(self) -> bool:
        """See `WorkerProcess.is_exiting`."""
        return not self.reaped and _platform.HERE.is_exiting(self.pid)

    @trio.lowlevel.enable_ki_protection
    async def drain_stderr(self) -> None:
        """See `WorkerProcess.drain_stderr`."""
        try:
            while self._stderr_fd >= 0:
                with trio.move_on_at(self._stderr.due):
                    await trio.lowlevel.wait_readable(self._stderr_fd)
                    if self._read_stderr() == b"":
                        self._close_stderr()
                        return
                self._stderr.tick()
        except trio.ClosedResourceError:
            return

    def finish(self) -> None:
        """See `WorkerProcess.finish`."""
        self.kill()
        for _ in range(STDERR_REST // STDERR_READ):
            if not self._read_stderr():
                break
        self._close_stderr()

    def reap(self) -> int | None:
        """See `WorkerProcess.reap`."""
        if self.reaped:
            return self.returncode
        status = self._watch.reap()
        if status is NOT_YET:
            raise RuntimeError(f"{self!r} has not ended: wait for that before reaping it")
        self.returncode = status
        self.reaped = True
        self._life_line.close()
        self._watch.close()
        for callback in self._at_reap:
            callback()
        self._at_reap.clear()
        self._close_stderr()  # last: a filter of the log may raise
        return status

    @property
    def stderr_tail(self) -> str:
        """See `WorkerProcess.stderr_tail`."""
        return self._stderr.tail

    def _read_stderr(self) -> bytes | None:
        """Read once; None where nothing is there, `b""` at the end."""
        if self._stderr_fd < 0:
            return b""
        try:
            data = os.read(self._stderr_fd, STDERR_READ)
        except BlockingIOError:
            return None
        self._stderr.receive(data)
        return data

    def _close_stderr(self) -> None:
        if self._stderr_fd >= 0:
            fd, self._stderr_fd = self._stderr_fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
            self._stderr.finish()


@trio.lowlevel.enable_ki_protection
async def spawn_process(
    launch: Launch, *, stdin: int, stdout: int | None, limiter: trio.CapacityLimiter, inherited: tuple[int, ...] = ()
) -> OsProcess:
    """Start a process in a thread, with a token of `limiter`; trio's default one may be taken by busy threads for long.

    `stdin`, `stdout` and what is `inherited` beside them, under the same numbers, stay the caller's to close; without a
    `stdout` the worker's goes where its stderr does. Raise
    `OSError` where the system refuses, `ValueError` for an argument with a NUL in it. Can be cancelled while it waits
    for its turn, and not once begun; whatever happens, no process and no descriptor is left that nobody owns.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    platform = _platform.HERE
    with contextlib.ExitStack() as owned:
        stderr_read, stderr_write = os.pipe()
        owned.callback(os.close, stderr_read)
        with contextlib.ExitStack() as for_the_child:
            for_the_child.callback(os.close, stderr_write)
            os.set_blocking(stderr_read, False)
            life_line = platform.life_line()
            owned.callback(life_line.close)
            pid, watch = await trio.to_thread.run_sync(
                _spawn, launch, stdin, stdout, stderr_write, inherited, life_line, platform, limiter=limiter
            )
        process = OsProcess(launch, pid, watch, life_line, stderr_read)
        owned.pop_all()
    return process


def _spawn(
    launch: Launch,
    stdin: int,
    stdout: int | None,
    stderr: int,
    inherited: tuple[int, ...],
    life_line: LifeLine,
    platform: Platform,
) -> tuple[int, ExitWatch]:
    """Run in a thread: spawn, watch, tie to the life line, or leave nothing."""
    popen = subprocess.Popen(
        launch.argv,
        stdin=stdin,
        stdout=stderr if stdout is None else stdout,
        stderr=stderr,
        env=launch.env,
        cwd=launch.cwd,
        process_group=0,
        pass_fds=(life_line.worker_fd, *inherited),
    )
    # A Popen takes the exit status whenever it can, even as garbage, and would do that before the group is killed. This
    # one believes that it has been waited for: from here on only `watch` knows the process.
    pid = popen.pid
    popen.returncode = 0
    try:
        watch = platform.watch_exit(pid)
        try:
            life_line.arm(pid)
        except BaseException:
            watch.close()
            raise
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        raise
    return pid, watch
