"""Reset on change: `trio_workers.reload`."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.conftest import descriptors
from tests.support import ROOT, until
from trio_workers import Config, Payload, Pool, open_pool, open_python_pool
from trio_workers.reload import reset_on_change
from trio_workers.testing import MemoryFactory


@pytest.fixture(autouse=True)
def watchers_end() -> Iterator[None]:
    """A watcher that is closed ends its thread, and its descriptors, a moment later: wait for that."""
    before = len(descriptors())
    yield
    for _ in range(3000):
        if len(descriptors()) <= before:
            break
        time.sleep(0.01)


def write(program: Path, says: str) -> None:
    """Write a worker program where it is."""
    program.write_text(f"from trio_workers.child import serve\nserve(lambda job: b'{says}')\n")


def put(program: Path, says: str) -> None:
    """Replace a worker program as editors do it: a new file takes its place."""
    new = program.with_suffix(".swp")
    write(new, says)
    new.replace(program)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A worker program that says "one", in a directory of its own."""
    directory = tmp_path / "app"
    directory.mkdir()
    path = directory / "worker.py"
    put(path, "one")
    return path


def config(program: Path) -> Config:
    return Config(command=[sys.executable, "-S", str(program)], num_workers=1, env={"PYTHONPATH": str(ROOT)})


async def until_it_says(pool: Pool, text: bytes) -> None:
    with trio.fail_after(30):
        while (await pool.exec(Payload())).body != text:  # noqa: ASYNC110 - no event tells of it
            await trio.sleep(0.005)


@pytest.mark.parametrize("what", ["file", "directory", "both", "relative"])
async def test_a_change_resets(program: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker program that is replaced, or written anew, serves soon after, whatever was named to be watched."""
    paths = {
        "file": [program],
        "directory": [program.parent],
        "both": [program, program.parent],
        "relative": [Path("worker.py")],
    }
    monkeypatch.chdir(program.parent)
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, *paths[what])
        await until_it_says(pool, b"one")
        put(program, "two")
        await until_it_says(pool, b"two")
        write(program, "three")
        await until_it_says(pool, b"three")
        put(program, "four")
        await until_it_says(pool, b"four")
        nursery.cancel_scope.cancel()


async def test_deep_in_a_directory(program: Path) -> None:
    """A file that is new, in a directory that is new, counts."""
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, str(program.parent))
        starts = pool.statistics().starts
        (program.parent / "lib").mkdir()
        await until(lambda: pool.statistics().starts > starts)
        nursery.cancel_scope.cancel()


async def test_a_failed_reset(program: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A program that doesn't start is told of, and the workers that were there go on; the next change is a new try."""
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, program)
        with caplog.at_level(logging.INFO, "trio_workers.reload"):
            program.with_suffix(".swp").write_text("raise SystemExit('a mistake')")
            program.with_suffix(".swp").replace(program)
            await until(lambda: "the workers that were there go on" in caplog.text)
            await until_it_says(pool, b"one")
            put(program, "two")
            await until_it_says(pool, b"two")
            await until(lambda: "all workers are new" in caplog.text)
        nursery.cancel_scope.cancel()


async def test_what_tools_leave(program: Path) -> None:
    """Neither caches nor other files of the directory of a file count; the next real change does."""
    cache = program.parent / "__pycache__"
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, program.parent)
        cache.mkdir()
        (cache / "worker.pyc").write_bytes(b"x")
        put(program, "two")
        await until_it_says(pool, b"two")
        nursery.cancel_scope.cancel()
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, program)
        starts = pool.statistics().starts
        (program.parent / "other.py").write_text("x")
        await trio.sleep(0.3)  # what does not happen has no event
        assert pool.statistics().starts == starts
        nursery.cancel_scope.cancel()


async def test_in_a_directory_that_tools_leave(tmp_path: Path) -> None:
    """Only what is below the watched directory is looked at: it may itself lie in a `site-packages`."""
    directory = tmp_path / "site-packages" / "app"
    directory.mkdir(parents=True)
    program = directory / "worker.py"
    put(program, "one")
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, directory)
        put(program, "two")
        await until_it_says(pool, b"two")
        nursery.cancel_scope.cancel()


async def test_by_looking(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system tells of no changes, as on some mounts, files are looked at instead."""
    monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "1")
    async with open_pool(config(program)) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, program.parent)
        put(program, "two")
        os.utime(program, (2e9, 2e9))  # it looks whether that is later, in whole seconds
        await until_it_says(pool, b"two")
        nursery.cancel_scope.cancel()


async def test_python_pools(tmp_path: Path) -> None:
    """A pool of Python functions is reset likewise."""
    (tmp_path / "a").touch()
    async with open_python_pool(1) as pool, trio.open_nursery() as nursery:
        await nursery.start(reset_on_change, pool, tmp_path)
        first = await pool.run_sync(os.getpid)
        (tmp_path / "a").write_text("x")
        with trio.fail_after(30):
            while await pool.run_sync(os.getpid) == first:  # noqa: ASYNC110 - no event tells of it
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


async def test_a_closed_pool(tmp_path: Path) -> None:
    """Once the pool is closed, the task ends at the next change."""
    async with trio.open_nursery() as nursery:
        async with open_pool(Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))) as pool:
            await nursery.start(reset_on_change, pool, tmp_path)
        (tmp_path / "a").touch()


async def answer(job: object) -> bytes:
    return b""


async def test_misuse(tmp_path: Path) -> None:
    """What can't be watched, or reset, is named."""
    async with open_pool(Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))) as pool:
        with pytest.raises(TypeError, match="pool must be a Pool or a PythonPool, not str"):
            await reset_on_change("pool", tmp_path)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="needs at least one path"):
            await reset_on_change(pool)
        with pytest.raises(FileNotFoundError, match="nowhere can't be watched: there is no such file or directory"):
            await reset_on_change(pool, tmp_path / "nowhere")


async def test_without_watchfiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that it comes with is named."""
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    monkeypatch.setitem(sys.modules, "watchfiles._rust_notify", None)
    async with open_pool(Config(command=["none"], num_workers=1, factory=MemoryFactory(answer))) as pool:
        for path in (tmp_path, tmp_path / "file"):
            (tmp_path / "file").touch()
            with pytest.raises(ModuleNotFoundError, match=r"which comes with: pip install 'trio_workers\[cli\]'$"):
                await reset_on_change(pool, path)
