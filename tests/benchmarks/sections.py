"""The tables of commands as workers, one function each."""

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from tests.benchmarks.abilities import READ_AHEAD
from tests.benchmarks.measures import (
    Pace,
    caller_of,
    callers_of,
    in_turn,
    measure_crash,
    measure_latency,
    measure_memory,
    measure_opening,
    measure_rates,
    opened,
)
from tests.benchmarks.report import (
    Figure,
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
from tests.benchmarks.subjects import (
    ANYIO,
    BY_HAND,
    CRASHING_POOL,
    EXECUTOR,
    FLOOR,
    FLOOR_SOCKETPAIR,
    PEERS,
    PHP,
    PHP_1,
    PHP_2,
    POOL,
    POOL_SOCKETPAIR,
    RUN_SYNC,
    TRIO_PARALLEL,
    Opened,
    Subject,
    php_pool,
    python_pool,
)
from trio_workers import Payload, Pool
from trio_workers._seats import Begin

BODY: Final = b"0123456789"
HUNG: Final = 30.0
"""Seconds after which a map that does not end counts as hung."""
MANY: Final = 64
"""Callers, where many share few workers: enough that some always wait."""


async def latency(pace: Pace) -> list[Table]:
    subjects = [FLOOR, FLOOR_SOCKETPAIR, BY_HAND, POOL, POOL_SOCKETPAIR, PHP, PHP_2, PHP_1, RUN_SYNC, *PEERS]
    table = Table(
        "One caller, one worker",
        f"How long a call with a body of {len(BODY)} bytes takes, in multiples of the bare floor.",
        ["who", "p50", "p99", "p50 / floor", "p99 / floor"],
    )
    async with opened(subjects, 1) as them:
        results = await measure_latency({name: caller_of(it.prepare(BODY)) for name, it in them.items()}, pace)
    floor = results[FLOOR.name]
    fill(
        table,
        subjects,
        lambda name: [
            spread(results[name].p50, micro),
            spread(results[name].p99, micro),
            ratios(results[name].p50, floor.p50),
            ratios(results[name].p99, floor.p99),
        ],
    )
    table.draw("latency", "One caller, one worker: how long half of the calls take", 1, micro, more_is_better=False)
    p50 = {name: it.p50 for name, it in results.items()}
    for subject, other, most in (
        (POOL, FLOOR, 1.3),
        (RUN_SYNC, FLOOR, 1.3),
        (RUN_SYNC, TRIO_PARALLEL, 0.4),
        (RUN_SYNC, ANYIO, 0.75),
    ):
        whose = "the floor" if other is FLOOR else other.name
        what = f"{CALLS[subject.name]}, one caller, one worker: p50 / that of {whose}"
        table.aim(what, p50[subject.name], p50.get(other.name), most=most)
    return [table]


CALLS: Final = {POOL.name: "`exec`", RUN_SYNC.name: "`run_sync`"}


async def rates(pace: Pace) -> list[Table]:
    subjects = [POOL, POOL_SOCKETPAIR, PHP, RUN_SYNC, *PEERS]
    tables: list[Table] = []
    for callers in (1, MANY):
        table = Table(
            f"Calls a second, {counted(callers, 'caller')}",
            f"Bodies of {len(BODY)} bytes. In brackets behind each rate: in multiples of {POOL.name!r}.",
            ["who", *(counted(workers, "worker") for workers in pace.few)],
        )
        by_workers: list[dict[str, list[float]]] = []
        for workers in pace.few:
            async with opened(subjects, workers) as them:
                runs = {name: callers_of(it.prepare(BODY), callers) for name, it in them.items()}
                by_workers.append(await measure_rates(runs, pace))
        tables.append(
            fill(table, subjects, lambda name: [with_ratio(it[name], it[POOL.name]) for it in by_workers])  # noqa: B023
        )
    return tables


async def read_ahead(pace: Pace) -> list[Table]:
    workers = 4
    ours: dict[tuple[str, int], Subject] = {}
    for depth in (1, READ_AHEAD):
        name = f"trio_workers, {{}} worker, read_ahead={depth}"
        ours["Python", depth] = python_pool(name.format("Python"), read_ahead=depth)
        ours["PHP", depth] = php_pool(name.format("PHP"), read_ahead=depth)
    subjects = [FLOOR, *ours.values()]
    table = Table(
        f"exec on command workers, {MANY} callers, {workers} workers",
        f"Calls a second with bodies of {len(BODY)} bytes, with one job at a time in a worker's pipe and with up to "
        f"{READ_AHEAD}. In multiples of the bare floor, which has one caller and one child.",
        ["who", "calls a second", "/ floor"],
    )
    async with opened(subjects, workers) as them:
        runs = {name: callers_of(it.prepare(BODY), 1 if name == FLOOR.name else MANY) for name, it in them.items()}
        results = await measure_rates(runs, pace)
    floor = results[FLOOR.name]
    fill(table, subjects, lambda name: [spread(results[name], per_second), ratios(results[name], floor)])
    table.draw("read-ahead", table.title, 1, per_second, more_is_better=True)
    for (language, depth), subject in ours.items():
        whose = f"{language} workers, {MANY} callers, {workers} workers, `read_ahead={depth}`"
        what = f"`exec`, {whose}: rate / that of the floor"
        table.aim(what, results.get(subject.name), floor, least=1.7 if depth == 1 else 4)
    return [table]


async def large(pace: Pace) -> list[Table]:
    subjects = [FLOOR, FLOOR_SOCKETPAIR, POOL, POOL_SOCKETPAIR, PHP, RUN_SYNC, *PEERS]
    sizes = {"64 KiB": 64 * 1024, "1 MiB": 1024 * 1024}
    table = Table(
        "Large bodies, there and back",
        "Calls a second of one caller on one worker. In brackets: in multiples of the bare floor.",
        ["who", *sizes],
    )
    async with opened(subjects, 1) as them:
        by_size: list[dict[str, list[float]]] = []
        for size in sizes.values():
            body = os.urandom(size)
            runs = {name: callers_of(it.prepare(body), 1) for name, it in them.items()}
            by_size.append(await measure_rates(runs, pace))
    return [fill(table, subjects, lambda name: [with_ratio(it[name], it[FLOOR.name]) for it in by_size])]


def give_up_hand_over(pool: Pool) -> None:
    """From now on a job that waited is written by its own task, when that is woken."""
    core = pool._core
    carry_out_one = core._do

    def do(action: object) -> None:
        if isinstance(action, Begin):
            core.exchange.ring(action.job)
        else:
            carry_out_one(action)  # type: ignore[arg-type]

    core._do = do  # type: ignore[method-assign]


async def hand_over(pace: Pace) -> list[Table]:
    table = Table(
        "What the hand-over gains",
        f"Calls a second of {MANY} callers, as it is (whoever takes a reply writes the next waiting job before it "
        "wakes anyone), and with that switched off (each job is written by its own task, once that is woken).",
        ["who", "workers", "as it is", "switched off", "gain"],
    )
    for subject in (POOL, PHP):
        if subject.missing is not None:
            table.add_missing(subject.name, subject.missing)
            continue
        for workers in (1, 2):
            async with subject.open(workers) as on, subject.open(workers) as off:
                assert off.pool is not None
                give_up_hand_over(off.pool)
                runs = {"on": callers_of(on.prepare(BODY), MANY), "off": callers_of(off.prepare(BODY), MANY)}
                results = await measure_rates(runs, pace)
            table.add(
                subject.name,
                str(workers),
                spread(results["on"], per_second),
                spread(results["off"], per_second),
                ratios(results["on"], results["off"]),
            )
    return [table]


def map_run(it: Opened, *, ordered: bool) -> Callable[[float], Awaitable[tuple[int, float]]]:
    """Make a run of `measure_rates` of a map."""
    pool = it.pool
    assert pool is not None

    async def run(seconds: float) -> tuple[int, float]:
        start = time.perf_counter()
        end = start + seconds

        def source() -> Iterator[Payload]:
            # It ends by itself: a map that is left early cancels what runs, and that costs workers.
            yield Payload(BODY)
            while time.perf_counter() < end:
                yield Payload(BODY)

        count = 0
        with trio.fail_after(seconds + HUNG):
            async with pool.map(source(), ordered=ordered) as replies:
                async for _ in replies:
                    count += 1
        return count, time.perf_counter() - start

    return run


async def maps(pace: Pace) -> list[Table]:
    table = Table(
        "map",
        f"Replies a second that one consumer takes from a map over bodies of {len(BODY)} bytes. In brackets: in "
        f"multiples of {MANY} callers of exec.",
        ["who", *(counted(workers, "worker") for workers in pace.few)],
    )
    cells: dict[str, list[str]] = {}
    for workers in pace.few:
        async with POOL.open(workers) as it:
            runs = {
                f"exec, {MANY} callers": callers_of(it.prepare(BODY), MANY),
                "map": map_run(it, ordered=True),
                "map, ordered=False": map_run(it, ordered=False),
            }
            results = await measure_rates(runs, pace)
        reference = results[f"exec, {MANY} callers"]
        for name, values in results.items():
            cells.setdefault(name, []).append(with_ratio(values, reference))
    for name, row in cells.items():
        table.add(name, *row)
    return [table]


async def opening(pace: Pace) -> list[Table]:
    subjects = [POOL, PHP, RUN_SYNC, *PEERS]
    present = [subject for subject in subjects if subject.missing is None]
    by_workers: list[dict[str, list[float]]] = []
    for workers in pace.openings:
        results: dict[str, list[float]] = {subject.name: [] for subject in present}
        for name in in_turn(list(results), pace.rounds):
            (subject,) = (it for it in present if it.name == name)
            results[name].append(await measure_opening(subject, workers))
        by_workers.append(results)
    table = Table(
        "Opening",
        f"From nothing to one reply for each worker. In brackets: in multiples of {POOL.name!r}.",
        ["who", *(counted(workers, "worker") for workers in pace.openings)],
    )
    fill(
        table,
        subjects,
        lambda name: [
            Figure(f"{spread(it[name], milli)} [{ratios(it[name], it[POOL.name])}]", it[name]) for it in by_workers
        ],
    )
    table.draw("opening", f"Opening {pace.openings[-1]} workers", len(pace.openings), milli, more_is_better=False)
    return [table]


async def crashes(pace: Pace) -> list[Table]:
    subjects = [CRASHING_POOL, PHP, RUN_SYNC, TRIO_PARALLEL, ANYIO]
    table = Table(
        "A crash",
        "A job ends the only worker, at once: from that call until its caller has the error, and until the next job is "
        "answered, which is what a crash costs: the time that the slot does not serve. In brackets: in multiples of "
        f"{CRASHING_POOL.name!r}.",
        ["who", "the caller knows", "the next reply"],
    )
    async with opened(subjects, 1) as them:
        told: dict[str, list[float]] = {name: [] for name in them}
        served: dict[str, list[float]] = {name: [] for name in them}
        for name in in_turn(list(them), pace.rounds):
            first, second = await measure_crash(them[name])
            told[name].append(first)
            served[name].append(second)
    fill(
        table,
        subjects,
        lambda name: [
            Figure(f"{spread(it[name], milli)} [{ratios(it[name], it[CRASHING_POOL.name])}]", it[name])
            for it in (told, served)
        ],
    )
    table.add(EXECUTOR.name, "a crash ends the executor", "-")
    table.draw("crash", "From a crash to the next reply", 2, milli, more_is_better=False)
    return [table]


async def memory(pace: Pace) -> list[Table]:
    subjects = [FLOOR, POOL, PHP, RUN_SYNC, *PEERS]
    table = Table(
        "Memory",
        f"What one idle worker of {pace.at_rest} has, after its first job, on average: resident (RSS) and, with "
        "what is shared divided among those that share it, proportional (PSS). The floor has one child. In multiples "
        f"of {POOL.name!r}.",
        ["who", "RSS", "/ ours", "PSS", "/ ours"],
    )
    sizes: dict[str, tuple[float, float]] = {}
    for subject in subjects:
        if subject.missing is None:
            # One after the other: what two pools share would be divided among both.
            async with subject.open(pace.at_rest) as it:
                await it.prepare(BODY)()
                sizes[subject.name] = await measure_memory(it)
    ours = sizes[POOL.name]
    fill(
        table,
        subjects,
        lambda name: [
            cell
            for size, unit in zip(sizes[name], ours, strict=True)
            for cell in (spread([size], mebibytes), "1" if name == POOL.name else f"{size / unit:.2f}")
        ],
    )
    table.draw("memory", "Memory of an idle worker (PSS)", 3, mebibytes, more_is_better=False)
    return [table]


COMMAND_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {
    "latency": latency,
    "rates": rates,
    "read-ahead": read_ahead,
    "large": large,
    "hand-over": hand_over,
    "map": maps,
    "opening": opening,
    "crash": crashes,
    "memory": memory,
}
