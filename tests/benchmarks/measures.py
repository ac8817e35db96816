"""How it is measured: in rounds, in turn, so that whatever drifts on the machine hits all alike.

A round is a few short turns for each subject, one subject after the other, each time beginning with another. Every
figure is a list with one value for each round: ratios are taken within a round, and what is shown is their median.
"""

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import attrs
import trio

from tests.benchmarks.alone import REST, size_of
from tests.benchmarks.subjects import Call, Opened, Subject


@attrs.frozen(kw_only=True)
class Pace:
    """How much is measured: `rounds`, of `turns` for each subject, of `seconds`, after as many of `warm_up`.

    The warm-up is for workers to be up, and caches and CPUs warm. `items` are those of a map of functions, `bytes` and
    `array` the sizes of what is sent there and back. `few` are the numbers of workers of a table that has some columns,
    `callers`, `workers` and `openings` those of the tables that are about them; `at_rest` so many workers' memory is
    looked at, some, so that what they share shows in PSS; `jobs` how many a million is.
    """

    rounds: int
    turns: int
    seconds: float
    warm_up: float
    items: int
    bytes: int
    array: int
    few: Sequence[int]
    callers: Sequence[int]
    workers: Sequence[int]
    openings: Sequence[int]
    at_rest: int
    jobs: int


FULL: Final = Pace(
    rounds=5,
    turns=3,
    seconds=0.1,
    warm_up=0.1,
    items=100_000,
    bytes=2**20,
    array=64 * 2**20,
    few=(1, 2, 4),
    callers=(1, 4, 16, 64, 256, 1024, 4096),
    workers=(1, 2, 4, 8, 16, 32, 64),
    openings=(1, 8, 64),
    at_rest=4,
    jobs=1_000_000,
)
QUICK: Final = Pace(
    rounds=1,
    turns=1,
    seconds=0.002,
    warm_up=0.002,
    items=200,
    bytes=2**20,
    array=2**20,
    few=(1,),
    callers=(1, 8),
    workers=(1, 2),
    openings=(1, 2),
    at_rest=1,
    jobs=200,
)
"""The least of everything: to see that it works."""


@attrs.frozen
class Latency:
    """Of one caller's calls, one value for each round: two in seconds, and how many calls a second there were."""

    p50: list[float] = attrs.field(factory=list)
    p99: list[float] = attrs.field(factory=list)
    rate: list[float] = attrs.field(factory=list)


@asynccontextmanager
async def opened(subjects: Iterable[Subject], workers: int) -> AsyncIterator[dict[str, Opened]]:
    """Open all subjects that are there, by name."""
    async with AsyncExitStack() as stack:
        yield {
            subject.name: await stack.enter_async_context(subject.open(workers))
            for subject in subjects
            if subject.missing is None
        }


def in_turn(names: Sequence[str], turns: int) -> Iterable[str]:
    """Name each subject `turns` times, one after the other, each time beginning with another."""
    for turn in range(turns):
        at = turn % len(names)
        yield from [*names[at:], *names[:at]]


async def call_for(call: Call, seconds: float) -> list[float]:
    """Call again and again, and return how long each call took."""
    clock = time.perf_counter
    taken: list[float] = []
    before = clock()
    end = before + seconds
    while before < end:
        await call()
        after = clock()
        taken.append(after - before)
        before = clock()
    return taken


async def call_side_by_side(call: Call, callers: int, seconds: float) -> tuple[int, float]:
    """Let many tasks call again and again, each once at least; return how many calls there were, and the seconds."""
    clock = time.perf_counter
    total = 0
    start = clock()
    end = start + seconds

    async def caller() -> None:
        nonlocal total
        count = 0
        while not count or clock() < end:
            await call()
            count += 1
        total += count

    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller)
    return total, clock() - start


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure_latency(
    runs: Mapping[str, Callable[[float], Awaitable[list[float]]]], pace: Pace
) -> dict[str, Latency]:
    """Measure how long one caller's calls take; a run takes seconds and returns how long each of its calls took."""
    for run in runs.values():
        await run(pace.warm_up)
    results = {name: Latency() for name in runs}
    for _ in range(pace.rounds):
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for name in in_turn(list(runs), pace.turns):
            taken[name] += await runs[name](pace.seconds)
        for name, values in taken.items():
            results[name].p50.append(percentile(values, 0.5))
            results[name].p99.append(percentile(values, 0.99))
            results[name].rate.append(len(values) / sum(values))
    return results


def caller_of(call: Call) -> Callable[[float], Awaitable[list[float]]]:
    """Make a run of `measure_latency` of a call."""
    return functools.partial(call_for, call)


async def measure_rates(
    runs: Mapping[str, Callable[[float], Awaitable[tuple[int, float]]]], pace: Pace
) -> dict[str, list[float]]:
    """Measure how many calls a second there are; a run takes seconds and returns a count and the seconds it took."""
    for run in runs.values():
        await run(pace.warm_up)
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(pace.rounds):
        sums = dict.fromkeys(runs, (0, 0.0))
        for name in in_turn(list(runs), pace.turns):
            count, seconds = await runs[name](pace.seconds)
            sums[name] = (sums[name][0] + count, sums[name][1] + seconds)
        for name, (count, seconds) in sums.items():
            results[name].append(count / seconds)
    return results


def callers_of(call: Call, callers: int) -> Callable[[float], Awaitable[tuple[int, float]]]:
    """Make a run of `measure_rates` of a call."""

    async def run(seconds: float) -> tuple[int, float]:
        return await call_side_by_side(call, callers, seconds)

    return run


async def measure_opening(subject: Subject, workers: int) -> float:
    """Measure how long it takes from nothing to one reply for each worker.

    In an event loop of its own, because the processes of anyio belong to the loop and would be there already.
    """

    async def open_once() -> float:
        start = time.perf_counter()
        async with subject.open(workers) as it:
            async with trio.open_nursery() as nursery:
                for _ in range(workers):
                    nursery.start_soon(it.prepare(b"0123456789"))
            return time.perf_counter() - start

    return await trio.to_thread.run_sync(trio.run, open_once)


async def measure_crash(it: Opened) -> tuple[float, float]:
    """Measure how long after a call that ends the worker its caller knows, and the next reply is there."""
    assert it.crash is not None
    call = it.prepare(b"0123456789")
    await call()
    start = time.perf_counter()
    await it.crash()
    told = time.perf_counter()
    await call()
    return told - start, time.perf_counter() - start


async def measure_memory(it: Opened) -> tuple[float, float]:
    """Return RSS and PSS of the idle workers on average, in bytes."""
    assert it.pids is not None
    pids = await it.pids()
    await trio.sleep(REST)
    rss, pss = zip(*map(size_of, pids), strict=True)
    return sum(rss) / len(pids), sum(pss) / len(pids)
