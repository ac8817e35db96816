"""One face for pools of commands and of Python functions, as far as callers are concerned."""

import itertools
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import attrs

from tests.soak import jobs
from tests.soak.plan import Job
from trio_workers import Payload, Pool, PythonPool


@attrs.frozen
class Answer:
    """What came back: the numbers of the first line, the payload behind it, and the context, where there is one."""

    id: int
    part: int
    release: int
    checksum: int
    payload: bytes
    context: bytes | None


class Target(Protocol):
    """A pool as callers use it. `on`: a worker of it that the caller has leased."""

    async def run(self, job: Job, on: Any = None) -> Answer:
        """Run a job."""
        ...

    def stream(self, job: Job, on: Any = None) -> AbstractAsyncContextManager[Any]:
        """Run a job and take its answer in parts."""
        ...

    def map(self, source: Iterable[Job], **options: Any) -> AbstractAsyncContextManager[Any]:
        """Run jobs as a map."""
        ...

    def lease(self, job: Job) -> AbstractAsyncContextManager[Any]:
        """Have a worker to oneself."""
        ...

    def read(self, reply: Any) -> Answer:
        """Read what came back: a part of a stream, or a result of a map."""
        ...


class CommandTarget:
    """A pool of command workers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def run(self, job: Job, on: Any = None) -> Answer:
        """Run a job."""
        return self.read(await (on or self._pool).exec(_payload(job), label=str(job.id)))

    def stream(self, job: Job, on: Any = None) -> AbstractAsyncContextManager[Any]:
        """Run a job and take its answer in parts."""
        where: Any = on or self._pool
        stream: AbstractAsyncContextManager[Any] = where.stream(_payload(job), label=str(job.id))
        return stream

    def map(self, source: Iterable[Job], **options: Any) -> AbstractAsyncContextManager[Any]:
        """Run jobs as a map."""
        pool: Any = self._pool
        mapped: AbstractAsyncContextManager[Any] = pool.map((_payload(job) for job in source), **options)
        return mapped

    def lease(self, job: Job) -> AbstractAsyncContextManager[Any]:
        """Have a worker to oneself."""
        return self._pool.lease(label=str(job.id))

    def read(self, reply: Any) -> Answer:
        """Read a payload."""
        head, _, payload = reply.body.partition(b"\n")
        return _answer(head, payload, reply.context)


class FunctionTarget:
    """A pool of Python functions."""

    def __init__(self, pool: PythonPool) -> None:
        self._pool = pool
        self._maps = 0

    async def run(self, job: Job, on: Any = None) -> Answer:
        """Run a job."""
        return self.read(await (on or self._pool).run_sync(jobs.run, *_arguments(job), label=str(job.id)))

    def stream(self, job: Job, on: Any = None) -> AbstractAsyncContextManager[Any]:
        """Run a job and take its answer in parts."""
        where: Any = on or self._pool
        stream: AbstractAsyncContextManager[Any] = where.stream(jobs.run_parts, *_arguments(job), label=str(job.id))
        return stream

    def map(self, source: Iterable[Job], **options: Any) -> AbstractAsyncContextManager[Any]:
        """Run jobs as a map: of one source or, every other time, of two."""
        self._maps += 1
        if self._maps % 2:
            return self._pool.map(jobs.run_one, (_arguments(job) for job in source), **options)
        lines, payloads = itertools.tee(map(_arguments, source))
        return self._pool.map(jobs.run, (line for line, _ in lines), (payload for _, payload in payloads), **options)

    def lease(self, job: Job) -> AbstractAsyncContextManager[Any]:
        """Have a worker to oneself."""
        return self._pool.lease(label=str(job.id))

    def read(self, reply: Any) -> Answer:
        """Read a result."""
        head, payload = reply
        return _answer(head, bytes(payload), None)


def _answer(head: bytes, payload: bytes, context: bytes | None) -> Answer:
    id_, part, release, checksum = map(int, head.split())
    return Answer(id_, part, release, checksum, payload, context)


def _payload(job: Job) -> Payload:
    return Payload(job.line + job.payload, job.context)


def _arguments(job: Job) -> tuple[bytes, Any]:
    if job.instruction.how != "array":
        return job.line, job.payload
    import numpy

    return job.line, numpy.frombuffer(job.payload, numpy.uint8)
