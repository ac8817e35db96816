"""How a pool looks in a terminal: facts in, a renderable of rich out. It draws nothing itself and knows no clock.

Labels and errors come from workers and their callers, so they are never markup, never control characters, and never
longer than their place: see `printable`.
"""

import io
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import attrs
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.text import Text

from .._watch import PoolFact, WorkerFact

LONGEST_TEXT: Final = 400
"""Characters of a label or an error that are looked at: no terminal has room for more in one place."""

RATE_OVER: Final = 3.0
"""Seconds that a rate is taken over: calm enough to read, and quick enough to see a change."""

_WHO: Final = re.compile(r"\Aworker \d+ \(slot \d+\) ")

STYLES: Final = {"idle": "green", "busy": "yellow", "starting": "blue", "leased": "magenta", "stopping": "bright_black"}


@attrs.frozen(kw_only=True)
class Rates:
    """What takes two looks at a pool: None, or no entry, where there was only one."""

    jobs: float | None = None
    """Jobs that ended, a second."""
    cpu: dict[int, float] = attrs.field(factory=dict[int, float])
    """By pid, percent of one processor."""


class RateMeter:
    """Makes rates of looks at one pool: `see` each, in order."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, dict[int, float]]] = deque()

    def see(self, status: PoolFact, workers: Sequence[WorkerFact], now: float) -> Rates:
        """Take a look at the time `now`, in monotonic seconds, and return the rates of the last seconds."""
        cpu = {fact["pid"]: fact["cpu"] for fact in workers if fact["pid"] is not None and fact["cpu"] is not None}
        looks = self._looks
        looks.append((now, sum(status["jobs"].values()), cpu))
        while len(looks) > 2 and looks[1][0] <= now - RATE_OVER:
            looks.popleft()
        then, jobs, _ = looks[0]
        if now <= then:
            return Rates()
        percents: dict[int, float] = {}
        for pid, seconds in cpu.items():
            # A worker that is younger than the window is measured from when it was first seen.
            since, before = next((look[0], look[2][pid]) for look in looks if pid in look[2])
            if since < now:
                percents[pid] = max(0.0, 100 * (seconds - before) / (now - since))
        return Rates(jobs=max(0.0, (looks[-1][1] - jobs) / (now - then)), cpu=percents)


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    r"""Return text that shows on one line as it is counted: what a terminal would act on stands escaped, as `\x1b`."""
    more = len(text) > longest
    # Variation selectors are printable, but terminals differ in how wide they make what stands before them.
    shown = "".join(
        letter if letter.isprintable() and letter not in "\ufe0e\ufe0f" else ascii(letter)[1:-1]
        for letter in text[:longest]
    )
    return shown + "…" if more else shown


def cut(text: str, width: int) -> str:
    """Return at most so many cells of a line, and `…` where it goes on."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "…" * (width > 0)


def duration(seconds: float) -> str:
    """Write seconds in at most six characters."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return (
                f"{whole // size}{unit}{whole % size // small:02}{smaller}"
                if whole < 1000 * size
                else f"{whole // size}{unit}"
            )
    return f"{whole}s"


def size(count: int) -> str:
    """Write a number of bytes in at most eight characters."""
    amount = count / 2**20
    for unit in ("MiB", "GiB"):
        if amount < 999.5:
            return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def counts(numbers: dict[str, int]) -> str:
    """Write a mapping of counts, the highest first, without those that are 0."""
    some = sorted((-count, printable(name, 40)) for name, count in numbers.items() if count)
    return ", ".join(f"{name} {-count:,}" for count, name in some) or "none"


@attrs.frozen
class _Column:
    title: str
    rank: int
    """What has the highest is the first to go where the terminal is narrow."""
    right: bool = False
    least: int | None = None
    """Where the column can be made narrower than its texts: how far."""


_COLUMNS: Final = (
    _Column("slot", 0, right=True),
    _Column("pid", 3, right=True),
    _Column("state", 1),
    _Column("jobs", 4, right=True),
    _Column("job", 2, least=8),
    _Column("age", 5, right=True),
    _Column("memory", 6, right=True),
    _Column("cpu %", 7, right=True),
    _Column("uptime", 10, right=True),
    _Column("restarts", 8, right=True),
    _Column("last death", 9, least=12),
)


def _cells(fact: WorkerFact, status: PoolFact, rates: Rates) -> list[str]:
    """What stands in a worker's row, a text for each column."""
    pid, job, memory, death = fact["pid"], fact["job"], fact["memory"], fact["last_death"]
    percent = None if pid is None else rates.cpu.get(pid)
    label = "" if job is None else "(no label)" if job["label"] is None else printable(job["label"])
    end = ""
    if death is not None:
        end = f"{printable(death['reason'], 40)} {duration(status['at'] - death['at'])} ago"
        if death["error"]:
            # Who it was says the row already.
            end += f": {printable(_WHO.sub('', death['error']))}"
    return [
        str(fact["slot"]),
        "" if pid is None else str(pid),
        printable(fact["status"], 20),
        f"{fact['jobs']:,}",
        label,
        "" if job is None else duration(job["age"]),
        "" if memory is None else size(memory),
        "" if percent is None else f"{percent:.0f}",
        duration(fact["uptime"]),
        f"{fact['restarts']:,}",
        end,
    ]


KEYS: Final = ("q quit", "r reset", "+ - resize", "? help")
HELP: Final = (
    "r: replace every worker by a fresh one, each when its successor is ready",
    "+: one worker more",
    "-: one fewer",
    "↑ ↓ PgUp PgDn: other workers, where not all fit",
    "q or Ctrl-C: leave; the pool goes on",
    "?: close this help",
)


@attrs.frozen
class Drawing:
    """Lines, each as high as one and no wider than was asked for."""

    lines: list[Text]
    first: int
    """How many workers are scrolled away at the top: never so many that there is empty room below."""
    room: int
    """How many workers have a place."""


def render(
    status: PoolFact,
    workers: Sequence[WorkerFact],
    rates: Rates,
    width: int,
    height: int | None = None,
    *,
    first: int = 0,
    keys: bool = True,
    help: bool = False,
    note: str = "",
) -> RenderableType:
    """Draw a pool and its workers, at most `width` cells wide and `height` lines high; None is as high as it gets.

    What is less important goes first where there is no room, and a line says what is not shown. `first` is how many
    workers are scrolled away at the top. The last line says which `keys` there are, all of them with `help`, or the
    `note`. `status` is of the control socket's `status`, `workers` of its `workers`, and `rates` of a `RateMeter`.
    """
    drawing = draw(status, workers, rates, width, height, first=first, keys=keys, help=help, note=note)
    return Group(*drawing.lines)


def draw(
    status: PoolFact,
    workers: Sequence[WorkerFact],
    rates: Rates,
    width: int,
    height: int | None = None,
    *,
    first: int = 0,
    keys: bool = True,
    help: bool = False,
    note: str = "",
) -> Drawing:
    """Do what `render` does, and say what there was room for."""
    foot = _foot(width, keys, help, note)
    head = _head(status, rates, width)
    rows = [_cells(fact, status, rates) for fact in workers]
    widths, gap = _fit(rows, width)
    missing = [column.title for column, wide in zip(_COLUMNS, widths, strict=True) if wide is None]
    room = len(workers)
    if height is not None:
        head = head[: 4 if height >= 14 else 3 if height >= 9 else 2 if height >= 6 else 1]
        foot = foot[: max(0, height - len(head) - 2)]
        room = max(0, height - len(head) - len(foot) - 1)
        if missing or room < len(workers):
            room = max(0, room - 1)  # for the line that says so
    first = max(0, min(first, len(workers) - room))
    lines = [*head, _line([column.title for column in _COLUMNS], widths, gap, width, style="bold reverse")]
    for row, fact in list(zip(rows, workers, strict=True))[first : first + room]:
        lines.append(_line(row, widths, gap, width, state=fact["status"]))
    if not workers:
        lines.append(_dim("there is no worker", width))
    if hidden := _hidden(first, max(0, len(workers) - first - room), missing):
        lines.append(_dim(hidden, width))
    if height is not None:
        lines += [Text()] * (height - len(lines) - len(foot))
        lines = lines[: max(0, height - len(foot))]
    return Drawing([*lines, *foot], first, room)


def picture(drawing: RenderableType, width: int, title: str) -> str:
    """Return a drawing as SVG, for a page: rich's picture of a terminal, the same for the same drawing."""
    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor",
        markup=False, emoji=False, highlight=False, legacy_windows=False,
    )  # fmt: skip
    console.print(drawing)
    svg = console.export_svg(title=title, unique_id="trio-workers")
    # Its font would be fetched from elsewhere; without, it is the reader's own for programs, in the same places.
    return re.sub(r"@font-face\s*\{[^}]*\}\s*", "", svg)


def _dim(text: str, width: int) -> Text:
    return Text(cut(text, width), style="bright_black", no_wrap=True)


def _hidden(above: int, below: int, columns: Iterable[str]) -> str:
    parts: list[str] = []
    if above + below:
        word = "worker" if above + below == 1 else "workers"
        where = "" if not above else " above" if not below else f" ({above} above, {below} below)"
        parts.append(f"{above + below} {word}{where}")
    if names := ", ".join(columns):
        parts.append(f"columns {names}")
    return f"not shown: {'; '.join(parts)}" if parts else ""


def _head(status: PoolFact, rates: Rates, width: int) -> list[Text]:
    by_state = [("busy", status["busy"]), ("idle", status["idle"]), ("starting", status["starting"])]
    by_state += [("leased", status["leased"]), ("stopping", status["stopping"])]
    word = "worker" if status["target"] == 1 else "workers"
    states = ", ".join(f"{count} {name}" for name, count in by_state if count) or "none there"
    who = [f"{status['target']} {word}: {states}", f"pid {status['pid']}"]
    if status["closed"]:
        who.insert(0, "closing")
    elif not status["accepting"]:
        who.insert(0, "queue full")
    if status["failed_starts"]:
        row = f", {status['failed_in_a_row']} in a row" if status["failed_in_a_row"] else ""
        starts = "start" if status["failed_starts"] == 1 else "starts"
        who.append(f"{status['failed_starts']:,} failed {starts}{row}")
    flow = [] if rates.jobs is None else [f"{rates.jobs:,.1f} jobs/s"]
    flow += [f"waiting {status['waiting']:,}", f"longest wait {duration(status['longest_wait'])}"]
    flow.append(f"{sum(status['jobs'].values()):,} jobs so far")
    name = cut(printable(status["pool"]), min(width, max(8, width // 3)))
    first = Text(name, style="bold", no_wrap=True)
    first.append(cut(" · ".join(["", *who]), max(0, width - cell_len(name))), style="not bold")
    return [
        first,
        Text(cut(" · ".join(flow), width), no_wrap=True),
        Text(cut(f"exits: {counts(status['exits'])}", width), no_wrap=True),
        Text(cut(f"jobs: {counts(status['jobs'])}", width), no_wrap=True),
    ]


def _foot(width: int, keys: bool, help: bool, note: str) -> list[Text]:
    lines = pack(HELP, width) if help else []
    if note:
        lines.append(printable(note))
    elif keys and not help:
        lines += pack(KEYS, width)[:1]
    return [Text(cut(line, width), style="bold" if note else "bright_black", no_wrap=True) for line in lines]


def pack(parts: Iterable[str], width: int) -> list[str]:
    """Put parts on as few lines as they fit on, in their order."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + 3 + cell_len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def _fit(rows: Sequence[Sequence[str]], width: int) -> tuple[list[int | None], int]:
    """Say how wide each column is, None for one that has no room, and how much is between two."""
    full = [max(map(cell_len, (column.title, *texts))) for column, *texts in zip(_COLUMNS, *rows, strict=True)]
    least = [
        wide if column.least is None else min(wide, max(column.least, cell_len(column.title)))
        for column, wide in zip(_COLUMNS, full, strict=True)
    ]
    there = sorted(range(len(_COLUMNS)), key=lambda index: _COLUMNS[index].rank)

    def spare(gap: int) -> int:
        return width - sum(least[index] for index in there) - gap * (len(there) - 1)

    while len(there) > 1 and spare(1) < 0:
        there.pop()
    gap = 2 if spare(2) >= 0 else 1
    more = max(0, spare(gap))
    widths: list[int | None] = [least[index] if index in there else None for index in range(len(_COLUMNS))]
    # What is left is for the job's label and for how the last one died; where both want it, each has its half.
    wanted = {index: full[index] - least[index] for index in there if full[index] > least[index]}
    for index, want in sorted(wanted.items(), key=lambda item: item[1]):
        give = min(want, more // len(wanted))
        widths[index] = least[index] + give
        more -= give
        del wanted[index]
    return widths, gap


def _line(
    cells: Sequence[str], widths: Sequence[int | None], gap: int, width: int, *, style: str = "", state: str = ""
) -> Text:
    line = Text(style=style, no_wrap=True)
    for cell, column, wide in zip(cells, _COLUMNS, widths, strict=True):
        if wide is None:
            continue
        text = cut(cell, wide)
        blank = " " * (wide - cell_len(text))
        if line:
            line.append(" " * gap)
        shown = blank + text if column.right else text + blank
        line.append(shown, STYLES.get(state) if column.title == "state" else None)
    line.truncate(width, overflow="crop")
    if style:
        line.pad_right(max(0, width - line.cell_len))
    else:
        line.rstrip()
    return line


__all__ = ["RateMeter", "Rates", "counts", "cut", "draw", "duration", "pack", "picture", "printable", "render", "size"]
