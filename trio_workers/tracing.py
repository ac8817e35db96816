"""Traces of jobs for OpenTelemetry: `traced`, which gives a pool whose jobs have spans. The extra `otel`.

A span begins when `exec` or `run_sync` is called and ends when it returns or raises; what it is a child of is what was
current then. When a job gets its worker, and what becomes of it, is in its `JobRecord`, which the pool tells of in the
task of the job's caller. So the task says which span a record is for, and no context variable is set meanwhile.
"""

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, overload

import attrs
import trio

from ._functions import name_of
from ._model import JobRecord, Payload
from ._pool import Pool
from ._python_pool import PythonPool
from ._watch import AnyPool, check_pool
from .child._traced import Traced

try:
    from opentelemetry import propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "opentelemetry":
        raise  # it is there, and lacks something of its own
    raise ModuleNotFoundError(
        "trio_workers.tracing needs opentelemetry-api, which comes with: pip install 'trio_workers[otel]'",
        name=_error.name,
    ) from None

T = TypeVar("T")

LONGEST_STATUS: Final = 200
"""Characters of an error that go into a span's status; all of it is in the exception that is recorded."""


class TracedPool(Pool):
    """A pool whose `exec` makes a span of each job. You get one from `traced`."""

    _tracing: "_Tracing"

    def __init__(self) -> None:
        raise TypeError("TracedPool has no public constructor; use traced")

    @trio.lowlevel.enable_ki_protection
    async def exec(self, payload: Payload, *, label: str | None = None) -> Payload:
        """Run one job, in a span; otherwise `Pool.exec`."""
        job = self._tracing.begin(f"exec {self.config.name}", SpanKind.CLIENT, label)
        try:
            reply = await super().exec(payload, label=label)
        except BaseException as error:
            self._tracing.end(job, error)
            raise
        self._tracing.end(job)
        return reply


class TracedPythonPool(PythonPool):
    """A pool whose `run_sync` makes a span of each job, in which the function runs. You get one from `traced`."""

    _tracing: "_Tracing"

    def __init__(self) -> None:
        raise TypeError("TracedPythonPool has no public constructor; use traced")

    @trio.lowlevel.enable_ki_protection
    async def run_sync(self, fn: Callable[..., T], *args: Any, label: str | None = None) -> T:
        """Run `fn(*args)` in whichever worker is free first, in a span; otherwise `PythonPool.run_sync`.

        In the worker the span is the current one, as a remote parent: spans that the function begins belong to the same
        trace, where the worker has an SDK that sends them.
        """
        name = name_of(fn)
        job = self._tracing.begin(f"run_sync {name}", SpanKind.INTERNAL, name if label is None else label)
        try:
            carrier = job.carrier()
            function = _put_into(carrier, fn) if carrier and callable(fn) else fn
            result = await super().run_sync(function, *args, label=label)
        except BaseException as error:
            self._tracing.end(job, error)
            raise
        self._tracing.end(job)
        return result


@overload
def traced(pool: Pool, *, tracer_provider: TracerProvider | None = None) -> TracedPool: ...


@overload
def traced(pool: PythonPool, *, tracer_provider: TracerProvider | None = None) -> TracedPythonPool: ...


def traced(pool: AnyPool, *, tracer_provider: TracerProvider | None = None) -> TracedPool | TracedPythonPool:
    """Return the same pool with a span around each `exec` or `run_sync`: `pool = traced(pool)`.

    Spans come from `tracer_provider`, by default the global one; without an SDK they are none, and cost little.
    Everything else of the pool is as it was, its `stream`, `map` and `lease` without spans; jobs that go to the pool
    itself, past what is returned, have none either.

    A span is called `exec` and the pool's name (CLIENT), or `run_sync` and the function's (INTERNAL). Attributes:
    `trio_workers.pool`, `.label`, `.outcome` (as in `JobRecord`), `.slot` and `.pid`. Events: "worker assigned" and
    "job ended", at the times of the job's record. An error is recorded, and is the span's status. A job that was
    cancelled has the outcome `cancelled` and no error: its caller wanted it no more.

    TypeError for what is no pool.
    """
    check_pool(pool)
    tracing = _Tracing(pool, trace.get_tracer("trio_workers", tracer_provider=tracer_provider))
    new = object.__new__(TracedPool) if isinstance(pool, Pool) else object.__new__(TracedPythonPool)
    vars(new).update(vars(pool))  # it is the same pool, on the same core
    new._tracing = tracing  # pyright: ignore[reportPrivateUsage]
    return new


def _put_into(carrier: dict[str, str], fn: Callable[..., T]) -> Callable[..., T]:
    """Make of a function one that runs in this context."""
    function = Traced(fn)
    function.carrier = carrier
    module = getattr(fn, "__module__", None)
    if isinstance(module, str):
        function.__module__ = module  # one of a main module that workers can't import is refused for that
    return function


@attrs.define(eq=False)
class _TracedJob:
    """A job under way, and its span. Times are converted from here: trio's clock may have any zero, and go its way."""

    span: Span
    task: trio.lowlevel.Task
    began: float
    began_at: int
    record: JobRecord | None = None

    def at(self, when: float) -> int:
        """Turn a time of trio's clock into nanoseconds of Unix time."""
        return self.began_at + round((when - self.began) * 1e9)

    def carrier(self) -> dict[str, str]:
        """Write down the context that the span is in, for another process."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(self.span))
        return carrier


class _Tracing:
    """Spans of a pool's jobs."""

    def __init__(self, pool: AnyPool, tracer: Tracer) -> None:
        self._pool = pool
        self._tracer = tracer
        self._under_way: dict[trio.lowlevel.Task, _TracedJob] = {}

    def begin(self, name: str, kind: SpanKind, label: object) -> _TracedJob:
        """Begin a span, in the task that is to hand the job in."""
        began, began_at = trio.current_time(), time.time_ns()
        attributes = {"trio_workers.pool": self._pool.config.name}
        if isinstance(label, str):
            attributes["trio_workers.label"] = str(label)
        span = self._tracer.start_span(name, kind=kind, attributes=attributes, start_time=began_at)
        job = _TracedJob(span, trio.lowlevel.current_task(), began, began_at)
        if span.is_recording():
            if not self._under_way:
                self._pool.add_job_observer(self._see)  # only for so long: other jobs shall not pay for it
            self._under_way[job.task] = job
        return job

    def _see(self, record: JobRecord) -> None:
        # In the task of the job's caller, and while that is in `exec` no other job can end in it.
        job = self._under_way.get(trio.lowlevel.current_task())
        if job is not None:
            job.record = record

    def end(self, job: _TracedJob, error: BaseException | None = None) -> None:
        """End its span, with what is known of the job by now."""
        if self._under_way.pop(job.task, None) is not None and not self._under_way:
            self._pool.remove_job_observer(self._see)
        span = job.span
        if span.is_recording():
            if job.record is not None:
                _tell(job, job.record)
            if isinstance(error, trio.Cancelled):
                span.set_attribute("trio_workers.outcome", "cancelled")
            elif error is not None:
                now = job.at(trio.current_time())
                span.record_exception(error, timestamp=now)
                text = f"{type(error).__name__}: {error}".partition("\n")[0]
                span.set_status(Status(StatusCode.ERROR, text[:LONGEST_STATUS]))
        span.end(job.at(trio.current_time()))


def _tell(job: _TracedJob, record: JobRecord) -> None:
    """Put into the span what the record says."""
    span = job.span
    span.set_attribute("trio_workers.outcome", record.outcome)
    if record.slot is not None:
        span.set_attribute("trio_workers.slot", record.slot)
    if record.pid is not None:
        span.set_attribute("trio_workers.pid", record.pid)
    begun = record.ended if record.started is None else record.started
    if record.started is not None:
        span.add_event("worker assigned", {"trio_workers.wait": begun - record.queued}, job.at(record.started))
    span.add_event("job ended", {"trio_workers.run": record.ended - begun}, job.at(record.ended))


__all__ = ["TracedPool", "TracedPythonPool", "traced"]
