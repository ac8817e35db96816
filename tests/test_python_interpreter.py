"""A Python pool's workers are interpreters like this one, and jobs may do with processes what they like (point 3)."""

# ruff: noqa: ASYNC221, ASYNC240 - tests may block for a moment

import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests import python_child_jobs as jobs
from trio_workers import PythonPool, WorkerCrashed, open_python_pool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

DESCRIBE: Final = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])  # -I takes nothing from the environment
from tests import python_child_jobs as jobs

here = jobs.describe_interpreter()

import trio
from trio_workers import open_python_pool

async def main():
    async with open_python_pool(1) as pool:
        there = await pool.run_sync(jobs.describe_interpreter)
        path = await pool.run_sync(eval, "__import__('sys').path")
    print(json.dumps({"here": here, "there": there, "paths": [sys.path, path]}))

if __name__ == "__main__":
    trio.run(main)
"""


def packages() -> list[str]:
    """Return where this interpreter has what the tests and the library need."""
    return list(dict.fromkeys([jobs.ROOT, str(Path(trio.__file__).parents[1])]))


def describe(command: list[str | Path], where: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the program with an interpreter; return what that is told of itself, and what its worker says."""
    program = where / "describe.py"
    program.write_text(DESCRIBE)
    finished = jobs.run_program([*command, program, json.dumps(packages())], cwd=where, env=env)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


# flags


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "-O -b",
        "-OO -B -bb",
        "-X dev",
        "-X utf8 -W error",
        "-X utf8=0 -W ignore -W error::ResourceWarning",
        "-I",
        "-P",
        "-E -s -X faulthandler",
        "-S",
        "-X int_max_str_digits=1000 -X frozen_modules=off -X own=value -X owned",
    ],
)
def test_flags_are_handed_on(flags: str, tmp_path: Path) -> None:
    """Point 3: whatever flags the interpreter was started with, its workers have the same."""
    found = describe([sys.executable, *flags.split()], tmp_path)
    assert found["there"] == found["here"]
    assert found["paths"][0] == found["paths"][1]
    # The flags were heard at all.
    assert found["here"]["asserts"] == ("-O" not in flags)
    assert found["here"]["docstrings"] == ("-OO" not in flags)
    assert ("safe_path=True" in found["here"]["flags"]) == (flags in ("-I", "-P"))
    assert ("dev_mode=True" in found["here"]["flags"]) == ("dev" in flags)


def test_environment_of_the_interpreter_is_handed_on(tmp_path: Path) -> None:
    """Point 3: what the environment says instead of flags holds for workers, and is not said twice."""
    env = {"PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "error::ResourceWarning", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    found = describe([sys.executable], tmp_path, env)
    assert found["there"] == found["here"]
    assert not found["here"]["asserts"]
    assert "safe_path=True" in found["here"]["flags"]


def test_interactive_flag_is_not_handed_on(tmp_path: Path) -> None:
    """Point 3: a worker of an interpreter started with -i ends when it is told to, and asks nothing."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, trio\n"
        "from tests import python_child_jobs as jobs\n"
        "from trio_workers import open_python_pool\n"
        "async def main():\n"
        "    async with open_python_pool(1) as pool:\n"
        "        print(await pool.run_sync(jobs.look_at, 'sys.flags.interactive, sys.flags.inspect'))\n"
        "if __name__ == '__main__':\n"
        "    trio.run(main)\n"
    )
    finished = jobs.run_program([sys.executable, "-i", program], cwd=tmp_path)
    assert finished.stdout.strip() == "(0, 0)", finished.stderr


def test_virtual_environment_is_the_workers_too(tmp_path: Path) -> None:
    """Point 3: the interpreter of a virtual environment has workers of that environment, with its packages."""
    directory = tmp_path / "environment"
    venv.create(directory, symlinks=True, with_pip=False)
    found = describe([directory / "bin" / "python"], tmp_path)
    assert found["there"] == found["here"]
    assert found["here"]["prefixes"][0] == str(directory)
    assert any(entry.startswith(str(directory)) for entry in found["paths"][1])


# sys.path


async def test_path_is_as_it_is_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 3: sys.path as it is when a worker starts, later changes for later workers."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "early"), *sys.path])
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"module_from_{name}.py").touch()
    async with open_python_pool(1) as pool:
        path = await pool.run_sync(jobs.look_at, "sys.path")
        assert path == [os.path.abspath(entry) for entry in sys.path]
        assert await pool.run_sync(jobs.file_of_module, "module_from_early")
        sys.path.append(str(tmp_path / "late"))
        with pytest.raises(ModuleNotFoundError):
            await pool.run_sync(jobs.file_of_module, "module_from_late")
        with pytest.raises(WorkerCrashed):
            await pool.run_sync(jobs.die, 3)
        found = await pool.run_sync(jobs.file_of_module, "module_from_late")
        assert found == str(tmp_path / "late" / "module_from_late.py")


async def test_relative_path_means_the_parents_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 3: relative entries of sys.path, the empty one too, lead to the same place from a worker's other `cwd`."""
    for directory in ("here", "there"):
        (tmp_path / directory / "library").mkdir(parents=True)
        (tmp_path / directory / "library" / "in_library.py").touch()
        (tmp_path / directory / "in_directory.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["library", "", *sys.path, "no_such_directory", "<hook>"])
    async with open_python_pool(1, cwd=tmp_path / "there") as pool:
        assert await pool.run_sync(os.getcwd) == str(tmp_path / "there")
        here = tmp_path / "here"
        assert await pool.run_sync(jobs.file_of_module, "in_library") == str(here / "library" / "in_library.py")
        assert await pool.run_sync(jobs.file_of_module, "in_directory") == str(here / "in_directory.py")
        # What is no file may mean something to an import hook.
        assert (await pool.run_sync(jobs.look_at, "sys.path"))[-1] == "<hook>"


@pytest.mark.parametrize("env", [{}, {"PYTHONSAFEPATH": "1"}], ids=["", "safe path"])
async def test_cwd_is_not_on_the_path(env: dict[str, str], tmp_path: Path) -> None:
    """Point 3: what lies in a worker's `cwd` is not imported by mistake."""
    (tmp_path / "lies_in_cwd.py").touch()
    for name in ("pickle", "struct", "traceback", "select", "trio_workers", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported by mistake')")
    async with open_python_pool(1, cwd=tmp_path, env=env) as pool:
        with pytest.raises(ModuleNotFoundError):
            await pool.run_sync(jobs.file_of_module, "lies_in_cwd")
        with pytest.raises(ZeroDivisionError):
            await pool.run_sync(divmod, 1, 0)


async def test_path_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point 3: a worker has this interpreter's sys.path, and the programs of its jobs the PYTHONPATH of its `env`."""
    (tmp_path / "on_pythonpath.py").touch()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    async with open_python_pool(1, env={"PYTHONPATH": str(tmp_path), "OWN": "value"}) as pool:
        assert await pool.run_sync(os.getenv, "OWN") == "value"
        assert await pool.run_sync(jobs.look_at, "sys.path") == [os.path.abspath(entry) for entry in sys.path]
        program = [sys.executable, "-c", "import on_pythonpath"]
        assert await pool.run_sync(subprocess.call, program) == 0


SHADOWED: Final = """
import json, os, sys
import trio
from tests import python_child_jobs as jobs
from trio_workers import open_python_pool

def fail():
    raise ValueError("its own")

async def main():
    async with open_python_pool(1) as pool:
        assert await pool.run_sync(jobs.square, 5) == 25
        try:
            await pool.run_sync(fail)
        except ValueError as error:
            assert "raise ValueError" in str(error.__cause__)
        assert await pool.run_sync(jobs.squares_in_threads, 3) == [0, 1, 4]
        names = "pickle", "struct", "traceback", "random"
        files = [await pool.run_sync(jobs.file_of_module, name) for name in names]
    print(*files, sep="\\n")

if __name__ == "__main__":
    trio.run(main)
"""

# What the child imports: at its start, for its first error, in a job.
SHADOWS: Final = (
    "pickle", "struct", "select", "zlib", "contextvars", "faulthandler", "types", "functools", "copyreg", "traceback",
    "linecache", "random", "threading", "trio_workers", "child", "_calls",
)  # fmt: skip


SHADOWING: Final = """
import sys
import trio
from tests import python_child_jobs as jobs
from trio_workers import open_python_pool

async def main():
    sys.path.insert(0, sys.argv[1])
    async with open_python_pool(1) as pool:
        assert await pool.run_sync(jobs.square, 5) == 25
        try:
            await pool.run_sync(divmod, 1, 0)
        except ZeroDivisionError as error:
            assert "ZeroDivisionError" in str(error.__cause__)

if __name__ == "__main__":
    trio.run(main)
"""


@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["", "-P"])
def test_nothing_is_imported_from_the_current_directory(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Point 3: a `pickle.py` in the directory where a script elsewhere was started is not taken for the real one."""
    elsewhere, shadows = tmp_path / "elsewhere", tmp_path / "shadows"
    elsewhere.mkdir()
    shadows.mkdir()
    (elsewhere / "program.py").write_text(SHADOWED)
    for name in SHADOWS:
        (shadows / f"{name}.py").write_text(f"raise SystemExit('{name} was imported by mistake')")
    finished = jobs.run_program([sys.executable, *flags, elsewhere / "program.py"], cwd=shadows)
    assert finished.returncode == 0, finished.stderr
    files = finished.stdout.split()
    assert len(files) == 4
    assert not [file for file in files if file.startswith(str(tmp_path))]
    assert "by mistake" not in finished.stderr


def test_own_modules_are_none_of_the_childs(tmp_path: Path) -> None:
    """Point 3: a program that puts a directory in front of the path, whatever lies there, has workers that start."""
    shadows = tmp_path / "shadows"
    shadows.mkdir()
    for name in ("pickle", "struct", "select", "contextvars", "faulthandler", "copyreg", "trio_workers"):
        (shadows / f"{name}.py").write_text("raise SystemExit('imported by mistake')")
    program = tmp_path / "program.py"
    program.write_text(SHADOWING)
    finished = jobs.run_program([sys.executable, program, shadows], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


# processes and threads in jobs


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_multiprocessing_works_in_a_job(method: str) -> None:
    """Point 3: a process and a pool of multiprocessing, whatever the start method, and the worker goes on."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        result, was_another, status = await pool.run_sync(jobs.square_in_process, method, 7)
        assert (result, was_another, status) == (49, True, 0)
        assert await pool.run_sync(jobs.squares_in_pool, method, 4) == [0, 1, 4, 9]
        await serves(pool, pid)


async def test_executors_threads_and_subprocesses_work_in_a_job() -> None:
    """Point 3: concurrent.futures with processes and with threads, and subprocess with all of its pipes."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        assert await pool.run_sync(jobs.squares_in_executor, 4) == [0, 1, 4, 9]
        assert await pool.run_sync(jobs.squares_in_threads, 4) == [0, 1, 4, 9]
        assert await pool.run_sync(jobs.output_of_subprocess, "text") == "TEXT"
        assert await pool.run_sync(subprocess.call, ["sh", "-c", "exit 3"]) == 3
        await serves(pool, pid)


# forks


async def serves(pool: PythonPool, pid: int | None) -> None:
    """Look that the same worker gives right answers to the next jobs, in this order, and that nobody else answers."""
    for number in range(30):
        assert await pool.run_sync(jobs.square, number) == number * number
    assert await pool.run_sync(os.getpid) == pid
    assert pool.statistics().starts == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("job", "arguments", "status"),
    [
        (jobs.fork_and_return, (), 0),
        (jobs.fork_and_raise, (ValueError("raised in the fork"),), 1),
        (jobs.fork_and_raise, (SystemExit(3),), 3),
        (jobs.fork_and_raise, (SystemExit(),), 0),
        (jobs.fork_and_raise, (SystemExit("with a text"),), 1),
        (jobs.fork_and_raise, (KeyboardInterrupt(),), 1),
        (jobs.fork_and_return_what_has_no_pickle, (), 1),
        (jobs.return_what_forks_when_pickled, (), 0),
        (jobs.echo, (jobs.ForksWhenUnpickled(),), 0),
    ],
    ids=["returns", "raises", "exits", "exits with 0", "exits with text", "interrupts", "no pickle", "dumps", "loads"],
)
async def test_fork_that_leaves_the_job_answers_nothing(
    job: Callable[..., object], arguments: tuple[Any, ...], status: int
) -> None:
    """Point 3: whichever way a fork comes out of a job, it ends there, and only the worker answers."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        for _ in range(3):
            assert await pool.run_sync(job, *arguments) == f"it ended with {status}"
        await serves(pool, pid)


@pytest.mark.faults
async def test_traceback_of_a_fork_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Point 3: what a fork raises is said, as it would be in a program of its own."""
    async with open_python_pool(1) as pool:
        await pool.run_sync(jobs.fork_and_raise, ValueError("raised in the fork"))
    assert [record for record in caplog.records if "ValueError: raised in the fork" in record.getMessage()]


@pytest.mark.faults
@pytest.mark.parametrize(("what", "status"), [("goes on", 0), ("ends", 0), ("raises", 1)])
async def test_fork_in_a_stream_answers_nothing(what: str, status: int) -> None:
    """Point 3: likewise from between two parts of a stream."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        for _ in range(3):
            async with pool.stream(jobs.fork_in_stream, what) as parts:
                assert [part async for part in parts] == ["first", f"it ended with {status}", "last"]
        await serves(pool, pid)


@pytest.mark.faults
async def test_fork_while_a_stream_is_closed_answers_nothing() -> None:
    """Point 3: likewise from the clean-up of a generator that is left early."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        for _ in range(3):
            async with pool.stream(jobs.fork_when_closed) as parts:
                async for part in parts:
                    if part == 2:
                        break
        await serves(pool, pid)


@pytest.mark.faults
async def test_forks_that_return_later_answer_nothing() -> None:
    """Point 3: forks that come back while the next jobs run take none of them and answer none of them."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        for _ in range(5):
            assert await pool.run_sync(jobs.leave_forks, 3) == "the worker's answer"
        await serves(pool, pid)
        assert await pool.run_sync(jobs.reap_all) == [0] * 15
        await serves(pool, pid)


@pytest.mark.faults
async def test_initializer_that_forks_makes_one_worker() -> None:
    """Point 3: a fork that comes out of the initializer serves nobody."""
    async with open_python_pool(1, initializer=jobs.fork_when_asked_to_begin) as pool:
        await serves(pool, pool.workers[0].pid)


@pytest.mark.faults
async def test_forks_left_behind_end_with_the_pool() -> None:
    """Point 3: what a job has forked is gone when the pool is closed, as are processes that it has started."""
    async with open_python_pool(1) as pool:
        pid = await pool.run_sync(jobs.start_sleeper)
        pidfd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def test_signals_of_a_subprocess_are_the_usual() -> None:
    """Point 3: programs that jobs start ignore no signal that those which we start don't."""
    program = "import signal; print([s.name for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN])"
    async with open_python_pool(1) as pool:
        ignored = await pool.run_sync(subprocess.check_output, [sys.executable, "-c", program])
    here = subprocess.check_output([sys.executable, "-c", program])
    assert ignored == here
    assert signal.SIGINT.name not in ignored.decode()
