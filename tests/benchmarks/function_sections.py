"""The tables of Python functions as jobs, one function each: ours and the peers (`function_pools`), side by side."""

import functools
import importlib.util
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import attrs
import trio

from tests.benchmarks import alone, bare_copy
from tests.benchmarks.function_pools import (
    ALL,
    CHUNK,
    FORKED,
    OURS,
    Awaited,
    Blocking,
    Candidate,
    bring_up,
)
from tests.benchmarks.functions import give_back
from tests.benchmarks.measures import (
    Latency,
    Pace,
    call_for,
    call_side_by_side,
    in_turn,
    measure_latency,
    measure_rates,
)
from tests.benchmarks.report import Table, mebibytes, micro, milli, per_second, ratios, spread

TINY: Final = b"0123456789"
CALLERS: Final = 64
WORKERS: Final = 2
"""Of the tables that have one number of workers, and more than one caller."""
WORKERS_AT_REST: Final = 4
"""Whose memory is looked at: some, so that what they share shows in PSS."""
HUNG: Final = 60.0
"""Seconds after which a fresh interpreter counts as hung."""
ROOT: Final = Path(__file__).parent.parent.parent


# one face for both kinds of pools


@attrs.frozen(kw_only=True)
class Driver:
    """What is measured of an open pool, each for seconds: in trio's thread, or in one that nothing else runs in."""

    one_caller: Callable[[object, float], Awaitable[list[float]]]
    many_callers: Callable[[object, float], Awaitable[tuple[int, float]]]
    map_all: Callable[[Iterable[object], int], Awaitable[list[Any]]]


def drive_awaited(pool: Awaited) -> Driver:
    return Driver(
        one_caller=lambda value, seconds: call_for(functools.partial(pool.call, give_back, value), seconds),
        many_callers=lambda value, seconds: call_side_by_side(
            functools.partial(pool.call, give_back, value), CALLERS, seconds
        ),
        map_all=functools.partial(pool.map, give_back),
    )


def in_thread(function: Callable[..., Any], *args: object) -> Callable[..., Awaitable[Any]]:
    return functools.partial(trio.to_thread.run_sync, function, *args)


def drive_blocking(pool: Blocking) -> Driver:
    def one_caller(value: object, seconds: float) -> list[float]:
        # As `call_for`.
        clock = time.perf_counter
        taken: list[float] = []
        before = clock()
        end = before + seconds
        while before < end:
            pool.call(give_back, value)
            after = clock()
            taken.append(after - before)
            before = clock()
        return taken

    def many_callers(value: object, seconds: float) -> tuple[int, float]:
        # Quicker, when tried, for each of the peers than as many threads that wait for their results.
        clock = time.perf_counter
        over: SimpleQueue[BaseException | None] = SimpleQueue()
        start = clock()
        end = start + seconds
        for _ in range(CALLERS):
            pool.submit(give_back, value, over.put)
        count = outstanding = CALLERS
        while outstanding:
            error = over.get()
            if error is not None:
                raise error
            if clock() < end:
                pool.submit(give_back, value, over.put)
                count += 1
            else:
                outstanding -= 1
        return count, clock() - start

    return Driver(
        one_caller=in_thread(one_caller),
        many_callers=in_thread(many_callers),
        map_all=in_thread(pool.map, give_back),
    )


@asynccontextmanager
async def opened(workers: int) -> AsyncIterator[dict[str, Driver]]:
    """Open all that are there, by name, with all their workers up."""
    async with AsyncExitStack() as stack:
        drivers: dict[str, Driver] = {}
        for candidate in present():
            if candidate.open_awaited is not None:
                pool = await stack.enter_async_context(candidate.open_awaited(workers))
                drivers[candidate.name] = drive_awaited(pool)
            else:
                assert candidate.open_blocking is not None
                blocking = stack.enter_context(candidate.open_blocking(workers))
                pool = Awaited(in_thread(blocking.call), in_thread(blocking.map))
                drivers[candidate.name] = drive_blocking(blocking)
            await bring_up(pool, workers)
        yield drivers


def present() -> list[Candidate]:
    return [candidate for candidate in ALL if candidate.missing is None]


def fill(table: Table, cells: Callable[[str], Sequence[str]], candidates: Iterable[Candidate] = ALL) -> Table:
    """Add a row for each, with what `cells` has for its name."""
    for candidate in candidates:
        if candidate.missing is not None:
            table.add_missing(candidate.name, candidate.missing)
        else:
            table.add(candidate.name, *cells(candidate.name))
    return table


# the tables


async def driven(pace: Pace) -> list[Table]:
    table = Table(
        "How each was driven",
        "Those that are awaited are called in trio's thread, the others in a plain thread while trio sleeps. The job "
        "is a function of a module that returns its argument. All that stand in one table have the same number of "
        "workers.",
        ["who", "workers are started by", "one caller", f"{CALLERS} callers", "map"],
    )
    for it in ALL:
        table.add(it.name, it.start, it.one, it.many, it.whole)
    return [table]


async def one_caller(pace: Pace) -> list[Table]:
    table = Table(
        "A tiny function, one caller, one worker",
        f"How long a call with {len(TINY)} bytes takes, and in multiples of {OURS.name!r}.",
        ["who", "p50", "p99", "p50 / ours", "p99 / ours"],
    )
    async with opened(1) as them:
        runs = {name: functools.partial(it.one_caller, TINY) for name, it in them.items()}
        results = await measure_latency(runs, pace)
    ours = results[OURS.name]
    return [
        fill(
            table,
            lambda name: [
                spread(results[name].p50, micro),
                spread(results[name].p99, micro),
                ratios(results[name].p50, ours.p50),
                ratios(results[name].p99, ours.p99),
            ],
        )
    ]


async def many_callers(pace: Pace) -> list[Table]:
    counts = (1, WORKERS)
    table = Table(
        f"Calls of a tiny function a second, {CALLERS} callers",
        f"Arguments of {len(TINY)} bytes. In brackets behind each rate: in multiples of {OURS.name!r}.",
        ["who", *(f"{workers} worker{'s' if workers > 1 else ''}" for workers in counts)],
    )
    by_workers: list[dict[str, list[float]]] = []
    for workers in counts:
        async with opened(workers) as them:
            runs = {name: functools.partial(it.many_callers, TINY) for name, it in them.items()}
            by_workers.append(await measure_rates(runs, pace))
    return [
        fill(
            table,
            lambda name: [
                f"{spread(results[name], per_second)} [{ratios(results[name], results[OURS.name])}]"
                for results in by_workers
            ],
        )
    ]


async def maps(pace: Pace) -> list[Table]:
    table = Table(
        f"map of {pace.items:,} calls of a tiny function",
        f"Calls a second that the whole comes to with {WORKERS} workers, in order, and in multiples of {OURS.name!r}. "
        f"With one call a message, once for each, so there is no spread; and where the map has chunks, with {CHUNK:,} "
        "calls a message, in rounds.",
        ["who", "chunksize 1", "/ ours", f"chunksize {CHUNK:,}", "/ ours, chunksize 1"],
    )
    items = range(pace.items)
    expected = list(items)

    async def run(it: Driver, chunk: int) -> float:
        start = time.perf_counter()
        results = await it.map_all(items, chunk)
        taken = time.perf_counter() - start
        assert results == expected
        return len(items) / taken

    single: dict[str, list[float]] = {}
    chunked: dict[str, list[float]] = {candidate.name: [] for candidate in present() if candidate.chunks}
    async with opened(WORKERS) as them:
        for name, it in them.items():
            single[name] = [await run(it, 1)]
        for _ in range(pace.rounds):
            for name in chunked:
                chunked[name].append(await run(them[name], CHUNK))
    ours = single[OURS.name]

    def cells(name: str) -> Sequence[str]:
        row = [spread(single[name], per_second), ratios(single[name], ours)]
        if name not in chunked:
            return [*row, "has no chunks", "-"]
        return [*row, spread(chunked[name], per_second), ratios(chunked[name], ours * pace.rounds)]

    return [fill(table, cells)]


def run_alone(what: str, name: str, workers: int, seconds: float = 0.0) -> tuple[float, ...]:
    """Run `alone` in a fresh interpreter; return when it was started (the monotonic clock's time) and its numbers."""
    argv = [sys.executable, "-m", "tests.benchmarks.alone", what, name, str(workers), str(seconds)]
    if name == bare_copy.NAME:
        argv = [sys.executable, "-m", "tests.benchmarks.bare_copy", str(8 * alone.FLOATS), str(seconds)]
    start = time.monotonic()
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HUNG, check=True)
    return start, *map(float, done.stdout.split())


async def large(pace: Pace) -> list[Table]:
    tables = [
        await there_and_back(
            "bytes", "1 MiB of bytes there and back", "`bytes`, returned as they are.", pace.rounds, 3 * pace.seconds
        )
    ]
    title, note = "A numpy array of 64 MiB there and back", f"{alone.FLOATS:,} floats, returned as they are."
    if importlib.util.find_spec("numpy") is None:
        table = Table(title, note, ["who", "measured"])
        table.add("all", "numpy is not installed: pip install 'trio_workers[bench]'")
        return [*tables, table]
    return [*tables, await there_and_back("array", title, note, max(1, pace.rounds // 2), 6 * pace.seconds)]


async def there_and_back(what: str, title: str, note: str, rounds: int, seconds: float) -> Table:
    """Send something large to a worker and have it back, each pool in interpreters of its own."""
    table = Table(
        title,
        f"{note} One caller, one worker: how long a call takes, how many there are a second, and both in multiples of "
        f"{OURS.name!r}. A round is a fresh interpreter for each ({rounds} rounds): how fast this goes depends on what "
        "a process has allocated and freed before.",
        ["who", "p50", "a second", "p50 / ours", "a second / ours"],
    )
    results = {candidate.name: Latency() for candidate in present()}
    if what == "array":
        results[bare_copy.NAME] = Latency()
    for name in in_turn(list(results), rounds):
        _, p50, rate = await trio.to_thread.run_sync(run_alone, what, name, 1, seconds)
        results[name].p50.append(p50)
        results[name].rate.append(rate)
    ours = results[OURS.name]

    def cells(name: str) -> Sequence[str]:
        return [
            spread(results[name].p50, milli),
            spread(results[name].rate, per_second),
            ratios(results[name].p50, ours.p50),
            ratios(results[name].rate, ours.rate),
        ]

    if what == "array":
        table.add(bare_copy.NAME, *cells(bare_copy.NAME))
    return fill(table, cells)


async def from_cold(pace: Pace) -> list[Table]:
    table = Table(
        "First result from cold",
        f"With {WORKERS} workers: from the start of a fresh interpreter, which imports the pool, opens it and calls a "
        "tiny function, to its result; and the part of that from opening the pool on. Some start one worker at first "
        f"and others all. In multiples of {OURS.name!r}.",
        ["who", "interpreter to result", "/ ours", "opening to result", "/ ours"],
    )
    candidates = [*ALL, *FORKED]
    names = [alone.NOTHING, alone.TRIO, *(it.name for it in candidates if it.missing is None)]
    whole: dict[str, list[float]] = {name: [] for name in names}
    opening: dict[str, list[float]] = {name: [] for name in names}
    for name in in_turn(names, pace.rounds):
        start, imported, result = await trio.to_thread.run_sync(run_alone, "first", name, WORKERS)
        whole[name].append(result - start)
        opening[name].append(result - imported)
    for name in (alone.NOTHING, alone.TRIO):
        table.add(name, spread(whole[name], milli), ratios(whole[name], whole[OURS.name]), "-", "-")
    return [
        fill(
            table,
            lambda name: [
                spread(whole[name], milli),
                ratios(whole[name], whole[OURS.name]),
                spread(opening[name], milli),
                ratios(opening[name], opening[OURS.name]),
            ],
            candidates,
        )
    ]


async def at_rest(pace: Pace) -> list[Table]:
    table = Table(
        "Memory of idle function workers",
        f"A pool of {WORKERS_AT_REST} workers in a fresh interpreter, after a job in each. What one worker has on "
        "average: resident (RSS) and, with what is shared divided among those that share it, proportional (PSS). And "
        "the PSS of all processes that the pool has started, helpers too. In multiples of "
        f"{OURS.name!r}. A forked worker begins with what its parent has, which here is a small program.",
        ["who", "RSS", "/ ours", "PSS", "/ ours", "PSS of all", "/ ours"],
    )
    candidates = [*ALL, *FORKED]
    sizes: dict[str, Sequence[float]] = {}
    for candidate in candidates:
        if candidate.missing is None:
            _, *found = await trio.to_thread.run_sync(run_alone, "memory", candidate.name, WORKERS_AT_REST)
            sizes[candidate.name] = found
    ours = sizes[OURS.name]
    return [
        fill(
            table,
            lambda name: [
                cell
                for size, unit in zip(sizes[name], ours, strict=True)
                for cell in (mebibytes(size), "1" if name == OURS.name else f"{size / unit:.2f}")
            ],
            candidates,
        )
    ]


FUNCTION_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {
    "functions-driven": driven,
    "functions-one": one_caller,
    "functions-many": many_callers,
    "functions-map": maps,
    "functions-large": large,
    "functions-cold": from_cold,
    "functions-memory": at_rest,
}
