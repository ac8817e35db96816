"""`status`, `reset` and `resize`: look at a running pool once, or change it."""

import json as json_lines
import sys
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import Parameter
from rich.console import Console

from .._control_protocol import MOST_WORKERS
from .._watch import PoolFact, WorkerFact
from ._errors import Misuse
from ._reach import Link, PoolOption, SocketOption, find, print_facts, run
from ._top_view import Rates, draw, duration, printable

JsonOption = Annotated[bool, Parameter(help="Print a JSON document instead.", negative="")]


def status(*, socket: SocketOption = None, pool: PoolOption = None, json: JsonOption = False) -> None:
    """Print how a running pool is, with a row for each worker."""
    facts, workers = run(_look, socket, pool)
    if json:
        print_facts(json_lines.dumps({"status": facts, "workers": workers}))
        return
    # There is one look only, so this is over the worker's life; `top` has it over the last seconds.
    rates = Rates(
        cpu={
            fact["pid"]: 100 * fact["cpu"] / fact["uptime"]
            for fact in workers
            if fact["pid"] is not None and fact["cpu"] is not None and fact["uptime"] > 0
        }
    )
    print_table(facts, workers, rates)


def print_table(facts: PoolFact, workers: list[WorkerFact], rates: Rates) -> None:
    """Print a pool once: as wide as the terminal; without colours and as wide as it gets where there is none."""
    wide = not sys.stdout.isatty()
    console = Console(markup=False, emoji=False, highlight=False, width=10_000 if wide else None)
    drawing = draw(facts, workers, rates, 1000 if wide else console.width, keys=False)
    with console.capture() as capture:
        for line in drawing.lines:
            if wide:
                line.rstrip()
            console.print(line, no_wrap=True, overflow="crop", crop=True)
    encoding = sys.stdout.encoding or "utf-8"
    print_facts(capture.get().encode(encoding, "replace").decode(encoding).rstrip("\n"))


async def _look(socket: Path | None, pool: str | None) -> tuple[PoolFact, list[WorkerFact]]:
    async with Link(await find(socket, pool)) as link:
        return await link.look_soon()


def reset(*, socket: SocketOption = None, pool: PoolOption = None, json: JsonOption = False) -> None:
    """Replace every worker of a running pool by a fresh one, and wait until the last old one is gone."""
    name, seconds, answer = run(_turn, socket, pool, "reset")
    if json:
        print_facts(json_lines.dumps(answer))
    else:
        print_facts(f"{name}: every worker is a fresh one, after {duration(seconds)}")


def resize(
    workers: Annotated[str, Parameter(help=f"How many workers there shall be, 1 to {MOST_WORKERS}.")],
    /,
    *,
    socket: SocketOption = None,
    pool: PoolOption = None,
    json: JsonOption = False,
) -> None:
    """Have so many workers in a running pool, and wait until they are ready, or those too many are gone."""
    # Not left to cyclopts: to it, 1.5 is a whole number.
    plain = workers.isascii() and workers.isdecimal() and len(workers) < 10
    number = int(workers) if plain else 0
    if not 1 <= number <= MOST_WORKERS:
        raise Misuse(f"the number of workers is a whole one from 1 to {MOST_WORKERS}, not {printable(workers, 40)!r}")
    name, seconds, answer = run(_turn, socket, pool, f"resize {number}")
    if json:
        print_facts(json_lines.dumps(answer))
    else:
        print_facts(f"{name}: {number} {'worker' if number == 1 else 'workers'}, after {duration(seconds)}")


async def _turn(socket: Path | None, pool: str | None, request: str) -> tuple[str, float, dict[str, object]]:
    async with Link(await find(socket, pool)) as link:
        facts, _ = await link.look_soon()
        started = trio.current_time()
        answer = await link.turn(request)
    return printable(facts["pool"]), trio.current_time() - started, answer


__all__ = ["reset", "resize", "status"]
