"""The command that measures all there are, prints the tables, and writes them."""

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import attrs
import trio

from tests.benchmarks.function_sections import FUNCTION_SECTIONS
from tests.benchmarks.growth_sections import GROWTH_SECTIONS
from tests.benchmarks.measures import FULL, QUICK, Pace
from tests.benchmarks.million import MILLION_SECTIONS
from tests.benchmarks.report import (
    COMMAND,
    COMMANDS,
    FUNCTIONS,
    GROWTH,
    IN_SHORT,
    MILLION,
    STATIC,
    WATCHING,
    Part,
    Table,
    Watch,
    counted,
    describe_machine,
    in_short,
    picture,
    plain,
    show,
    write_charts,
    write_page,
)
from tests.benchmarks.sections import COMMAND_SECTIONS
from tests.benchmarks.watching_sections import WATCHING_SECTIONS

Section = Callable[[Pace], Awaitable[list[Table]]]

PARTS: Final[Mapping[str, tuple[Part, Mapping[str, Section]]]] = {
    "commands": (COMMANDS, COMMAND_SECTIONS),
    "functions": (FUNCTIONS, FUNCTION_SECTIONS),
    "growth": (GROWTH, GROWTH_SECTIONS),
    "watching": (WATCHING, WATCHING_SECTIONS),
    "a-million": (MILLION, MILLION_SECTIONS),
}
ON_REQUEST: Final = "a-million"
"""The part that is measured only when it is asked for."""
SECTIONS: Final = {name: section for _, sections in PARTS.values() for name, section in sections.items()}

ROOT: Final = Path(__file__).parent.parent.parent
PAGE: Final = ROOT / "docs" / "benchmarks.md"
README: Final = ROOT / "README.md"
IN_README: Final = ("functions-latency", "functions-rate")
"""The charts that the README shows."""


def measure(section: Section, name: str, pace: Pace) -> list[Table] | None:
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


def describe_rounds(pace: Pace, part: Part) -> str:
    """Say what stands in the tables of a part, and which command repeats them."""
    if part is MILLION:
        return f"Measured once. `{COMMAND} -- --million` measures it again."
    how = (
        f"Medians of {counted(pace.rounds, 'round')}, and in parentheses the least and the greatest of them; ratios "
        f"are taken within a round. `{COMMAND}` measures it again."
    )
    if pace.rounds == QUICK.rounds:
        how += " **Measured with `--quick`: to try it, not to quote.**"
    return how


@attrs.frozen
class Measured:
    """The tables of a part; `complete` where none of its sections was left out."""

    part: Part
    how: str
    tables: list[Table]
    machine: Table
    complete: bool


def described(machine: Table) -> dict[str, str]:
    return {row[0]: str(row[1]) for row in machine.rows}


def write(page: Path, readme: Path | None, measured: Iterable[Measured]) -> None:
    """Write the parts that are complete into the page, and the summary of all of them into it and into the README."""
    complete = {it.part.name: it for it in measured if it.complete}
    for it in complete.values():
        write_page(page, it.part, f"{it.how}\n\n{show([*it.tables, it.machine], STATIC)}")
        write_charts(page.parent / STATIC, it.tables)
    if not {COMMANDS.name, FUNCTIONS.name} <= complete.keys():
        return
    tables = [table for it in complete.values() for table in it.tables]
    summary, how = in_short(tables), complete[FUNCTIONS.name].how
    write_page(page, IN_SHORT, f"{how}\n\n{summary}")
    if readme is not None:
        directory = f"{page.parent.name}/{STATIC}"
        charts = [chart for table in tables for chart in table.charts if chart.name in IN_README]
        pictures = "\n".join(picture(chart, directory) for chart in charts)
        machine = described(complete[FUNCTIONS.name].machine)
        where = f"On {machine['cores']} cores ({machine['CPU']}), {machine['Python']}, {machine['date']}."
        write_page(readme, IN_SHORT, f"{where} {how}\n\n{pictures}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    every = [name for part, (_, sections) in PARTS.items() for name in (part, *sections)]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure, and print the tables.")
    parser.add_argument("--quick", action="store_true", help="the least of everything: to try it, not to quote")
    parser.add_argument("--only", nargs="+", choices=every, metavar="SECTION", help=f"some of {', '.join(every)}")
    parser.add_argument(
        "--million",
        nargs="?",
        type=int,
        const=FULL.jobs,
        metavar="JOBS",
        help=f"put {FULL.jobs:,} jobs, or JOBS, through each path: this takes minutes, and is all without --only",
    )
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=PAGE,
        metavar="PAGE",
        help="write the tables into docs/benchmarks.md, the charts beside it and the summary into README.md too; "
        "or into PAGE alone, and beside it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    arguments = parser.parse_args(argv)
    wanted = set(arguments.only or ([] if arguments.million else PARTS.keys() - {ON_REQUEST}))
    if arguments.million is not None:
        if arguments.million < 1:
            parser.error("--million takes a number of jobs, at least 1")
        wanted.add(ON_REQUEST)
    if arguments.write and not wanted <= PARTS.keys():
        parser.error(f"--write writes whole parts: only {', '.join(PARTS)} go with it")
    arguments.wanted = wanted
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run as a script."""
    arguments = parse(argv)
    pace = QUICK if arguments.quick else FULL
    if arguments.million is not None:
        pace = attrs.evolve(pace, jobs=arguments.million)
    logging.getLogger("trio_workers").setLevel(logging.ERROR)  # the crashes are meant
    measured: list[Measured] = []
    failed: list[str] = []
    by_section: dict[str, list[Table]] = {}
    for name, (part, sections) in PARTS.items():
        names = [section for section in sections if arguments.wanted & {name, section}]
        if not names:
            continue
        watch = Watch()
        for section in names:
            tables = measure(sections[section], section, pace)
            if tables is None:
                failed.append(section)
            else:
                by_section[section] = tables
        found = [table for section in names for table in by_section.get(section, [])]
        complete = all(section in by_section for section in sections)
        measured.append(Measured(part, describe_rounds(pace, part), found, describe_machine(watch, part), complete))
    for it in measured:
        print(it.part.heading, it.how, *it.tables, it.machine, sep="\n\n")
    summary = in_short(table for it in measured for table in it.tables)
    if summary.rows:
        print(IN_SHORT.heading, summary, sep="\n\n")
    print(f"To repeat it: {' '.join([COMMAND, *(['--', *argv] if argv else [])])}")
    if arguments.json:
        report = {
            "pace": attrs.asdict(pace),
            "failed": failed,
            "machines": {it.part.name: described(it.machine) for it in measured},
            "sections": {name: plain(tables) for name, tables in by_section.items()},
        }
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}{'; nothing is written' if arguments.write else ''}")
    if arguments.write:
        write(arguments.write, README if arguments.write.resolve() == PAGE else None, measured)
