"""Metrics of pools for Prometheus: `PoolCollector`, which reads them when it is asked. The extra `metrics`.

A pool belongs to its trio thread, and a scrape often comes in another (`prometheus_client.start_http_server`). So the
numbers are read in the pool's own thread, between two steps of its tasks, all of one moment; the other thread waits for
them.
"""

import math
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Final

import attrs
import trio

from ._core import PoolStatistics
from ._watch import AnyPool, Histogram, PoolWatch, check_pool, memory_of, watch_pool

try:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "prometheus_client":
        raise  # it is there, and lacks something of its own
    raise ModuleNotFoundError(
        "trio_workers.metrics needs prometheus-client, which comes with: pip install 'trio_workers[metrics]'",
        name=_error.name,
    ) from None

STATES: Final = ("idle", "busy", "starting", "leased", "stopping")
"""What a worker can be at: the label `state`."""

OUTCOMES: Final = (
    "replied", "failed", "crashed", "relay_error", "retired", "job_timeout", "memory", "boot_failed",
    "allocate_timeout", "queue_full", "closed", "cancelled",
)  # fmt: skip
"""How a job can end: the label `outcome`. Each is there from the beginning, for `rate()` sees no first step."""

REASONS: Final = (
    "crashed", "broke the protocol", "closed its relay", "boot failed", "stop request", "max_executions", "ttl",
    "idle_ttl", "max_memory", "reset", "resize", "shrink", "debug", "exec_ttl", "hard_memory", "cancelled",
    "its lease ended under a job", "stopped", "killed", "closing", "interrupted",
)  # fmt: skip
"""Why a worker can end: the label `reason`; likewise."""

PATIENCE: Final = 5.0
"""Seconds that another thread waits for the pool's: half of what Prometheus waits for a scrape by default."""


class PoolCollector(Collector):
    """Metrics of one or more pools, read at each scrape: `registry.register(PoolCollector(pool))`.

    The label `pool` is the name that the pool had when it was added (`Config.name`), so pools in one collector need
    names of their own. Begin early: the histograms have the jobs that ended since the pool was added, the counters
    have all of them. A pool that is closed keeps its last counters, and its gauges are 0, until it is removed.

    A collector with pools is made, and pools are added and removed, in the trio thread of the pools. A scrape may come
    in any thread. In another than the pool's it waits for that to answer, at most 5 seconds: where something
    blocks trio for so long, the scrape ends with TimeoutError, and Prometheus sees the program as down.

    One registry takes one collector: register it once, and `add` further pools to it.
    """

    def __init__(self, *pools: AnyPool) -> None:
        self._watched: dict[str, _Watched] = {}
        try:
            for pool in pools:
                self.add(pool)
        except BaseException:
            for watched in tuple(self._watched.values()):
                self.remove(watched.pool)
            raise

    def __repr__(self) -> str:
        return f"<PoolCollector: {', '.join(map(repr, self._watched)) or 'no pools'}>"

    def add(self, pool: AnyPool) -> None:
        """Show this pool as well, and keep the durations of its jobs from now on.

        Raise ValueError where the collector has one of its name, or this one, already; RuntimeError outside
        `trio.run`; TypeError for what is no pool.
        """
        check_pool(pool)
        name = pool.config.name
        there = self._watched.get(name)
        if there is not None and there.watch is watch_pool(pool):
            raise ValueError(f"the pool {name!r} is in this collector already")
        if there is not None:
            raise ValueError(
                f"another pool in this collector is called {name!r} too, and nobody could tell their metrics apart: "
                "give each a name of its own (Config.name, or open_python_pool(name=...)), or remove the other one"
            )
        if not trio.lowlevel.in_trio_run():
            raise RuntimeError("a pool is added to a PoolCollector in its own trio thread, inside trio.run")
        token = trio.lowlevel.current_trio_token()
        watch = watch_pool(pool)
        watch.count_jobs(pool)
        self._watched[name] = _Watched(pool, name, watch, token, get_ident())

    def remove(self, pool: AnyPool) -> None:
        """Show this pool no more; its jobs cost nothing more for it.

        Raise ValueError where it is not among them; TypeError for what is no pool.
        """
        watch = watch_pool(pool)
        for name, watched in self._watched.items():
            if watched.watch is watch:
                del self._watched[name]
                watch.count_no_more(pool)
                return
        raise ValueError(f"{pool!r} is not in this collector")

    def describe(self) -> Iterable[Metric]:
        """Name the metrics, without reading them: a registry refuses a second collector of the same by that."""
        return _Families()

    def collect(self) -> Iterable[Metric]:
        """Read all pools. TimeoutError where a pool's thread does not answer."""
        families = _Families()
        by_run: dict[trio.lowlevel.TrioToken, list[_Watched]] = {}
        for watched in tuple(self._watched.values()):
            by_run.setdefault(watched.token, []).append(watched)
        for those in by_run.values():
            for reading in _read_all(those):
                families.add(reading)
        return families


@attrs.frozen(eq=False)
class _Reading:
    """A pool at one moment."""

    pool: str
    now: PoolStatistics
    memory: dict[int, int]
    wait: tuple[list[tuple[float, int]], float]
    run: tuple[list[tuple[float, int]], float]


@attrs.frozen(eq=False)
class _Watched:
    """A pool, and where it can be read."""

    pool: AnyPool
    name: str
    watch: PoolWatch
    token: trio.lowlevel.TrioToken
    thread: int

    def read(self) -> _Reading:
        """Read it; in its own thread, or when its run is over."""
        memory: dict[int, int] = {}
        for worker in self.pool.workers:
            size = memory_of(worker)
            if size is not None:
                # While one replaces another the slot has two, and the machine holds both.
                memory[worker.slot] = memory.get(worker.slot, 0) + size
        watch = self.watch
        return _Reading(self.name, self.pool.statistics(), memory, _durations(watch.wait), _durations(watch.run))


def _durations(histogram: Histogram) -> tuple[list[tuple[float, int]], float]:
    return histogram.cumulative(), histogram.sum


def _read_all(those: list[_Watched]) -> list[_Reading]:
    """Read pools of one run, at one moment, in whatever thread we are."""
    first = those[0]
    if get_ident() == first.thread:
        return [watched.read() for watched in those]
    answer: SimpleQueue[list[_Reading] | Exception] = SimpleQueue()

    def read() -> None:
        try:
            answer.put([watched.read() for watched in those])
        except Exception as error:  # it is the scrape's affair; out of here it would end the whole run
            answer.put(error)

    try:
        first.token.run_sync_soon(read)
    except trio.RunFinishedError:
        return [watched.read() for watched in those]  # nothing changes any more
    try:
        readings = answer.get(timeout=PATIENCE)
    except Empty:
        raise TimeoutError(
            f"the trio thread of the pool {first.name!r} has not answered for {PATIENCE:g} s: something blocks it"
        ) from None
    if isinstance(readings, Exception):
        raise readings
    return readings


class _Families:
    """The metrics, which readings are put into."""

    def __init__(self) -> None:
        self._workers = GaugeMetricFamily(
            "trio_workers_workers", "Workers, by what they are at.", labels=["pool", "state"]
        )
        self._target = GaugeMetricFamily(
            "trio_workers_workers_target", "How many workers there should be; 0 once the pool closes.", labels=["pool"]
        )
        self._waiting = GaugeMetricFamily(
            "trio_workers_jobs_waiting", "Callers that wait for a worker.", labels=["pool"]
        )
        self._longest_wait = GaugeMetricFamily(
            "trio_workers_longest_wait_seconds", "For how long the first of them has waited.", labels=["pool"]
        )
        self._memory = GaugeMetricFamily(
            "trio_workers_worker_memory_bytes",
            "Resident memory of the workers in a slot: of two while one replaces the other.",
            labels=["pool", "slot"],
        )
        self._jobs = CounterMetricFamily(
            "trio_workers_jobs", "Jobs that have ended, by outcome.", labels=["pool", "outcome"]
        )
        self._starts = CounterMetricFamily(
            "trio_workers_worker_starts", "Workers started, successfully or not.", labels=["pool"]
        )
        self._exits = CounterMetricFamily(
            "trio_workers_worker_exits", "Workers that have ended, by reason.", labels=["pool", "reason"]
        )
        self._failures = CounterMetricFamily(
            "trio_workers_spawn_failures", "Workers that never became ready.", labels=["pool"]
        )
        self._wait = HistogramMetricFamily(
            "trio_workers_job_wait_seconds",
            "From a job's arrival to its worker, or to its end without one; without those that found the queue full.",
            labels=["pool"],
        )
        self._run = HistogramMetricFamily(
            "trio_workers_job_run_seconds", "From a job's worker to the job's end.", labels=["pool"]
        )

    def __iter__(self) -> Iterator[Metric]:
        families: list[Metric] = [
            self._workers, self._target, self._waiting, self._longest_wait, self._memory, self._jobs, self._starts,
            self._exits, self._failures, self._wait, self._run,
        ]  # fmt: skip
        return iter(families)

    def add(self, reading: _Reading) -> None:
        """Add the samples of a pool."""
        pool, now = reading.pool, reading.now
        for state in STATES:
            self._workers.add_metric([pool, state], getattr(now, state))
        self._target.add_metric([pool], 0 if now.closed else now.target)
        self._waiting.add_metric([pool], now.waiting)
        self._longest_wait.add_metric([pool], now.longest_wait)
        for slot, size in sorted(reading.memory.items()):
            self._memory.add_metric([pool, str(slot)], size)
        # What is not on the lists would be a mistake in them, and is shown all the same.
        for outcome in dict.fromkeys((*OUTCOMES, *now.jobs)):
            self._jobs.add_metric([pool, outcome], now.jobs.get(outcome, 0))
        self._starts.add_metric([pool], now.starts)
        for reason in dict.fromkeys((*REASONS, *now.exits)):
            self._exits.add_metric([pool, reason], now.exits.get(reason, 0))
        self._failures.add_metric([pool], now.failed_starts)
        for family, (buckets, total) in ((self._wait, reading.wait), (self._run, reading.run)):
            family.add_metric(
                [pool], [("+Inf" if bound == math.inf else repr(bound), count) for bound, count in buckets], total
            )


__all__ = ["OUTCOMES", "REASONS", "STATES", "PoolCollector"]
