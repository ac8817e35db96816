"""What can go wrong, each with one meaning. The texts are for whoever is woken at 3 a.m."""

import copy
import signal as _signal
from typing import TypeVar

import trio


class WorkersError(Exception):
    """Base of all errors of trio_workers."""

    __module__ = "trio_workers"  # what a traceback shows is where to import it from

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            cls.__module__ = "trio_workers"


class JobError(WorkersError):
    """The job failed; the worker is fine and stays.

    `message` is what the worker sent, as bytes; `str()` shows it as text.
    """

    def __init__(self, message: bytes | str = b"") -> None:
        self.message: bytes = message.encode() if isinstance(message, str) else bytes(message)
        super().__init__(self.message.decode("utf-8", "replace"))

    def __reduce__(self) -> tuple[type["JobError"], tuple[bytes]]:
        return type(self), (self.message,)


class AllocateTimeout(WorkersError, trio.TooSlowError):
    """No worker became free for the job within `Config.allocate_timeout`. The job did not start: a retry is safe."""

    started: bool = False
    last_spawn_error: "SpawnError | None" = None
    """The last failed start of a worker since one served, if that is why nobody was free."""


class QueueFull(WorkersError):
    """More callers were waiting than `Config.max_queue` allows. The job did not start."""

    started: bool = False


class JobTimeout(WorkersError, trio.TooSlowError):
    """The job ran for longer than `Limits.exec_ttl`; its worker was killed, and is replaced.

    `pid`, `slot`, `stderr` and `started` are as in `WorkerError`.
    """

    def __init__(
        self,
        message: str = "",
        *,
        pid: int | None = None,
        slot: int | None = None,
        stderr: str = "",
        started: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.pid = pid
        self.slot = slot
        self.stderr = stderr
        self.started = started
        if stderr:
            self.add_note(f"The last lines of its stderr:\n{stderr}")


class WorkerError(WorkersError):
    """The worker is gone.

    `pid`, `slot`: which one (None where there was no process).
    `returncode`: its exit status; minus the signal's number where a signal ended it; None where somebody else took the
    status.
    `signal`: the signal that ended it, or None.
    `stderr`: the last lines it wrote there.
    `phase`: what it was doing: spawn, handshake, idle, writing, running, streaming, leased or retiring; memory where it
    was killed for `Limits.hard_memory`.
    `started`: whether the job began: True, False (proved, so a retry is safe) or None (nobody can know).
    """

    pid: int | None = None
    slot: int | None = None
    returncode: int | None = None
    stderr: str = ""
    phase: str = ""
    started: bool | None = None

    def __init__(
        self,
        message: str = "",
        *,
        pid: int | None = None,
        slot: int | None = None,
        returncode: int | None = None,
        stderr: str = "",
        phase: str = "",
        started: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.pid = pid
        self.slot = slot
        self.returncode = returncode
        self.stderr = stderr
        self.phase = phase
        self.started = started
        if stderr:
            self.add_note(f"The last lines of its stderr:\n{stderr}")

    @property
    def signal(self) -> int | None:
        """The signal that ended the process, or None."""
        return -self.returncode if self.returncode is not None and self.returncode < 0 else None


class SpawnError(WorkerError):
    """A worker never became ready.

    Raised only where one is asked for: `open_pool`, `open_worker`, `reset`, `resize`, and by a job of a pool with
    `Config.debug`, which has a process of its own.
    """


class WorkerCrashed(WorkerError):
    """The worker's process ended under a job."""


class RelayError(WorkerError):
    """The worker broke the protocol and was killed. The text shows the first bytes it sent instead."""


class RestartLimitExceeded(WorkersError):
    """The pool gave up: `Restart.give_up_after` boots in a row failed.

    Leaves the `open_pool` block; the cause is the last `SpawnError`.
    """


class RemoteTraceback(WorkersError):
    """The `__cause__` of an exception that comes from a job: its text is the traceback in the worker.

    What the exception was raised from there is the cause of this one.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(text)

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class TrioWorkersInternalError(WorkersError):
    """A bug in trio_workers. Please report it, with its causes."""


E = TypeVar("E", bound=WorkerError)


def afresh(error: E) -> E:
    """Copy an error that several wait for: each who raises it has a traceback of his own."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied


def how_it_ended(returncode: int | None) -> str:
    """Say an exit status in words: "exited with status 3", "was killed by SIGKILL"."""
    if returncode is None:
        return "ended; its exit status was taken by someone else in this process"
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = _signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}"


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first of the errors in a group."""
    error = group.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        return first_of(error)  # pyright: ignore[reportUnknownArgumentType]
    return error


def more_urgent(failure: BaseException | None, interrupt: BaseException) -> BaseException:
    """Choose what leaves the block when Ctrl-C comes while it is being left."""
    if failure is None or isinstance(failure, Exception | trio.Cancelled):
        interrupt.__context__ = failure
        return interrupt
    return failure  # itself an interrupt, perhaps in a group
