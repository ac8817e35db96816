"""What the docs say of Python functions as jobs is so: their programs run, their errors read as shown."""

import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

import pytest
import trio
import trio.testing

import trio_workers
from trio_workers import JobError, JobTimeout, Limits, SpawnError, open_python_pool
from trio_workers import _calls as calls

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
    """Whether a text is the one shown: there `...` is anything, 4711 any pid, and lines are broken anywhere.

    The marks below the lines of a traceback differ between the versions of Python, and don't count.
    """
    shown, said = (re.sub(r"^[ ^~]+\n", "", text, flags=re.M) for text in (shown, said))
    pattern = r"\s+".join(re.escape(word) for word in shown.split())
    return re.fullmatch(pattern.replace(r"\.\.\.", ".*?").replace("4711", r"\d+"), said.strip(), re.S) is not None


def id_of(program: Program) -> str:
    return f"{Path(program.page).stem}-{Path(program.name).stem}"


PROGRAMS: Final = [program for page in PAGES for program in programs_of(page)]


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
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


@pytest.mark.parametrize("program", PROGRAMS, ids=id_of)
def test_program(program: Program, tmp_path: Path) -> None:
    """Each program runs as a reader runs it, with warnings as errors, and prints what the page shows."""
    if program.how == "not run":
        compile(program.code, program.name, "exec")  # its package is not among those of the tests
        return
    for package in re.findall(r"^(?:import|from) (anyio|numpy)\b", program.code, re.M):
        pytest.importorskip(package)
    (tmp_path / program.name).write_text(program.code, encoding="utf-8")
    if program.how == "by pytest":
        plugins = ("-p", "pytest_trio.plugin", "-p", "no:cacheprovider")  # loading all that there are takes seconds
        done = run("-m", "pytest", "-q", "-W", "error", *plugins, program.name, directory=tmp_path)
        assert re.search(rf"^{program.code.count('def test_')} passed", done.stdout, re.M), done.stdout
        return
    done = run("-W", "error", program.name, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = output_of(program)
    assert shown is not None
    assert matches(shown, done.stdout), done.stdout
    assert done.stderr == ""


def test_options() -> None:
    """The table of options has each parameter of `open_python_pool`, in order, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| `([^|]+)` \|", read("docs/functions.md").partition("## All options")[2], re.M)
    parameters = inspect.signature(trio_workers.open_python_pool).parameters.values()
    assert rows == [(parameter.name, repr(parameter.default)) for parameter in parameters]


# a module that an initializer imports


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of jobs, as it is in this process."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # releases follow each other within one second
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "def release():\n    return 1\n")
    yield importlib.import_module("jobs_of_a_release")
    del sys.modules["jobs_of_a_release"]


def write(directory: Path, text: str) -> None:
    (directory / "jobs_of_a_release.py").write_text(text, encoding="utf-8")


async def test_broken_release_of_a_python_pool(module: ModuleType, tmp_path: Path) -> None:
    """A broken module is the SpawnError of `reset` where an initializer imports it; else the jobs find out."""
    async with (
        open_python_pool(2, initializer=importlib.import_module, initargs=(module.__name__,)) as pool,
        open_python_pool(1) as unaware,
    ):
        write(tmp_path, "raise RuntimeError('no such model')\n")
        with pytest.raises(SpawnError, match="its initializer raised RuntimeError: no such model"):
            await pool.reset()
        assert await pool.run_sync(module.release) == 1
        await unaware.reset()
        with pytest.raises(JobError, match="no such model"):
            await unaware.run_sync(module.release)
        write(tmp_path, "def release():\n    return 22\n")
        await pool.reset()
        assert await pool.run_sync(module.release) == 22


async def test_exec_ttl_and_the_first_job(module: ModuleType, tmp_path: Path) -> None:
    """The import of a job's module is part of the first job on each worker, unless an initializer imports it."""
    name = module.__name__
    is_there = f"{name!r} in __import__('sys').modules"
    async with open_python_pool(1, initializer=importlib.import_module, initargs=(name,)) as pool:
        assert await pool.run_sync(eval, is_there) is True
    write(tmp_path, "import time\ntime.sleep(60)\n")
    async with open_python_pool(1, limits=Limits(exec_ttl=0.2)) as pool:
        for _ in range(2):
            with pytest.raises(JobTimeout):
                await pool.run_sync(module.release)


# what happens when ...

FAILING: Final = """
import ctypes

import trio

from trio_workers import open_python_pool


def read_memory() -> None:
    ctypes.string_at(0)


def load_model() -> None:
    raise OSError("no model here")


async def main() -> None:
    async with {block} as pool:
        await pool.run_sync(read_memory)


{guard}trio.run(main)
"""


def error_of(kind: str, directory: Path, *, block: str = "open_python_pool(1)", guarded: bool = True) -> str:
    """Run a program whose pool or job fails with this error, and return it as the traceback shows it."""
    guard = 'if __name__ == "__main__":\n    ' if guarded else ""
    (directory / "failing.py").write_text(FAILING.format(block=block, guard=guard), encoding="utf-8")
    done = run("failing.py", directory=directory)
    assert done.returncode == 1
    assert done.stdout == ""
    _, found, text = done.stderr.rpartition(f"\ntrio_workers.{kind}: ")
    assert found, done.stderr
    return f"{kind}: {text}"


def shown_under(heading: str) -> str:
    """The text that a story of the page shows."""
    story = read("docs/what-happens.md").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```text\n(.*?)^```$", story, re.M | re.S)
    return str(block)


def test_text_of_a_segfault(tmp_path: Path) -> None:
    """The error of a job that crashed in C reads as the page shows it."""
    said = error_of("WorkerCrashed", tmp_path)
    assert matches(shown_under("A Python job ends its process"), said), said


def test_text_of_a_missing_guard(tmp_path: Path) -> None:
    """What a job says whose main module has no guard reads as both pages show it."""
    said = error_of("JobError", tmp_path, guarded=False).partition("\nTraceback")[0]
    assert matches(f"JobError: {shown_under('The guard of the main module is missing')}", said), said
    (shown,) = re.findall(r"^```text\n(JobError: the function.*?)^```$", read("docs/functions.md"), re.M | re.S)
    assert matches(shown.replace("/home/ada/pages.py", "..."), said), said


def test_text_of_a_failed_initializer(tmp_path: Path) -> None:
    """The error of a pool whose initializer raises reads as the page shows it."""
    said = error_of("SpawnError", tmp_path, block="open_python_pool(1, initializer=load_model)")
    assert matches(shown_under("An initializer fails"), said), said


async def test_arguments_are_read_when_they_are_written() -> None:
    """What is done to a large buffer while the call waits reaches the job; what is small is read at once."""
    large, small = bytearray(calls.OUT_OF_BAND), bytearray(10)
    sums: list[int] = []
    async with open_python_pool(1) as pool:

        async def add_up(data: bytearray) -> None:
            sums.append(await pool.run_sync(sum, pickle.PickleBuffer(data)))

        async with trio.open_nursery() as nursery, pool.lease():
            for waiting, data in enumerate((large, small), 1):
                nursery.start_soon(add_up, data)
                await trio.testing.wait_all_tasks_blocked()
                assert pool.statistics().waiting == waiting
            large[:] = b"\1" * len(large)
            small[:] = b"\1" * len(small)
    assert sums == [len(large), 0]


# the wire


def test_bytes_of_the_python_child() -> None:
    """The examples on the page of the wire are what both sides send and understand."""
    (block,) = re.findall(r"^```text\n(pool    call 7 .*?)^```$", read("docs/wire.md"), re.M | re.S)
    shown = [bytes.fromhex(re.sub(r"[^0-9a-f]", "", line[30:])) for line in block.splitlines()]
    assert shown == [
        b"".join(calls.encode(*message))
        for message in [
            (calls.CALL, 7, b"fa", (), 1),
            (calls.CALL, 7, b"fa", (memoryview(bytes(range(4))),), 1),
            (calls.READY, 0, (4711).to_bytes(8, "little")),
            (calls.RESULT, 7, b"r"),
            (calls.PART, 7, b"r"),
            (calls.END, 7),
            (calls.ERROR, 7, b"tx", (), 1),
            (calls.STOP_STREAM, 7),
            (calls.STOP, 0),
        ]
    ]


def test_kinds_of_the_python_child() -> None:
    """The table of kinds has each of them, with the side that says it."""
    rows = re.findall(r"^\| (pool|child) \| `([0-9a-f]{2})` \|", read("docs/wire.md"), re.M)
    assert [int(kind, 16) for who, kind in rows if who == "pool"] == sorted(calls.FROM_POOL)
    assert [int(kind, 16) for who, kind in rows if who == "child"] == sorted(calls.FROM_CHILD)
