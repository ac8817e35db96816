"""A worker: one process with its line and its state, as users see it."""

import os
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs
import trio

from . import _platform
from ._errors import WorkerError, afresh
from ._model import Payload, State, WorkerState
from ._process import WorkerProcess
from ._relay import Line

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from ._exchange import Parts


WorkerStatus = Literal["starting", "idle", "busy", "leased", "stopping", "gone"]


@attrs.frozen
class CurrentJob:
    """The job a worker is on: its `label`, and when it was `started` (seconds on trio's clock)."""

    label: str | None
    started: float


class Owner(Protocol):
    """What a worker asks of the pool it belongs to."""

    def state_of(self, worker: "Worker") -> tuple[WorkerState, int, float]: ...
    def status_of(self, worker: "Worker") -> WorkerStatus: ...
    def age_of(self, worker: "Worker") -> float: ...
    def current_of(self, worker: "Worker") -> CurrentJob | None: ...
    def retire(self, worker: "Worker", reason: str) -> None: ...
    def kill(self, worker: "Worker", reason: str) -> None: ...
    async def exec_on(self, worker: "Worker", payload: Payload, label: str | None) -> Payload: ...
    def stream_on(
        self, worker: "Worker", payload: Payload, label: str | None
    ) -> "AbstractAsyncContextManager[Parts[Payload]]": ...


class Worker:
    """A supervised worker process.

    You get one from `Pool.workers`, `Pool.lease`, `open_worker` or an observer. `exec` and `stream` are for a worker
    that you have to yourself (`open_worker`, `lease`).
    """

    _owner: Owner
    _slot: int
    seat: Any
    process: WorkerProcess | None
    line: Line | None
    _state: State
    ended: trio.Event
    failure: WorkerError | None
    killed: bool
    leash: trio.CancelScope
    boot_scope: trio.CancelScope

    def __init__(self) -> None:
        raise TypeError("Worker has no public constructor; it comes from open_worker or a pool")

    @classmethod
    def _create(cls, owner: Owner, slot: int, seat: object) -> "Worker":
        self = object.__new__(cls)
        self._owner = owner
        self._slot = slot
        self.seat = seat
        self.process = None
        self.line = None
        self._state = State._create(lambda: owner.state_of(self))  # pyright: ignore[reportPrivateUsage]
        self.ended = trio.Event()
        self.failure = None
        self.killed = False
        self.leash = trio.CancelScope()
        self.boot_scope = trio.CancelScope()
        return self

    @property
    def pid(self) -> int | None:
        """The process's id, None while it has not been started."""
        return None if self.process is None else self.process.pid

    @property
    def slot(self) -> int:
        """Its place in the pool, from 0; its replacement keeps it. The process finds it in `TRIO_WORKERS_SLOT`."""
        return self._slot

    @property
    def state(self) -> State:
        """A live, read-only view of its state."""
        return self._state

    @property
    def status(self) -> WorkerStatus:
        """Where it stands, in the words of `PoolStatistics`: starting, idle, busy, leased, stopping; or gone."""
        return self._owner.status_of(self)

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return self._owner.age_of(self)

    @property
    def current(self) -> CurrentJob | None:
        """The job it is on, or None."""
        return self._owner.current_of(self)

    async def exec(self, payload: Payload, *, label: str | None = None) -> Payload:
        """Run one job on this worker and return its reply.

        Raise `JobError` where the job fails, `WorkerError` where the worker does, `trio.ClosedResourceError` after
        `stop` or `kill`, and `trio.BusyResourceError` where another task is in it or the pool owns it. Cancelling kills
        the worker, unless the whole reply is already there.
        """
        return await self._owner.exec_on(self, payload, label)

    def stream(self, payload: Payload, *, label: str | None = None) -> "AbstractAsyncContextManager[Parts[Payload]]":
        """Run one job on this worker and take its reply in parts; see `Pool.stream`."""
        return self._owner.stream_on(self, payload, label)

    @trio.lowlevel.enable_ki_protection
    async def stop(self) -> None:
        """Stop the worker softly and wait until it is gone.

        A running job is finished first; then comes the stop frame, and after `Config.destroy_timeout` SIGKILL. Doing it
        twice is harmless. Cancelling gives up the wait, not the stop.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._owner.retire(self, "stopped")
        await self.ended.wait()

    @trio.lowlevel.enable_ki_protection
    async def kill(self) -> None:
        """Kill the worker's whole process group and wait until it is gone. Cancelling gives up the wait only."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._owner.kill(self, "killed")
        await self.ended.wait()

    async def wait(self) -> None:
        """Wait until the worker is gone: return after a soft stop, else raise the `WorkerError` of its end."""
        await self.ended.wait()
        if self.failure is not None:
            raise afresh(self.failure)

    def __str__(self) -> str:
        value, num_execs, _ = self._owner.state_of(self)
        pid = "no process yet" if self.pid is None else f"pid {self.pid}"
        return f"worker {self._slot} ({pid}, {value.name.lower()}, {num_execs} {'job' if num_execs == 1 else 'jobs'})"

    def __repr__(self) -> str:
        return f"<{self}>"

    # for the supervision and the pool

    def kill_after(self, seconds: float) -> None:
        """Let the worker's own task kill it, unless it is gone by then."""
        self.leash.deadline = min(self.leash.deadline, trio.current_time() + seconds)

    def resident_memory(self) -> int | None:
        """Read how many bytes of memory it has resident: its process, and with a wrapper the one that does the work."""
        if self.process is None:
            return None
        pid = self.process.pid
        memory = _platform.HERE.resident_memory(pid)
        if memory is not None and self.line is not None:
            memory = max(0, memory - self.line.shared_memory)
        peer = None if self.line is None else self.line.peer
        if memory is None or peer is None or peer == pid:
            return memory
        try:
            belongs = os.getpgid(peer) == pid  # else it is a number of another machine's, or just made up
        except OSError:
            return memory
        return memory + (_platform.HERE.resident_memory(peer) or 0) if belongs else memory

    def kill_now(self) -> None:
        """Kill its process group, or keep its process from being started."""
        self.killed = True
        self.boot_scope.cancel()
        if self.process is not None:
            self.process.kill()
