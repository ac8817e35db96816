"""The benchmarks (`tests/benchmarks`) work: the least of each section is measured, and nothing is said of any speed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import attrs
import pytest
import trio

from tests.benchmarks import command
from tests.benchmarks.charts import Bar, Bars, Lines
from tests.benchmarks.function_pools import Candidate
from tests.benchmarks.function_sections import CALLERS, quick_ones
from tests.benchmarks.measures import QUICK
from tests.benchmarks.report import (
    COMMANDS,
    FUNCTIONS,
    GROWTH,
    IN_SHORT,
    MILLION,
    WATCHING,
    Aim,
    Figure,
    Part,
    Table,
    fill,
    in_short,
    micro,
    ratios,
    show,
    spread,
    write_page,
)
from tests.benchmarks.watching_sections import measure_by_turns

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc, and maps a memfd"),
    pytest.mark.limit(300),  # for a loaded machine: on an idle one, a section takes a second or two
]

ROOT: Final = Path(__file__).parent.parent
SVG: Final = "{http://www.w3.org/2000/svg}"
WORDS_ONLY: Final = {"functions-driven"}
"""Sections whose tables have no figures."""


def run_quick(*arguments: str) -> str:
    """Run the command, in a process of its own: the helpers of some peers live as long as theirs."""
    argv = [sys.executable, "-m", "tests.benchmarks", "--quick", *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures_of(tables: list[dict[str, Any]]) -> list[float]:
    """Return each value of each round."""
    return [
        value
        for table in tables
        for row in table["rows"]
        for cell in row
        if isinstance(cell, dict)
        for value in cell["rounds"]
    ]


@pytest.mark.parametrize("section", sorted(command.SECTIONS.keys() - {"million"}))
def test_section(section: str, tmp_path: Path) -> None:
    """Each can be measured, with the peers that are installed; the others say why not in their rows."""
    file = tmp_path / "figures.json"
    shown = run_quick("--only", section, "--json", str(file))
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["failed"] == []
    assert list(report["sections"]) == [section]
    tables = report["sections"][section]
    for table in tables:
        assert f"### {table['title']}\n" in shown
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    figures = figures_of(tables)
    assert all(figure > 0 for figure in figures)
    assert bool(figures) is (section not in WORDS_ONLY)


def test_million(tmp_path: Path) -> None:
    """Each path of a million can be gone, by fewer."""
    file = tmp_path / "figures.json"
    run_quick("--million", "50", "--json", str(file))
    (table,) = json.loads(file.read_text(encoding="utf-8"))["sections"]["million"]
    assert table["title"].startswith("50 jobs")
    assert {row[-1] for row in table["rows"]} <= {"yes", "-"}
    assert figures_of([table])


async def test_each_is_called_in_no_time() -> None:
    """However late a run comes to its first call (on loaded cores its time may be over by then), it has figures."""

    async def call(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    assert len(await quick_ones(call, 0.0)) == CALLERS
    results = await measure_by_turns({"a": call, "b": call}, attrs.evolve(QUICK, seconds=0.0, warm_up=0.0))
    assert [len(it.p50) for it in results.values()] == [1, 1]


def test_write(tmp_path: Path) -> None:
    """A part is written whole, with its charts beside the page, and again in the same place."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{GROWTH.begin}\nold\n{GROWTH.end}\n\nafter\n", encoding="utf-8")
    run_quick("--only", "growth", "--write", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{GROWTH.begin}\n")
    assert text.endswith(f"{GROWTH.end}\n\nafter\n")
    assert "old" not in text
    assert "| trio_workers, run_sync " in text
    linked = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(linked) == 4  # two charts, light and dark
    for name in linked:
        check_chart((tmp_path / name).read_text(encoding="utf-8"))


def check_chart(text: str) -> ElementTree.Element:
    """It is SVG that says in words what it shows, in letters that can be read on a phone."""
    svg = ElementTree.fromstring(text)
    assert svg.tag == f"{SVG}svg"
    assert svg.get("role") == "img"
    title, words = svg.find(f"{SVG}title"), svg.find(f"{SVG}desc")
    assert title is not None and title.text
    assert words is not None and words.text
    assert svg.get("aria-labelledby") == f"{title.get('id')} {words.get('id')}"
    width = float(svg.get("viewBox", "").split()[2])
    for letters in svg.iter(f"{SVG}text"):
        assert float(letters.get("font-size", "0")) >= 13
        assert 0 <= float(letters.get("x", "-1")) <= width
    return svg


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_bars(dark: bool, log: bool) -> None:
    """Each bar has its name and its figure, in the picture and in its words."""
    bars = [Bar("trio_workers, <ours>", 0.000_05, 0.000_04, 0.000_06), Bar("theirs", 0.005, 0.004, 0.006)]
    chart = Bars("latency", "How long & why", bars, micro, more_is_better=False, log=log)
    svg = check_chart(chart.draw(dark=dark))
    letters = [it.text for it in svg.iter(f"{SVG}text")]
    assert {"How long & why", "trio_workers, <ours>", "50.0 µs", "theirs", "5,000 µs"} <= set(letters)
    assert chart.words() == "Less is better. trio_workers, <ours>: 50.0 µs; theirs: 5,000 µs."
    assert chart.draw(dark=dark) != chart.draw(dark=not dark)


def test_bars_are_as_long_as_what_they_show() -> None:
    """A bar of half the time is half as long."""
    chart = Bars("it", "it", [Bar("a", 1.0, 1.0, 1.0), Bar("b", 2.0, 2.0, 2.0)], micro, more_is_better=True)
    _, *bars = check_chart(chart.draw(dark=False)).iter(f"{SVG}rect")
    assert float(bars[0].get("width", "")) * 2 == pytest.approx(float(bars[1].get("width", "")), abs=0.2)


def test_lines() -> None:
    """Each line has a mark for each step, and its name below."""
    chart = Lines("it", "it", "callers", (1, 1024), {"trio_workers": [5.0, 10.0], "theirs": [2.0, 1.0]}, str)
    svg = check_chart(chart.draw(dark=True))
    assert [len(it.get("points", "").split()) for it in svg.iter(f"{SVG}polyline")] == [2, 2]
    assert {"callers", "1", "1,024", "trio_workers", "theirs"} <= {it.text for it in svg.iter(f"{SVG}text")}
    assert chart.words() == (
        "More is better. By callers: trio_workers: 5.0 at 1, 10.0 at 1,024; theirs: 2.0 at 1, 1.0 at 1,024."
    )


def test_figures() -> None:
    """What is shown is the median, the least and the greatest; ratios are taken round by round."""
    shown = spread([3e-6, 1e-6, 2e-6], micro)
    assert (shown, shown.values) == ("2.00 µs (1.00 to 3.00 µs)", [3e-6, 1e-6, 2e-6])
    assert ratios([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == "2.00 (1.00 to 4.00)"


def test_aims() -> None:
    """An aim is reached by its median; one of something that was not there says so."""
    table = Table("it", "", ["who"])
    table.aim("enough", [4.0, 9.0, 1.0], [1.0, 1.0, 1.0], least=4)
    table.aim("too much", [4.0, 9.0, 1.0], [1.0, 1.0, 1.0], most=3)
    table.aim("unknown", [4.0], None, least=4)
    assert [row[-1] for row in in_short([table]).rows] == ["yes", "no", "-"]
    assert Aim("time", [0.5], most=0.1, show=micro).wanted == "at most 100,000 µs"


def test_missing_peer() -> None:
    """One that is not installed has its row, and the row says how to have it."""
    table = Table("it", "", ["who", "p50", "p99"])
    fill(table, [Candidate("theirs", "no_such_module", start="-", one="-", many="-")], lambda name: pytest.fail(name))
    assert table.rows == [["theirs", "not installed: pip install 'trio_workers[bench]'", "-"]]


def measured_of(part: Part, name: str) -> command.Measured:
    table = Table("it", "note", ["who", "p50"], [["trio_workers", Figure("1", [1.0])]])
    table.draw(name, "a chart", 1, micro, more_is_better=False)
    table.aim(f"aim of {name}", [1.0], [1.0], most=1)
    machine = Table("machine", "", ["what", "which"])
    for what in ("cores", "CPU", "Python", "date"):
        machine.add(what, f"the {what}")
    return command.Measured(part, command.describe_rounds(QUICK, part), [table], machine, True)


def test_summary(tmp_path: Path) -> None:
    """With both big parts there is a summary in the page, and charts of them in the README."""
    docs = tmp_path / "docs"
    docs.mkdir()
    page, readme = docs / "page.md", tmp_path / "README.md"
    page.write_text("page\n", encoding="utf-8")
    readme.write_text("readme\n", encoding="utf-8")
    parts = [measured_of(COMMANDS, "latency"), *(measured_of(FUNCTIONS, name) for name in command.IN_README)]
    both = command.Measured(FUNCTIONS, parts[1].how, [*parts[1].tables, *parts[2].tables], parts[1].machine, True)
    command.write(page, readme, [parts[0], both])
    text = page.read_text(encoding="utf-8")
    assert "| aim of latency " in text.partition(IN_SHORT.begin)[2]
    shown = readme.read_text(encoding="utf-8")
    linked = re.findall(r'(?:src|srcset)="([^"]+)"', shown)
    assert len(linked) == 2 * len(command.IN_README)
    for name in linked:
        check_chart((tmp_path / name).read_text(encoding="utf-8"))
    assert "On the cores cores (the CPU), the Python, the date." in shown


def test_incomplete_part_is_not_written(tmp_path: Path) -> None:
    """What was measured in part leaves the page as it is."""
    page = tmp_path / "page.md"
    page.write_text("page\n", encoding="utf-8")
    it = measured_of(COMMANDS, "latency")
    command.write(page, None, [command.Measured(it.part, it.how, it.tables, it.machine, False)])
    assert page.read_text(encoding="utf-8") == "page\n"


@pytest.mark.parametrize("part", [COMMANDS, FUNCTIONS, GROWTH, WATCHING, MILLION, IN_SHORT])
def test_page_has_a_place_for_each_part(part: Part, tmp_path: Path) -> None:
    """What is written takes the place of what was."""
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert page.read_text(encoding="utf-8").count(part.begin) == 1
    write_page(page, part, show([Table("new", "note", ["a", "b"], [["c", "d"]])], "_static"))
    first = page.read_text(encoding="utf-8")
    assert "### new" in first
    write_page(page, part, show([Table("newer", "note", ["a", "b"], [["c", "d"]])], "_static"))
    assert page.read_text(encoding="utf-8") == first.replace("### new\n", "### newer\n")


def test_readme_has_a_place() -> None:
    """The README holds the comments that its part goes between."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (text.count(IN_SHORT.begin), text.count(IN_SHORT.end)) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "latency", "--write"], "--write writes whole parts"),
        (["--million", "0"], "at least 1"),
        (["--only", "speed"], "invalid choice"),
    ],
)
def test_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What can't be is said before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
