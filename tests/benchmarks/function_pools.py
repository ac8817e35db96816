"""Pools of functions: ours and the peers, each opened and called as its own documentation has it.

There are two kinds, `Awaited` under trio and `Blocking` elsewhere, with the same operations by the same names. Fresh
interpreters that are measured load this module (`alone`), so it imports next to nothing; each `open_*` imports what it
needs, and `Candidate.modules` names that.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager

from tests.benchmarks.functions import rest

TYPE_CHECKING = False  # typing itself would be one more import
if TYPE_CHECKING:
    from concurrent.futures import Executor
    from typing import Any

Function = Callable[..., object]
Done = Callable[[BaseException | None], object]


class Awaited:
    """A pool under trio: `call(fn, *args)`, and `map(fn, items, chunk)` for all results in order."""

    def __init__(
        self,
        call: "Callable[..., Awaitable[object]]",
        map_: "Callable[[Function, Iterable[object], int], Awaitable[list[Any]]]",
    ) -> None:
        self.call = call
        self.map = map_


class Blocking:
    """A pool for threads: the same two, of which `chunk` 0 is the map's own choice, and two more.

    `submit(fn, arg, done)` returns at once and calls `done` later; None where there is no such thing. `iterate` is a
    map whose results are had one by one, as they come.
    """

    def __init__(
        self,
        call: Function,
        submit: Callable[[Function, object, Done], object] | None,
        map_: "Callable[[Function, Iterable[object], int], list[Any]]",
        iterate: "Callable[[Function, Iterable[object], int], Iterator[Any]]",
    ) -> None:
        self.call = call
        self.submit = submit
        self.map = map_
        self.iterate = iterate


class Candidate:
    """A pool to be measured: one of `open_awaited` and `open_blocking` opens it, with a number of workers.

    `needs` is the module without which it can't be; `modules` is what a program that uses it would import. `start`,
    `one`, `many` and `whole` say how its workers start, how one caller calls, many do, and what stands for its map.
    """

    def __init__(
        self,
        name: str,
        needs: str,
        *modules: str,
        start: str,
        one: str,
        many: str,
        whole: str = "-",
        open_awaited: "Callable[[int], AbstractAsyncContextManager[Awaited]] | None" = None,
        open_blocking: "Callable[[int], AbstractContextManager[Blocking]] | None" = None,
    ) -> None:
        self.name = name
        self.needs = needs
        self.modules = (needs, *modules)
        self.start = start
        self.one = one
        self.many = many
        self.whole = whole
        self.open_awaited = open_awaited
        self.open_blocking = open_blocking

    @property
    def missing(self) -> str | None:
        """Say why it can't be measured, if it can't."""
        import importlib.util

        return None if importlib.util.find_spec(self.needs) else "not installed: pip install 'trio_workers[bench]'"


# under trio


@asynccontextmanager
async def open_ours(workers: int) -> AsyncIterator[Awaited]:
    from trio_workers import open_python_pool

    async with open_python_pool(workers) as pool:

        async def map_(fn: Function, items: Iterable[object], chunk: int) -> "list[Any]":
            async with pool.map(fn, items) as results:
                return [result async for result in results]

        yield Awaited(pool.run_sync, map_)


def with_tasks(call: "Callable[..., Awaitable[object]]", tasks: int) -> Awaited:
    """Make a map of a number of tasks, for those that have none: each takes the next item and waits for its result."""
    import trio

    async def map_(fn: Function, items: Iterable[object], chunk: int) -> "list[Any]":
        numbered = enumerate(items)
        results: dict[int, object] = {}

        async def take() -> None:
            for number, item in numbered:
                results[number] = await call(fn, item)

        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(take)
        return [results[number] for number in range(len(results))]

    return Awaited(call, map_)


@asynccontextmanager
async def open_trio_parallel(workers: int) -> AsyncIterator[Awaited]:
    import trio
    import trio_parallel

    limiter = trio.CapacityLimiter(workers)
    async with trio_parallel.open_worker_context() as context:
        yield with_tasks(lambda fn, *args: context.run_sync(fn, *args, limiter=limiter), 2 * workers)


@asynccontextmanager
async def open_anyio(workers: int) -> AsyncIterator[Awaited]:
    """Its processes belong to the event loop: they are shared by whoever opens this, and end with `trio.run`."""
    import anyio
    import anyio.to_process

    limiter = anyio.CapacityLimiter(workers)
    run_sync = anyio.to_process.run_sync
    yield with_tasks(lambda fn, *args: run_sync(fn, *args, limiter=limiter), 2 * workers)


# elsewhere


def of_executor(executor: "Executor") -> Blocking:
    def submit(fn: Function, arg: object, done: Done) -> None:
        executor.submit(fn, arg).add_done_callback(lambda future: done(future.exception()))

    return Blocking(
        lambda fn, *args: executor.submit(fn, *args).result(),
        submit,
        lambda fn, items, chunk: list(executor.map(fn, items, chunksize=chunk or 1)),
        lambda fn, items, chunk: executor.map(fn, items, chunksize=chunk or 1),
    )


@contextmanager
def open_executor(workers: int, method: str = "spawn") -> Iterator[Blocking]:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context(method)) as executor:
        yield of_executor(executor)


@contextmanager
def open_multiprocessing(workers: int, method: str = "spawn") -> Iterator[Blocking]:
    from multiprocessing import get_context

    pool = get_context(method).Pool(workers)

    def submit(fn: Function, arg: object, done: Done) -> None:
        pool.apply_async(fn, (arg,), callback=lambda _: done(None), error_callback=done)

    try:
        yield Blocking(
            lambda fn, *args: pool.apply(fn, args),
            submit,
            lambda fn, items, chunk: pool.map(fn, items, chunk or None),
            lambda fn, items, chunk: pool.imap(fn, items, chunk or 1),
        )
    finally:
        pool.close()
        pool.join()


@contextmanager
def open_pebble(workers: int) -> Iterator[Blocking]:
    from multiprocessing import get_context

    from pebble import ProcessPool

    pool = ProcessPool(workers, context=get_context("spawn"))

    def submit(fn: Function, arg: object, done: Done) -> None:
        pool.schedule(fn, args=(arg,)).add_done_callback(lambda future: done(future.exception()))

    try:
        yield Blocking(
            lambda fn, *args: pool.schedule(fn, args=args).result(),
            submit,
            lambda fn, items, chunk: list(pool.map(fn, items, chunksize=chunk or 1).result()),
            lambda fn, items, chunk: iter(pool.map(fn, items, chunksize=chunk or 1).result()),
        )
    finally:
        pool.close()
        pool.join()


@contextmanager
def open_loky(workers: int) -> Iterator[Blocking]:
    from loky import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as executor:
        yield of_executor(executor)


@contextmanager
def open_joblib(workers: int) -> Iterator[Blocking]:
    """With one worker it would call the function in this process, so it has two at least."""
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    def iterate(fn: Function, items: Iterable[object], chunk: int) -> "Iterator[Any]":
        parallel = Parallel(n_jobs=max(2, workers), batch_size=chunk or "auto", return_as="generator")
        return iter(parallel(delayed(fn)(item) for item in items))

    with Parallel(n_jobs=max(2, workers), batch_size=1) as one:
        try:
            yield Blocking(
                lambda fn, *args: one([delayed(fn)(*args)])[0],
                None,
                lambda fn, items, chunk: list(iterate(fn, items, chunk)),
                iterate,
            )
        finally:
            get_reusable_executor().shutdown(wait=True)


TASKS = "64 tasks"
OUTSTANDING = "64 jobs outstanding, submitted by one thread"
NO_MAP = "has none: tasks, two for each worker, take items in turn"

OURS = Candidate(
    "trio_workers, open_python_pool", "trio_workers", "trio", "trio_workers._python_pool",
    start="fresh interpreters", one="`await pool.run_sync(...)`", many=TASKS,
    whole="`pool.map`, taken by one task", open_awaited=open_ours,
)  # fmt: skip
TRIO_PARALLEL = Candidate(
    "trio-parallel", "trio_parallel", "trio",
    start="spawn", one="`await context.run_sync(...)`", many=TASKS, whole=NO_MAP, open_awaited=open_trio_parallel,
)  # fmt: skip
ANYIO = Candidate(
    "anyio.to_process on trio", "anyio", "trio", "anyio.to_process", "anyio._backends._trio",
    start="fresh interpreters", one="`await to_process.run_sync(...)`", many=TASKS, whole=NO_MAP,
    open_awaited=open_anyio,
)  # fmt: skip
EXECUTOR = Candidate(
    "ProcessPoolExecutor", "concurrent.futures", "concurrent.futures.process",
    start="spawn", one="`submit(...).result()`", many=OUTSTANDING, whole="`map`",
    open_blocking=open_executor,
)  # fmt: skip
MULTIPROCESSING = Candidate(
    "multiprocessing.Pool", "multiprocessing", "multiprocessing.pool",
    start="spawn", one="`apply(...)`", many=OUTSTANDING + " (`apply_async`)", whole="`map`",
    open_blocking=open_multiprocessing,
)  # fmt: skip
PEBBLE = Candidate(
    "Pebble's ProcessPool", "pebble",
    start="spawn", one="`schedule(...).result()`", many=OUTSTANDING, whole="`map`",
    open_blocking=open_pebble,
)  # fmt: skip
LOKY = Candidate(
    "loky's ProcessPoolExecutor", "loky",
    start="loky's own (fork and exec)", one="`submit(...).result()`", many=OUTSTANDING, whole="`map`",
    open_blocking=open_loky,
)  # fmt: skip
JOBLIB = Candidate(
    "joblib", "joblib",
    start="loky's own (fork and exec)", one="`parallel([delayed(...)(...)])`, two workers: with one it runs it itself",
    many="has none: its calls can't overlap", whole="`Parallel`", open_blocking=open_joblib,
)  # fmt: skip
ALL = (OURS, TRIO_PARALLEL, ANYIO, EXECUTOR, MULTIPROCESSING, PEBBLE, LOKY, JOBLIB)

# For a small program without threads, fork is another way to begin, and on Linux the default before Python 3.14.
FORKED = (
    Candidate(
        "ProcessPoolExecutor, forked", "concurrent.futures", "concurrent.futures.process",
        start="fork", one=EXECUTOR.one, many="-",
        open_blocking=lambda workers: open_executor(workers, "fork"),
    ),
    Candidate(
        "multiprocessing.Pool, forked", "multiprocessing", "multiprocessing.pool",
        start="fork", one=MULTIPROCESSING.one, many="-",
        open_blocking=lambda workers: open_multiprocessing(workers, "fork"),
    ),
)  # fmt: skip


REST = 0.1
"""Seconds that a job keeps its worker, so that another must take the next."""


async def bring_up(pool: Awaited, workers: int) -> set[int]:
    """Have every worker do a job; return their pids."""
    pids: set[int] = set()
    while len(pids) < workers:
        pids.update(await pool.map(rest, [REST] * workers, 1))
    return pids
