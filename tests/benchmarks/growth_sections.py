"""The tables of growth: more callers, and more workers."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import attrs

from tests.benchmarks.charts import Lines
from tests.benchmarks.measures import Pace, callers_of, measure_rates, opened
from tests.benchmarks.report import Table, fill, median_of, per_second, spread
from tests.benchmarks.subjects import ANYIO, POOL, RUN_SYNC, TRIO_PARALLEL

BODY: Final = b"0123456789"
SUBJECTS: Final = (POOL, RUN_SYNC, TRIO_PARALLEL, ANYIO)
WORKERS: Final = 2
"""Where callers become more."""
CALLERS: Final = 256
"""Where workers become more: enough for each of the most workers to have some waiting."""
MANY_CALLERS: Final = 512
"""From here on a turn is longer, so that each caller has several calls in it."""


def table_of(title: str, note: str, steps: Sequence[int], results: Sequence[dict[str, list[float]]]) -> Table:
    """Make a table with a column for each step."""
    table = Table(title, note, ["who", *(f"{step:,}" for step in steps)])
    return fill(table, SUBJECTS, lambda name: [spread(result[name], per_second) for result in results])


def lines_of(
    name: str, title: str, across: str, steps: Sequence[int], results: Sequence[dict[str, list[float]]]
) -> Lines:
    """Make a chart of the medians."""
    series = {who: [median_of(result[who]) for result in results] for who in results[0]}
    return Lines(name, title, across, steps, series, per_second)


async def more_callers(pace: Pace) -> list[Table]:
    results: list[dict[str, list[float]]] = []
    async with opened(SUBJECTS, WORKERS) as them:
        for callers in pace.callers:
            longer = attrs.evolve(pace, turns=1, seconds=2 * pace.seconds * max(1.0, callers / MANY_CALLERS))
            runs = {name: callers_of(it.prepare(BODY), callers) for name, it in them.items()}
            results.append(await measure_rates(runs, longer))
    title = f"Calls a second as callers become more, {WORKERS} workers"
    table = table_of(title, f"A column for each number of callers. Bodies of {len(BODY)} bytes.", pace.callers, results)
    table.charts.append(lines_of("callers", title, "callers", pace.callers, results))
    return [table]


async def more_workers(pace: Pace) -> list[Table]:
    results: list[dict[str, list[float]]] = []
    for workers in pace.workers:
        async with opened(SUBJECTS, workers) as them:
            for it in them.values():
                assert it.pids is not None
                await it.pids()  # has all of them up
            runs = {name: callers_of(it.prepare(BODY), CALLERS) for name, it in them.items()}
            results.append(await measure_rates(runs, pace))
    title = f"Calls a second as workers become more, {CALLERS} callers"
    table = table_of(
        title,
        f"A column for each number of workers. Bodies of {len(BODY)} bytes: more workers than cores bring nothing to a "
        "worker that does nothing, and this shows what they cost.",
        pace.workers,
        results,
    )
    table.charts.append(lines_of("workers", title, "workers", pace.workers, results))
    return [table]


GROWTH_SECTIONS: Final[dict[str, Callable[[Pace], Awaitable[list[Table]]]]] = {
    "callers": more_callers,
    "workers": more_workers,
}
