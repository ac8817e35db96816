"""Tables of medians and spreads, the machine they come from, and the pages they are written to."""

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
from typing import Any, Final, Protocol

import attrs

from tests.benchmarks.charts import Bar, Bars, Lines

COMMAND: Final = "nox -s bench"
"""What measures everything again."""
STATIC: Final = "_static"
"""Where charts lie, seen from the page: Sphinx copies this directory as it is, and a forge finds them there too."""
BUSY: Final = 0.05
"""The share of the cores that others may take, before the tables say that they took it."""


@attrs.frozen
class Part:
    """Tables that are measured and written together, between two comments of the page.

    `heading` is what a page that has no such comments gets at its end, before them; `versions` are the distributions
    that its machine table names, beside our own.
    """

    name: str
    heading: str
    versions: Sequence[str] = ()
    php: bool = False

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin; written by python -m tests.benchmarks --write, don't edit -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"


OUR_OWN: Final = ("trio", "attrs")
AWAITED: Final = (*OUR_OWN, "trio-parallel", "anyio")
IN_SHORT: Final = Part("benchmarks in short", "## In short")
COMMANDS: Final = Part("benchmarks", "## Results", AWAITED, php=True)
FUNCTIONS: Final = Part(
    "benchmarks of functions", "## Results of Python functions as jobs", (*AWAITED, "Pebble", "loky", "joblib", "numpy")
)
GROWTH: Final = Part("benchmarks of growth", "## Results with more callers and more workers", AWAITED)
WATCHING: Final = Part(
    "benchmarks of watching",
    "## Results of what watching costs",
    (*OUR_OWN, "prometheus-client", "opentelemetry-api", "opentelemetry-sdk"),
)
MILLION: Final = Part("benchmarks of a million", "## Results of a million jobs", OUR_OWN)


class Figure(str):
    """A cell that was measured: what is shown, and the value of each round."""

    values: list[float]

    def __new__(cls, shown: str, values: Sequence[float]) -> "Figure":
        self = super().__new__(cls, shown)
        self.values = list(values)
        return self


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


def counted(number: int, what: str) -> str:
    """Say how many, of what has a plural by an s."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def kibibytes(size: float) -> str:
    return f"{size / 1024:+,.0f} KiB" if size else "0"


def spread(values: Sequence[float], show: Callable[[float], str]) -> Figure:
    """Show the median of the rounds, and the least and the greatest of them."""
    if len(values) == 1:
        return Figure(show(values[0]), values)
    low, high = show(min(values)), show(max(values))
    unit = re.sub(r"[\d.,\s]", "", low)
    if unit and high.endswith(unit):
        low = low.removesuffix(unit).rstrip()
    return Figure(f"{show(statistics.median(values))} ({low} to {high})", values)


def median_of(values: Sequence[float]) -> float:
    return statistics.median(values)


def divided(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [value / unit for value, unit in zip(values, reference, strict=True)]


def ratios(values: Sequence[float], reference: Sequence[float] | None) -> str:
    """Show what the values are in multiples of the reference, round by round."""
    if reference is None:
        return "-"
    if values is reference:
        return "1"
    return spread(divided(values, reference), times)


def with_ratio(values: Sequence[float], reference: Sequence[float] | None) -> Figure:
    """Show a rate, and behind it the ratio."""
    return Figure(f"{spread(values, per_second)} [{ratios(values, reference)}]", values)


@attrs.frozen
class Aim:
    """What we set out to reach: a figure of each round, whose median is to be no more, or no less, than a bound."""

    what: str
    values: Sequence[float] | None
    """None where one of the two was not there to be measured."""
    most: float | None = None
    least: float | None = None
    show: Callable[[float], str] = times

    @property
    def wanted(self) -> str:
        if self.most is not None:
            return f"at most {self.show(self.most)}"
        assert self.least is not None
        return f"at least {self.show(self.least)}"

    @property
    def reached(self) -> bool | None:
        if self.values is None:
            return None
        median = statistics.median(self.values)
        return (self.most is None or median <= self.most) and (self.least is None or median >= self.least)


@attrs.define
class Table:
    """Rows of text under a title; `note` says how to read them.

    `charts` show what is in them once more, and `aims` are those that its figures decide.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = attrs.field(factory=list)
    charts: list[Bars | Lines] = attrs.field(factory=list)
    aims: list[Aim] = attrs.field(factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def add_missing(self, name: str, why: str) -> None:
        self.rows.append([name, why, *("-" for _ in self.columns[2:])])

    def aim(
        self,
        what: str,
        values: Sequence[float] | None,
        reference: Sequence[float] | None,
        *,
        most: float | None = None,
        least: float | None = None,
    ) -> None:
        """Add an aim that is a ratio, round by round."""
        measured = None if values is None or reference is None else divided(values, reference)
        self.aims.append(Aim(what, measured, most, least))

    def draw(
        self,
        name: str,
        title: str,
        column: int,
        show: Callable[[float], str],
        *,
        more_is_better: bool,
        log: bool = False,
    ) -> None:
        """Add a chart of one column: a bar for each row that has a figure there."""
        bars = [
            Bar(row[0].replace("`", ""), statistics.median(cell.values), min(cell.values), max(cell.values))
            for row in self.rows
            if isinstance(cell := row[column], Figure)
        ]
        self.charts.append(Bars(name, title, bars, show, more_is_better=more_is_better, log=log))

    def __str__(self) -> str:
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = " | ".join("-" * width for width in widths)
        body = "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])
        return f"### {self.title}\n\n{self.note}\n\n{body}\n"


class Measured(Protocol):
    """What has a row: it has a name, and where it can't be measured here `missing` says why."""

    @property
    def name(self) -> str: ...
    @property
    def missing(self) -> str | None: ...


def fill(table: Table, measured: Iterable[Measured], cells: Callable[[str], Sequence[str]]) -> Table:
    """Add a row for each, with what `cells` has for its name."""
    for one in measured:
        if one.missing is not None:
            table.add_missing(one.name, one.missing)
        else:
            table.add(one.name, *cells(one.name))
    return table


def in_short(tables: Iterable[Table]) -> Table:
    """Make a table of all aims."""
    table = Table(
        "What was aimed at",
        "Each is a ratio of two things measured in turn, in the same rounds, unless it has a unit.",
        ["what", "measured", "aim", "reached"],
    )
    for aim in (aim for each in tables for aim in each.aims):
        if aim.values is None:
            table.add(aim.what, "not measured: see its table", aim.wanted, "-")
        else:
            table.add(aim.what, spread(aim.values, aim.show), aim.wanted, "yes" if aim.reached else "no")
    return table


class Watch:
    """Looks at what else the machine does, from its making on."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._start = time.monotonic()
        self._all = all_cpu_time()
        self._own = own_cpu_time()

    def by_others(self) -> float | None:
        """Return the share of the machine's cores that others took: what is neither ours nor our children's."""
        now = all_cpu_time()
        if now is None or self._all is None:
            return None
        others = now - self._all - (own_cpu_time() - self._own)
        return max(0.0, others) / ((time.monotonic() - self._start) * (os.cpu_count() or 1))


def all_cpu_time() -> float | None:
    """Return the seconds that all cores have been busy, those that a hypervisor took away included."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *rest = map(int, fields[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def own_cpu_time() -> float:
    """Return the seconds of CPU time of this process, and of its children that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def describe_machine(watch: Watch, part: Part) -> Table:
    """Say where the figures come from, and with what."""
    subject = part.name.partition(" of ")[2]
    title = f"The machine, for {subject}" if subject else "The machine"
    table = Table(title, "Where and with what the tables above were measured.", ["what", "which"])
    usable = len(os.sched_getaffinity(0))
    table.add("cores", f"{usable} of {os.cpu_count()}" if usable != os.cpu_count() else str(usable))
    table.add("CPU", cpu_model())
    table.add("kernel", f"{platform.system()} {platform.release()}")
    table.add("load average before the start", f"{watch.load:.2f}")
    others = watch.by_others()
    if others is not None:
        verdict = " (**busy: measure again**)" if others > BUSY else ""
        table.add("of the cores, others took", f"{others:.0%}{verdict}")
    table.add("Python", f"{platform.python_implementation()} {platform.python_version()}")
    table.add("trio_workers", own_version())
    for name in part.versions:
        table.add(name, version_of(name))
    if part.php:
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


def picture(chart: Bars | Lines, directory: str) -> str:
    """Show a chart in a page of Markdown: by HTML, which Sphinx and a forge take alike, dark where the reader is."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{directory}/{chart.file_name(dark=True)}">'
        f'<img src="{directory}/{chart.file_name(dark=False)}" alt="{chart.alternative}" width="480"></picture>\n'
    )


def show(tables: Iterable[Table], directory: str) -> str:
    """Show tables with their charts."""
    return "\n".join(
        part for table in tables for part in (str(table), *(picture(chart, directory) for chart in table.charts))
    )


def write_page(path: Path, part: Part, generated: str) -> None:
    """Put what was generated between the two comments of the page, and these at its end if it has none."""
    text = path.read_text(encoding="utf-8")
    if part.begin not in text and part.end not in text:
        text = f"{text.rstrip()}\n\n{part.heading}\n\n{part.begin}\n{part.end}\n"
    before, begin, rest = text.partition(part.begin)
    _, end, after = rest.partition(part.end)
    if not begin or not end:
        sys.exit(f"{path} must hold both of these two lines, for the tables to go between:\n{part.begin}\n{part.end}")
    path.write_text(f"{before}{begin}\n\n{generated.rstrip()}\n\n{end}{after}", encoding="utf-8")


def write_charts(directory: Path, tables: Iterable[Table]) -> None:
    """Write each chart twice, light and dark."""
    directory.mkdir(exist_ok=True)
    for chart in (chart for table in tables for chart in table.charts):
        for dark in (False, True):
            (directory / chart.file_name(dark=dark)).write_text(chart.draw(dark=dark), encoding="utf-8")


def plain(tables: Iterable[Table]) -> list[dict[str, Any]]:
    """Return tables as JSON has them: each measured cell with the value of each round, in seconds, bytes or one."""
    return [
        {
            "title": table.title,
            "note": table.note,
            "columns": list(table.columns),
            "rows": [
                [{"shown": str(it), "rounds": it.values} if isinstance(it, Figure) else it for it in row]
                for row in table.rows
            ],
            "aims": [
                {
                    "what": aim.what,
                    "rounds": None if aim.values is None else list(aim.values),
                    "most": aim.most,
                    "least": aim.least,
                    "reached": aim.reached,
                }
                for aim in table.aims
            ],
        }
        for table in tables
    ]
