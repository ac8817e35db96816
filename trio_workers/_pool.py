"""The pool: carries out what the roster decides, in a nursery that owns every worker.

`PoolCore` is what every kind of pool has: a roster, an exchange, a supervision, and one synchronous function,
`_carry_out`, that turns the roster's actions into writes, wake-ups, tasks and signals. It knows frames and no payloads:
`Pool` puts those on top.

The block. A nursery stands around everything, but nothing of the user's ever enters it: what leaves the block is caught
in front of the nursery, the workers are stopped or killed, the nursery ends, and then it is raised again as it was, so
that a user's exception is never wrapped in a group.
"""

import inspect
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, cast, overload

import attrs
import trio

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
from ._exchange import Answer, Ending, Exchange, Parts, describe_end, explain_end, judge
from ._goridge import encode_job
from ._map import Results, open_map
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

    def __init__(self, config: Config, nursery: trio.Nursery, observer: Observer | None) -> None:
        self.config = config
        self.roster = Roster(
            config.num_workers,
            clock=trio.current_time,
            wall=time.time,
            restart=config.restart,
            max_executions=config.max_executions,
            max_queue=config.max_queue,
        )
        self.exchange = Exchange(
            self.roster,
            self._carry_out,
            self._start_task,
            self._explain,
            allocate_timeout=config.allocate_timeout,
            destroy_timeout=config.destroy_timeout,
        )
        self.codec = PayloadCodec(config)
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
        self.supervision = Supervision(self.config, self.roster, self._carry_out, spawner)
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
            self.fail(context if isinstance(context, SpawnError) else _as_spawn_error(context))

    def _log_end(self, seat: Seat) -> None:
        name, pid, job = self.config.name, seat.worker.pid, seat.cancelled
        if job is None:
            _log.debug("%s[%d] %s: stopping (%s)", name, seat.slot, pid, seat.reason, extra=self._extra(seat))
        else:
            what = "a job" if job.label is None else f"the job {job.label!r}"
            age = trio.current_time() - job.started
            _log.info("%s[%d] %s: killed, for %s was cancelled after %.3f s", name, seat.slot, pid, what, age,
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
        what = "" if job.label is None else f" for the job {job.label!r}"
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


def _as_spawn_error(error: WorkerError) -> SpawnError:
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


class PayloadCodec:
    """Turns payloads into frames and answers into payloads: what `Pool` puts on top of a core."""

    def __init__(self, config: Config) -> None:
        self._protocol = config.protocol
        # The sizes of goridge-3 are 32 bits wide, those of the older dialects 64.
        self._limit = min(config.max_frame_size, 2**32 - 1) if config.protocol == "goridge-3" else config.max_frame_size

    def encode(self, payload: object) -> tuple[bytes | memoryview, ...]:
        """Turn a payload into frames, or raise an error before any worker is taken."""
        if not isinstance(payload, Payload):
            raise TypeError(f"a job must be a Payload, such as Payload(b'...'), not {type(payload).__name__}")
        body, context = payload.body, payload.context
        if len(body) + len(context) > self._limit:
            self._check_frames(len(body), len(context))
        return encode_job(self._protocol, context, body)

    def _check_frames(self, body: int, context: int) -> None:
        # In goridge-3 both are one frame, in the older dialects one each.
        largest = body + context if self._protocol == "goridge-3" else max(body, context)
        if largest > self._limit:
            raise ValueError(f"a job of {largest:,} bytes is larger than Config.max_frame_size ({self._limit:,})")


def check_label(label: object) -> str | None:
    """Return the label, or raise an error that names it."""
    if label is not None and not isinstance(label, str):
        raise TypeError(f"label must be a str or None, not {type(label).__name__}")
    return label


def decode(answer: Answer) -> Payload:
    """Turn an answer into a payload."""
    return Payload(answer.body, answer.context)


@asynccontextmanager
async def open_core(config: Config, observer: Observer | None) -> AsyncGenerator[PoolCore]:
    """Open a pool core, and end it with the block."""
    failure: BaseException | None = None
    core: PoolCore | None = None
    try:
        async with trio.open_nursery() as nursery:
            core = PoolCore(config, nursery, observer)
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


class Pool:
    """A pool of worker processes. You get one from `open_pool`."""

    _core: PoolCore

    def __init__(self) -> None:
        raise TypeError("Pool has no public constructor; use open_pool")

    @classmethod
    def _create(cls, core: PoolCore) -> "Pool":
        self = object.__new__(cls)
        self._core = core
        return self

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<Pool {self.config.name!r}: {len(self.workers)} workers, {now.idle} idle, {now.busy} busy, "
            f"{now.starting} starting, {now.leased} leased, {now.stopping} stopping; {now.waiting} callers waiting>"
        )

    @property
    def config(self) -> Config:
        """What the pool is made of."""
        return self._core.config

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every worker known, from spawn to reap, by slot; two with one slot while one replaces the other."""
        return self._core.workers

    def statistics(self) -> PoolStatistics:
        """Look at the pool, as it is now."""
        return self._core.statistics()

    @trio.lowlevel.enable_ki_protection
    async def exec(self, payload: Payload, *, label: str | None = None) -> Payload:
        """Run one job on whichever worker is free first, and return its reply.

        `label` names the job in `Worker.current`, logs and errors.

        Raise `JobError` where the job fails; `WorkerCrashed` or `RelayError` where its worker does (see
        `WorkerError.started`); `WorkerError` where workers kept asking to be replaced instead; `AllocateTimeout` after
        `Config.allocate_timeout` of waiting; `QueueFull`; `trio.ClosedResourceError` where the pool is closed. A
        payload over `Config.max_frame_size` is a `ValueError`, anything but a `Payload` a `TypeError`.

        Cancelling takes a waiting job out of the queue. A running one ends with its worker, which is killed and
        replaced, unless the whole reply is already there.
        """
        core = self._core
        answer = await core.exchange.run(Job(core.codec.encode(payload), check_label(label)))
        return Payload(answer.body, answer.context)

    def stream(self, payload: Payload, *, label: str | None = None) -> Parts[Payload]:
        """Run one job and take its reply in parts, an async iterator: `async with pool.stream(payload) as parts`.

        Entering waits for a worker and sends the job; it raises what `exec` raises before a job starts. Each part is a
        `Payload`; a job error comes out of the iteration. Nothing is read ahead: a slow consumer holds the worker back.

        Leaving early by `break`, return or an error asks the worker to end the stream, and a task of the pool reads on
        to the last frame within `Config.destroy_timeout`; past that the worker is killed. Leaving by a cancel kills it
        at once. In goridge-1 and -2 a reply has one part.
        """
        core = self._core
        return Parts[Payload]._create(core.exchange, Job(core.codec.encode(payload), check_label(label)), decode)  # pyright: ignore[reportPrivateUsage]

    @overload
    def map(
        self,
        payloads: Iterable[Payload] | AsyncIterable[Payload],
        *,
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> AbstractAsyncContextManager[Results[Payload]]: ...

    @overload
    def map(
        self,
        payloads: Iterable[Payload] | AsyncIterable[Payload],
        *,
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: bool,
    ) -> AbstractAsyncContextManager[Results[Payload | Exception]]: ...

    def map(
        self,
        payloads: Iterable[Payload] | AsyncIterable[Payload],
        *,
        ordered: bool = True,
        window: int | None = None,
        return_exceptions: bool = False,
    ) -> AbstractAsyncContextManager[Results[Payload]] | AbstractAsyncContextManager[Results[Payload | Exception]]:
        """Run a job for each payload of a source, as an async iterator: `async with pool.map(payloads) as replies`.

        The source may be sync or async, and endless: at most `window` items (default: two for each worker) are taken
        from it and not delivered yet. Replies come in the order of the source, or as they are ready with
        `ordered=False`.

        A job's error is raised where its reply would have come, and ends the map; with `return_exceptions=True` it is
        delivered in that place instead, and the map goes on. An error of the source comes out as itself, after all
        results before it. Leaving the block closes the source (if it is a generator), and cancels the jobs still
        running.

        Its jobs wait for their turn inside the map: at most one for each worker is with the pool, and only then
        `Config.allocate_timeout` counts. `Config.max_queue` does not count them.
        """
        core = self._core
        workers = core.roster.target
        if window is None:
            window = 2 * workers
        block = open_map(
            self._exec_patiently,
            payloads,
            ordered=ordered,
            window=window,
            width=workers,
            return_exceptions=return_exceptions,
        )
        return Block(block, "map")

    @trio.lowlevel.enable_ki_protection
    async def _exec_patiently(self, payload: Payload) -> Payload:
        core = self._core
        job = Job(core.codec.encode(payload))
        job.patient = True
        return decode(await core.exchange.run(job))

    def lease(self, *, label: str | None = None) -> "Lease":
        """Have one worker to yourself: `async with pool.lease() as worker: await worker.exec(...)`.

        Queued as one job, with the errors of one. `Config.max_executions` is looked at when the lease ends. A worker
        that asks to be replaced inside is a `WorkerError` with phase "retiring". Cancelling inside kills the worker if
        a job runs on it.
        """
        return Lease._create(self._core, Job((), check_label(label), lease=True))  # pyright: ignore[reportPrivateUsage]


class Lease:
    """One worker to oneself, for the time of an `async with`."""

    _core: PoolCore
    _job: Job
    _entered: bool

    def __init__(self) -> None:
        raise TypeError("Lease has no public constructor; use Pool.lease")

    @classmethod
    def _create(cls, core: PoolCore, job: Job) -> "Lease":
        self = object.__new__(cls)
        self._core = core
        self._job = job
        self._entered = False
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Worker:
        exchange, job = self._core.exchange, self._job
        if self._entered:
            raise RuntimeError("a lease can be entered only once; call lease() again for another")
        self._entered = True
        await trio.lowlevel.checkpoint()
        exchange.enter(job)
        await exchange.wait_for_worker(job)
        exchange.hang_up(job)
        job.bound = True  # entered: from now on the worker's end is the holder's affair
        assert job.seat is not None
        return job.seat.worker

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._core.release(self._job)


def open_pool(config: Config, *, observer: Observer | None = None) -> AbstractAsyncContextManager[Pool]:
    """Open a pool of workers: `async with open_pool(config) as pool: ...`.

    Yields when all workers are ready; they are booted side by side, about twice the cores at a time. The first that
    does not become ready ends the opening with its `SpawnError`.

    `observer(event, worker, context)` is called in the trio thread, in order, after each change is complete: see
    `WorkerEvent`. One that raises is logged and does no harm.

    Left normally: jobs accepted so far finish, later ones get `trio.ClosedResourceError`, then the workers get the stop
    frame, `Config.destroy_timeout` and SIGKILL. Left by an exception or a cancel: the workers are killed at once. An
    exception leaves as it is. `RestartLimitExceeded` leaves the block when the pool gives up (`Restart.give_up_after`).
    """
    _check(config, observer)

    @asynccontextmanager
    async def block() -> AsyncGenerator[Pool]:
        async with open_core(config, observer) as core:
            yield Pool._create(core)  # pyright: ignore[reportPrivateUsage]

    return Block(block(), "open_pool")


def open_worker(config: Config, *, observer: Observer | None = None) -> AbstractAsyncContextManager[Worker]:
    """Start a single worker, to oneself: `async with open_worker(config) as worker`, then `await worker.exec(payload)`.

    It is not replaced: once it is gone, `exec` raises what it ended with. `Config.num_workers` is not looked at.
    Otherwise like `open_pool`.
    """
    _check(config, observer)

    @asynccontextmanager
    async def block() -> AsyncGenerator[Worker]:
        async with open_core(attrs.evolve(config, num_workers=1), observer) as core:
            job = Job((), "open_worker", lease=True)
            core.exchange.enter(job)
            if job.seat is None:  # it shook hands and died in the same moment
                core.exchange.abandon(job)
                raise _as_spawn_error(core.last_error or WorkerError("the worker died before it could be used"))
            job.bound = True
            core.take_no_more()  # so nothing is healed either
            try:
                yield job.seat.worker
            finally:
                core.release(job)

    return Block(block(), "open_worker")


def _check(config: object, observer: object) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, not {type(config).__name__}")
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be callable, not {type(observer).__name__}")
    if inspect.iscoroutinefunction(observer):
        raise TypeError("observer must be a plain function, not an async one: it is called in the middle of a change")
