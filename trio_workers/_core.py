"""The core of every kind of pool: carries out what the roster decides, in a nursery that owns every worker.

`PoolCore` has a roster, an exchange, a supervision, and one synchronous function, `_carry_out`, that turns the roster's
actions into writes, wake-ups, tasks and signals. Jobs are frames here; what they mean is a codec's business.

The block. A nursery stands around everything, but nothing of the user's ever enters it: what leaves the block is caught
in front of the nursery, the workers are stopped or killed, the nursery ends, and then it is raised again as it was, so
that a user's exception is never wrapped in a group.
"""

import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar, cast

import attrs
import trio

from ._codec import Codec, check_label, decode
from ._config import Config
from ._errors import (
    AllocateTimeout,
    QueueFull,
    RestartLimitExceeded,
    SpawnError,
    TrioWorkersInternalError,
    WorkerError,
    first_of,
    more_urgent,
)
from ._exchange import Ending, Exchange, Parts, describe_end, explain_end, judge, named
from ._model import Payload, WorkerEvent, WorkerState
from ._roster import (
    ASSIGNED,
    GONE,
    SERVING,
    STOPPING,
    WAITING,
    Action,
    Begin,
    Drained,
    Emit,
    End,
    GiveUp,
    Job,
    Kill,
    Phase,
    Retire,
    Roster,
    Seat,
    Spawn,
    Wake,
)
from ._supervise import GRACE, Supervision, call_user
from ._worker import CurrentJob, Worker

T = TypeVar("T")
Observer = Callable[[WorkerEvent, Worker | None, object], None]

_log = logging.getLogger("trio_workers.pool")


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A pool at one moment. `idle + busy + starting + leased + stopping` is the number of `Pool.workers`."""

    target: int
    """How many workers there should be."""
    idle: int
    """Workers that are free."""
    busy: int
    """Workers on a job."""
    starting: int
    """Workers that come up, or wait for their predecessor's last job."""
    leased: int
    """Workers that somebody has to himself."""
    stopping: int
    """Workers on their way out."""
    waiting: int
    """Callers that wait for a worker."""
    longest_wait: float
    """For how long the first of them has waited, in seconds."""
    jobs: Mapping[str, int]
    """Jobs that have ended, by outcome: replied, failed, crashed, relay_error, retired, allocate_timeout, queue_full,
    closed, cancelled."""
    starts: int
    """Workers started, successfully or not."""
    failed_starts: int
    """Workers that never became ready."""
    exits: Mapping[str, int]
    """Workers that have ended, by reason."""
    restarts: Mapping[int, int]
    """By slot, how many workers were started there after the first."""


class Block(Generic[T]):
    """What `async with` takes: entered once, and not torn apart by KeyboardInterrupt on the way in or out."""

    def __init__(self, inner: AbstractAsyncContextManager[T], name: str) -> None:
        self._inner = inner
        self._name = name
        self._entered = False

    def __repr__(self) -> str:
        return f"<the block of {self._name}(), for async with>"

    def __aiter__(self) -> NoReturn:
        raise TypeError(f"what {self._name}() returns must be entered: async with ...{self._name}(...) as name: ...")

    __await__ = __iter__ = __enter__ = __aiter__

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> T:
        if self._entered:
            raise RuntimeError(f"this can be entered only once; call {self._name}() again")
        self._entered = True
        return await self._inner.__aenter__()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._inner.__aexit__(kind, error, traceback)


class PoolCore:
    """What every kind of pool has. Jobs are frames here."""

    supervision: Supervision

    def __init__(
        self,
        config: Config,
        codec: Codec,
        nursery: trio.Nursery,
        observer: Observer | None,
        *,
        latest_first: bool = False,
    ) -> None:
        self.config = config
        self.roster = Roster(
            config.num_workers,
            clock=trio.current_time,
            wall=time.time,
            restart=config.restart,
            max_executions=config.max_executions,
            max_queue=config.max_queue,
            latest_first=latest_first,
        )
        self.exchange = Exchange(
            self.roster,
            self._carry_out,
            self._start_task,
            self._explain,
            codec.failure,
            allocate_timeout=config.allocate_timeout,
            destroy_timeout=config.destroy_timeout,
        )
        self.codec = codec
        self.body_scope = trio.CancelScope()
        self.failure: BaseException | None = None
        self.last_spawn_error: SpawnError | None = None
        self.last_error: WorkerError | None = None
        self._nursery = nursery
        self._observer = observer
        self._opened = trio.Event()
        self._drained = trio.Event()
        self._house = trio.CancelScope(shield=True)  # `close` ends it: a body that is shielded still needs its workers
        self._nap = trio.CancelScope()
        self._carrying = False
        self._now: deque[Begin | Wake | Spawn | Drained] = deque()
        self._emits: deque[Emit | GiveUp] = deque()
        self._ends: deque[Retire | Kill] = deque()

    def __repr__(self) -> str:
        return f"<PoolCore {self.config.name!r}: {self.roster!r}>"

    # the block

    async def open(self) -> None:
        """Start the workers, side by side, and wait until all are ready. Raise the first `SpawnError`."""
        spawner = await self.config.factory.open(self._nursery)
        self._spawner = spawner
        self.supervision = Supervision(self.config, self.roster, self._carry_out, spawner, self.codec.failure)
        self._nursery.start_soon(self._keep_house)
        self._carry_out(self.roster.open())
        await self._opened.wait()
        self._raise_failure()

    async def drain(self) -> None:
        """Take no more jobs, finish those there are, stop the workers."""
        self.take_no_more()
        await self._drained.wait()
        self._raise_failure()

    def take_no_more(self) -> None:
        """Close the door: jobs that are there are finished, and nothing else is started."""
        self._carry_out(self.roster.close())

    def release(self, job: Job) -> None:
        """End a lease."""
        self._carry_out(self.roster.released(job))

    async def end(self) -> None:
        """Kill what is left, and wait until it is reaped."""
        self._carry_out(self.roster.abort())
        await self._drained.wait()

    def close(self) -> None:
        """Let go of what is in the background, and of the factory."""
        self._house.cancel()
        spawner = getattr(self, "_spawner", None)
        if spawner is not None:
            spawner.close()

    def fail(self, error: BaseException) -> None:
        """End the block with this error."""
        if self.failure is None:
            self.failure = error
        self._opened.set()
        self.body_scope.cancel()
        self._carry_out(self.roster.abort())

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    # carrying out

    def _carry_out(self, actions: Iterable[Action]) -> None:
        """Do what the roster has decided. Synchronous, whoever calls it.

        First what jobs wait for, then observers and the log, when the change is complete; signals last, so that a
        DESTRUCT is told before the process is ended. Actions that arise on the way (a write that fails, say) join the
        queue of the outermost call.
        """
        for action in actions:
            if isinstance(action, Emit | GiveUp):
                self._emits.append(action)
            elif isinstance(action, Retire | Kill):
                self._ends.append(action)
            else:
                self._now.append(action)
        if self._carrying:
            return
        self._carrying = True
        try:
            while self._now or self._emits or self._ends:
                if self._now:
                    self._do(self._now.popleft())
                elif self._emits:
                    emit = self._emits.popleft()
                    if isinstance(emit, GiveUp):
                        self._give_up()  # after the error that it is the last of
                    else:
                        self._emit(emit)
                else:
                    self._end_worker(self._ends.popleft())
        finally:
            self._carrying = False
        self._nap.deadline = self.roster.next_deadline()

    def _do(self, action: Begin | Wake | Spawn | Drained) -> None:
        match action:
            case Begin(job):
                if job.state is ASSIGNED and not job.lease:
                    self.exchange.begin(job)
                self.exchange.ring(job)
            case Wake(job):
                self.exchange.ring(job)
            case Spawn(seat):
                seat.worker = Worker._create(self, seat.slot, seat)  # pyright: ignore[reportPrivateUsage]
                name = f"trio_workers {self.config.name}[{seat.slot}]"
                self._nursery.start_soon(self.supervision.supervise, seat, name=name)
            case Drained():
                self._drained.set()

    def _give_up(self) -> None:
        name, limit = self.config.name, self.config.restart.give_up_after
        error = RestartLimitExceeded(
            f"the pool {name!r} gives up: {limit} boots in a row have failed. The last: {self.last_spawn_error}"
        )
        error.__cause__ = self.last_spawn_error
        _log.error("%s: gives up after %d failed boots in a row", name, limit, extra={"pool": name})
        self.fail(error)

    def _end_worker(self, action: Retire | Kill) -> None:
        seat = action.seat
        worker = seat.worker
        if isinstance(action, Kill) and not action.grace:
            worker.kill_now()
        elif isinstance(action, Kill):
            worker.kill_after(GRACE)
        else:
            if worker.line is not None and self.config.destroy_timeout > 0:
                worker.line.stop_worker()
            worker.kill_after(self.config.destroy_timeout)

    def _extra(self, seat: Seat) -> dict[str, object]:
        return {"pool": self.config.name, "slot": seat.slot, "pid": seat.worker.pid, "reason": seat.reason}

    def _emit(self, emit: Emit) -> None:
        """Tell the log and the observer."""
        seat = emit.seat
        context: object = emit.context
        name, worker = self.config.name, seat.worker
        if emit.event is WorkerEvent.CREATED:
            _log.debug("%s[%d] %s: ready", name, seat.slot, worker.pid, extra=self._extra(seat))
            if not self._opened.is_set() and self._all_ready():
                self._opened.set()
        elif emit.event is WorkerEvent.DESTRUCT:
            self._log_end(seat)
        else:
            context = self.last_error = self._describe_error(seat)
            _log.warning(
                "%s[%d] %s: %s%s", name, seat.slot, worker.pid, context, _tail(context), extra=self._extra(seat)
            )
        if self._observer is not None:
            try:
                call_user(self._observer, emit.event, worker, context)
            except Exception:
                _log.exception("%s: the observer raised an exception, which is ignored", name, extra=self._extra(seat))
            except BaseException as error:
                self.fail(error)
        if emit.event is WorkerEvent.ERROR and not self._opened.is_set():
            assert isinstance(context, WorkerError)
            self.fail(context if isinstance(context, SpawnError) else as_spawn_error(context))

    def _log_end(self, seat: Seat) -> None:
        name, pid, job = self.config.name, seat.worker.pid, seat.cancelled
        if job is None:
            _log.debug("%s[%d] %s: stopping (%s)", name, seat.slot, pid, seat.reason, extra=self._extra(seat))
        else:
            age = trio.current_time() - job.started
            _log.info("%s[%d] %s: killed, for %s was cancelled after %.3f s", name, seat.slot, pid, named(job), age,
                      extra=self._extra(seat))  # fmt: skip

    def _all_ready(self) -> bool:
        return (
            sum(1 for seat in self.roster.seats if seat.announced and seat.state is not STOPPING) >= self.roster.target
        )

    def _describe_error(self, seat: Seat) -> WorkerError:
        if isinstance(seat.fault, SpawnError):
            self.last_spawn_error = seat.fault
            return seat.fault
        if not seat.announced:
            return SpawnError(
                f"worker (slot {seat.slot}) never became ready", slot=seat.slot, phase="spawn", started=False
            )
        ending = seat.ending if isinstance(seat.ending, Ending) else Ending(None)
        worker = seat.worker
        if worker.failure is not None:
            return worker.failure
        if worker.line is not None:
            for job in seat.jobs:
                judge(seat, worker.line, job, dead=False)
        return describe_end(seat, ending)

    @trio.lowlevel.enable_ki_protection
    async def _keep_house(self) -> None:
        """Sleep until the roster has something to do by the clock."""
        with self._house:
            while True:
                with trio.CancelScope(deadline=self.roster.next_deadline()) as self._nap:
                    await trio.sleep_forever()
                self._carry_out(self.roster.tick())

    def _start_task(self, function: Callable[..., Any], *args: Any) -> None:
        self._nursery.start_soon(function, *args)

    # what to say to whom

    def _explain(self, job: Job) -> Exception:
        """Build the error of a job that is over without an answer, or that waited too long."""
        name = self.config.name
        if job.state is WAITING:
            return self._allocate_timeout(job)
        if job.end is End.QUEUE_FULL:
            return QueueFull(
                f"{self.roster.waiting} callers wait for a worker of the pool {name!r} already, and max_queue is "
                f"{self.config.max_queue}; the job did not start"
            )
        if job.end is End.CLOSED or job.seat is None:
            if job.bound and self.roster.phase < Phase.ENDING:
                return trio.ClosedResourceError("this worker was stopped or killed")
            if isinstance(self.failure, RestartLimitExceeded):
                error = trio.ClosedResourceError(str(self.failure))
                error.__cause__ = self.failure
                return error
            return trio.ClosedResourceError(f"the pool {name!r} is closed")
        return explain_end(job)

    def _allocate_timeout(self, job: Job) -> AllocateTimeout:
        now = self.statistics()
        what = "" if job.label is None else f" for {named(job)}"
        text = (
            f"no worker of the pool {self.config.name!r} became free{what} within allocate_timeout "
            f"({self.config.allocate_timeout:g} s): of {now.target} workers {now.busy} are busy, "
            f"{now.starting} starting, {now.leased} leased, {now.stopping} stopping, "
            f"and {now.waiting} callers wait; the job did not start"
        )
        if self.roster.failed_in_a_row and self.last_spawn_error is not None:
            text += f". The last {self.roster.failed_in_a_row} starts of a worker failed: {self.last_spawn_error}"
        error = AllocateTimeout(text)
        error.last_spawn_error = self.last_spawn_error if self.roster.failed_in_a_row else None
        return error

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every worker known, from spawn to reap, by slot."""
        return tuple(
            seat.worker for seat in sorted(self.roster.seats, key=lambda seat: seat.slot) if hasattr(seat, "worker")
        )

    def statistics(self) -> PoolStatistics:
        """Look at the pool."""
        roster = self.roster
        idle = busy = starting = leased = stopping = 0
        for seat in roster.seats:
            if seat.state is STOPPING:
                stopping += 1
            elif seat.state is not SERVING:
                starting += 1
            elif seat.lease is not None:
                leased += 1
            elif seat.jobs:
                busy += 1
            else:
                idle += 1
        return PoolStatistics(
            target=roster.target, idle=idle, busy=busy, starting=starting, leased=leased, stopping=stopping,
            waiting=roster.waiting, longest_wait=roster.longest_wait, jobs=dict(roster.outcomes),
            starts=roster.starts.total(), failed_starts=roster.failed_starts, exits=dict(roster.exits),
            restarts={slot: roster.starts[slot] - 1 for slot in range(roster.target)},
        )  # fmt: skip

    # what a worker asks of its pool

    def state_of(self, worker: Worker) -> tuple[WorkerState, int, float]:
        """State, number of jobs begun, and when it last changed."""
        seat: Seat = worker.seat
        if seat.state is SERVING:
            value = WorkerState.WORKING if seat.jobs else WorkerState.READY
        elif seat.state is GONE:
            value = WorkerState.ERRORED if worker.failure is not None else WorkerState.STOPPED
        else:
            value = WorkerState.INACTIVE
        return value, seat.begun, seat.changed

    def current_of(self, worker: Worker) -> CurrentJob | None:
        """The job the worker is on."""
        seat: Seat = worker.seat
        job = seat.jobs[0] if seat.jobs else seat.lease
        return None if job is None else CurrentJob(job.label, job.started)

    def retire(self, worker: Worker, reason: str) -> None:
        """Stop the worker softly."""
        self._carry_out(self.roster.retire(worker.seat, reason))

    def kill(self, worker: Worker, reason: str) -> None:
        """Kill the worker."""
        self._carry_out(self.roster.kill(worker.seat, reason))

    async def exec_on(self, worker: Worker, payload: Payload, label: str | None) -> Payload:
        """Run a job on a worker that the caller has to himself."""
        job = Job(self.codec.encode(payload), check_label(label))
        return decode(await self.exchange.run(job, worker.seat))

    def stream_on(
        self, worker: Worker, payload: Payload, label: str | None
    ) -> AbstractAsyncContextManager[Parts[Payload]]:
        """Stream a job on a worker that the caller has to himself."""
        job = Job(self.codec.encode(payload), check_label(label))
        return Parts[Payload]._create(self.exchange, job, decode, worker.seat)  # pyright: ignore[reportPrivateUsage]


def _tail(error: object) -> str:
    stderr = error.stderr if isinstance(error, WorkerError) else ""
    return f"\nThe last lines of its stderr:\n{stderr}" if stderr else ""


def as_spawn_error(error: WorkerError) -> SpawnError:
    """A worker that shook hands and died before the pool was open."""
    spawn_error = SpawnError(
        f"{error} That was before the pool was open",
        pid=error.pid,
        slot=error.slot,
        returncode=error.returncode,
        stderr=error.stderr,
        phase=error.phase,
        started=False,
    )
    spawn_error.__cause__ = error
    return spawn_error


@asynccontextmanager
async def open_core(
    config: Config, codec: Codec, observer: Observer | None, *, latest_first: bool = False
) -> AsyncGenerator[PoolCore]:
    """Open a pool core, and end it with the block.

    `latest_first`: of several free workers the one that was at work last is taken, whose code and data are still in the
    processor's caches, instead of all in turn.
    """
    failure: BaseException | None = None
    core: PoolCore | None = None
    try:
        async with trio.open_nursery() as nursery:
            core = PoolCore(config, codec, nursery, observer, latest_first=latest_first)
            try:
                with core.body_scope:
                    await core.open()
                    yield core
                    await core.drain()
            except BaseException as error:
                failure = error
            with trio.CancelScope(shield=True):
                while True:
                    try:
                        await core.end()
                        break
                    except KeyboardInterrupt as interrupt:  # another Ctrl-C meanwhile; the reap goes on
                        failure = more_urgent(failure, interrupt)
            core.close()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        interrupts, others = group.split((KeyboardInterrupt, SystemExit))
        if interrupts is not None:
            failure = more_urgent(failure, first_of(interrupts))
        ours = None if others is None else others.split(trio.Cancelled)[1]
        if ours is not None:
            if failure is not None and not isinstance(failure, trio.Cancelled):
                ours = BaseExceptionGroup("a bug of trio_workers, and what left the block", [ours, failure])
            raise TrioWorkersInternalError(
                "a background task of the pool failed; this is a bug in trio_workers"
            ) from ours
        if failure is None:
            failure = group.exceptions[0]
    finally:
        if core is not None:
            core.close()
    gave_up = None if core is None else core.failure
    if gave_up is not None and failure is not gave_up:
        if failure is None or _follows_from(failure, gave_up):
            failure = gave_up
        else:
            _log.error(
                "%s: gave up while this error was on its way out: %s", config.name, failure, extra={"pool": config.name}
            )
            _link(failure, gave_up)
    if failure is not None:
        raise failure


def _follows_from(error: BaseException, gave_up: BaseException) -> bool:
    """Whether an error is what the give-up itself did to the body: a cancel, or the end of a job that waited."""
    if isinstance(error, BaseExceptionGroup):
        exceptions = cast("tuple[BaseException, ...]", error.exceptions)  # pyright: ignore[reportUnknownMemberType]
        return all(_follows_from(one, gave_up) for one in exceptions)
    return isinstance(error, trio.Cancelled) or error.__cause__ is gave_up


def _link(error: BaseException, context: BaseException) -> None:
    """Show the give-up at the end of the chain of what a user's error came from."""
    while error.__context__ is not None and error.__context__ is not context:
        error = error.__context__
    if error is not context:
        error.__context__ = context
