"""The tables of commands as workers, one function each, and the command that measures all there are."""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from tests.benchmarks.function_sections import FUNCTION_SECTIONS
from tests.benchmarks.measures import (
    FULL,
    QUICK,
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
    COMMANDS,
    FUNCTIONS,
    Part,
    Table,
    describe_machine,
    mebibytes,
    micro,
    milli,
    per_second,
    ratios,
    spread,
    write_page,
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
    TRIO_PARALLEL,
    Opened,
    Subject,
)
from trio_workers import Payload, Pool
from trio_workers._seats import Begin

BODY: Final = b"0123456789"
HUNG: Final = 30.0
"""Seconds after which a map that does not end counts as hung."""
MANY: Final = 64
"""Callers, where many share few workers: enough that some always wait."""


async def latency(pace: Pace) -> list[Table]:
    subjects = [FLOOR, FLOOR_SOCKETPAIR, BY_HAND, POOL, POOL_SOCKETPAIR, PHP, PHP_2, PHP_1, *PEERS]
    table = Table(
        "One caller, one worker",
        f"How long a call with a body of {len(BODY)} bytes takes, in multiples of the bare floor.",
        ["who", "p50", "p99", "p50 / floor", "p99 / floor"],
    )
    async with opened(subjects, 1) as them:
        results = await measure_latency({name: caller_of(it.prepare(BODY)) for name, it in them.items()}, pace)
    floor = results[FLOOR.name]
    for subject in subjects:
        if subject.missing is not None:
            table.add_missing(subject.name, subject.missing)
            continue
        it = results[subject.name]
        table.add(
            subject.name,
            spread(it.p50, micro),
            spread(it.p99, micro),
            ratios(it.p50, floor.p50),
            ratios(it.p99, floor.p99),
        )
    return [table]


async def rates(pace: Pace) -> list[Table]:
    subjects = [POOL, POOL_SOCKETPAIR, PHP, *PEERS]
    tables: list[Table] = []
    for callers in (1, MANY):
        table = Table(
            f"Calls a second, {callers} caller{'s' if callers > 1 else ''}",
            f"Bodies of {len(BODY)} bytes. In brackets behind each rate: in multiples of {POOL.name!r}.",
            ["who", "1 worker", "2 workers", "4 workers"],
        )
        by_workers: list[dict[str, list[float]]] = []
        for workers in (1, 2, 4):
            async with opened(subjects, workers) as them:
                runs = {name: callers_of(it.prepare(BODY), callers) for name, it in them.items()}
                by_workers.append(await measure_rates(runs, pace))
        for subject in subjects:
            if subject.missing is not None:
                table.add_missing(subject.name, subject.missing)
                continue
            table.add(subject.name, *(beside(rates_, subject, POOL) for rates_ in by_workers))
        tables.append(table)
    return tables


def beside(results: dict[str, list[float]], subject: Subject, reference: Subject) -> str:
    """Show a rate, and behind it the ratio."""
    values = results[subject.name]
    return f"{spread(values, per_second)} [{ratios(values, results[reference.name])}]"


async def large(pace: Pace) -> list[Table]:
    subjects = [FLOOR, FLOOR_SOCKETPAIR, POOL, POOL_SOCKETPAIR, PHP, *PEERS]
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
    for subject in subjects:
        if subject.missing is not None:
            table.add_missing(subject.name, subject.missing)
            continue
        table.add(subject.name, *(beside(rates_, subject, FLOOR) for rates_ in by_size))
    return [table]


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
        ["who", "1 worker", "2 workers", "4 workers"],
    )
    cells: dict[str, list[str]] = {}
    for workers in (1, 2, 4):
        async with POOL.open(workers) as it:
            runs = {
                f"exec, {MANY} callers": callers_of(it.prepare(BODY), MANY),
                "map": map_run(it, ordered=True),
                "map, ordered=False": map_run(it, ordered=False),
            }
            results = await measure_rates(runs, pace)
        reference = results[f"exec, {MANY} callers"]
        for name, values in results.items():
            cells.setdefault(name, []).append(f"{spread(values, per_second)} [{ratios(values, reference)}]")
    for name, row in cells.items():
        table.add(name, *row)
    return [table]


async def opening(pace: Pace) -> list[Table]:
    subjects = [POOL, PHP, *PEERS]
    table = Table(
        "Opening",
        f"From nothing to one reply for each worker. In brackets: in multiples of {POOL.name!r}.",
        ["who", "1 worker", "8 workers"],
    )
    by_workers: list[dict[str, list[float]]] = []
    present = [subject for subject in subjects if subject.missing is None]
    for workers in (1, 8):
        results: dict[str, list[float]] = {subject.name: [] for subject in present}
        for _ in range(pace.rounds):
            for subject in present:
                results[subject.name].append(await measure_opening(subject, workers))
        by_workers.append(results)
    for subject in subjects:
        if subject.missing is not None:
            table.add_missing(subject.name, subject.missing)
            continue
        table.add(
            subject.name,
            *(
                f"{spread(results[subject.name], milli)} [{ratios(results[subject.name], results[POOL.name])}]"
                for results in by_workers
            ),
        )
    return [table]


async def crashes(pace: Pace) -> list[Table]:
    subjects = [CRASHING_POOL, PHP, TRIO_PARALLEL, ANYIO]
    table = Table(
        "A crash",
        "A job ends the only worker: from that call until its caller has the error, and until the next job is "
        f"answered. In brackets: in multiples of {CRASHING_POOL.name!r}.",
        ["who", "the caller knows", "the next reply"],
    )
    async with opened(subjects, 1) as them:
        told: dict[str, list[float]] = {name: [] for name in them}
        served: dict[str, list[float]] = {name: [] for name in them}
        for _ in range(pace.rounds):
            for name in in_turn(list(them), 1):
                first, second = await measure_crash(them[name])
                told[name].append(first)
                served[name].append(second)
    for subject in subjects:
        if subject.missing is not None:
            table.add_missing(subject.name, subject.missing)
            continue
        table.add(
            subject.name,
            *(
                f"{spread(results[subject.name], milli)} [{ratios(results[subject.name], results[CRASHING_POOL.name])}]"
                for results in (told, served)
            ),
        )
    table.add(EXECUTOR.name, "a crash ends the executor", "-")
    return [table]


async def memory(pace: Pace) -> list[Table]:
    subjects = [FLOOR, POOL, PHP, *PEERS]
    table = Table(
        "Memory",
        f"What one idle worker keeps resident (VmRSS), after its first job. Ratio to {POOL.name!r}.",
        ["who", "resident", "ratio"],
    )
    async with opened(subjects, 1) as them:
        sizes = {name: await measure_memory(it) for name, it in them.items()}
    for subject in subjects:
        if subject.missing is not None:
            table.add_missing(subject.name, subject.missing)
            continue
        size = sizes[subject.name]
        table.add(subject.name, mebibytes(size), f"{size / sizes[POOL.name]:.2f}")
    return [table]


COMMAND_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {
    "latency": latency,
    "rates": rates,
    "large": large,
    "hand-over": hand_over,
    "map": maps,
    "opening": opening,
    "crash": crashes,
    "memory": memory,
}
PARTS: Final = {"commands": (COMMANDS, COMMAND_SECTIONS), "functions": (FUNCTIONS, FUNCTION_SECTIONS)}


def measure(section: Callable[[Pace], Awaitable[list[Table]]], name: str, pace: Pace) -> list[Table] | None:
    """Measure one section, or show why that failed.

    Each in an event loop of its own: the processes of anyio live as long as theirs.
    """
    start = time.perf_counter()
    print(f"measuring: {name} ...", end="", file=sys.stderr, flush=True)
    try:
        tables = trio.run(section, pace)
    except Exception:
        print(" failed", file=sys.stderr)
        traceback.print_exc()
        return None
    print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return tables


def main() -> None:
    """Run as a script."""
    every = [name for part, (_, sections) in PARTS.items() for name in (part, *sections)]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure, and print the tables.")
    parser.add_argument("--quick", action="store_true", help="shorter and fewer rounds: to try it, not to quote")
    parser.add_argument("--only", nargs="+", choices=every, metavar="WHAT", help=f"some of {', '.join(every)}")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables into this page of the docs too")
    arguments = parser.parse_args()
    wanted = set(arguments.only or PARTS)
    if arguments.write and not wanted <= set(PARTS):
        parser.error(f"--write writes whole parts: only {' and '.join(PARTS)} go with it")
    load = os.getloadavg()[0]
    pace = QUICK if arguments.quick else FULL
    logging.getLogger("trio_workers").setLevel(logging.ERROR)  # the crashes are meant
    how = (
        f"Medians of {pace.rounds} rounds, and in parentheses the least and the greatest of them; ratios are taken "
        "within a round."
    )
    if arguments.quick:
        how += " **Measured with `--quick`: to try it, not to quote.**"
    pages: list[tuple[Part, list[Table]]] = []
    failed: list[str] = []
    for name, (part, sections) in PARTS.items():
        names = [section for section in sections if wanted & {name, section}]
        tables: list[Table] = []
        for section in names:
            measured = measure(sections[section], section, pace)
            if measured is None:
                failed.append(section)
            else:
                tables += measured
        if names:
            pages.append((part, [*tables, describe_machine(load, part)]))
    for part, tables in pages:
        print(part.heading, how, *tables, sep="\n\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}{'; nothing is written' if arguments.write else ''}")
    if arguments.write:
        for part, tables in pages:
            write_page(arguments.write, part, tables, how)
