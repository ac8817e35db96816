"""Charts as SVG, drawn here so that nothing has to be installed: bars side by side, and lines over a growing number.

Each is drawn twice, for light and for dark pages. It is narrow and its letters are large, so that it can be read on a
phone; what is ours is told by more than its colour; and it says in words all that it shows, for those who can't see it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape, quoteattr

import attrs

WIDTH: Final = 480
"""Of a chart, in units that are CSS pixels where there is room: on a phone it shrinks by a quarter or so."""
MARGIN: Final = 16
TEXT: Final = 15
SMALL: Final = 13
LETTER: Final = 0.62
"""The width of a letter on average, in multiples of its height, for lines to be broken."""
OURS: Final = "trio_workers"
"""What the names of our own rows begin with."""
TICKS: Final = 4


@attrs.frozen
class Colours:
    ground: str
    text: str
    faint: str
    rule: str
    ours: str
    theirs: str
    lines: Sequence[str]


# Text and marks keep a contrast of 4.5 to 1 to the ground; lines are told apart by their marks and dashes too.
LIGHT: Final = Colours(
    "#ffffff",
    "#1f2328",
    "#59636e",
    "#d1d9e0",
    "#0550ae",
    "#6e7781",
    ["#0550ae", "#953800", "#1a6b4f", "#8250df", "#59636e"],
)
DARK: Final = Colours(
    "#131416",
    "#f0f6fc",
    "#9198a1",
    "#3d444d",
    "#58a6ff",
    "#8b949e",
    ["#58a6ff", "#f0883e", "#56d4a0", "#d2a8ff", "#9198a1"],
)
DASHES: Final = ("", "8 4", "2 4", "10 3 2 3", "5 5")


@attrs.frozen
class Bar:
    """One bar: the median of the rounds, the least and the greatest."""

    name: str
    median: float
    low: float
    high: float


@attrs.frozen
class Chart:
    """What both kinds have: `name` is that of its files, `title` says what is shown."""

    name: str
    title: str

    def file_name(self, *, dark: bool) -> str:
        return f"benchmarks-{self.name}-{'dark' if dark else 'light'}.svg"

    def words(self) -> str:
        """Say what is shown."""
        raise NotImplementedError

    @property
    def alternative(self) -> str:
        """The words, for the attribute of an HTML element."""
        return escape(f"{self.title}. {self.words()}", {'"': "&quot;"})

    def frame(self, body: Sequence[str], height: float, colours: Colours) -> str:
        title, words = f"{self.name}-title", f"{self.name}-words"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
                f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{title} {words}" '
                'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">',
                f'<title id="{title}">{escape(self.title)}</title>',
                f'<desc id="{words}">{escape(self.words())}</desc>',
                f'<rect width="100%" height="100%" rx="8" fill="{colours.ground}"/>',
                *body,
                "</svg>",
                "",
            ]
        )

    def heading(self, hint: str, colours: Colours) -> tuple[list[str], float]:
        """Draw the title, broken into lines, and a hint below; return how far down that reaches."""
        body: list[str] = []
        y = float(MARGIN)
        for line in broken(self.title, 18):
            y += 22
            body.append(text(MARGIN, y, line, colours.text, size=18, bold=True))
        y += 21
        body.append(text(MARGIN, y, hint, colours.faint, size=SMALL))
        return body, y


def broken(words: str, size: float) -> list[str]:
    """Break into lines that fit."""
    most = int((WIDTH - 2 * MARGIN) / (LETTER * size))
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def text(
    x: float, y: float, words: str, colour: str, *, size: float = TEXT, bold: bool = False, anchor: str = "start"
) -> str:
    weight = 700 if bold else 400
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size:g}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


@attrs.frozen
class Bars(Chart):
    """A bar for each who was measured, or, where they are powers of ten apart, a dot on a logarithmic scale."""

    bars: Sequence[Bar]
    show: Callable[[float], str]
    more_is_better: bool = attrs.field(kw_only=True)
    log: bool = attrs.field(kw_only=True, default=False)

    def words(self) -> str:
        each = "; ".join(f"{bar.name}: {self.show(bar.median)}" for bar in self.bars)
        return f"{'More' if self.more_is_better else 'Less'} is better. {each}."

    def draw(self, *, dark: bool) -> str:
        colours = DARK if dark else LIGHT
        hint = f"{'longer' if self.more_is_better else 'shorter'} is better; the thin line is least to greatest"
        if self.log:
            hint = f"{'right' if self.more_is_better else 'left'} is better; from line to line it is ten times as much"
        body, y = self.heading(hint, colours)
        y += 12
        top = y
        room = WIDTH - 2 * MARGIN - 100  # the figure stands at the end of its bar
        low = min((bar.low for bar in self.bars), default=1.0)
        high = max((bar.high for bar in self.bars), default=1.0)
        first = math.floor(math.log10(low)) if self.log else 0
        last = max(first + 1, math.ceil(math.log10(high))) if self.log else 0

        def along(value: float) -> float:
            share = (math.log10(value) - first) / (last - first) if self.log else value / high
            return MARGIN + share * room

        marks: list[str] = []
        for bar in self.bars:
            ours = bar.name.startswith(OURS)
            colour = colours.ours if ours else colours.theirs
            y += 19
            marks.append(text(MARGIN, y, bar.name, colours.text, bold=ours))
            y += 8
            middle, end = y + 8, along(bar.median)
            if self.log:
                marks.append(line(MARGIN, middle, end, middle, colours.rule, width=2))
                marks.append(f'<circle cx="{end:.1f}" cy="{middle:.1f}" r="{8 if ours else 6}" fill="{colour}"/>')
            else:
                marks.append(
                    f'<rect x="{MARGIN}" y="{y:.1f}" width="{max(2.0, end - MARGIN):.1f}" height="16" rx="2" '
                    f'fill="{colour}"/>'
                )
            marks.append(line(along(bar.low), middle, along(bar.high), middle, colours.text, width=1.5))
            beyond = max(end + (8 if self.log else 0), along(bar.high)) + 8
            marks.append(text(beyond, y + 13, self.show(bar.median), colours.text, size=14, bold=ours))
            y += 22
        if self.log:
            y += 18
            for power in (10.0**n for n in range(first, last + 1)):
                x = along(power)
                body.append(line(x, top + 4, x, y - 14, colours.rule))
                anchor = "start" if power == 10.0**first else "middle"
                body.append(text(x, y, self.show(power), colours.faint, size=SMALL, anchor=anchor))
        return self.frame([*body, *marks], y + MARGIN, colours)


@attrs.frozen
class Lines(Chart):
    """A line for each who was measured, over numbers that grow by steps of the same width."""

    across: str
    """What grows."""
    steps: Sequence[int]
    series: Mapping[str, Sequence[float]]
    show: Callable[[float], str]

    def words(self) -> str:
        each: list[str] = []
        for name, values in self.series.items():
            points = (f"{self.show(value)} at {step:,}" for step, value in zip(self.steps, values, strict=True))
            each.append(f"{name}: {', '.join(points)}")
        return f"More is better. By {self.across}: {'; '.join(each)}."

    def draw(self, *, dark: bool) -> str:
        colours = DARK if dark else LIGHT
        body, top = self.heading("higher is better", colours)
        top += 24
        left, right, bottom = MARGIN + 52, WIDTH - MARGIN - 14, top + 240
        step = round_up(max((max(values) for values in self.series.values()), default=1.0) / TICKS)

        def at(index: int, value: float) -> tuple[float, float]:
            x = left + (right - left) * index / max(1, len(self.steps) - 1)
            return x, bottom - (bottom - top) * value / (step * TICKS)

        for tick in range(TICKS + 1):
            _, y = at(0, tick * step)
            body.append(line(left, y, right, y, colours.rule))
            body.append(text(left - 8, y + 4, shortened(tick * step), colours.faint, size=SMALL, anchor="end"))
        for index, number in enumerate(self.steps):
            body.append(text(at(index, 0)[0], bottom + 20, f"{number:,}", colours.faint, size=SMALL, anchor="middle"))
        y = bottom + 42
        body.append(text((left + right) / 2, y, self.across, colours.text, size=14, anchor="middle"))
        y += 8
        for number, (name, values) in enumerate(self.series.items()):
            colour, dashes = colours.lines[number % len(colours.lines)], DASHES[number % len(DASHES)]
            width = 3 if name.startswith(OURS) else 2
            points = [at(index, value) for index, value in enumerate(values)]
            dash = f" stroke-dasharray={quoteattr(dashes)}" if dashes else ""
            stroke = f'fill="none" stroke="{colour}" stroke-width="{width}"{dash}'
            body.append(f'<polyline points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}" {stroke}/>')
            body += [marker(number, px, py, colour) for px, py in points]
            y += 24
            body.append(f'<line x1="{MARGIN}" y1="{y - 5:.1f}" x2="{MARGIN + 44}" y2="{y - 5:.1f}" {stroke}/>')
            body.append(marker(number, MARGIN + 22, y - 5, colour))
            body.append(text(MARGIN + 54, y, name, colours.text, bold=name.startswith(OURS)))
        return self.frame(body, y + MARGIN, colours)


def marker(number: int, x: float, y: float, colour: str) -> str:
    """Draw one of four shapes."""
    shape = number % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    if shape == 1:
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{colour}"/>'
    corners = [(0, -6), (6, 5), (-6, 5)] if shape == 2 else [(0, -6), (6, 0), (0, 6), (-6, 0)]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}" fill="{colour}"/>'


def round_up(value: float) -> float:
    """Round up to what reads well on an axis."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if value <= step * power * (1 + 1e-9))


def shortened(value: float) -> str:
    """Write thousands and millions short."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return re.sub(r"\.0$", "", f"{value / unit:.1f}") + letter
    return f"{value:g}"
