"""The core of every kind of pool: carries out what the roster decides, in a nursery that owns every worker.

`PoolCore` has a roster, an exchange, a supervision, and one synchronous function, `_carry_out`, that turns the roster's
actions into writes, wake-ups, tasks and signals. Jobs are frames here; what they mean is a codec's business.

The block. A nursery stands around everything, but nothing of the user's ever enters it: what leaves the block is caught
in front of the nursery, the workers are stopped or killed, the nursery ends, and then it is raised again as it was, so
that a user's exception is never wrapped in a group.
"""

import contextvars
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar, cast

import attrs
import trio

from . import _platform
from ._codec import Codec, check_label, decode
from ._config import Config
from ._errors import (
    AllocateTimeout,
    JobTimeout,
    QueueFull,
    RestartLimitExceeded,
    SpawnError,
    TrioWorkersInternalError,
    WorkerError,
    WorkersError,
    afresh,
    first_of,
    more_urgent,
)
from ._exchange import MIB, Ending, Exchange, Parts, describe_end, explain_end, explain_timeout, judge, named
from ._factories import Factory, Spawner
from ._model import JobRecord, Payload, WorkerEvent, WorkerState, record_of
from ._roster import MOST_AHEAD, Roster
from ._seats import (
    ASSIGNED,
    GONE,
    LEND,
    NEVER,
    SERVING,
    STOPPING,
    WAITING,
    Action,
    Begin,
    Change,
    Drained,
    Emit,
    End,
    Excess,
    GiveUp,
    Job,
    Kill,
    Lend,
    Phase,
    Plan,
    Recall,
    Retire,
    Seat,
    Settled,
    Spawn,
    TakeBack,
    Wake,
)
from ._supervise import GRACE, Source, Supervision, call_user, extra
from ._worker import CurrentJob, Worker, WorkerStatus

T = TypeVar("T")
Observer = Callable[[WorkerEvent, Worker | None, object], None]
JobObserver = Callable[[JobRecord], None]


class Meter(Protocol):
    """Sees each job's end: `now` is when that was, where it has been read already."""

    def __call__(self, job: Job, outcome: str, calls: int, now: float | None = None) -> None: ...


READ_MEMORY_EVERY: Final = 1.0
"""Seconds between two readings of the workers' memory: RoadRunner's supervisor looks as often."""

_log = logging.getLogger("trio_workers.pool")


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A pool at one moment. `idle + busy + starting + leased + stopping` is the number of `Pool.workers`."""

    target: int
    """How many workers there should be now: as many as were asked for, and those that the pool has grown by."""
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
    """Callers that wait for a worker, with `Config.debug` also those whose process comes up."""
    longest_wait: float
    """For how long the first of them has waited, in seconds."""
    accepting: bool
    """Whether a job that is handed in now would be taken: the pool is open, and its queue is not full."""
    closed: bool
    """Whether the pool takes no more jobs for good: its block is being left, or has been."""
    jobs: Mapping[str, int]
    """Jobs that have ended, by outcome: replied, failed, crashed, relay_error, retired, memory, job_timeout,
    allocate_timeout, queue_full, boot_failed (with `Config.debug`), closed, cancelled."""
    starts: int
    """Workers started, successfully or not."""
    failed_starts: int
    """Workers that never became ready."""
    failed_in_a_row: int
    """How many starts have failed one after the other up to now, in the whole pool."""
    exits: Mapping[str, int]
    """Workers that have ended, by reason."""
    restarts: Mapping[int, int]
    """By slot, how many workers were started there after the first."""
    memory: Mapping[int, int]
    """By slot, how many bytes of memory its worker had resident when it was last looked at; only where `Limits` set a
    bound to it."""


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

    def __init__(
        self,
        config: Config,
        codec: Codec,
        nursery: trio.Nursery,
        observer: Observer | None,
        job_observer: JobObserver | None,
        *,
        latest_first: bool = False,
    ) -> None:
        self.config = config
        self._clock = trio.lowlevel.current_clock().current_time
        self.roster = Roster(
            config.num_workers,
            _plan(Source(config, codec)),
            clock=self._clock,
            wall=time.time,
            latest_first=latest_first,
        )
        self.exchange = Exchange(
            self.roster,
            self._carry_out,
            self._start_task,
            self._explain,
            codec.failure,
            config,
        )
        self.supervision = Supervision(self.roster, self._carry_out, codec.failure)
        self.body_scope = trio.CancelScope()
        self.failure: BaseException | None = None
        self.last_spawn_error: SpawnError | None = None
        self.last_error: WorkerError | None = None
        self._nursery = nursery
        # Else a worker's task had the variables of whoever made it start, a request of long ago, and so had its log.
        self._context = contextvars.copy_context()
        self._observers: tuple[Observer, ...] = () if observer is None else (observer,)
        self._job_observers: tuple[JobObserver, ...] = ()
        self._meter: Meter | None = None
        if job_observer is not None:
            self.add_job_observer(job_observer)
        self._spawners: list[tuple[Factory, Spawner]] = []
        self._changing = trio.Lock()
        self._resizes = 0
        self._read_memory_at = math.inf
        self._opened = trio.Event()
        self._drained = trio.Event()
        self._house = trio.CancelScope(shield=True)  # `close` ends it: a body that is shielded still needs its workers
        self._nap = trio.CancelScope()
        self._carrying = False
        self._now: deque[Begin | Lend | TakeBack | Recall | Wake | Spawn | Drained] = deque()
        self._emits: deque[Emit | GiveUp | Settled] = deque()
        self._ends: deque[Retire | Kill] = deque()

    def __repr__(self) -> str:
        return f"<PoolCore {self.config.name!r}: {self.roster!r}>"

    # the block

    async def open(self) -> None:
        """Start the workers, side by side, and wait until all are ready. Raise the first `SpawnError`."""
        source: Source = self.roster.plan.source
        source.spawner = await self._open_factory(self.config)
        self._follow_plan()
        self._nursery.start_soon(self._keep_house)
        self._carry_out(self.roster.open())
        if self.config.debug:
            self._opened.set()
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
        while self._spawners:
            self._spawners.pop()[1].close()

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

    # changes

    async def reset(self, config: Config | None = None, codec: Codec | None = None) -> None:
        """Replace every worker, by one of this config where one is given, with its codec."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        resizes = self._resizes
        async with self._changing:  # a factory may take its time to open; the later call wins
            self._check_open()
            if config is None or codec is None:
                plan, size = attrs.evolve(self.roster.plan), None
            else:
                spawner = await self._open_factory(config)
                if self.roster.phase is not Phase.OPEN:
                    self._close_unused_spawners()
                self._check_open()
                plan = _plan(Source(config, codec, spawner))
                # A resize that was asked for while the factory opened is the later call.
                size = config.num_workers if resizes == self._resizes else self._size_to_be
            change, actions = self.roster.reset(plan, size)
            self._begin_change(change, actions)
        await self._wait_for_change(change)

    async def resize(self, size: object) -> None:
        """Have this many workers."""
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"num_workers must be an int, not {type(size).__name__}")
        if size < 1:
            raise ValueError(f"num_workers must be at least 1, not {size}")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        self._resizes += 1
        change, actions = self.roster.resize(size)
        self._begin_change(change, actions)
        await self._wait_for_change(change)

    @property
    def _size_to_be(self) -> int:
        """How many workers were asked for last."""
        change = self.roster.change
        return change.new_size if change else self.roster.size

    def _begin_change(self, change: Change, actions: Iterable[Action]) -> None:
        if change.bell is None:
            change.bell = trio.Event()
        self._follow_plan()
        self._carry_out(actions)

    async def _wait_for_change(self, change: Change) -> None:
        await change.bell.wait()
        if change.closed:
            raise self._closed()
        if change.failed is not None:
            error = change.failed.fault
            assert isinstance(error, SpawnError)
            raise afresh(error)

    def _end_change(self, change: Change) -> None:
        change.bell.set()
        if (failed := change.failed) is not None:
            name = self.config.name
            _log.warning(
                "%s: a new worker did not boot, so the pool goes back to what it was", name, extra=extra(failed)
            )

    def _check_open(self) -> None:
        if self.roster.phase is not Phase.OPEN:
            raise self._closed()

    def _follow_plan(self) -> None:
        """Go by the config that is now the pool's."""
        source: Source = self.roster.plan.source
        config, size = source.config, self._size_to_be
        if size != config.num_workers:
            most = None if config.max_workers is None else max(size, config.max_workers)
            config = attrs.evolve(config, num_workers=size, max_workers=most)
        self.config = self.exchange.config = config
        plans = [self.roster.plan, *(seat.plan for seat in self.roster.seats)]  # those of before keep their bounds
        if not any(plan.limits.bounds_memory for plan in plans):
            self._read_memory_at = math.inf
        elif self._read_memory_at == math.inf:
            self._read_memory_at = trio.current_time() + READ_MEMORY_EVERY

    async def _open_factory(self, config: Config) -> Spawner:
        """Open a factory, unless it is open: an equal one has the same address."""
        if config.limits.bounds_memory:
            _platform.HERE.check_memory()
        for factory, spawner in self._spawners:
            if factory == config.factory:
                await trio.lowlevel.checkpoint()
                return spawner
        try:
            spawner = await config.factory.open(self._nursery)
        except Exception as error:
            if self.roster.phase is not Phase.OPEN:
                raise self._closed() from error  # what went wrong is that the pool's nursery is closed
            raise
        self._spawners.append((config.factory, spawner))
        return spawner

    def _close_unused_spawners(self) -> None:
        """Let go of factories that no worker came from, or will."""
        plans = [self.roster.plan, *(seat.plan for seat in self.roster.seats)]
        if self.roster.change is not None:
            plans.append(self.roster.change.plan)
        used = [plan.source.spawner for plan in plans]
        for entry in [entry for entry in self._spawners if entry[1] not in used]:
            self._spawners.remove(entry)
            entry[1].close()

    # carrying out

    def _carry_out(self, actions: Iterable[Action]) -> None:
        """Do what the roster has decided. Synchronous, whoever calls it.

        First what jobs wait for, then observers and the log, when the change is complete; signals last, so that a
        DESTRUCT is told before the process is ended. Actions that arise on the way (a write that fails, say) join the
        queue of the outermost call.
        """
        if actions is LEND and not self._carrying:
            self.exchange.lend()  # the way of every job that waits
            return
        now = self._now
        for action in actions:
            if type(action) in _AT_ONCE:
                now.append(action)  # type: ignore[arg-type]
            elif isinstance(action, Emit | GiveUp | Settled):
                if isinstance(action, Settled):
                    self._follow_plan()  # before anybody is told
                self._emits.append(action)
            elif isinstance(action, Retire | Kill):
                self._ends.append(action)
        if self._carrying:
            return
        self._carrying = True
        try:
            while now or self._emits or self._ends:
                if now:
                    self._do(now.popleft())
                elif self._emits:
                    emit = self._emits.popleft()
                    if isinstance(emit, GiveUp):
                        self._give_up(emit.seat)  # after the error that it is the last of
                    elif isinstance(emit, Settled):
                        self._end_change(emit.change)  # likewise
                    else:
                        self._emit(emit)
                else:
                    self._end_worker(self._ends.popleft())
        finally:
            self._carrying = False
        if len(self._spawners) > 1 and not self._changing.locked():
            self._close_unused_spawners()
        deadline = min(self.roster.next_deadline(), self._read_memory_at)
        if deadline != self._nap.deadline:
            self._nap.deadline = deadline

    def _do(self, action: Begin | Lend | TakeBack | Recall | Wake | Spawn | Drained) -> None:
        # By the type, the usual ones first: this is on the way of every job that waits.
        if type(action) is Lend:
            self.exchange.lend()
        elif type(action) is Wake:
            self.exchange.ring(action.job)
        elif type(action) is Begin:
            job = action.job
            if job.state is ASSIGNED and not job.lease:
                self.exchange.begin(job)
            self.exchange.ring(job)
        elif type(action) is TakeBack:
            self.exchange.take_back(action.seat)
        elif type(action) is Recall:
            self.exchange.recall(action.seat)
        elif type(action) is Spawn:
            seat = action.seat
            seat.worker = Worker._create(self, seat.slot, seat)  # pyright: ignore[reportPrivateUsage]
            name = f"trio_workers {seat.plan.source.config.name}[{seat.slot}]"
            self._context.run(lambda: self._nursery.start_soon(self.supervision.supervise, seat, name=name))
        else:
            self._drained.set()

    def _give_up(self, seat: Seat) -> None:
        name, limit = self.config.name, self.config.restart.give_up_after
        error = RestartLimitExceeded(
            f"the pool {name!r} gives up: {limit} boots in a row have failed. The last: {self.last_spawn_error}"
        )
        error.__cause__ = self.last_spawn_error
        _log.error(
            "%s: gives up after %d failed boots in a row", name, limit, extra={**extra(seat), "reason": "gave up"}
        )
        self.fail(error)

    def _end_worker(self, action: Retire | Kill) -> None:
        seat = action.seat
        worker = seat.worker
        if isinstance(action, Kill) and not action.grace:
            worker.kill_now()
        elif isinstance(action, Kill):
            worker.kill_after(GRACE)
        else:
            destroy_timeout = seat.plan.source.config.destroy_timeout
            if worker.line is not None and destroy_timeout > 0:
                worker.line.stop_worker()
            worker.kill_after(destroy_timeout)

    def _emit(self, emit: Emit) -> None:
        """Tell the log and the observer."""
        seat = emit.seat
        context: object = emit.context
        name, worker = seat.plan.source.config.name, seat.worker
        if emit.event is WorkerEvent.CREATED:
            _log.debug("%s: ready", _named(seat), extra=extra(seat))
            if not self._opened.is_set() and self._all_ready():
                self._opened.set()
        elif emit.event is WorkerEvent.DESTRUCT:
            self._log_end(seat)
        else:
            context = self._describe_error(seat)
            if isinstance(context, WorkerError):
                self.last_error = context
            _log.warning("%s: %s%s", _named(seat), context, _tail(context), extra=extra(seat))
        for observer in (observers := self._observers):
            if observers is not self._observers and observer not in self._observers:
                continue  # one that was called before has removed it
            try:
                call_user(observer, emit.event, worker, context)
            except Exception:
                _log.exception("%s: the observer raised an exception, which is ignored", name, extra=extra(seat))
            except BaseException as error:
                self.fail(error)
        if emit.event is WorkerEvent.ERROR and not self._opened.is_set() and isinstance(context, WorkerError):
            self.fail(context if isinstance(context, SpawnError) else as_spawn_error(context))

    def _log_end(self, seat: Seat) -> None:
        job = seat.cancelled
        if job is None:
            reason = seat.reason
            if reason == "max_memory":
                reason += f", {seat.memory / MIB:.0f} MiB"
            _log.debug("%s: stopping (%s)", _named(seat), reason, extra=extra(seat))
        else:
            age = trio.current_time() - job.started
            _log.info("%s: killed, for %s was cancelled after %.3f s", _named(seat), named(job), age, extra=extra(seat))

    def _all_ready(self) -> bool:
        return (
            sum(1 for seat in self.roster.seats if seat.announced and seat.state is not STOPPING) >= self.roster.target
        )

    def _tell_of_job(self, job: Job, outcome: str, calls: int) -> None:
        """Tell the meter, and the job observers, how a job went; of so many calls where it is a chunk."""
        now = self._clock()
        if self._meter is not None:
            self._meter(job, outcome, calls, now)
        started = None if job.started == NEVER else job.started
        queued = job.handed_in
        if queued == NEVER:
            queued = now if started is None else started
        seat = job.seat
        slot = pid = None
        if seat is not None:
            slot, pid = seat.slot, seat.worker.pid
        for _ in range(calls):
            record = record_of(job.label, slot, pid, queued, started, now, outcome)
            for job_observer in (job_observers := self._job_observers):
                if job_observers is not self._job_observers and job_observer not in self._job_observers:
                    continue  # one that was called before has removed it
                try:
                    _tell_one(job_observer, record)
                except Exception:
                    name = self.config.name
                    about = {"pool": name, "slot": slot, "pid": pid, "reason": outcome}
                    _log.exception("%s: the job observer raised an exception, which is ignored", name, extra=about)
                except BaseException as error:
                    self.fail(error)

    def _describe_error(self, seat: Seat) -> WorkersError:
        if isinstance(seat.fault, SpawnError):
            self.last_spawn_error = seat.fault
            return seat.fault
        if not seat.announced:
            return SpawnError(
                f"worker (slot {seat.slot}) never became ready", slot=seat.slot, phase="spawn", started=False
            )
        worker = seat.worker
        ending = seat.ending
        if not isinstance(ending, Ending):
            ending = Ending(None, "" if worker.process is None else worker.process.stderr_tail)
        if worker.failure is not None:
            return worker.failure
        if worker.line is not None:
            judge(seat, worker.line, dead=False)
        excess = seat.fault
        if isinstance(excess, Excess) and excess.job is not None:
            return explain_timeout(seat, excess.job, excess, ending.stderr)
        return describe_end(seat, ending)

    @trio.lowlevel.enable_ki_protection
    async def _keep_house(self) -> None:
        """Write what has been lent, at the end of each pass; and do what the roster has to do by the clock."""
        with self._house:
            while True:
                deadline = min(self.roster.next_deadline(), self._read_memory_at)
                with trio.CancelScope(deadline=deadline) as self._nap:
                    await self.exchange.flush_when_asked()
                if trio.current_time() >= self._read_memory_at:
                    self._read_memory_at = trio.current_time() + READ_MEMORY_EVERY
                    self._carry_out(self.roster.measured(self._read_memory()))
                self._carry_out(self.roster.tick())

    def _read_memory(self) -> dict[Seat, int]:
        """Read the memory of all workers that are ready."""
        memory: dict[Seat, int] = {}
        for seat in self.roster.seats:
            if (
                seat.announced
                and seat.plan.limits.bounds_memory
                and (figure := seat.worker.resident_memory()) is not None
            ):
                memory[seat] = figure
        return memory

    def _start_task(self, function: Callable[..., Any], *args: Any) -> None:
        self._context.run(self._nursery.start_soon, function, *args)

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
            return self._closed()
        return explain_end(job)

    def _closed(self) -> trio.ClosedResourceError:
        if isinstance(self.failure, RestartLimitExceeded):
            error = trio.ClosedResourceError(str(self.failure))
            error.__cause__ = self.failure
            return error
        return trio.ClosedResourceError(f"the pool {self.config.name!r} is closed")

    def _allocate_timeout(self, job: Job) -> AllocateTimeout:
        now = self.statistics()
        what = "" if job.label is None else f" for {named(job)}"
        to_try = self._slots_to_try()
        again = f"{to_try} {'waits' if to_try == 1 else 'wait'} to be tried again, " if to_try else ""
        text = (
            f"no worker of the pool {self.config.name!r} became free{what} within allocate_timeout "
            f"({self.config.allocate_timeout:g} s): of {now.target} workers {now.busy} are busy, "
            f"{now.starting} starting, {now.leased} leased, {now.stopping} stopping, {again}"
            f"and {now.waiting} callers wait; the job did not start"
        )
        failed = self.roster.failed_in_a_row
        if failed and self.last_spawn_error is not None:
            starts = "start" if failed == 1 else f"{failed} starts"
            text += f". The last {starts} of a worker failed: {self.last_spawn_error}"
        error = AllocateTimeout(text)
        error.last_spawn_error = self.last_spawn_error if failed else None
        return error

    def _slots_to_try(self) -> int:
        """How many slots have no worker at all, since a start failed and the next has to wait."""
        if self.config.debug:
            return 0  # no slot has a worker of its own
        return self.roster.target - len({seat.slot for seat in self.roster.seats if seat.slot < self.roster.target})

    def add_observer(self, observer: Observer) -> None:
        """Tell this one, too, of workers."""
        self._observers += (observer,)

    def remove_observer(self, observer: Observer) -> None:
        """Tell it no more."""
        self._observers = _without(self._observers, observer, "an observer")

    def add_job_observer(self, job_observer: JobObserver) -> None:
        """Tell this one, too, of jobs."""
        self._job_observers += (job_observer,)
        self._tell_whom_it_concerns()

    def remove_job_observer(self, job_observer: JobObserver) -> None:
        """Tell it no more; where there is none left, jobs cost nothing more."""
        self._job_observers = _without(self._job_observers, job_observer, "a job observer")
        self._tell_whom_it_concerns()

    def measure_jobs(self, meter: Meter | None) -> None:
        """Call `meter(job, outcome, calls)` at each job's end, and make no record for it: that costs as much again.

        It is one of ours, that is short and does not raise.
        """
        self._meter = meter
        self._tell_whom_it_concerns()

    def _tell_whom_it_concerns(self) -> None:
        # Nothing stands between a job's end and a meter that is alone.
        self.exchange.tell = self._tell_of_job if self._job_observers else self._meter

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every worker known, from spawn to reap, by slot."""
        return tuple(
            seat.worker for seat in sorted(self.roster.seats, key=lambda seat: seat.slot) if hasattr(seat, "worker")
        )

    def statistics(self) -> PoolStatistics:
        """Look at the pool."""
        roster = self.roster
        seats = Counter(map(_status_of, roster.seats))
        return PoolStatistics(
            target=roster.target, idle=seats["idle"], busy=seats["busy"], starting=seats["starting"],
            leased=seats["leased"], stopping=seats["stopping"],
            waiting=roster.waiting, longest_wait=roster.longest_wait, accepting=roster.accepting,
            closed=roster.phase is not Phase.OPEN,
            jobs=dict(roster.outcomes), starts=roster.starts.total(), failed_starts=roster.failed_starts,
            failed_in_a_row=roster.failed_in_a_row, exits=dict(roster.exits),
            restarts={slot: max(0, roster.starts[slot] - 1) for slot in range(roster.target)},
            memory={seat.slot: seat.memory for seat in roster.seats if seat.memory},
        )  # fmt: skip

    def job(self, payload: Payload, label: str | None = None) -> Job:
        """Make a job of a payload, or raise an error that says why it can't be."""
        codec: Codec = self.roster.plan.source.codec
        job = Job(codec.encode(payload), label if label is None else check_label(label), dialect=codec.dialect)
        job.payload = payload
        return job

    @property
    def window(self) -> int:
        """How many items a map may have taken and not delivered, where nothing else is said."""
        return 2 * max(self.roster.target, self.config.max_workers or 0)

    def width(self) -> int:
        """How many jobs a map may have with the pool now: one for each worker, and one to show that it should grow."""
        return self.roster.target + self.roster.may_grow

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

    def status_of(self, worker: Worker) -> WorkerStatus:
        """What it is at, in the words of `PoolStatistics`."""
        return _status_of(worker.seat)

    def age_of(self, worker: Worker) -> float:
        """Seconds since it was started."""
        seat: Seat = worker.seat
        return self._clock() - seat.spawned_at

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
        return decode(await self.exchange.run(self.job(payload, label), worker.seat))

    def stream_on(
        self, worker: Worker, payload: Payload, label: str | None
    ) -> AbstractAsyncContextManager[Parts[Payload]]:
        """Stream a job on a worker that the caller has to himself."""
        job = self.job(payload, label)
        return Parts[Payload]._create(self.exchange, job, decode, worker.seat)  # pyright: ignore[reportPrivateUsage]


def _status_of(seat: Seat) -> WorkerStatus:
    if seat.state is STOPPING:
        return "stopping"
    if seat.state is GONE:
        return "gone"
    if seat.state is not SERVING:
        return "starting"
    if seat.lease is not None:
        return "leased"
    return "busy" if seat.jobs else "idle"


@trio.lowlevel.disable_ki_protection
def _tell_one(job_observer: JobObserver, record: JobRecord) -> None:
    """Call it as `call_user` does, in half the time."""
    job_observer(record)


def _without(observers: tuple[T, ...], observer: T, what: str) -> tuple[T, ...]:
    if observer not in observers:
        raise ValueError(f"{observer!r} is not {what} of this pool")
    place = observers.index(observer)
    return observers[:place] + observers[place + 1 :]


_AT_ONCE: Final = frozenset((Begin, Lend, TakeBack, Recall, Wake, Spawn, Drained))


def _plan(source: Source) -> Plan:
    config, recalls = source.config, source.codec.recalls
    return Plan(
        restart=config.restart,
        limits=config.limits,
        max_executions=config.max_executions,
        max_queue=config.max_queue,
        max_workers=config.max_workers,
        grow_after=config.grow_after,
        allocate_timeout=config.allocate_timeout,
        debug=config.debug,
        read_ahead=MOST_AHEAD + 1 if recalls else config.read_ahead,
        recalls=recalls,
        source=source,
    )


def _named(seat: Seat) -> str:
    """Name a worker at the beginning of a log line; one that could not be started has no pid."""
    name, pid = seat.plan.source.config.name, seat.worker.pid
    return f"{name}[{seat.slot}]" if pid is None else f"{name}[{seat.slot}] {pid}"


def _tail(error: object) -> str:
    stderr = error.stderr if isinstance(error, WorkerError | JobTimeout) else ""
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
    config: Config,
    codec: Codec,
    observer: Observer | None,
    job_observer: JobObserver | None = None,
    *,
    latest_first: bool = False,
) -> AsyncGenerator[PoolCore]:
    """Open a pool core, and end it with the block.

    `latest_first`: of several free workers the one that was at work last is taken, whose code and data are still in the
    processor's caches, instead of all in turn.
    """
    failure: BaseException | None = None
    core: PoolCore | None = None
    try:
        async with trio.open_nursery() as nursery:
            core = PoolCore(config, codec, nursery, observer, job_observer, latest_first=latest_first)
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
