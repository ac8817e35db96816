"""Pools that run Python functions: `open_python_pool`, on a core (`_core.py`) and a codec of its own."""

import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, NoReturn, TypeVar, overload

import trio

from ._chunks import FunctionRunner
from ._codec import Answer, check_label
from ._config import Config, Environment, Limits, Restart, available_cores
from ._core import Block, JobObserver, Observer, PoolCore, PoolStatistics, open_core
from ._exchange import Parts
from ._functions import FunctionCodec, PicklerName, decode, name_of
from ._interpreter import PythonFactory, check_not_importing, describe_main, interpreter
from ._map import Results, open_map
from ._pool import Lease, Observed, check_observer
from ._seats import Job, Seat
from ._worker import Worker

T = TypeVar("T")

UNLIMITED = 1 << 63
"""`Config.max_frame_size` of a Python pool that was given none."""


class PythonPool(Observed):
    """A pool of Python processes that run functions. You get one from `open_python_pool`."""

    _codec: FunctionCodec

    def __init__(self) -> None:
        raise TypeError("PythonPool has no public constructor; use open_python_pool")

    @classmethod
    def _create(cls, core: PoolCore, codec: FunctionCodec) -> "PythonPool":
        self = object.__new__(cls)
        self._core = core
        self._codec = codec
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PythonPool can't be sent to another process; send what the job needs of it instead")

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<PythonPool {self._core.config.name!r}: {len(self.workers)} workers, {now.idle} idle, {now.busy} busy, "
            f"{now.starting} starting, {now.leased} leased, {now.stopping} stopping; {now.waiting} callers waiting>"
        )

    @property
    def config(self) -> Config:
        """What the pool is made of: the arguments of `open_python_pool`, in the fields of the same names."""
        return self._core.config

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Every worker known, from spawn to reap, by slot; two with one slot while one replaces the other."""
        return self._core.workers

    def statistics(self) -> PoolStatistics:
        """Look at the pool, as it is now."""
        return self._core.statistics()

    @trio.lowlevel.enable_ki_protection
    async def run_sync(self, fn: Callable[..., T], *args: Any, label: str | None = None) -> T:
        """Run `fn(*args)` in whichever worker is free first, and return its result.

        Keyword arguments go through `functools.partial`, as everywhere in trio. The function and its arguments are
        pickled before a worker is taken: `pickle.PicklingError` says which of them can't be. Arrays and other large
        buffers are not copied then: don't change them before the call has returned. `label` names the job in
        `Worker.current`, logs and errors; the function's qualified name by default.

        What the function raises is raised here, with the worker's traceback as its `__cause__`
        (`RemoteTraceback`); what can't be sent as itself (or is no `Exception`, such as SystemExit) is a `JobError`
        with the traceback as its text. The worker stays. `WorkerCrashed` where the worker dies; `AllocateTimeout`
        after `allocate_timeout` of waiting; `QueueFull`; `trio.ClosedResourceError` where the pool is closed. An async
        or generator function is a TypeError.

        Cancelling takes a waiting job out of the queue. A running one ends with its worker, which is killed and
        replaced, unless the whole result is already there.
        """
        job = Job(self._codec.encode_call(fn, args), name_of(fn) if label is None else check_label(label))
        return decode(await self._core.exchange.run(job), fn)  # type: ignore[no-any-return]

    def stream(self, fn: Callable[..., Iterable[T]], *args: Any, label: str | None = None) -> Parts[T]:
        """Run a generator function in a worker and take what it yields: `async with pool.stream(fn, *args) as parts`.

        Entering waits for a worker and sends the job, with the errors of `run_sync`; what the function raises comes
        out of the iteration. The worker runs ahead of a slow consumer as far as the socket between them holds (about
        a megabyte), and no further. Leaving early by `break`, return or an error closes the generator in the worker,
        which stays; it must come to its next `yield` within `destroy_timeout`. Leaving by a cancel kills the worker.
        """
        return _stream(self._core, self._codec, fn, args, label)

    @overload
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> AbstractAsyncContextManager[Results[T]]: ...

    @overload
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: bool,
    ) -> AbstractAsyncContextManager[Results[T | Exception]]: ...

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any] | AsyncIterable[Any],
        ordered: bool = True,
        window: int | None = None,
        return_exceptions: bool = False,
    ) -> AbstractAsyncContextManager[Results[T]] | AbstractAsyncContextManager[Results[T | Exception]]:
        """Run `fn` for each item of a source, as an async iterator: `async with pool.map(fn, items) as results`.

        Several sources are taken from side by side, as by the built-in `map`, until the first of them ends. Each may be
        sync or async, and endless: at most `window` items are taken and not delivered yet. Without one it is two for
        each worker, and for quick functions, whose calls go to a worker many at a time, two of those chunks. Results
        come in the order of the source, or as they are ready with `ordered=False`; `results.batches()` gives them as
        lists.

        A job's exception is raised where its result would have come, and ends the map; with `return_exceptions=True`
        it is delivered in that place instead, and the map goes on. An error of a source comes out as itself, after all
        results before it. Leaving the block closes the sources (those that are generators), and cancels the jobs still
        running.

        How many calls make a chunk is decided by the time they take, from one up to as many as take about 2 ms; calls
        that take milliseconds go alone, and so does every call with `max_executions`, with `debug`, and with a
        `max_frame_size` under 512 KiB. Nothing else shows it: each call has its own result or error and its own
        `JobRecord`, a crash costs the call that it hit, and `exec_ttl` is for one call.

        Its jobs wait for their turn inside the map: at most one for each worker is with the pool, and only then
        `allocate_timeout` counts. `max_queue` does not count them.
        """
        if not iterables:
            raise TypeError("map takes a function and at least one iterable")
        self._codec.check(fn, "map")
        core = self._core
        block = open_map(
            FunctionRunner(core, self._codec, fn, name_of(fn)),
            *iterables,
            ordered=ordered,
            window=window,
            base=core.window,
            width=core.width,
            return_exceptions=return_exceptions,
        )
        return Block(block, "map")

    @trio.lowlevel.enable_ki_protection
    async def reset(self) -> None:
        """Replace every worker by a fresh interpreter, and return when the last old one is gone; see `Pool.reset`.

        Functions are found anew by the fresh ones, so edited code counts, in the workers: what this process has
        imported itself, and what it pickles by value, stays as it is.
        """
        await self._core.reset()

    @trio.lowlevel.enable_ki_protection
    async def resize(self, num_workers: int) -> None:
        """Have this many workers, and return when they are ready, or those too many are gone; see `Pool.resize`."""
        await self._core.resize(num_workers)

    def lease(self, *, label: str | None = None) -> "Lease[PythonWorker]":
        """Have one worker to yourself: `async with pool.lease() as worker: await worker.run_sync(fn, *args)`.

        What one job leaves behind in the process (a loaded model, an open file) is there for the next. Queued as one
        job, with the errors of one. `max_executions` is looked at when the lease ends. Cancelling inside kills the
        worker if a job runs on it.
        """
        codec = self._codec

        def show(core: PoolCore, worker: Worker) -> PythonWorker:
            return PythonWorker._create(core, codec, worker)  # pyright: ignore[reportPrivateUsage]

        return Lease[PythonWorker]._create(self._core, label, show)  # pyright: ignore[reportPrivateUsage]


class PythonWorker:
    """One worker of a Python pool, to yourself. You get one from `PythonPool.lease`."""

    _core: PoolCore
    _codec: FunctionCodec
    _worker: Worker

    def __init__(self) -> None:
        raise TypeError("PythonWorker has no public constructor; use PythonPool.lease")

    @classmethod
    def _create(cls, core: PoolCore, codec: FunctionCodec, worker: Worker) -> "PythonWorker":
        self = object.__new__(cls)
        self._core = core
        self._codec = codec
        self._worker = worker
        return self

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._worker.pid

    @property
    def slot(self) -> int:
        """Its place in the pool, from 0; its replacement keeps it. Jobs find it in `TRIO_WORKERS_SLOT`."""
        return self._worker.slot

    @trio.lowlevel.enable_ki_protection
    async def run_sync(self, fn: Callable[..., T], *args: Any, label: str | None = None) -> T:
        """Run `fn(*args)` in this worker; see `PythonPool.run_sync`. `trio.BusyResourceError` where it is at work."""
        job = Job(self._codec.encode_call(fn, args), name_of(fn) if label is None else check_label(label))
        return decode(await self._core.exchange.run(job, self._worker.seat), fn)  # type: ignore[no-any-return]

    def stream(self, fn: Callable[..., Iterable[T]], *args: Any, label: str | None = None) -> Parts[T]:
        """Run a generator function in this worker; see `PythonPool.stream`."""
        return _stream(self._core, self._codec, fn, args, label, self._worker.seat)

    def __str__(self) -> str:
        return str(self._worker)

    def __repr__(self) -> str:
        return f"<PythonWorker: {self._worker}>"


def _stream(
    core: PoolCore,
    codec: FunctionCodec,
    fn: Callable[..., Iterable[T]],
    args: Sequence[Any],
    label: str | None,
    seat: Seat | None = None,
) -> Parts[T]:
    frames = codec.encode_call(fn, args, stream=True)
    job = Job(frames, name_of(fn) if label is None else check_label(label))

    def take(answer: Answer) -> T:
        return decode(answer, fn, "a part of the stream")  # type: ignore[no-any-return]

    return Parts[T]._create(core.exchange, job, take, seat)  # pyright: ignore[reportPrivateUsage]


def open_python_pool(
    num_workers: int | None = None,
    *,
    initializer: Callable[..., object] | None = None,
    initargs: Iterable[Any] = (),
    pickler: PicklerName = "pickle",
    observer: Observer | None = None,
    job_observer: JobObserver | None = None,
    max_executions: int = 0,
    allocate_timeout: float = 60.0,
    destroy_timeout: float = 10.0,
    boot_timeout: float = 60.0,
    max_queue: int | None = None,
    env: Environment | None = None,
    cwd: str | bytes | os.PathLike[str] | None = None,
    max_frame_size: int | None = None,
    restart: Restart | None = None,
    limits: Limits | None = None,
    max_workers: int | None = None,
    grow_after: float = 0.1,
    debug: bool = False,
    name: str = "pool",
) -> AbstractAsyncContextManager[PythonPool]:
    """Open a pool of Python processes that run functions: `async with open_python_pool() as pool: ...`.

    A pool like that of `open_pool`, whose worker program is part of this package: the same supervision, events,
    statistics and ways to leave the block. The fields of the same name are those of `Config`, with the same defaults,
    but for `max_frame_size`: None sets no bound to the size of a call or a result.

    `num_workers`: how many processes; the cores this process may use by default.
    `initializer`: called with `initargs` in each worker before its first job. One that raises is a `SpawnError` with
    its exception as the cause.
    `pickler`: "pickle", or "cloudpickle" for functions that have no name to be found by (the extra `cloudpickle`).

    Workers are fresh interpreters with this one's flags, `sys.path` and environment. They import the program's main
    module when a job first needs something of it, as `__mp_main__`, so what opens the pool stands behind
    `if __name__ == "__main__":`.
    """
    check_not_importing()
    check_observer(observer)
    check_observer(job_observer, "job_observer")
    if isinstance(initargs, str | bytes) or not hasattr(initargs, "__iter__"):
        raise TypeError(f"initargs must be a tuple of arguments, not {type(initargs).__name__}")
    initargs = tuple(initargs)
    main = describe_main()
    codec = FunctionCodec(pickler, max_frame_size, main if isinstance(main, str) else "")
    encoded = None if initializer is None else codec.encode_initializer(initializer, initargs)
    if initializer is None and initargs:
        raise ValueError("initargs are given, but no initializer to call with them")
    factory = PythonFactory(
        main=main,
        pickler=pickler,
        initializer=encoded,
        initializer_name="" if initializer is None else name_of(initializer),
        keeps_memory=not (isinstance(limits, Limits) and limits.bounds_memory),
    )
    interpreter()  # fails here rather than at each start
    config = Config(
        command=factory.command,
        num_workers=available_cores() if num_workers is None else num_workers,
        max_executions=max_executions,
        allocate_timeout=allocate_timeout,
        destroy_timeout=destroy_timeout,
        boot_timeout=boot_timeout,
        max_queue=max_queue,
        factory=factory,
        env=env,
        cwd=cwd,
        max_frame_size=UNLIMITED if max_frame_size is None else max_frame_size,
        restart=Restart() if restart is None else restart,
        limits=Limits() if limits is None else limits,
        max_workers=max_workers,
        grow_after=grow_after,
        debug=debug,
        name=name,
    )

    @asynccontextmanager
    async def block() -> AsyncGenerator[PythonPool]:
        async with open_core(config, codec, observer, job_observer, latest_first=True) as core:
            yield PythonPool._create(core, codec)  # pyright: ignore[reportPrivateUsage]

    return Block(block(), "open_python_pool")
