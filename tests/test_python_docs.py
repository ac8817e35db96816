"""What the docs say of Python functions as jobs is so: their programs run, their errors read as shown."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import trio_workers

ROOT: Final = Path(__file__).parent.parent
PAGES: Final = (
    "docs/functions.md",
    "docs/from-process-pool-executor.md",
    "docs/from-trio-parallel.md",
    "docs/from-anyio-to-process.md",
)


class Program(NamedTuple):
    """A whole program of a page: a block of Python under `<!-- program NAME -->`, or `<!-- program NAME, HOW -->`."""

    page: str
    name: str
    how: str
    code: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def programs_of(page: str) -> list[Program]:
    found = re.findall(r"^<!-- program (\S+\.py)(?:, ([^\n]+))? -->\n```python\n(.*?)^```$", read(page), re.M | re.S)
    return [Program(page, *one) for one in found]


def output_of(program: Program) -> str | None:
    """What the page shows of its output."""
    shown = re.findall(
        rf"^<!-- output of {re.escape(program.name)} -->\n```text\n(.*?)^```$", read(program.page), re.M | re.S
    )
    assert len(shown) <= 1
    return shown[0] if shown else None


def matches(shown: str, said: str) -> bool:
    """Whether a text is the one shown: there `...` is anything, 4711 any pid, and lines are broken anywhere."""
    pattern = r"\s+".join(re.escape(word) for word in shown.split())
    return re.fullmatch(pattern.replace(r"\.\.\.", ".*?").replace("4711", r"\d+"), said.strip(), re.S) is not None


PROGRAMS: Final = [program for page in PAGES for program in programs_of(page)]


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_program_is_marked() -> None:
    """No whole program of these pages is left out: what calls trio.run or main() has its mark."""
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```$", read(page), re.M | re.S)
        whole = [block for block in blocks if "__main__" in block or "def test_" in block]
        assert whole == [program.code for program in programs_of(page)]
    assert len({(program.page, program.name) for program in PROGRAMS}) == len(PROGRAMS)


def test_every_page_of_a_move_has_both_sides() -> None:
    """A page about a move has a program before it and one after it, with the same output."""
    for page in PAGES[1:]:
        before, after = programs_of(page)[:2]
        assert "trio_workers" not in before.code
        assert "open_python_pool" in after.code
        assert output_of(after)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_program(program: Program, tmp_path: Path) -> None:
    """Each program runs as a reader runs it, with warnings as errors, and prints what the page shows."""
    if program.how == "not run":
        compile(program.code, program.name, "exec")  # its package is not among those of the tests
        return
    for package in re.findall(r"^(?:import|from) (anyio|numpy)\b", program.code, re.M):
        pytest.importorskip(package)
    (tmp_path / program.name).write_text(program.code, encoding="utf-8")
    if program.how == "by pytest":
        done = run("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", program.name, directory=tmp_path)
        assert re.search(rf"^{program.code.count('def test_')} passed", done.stdout, re.M), done.stdout
        return
    done = run("-W", "error", program.name, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = output_of(program)
    assert shown is not None
    assert matches(shown, done.stdout), done.stdout
    assert done.stderr == "" or program.how == "chats"


def test_options() -> None:
    """The table of options has each parameter of `open_python_pool`, in order, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| `([^|]+)` \|", read("docs/functions.md").partition("## All options")[2], re.M)
    parameters = inspect.signature(trio_workers.open_python_pool).parameters.values()
    assert rows == [(parameter.name, repr(parameter.default)) for parameter in parameters]
