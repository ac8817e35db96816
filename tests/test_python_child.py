"""The Python child (point 1): what it imports, what it opens, and what becomes of its standard streams."""

# ruff: noqa: ASYNC110 - tests wait for states that no event tells

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests import python_child_jobs as jobs
from trio_workers import PythonPool, WorkerCrashed, _platform, open_python_pool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

HEAVY: Final = frozenset(
    {
        "trio",
        "attr",
        "attrs",
        "outcome",
        "numpy",
        "asyncio",
        "concurrent",
        "ctypes",
        "dataclasses",
        "enum",
        "importlib.util",
        "inspect",
        "json",
        "logging",
        "multiprocessing",
        "pickle",
        "re",
        "selectors",
        "signal",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
        "traceback",
        "typing",
        "warnings",
    }
)
"""Modules that take time and memory, of every worker, and which only jobs need."""

MOST_MEMORY: Final = 14_000_000

BUFFERED: Final = {"PYTHONUNBUFFERED": ""}
"""For workers whose streams have buffers, whatever this machine says."""

# Without the site module, whose .pth files may import anything. It notes what an idle worker is.
IDLE: Final = """
import json, os, sys
import trio
from trio_workers import open_python_pool

async def main():
    async with open_python_pool(1) as pool:
        # Before any job, then by a job that itself needs nothing.
        (worker,) = pool.workers
        with open(f"/proc/{worker.pid}/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        threads = os.listdir(f"/proc/{worker.pid}/task")
        modules = await pool.run_sync(eval, "sorted(__import__('sys').modules)")
        names = await pool.run_sync(eval, "sorted(vars(__import__('__main__')))")
    print(json.dumps({"memory": memory, "threads": len(threads), "modules": modules, "names": names}))

application = "main module"
if __name__ == "__main__":
    trio.run(main)
"""


async def logged(caplog: pytest.LogCaptureFixture, *texts: str) -> None:
    """Wait until each of these lines is in the log."""
    while not {*texts} <= {*log_lines(caplog)}:
        await trio.sleep(0.005)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the workers have printed."""
    return [record.getMessage().partition(": ")[2] for record in caplog.records if record.name == "trio_workers.worker"]


async def still_serves(pool: PythonPool, caplog: pytest.LogCaptureFixture, pid: int) -> None:
    """Look that a worker is as good as new: the same, with standard streams that lead where they should."""
    assert await pool.run_sync(os.getpid) == pid
    stdin, stdout, stderr = await pool.run_sync(jobs.standard_descriptors)
    assert stdin == "/dev/null"
    assert stdout.startswith("pipe:")
    assert stdout == stderr
    await pool.run_sync(jobs.write_to_descriptor_1, "still to 1")
    await pool.run_sync(jobs.write_to_descriptor_2, "still to 2")
    await pool.run_sync(jobs.write_from_subprocess, "still from a program")
    assert await pool.run_sync(jobs.stdin_of_subprocess) == b""
    await logged(caplog, "still to 1", "still to 2", "still from a program")
    assert pool.statistics().starts == 1


# what an idle worker is


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is known of an idle worker of a small program."""
    directory = tmp_path_factory.mktemp("idle")
    program = directory / "program.py"
    program.write_text(IDLE)
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    finished = jobs.run_program(
        [sys.executable, "-S", program], cwd=directory, env={"PYTHONPATH": os.pathsep.join([jobs.ROOT, *packages])}
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def test_idle_worker_imports_the_core_only(idle: dict[str, Any]) -> None:
    """Point 1: neither trio nor anything of weight, but for the few modules of ours that serve."""
    modules = set(idle["modules"])
    assert not modules & HEAVY
    assert "trio_workers.child._functions" in modules
    ours = {name for name in modules if name.startswith("trio_workers.")}
    assert {name for name in ours if not name.startswith("trio_workers.child")} <= {
        "trio_workers.child",
        "trio_workers._arena",
        "trio_workers._calls",
        "trio_workers._goridge",
        "trio_workers._region",
    }


def test_idle_worker_has_no_main_module(idle: dict[str, Any]) -> None:
    """Point 2: the application's main module is not run, under whatever name."""
    assert "application" not in idle["names"]
    assert "program" not in idle["modules"]


def test_idle_worker_takes_little_memory(idle: dict[str, Any]) -> None:
    """Point 1: an idle worker holds under 14 MB."""
    assert idle["memory"] < MOST_MEMORY


def test_idle_worker_has_one_thread(idle: dict[str, Any]) -> None:
    """Point 1: the kernel is the life line, so there is no thread for it."""
    assert idle["threads"] == 1


async def test_worker_here_imports_neither_trio_nor_main() -> None:
    """Point 1: in this very process, with all that it has imported, as well."""
    async with open_python_pool(1) as pool:
        modules = set(await pool.run_sync(eval, "list(__import__('sys').modules)"))
        assert not modules & {"trio", "attr", "attrs", "outcome", "numpy", "pytest", "_pytest", "tests"}
        assert await pool.run_sync(jobs.look_at, "len(os.listdir('/proc/self/task'))") == 1


async def test_trio_is_imported_when_a_job_needs_it() -> None:
    """Point 1: never trio, unless the job does."""
    async with open_python_pool(1) as pool:
        assert not await pool.run_sync(jobs.look_at, "'trio' in sys.modules")
        assert await pool.run_sync(jobs.file_of_module, "trio") == trio.__file__
        assert await pool.run_sync(trio.run, trio.sleep, 0) is None


# descriptors


async def test_relay_is_a_private_descriptor() -> None:
    """Point 1: the relay is one stream, and a socket for packets; none is 0, 1 or 2, and each is closed on exec."""
    async with open_python_pool(1) as pool:
        directory = Path(f"/proc/{pool.workers[0].pid}")
        links = {int(entry.name): os.readlink(entry) for entry in (directory / "fd").iterdir()}
        sockets = [number for number, link in links.items() if link.startswith("socket:")]
        assert len(sockets) == (2 if _platform.HERE.has_packets() else 1)
        assert min(sockets) > 2
        for number in links.keys() - {0, 1, 2}:
            flags = next(
                int(line.split()[1], 8)
                for line in (directory / "fdinfo" / str(number)).read_text().splitlines()
                if line.startswith("flags:")
            )
            # The life line is inherited: what a job starts dies with the pool, too.
            assert flags & os.O_CLOEXEC or links[number].startswith("pipe:"), links[number]
            if number in sockets:
                assert flags & os.O_CLOEXEC


async def test_program_of_a_job_inherits_no_relay() -> None:
    """Point 1: a program that a job starts has the standard streams, and neither the relay nor another log."""
    async with open_python_pool(1) as pool:
        found = await pool.run_sync(jobs.descriptors_of_program)
        assert found[0] == "/dev/null"
        assert not [link for link in found.values() if link.startswith("socket:")]
        log = found[2]
        assert [number for number, link in found.items() if link == log] == [2]


async def test_stdin_is_dev_null() -> None:
    """Point 1: a job that reads stdin finds its end, and so does a program it starts."""
    async with open_python_pool(1) as pool:
        assert await pool.run_sync(jobs.read_stdin) == ("", b"", os.devnull)
        assert await pool.run_sync(jobs.stdin_of_subprocess) == b""


async def test_input_finds_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: `input()` is an EOFError, at once, and its prompt is in the log."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        for _ in range(2):
            with pytest.raises(EOFError):
                await pool.run_sync(jobs.ask)
        assert await pool.run_sync(os.getpid) == pid
    assert [line for line in log_lines(caplog) if "a prompt" in line]


# what is printed


async def test_what_jobs_print_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: all ways to print lead to the log, by the end of the job, and none to the relay."""
    async with open_python_pool(1, env=BUFFERED) as pool:
        for writer in jobs.WRITERS:
            assert await pool.run_sync(writer, f"by {writer.__name__}") is None
            await logged(caplog, f"by {writer.__name__}")
        assert pool.statistics().starts == 1
    assert len(log_lines(caplog)) == len(jobs.WRITERS)
    assert {record.levelno for record in caplog.records} <= {logging.WARNING, logging.DEBUG}


async def test_pieces_of_a_line_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: what has no newline yet waits for it, from one job to the next."""
    async with open_python_pool(1, env=BUFFERED) as pool:
        await pool.run_sync(jobs.print_in_pieces, "one ", "two ")
        await pool.run_sync(jobs.print_in_pieces, "three\n", "four")
        await logged(caplog, "one two three")
    assert log_lines(caplog) == ["one two three", "four"]


async def test_what_no_encoding_holds_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: a lone surrogate, as in a file's name, is no error of the job that prints it."""
    async with open_python_pool(1, env={"PYTHONIOENCODING": "ascii"}) as pool:
        await pool.run_sync(jobs.print_to_stdout, "surrogate \udcff, umlaut \xe4")
        await pool.run_sync(jobs.print_to_stderr, "to stderr \udcff")
        await logged(caplog, r"surrogate \udcff, umlaut \xe4", r"to stderr \udcff")


async def test_flood_is_drained() -> None:
    """Point 1: more output than a pipe holds, in one job, does not stop it."""
    async with open_python_pool(1) as pool:
        await pool.run_sync(jobs.print_in_pieces, *(f"{'x' * 1000}\n" for _ in range(1000)))
        await pool.run_sync(jobs.write_to_descriptor_1, "x" * 1_000_000)


async def test_message_printed_is_no_message() -> None:
    """Point 1: bytes of the relay's own dialect, written to 1 and 2, reach no caller."""
    from trio_workers._calls import RESULT, encode

    forged = b"".join(encode(RESULT, 1, b"\x80\x05K\x01."))
    async with open_python_pool(1) as pool:
        for number in (1, 2):
            assert await pool.run_sync(os.write, number, forged) == len(forged)
        assert await pool.run_sync(jobs.square, 5) == 25
        assert pool.statistics().starts == 1


# what jobs do to the standard streams


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
async def test_closed_descriptors_are_opened_again(numbers: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: `os.close` of a standard stream harms no later job."""
    async with open_python_pool(1) as pool:
        pid = await pool.run_sync(jobs.close_descriptors, *numbers)
        await still_serves(pool, caplog, pid)
        await pool.run_sync(jobs.print_to_stdout, "print to stdout")
        await pool.run_sync(jobs.print_to_stderr, "print to stderr")
        assert (await pool.run_sync(jobs.read_stdin))[2] == os.devnull
        await logged(caplog, "print to stdout", "print to stderr")


async def test_file_of_a_later_job_is_no_standard_stream(tmp_path: Path) -> None:
    """Point 1: a file opened by the next job does not take a closed stream's place."""
    async with open_python_pool(1) as pool:
        for number in (0, 1, 2):
            # In the job that closed it the number is free, that can't be helped.
            assert await pool.run_sync(jobs.close_and_open_file, number, str(tmp_path / "own")) == number
            assert await pool.run_sync(jobs.open_file, str(tmp_path / "later")) > 2


@pytest.mark.parametrize("job", [jobs.close_streams, jobs.lose_streams], ids=lambda job: job.__name__)
async def test_streams_closed_or_lost_cost_no_worker(job: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: `sys.stdout.close()` and `sys.stdout = None` leave a worker that serves, with its descriptors."""
    async with open_python_pool(1) as pool:
        await still_serves(pool, caplog, await pool.run_sync(job))
        with pytest.raises(ZeroDivisionError):
            await pool.run_sync(divmod, 1, 0)


@pytest.mark.faults
@pytest.mark.parametrize("first", [0, 3])
async def test_job_that_closes_all_descriptors(first: int) -> None:
    """Point 1: it takes the relay with it; it costs its own caller an error, and nobody else anything."""
    async with open_python_pool(1) as pool:
        pid = pool.workers[0].pid
        with pytest.raises(WorkerCrashed) as caught:
            await pool.run_sync(jobs.close_all_from, first)
        assert caught.value.pid == pid
        assert "close_all_from" in str(caught.value)
        assert await pool.run_sync(os.getpid) != pid


async def test_stream_that_closes_descriptors_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: likewise between the parts of a stream."""
    async with open_python_pool(1) as pool:
        async with pool.stream(map, jobs.close_descriptors, [0, 1, 2]) as parts:
            pids = [pid async for pid in parts]
        assert len(pids) == 3
        await still_serves(pool, caplog, pids[0])


# a parent without standard streams

DAEMON: Final = """
import os, sys
import trio
from tests import python_child_jobs as jobs
from trio_workers import open_python_pool

async def main():
    async with open_python_pool(1) as pool:
        for writer in jobs.WRITERS:
            await pool.run_sync(writer, "text")
        assert (await pool.run_sync(jobs.read_stdin))[0] == ""
        links = await pool.run_sync(jobs.standard_descriptors)
        await pool.run_sync(jobs.close_descriptors, 0, 1, 2)
        assert await pool.run_sync(jobs.standard_descriptors) == links
        assert pool.statistics().starts == 1
    with open(sys.argv[1], "w") as file:
        file.write(" ".join(links))

if __name__ == "__main__":
    trio.run(main)
"""


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_parent_without_standard_streams(closed: str, tmp_path: Path) -> None:
    """Point 1: where a parent has closed its own, workers have all three of theirs, and the relay is none of them."""
    program, outcome = tmp_path / "program.py", tmp_path / "outcome"
    program.write_text(DAEMON)
    finished = jobs.run_program(
        ["sh", "-c", f'exec {closed}; exec "$@"', "sh", sys.executable, program, outcome], cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    stdin, stdout, stderr = outcome.read_text().split()
    assert stdin == os.devnull
    assert stdout.startswith("pipe:")
    assert stdout == stderr


KILLED: Final = """
import os, signal, sys
import trio
from trio_workers import open_python_pool

async def main():
    async with open_python_pool(2) as pool:
        with open(sys.argv[1], "w") as file:
            file.write(" ".join(str(worker.pid) for worker in pool.workers))
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    trio.run(main)
"""


@pytest.mark.faults
@pytest.mark.parametrize("closed", ["", "0<&- 1>&- 2>&-"])
def test_workers_end_with_a_killed_parent(closed: str, tmp_path: Path) -> None:
    """Point 1: the life line holds without a thread of its own, and without standard streams."""
    program, notes = tmp_path / "program.py", tmp_path / "notes"
    program.write_text(KILLED)
    # That nothing is left is for run_program to look.
    finished = jobs.run_program(
        ["sh", "-c", f'exec {closed}; exec "$@"', "sh", sys.executable, program, notes], cwd=tmp_path
    )
    assert finished.returncode == -9
    assert len(notes.read_text().split()) == 2
