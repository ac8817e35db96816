"""The tables of Python functions as jobs, one function each: ours and the peers (`function_pools`), side by side."""

import functools
import importlib.util
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import attrs
import trio

from tests.benchmarks import alone
from tests.benchmarks.abilities import limit_to_one_job
from tests.benchmarks.floors import BARE_COPY, BARE_ECHO, FLOORS
from tests.benchmarks.function_pools import (
    ALL,
    ANYIO,
    FORKED,
    OURS,
    TRIO_PARALLEL,
    Awaited,
    Blocking,
    Candidate,
    bring_up,
)
from tests.benchmarks.functions import give_back, rest
from tests.benchmarks.map_section import maps
from tests.benchmarks.measures import (
    Latency,
    Pace,
    call_for,
    call_side_by_side,
    caller_of,
    in_turn,
    measure_latency,
    measure_rates,
    percentile,
)
from tests.benchmarks.report import (
    Table,
    counted,
    fill,
    mebibytes,
    micro,
    milli,
    per_second,
    ratios,
    spread,
    with_ratio,
)
from tests.benchmarks.subjects import FLOOR
from trio_workers import open_python_pool

TINY: Final = b"0123456789"
CALLERS: Final = 64
WORKERS: Final = 2
"""Of the tables that have one number of workers, and more than one caller."""
HUNG: Final = 60.0
"""Seconds after which a fresh interpreter counts as hung."""
ROOT: Final = Path(__file__).parent.parent.parent


# one face for both kinds of pools


@attrs.frozen(kw_only=True)
class Driver:
    """What is measured of an open pool, each for seconds: in trio's thread, or in one that nothing else runs in."""

    one_caller: Callable[[object, float], Awaitable[list[float]]]
    many_callers: Callable[[object, float], Awaitable[tuple[int, float]]] | None


def drive_awaited(pool: Awaited) -> Driver:
    return Driver(
        one_caller=lambda value, seconds: call_for(functools.partial(pool.call, give_back, value), seconds),
        many_callers=lambda value, seconds: call_side_by_side(
            functools.partial(pool.call, give_back, value), CALLERS, seconds
        ),
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

    submit = pool.submit

    def many_callers(value: object, seconds: float) -> tuple[int, float]:
        assert submit is not None
        # Quicker, when tried, for each of the peers than as many threads that wait for their results.
        clock = time.perf_counter
        over: SimpleQueue[BaseException | None] = SimpleQueue()
        start = clock()
        end = start + seconds
        for _ in range(CALLERS):
            submit(give_back, value, over.put)
        count = outstanding = CALLERS
        while outstanding:
            error = over.get()
            if error is not None:
                raise error
            if clock() < end:
                submit(give_back, value, over.put)
                count += 1
            else:
                outstanding -= 1
        return count, clock() - start

    return Driver(
        one_caller=in_thread(one_caller),
        many_callers=None if submit is None else in_thread(many_callers),
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
        f"How long a call with {len(TINY)} bytes takes, in multiples of {OURS.name!r} and of the bare floor, which "
        "calls nothing: bytes there and back by hand.",
        ["who", "p50", "p99", "p50 / ours", "p99 / ours", "p50 / floor"],
    )
    async with opened(1) as them, FLOOR.open(1) as floor:
        runs = {name: functools.partial(it.one_caller, TINY) for name, it in them.items()}
        results = await measure_latency({FLOOR.name: caller_of(floor.prepare(TINY)), **runs}, pace)
    ours = results[OURS.name]

    def cells(name: str) -> Sequence[str]:
        it = results[name]
        return [
            spread(it.p50, micro),
            spread(it.p99, micro),
            ratios(it.p50, ours.p50),
            ratios(it.p99, ours.p99),
            ratios(it.p50, results[FLOOR.name].p50),
        ]

    table.add(FLOOR.name, *cells(FLOOR.name))
    fill(table, ALL, cells)
    title = "A tiny Python function, one caller, one worker: how long half of the calls take"
    table.draw("functions-latency", title, 1, micro, more_is_better=False)
    return [table]


async def many_callers(pace: Pace) -> list[Table]:
    counts = (1, WORKERS)
    table = Table(
        f"Calls of a tiny function a second, {CALLERS} callers",
        f"Arguments of {len(TINY)} bytes. In brackets behind each rate: in multiples of {OURS.name!r}.",
        ["who", *(counted(workers, "worker") for workers in counts)],
    )
    by_workers: list[dict[str, list[float]]] = []
    for workers in counts:
        async with opened(workers) as them:
            runs = {
                name: functools.partial(it.many_callers, TINY)
                for name, it in them.items()
                if it.many_callers is not None
            }
            by_workers.append(await measure_rates(runs, pace))
    results = by_workers[-1]

    def cells(name: str) -> Sequence[str]:
        if name not in results:
            return ["its calls can't overlap", "-"]
        return [with_ratio(it[name], it[OURS.name]) for it in by_workers]

    fill(table, ALL, cells)
    title = f"Calls of a tiny Python function a second: {CALLERS} callers, {WORKERS} workers"
    table.draw("functions-rate", title, len(counts), per_second, more_is_better=True)
    for peer in (TRIO_PARALLEL, ANYIO):
        what = f"`run_sync`, {CALLERS} callers, {WORKERS} workers: rate / that of {peer.name}"
        table.aim(what, results[OURS.name], results.get(peer.name), least=3.5)
    return [table]


SLOW: Final = 0.05
"""Seconds of the slow job."""
SLOW_ONE_IN: Final = 1000
LIMITED: Final = f"{OURS.name}, one job at a time"


async def tail(pace: Pace) -> list[Table]:
    """Look at the quick jobs that stand beside slow ones: is one of them behind a slow one while a worker is free?"""
    table = Table(
        f"Quick jobs beside slow ones, {CALLERS} callers, {WORKERS} workers",
        f"One call in {SLOW_ONE_IN:,} sleeps for {SLOW * 1000:.0f} ms. How long the others take, and how many of these "
        f"there are a second. {LIMITED!r} is the same pool, with no more than one job on the way to each worker: what "
        "the slow ones cost where no job can stand behind them.",
        ["who", "p50", "p99", "p99.9", "a second", "p99.9 / ours"],
    )
    candidates = [candidate for candidate in (OURS, TRIO_PARALLEL, ANYIO) if candidate.missing is None]
    seconds = 5 * pace.seconds  # some slow ones in each turn
    taken: dict[str, list[list[float]]] = {}
    lasted: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        pools: dict[str, Callable[..., Awaitable[object]]] = {}
        for candidate in candidates:
            assert candidate.open_awaited is not None
            pool = await stack.enter_async_context(candidate.open_awaited(WORKERS))
            await bring_up(pool, WORKERS)
            pools[candidate.name] = pool.call
        limited = await stack.enter_async_context(open_python_pool(WORKERS))
        not_limited = limit_to_one_job(limited)
        if not_limited is None:
            pools[LIMITED] = limited.run_sync
        for _ in range(pace.rounds):
            for name in pools:
                taken.setdefault(name, []).append([])
                lasted.setdefault(name, []).append(0.0)
            for name in in_turn(list(pools), pace.turns):
                start = time.perf_counter()
                taken[name][-1] += await quick_ones(pools[name], seconds)
                lasted[name][-1] += time.perf_counter() - start

    def shares(name: str, share: float) -> list[float]:
        return [percentile(values, share) for values in taken[name]]

    last = {name: shares(name, 0.999) for name in taken}

    def cells(name: str) -> Sequence[str]:
        rate = [len(values) / took for values, took in zip(taken[name], lasted[name], strict=True)]
        return [
            spread(shares(name, 0.5), milli),
            spread(shares(name, 0.99), milli),
            spread(last[name], milli),
            spread(rate, per_second),
            ratios(last[name], last[OURS.name]),
        ]

    table.add(OURS.name, *cells(OURS.name))
    if not_limited is None:
        table.add(LIMITED, *cells(LIMITED))
    else:
        table.add_missing(LIMITED, not_limited)
    fill(table, (TRIO_PARALLEL, ANYIO), cells)
    what = "`run_sync`, p99.9 of quick jobs beside slow ones / that with one job at a time"
    table.aim(what, last[OURS.name], last.get(LIMITED), most=1.0)
    return [table]


async def quick_ones(call: Callable[..., Awaitable[object]], seconds: float) -> list[float]:
    """Call from many tasks, from each once at least; return how long the quick calls took."""
    clock = time.perf_counter
    taken: list[float] = []
    count = 0
    end = clock() + seconds

    async def caller() -> None:
        nonlocal count
        called = False
        while (before := clock()) < end or not called:
            called = True
            count += 1
            if count % SLOW_ONE_IN == 0:
                await call(rest, SLOW)
            else:
                await call(give_back, TINY)
                taken.append(clock() - before)

    async with trio.open_nursery() as nursery:
        for _ in range(CALLERS):
            nursery.start_soon(caller)
    return taken


def run_alone(what: str, name: str, workers: int, seconds: float = 0.0, size: int = 0) -> tuple[float, ...]:
    """Run `alone` in a fresh interpreter; return when it was started (the monotonic clock's time) and its numbers."""
    argv = [sys.executable, "-m", "tests.benchmarks.alone", what, name, str(workers), str(seconds), str(size)]
    start = time.monotonic()
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HUNG, check=True)
    return start, *map(float, done.stdout.split())


async def large(pace: Pace) -> list[Table]:
    of_bytes, rates = await there_and_back(
        Table(
            f"{pace.bytes >> 20} MiB of bytes there and back",
            f"`bytes`, returned as they are. {HOW_LARGE}",
            ["who", "p50", "a second", "p50 / ours", f"p50 / {BARE_ECHO.name}"],
        ),
        "bytes",
        BARE_ECHO,
        pace.rounds,
        3 * pace.seconds,
        pace.bytes,
    )
    of_bytes.aim(
        f"`run_sync`, {pace.bytes >> 20} MiB of bytes there and back: rate / that of trio-parallel",
        rates[OURS.name].rate,
        rates[TRIO_PARALLEL.name].rate if TRIO_PARALLEL.name in rates else None,
        least=8,
    )
    of_bytes.draw("bytes", of_bytes.title, 1, milli, more_is_better=False)
    of_array = Table(
        f"A numpy array of {pace.array >> 20} MiB there and back",
        f"{pace.array // 8:,} floats, returned as they are. {HOW_LARGE}",
        ["who", "p50", "a second", "p50 / ours", f"p50 / {BARE_COPY.name}"],
    )
    if importlib.util.find_spec("numpy") is None:
        of_array.add_missing("all", "numpy is not installed: pip install 'trio_workers[bench]'")
        return [of_bytes, of_array]
    of_array, times = await there_and_back(of_array, "array", BARE_COPY, pace.rounds, 6 * pace.seconds, pace.array)
    what = f"`run_sync`, an array of {pace.array >> 20} MiB there and back: p50 / that of the {BARE_COPY.name}"
    of_array.aim(what, times[OURS.name].p50, times[BARE_COPY.name].p50, most=2.5)
    of_array.draw("array", of_array.title, 1, milli, more_is_better=False)
    return [of_bytes, of_array]


HOW_LARGE: Final = (
    "One caller, one worker: how long a call takes and how many there are a second; the first in multiples of "
    f"{OURS.name!r} and of the least that can be. In each round each is alone in a fresh interpreter: how fast this "
    "goes depends on what a process has allocated and freed before. The bare ones have no pool, no frames and no "
    "pickle. The copy is four copies: into a mapping of both processes, out into memory of the other's own, and back; "
    "a byte in a pipe tells. Memory for what comes out is kept, or fresh each time, as every result of a pool is. "
    "joblib has two workers: with one, it calls the function itself."
)


async def there_and_back(
    table: Table, what: str, least: Candidate, rounds: int, seconds: float, size: int
) -> tuple[Table, dict[str, Latency]]:
    """Send something large to a worker and have it back, each pool in interpreters of its own; fill the table."""
    results = {candidate.name: Latency() for candidate in (*FLOORS, *present())}
    for name in in_turn(list(results), rounds):
        _, p50, rate = await trio.to_thread.run_sync(run_alone, what, name, 1, seconds, size)
        results[name].p50.append(p50)
        results[name].rate.append(rate)
    fill(
        table,
        (*FLOORS, *ALL),
        lambda name: [
            spread(results[name].p50, milli),
            spread(results[name].rate, per_second),
            ratios(results[name].p50, results[OURS.name].p50),
            ratios(results[name].p50, results[least.name].p50),
        ],
    )
    return table, results


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
            candidates,
            lambda name: [
                spread(whole[name], milli),
                ratios(whole[name], whole[OURS.name]),
                spread(opening[name], milli),
                ratios(opening[name], opening[OURS.name]),
            ],
        )
    ]


async def at_rest(pace: Pace) -> list[Table]:
    table = Table(
        "Memory of idle function workers",
        f"A pool of {pace.at_rest} workers in a fresh interpreter, after a job in each. What one worker has on "
        "average: resident (RSS) and, with what is shared divided among those that share it, proportional (PSS). And "
        "the PSS of all processes that the pool has started, helpers too. In multiples of "
        f"{OURS.name!r}. A forked worker begins with what its parent has, which here is a small program.",
        ["who", "RSS", "/ ours", "PSS", "/ ours", "PSS of all", "/ ours"],
    )
    candidates = [*ALL, *FORKED]
    sizes: dict[str, Sequence[float]] = {}
    for candidate in candidates:
        if candidate.missing is None:
            _, *found = await trio.to_thread.run_sync(run_alone, "memory", candidate.name, pace.at_rest)
            sizes[candidate.name] = found
    ours = sizes[OURS.name]
    fill(
        table,
        candidates,
        lambda name: [
            cell
            for size, unit in zip(sizes[name], ours, strict=True)
            for cell in (spread([size], mebibytes), "1" if name == OURS.name else f"{size / unit:.2f}")
        ],
    )
    table.draw("functions-memory", "Memory of an idle worker of functions (PSS)", 3, mebibytes, more_is_better=False)
    return [table]


FUNCTION_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {
    "functions-driven": driven,
    "functions-one": one_caller,
    "functions-many": many_callers,
    "functions-tail": tail,
    "functions-map": maps,
    "functions-large": large,
    "functions-cold": from_cold,
    "functions-memory": at_rest,
}
