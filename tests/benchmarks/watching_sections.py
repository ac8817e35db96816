"""The tables of what watching costs: metrics and control, and traces apart from them."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from tests.benchmarks.functions import echo
from tests.benchmarks.measures import Latency, Pace, caller_of, measure_latency, opened, percentile
from tests.benchmarks.report import Aim, Table, micro, spread
from tests.benchmarks.subjects import POOL, Call, missing_module
from trio_workers import Payload, Pool, PythonPool, open_python_pool
from trio_workers._seats import Job
from trio_workers._watch import watch_pool

BODY: Final = b"0123456789"
AT_ONCE: Final = 200
"""Ends of jobs in one look at the clock."""
MOST: Final = 1.5e-6
"""Seconds that a job may cost more with metrics and control switched on."""
NOTHING: Final = "nothing"
METRICS: Final = "metrics and control"
NO_SDK: Final = "traces, without an SDK"
SDK: Final = "traces, with an SDK"
MISSING: Final = missing_module("prometheus_client") or missing_module("opentelemetry.sdk")


def switch_on(pool: Pool | PythonPool) -> None:
    """Do what metrics and the control socket do to a pool."""
    from trio_workers.metrics import PoolCollector

    watch_pool(pool)
    PoolCollector(pool)


def trace(pool: Any, *, sdk: bool) -> Any:
    """Return the pool with traces; its spans are made, and thrown away by an exporter in another thread."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.trace import NoOpTracerProvider

    from trio_workers.tracing import traced

    class Nowhere(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    if not sdk:
        return traced(pool, tracer_provider=NoOpTracerProvider())
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    return traced(pool, tracer_provider=provider)


def differences(results: Mapping[str, Latency], name: str) -> list[float]:
    """How much longer a call takes than with nothing on, round by round."""
    return [more - less for more, less in zip(results[name].p50, results[NOTHING].p50, strict=True)]


def add_rows(table: Table, results: Mapping[str, Latency]) -> None:
    """Add a row for each. A difference may be below 0 on a noisy machine, so it is no figure."""
    for name, result in results.items():
        more = "-" if name == NOTHING else str(spread(differences(results, name), micro))
        table.add(name, spread(result.p50, micro), more)


COLUMNS: Final = ("switched on", "p50", "more than with nothing on")


async def ends(pace: Pace) -> list[Table]:
    table = Table(
        "What watching costs, at the end of a job",
        "The pool's own step at a job's end, alone, again and again: it counts the job, makes its record, and the "
        "collector of metrics and all else that looks at the pool (they share one observer) count it in their buckets.",
        list(COLUMNS),
    )
    if MISSING is not None:
        table.add_missing(METRICS, MISSING)
        return [table]
    async with opened([POOL], 1) as first, opened([POOL], 1) as second:
        runs: dict[str, Callable[[float], Awaitable[list[float]]]] = {}
        for name, them in ((NOTHING, first), (METRICS, second)):
            pool = them[POOL.name].pool
            assert pool is not None
            runs[name] = end_again(pool, await job_of(pool))
        second_pool = second[POOL.name].pool
        assert second_pool is not None
        switch_on(second_pool)
        results = await measure_latency(runs, pace)
    add_rows(table, results)
    what = "the end of a job, with metrics and control: more than with nothing on"
    table.aims.append(Aim(what, differences(results, METRICS), most=MOST, show=micro))
    return [table]


async def job_of(pool: Pool) -> Job:
    """Run a job, and return it."""
    exchange, jobs = pool._core.exchange, list[Job]()
    exchange.tell = lambda job, outcome, calls: jobs.append(job)
    await pool.exec(Payload(BODY))
    exchange.tell = None
    return jobs[0]


def end_again(pool: Pool, job: Job) -> Callable[[float], Awaitable[list[float]]]:
    """Make a run of `measure_latency` of a job's end."""

    async def run(seconds: float) -> list[float]:
        count, clock = pool._core.exchange.count, time.perf_counter
        taken: list[float] = []
        end = clock() + seconds
        while not taken or clock() < end:
            before = clock()
            for _ in range(AT_ONCE):
                count(job, "replied")
            taken.append((clock() - before) / AT_ONCE)
        return taken

    return run


async def calls(pace: Pace) -> list[Table]:
    tables: list[Table] = []
    for call, open_ in (("exec", open_commands), ("run_sync", open_functions)):
        table = Table(
            f"What watching costs, of a whole call: {call}",
            f"One caller on one worker, bodies of {len(BODY)} bytes, each row a pool of its own, a call of each in "
            "turn. With an SDK a span is made for each call and thrown away by another thread; of run_sync the context "
            "goes to the worker too. A whole call varies by more than metrics cost: what those cost is told above.",
            list(COLUMNS),
        )
        tables.append(table)
        if MISSING is not None:
            table.add_missing(METRICS, MISSING)
            continue
        async with open_(NOTHING) as nothing, open_(METRICS) as metrics, open_(NO_SDK) as no_sdk, open_(SDK) as sdk:
            them = {NOTHING: nothing, METRICS: metrics, NO_SDK: no_sdk, SDK: sdk}
            results = await measure_by_turns(them, pace)
        add_rows(table, results)
    return tables


async def measure_by_turns(calls: Mapping[str, Call], pace: Pace) -> dict[str, Latency]:
    """Measure calls that differ by little: one of each at a time, so that whatever drifts hits all alike.

    Each is called once at least.
    """
    results = {name: Latency() for name in calls}
    clock = time.perf_counter
    for call in calls.values():
        await caller_of(call)(pace.warm_up)
    for _ in range(pace.rounds):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        end = clock() + pace.turns * pace.seconds * len(calls)
        while not all(taken.values()) or clock() < end:
            for name, call in calls.items():
                before = clock()
                await call()
                taken[name].append(clock() - before)
        for name, values in taken.items():
            results[name].p50.append(percentile(values, 0.5))
    return results


def watched(pool: Any, how: str) -> Any:
    """Switch on what a row is about."""
    if how == METRICS:
        switch_on(pool)
    return trace(pool, sdk=how == SDK) if how in (NO_SDK, SDK) else pool


@asynccontextmanager
async def open_commands(how: str) -> AsyncIterator[Call]:
    async with POOL.open(1) as it:
        pool = watched(it.pool, how)
        payload = Payload(BODY)

        async def call() -> Payload:
            return await pool.exec(payload)  # type: ignore[no-any-return]

        yield call


@asynccontextmanager
async def open_functions(how: str) -> AsyncIterator[Call]:
    async with open_python_pool(1) as plain:
        pool = watched(plain, how)

        async def call() -> bytes:
            return await pool.run_sync(echo, BODY)  # type: ignore[no-any-return]

        yield call


WATCHING_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {
    "watching-ends": ends,
    "watching-calls": calls,
}
