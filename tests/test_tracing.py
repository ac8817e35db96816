"""Traces: each job has its span, which says what became of it, and everything else is as without."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from tests import traced_jobs as jobs
from tests.support import until
from tests.test_public import python
from trio_workers import (
    Config,
    JobError,
    JobRecord,
    Payload,
    Pool,
    PythonPool,
    QueueFull,
    WorkerCrashed,
    open_pool,
    open_python_pool,
)
from trio_workers.child import Job
from trio_workers.testing import Crash, MemoryFactory
from trio_workers.tracing import TracedPool, TracedPythonPool, traced

SECOND = 10**9


class Spans:
    """An SDK whose spans stay here."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("tests")

    @property
    def all(self) -> list[ReadableSpan]:
        """Those that have ended."""
        return list(self._exporter.get_finished_spans())

    @property
    def one(self) -> ReadableSpan:
        """The only one there is."""
        (span,) = self.all
        return span


@pytest.fixture
def spans() -> Spans:
    """An SDK whose spans stay here."""
    return Spans()


def attributes(span: ReadableSpan) -> dict[str, object]:
    """Its attributes, without their prefix."""
    return {name.removeprefix("trio_workers."): value for name, value in (span.attributes or {}).items()}


def events(span: ReadableSpan) -> list[str]:
    """What happened in it, in order of time, which never lies outside of it."""
    assert span.start_time is not None
    assert span.end_time is not None
    times = [event.timestamp for event in span.events]
    assert [span.start_time, *times, span.end_time] == sorted([span.start_time, *times, span.end_time])
    return [event.name for event in span.events]


async def answer(job: Job) -> bytes:
    """Do as the body says."""
    if job.body == b"crash":
        raise Crash(3)
    if job.body == b"fail":
        raise ValueError("no ink\nat all")
    if job.body == b"nap":
        await trio.sleep(2)
    if job.body == b"hang":
        await trio.sleep_forever()
    return job.body.upper()


def config(**more: object) -> Config:
    """Describe a pool of one worker inside this process."""
    return Config(**{"command": ["none"], "num_workers": 1, "factory": MemoryFactory(answer), **more})  # type: ignore[arg-type]


# jobs of commands


async def test_a_job(spans: Spans, autojump_clock: object) -> None:
    """Its span says where it ran, how long it waited and ran, and how it ended; times are those of the record."""
    records: list[JobRecord] = []
    async with open_pool(config(name="mill"), job_observer=records.append) as plain, trio.open_nursery() as nursery:
        pool = traced(plain, tracer_provider=spans.provider)
        (worker,) = pool.workers
        nursery.start_soon(plain.exec, Payload(b"nap"))
        await until(lambda: plain.statistics().busy == 1)
        await trio.sleep(0.5)
        assert await pool.exec(Payload(b"nap"), label="grind 7") == Payload(b"NAP")
    span = spans.one
    assert (span.name, span.kind, span.parent) == ("exec mill", SpanKind.CLIENT, None)
    assert span.status.status_code is StatusCode.UNSET
    assert attributes(span) == {
        "pool": "mill", "label": "grind 7", "outcome": "replied", "slot": 0, "pid": worker.pid,
    }  # fmt: skip
    assert events(span) == ["worker assigned", "job ended"]
    assigned, ended = span.events
    record = records[-1]
    assert record.started is not None
    assert dict(assigned.attributes or {}) == {"trio_workers.wait": record.started - record.queued}
    assert dict(ended.attributes or {}) == {"trio_workers.run": record.ended - record.started}
    assert ended.timestamp - assigned.timestamp == pytest.approx(2 * SECOND, abs=1000)
    assert span.start_time is not None
    assert assigned.timestamp - span.start_time == pytest.approx((record.started - record.queued) * SECOND, abs=1000)


async def test_a_job_without_a_label(spans: Spans, autojump_clock: object) -> None:
    """It has none in the span either, and the record has None, as without traces."""
    records: list[JobRecord] = []
    async with open_pool(config(), job_observer=records.append) as plain:
        await traced(plain, tracer_provider=spans.provider).exec(Payload(b"one"))
    assert records[0].label is None
    assert "label" not in attributes(spans.one)


async def test_a_job_that_fails(spans: Spans, autojump_clock: object) -> None:
    """Its error is recorded, and the first line of it is the status."""
    async with open_pool(config()) as plain:
        with pytest.raises(JobError):
            await traced(plain, tracer_provider=spans.provider).exec(Payload(b"fail"))
    span = spans.one
    assert attributes(span)["outcome"] == "failed"
    assert events(span) == ["worker assigned", "job ended", "exception"]
    recorded = dict(span.events[-1].attributes or {})
    assert recorded["exception.type"] == "trio_workers.JobError"
    assert "no ink\nat all" in str(recorded["exception.message"])
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is not None
    assert span.status.description.startswith("JobError: ")
    assert "\n" not in span.status.description


async def test_a_crash(spans: Spans, autojump_clock: object) -> None:
    """The span names the worker that died."""
    async with open_pool(config()) as plain:
        pid = plain.workers[0].pid
        with pytest.raises(WorkerCrashed):
            await traced(plain, tracer_provider=spans.provider).exec(Payload(b"crash"))
    assert attributes(spans.one) == {"pool": "pool", "outcome": "crashed", "slot": 0, "pid": pid}
    assert events(spans.one) == ["worker assigned", "job ended", "exception"]
    assert spans.one.status.status_code is StatusCode.ERROR


async def test_cancelled_while_it_waits(spans: Spans, autojump_clock: object) -> None:
    """It had no worker, and is no error."""
    async with open_pool(config()) as plain, trio.open_nursery() as nursery:
        pool = traced(plain, tracer_provider=spans.provider)
        nursery.start_soon(plain.exec, Payload(b"nap"))
        await until(lambda: plain.statistics().busy == 1)
        with trio.move_on_after(1) as scope:
            await pool.exec(Payload(b"nap"))
        assert scope.cancelled_caught
    assert attributes(spans.one) == {"pool": "pool", "outcome": "cancelled"}
    assert events(spans.one) == ["job ended"]
    assert spans.one.status.status_code is StatusCode.UNSET


async def test_cancelled_while_it_runs(spans: Spans, autojump_clock: object) -> None:
    """It had a worker, and is no error."""
    async with open_pool(config()) as plain:
        with trio.move_on_after(1) as scope:
            await traced(plain, tracer_provider=spans.provider).exec(Payload(b"hang"))
        assert scope.cancelled_caught
    assert attributes(spans.one)["outcome"] == "cancelled"
    assert attributes(spans.one)["slot"] == 0
    assert events(spans.one) == ["worker assigned", "job ended"]
    assert spans.one.status.status_code is StatusCode.UNSET


async def test_cancelled_before_it_is_handed_in(spans: Spans, autojump_clock: object) -> None:
    """There was no job, and the span says what became of the call."""
    async with open_pool(config()) as plain:
        with trio.CancelScope() as scope:
            scope.cancel()
            await traced(plain, tracer_provider=spans.provider).exec(Payload(b"one"))
        assert plain.statistics().jobs == {}
    assert attributes(spans.one) == {"pool": "pool", "outcome": "cancelled"}
    assert events(spans.one) == []


async def test_queue_full(spans: Spans, autojump_clock: object) -> None:
    """A job that was refused has its span, its outcome and its error."""
    async with open_pool(config(max_queue=0)) as plain, trio.open_nursery() as nursery:
        pool = traced(plain, tracer_provider=spans.provider)
        nursery.start_soon(plain.exec, Payload(b"nap"))
        await until(lambda: plain.statistics().busy == 1)
        with pytest.raises(QueueFull):
            await pool.exec(Payload(b"one"))
    assert attributes(spans.one) == {"pool": "pool", "outcome": "queue_full"}
    assert events(spans.one) == ["job ended", "exception"]
    assert spans.one.status.status_code is StatusCode.ERROR


async def test_what_is_no_job(spans: Spans, autojump_clock: object) -> None:
    """What is refused before it becomes a job is an error without an outcome."""
    async with open_pool(config()) as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        with pytest.raises(TypeError, match="a job must be a Payload"):
            await pool.exec(b"one")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="label must be a str or None, not int"):
            await pool.exec(Payload(b"one"), label=7)  # type: ignore[arg-type]
    for span in spans.all:
        assert attributes(span) == {"pool": "pool"}
        assert events(span) == ["exception"]
        assert span.status.status_code is StatusCode.ERROR


async def test_a_hundred_jobs_at_once(spans: Spans, autojump_clock: object) -> None:
    """Each has its own span, and the parent that was current in its caller; nobody's current span is changed."""
    async with open_pool(config(num_workers=4)) as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        parents: dict[str, int] = {}

        async def run(number: int) -> None:
            with spans.tracer.start_as_current_span(f"parent {number}") as parent:
                parents[f"job {number}"] = parent.get_span_context().span_id

                def check(record: JobRecord) -> None:
                    if record.label == f"job {number}":
                        seen.append(trace.get_current_span() is parent)

                plain.add_job_observer(check)
                await pool.exec(Payload(b"nap" if number % 7 else b"fail"), label=f"job {number}")
                assert trace.get_current_span() is parent

        async def attempt(number: int) -> None:
            try:
                await run(number)
            except JobError:
                failed.append(f"job {number}")

        seen: list[bool] = []
        failed: list[str] = []
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(attempt, number)
    ours = [span for span in spans.all if span.name == "exec pool"]
    assert len(ours) == 100 == len(seen)
    assert all(seen)
    found: dict[object, int] = {}
    for span in ours:
        assert span.parent is not None
        found[attributes(span)["label"]] = span.parent.span_id
    assert found == parents
    assert {attributes(it)["label"] for it in ours if attributes(it)["outcome"] == "failed"} == set(failed)
    assert len(failed) == 15


async def test_jobs_past_the_traced_pool_cost_nothing(spans: Spans, autojump_clock: object) -> None:
    """The pool is asked for records only while a traced job is under way, and its other jobs have no span."""
    async with open_pool(config(num_workers=2)) as plain, trio.open_nursery() as nursery:
        pool = traced(plain, tracer_provider=spans.provider)
        exchange = plain._core.exchange
        assert exchange.tell is None
        nursery.start_soon(pool.exec, Payload(b"nap"))
        await until(lambda: plain.statistics().busy == 1)
        assert exchange.tell is not None
        await plain.exec(Payload(b"one"))
        await until(lambda: plain.statistics().busy == 0)
        await trio.testing.wait_all_tasks_blocked()
        assert exchange.tell is None
    assert len(spans.all) == 1


async def test_everything_else_is_the_pools_own(spans: Spans, autojump_clock: object) -> None:
    """A traced pool is the pool once more: only `exec` is another, and tracing it again makes no second span."""
    async with open_pool(config(num_workers=2)) as plain:
        pool = traced(traced(plain), tracer_provider=spans.provider)
        assert type(pool) is TracedPool
        assert isinstance(pool, Pool)
        assert (pool.config, pool.workers, pool.statistics()) == (plain.config, plain.workers, plain.statistics())
        async with pool.map([Payload(b"a")]) as replies:
            assert [reply.body async for reply in replies] == [b"A"]
        async with pool.stream(Payload(b"b")) as parts:
            assert [part.body async for part in parts] == [b"B"]
        async with pool.lease() as worker:
            assert (await worker.exec(Payload(b"c"))).body == b"C"
        await pool.resize(3)
        assert plain.statistics().target == 3
        assert spans.all == []
        await pool.exec(Payload(b"d"))
    assert len(spans.all) == 1


async def test_without_an_sdk(autojump_clock: object) -> None:
    """Where nobody records, jobs run as ever, and the pool is not asked for records."""
    async with open_pool(config(), job_observer=None) as plain:
        for pool in (traced(plain), traced(plain, tracer_provider=trace.NoOpTracerProvider())):
            assert (await pool.exec(Payload(b"one"))).body == b"ONE"
            with pytest.raises(JobError):
                await pool.exec(Payload(b"fail"))
            with trio.move_on_after(1) as scope:
                await pool.exec(Payload(b"hang"))
            assert scope.cancelled_caught
            assert plain._core.exchange.tell is None


def test_what_is_no_pool() -> None:
    """It is named, and a traced pool comes from `traced` alone."""
    with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not int"):
        traced(3)  # type: ignore[call-overload]
    for kind in (TracedPool, TracedPythonPool):
        with pytest.raises(TypeError, match="has no public constructor; use traced"):
            kind()


def test_missing_extra() -> None:
    """Without opentelemetry one sentence names the extra."""
    said = python(
        "import sys; sys.modules['opentelemetry'] = None\n"
        "try: import trio_workers.tracing\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert said == "trio_workers.tracing needs opentelemetry-api, which comes with: pip install 'trio_workers[otel]'\n"


# functions


async def test_a_function_runs_in_its_span(spans: Spans) -> None:
    """In the worker the span is the current one, in the trace of the caller."""
    async with open_python_pool(1, name="mill") as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        assert type(pool) is TracedPythonPool
        assert isinstance(pool, PythonPool)
        with spans.tracer.start_as_current_span("request") as request:
            found = await pool.run_sync(jobs.current)
        assert await plain.run_sync(jobs.current) == (0, 0, False)  # nothing stays behind
    span, _ = spans.all
    context = request.get_span_context()
    assert span.context is not None
    assert found == (context.trace_id, span.context.span_id, True)
    assert span.parent is not None
    assert span.parent.span_id == context.span_id
    assert (span.name, span.kind) == ("run_sync tests.traced_jobs.current", SpanKind.INTERNAL)
    assert attributes(span)["label"] == "tests.traced_jobs.current"
    assert attributes(span)["outcome"] == "replied"
    assert events(span) == ["worker assigned", "job ended"]


async def test_labels_of_functions(spans: Spans) -> None:
    """The label is the caller's, or the function's name, in the record too."""
    records: list[JobRecord] = []
    async with open_python_pool(1, job_observer=records.append) as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        assert await pool.run_sync(functools.partial(jobs.add, second=4), 3) == 7
        assert await pool.run_sync(jobs.add, 1, 2, label="a sum") == 3
    labels = ["tests.traced_jobs.add", "a sum"]
    assert [record.label for record in records] == labels
    assert [attributes(span)["label"] for span in spans.all] == labels
    assert {span.name for span in spans.all} == {"run_sync tests.traced_jobs.add"}


REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (jobs.fail, (7,)),
    (jobs.add, (1, threading.Lock())),
    (jobs.add, ("a", 2)),
    (lambda: 1, ()),
    (functools.partial(jobs.add, threading.Lock()), (1,)),
    (jobs.later, ()),
    (jobs.count, (3,)),
    (jobs.give_lock, ()),
    (jobs.add, (1, 2, 3)),
    (3, ()),  # type: ignore[list-item]
]


async def test_errors_are_as_without(spans: Spans) -> None:
    """Whatever goes wrong with a function, the error and the worker's traceback say the same as without traces."""

    async def error_of(pool: PythonPool, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[object, ...]:
        try:
            await pool.run_sync(fn, *args)
        except Exception as error:
            return type(error), str(error), str(error.__cause__), repr(error.__context__)
        raise AssertionError(fn)

    async with open_python_pool(1) as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        for fn, args in REFUSED:
            assert await error_of(pool, fn, args) == await error_of(plain, fn, args)
        _, said, *_ = await error_of(pool, jobs.Holder().method, ())
        assert "tests.traced_jobs.Holder.method can't be pickled: " in str(said)
        with pytest.raises(WorkerCrashed, match=r"while it ran the job 'tests\.traced_jobs\.end'"):
            await pool.run_sync(jobs.end, 3)
    assert len(spans.all) == len(REFUSED) + 2
    assert all(span.status.status_code is StatusCode.ERROR for span in spans.all)
    assert attributes(spans.all[0])["outcome"] == "failed"
    assert "outcome" not in attributes(spans.all[1])


def test_a_main_module_that_workers_can_not_import() -> None:
    """A function of it is refused at once, as without traces."""
    said = python("""
import pickle, trio
from opentelemetry.sdk.trace import TracerProvider
from trio_workers import open_python_pool
from trio_workers.tracing import traced

def function(): pass

async def main():
    async with open_python_pool(1) as plain:
        for pool in (plain, traced(plain, tracer_provider=TracerProvider())):
            try:
                await pool.run_sync(function)
            except pickle.PicklingError as error:
                print(error)

trio.run(main)
""")
    first, second = said.splitlines()
    assert first == second
    assert first.startswith("__main__.function can't be sent to a worker: ")


async def test_a_function_that_is_cancelled(spans: Spans, note: Path) -> None:
    """The worker is killed, and that is no error of the span."""
    async with open_python_pool(1) as plain, trio.open_nursery() as nursery:
        pool = traced(plain, tracer_provider=spans.provider)
        nursery.start_soon(pool.run_sync, jobs.sleep, str(note))
        await until(note.exists)
        nursery.cancel_scope.cancel()
    assert attributes(spans.one)["outcome"] == "cancelled"
    assert events(spans.one) == ["worker assigned", "job ended"]
    assert spans.one.status.status_code is StatusCode.UNSET


async def test_a_worker_without_opentelemetry(spans: Spans) -> None:
    """There the function runs, in no trace."""
    async with open_python_pool(1, initializer=jobs.forbid) as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        assert await pool.run_sync(jobs.add, 1, 2) == 3
        with pytest.raises(ZeroDivisionError) as caught:
            await pool.run_sync(jobs.fail, 1)
        assert "opentelemetry" not in str(caught.value.__cause__)
    assert len(spans.all) == 2


async def test_functions_by_value(spans: Spans) -> None:
    """A function that has no name to be found by runs in its span too."""
    pytest.importorskip("cloudpickle")
    async with open_python_pool(1, pickler="cloudpickle") as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        trace_id, *_ = await pool.run_sync(lambda: jobs.current())
    assert spans.one.context is not None
    assert trace_id == spans.one.context.trace_id


async def test_functions_without_an_sdk() -> None:
    """Where nobody records, a function goes to the worker as it is, and that loads nothing for it."""
    async with open_python_pool(1) as plain:
        pool = traced(plain)
        assert await pool.run_sync(jobs.loaded) == []
        with pytest.raises(ZeroDivisionError):
            await pool.run_sync(jobs.fail, 1)


async def test_a_trace_that_is_not_sampled() -> None:
    """The decision goes to the worker with the trace, and nothing is recorded here."""
    spans = Spans(sampler=ALWAYS_OFF)
    async with open_python_pool(1) as plain:
        pool = traced(plain, tracer_provider=spans.provider)
        trace_id, _, is_remote = await pool.run_sync(jobs.current)
        assert trace_id
        assert is_remote
    assert spans.all == []
