"""What readers and new users of Python pools stumbled over, each with the case that showed it."""

import json
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests import python_pool_jobs as jobs
from trio_workers import RemoteTraceback, SpawnError, WorkerCrashed, open_python_pool

ROOT: Final = Path(__file__).parent.parent

MAIN: Final = """
import trio
from trio_workers import open_python_pool

def {name}(value):
    return "of the program", value

async def run():
    async with open_python_pool(1) as pool:
        print(await pool.run_sync({name}, 1))

if __name__ == "__main__":
    trio.run(run)
"""


@pytest.mark.parametrize("name", ["main", "name", "sys", "connection"])
def test_jobs_named_like_something_of_ours(name: str, tmp_path: Path) -> None:
    """Point 2: the lines that start a worker have names, too, and pickle must not find those."""
    (tmp_path / "program.py").write_text(MAIN.format(name=name))
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("('of the program', 1)\n", "")


async def test_lease_that_ends_with_a_stream_left_early() -> None:
    """A stream that was left early costs no worker, also where nothing follows it in its lease."""
    async with open_python_pool(1) as pool:
        async with pool.lease() as worker:
            pid = worker.pid
            async with worker.stream(range, 100_000) as parts:
                async for _ in parts:
                    break
        async with pool.lease() as worker:
            assert worker.pid == pid
        assert pool.statistics().exits == {}


class NotFoundError(Exception):
    """Its `__init__` makes the text of what it is given, as many do; unpickled naively it does so twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no {name}")
        self.name = name


def raise_not_found() -> None:
    raise NotFoundError("door")


def raise_with_a_note() -> None:
    try:
        json.loads("{")
    except json.JSONDecodeError as error:
        error.add_note("of a note")
        raise


async def test_exception_whose_init_changes_its_arguments() -> None:
    """Point 4: it arrives with the text it had."""
    async with open_python_pool(1) as pool:
        with pytest.raises(NotFoundError) as caught:
            await pool.run_sync(raise_not_found)
        assert (str(caught.value), caught.value.args, caught.value.name) == (
            "there is no door",
            ("there is no door",),
            "door",
        )
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        with pytest.raises(json.JSONDecodeError) as noted:
            await pool.run_sync(raise_with_a_note)
        assert noted.value.__notes__ == ["of a note"]


async def test_failed_starts_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be told to a worker ends its start with a sentence; the fixture looks for what is left open."""
    monkeypatch.setattr(sys, "argv", [threading.Lock()])
    with pytest.raises(SpawnError, match=r"sys\.path or sys\.argv can't be sent to a worker: TypeError"):
        async with open_python_pool(1):
            pass


def fail_in_two_lines() -> None:
    raise SystemExit("line 1\nmissing licence file\n")


def leave() -> None:
    import os

    os._exit(4)


async def test_initializer_is_named_with_its_whole_error() -> None:
    """The first line of what it raised is not lost; one that ends the process is named as well."""
    with pytest.raises(SpawnError, match=r"its initializer raised SystemExit: line 1\nmissing licence file"):
        async with open_python_pool(1, initializer=fail_in_two_lines):
            pass
    with pytest.raises(SpawnError, match=r"exited with status 4 .*that was while it ran its initializer .*\.leave"):
        async with open_python_pool(1, initializer=leave):
            pass


async def test_every_source_of_a_map_is_closed() -> None:
    """Point 7: an error of one source's clean-up neither replaces the body's nor keeps the others open."""
    closed: list[str] = []

    def source(name: str, error: Exception | None) -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(name)
            if error is not None:
                raise error

    async with open_python_pool(1) as pool:
        with pytest.raises(KeyError, match="body"):
            async with pool.map(max, source("first", RuntimeError("close")), source("second", None)) as results:
                await anext(results)
                raise KeyError("body")
    assert closed == ["first", "second"]


def close_stdout() -> None:
    sys.stdout.close()


def say(text: str) -> None:
    print(text)


async def test_closed_stdout_object(caplog: pytest.LogCaptureFixture) -> None:
    """Point 1: `sys.stdout.close()` in a job does no harm to the next."""
    with caplog.at_level(logging.WARNING, "trio_workers.worker"):
        async with open_python_pool(1) as pool:
            await pool.run_sync(close_stdout)
            await pool.run_sync(say, "still here")
    assert [record for record in caplog.records if record.getMessage().endswith(": still here")]


async def test_call_from_another_run() -> None:
    """Point 9: a pool belongs to its own `trio.run`; a call from another is refused at once, and nothing is lost."""
    async with open_python_pool(1) as pool:

        def foreign() -> None:
            trio.run(pool.run_sync, len, "abc")

        with pytest.raises(RuntimeError, match=r"another thread; from this one use trio\.from_thread\.run"):
            await trio.to_thread.run_sync(foreign)

        def native() -> int:
            return trio.from_thread.run(pool.run_sync, len, "abc")

        assert await trio.to_thread.run_sync(native) == 3


class Service:
    """What holds a pool, as services do."""

    def __init__(self, pool: object) -> None:
        self.pool = pool

    def work(self) -> None:
        """Do nothing."""


async def test_pools_are_not_sent() -> None:
    """Point 5: an object that holds the pool can't be a job's, and the error says what is in the way."""
    async with open_python_pool(1) as pool:
        text = (
            r"the object of the method .*Service\.work, of type Service, can't be pickled: .*a PythonPool can't be sent"
        )
        with pytest.raises(pickle.PicklingError, match=text):
            await pool.run_sync(Service(pool).work)


async def test_blocks_that_are_not_entered() -> None:
    """Habits from elsewhere get a sentence that says what to write."""
    async with open_python_pool(1) as pool:
        block: Any = pool.map(abs, [1])
        for use in (aiter, iter, lambda block: block.__enter__()):
            with pytest.raises(TypeError, match=r"what map\(\) returns must be entered: async with"):
                use(block)
        with pytest.raises(TypeError, match="must be entered"):
            await block


async def test_calls_that_were_made_already() -> None:
    """`run_sync(fn())` for `run_sync(fn)`: the error says so, also for a coroutine, which is closed."""

    async def coroutine() -> None:
        pass

    async with open_python_pool(1) as pool:
        for value in (abs(-1), coroutine()):
            with pytest.raises(TypeError, match=r"run_sync takes a function, not \w+: .* without calling it"):
                await pool.run_sync(value)  # type: ignore[arg-type]


async def test_many_arguments() -> None:
    """Encoding is linear in the number of arguments."""
    async with open_python_pool(1) as pool:
        assert await pool.run_sync(count_arguments, *range(5_000), *[b"x"] * 5_000) == 10_000


def count_arguments(*values: object) -> int:
    return len(values)


async def test_what_a_dead_worker_left_is_nobody_elses(tmp_path: Path) -> None:
    """Promise 2: in a lease, parts of a stream that nobody took are no answer to the job that comes after its death."""
    go = tmp_path / "go"
    async with open_python_pool(1) as pool, pool.lease() as worker:
        (process,) = pool.workers
        async with worker.stream(jobs.count_and_crash, 5, 3, str(go)) as parts:
            assert await anext(parts) == 0
            go.touch()
            with pytest.raises(WorkerCrashed):
                await process.wait()
            with pytest.raises(WorkerCrashed, match=r"before the job 'builtins\.abs' came to it") as caught:
                await worker.run_sync(abs, -1)
            assert caught.value.started is False
