"""Pools of command workers, as users see them: `open_pool` and `open_worker`, on a core (`_core.py`) and a codec."""

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Generic, Literal, NoReturn, TypeVar, overload

import attrs
import trio

from ._codec import PayloadCodec, check_label, decode
from ._config import Config
from ._core import Block, JobObserver, Observer, PoolCore, PoolStatistics, as_spawn_error, open_core
from ._errors import WorkerError
from ._exchange import Parts
from ._map import OneByOne, Results, open_map
from ._model import Payload, payload_of
from ._seats import Job
from ._worker import Worker

W = TypeVar("W")


class Observed:
    """What both kinds of pool have for those who look on."""

    _core: PoolCore

    def add_observer(self, observer: Observer) -> None:
        """Call `observer(event, worker, context)` from now on, besides those there are; see `open_pool`."""
        check_observer(observer, optional=False)
        self._core.add_observer(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Call it no more. ValueError where it is not among them."""
        self._core.remove_observer(observer)

    def add_job_observer(self, job_observer: JobObserver) -> None:
        """Call `job_observer(record)` at each job's end from now on, besides those there are; see `open_pool`."""
        check_observer(job_observer, "job_observer", optional=False)
        self._core.add_job_observer(job_observer)

    def remove_job_observer(self, job_observer: JobObserver) -> None:
        """Call it no more. ValueError where it is not among them. Where none is left, jobs cost nothing for it."""
        self._core.remove_job_observer(job_observer)


class Pool(Observed):
    """A pool of worker processes. You get one from `open_pool`."""

    def __init__(self) -> None:
        raise TypeError("Pool has no public constructor; use open_pool")

    @classmethod
    def _create(cls, core: PoolCore) -> "Pool":
        self = object.__new__(cls)
        self._core = core
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Pool can't be sent to another process; send what the job needs of it instead")

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
        answer = await core.exchange.run(core.job(payload, label))
        return payload_of(answer.body, answer.context)

    def stream(self, payload: Payload, *, label: str | None = None) -> Parts[Payload]:
        """Run one job and take its reply in parts, an async iterator: `async with pool.stream(payload) as parts`.

        Entering waits for a worker and sends the job; it raises what `exec` raises before a job starts. Each part is a
        `Payload`; a job error comes out of the iteration. Nothing is read ahead: a slow consumer holds the worker back.

        Leaving early by `break`, return or an error asks the worker to end the stream, and a task of the pool reads on
        to the last frame within `Config.destroy_timeout`; past that the worker is killed. Leaving by a cancel kills it
        at once. In goridge-1 and -2 a reply has one part.
        """
        core = self._core
        return Parts[Payload]._create(core.exchange, core.job(payload, label), decode)  # pyright: ignore[reportPrivateUsage]

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
        block = open_map(
            OneByOne(self._exec_patiently),
            payloads,
            ordered=ordered,
            window=window,
            base=core.window,
            width=core.width,
            return_exceptions=return_exceptions,
        )
        return Block(block, "map")

    @trio.lowlevel.enable_ki_protection
    async def _exec_patiently(self, payload: Payload) -> Payload:
        core = self._core
        job = core.job(payload)
        job.patient, job.unhurried = True, core.roster.may_grow
        return decode(await core.exchange.run(job))

    @trio.lowlevel.enable_ki_protection
    async def reset(self, config: Config | None = None) -> None:
        """Replace every worker by a fresh one, and return when the last old one is gone.

        With a `config`, by workers of that: another command, environment, protocol, factory or number of workers, and
        all its other fields for the jobs to come. It is the pool's `config` from when its factory is open. One worker
        at a time is replaced, in large pools one in eight, each when its successor is ready, so no job waits longer or
        is lost; one that is leased is replaced after its lease.

        Raise `SpawnError` where a new worker can't boot: then the pool goes back to what it was, and those that were
        replaced already are replaced once more. `OSError` where the new factory can't be opened, and
        `trio.ClosedResourceError` where the pool is closed, or is meanwhile. A call while another `reset` or `resize`
        is under way takes over from it, and both return, or raise, as one. Cancelling gives up the wait, not the
        change.
        """
        if config is None:
            await self._core.reset()
        else:
            _check(config)
            await self._core.reset(config, PayloadCodec(config))

    @trio.lowlevel.enable_ki_protection
    async def resize(self, num_workers: int) -> None:
        """Have this many workers, and return when they are ready, or those too many are gone.

        Workers are added at once, and retired after the job they are on, those of the highest slots.
        `Config.max_workers` is raised to this number for as long as it is above it. Raise TypeError or ValueError for
        anything but a number of at least 1; `SpawnError` where a new worker can't boot: then the pool has as many as
        before. Otherwise like `reset`.
        """
        await self._core.resize(num_workers)

    def lease(self, *, label: str | None = None) -> "Lease[Worker]":
        """Have one worker to yourself: `async with pool.lease() as worker: await worker.exec(...)`.

        Queued as one job, with the errors of one. `Config.max_executions` is looked at when the lease ends. A worker
        that asks to be replaced inside is a `WorkerError` with phase "retiring". Cancelling inside kills the worker if
        a job runs on it.
        """
        return Lease[Worker]._create(self._core, label, lambda _, worker: worker)  # pyright: ignore[reportPrivateUsage]


class Lease(Generic[W]):
    """One worker to oneself, for the time of an `async with`."""

    _core: PoolCore
    _job: Job
    _show: Callable[[PoolCore, Worker], W]
    _entered: bool

    def __init__(self) -> None:
        raise TypeError("Lease has no public constructor; it comes from lease()")

    @classmethod
    def _create(cls, core: PoolCore, label: object, show: Callable[[PoolCore, Worker], W]) -> "Lease[W]":
        self: Lease[W] = object.__new__(cls)
        self._core = core
        self._job = Job((), check_label(label), lease=True)
        self._show = show
        self._entered = False
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> W:
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
        return self._show(self._core, job.seat.worker)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seat = self._job.seat
        try:
            if seat is not None and seat.jobs and (error is None or isinstance(error, Exception)):
                # A stream that was left early is being read to its end, within `destroy_timeout`; so the worker stays.
                await self._core.exchange.wait_for_leaving(seat)
        finally:
            self._core.release(self._job)


def open_pool(
    config: Config, *, observer: Observer | None = None, job_observer: JobObserver | None = None
) -> AbstractAsyncContextManager[Pool]:
    """Open a pool of workers: `async with open_pool(config) as pool: ...`.

    Yields when all workers are ready; they are booted side by side, about twice the cores at a time. The first that
    does not become ready ends the opening with its `SpawnError`.

    `observer(event, worker, context)` is called in the trio thread, in order, after each change is complete: see
    `WorkerEvent`. `job_observer(record)` is called likewise, once at each job's end, with its `JobRecord`; jobs of a
    lease or a map included, a lease itself only where it is not got. One that raises is logged and does no harm.

    Left normally: jobs accepted so far finish, later ones get `trio.ClosedResourceError`, then the workers get the stop
    frame, `Config.destroy_timeout` and SIGKILL. Left by an exception or a cancel: the workers are killed at once. An
    exception leaves as it is. `RestartLimitExceeded` leaves the block when the pool gives up (`Restart.give_up_after`).
    """
    check_observer(observer)
    check_observer(job_observer, "job_observer")
    _check(config)

    @asynccontextmanager
    async def block() -> AsyncGenerator[Pool]:
        async with open_core(config, PayloadCodec(config), observer, job_observer) as core:
            yield Pool._create(core)  # pyright: ignore[reportPrivateUsage]

    return Block(block(), "open_pool")


def open_worker(config: Config, *, observer: Observer | None = None) -> AbstractAsyncContextManager[Worker]:
    """Start a single worker, to oneself: `async with open_worker(config) as worker`, then `await worker.exec(payload)`.

    It is not replaced: once it is gone, `exec` raises what it ended with. So what would replace it is not looked at:
    `Config.num_workers`, `max_workers`, `max_executions`, `debug`, and of its `limits` `ttl`, `idle_ttl` and
    `max_memory`. Otherwise like `open_pool`.
    """
    check_observer(observer)
    _check(config)
    alone = attrs.evolve(config, num_workers=1, max_workers=None, debug=False)

    @asynccontextmanager
    async def block() -> AsyncGenerator[Worker]:
        async with open_core(alone, PayloadCodec(config), observer) as core:
            job = Job((), "open_worker", lease=True)
            core.exchange.enter(job)
            if job.seat is None:  # it shook hands and died in the same moment
                core.exchange.abandon(job)
                raise as_spawn_error(core.last_error or WorkerError("the worker died before it could be used"))
            job.bound = True
            core.take_no_more()  # so nothing is healed either
            try:
                yield job.seat.worker
            finally:
                core.release(job)

    return Block(block(), "open_worker")


def _check(config: object) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, not {type(config).__name__}")


def check_observer(observer: object, name: str = "observer", *, optional: bool = True) -> None:
    """Raise an error where this can't be called in the middle of a change."""
    if not callable(observer) and not (optional and observer is None):
        raise TypeError(f"{name} must be callable, not {type(observer).__name__}")
    if inspect.iscoroutinefunction(observer):
        raise TypeError(f"{name} must be a plain function, not an async one: it is called in the middle of a change")
