"""Tables of medians and spreads, the machine they come from, and the page they are written to."""

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import attrs


@attrs.frozen
class Part:
    """Tables that are measured and written together, between two comments of the page.

    `heading` is what a page that has no such comments gets at its end, before them.
    """

    begin: str
    end: str
    heading: str


COMMANDS: Final = Part(
    "<!-- benchmarks: begin; written by python -m tests.benchmarks --write, don't edit -->",
    "<!-- benchmarks: end -->",
    "## Results",
)
FUNCTIONS: Final = Part(
    "<!-- benchmarks of functions: begin; written by python -m tests.benchmarks --write, don't edit -->",
    "<!-- benchmarks of functions: end -->",
    "## Results of Python functions as jobs",
)


def number(value: float) -> str:
    """Show three or so digits."""
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 100 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def micro(seconds: float) -> str:
    return f"{number(seconds * 1e6)} µs"


def milli(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def per_second(rate: float) -> str:
    return f"{number(rate)}/s"


def mebibytes(size: float) -> str:
    return f"{number(size / 2**20)} MiB"


def times(ratio: float) -> str:
    return f"{ratio:.2f}"


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Show the median of the rounds, and the least and the greatest of them."""
    if len(values) == 1:
        return show(values[0])
    low, high = show(min(values)), show(max(values))
    unit = re.sub(r"[\d.,\s]", "", low)
    if unit and high.endswith(unit):
        low = low.removesuffix(unit).rstrip()
    return f"{show(statistics.median(values))} ({low} to {high})"


def ratios(values: Sequence[float], reference: Sequence[float] | None) -> str:
    """Show what the values are in multiples of the reference, round by round."""
    if reference is None:
        return "-"
    if values is reference:
        return "1"
    return spread([value / unit for value, unit in zip(values, reference, strict=True)], times)


@attrs.define
class Table:
    """Rows of text under a title; `note` says how to read them."""

    title: str
    note: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = attrs.field(factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def add_missing(self, name: str, why: str) -> None:
        self.rows.append([name, why, *("-" for _ in self.columns[2:])])

    def __str__(self) -> str:
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = " | ".join("-" * width for width in widths)
        body = "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])
        return f"### {self.title}\n\n{self.note}\n\n{body}\n"


def describe_machine(load: float, part: Part) -> Table:
    """Say where the figures come from; `load` is the load average before the first of them."""
    title = "The machine" if part is COMMANDS else "The machine, for functions"
    table = Table(title, "Where and with what the tables above were measured.", ["what", "which"])
    usable = len(os.sched_getaffinity(0))
    table.add("cores", f"{usable} of {os.cpu_count()}" if usable != os.cpu_count() else str(usable))
    table.add("CPU", cpu_model())
    table.add("kernel", f"{platform.system()} {platform.release()}")
    table.add("load average before the start", f"{load:.2f}")
    table.add("Python", f"{platform.python_implementation()} {platform.python_version()}")
    table.add("trio_workers", own_version())
    for name in ("trio", "attrs", "trio-parallel", "anyio"):
        table.add(name, version_of(name))
    if part is FUNCTIONS:
        for name in ("Pebble", "loky", "numpy"):
            table.add(name, version_of(name))
    else:
        table.add("PHP", output_of("php", "-r", "echo PHP_VERSION;") or "not installed")
    table.add("date", time.strftime("%Y-%m-%d", time.gmtime()))
    return table


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def own_version() -> str:
    root = Path(__file__).parent
    commit = output_of("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = output_of("git", "-C", str(root), "status", "--porcelain", "--", ":/trio_workers")
    if not commit:
        return version_of("trio_workers")
    return f"commit {commit}{' with changes' if changed else ''}"


def output_of(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()


def write_page(path: Path, part: Part, tables: Iterable[Table], how: str) -> None:
    """Put the tables between the two comments of the page, and these at its end if it has none."""
    text = path.read_text(encoding="utf-8")
    if part.begin not in text and part.end not in text:
        text = f"{text.rstrip()}\n\n{part.heading}\n\n{part.begin}\n{part.end}\n"
    before, begin, rest = text.partition(part.begin)
    _, end, after = rest.partition(part.end)
    if not begin or not end:
        sys.exit(f"{path} must hold both of these two lines, for the tables to go between:\n{part.begin}\n{part.end}")
    generated = "\n".join([how, "", *map(str, tables)])
    path.write_text(f"{before}{begin}\n\n{generated}\n{end}{after}", encoding="utf-8")
