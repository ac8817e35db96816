"""Python pools beside each other and inside each other, in several threads, as a fixture, and at a terminal.

A terminal's Ctrl-C is a SIGINT to every process of the foreground group, whose traceback shows.
"""

# ruff: noqa: ASYNC240 - tests may block for a moment

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from tests import python_pool_jobs as jobs
from tests.test_faults import runs, until
from tests.test_parent import wait
from tests.test_python_pool import all_idle, check, lines, noted, open_pool
from trio_workers import PythonPool, RemoteTraceback, SpawnError, WorkerCrashed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

ROOT: Final = Path(__file__).parent.parent


# threads


def use_a_pool(numbers: list[int]) -> tuple[list[int], set[int]]:
    """Do in a thread, in a run of trio of its own, what one does with a pool; return results and the workers' pids."""

    async def main() -> tuple[list[int], set[int]]:
        async with open_pool(2) as pool:
            pids = {worker.pid for worker in pool.workers if worker.pid is not None}
            with pytest.raises(WorkerCrashed):
                await pool.run_sync(os._exit, 3)
            await until(lambda: all_idle(pool))
            pids |= {worker.pid for worker in pool.workers if worker.pid is not None}
            async with pool.map(jobs.square, numbers) as squares:
                results = [result async for result in squares]
            async with pool.stream(jobs.count, 3) as parts:
                results += [part async for part in parts]
            async with pool.lease() as worker:
                results.append(await worker.run_sync(jobs.square, 9))
            check(pool)
            return results, pids

    return trio.run(main)


async def test_threads() -> None:
    """Point 9: pools in several threads at once, each in a run of trio of its own, know nothing of each other."""
    found: dict[int, tuple[list[int], set[int]]] = {}
    together = threading.Barrier(4)

    def work(number: int) -> None:
        together.wait(30)
        found[number] = use_a_pool([number] * 20)

    async with open_pool() as ours, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(trio.to_thread.run_sync, work, number)
        for number in range(20):
            assert await ours.run_sync(jobs.square, number) == number**2
    assert [found[number][0] for number in range(4)] == [[number**2] * 20 + [0, 1, 2, 81] for number in range(4)]
    pids = [pid for number in range(4) for pid in found[number][1]]
    assert len(pids) == len(set(pids)) == 12


async def test_thread_that_fails() -> None:
    """Point 9: an error in one thread's pool ends that pool, and no other."""

    def fail() -> None:
        async def main() -> None:
            async with open_pool() as pool:
                pids.append(await pool.run_sync(os.getpid))
                raise KeyError("mine")

        trio.run(main)

    def open_badly() -> None:
        async def main() -> None:
            async with open_pool(initializer=jobs.fail, initargs=("text",)):
                raise AssertionError

        trio.run(main)

    pids: list[int] = []
    async with open_pool() as pool:
        for _ in range(3):
            with pytest.raises(KeyError, match="mine"):
                await trio.to_thread.run_sync(fail)
            with pytest.raises(SpawnError):
                await trio.to_thread.run_sync(open_badly)
            assert await pool.run_sync(jobs.square, 3) == 9
    assert not any(map(runs, pids))


async def test_calls_from_another_thread() -> None:
    """Point 9: a thread of the application calls a pool through `trio.from_thread`."""

    def call(number: int) -> int:
        return trio.from_thread.run(pool.run_sync, jobs.square, number)

    async with open_pool(2) as pool:
        results: list[int] = []

        async def run(number: int) -> None:
            results.append(await trio.to_thread.run_sync(call, number))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(run, number)
        assert sorted(results) == [number**2 for number in range(10)]


async def test_worker_outlives_the_thread_that_started_it() -> None:
    """Point 9: workers belong to the process: that the thread which spawned one ends is nothing to them."""

    def open_in_thread(started: threading.Event, done: threading.Event) -> None:
        async def main() -> None:
            async with open_pool() as pool:
                pids.append(await pool.run_sync(os.getpid))
                started.set()
                await trio.to_thread.run_sync(done.wait)
                pids.append(await pool.run_sync(os.getpid))

        trio.run(main)

    pids: list[int] = []
    started, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=open_in_thread, args=(started, done))
    thread.start()
    assert started.wait(30)
    other = threading.Thread(target=lambda: None)
    other.start()
    other.join()
    done.set()
    thread.join()
    assert len(pids) == 2
    assert len(set(pids)) == 1


# beside and inside each other


async def test_two_pools() -> None:
    """Point 9: two pools in one run of trio have workers, statistics and an end of their own."""
    async with open_pool(name="one") as one:
        async with open_pool(2, name="two") as two:
            async with one.map(jobs.square, range(10)) as firsts, two.map(jobs.square, range(10)) as seconds:
                pairs = [(await anext(firsts), await anext(seconds)) for _ in range(10)]
            assert pairs == [(number**2, number**2) for number in range(10)]
            assert not {worker.pid for worker in one.workers} & {worker.pid for worker in two.workers}
            with pytest.raises(WorkerCrashed):
                await two.run_sync(os._exit, 3)
            assert two.statistics().exits == {"crashed": 1}
            assert one.statistics().exits == {}
            assert one.statistics().jobs == {"replied": 10}
        assert await one.run_sync(jobs.square, 3) == 9
        with pytest.raises(trio.ClosedResourceError, match="'two'"):
            await two.run_sync(jobs.square, 3)
        check(one)


async def test_call_of_one_pool_in_a_map_of_another() -> None:
    """Point 9: what one pool's map takes from may come from another pool."""
    async with open_pool() as one, open_pool() as two:
        async with one.map(jobs.square, range(10)) as squares, two.map(jobs.square, squares) as results:
            assert [result async for result in results] == [number**4 for number in range(10)]
        async with one.stream(jobs.count, 10) as parts, two.map(jobs.square, parts) as results:
            assert [result async for result in results] == [number**2 for number in range(10)]


async def test_nested_pool() -> None:
    """Point 9: a job may open a pool of its own."""
    async with open_pool(2) as pool:
        results: list[list[int]] = []

        async def call(number: int) -> None:
            results.append(await pool.run_sync(jobs.nested, [number, number + 1]))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(call, number)
        assert sorted(results) == [[0, 1], [1, 4], [4, 9]]
        assert pool.statistics().exits == {}


async def test_nested_crash() -> None:
    """Point 9: an error of an inner pool that the job does not handle arrives with all it has to tell."""
    async with open_pool() as pool:
        with pytest.raises(WorkerCrashed, match=r"exited with status 5 while .*say_and_exit") as caught:
            await pool.run_sync(jobs.nested_crash, 5)
        error = caught.value
        assert (error.returncode, error.phase, error.started, error.slot) == (5, "running", True, 0)
        assert error.pid not in {None, pool.workers[0].pid}
        assert error.stderr == "inner words"
        assert any("inner words" in line for line in error.__notes__)
        assert isinstance(error.__cause__, RemoteTraceback)
        assert pool.statistics().exits == {}
        assert pool.statistics().jobs == {"failed": 1}


async def test_nested_pool_is_killed_with_its_pool(note: Path) -> None:
    """Point 9: leaving the outer pool by an error takes the inner ones along."""

    async def call() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await pool.run_sync(jobs.nested_pids, str(note), 1)

    async with trio.open_nursery() as nursery:
        with pytest.raises(KeyError, match="mine"):
            async with open_pool() as pool:
                nursery.start_soon(call)
                await noted(Path(f"{note}.deepest"))
                raise KeyError("mine")
    pids = [int(line) for line in lines(note)]
    assert len(pids) == 2
    await until(lambda: not any(map(runs, pids)))


# as a fixture


@pytest.fixture
async def pool() -> AsyncIterator[PythonPool]:
    async with open_pool(2) as pool:
        yield pool


async def test_fixture(pool: PythonPool, nursery: trio.Nursery) -> None:
    """Point 9: an async fixture of pytest-trio may be a pool."""
    assert await pool.run_sync(jobs.square, 3) == 9
    nursery.start_soon(pool.run_sync, jobs.square, 4)
    async with pool.map(jobs.square, range(10)) as results:
        assert [result async for result in results] == [number**2 for number in range(10)]


async def test_fixture_and_crash(pool: PythonPool) -> None:
    """Point 9: a crash in a test is no crash of its fixture."""
    with pytest.raises(WorkerCrashed):
        await pool.run_sync(os._exit, 3)
    assert await pool.run_sync(jobs.square, 3) == 9


async def test_fixture_and_job_that_still_runs(pool: PythonPool, nursery: trio.Nursery, note: Path) -> None:
    """Point 9: a job in pytest-trio's nursery is cancelled when the test is over; the pool ends well."""
    nursery.start_soon(pool.run_sync, jobs.hang, str(note))
    await noted(note)


def test_fixture_in_a_run_of_its_own(tmp_path: Path) -> None:
    """Point 9: tests that pass, fail or leave a job behind are reported as that, and the fixture leaves nothing."""
    note = tmp_path / "note"
    (tmp_path / "test_pool.py").write_text(
        textwrap.dedent(f"""
            import os

            import pytest
            from tests import python_pool_jobs as jobs
            from trio_workers import open_python_pool

            @pytest.fixture
            async def pool():
                async with open_python_pool(2) as pool:
                    for worker in pool.workers:
                        jobs.note({str(note)!r}, worker.pid)
                    yield pool

            async def test_passes(pool):
                assert await pool.run_sync(jobs.square, 3) == 9

            async def test_fails(pool):
                assert await pool.run_sync(jobs.square, 3) == 10

            async def test_raises(pool):
                await pool.run_sync(jobs.fail, "the job's error")

            async def test_leaves(pool, nursery):
                nursery.start_soon(pool.run_sync, jobs.hang, {str(note)!r})
        """),
        encoding="utf-8",
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\nfilterwarnings = error\n", encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 failed, 2 passed" in process.stdout, process.stdout
    assert "ValueError: the job's error" in process.stdout
    assert "assert 9 == 10" in process.stdout
    pids = [int(line) for line in lines(note)]
    assert len(pids) >= 8
    wait(lambda: not any(map(runs, pids)))


# Ctrl-C

PROGRAM: Final = """\
import fcntl, logging, os, signal, sys, termios
import trio
from tests import python_pool_jobs as jobs
from trio_workers import *

async def main(note, go, children):
{}

if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on it is ours: what is typed reaches our process group
    logging.basicConfig(format="logged: %(message)s")
    trio.run(main, *sys.argv[1:])
"""


class Terminal:
    """A program in the foreground of a terminal of its own."""

    def __init__(self, directory: Path, source: str) -> None:
        self.note, self.go, self.children = directory / "note", directory / "go", directory / "children"
        file = directory / "program.py"
        file.write_text(PROGRAM.format(textwrap.indent(textwrap.dedent(source), "    ")), encoding="utf-8")
        self._master, slave = os.openpty()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", str(file), str(self.note), str(self.go), str(self.children)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON_COLORS": "0"},
                start_new_session=True,
                stdin=slave,
                stdout=slave,
                stderr=slave,
            )
        finally:
            os.close(slave)
        self._read = b""

    def wait_for_notes(self, count: int = 1) -> list[int]:
        """Wait until jobs have noted so many pids, and return them."""
        wait(lambda: len(lines(self.note)) >= count or self.process.poll() is not None)
        assert self.process.poll() is None, self.read_all()
        return self.pids

    @property
    def pids(self) -> list[int]:
        return [int(line) for file in (self.note, self.children) for line in lines(file) if line.isdecimal()]

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def read_all(self) -> str:
        """Return what the program has written, when all who could have are gone."""
        while self._master >= 0:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                data = b""
            self._read += data
            if not data:
                self.close()
        return self._read.decode().replace("\r\n", "\n")

    def close(self) -> None:
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[str], Terminal]]:
    """Start a program in a terminal; at the end of the test nothing of it is left, or the test fails."""
    terminals: list[Terminal] = []

    def start(source: str) -> Terminal:
        terminals.append(Terminal(tmp_path, source))
        return terminals[-1]

    yield start
    for one in terminals:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        one.close()
        wait(lambda one=one: not any(map(runs, one.pids)))


@pytest.mark.faults
@pytest.mark.parametrize("job", ["hang", "spin_in_c", "hang_with_child"])
def test_ctrl_c(job: str, terminal: Callable[[str], Terminal]) -> None:
    """Point 8: Ctrl-C at a terminal is the parent's KeyboardInterrupt, one traceback, and the end of all."""
    more = ", children" if job == "hang_with_child" else ""
    program = terminal(f"""
        async with open_python_pool(2) as pool:
            await pool.run_sync(jobs.{job}, note{more})
        """)
    pids = program.wait_for_notes()
    program.press_ctrl_c()
    shown = program.read_all()
    assert program.process.wait(30) == -signal.SIGINT
    assert shown.count("Traceback (most recent call last)") == 1, shown
    assert shown.rstrip().endswith("KeyboardInterrupt")
    assert "logged:" not in shown
    assert "_functions.py" not in shown
    wait(lambda: not any(map(runs, pids)))


@pytest.mark.faults
def test_ctrl_c_again_and_again(terminal: Callable[[str], Terminal]) -> None:
    """Point 8: however often it is pressed while jobs come and go, no worker says a word, and nothing is left."""
    program = terminal("""
        async def call(pool):
            while True:
                await pool.run_sync(jobs.square, 3)

        async with open_python_pool(2) as pool:
            for worker in pool.workers:
                jobs.note(note, worker.pid)
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(call, pool)
                # By a task, for trio's own nursery is misnested where it is hit while its block is left.
                nursery.start_soon(pool.run_sync, jobs.note_pid, note)
        """)
    program.wait_for_notes(3)
    for _ in range(3):
        program.press_ctrl_c()
    shown = program.read_all()
    assert program.process.wait(30) != 0
    assert "logged:" not in shown
    assert "child/_functions.py" not in shown
    assert "KeyboardInterrupt" in shown


@pytest.mark.faults
def test_ctrl_c_that_the_program_handles(terminal: Callable[[str], Terminal]) -> None:
    """Point 8: a program that handles SIGINT itself keeps its jobs, and the programs that these have started."""
    program = terminal("""
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async with open_python_pool(2) as pool, trio.open_nursery() as nursery:
                async def call():
                    print("status", await pool.run_sync(jobs.stay_with_child, note, go, children))

                nursery.start_soon(call)
                async for _ in signals:
                    print("heard")
                    break
                print("another", await pool.run_sync(jobs.square, 3))
                open(go, "w").close()
        """)
    program.wait_for_notes()
    wait(lambda: lines(program.children))
    program.press_ctrl_c()
    shown = program.read_all()
    assert program.process.wait(30) == 0, shown
    assert shown.replace("^C", "").split("\n")[:-1] == ["heard", "another 9", "status 0"]


async def test_interrupt_sent_to_a_worker(note: Path) -> None:
    """Point 8: a SIGINT that reaches a worker itself ends neither its job nor its sleep, nor the worker."""
    async with open_pool() as pool:
        (worker,) = pool.workers
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run_sync, jobs.stay, str(note), f"{note}.go")
            await noted(note)
            for _ in range(10):
                os.kill(worker.pid, signal.SIGINT)
                await trio.lowlevel.checkpoint()
            Path(f"{note}.go").touch()
        async with pool.stream(jobs.count, 100) as parts:
            os.kill(worker.pid, signal.SIGINT)
            assert [part async for part in parts] == list(range(100))
        assert await pool.run_sync(os.getpid) == worker.pid
        # A program that a job starts hears it as any program does.
        assert await pool.run_sync(jobs.child_hears_interrupt) == -signal.SIGINT
