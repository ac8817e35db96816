"""`trio-workers bench`: how many jobs a second, and how long each takes."""

import json as _json
import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import attrs
import trio
from rich.console import Console

from .._config import Config
from .._model import Payload
from .._pool import Pool
from ._errors import DONE, FAILED, Misuse
from ._jobs import say
from ._settings import SWITCH, PoolArguments, settle
from ._watching import open_watched, run_trio

SECONDS: Final = 5.0
"""For how long it is measured, where neither `--seconds` nor `--jobs` says so."""

BODY: Final = 100
"""Bytes of a job's body, where it isn't given."""

PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}

ROWS: Final = 16
"""Rows of the histogram."""

BLOCKS: Final = " ▏▎▍▌▋▊▉█"
"""Eighths of a cell."""


def bench(
    *command: str,
    jobs: int | None = None,
    seconds: float | None = None,
    body: int | None = None,
    job: str | None = None,
    callers: int | None = None,
    warm_up: float = 0.5,
    json: Annotated[bool, SWITCH] = False,
    config: Path | None = None,
    pool: PoolArguments = None,
) -> int:
    """Measure a worker program in a pool: jobs a second, and how long a job takes from its call to its reply.

    The exit code is 1 where a job failed. Those that did are counted, and are not in the latencies.

    Parameters
    ----------
    command
        The worker program and its arguments, after --.
    jobs
        How many jobs to measure.
    seconds
        For how many seconds to hand in jobs, 5 by default.
    body
        Bytes of each job's body (x each), 100 by default.
    job
        The body of each job, as text.
    callers
        How many callers hand in jobs side by side, each the next one after its reply; as many as workers by default.
    warm_up
        Seconds before, in which jobs run and are not measured.
    json
        Print the result as JSON, times in seconds.
    config
        A TOML file with the settings of the pool. Flags win over it.
    """
    settled = settle(command, pool, config)
    _check(jobs, seconds, body, job, callers, warm_up)
    this = _Bench(
        payload=Payload(
            b"x" * (BODY if body is None else body) if job is None else job.encode("utf-8", "surrogateescape")
        ),
        callers=settled.num_workers if callers is None else callers,
        most=math.inf if jobs is None else jobs,
        seconds=math.inf if jobs is not None else SECONDS if seconds is None else seconds,
        warm_up=warm_up,
    )

    async def main() -> None:
        async with open_watched(settled) as opened:
            await this.run(opened)

    run_trio(main, lambda: f"interrupted after {len(this.took):,} jobs, which are not shown")
    if json:
        print(_json.dumps(this.facts(settled)))
    else:
        this.draw(settled, Console(highlight=False))
    return FAILED if this.failures else DONE


def _check(
    jobs: int | None, seconds: float | None, body: int | None, job: str | None, callers: int | None, warm_up: float
) -> None:
    if jobs is not None and seconds is not None:
        raise Misuse("--jobs and --seconds exclude each other")
    if body is not None and job is not None:
        raise Misuse("--body and --job exclude each other")
    for flag, number in (("--jobs", jobs), ("--callers", callers)):
        if number is not None and number < 1:
            raise Misuse(f"{flag} must be at least 1, not {number}")
    if body is not None and body < 0:
        raise Misuse(f"--body must be at least 0, not {body}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise Misuse(f"--seconds must be more than 0 and finite, not {seconds:g}")
    if not 0 <= warm_up < math.inf:
        raise Misuse(f"--warm-up must be at least 0 and finite, not {warm_up:g}")


@attrs.define(eq=False)
class _Bench:
    """One measurement."""

    payload: Payload
    callers: int
    most: float
    seconds: float
    warm_up: float
    took: "array[float]" = attrs.field(factory=lambda: array("d"))
    failures: Counter[str] = attrs.field(factory=Counter[str])
    last_failure: str = ""
    lasted: float = 0.0
    _begun: int = 0
    _until: float = 0.0

    async def run(self, pool: Pool) -> None:
        """Warm up, then measure. Jobs that are under way at the end are waited for, and count."""
        if self.warm_up:
            await self._phase(pool, math.inf, self.warm_up)
            del self.took[:]
            self.failures.clear()
        began = trio.current_time()
        await self._phase(pool, self.most, self.seconds)
        self.lasted = trio.current_time() - began

    async def _phase(self, pool: Pool, most: float, seconds: float) -> None:
        self._begun = 0
        self._until = trio.current_time() + seconds
        async with trio.open_nursery() as nursery:
            for _ in range(self.callers):
                nursery.start_soon(self._call, pool, most)

    async def _call(self, pool: Pool, most: float) -> None:
        now = trio.current_time()
        while self._begun < most and (now < self._until or not self._begun):
            self._begun += 1
            try:
                await pool.exec(self.payload)
            except trio.ClosedResourceError:
                raise
            except Exception as error:
                self.failures[type(error).__name__] += 1
                self.last_failure = say(error)
                now = trio.current_time()
            else:
                then, now = now, trio.current_time()
                self.took.append(now - then)

    def facts(self, config: Config) -> dict[str, Any]:
        """Return the result in values that JSON can hold."""
        took = sorted(self.took)
        total = len(took) + self.failures.total()
        return {
            "jobs": total,
            "failed": self.failures.total(),
            "failures": dict(self.failures),
            "seconds": self.lasted,
            "rate": total / self.lasted if self.lasted else 0.0,
            "latency": summary(took),
            "histogram": [list(row) for row in histogram(took)],
            "workers": config.num_workers,
            "callers": self.callers,
            "body_bytes": len(self.payload.body),
        }

    def draw(self, config: Config, console: Console) -> None:
        """Show the result."""
        facts = self.facts(config)
        console.print(
            f"[bold]{facts['rate']:,.0f} jobs/s[/bold]: {facts['jobs']:,} jobs of {facts['body_bytes']:,} bytes in "
            f"{facts['seconds']:.2f} s, {config.num_workers} {_many(config.num_workers, 'worker')}, "
            f"{self.callers} {_many(self.callers, 'caller')}, after {self.warm_up:g} s of warm-up",
            soft_wrap=True,
        )
        if self.failures:
            kinds = ", ".join(f"{name} {count:,}" for name, count in self.failures.most_common())
            console.print(f"[red]{facts['failed']:,} failed[/red]: {kinds}; the last:", end=" ")
            console.print(self.last_failure, markup=False, soft_wrap=True)
        if not self.took:
            return
        latency: dict[str, float] = facts["latency"]
        console.print()
        for cells in (latency, map(span, latency.values())):
            console.print("".join(f"{cell:>10}" for cell in cells), soft_wrap=True)
        console.print()
        for line in bars(facts["histogram"], console.width):
            console.print(line, markup=False, soft_wrap=True)


def _many(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def summary(took: Sequence[float]) -> dict[str, float]:
    """Return percentiles of sorted durations: of the rank that so many are not above."""
    if not took:
        return {}
    count = len(took)
    found = {name: took[max(0, math.ceil(share * count) - 1)] for name, share in PERCENTILES.items()}
    return {"mean": math.fsum(took) / count, "min": took[0], **found, "max": took[-1]}


def histogram(took: Sequence[float]) -> list[tuple[float, float, int]]:
    """Put sorted durations into rows (from, to, how many), by equal steps of their logarithm."""
    if not took:
        return []
    low, high = max(took[0], 1e-9), max(took[-1], 1e-9)
    if high / low < 1.01:
        return [(took[0], took[-1], len(took))]
    edges = [low * (high / low) ** (row / ROWS) for row in range(ROWS + 1)]
    ends = [bisect_right(took, edge) for edge in edges[1:-1]] + [len(took)]
    return [
        (edges[row], edges[row + 1], end - before)
        for row, (before, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]


def bars(rows: Sequence[Sequence[float]], width: int) -> list[str]:
    """Draw a histogram, each row with its upper end, a bar, and how many are in it."""
    most = max(row[2] for row in rows)
    numbers = [f"{int(row[2]):,}" for row in rows]
    room = max(8, min(60, width - 14 - max(map(len, numbers))))
    lines: list[str] = []
    for (_, high, count), number in zip(rows, numbers, strict=True):
        eighths = math.ceil(count / most * room * 8)
        bar = "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()
        lines.append(f"≤ {span(high):>9} {bar} {number}" if count else f"≤ {span(high):>9}")
    return lines


def span(seconds: float) -> str:
    """Write a duration in three digits."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


__all__ = ["bars", "bench", "histogram", "span", "summary"]
