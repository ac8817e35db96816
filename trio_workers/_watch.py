"""Facts of a running pool for those who look at it from outside: control socket, command line, page and metrics.

All of them look through one `PoolWatch`, so that a job is counted once however many look on. It stands on the pool's
public methods, but for the durations of jobs: for those the core has a way that makes no record.
"""

import contextlib
import math
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator
from itertools import accumulate
from typing import Final, TypedDict
from weakref import WeakKeyDictionary

import attrs
import trio

from . import _platform
from ._config import Config
from ._core import PoolCore
from ._errors import SpawnError
from ._model import WorkerEvent
from ._pool import Pool
from ._python_pool import PythonPool
from ._seats import NEVER, Job
from ._worker import Worker

AnyPool = Pool | PythonPool

BOUNDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of the buckets, in seconds: from a tiny job's 50 µs to the default `allocate_timeout`."""

_SHORT: Final = BOUNDS[0]

DEATHS_KEPT: Final = 50
"""The last ends of workers that are kept, for a page and a terminal to show."""


class JobFact(TypedDict):
    """The job that a worker is on."""

    label: str | None
    age: float


class DeathFact(TypedDict):
    """How a worker ended. `at` is Unix time; `error` what it died of, None where it ended by plan."""

    at: float
    slot: int
    pid: int | None
    reason: str
    error: str | None


class WorkerFact(TypedDict):
    """A worker at one moment: seconds, bytes, and None for what can't be known."""

    slot: int
    pid: int | None
    status: str
    jobs: int
    job: JobFact | None
    memory: int | None
    cpu: float | None
    uptime: float
    restarts: int
    last_death: DeathFact | None


class PoolFact(TypedDict):
    """A pool at one moment: `PoolStatistics`, and who it is. `pid` is the pool's own process; `at` is Unix time."""

    pool: str
    pid: int
    at: float
    accepting: bool
    closed: bool
    target: int
    idle: int
    busy: int
    starting: int
    leased: int
    stopping: int
    waiting: int
    longest_wait: float
    jobs: dict[str, int]
    starts: int
    failed_starts: int
    failed_in_a_row: int
    exits: dict[str, int]


class Histogram:
    """Durations in buckets: one comparison and two additions for each that is short, a search for the others."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def cumulative(self) -> list[tuple[float, int]]:
        """Return (upper bound, durations up to it) by rising bound, the last of them infinite."""
        return list(zip((*BOUNDS, math.inf), accumulate(self.counts), strict=True))


@attrs.define(eq=False)
class PoolWatch:
    """What has been seen of one pool since somebody first looked. You get it from `watch_pool`."""

    deaths: deque[DeathFact] = attrs.field(factory=lambda: deque(maxlen=DEATHS_KEPT))
    """The last ends of workers, the oldest first."""
    last_death: dict[int, DeathFact] = attrs.field(factory=dict[int, DeathFact])
    """By slot, how the last worker there ended."""
    last_spawn_error: str | None = None
    """What the last worker that did not become ready said."""
    events: int = 0
    """How many changes of workers there have been."""
    wait: Histogram = attrs.field(factory=Histogram)
    """Seconds from a job's arrival to its worker; of jobs that got none, to their end.

    A job that found the queue full has not waited, and is not among them: it would make the waits of a pool that has
    too much to do look short.
    """
    run: Histogram = attrs.field(factory=Histogram)
    """Seconds from a job's worker to its end."""
    _errors: "WeakKeyDictionary[Worker, str]" = attrs.field(factory=lambda: WeakKeyDictionary[Worker, str]())
    _bells: list[Callable[[], None]] = attrs.field(factory=list[Callable[[], None]])
    _counters: int = 0
    _clock: Callable[[], float] = trio.current_time

    @contextlib.contextmanager
    def tell(self, bell: Callable[[], None]) -> Generator[None]:
        """While the block runs, call `bell()` at each change of a worker, in the middle of it."""
        self._bells.append(bell)
        try:
            yield
        finally:
            self._bells.remove(bell)

    def count_jobs(self, pool: AnyPool) -> None:
        """Keep the durations of jobs from now on, until as many have called `count_no_more`."""
        self._counters += 1
        if self._counters == 1:
            self._clock = trio.lowlevel.current_clock().current_time
            pool._core.measure_jobs(self._see_job)  # pyright: ignore[reportPrivateUsage]

    def count_no_more(self, pool: AnyPool) -> None:
        """Say that whoever called `count_jobs` needs them no longer; what was kept stays."""
        self._counters -= 1
        if not self._counters:
            pool._core.measure_jobs(None)  # pyright: ignore[reportPrivateUsage]

    def _see_job(self, job: Job, outcome: str, calls: int, now: float | None = None) -> None:
        # On the way of each job, so what is usual goes first: a worker at once, and a job shorter than any bound.
        if now is None:
            now = self._clock()
        started, queued = job.started, job.handed_in
        if started == NEVER:
            if outcome == "queue_full":
                return
            seconds = 0.0 if queued == NEVER else now - queued
        else:
            seconds = now - started
            run = self.run
            run.sum += seconds * calls
            run.counts[0 if seconds <= _SHORT else bisect_left(BOUNDS, seconds)] += calls
            seconds = 0.0 if queued == NEVER else started - queued
        wait = self.wait
        wait.sum += seconds * calls
        wait.counts[0 if seconds <= _SHORT else bisect_left(BOUNDS, seconds)] += calls

    def _see_worker(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        self.events += 1
        if event is WorkerEvent.ERROR:
            text = str(context)
            if isinstance(context, SpawnError):
                self.last_spawn_error = text
                if worker is not None:
                    self._note_death(worker, "boot failed", text)
            elif worker is not None:
                self._errors[worker] = text
                death = self.last_death.get(worker.slot)
                if death is not None and death["pid"] == worker.pid:
                    death["error"] = text
        elif event is WorkerEvent.DESTRUCT and worker is not None:
            self._note_death(worker, str(context), self._errors.get(worker))
        for bell in tuple(self._bells):
            bell()

    def _note_death(self, worker: Worker, reason: str, error: str | None) -> None:
        death = DeathFact(at=time.time(), slot=worker.slot, pid=worker.pid, reason=reason, error=error)
        self.last_death[worker.slot] = death
        self.deaths.append(death)


_watches: "WeakKeyDictionary[PoolCore, PoolWatch]" = WeakKeyDictionary()


def watch_pool(pool: AnyPool) -> PoolWatch:
    """Begin to look at a pool, or go on: whoever looks at the same pool shares one watch."""
    check_pool(pool)
    core = pool._core  # pyright: ignore[reportPrivateUsage]
    watch = _watches.get(core)  # one that is traced is the same pool
    if watch is None:
        watch = _watches[core] = PoolWatch()
        pool.add_observer(watch._see_worker)  # pyright: ignore[reportPrivateUsage]
    return watch


def check_pool(pool: object) -> None:
    """Raise TypeError for what is no pool."""
    if not isinstance(pool, Pool | PythonPool):
        raise TypeError(f"pool must be a Pool or a PythonPool, not {type(pool).__name__}")


def describe_pool(pool: AnyPool) -> PoolFact:
    """Say how the pool is, in values that JSON can hold."""
    now = pool.statistics()
    config: Config = pool.config
    return PoolFact(
        pool=config.name, pid=os.getpid(), at=time.time(), accepting=now.accepting, closed=now.closed,
        target=now.target, idle=now.idle, busy=now.busy, starting=now.starting, leased=now.leased,
        stopping=now.stopping, waiting=now.waiting, longest_wait=now.longest_wait, jobs=dict(now.jobs),
        starts=now.starts, failed_starts=now.failed_starts, failed_in_a_row=now.failed_in_a_row,
        exits=dict(now.exits),
    )  # fmt: skip


def describe_workers(pool: AnyPool) -> list[WorkerFact]:
    """Say how each worker is, by slot."""
    deaths = watch_pool(pool).last_death
    restarts = pool.statistics().restarts
    now = trio.current_time()
    facts: list[WorkerFact] = []
    for worker in pool.workers:
        pid, current = worker.pid, worker.current
        facts.append(
            WorkerFact(
                slot=worker.slot,
                pid=pid,
                status=worker.status,
                jobs=worker.state.num_execs,
                job=None if current is None else JobFact(label=current.label, age=max(0.0, now - current.started)),
                memory=memory_of(worker),
                cpu=None if pid is None else _platform.HERE.cpu_time(pid),
                uptime=worker.age,
                restarts=restarts.get(worker.slot, 0),
                last_death=deaths.get(worker.slot),
            )
        )
    return facts


def memory_of(worker: Worker) -> int | None:
    """Read how many bytes of memory a worker has resident; None where it is gone, or where that can't be read."""
    try:
        return worker.resident_memory()
    except ImportError:
        return None  # outside Linux it takes psutil, the extra `memory`


def why_not_ready(pool: AnyPool) -> str | None:
    """Say why a job would not be accepted or served now, None where it would be. All workers busy is ready."""
    now = pool.statistics()
    watch = watch_pool(pool)
    if now.closed:
        return "the pool is closed, or about to be"
    if not now.accepting:
        return f"the queue is full: {now.waiting} callers wait, and max_queue is {pool.config.max_queue}"
    serving = now.idle + now.busy + now.leased
    if not serving and now.failed_in_a_row and not pool.config.debug:
        last = f"; the last said: {watch.last_spawn_error}" if watch.last_spawn_error else ""
        times = "start" if now.failed_in_a_row == 1 else f"{now.failed_in_a_row} starts"
        return f"there is no worker, and the last {times} failed{last}"
    return None


__all__ = [
    "BOUNDS",
    "AnyPool",
    "DeathFact",
    "Histogram",
    "JobFact",
    "PoolFact",
    "PoolWatch",
    "WorkerFact",
    "check_pool",
    "describe_pool",
    "describe_workers",
    "memory_of",
    "watch_pool",
    "why_not_ready",
]
