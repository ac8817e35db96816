"""How a pool is drawn: of made-up facts, without a terminal."""

import io
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tests.top_facts import at_work, death, pool_fact, worker_fact
from trio_workers._watch import PoolFact, WorkerFact
from trio_workers.cli._top import paint
from trio_workers.cli._top_view import (
    RateMeter,
    Rates,
    counts,
    cut,
    draw,
    duration,
    pack,
    picture,
    printable,
    render,
    size,
)

COLUMNS: Final = ["slot", "pid", "state", "jobs", "job", "age", "memory", "cpu_%", "uptime", "restarts", "last_death"]
HOSTILE: Final = (
    "\x1b[2J\x1b]0;mine\x07", "[red]alarm[/red]", "[/]", "a\nb\tc\rd", "\x9b31m", "日本語" * 50, "x" * 10_000, "\ud800",
    "\u202eback", "\x7f\0", ":smile: 👩‍👩‍👧‍👦 ❤️", "e\u0301" * 300, "\u2028", "\U000e0001",
)  # fmt: skip


def drawn(
    status: PoolFact,
    workers: list[WorkerFact],
    width: int,
    height: int | None = None,
    rates: Rates | None = None,
    **more: Any,
) -> list[str]:
    """The lines, as rich prints them."""
    out = io.StringIO()
    console = Console(file=out, width=width, height=height or 1000, force_terminal=False)
    console.print(render(status, workers, rates or Rates(), width, height, **more))
    lines = out.getvalue().split("\n")
    assert lines.pop() == ""
    return lines


def titles(lines: list[str]) -> list[str]:
    """The columns that are there."""
    (line,) = (line for line in lines if line.startswith("slot"))
    return line.replace("cpu %", "cpu_%").replace("last death", "last_death").split()


def busy_pool() -> tuple[PoolFact, list[WorkerFact]]:
    """Four of whom one is at work and one has had an accident."""
    workers = [
        worker_fact(0),
        worker_fact(1, **at_work("render page")),
        worker_fact(2, restarts=3, last_death=death("crashed", "worker 2 exited with status 3")),
        worker_fact(3, pid=None, status="starting", memory=None, cpu=None),
    ]
    status = pool_fact(idle=2, busy=1, starting=1, waiting=12, longest_wait=0.53, exits={"crashed": 3, "ttl": 40})
    return status, workers


def test_a_wide_terminal_shows_all() -> None:
    """A row for each worker, every column, and what the pool does on top."""
    status, workers = busy_pool()
    lines = drawn(status, workers, 160, 20, Rates(jobs=1234.56, cpu={5001: 87.4}))
    assert len(lines) == 20
    assert lines[0].startswith("mill · 4 workers: 1 busy, 2 idle, 1 starting · pid 4711")
    assert "1,234.6 jobs/s · waiting 12 · longest wait 0.5s · 12,345 jobs so far" in lines[1]
    assert lines[2] == "exits: ttl 40, crashed 3"
    assert lines[3] == "jobs: replied 12,345"
    assert titles(lines) == COLUMNS
    assert lines[6].split() == ["1", "5001", "busy", "10", "render", "page", "1.5s", "32", "MiB", "87", "1m40s", "0"]
    assert lines[7].endswith("3  crashed 5.0s ago: worker 2 exited with status 3")
    assert lines[8].split() == ["3", "starting", "30", "1m40s", "0"]
    assert lines[-1] == "q quit · r reset · + - resize · ? help"
    assert not any("not shown" in line for line in lines)


def test_a_narrow_terminal_says_what_it_leaves_out() -> None:
    """Sixty columns and ten rows: the less important columns and the last rows go, and a line says so."""
    status, workers = busy_pool()
    workers += [worker_fact(slot) for slot in range(4, 20)]
    lines = drawn(status, workers, 60, 10)
    assert len(lines) == 10
    assert titles(lines) == ["slot", "pid", "state", "jobs", "job", "age", "memory", "cpu_%", "restarts"]
    assert lines[-2] == "not shown: 16 workers; columns uptime, last death"
    lines = drawn(status, workers, 60, 10, first=3)
    assert lines[-2] == "not shown: 16 workers (3 above, 13 below); columns uptime, …"
    assert lines[4].startswith("   3 ")
    lines = drawn(status, workers, 60, 10, first=1000)
    assert lines[-2] == "not shown: 16 workers above; columns uptime, last death"
    assert lines[-3].startswith("  19 ")


def test_the_narrower_the_fewer_columns() -> None:
    """Columns go one by one, the slot last; none comes back on the way."""
    status, workers = busy_pool()
    before = COLUMNS
    for width in range(130, 3, -1):
        lines = drawn(status, workers, width, 24)
        now = [title for title in COLUMNS if title in titles(lines)]
        assert set(now) <= set(before)
        before = now
    assert before == ["slot"]


@pytest.mark.parametrize("width", [1, 7, 20, 60, 200])
def test_it_never_leaves_its_place(width: int) -> None:
    """Whatever the size, there are as many lines as asked for, and none is too wide."""
    status, workers = busy_pool()
    for height in (*range(1, 16), 40):
        for help in (False, True):
            lines = [line.plain for line in draw(status, workers, Rates(), width, height, help=help).lines]
            assert len(lines) == height
            assert all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text(text: str) -> None:
    """What workers and callers say is shown as text: no control character, no markup, no row out of line."""
    status = pool_fact(pool=text, exits={text: 3}, jobs={text: 1})
    said = worker_fact(0, **at_work(text), last_death=death(text, text), restarts=7)
    plain = worker_fact(1, **at_work("x"), restarts=7)
    for width in (60, 100, 200):
        lines = drawn(status, [said, plain], width, 12, note=text)
        assert len(lines) == 12
        assert all(cell_len(line) <= width for line in lines)
        assert all(letter.isprintable() for line in lines for letter in line)
        (first, second) = (line for line in lines if line.lstrip()[:1] in "01" and " busy " in line)
        column = second.rindex(" 7")
        assert first[: len(first)].find(" 7") >= 0
        assert cell_len(first[: first.index(" 7 ") if " 7 " in first else first.rindex(" 7")]) == column
    screen = paint(draw(status, [said, plain], Rates(), 100, 12), 100, 12).decode()
    assert "\x07" not in screen
    assert "\x1b[2J" not in screen
    assert "\x9b" not in screen


@given(st.text(st.characters(), max_size=600), st.integers(0, 300))
def test_printable_text_is_printable(text: str, width: int) -> None:
    """Of any text comes one line that can be encoded, and is no wider than it is cut to."""
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert cell_len(cut(shown, width)) <= width


def test_what_is_escaped() -> None:
    """A control character stands as Python writes it; text of any language stands as it is."""
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert printable("größer 日本語 [red]") == "größer 日本語 [red]"
    assert printable("x" * 500) == "x" * 400 + "…"
    assert printable("\ud800\u202e") == "\\ud800\\u202e"


def test_numbers() -> None:
    """Times and sizes are short, whatever they are."""
    seconds = (0, 0.04, 9.94, 9.96, 59.4, 59.6, 61, 3599.6, 3600, 7322, 86400, 90000, 8640000, 1e9, -3)
    assert " ".join(map(duration, seconds)) == (
        "0.0s 0.0s 9.9s 10s 59s 1m00s 1m01s 1h00m 1h00m 2h02m 1d00h 1d01h 100d00h 11574d 0.0s"
    )
    assert [size(count) for count in (0, 2**20, 52 * 2**20, 999 * 2**20, 1000 * 2**20, 2**41)] == [
        "0.0 MiB", "1.0 MiB", "52 MiB", "999 MiB", "1.0 GiB", "2.0 TiB",
    ]  # fmt: skip
    assert counts({"a": 1, "b": 2000, "c": 0}) == "b 2,000, a 1"
    assert counts({}) == "none"
    assert pack(["aaa", "bbb", "ccc"], 9) == ["aaa · bbb", "ccc"]


def test_what_is_unusual_is_said_first() -> None:
    """A pool that closes, one that takes no more jobs, one without workers, and one whose workers don't come up."""
    assert drawn(pool_fact(closed=True, accepting=False), [], 80)[0].startswith("mill · closing · 4 workers")
    assert drawn(pool_fact(accepting=False), [], 80)[0].startswith("mill · queue full · 4 workers")
    lines = drawn(pool_fact(idle=0, busy=0, failed_starts=3, failed_in_a_row=2, target=1), [], 80)
    assert lines[0] == "mill · 1 worker: none there · pid 4711 · 3 failed starts, 2 in a row"
    assert "there is no worker" in lines


def test_the_last_line() -> None:
    """It tells the keys, or all about them, or what has just happened."""
    status, workers = busy_pool()
    assert drawn(status, workers, 80, 24, keys=False)[-1] == ""
    assert drawn(status, workers, 80, 24, note="reset: done in 1.0s")[-1] == "reset: done in 1.0s"
    lines = drawn(status, workers, 80, 24, help=True)
    assert any("replace every worker by a fresh one" in line for line in lines)
    assert "close this help" in lines[-1]


def test_rates() -> None:
    """Jobs a second and processor time are of the last three seconds; a worker that is new, of its own time."""
    meter = RateMeter()

    def look(now: float, jobs: int, **cpu: float) -> Rates:
        workers = [worker_fact(0, pid=int(pid[1:]), cpu=seconds) for pid, seconds in cpu.items()]
        return meter.see(pool_fact(jobs={"replied": jobs, "crashed": jobs}), workers, now)

    assert look(10.0, 5, p7=1.0) == Rates()
    assert look(10.0, 5, p7=1.0) == Rates()  # no time has gone by
    rates = look(11.0, 10, p7=1.5)
    assert rates.jobs == 10
    assert rates.cpu == {7: pytest.approx(50)}
    assert look(12.0, 10, p8=0.25).cpu == {}
    rates = look(13.0, 10, p8=0.5)
    assert rates.cpu == {8: pytest.approx(25)}
    for now in range(14, 30):
        rates = look(now, 10, p8=0.5)
    assert rates.jobs == 0
    assert rates.cpu == {8: 0}


def test_a_worker_that_came_back_has_no_negative_time() -> None:
    """A pid that was given out again has had less time than before; that is none, not less than none."""
    meter = RateMeter()
    meter.see(pool_fact(), [worker_fact(0, pid=7, cpu=9.0)], 1.0)
    assert meter.see(pool_fact(jobs={}), [worker_fact(0, pid=7, cpu=0.1)], 2.0) == Rates(jobs=0, cpu={7: 0})


def test_a_picture() -> None:
    """The same drawing is the same SVG, well-formed whatever is in it, and fetches nothing."""
    status, workers = busy_pool()
    workers[1].update(at_work("<script>&\x00日本語"))
    one, two = (picture(render(status, workers, Rates(), 100, 14), 100, "trio-workers top") for _ in range(2))
    assert one == two
    assert ElementTree.fromstring(one).tag.endswith("svg")
    assert "<script" not in one
    assert "url(http" not in one
    assert "restarts" in one
