"""A million jobs through each path: does anything grow? One table, which takes minutes and is measured on request."""

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import attrs
import trio

from tests.benchmarks.abilities import NO_BATCHES, NO_READ_AHEAD, READ_AHEAD
from tests.benchmarks.alone import size_of
from tests.benchmarks.functions import give_back, yield_back
from tests.benchmarks.measures import Pace
from tests.benchmarks.report import Figure, Table, kibibytes, per_second
from tests.benchmarks.subjects import python_pool
from tests.hundred_thousand import GROWTH, look
from trio_workers import Payload, Pool, PythonPool, open_python_pool

CALLERS: Final = 64
WORKERS: Final = 2
BODY: Final = b"0123456789"
WARM_UP: Final = 10
"""One job in so many is done before the first look."""
REST: Final = 0.2
"""Seconds between the last job and a look."""

Path = Callable[[Any, int], Awaitable[None]]
"""Puts so many jobs through an open pool."""


async def side_by_side(call: Callable[[], Awaitable[object]], jobs: int) -> None:
    """Let many tasks call, so many times in all."""
    begun = 0

    async def caller() -> None:
        nonlocal begun
        while begun < jobs:
            begun += 1
            await call()

    async with trio.open_nursery() as nursery:
        for _ in range(CALLERS):
            nursery.start_soon(caller)


async def by_exec(pool: Pool, jobs: int) -> None:
    await side_by_side(functools.partial(pool.exec, Payload(BODY)), jobs)


async def by_stream(pool: Pool, jobs: int) -> None:
    async def one() -> None:
        async with pool.stream(Payload(BODY)) as parts:
            assert [part.body async for part in parts] == [BODY]

    await side_by_side(one, jobs)


async def by_map(pool: Pool, jobs: int) -> None:
    count = 0
    async with pool.map(Payload(BODY) for _ in range(jobs)) as replies:
        async for _ in replies:
            count += 1
    assert count == jobs


async def by_run_sync(pool: PythonPool, jobs: int) -> None:
    await side_by_side(functools.partial(pool.run_sync, give_back, BODY), jobs)


async def by_stream_of_function(pool: PythonPool, jobs: int) -> None:
    async def one() -> None:
        async with pool.stream(yield_back, BODY) as parts:
            assert [part async for part in parts] == [BODY]

    await side_by_side(one, jobs)


async def by_map_of_function(pool: PythonPool, jobs: int) -> None:
    count = 0
    async with pool.map(give_back, range(jobs)) as results:
        async for result in results:
            assert result == count
            count += 1
    assert count == jobs


async def by_batches(pool: PythonPool, jobs: int) -> None:
    count = 0
    async with pool.map(give_back, range(jobs)) as results:
        async for batch in results.batches():  # type: ignore[attr-defined]
            count += len(batch)
    assert count == jobs


@asynccontextmanager
async def open_commands(read_ahead: int = 1) -> AsyncIterator[Pool]:
    async with python_pool("commands", read_ahead=read_ahead).open(WORKERS) as it:
        assert it.pool is not None
        yield it.pool


def open_functions() -> AbstractAsyncContextManager[PythonPool]:
    return open_python_pool(WORKERS)


PATHS: Final[dict[str, tuple[Callable[[], AbstractAsyncContextManager[Any]], Path, str | None]]] = {
    "exec": (open_commands, by_exec, None),
    f"exec, read_ahead={READ_AHEAD}": (functools.partial(open_commands, READ_AHEAD), by_exec, NO_READ_AHEAD),
    "stream of a command, one part each": (open_commands, by_stream, None),
    "map of a command": (open_commands, by_map, None),
    "run_sync": (open_functions, by_run_sync, None),
    "stream of a function, one part each": (open_functions, by_stream_of_function, None),
    "map of a function": (open_functions, by_map_of_function, None),
    "map of a function, by batches": (open_functions, by_batches, NO_BATCHES),
}


@attrs.frozen
class Seen:
    """What was there while a pool rested."""

    memory: int
    in_workers: int
    descriptors: int
    tasks: int


async def see(pool: Pool | PythonPool) -> Seen:
    await trio.sleep(REST)
    here = look(0, 0)
    in_workers = sum(size_of(worker.pid)[0] for worker in pool.workers if worker.pid is not None)
    return Seen(here.memory, in_workers, here.descriptors, here.tasks)


async def million(pace: Pace) -> list[Table]:
    table = Table(
        f"{pace.jobs:,} jobs through each path",
        f"{WORKERS} workers, and {CALLERS} callers but for maps, which one task takes from. What has grown from before "
        f"them, after a warm-up of a {WARM_UP}th of them, to after them, while the pool rests: resident memory of this "
        "process and of the workers, descriptors, tasks. Flat is less than "
        f"{GROWTH / 2**20:.0f} MiB of memory here, and for each worker, and nothing else.",
        ["path", "seconds", "jobs a second", "memory", "of the workers", "descriptors", "tasks", "flat"],
    )
    for name, (open_, path, missing) in PATHS.items():
        if missing is not None:
            table.add_missing(name, missing)
            continue
        async with open_() as pool:
            await path(pool, max(1, pace.jobs // WARM_UP))
            before = await see(pool)
            start = time.perf_counter()
            await path(pool, pace.jobs)
            taken = time.perf_counter() - start
            after = await see(pool)
        here, there = after.memory - before.memory, after.in_workers - before.in_workers
        same = (before.descriptors, before.tasks) == (after.descriptors, after.tasks)
        table.add(
            name,
            f"{taken:.0f}",
            Figure(per_second(pace.jobs / taken), [pace.jobs / taken]),
            Figure(kibibytes(here), [here]),
            Figure(kibibytes(there), [there]),
            f"{before.descriptors}, then {after.descriptors}",
            f"{before.tasks}, then {after.tasks}",
            "yes" if same and here < GROWTH and there < WORKERS * GROWTH else "**no**",
        )
    return [table]


MILLION_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {"million": million}
