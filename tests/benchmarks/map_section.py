"""The table of maps over many tiny calls: ours and each way that the peers have."""

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import attrs
import trio

from tests.benchmarks.abilities import NO_BATCHES
from tests.benchmarks.function_pools import (
    ANYIO,
    EXECUTOR,
    JOBLIB,
    LOKY,
    MULTIPROCESSING,
    OURS,
    PEBBLE,
    TRIO_PARALLEL,
    Awaited,
    Blocking,
    Candidate,
    bring_up,
)
from tests.benchmarks.functions import give_back
from tests.benchmarks.measures import Pace, in_turn
from tests.benchmarks.report import Aim, Table, milli, per_second, ratios, spread
from trio_workers import PythonPool, open_python_pool

WORKERS: Final = 2
FEWER: Final = 10
"""A way that has one message for each call, and is none that we compare ourselves with, has so many times fewer."""
CHUNK: Final = 100

Run = Callable[[Any, Sequence[object]], Awaitable[tuple[float | None, list[Any]]]]
"""Takes an open pool and items; returns the time of the first result, where that can be told, and all results."""


# ours


async def one_by_one(pool: PythonPool, items: Sequence[object]) -> tuple[float | None, list[Any]]:
    async with pool.map(give_back, items) as results:
        first = [await results.__anext__()]
        came = time.perf_counter()
        return came, first + [result async for result in results]


async def by_batches(pool: PythonPool, items: Sequence[object]) -> tuple[float | None, list[Any]]:
    came: float | None = None
    everything: list[Any] = []
    async with pool.map(give_back, items) as results:
        async for batch in results.batches():  # type: ignore[attr-defined]
            if came is None:
                came = time.perf_counter()
            everything += batch
    return came, everything


# the peers


async def by_tasks(pool: Awaited, items: Sequence[object]) -> tuple[float | None, list[Any]]:
    return None, await pool.map(give_back, items, 1)


def in_thread(function: Callable[[Blocking, Sequence[object]], tuple[float | None, list[Any]]]) -> Run:
    async def run(pool: Blocking, items: Sequence[object]) -> tuple[float | None, list[Any]]:
        return await trio.to_thread.run_sync(function, pool, items)

    return run


def iterated(chunk: int) -> Run:
    def run(pool: Blocking, items: Sequence[object]) -> tuple[float | None, list[Any]]:
        results = pool.iterate(give_back, items, chunk)
        first = next(results)
        return time.perf_counter(), [first, *results]

    return in_thread(run)


def whole(chunk: int) -> Run:
    return in_thread(lambda pool, items: (None, pool.map(give_back, items, chunk)))


@attrs.frozen
class Way:
    """A map of somebody's, and how many times fewer items it gets."""

    name: str
    candidate: Candidate
    run: Run
    fewer: int = 1
    lacking: str | None = None

    @property
    def missing(self) -> str | None:
        return self.candidate.missing or self.lacking


OUR_MAP: Final = Way("trio_workers, `pool.map`", OURS, one_by_one)
OUR_BATCHES: Final = Way("trio_workers, `pool.map`, by `results.batches()`", OURS, by_batches, lacking=NO_BATCHES)
IMAP: Final = Way("multiprocessing.Pool.imap, chunks of 1", MULTIPROCESSING, iterated(1))
POOL_MAP: Final = Way("multiprocessing.Pool.map, its own chunks", MULTIPROCESSING, whole(0))
EXECUTOR_MAP: Final = Way("ProcessPoolExecutor.map, chunks of 1", EXECUTOR, iterated(1))
WAYS: Final = (
    OUR_MAP,
    OUR_BATCHES,
    IMAP,
    POOL_MAP,
    EXECUTOR_MAP,
    Way(f"ProcessPoolExecutor.map, chunks of {CHUNK}", EXECUTOR, iterated(CHUNK)),
    Way("Pebble's map, chunks of 1", PEBBLE, iterated(1), FEWER),
    Way(f"Pebble's map, chunks of {CHUNK}", PEBBLE, iterated(CHUNK)),
    Way("loky's map, chunks of 1", LOKY, iterated(1), FEWER),
    Way(f"loky's map, chunks of {CHUNK}", LOKY, iterated(CHUNK)),
    Way("joblib's Parallel, its own batches", JOBLIB, iterated(0)),
    Way("trio-parallel, tasks take items in turn", TRIO_PARALLEL, by_tasks, FEWER),
    Way("anyio.to_process, tasks take items in turn", ANYIO, by_tasks, FEWER),
)


@asynccontextmanager
async def opened(candidates: Iterable[Candidate]) -> AsyncIterator[dict[str, Any]]:
    """Open each once, with all workers up; ours is the pool itself."""
    async with AsyncExitStack() as stack:
        pools: dict[str, Any] = {}
        for candidate in candidates:
            if candidate.name in pools:
                continue
            if candidate is OURS:
                ours = pools[candidate.name] = await stack.enter_async_context(open_python_pool(WORKERS))
                await ours.run_sync(give_back, 0)
            elif candidate.open_awaited is not None:
                awaited = pools[candidate.name] = await stack.enter_async_context(candidate.open_awaited(WORKERS))
                await bring_up(awaited, WORKERS)
            else:
                assert candidate.open_blocking is not None
                blocking = pools[candidate.name] = stack.enter_context(candidate.open_blocking(WORKERS))
                run_in_thread = functools.partial(functools.partial, trio.to_thread.run_sync)
                await bring_up(Awaited(run_in_thread(blocking.call), run_in_thread(blocking.map)), WORKERS)
        yield pools


async def maps(pace: Pace) -> list[Table]:
    table = Table(
        f"map of {pace.items:,} calls of a tiny function",
        f"In order, with {WORKERS} workers that are warm: calls a second that the whole comes to, and in multiples of "
        "`pool.map`; and how long the first result takes, where results are had one by one. Ours is iterated by one "
        "task, and so are those of the peers that can be, by a thread. One message for each call is slow, so that some "
        f"get {FEWER} times fewer calls, which does not change their rate.",
        ["who", "calls", "a second", "/ ours", "first result"],
    )
    ways = [way for way in WAYS if way.missing is None]
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    firsts: dict[str, list[float]] = {way.name: [] for way in ways}
    by_name = {way.name: way for way in ways}
    items = {fewer: list(range(pace.items // fewer)) for fewer in (1, FEWER)}
    async with opened(way.candidate for way in ways) as pools:
        for way in ways:  # the warm-up
            await way.run(pools[way.candidate.name], items[FEWER])
        for name in in_turn(list(by_name), pace.rounds):
            way = by_name[name]
            mine = items[way.fewer]
            start = time.perf_counter()
            first, results = await way.run(pools[way.candidate.name], mine)
            taken = time.perf_counter() - start
            assert results == mine
            rates[name].append(len(mine) / taken)
            if first is not None:
                firsts[name].append(first - start)
    ours = rates[OUR_MAP.name]
    for way in WAYS:
        if way.missing is not None:
            table.add_missing(way.name, way.missing)
            continue
        table.add(
            way.name,
            f"{len(items[way.fewer]):,}",
            spread(rates[way.name], per_second),
            ratios(rates[way.name], ours),
            spread(firsts[way.name], milli) if firsts[way.name] else "-",
        )
    table.draw("map", table.title, 2, per_second, more_is_better=True, log=True)
    table.aim("`map`, nothing set: rate / multiprocessing.Pool.imap's", ours, rates[IMAP.name], least=4)
    table.aim("`map`, nothing set: rate / ProcessPoolExecutor.map's", ours, rates[EXECUTOR_MAP.name], least=10)
    table.aims.append(Aim("`map`, the first result of a warm pool", firsts[OUR_MAP.name], most=0.01, show=milli))
    table.aim(
        "`map` by `results.batches()`: rate / multiprocessing.Pool.map's with its own chunks",
        rates.get(OUR_BATCHES.name),
        rates[POOL_MAP.name],
        least=0.25,
    )
    return [table]
