"""`top` in a terminal: rows, a kill seen, keys, sizes, and a terminal that is given back whatever happens."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.served_pool import answer, serving
from tests.support import ROOT, release, until
from tests.tmux import Terminal, open_terminal
from trio_workers import Config, Payload, Pool, open_pool
from trio_workers.cli._keys import KeyReader
from trio_workers.control import serve_control
from trio_workers.testing import BadBoot, MemoryFactory

pytestmark = pytest.mark.limit(240)

KEYS = "q quit · r reset · + - resize · ? help"


@contextlib.asynccontextmanager
async def served(config: Config, path: Path) -> AsyncIterator[Pool]:
    """A pool with a control socket."""
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, pool, path=path))
        yield pool
        nursery.cancel_scope.cancel()


def memory_pool(**more: Any) -> Config:
    """A pool whose workers are tasks."""
    return Config(**{"command": ["none"], "num_workers": 2, "factory": MemoryFactory(answer), "name": "mill", **more})


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    """Where the pool is reached."""
    return tmp_path / "mill.sock"


@contextlib.asynccontextmanager
async def top(socket: Path, columns: int = 120, rows: int = 24, *, seen: str = KEYS) -> AsyncIterator[Terminal]:
    """A shell that runs `top`, and says with which code it ended. The block begins when it has drawn."""
    environment = {"PYTHONPATH": str(ROOT)}
    async with open_terminal(columns, rows, environment) as terminal:
        # Its pid is that of the shell in between.
        await terminal.type(
            f"sh -c 'echo $$ >{socket}.pid; "
            f"exec {sys.executable} -m trio_workers top --interval 0.2 --socket {socket}'; echo it ended with $?"
        )
        await terminal.shows(seen)
        yield terminal


def pid_of_top(socket: Path) -> int:
    """Who draws."""
    return int(Path(f"{socket}.pid").read_text())


def row(lines: list[str], slot: int) -> list[str]:
    """The words of a worker's row, none where there is none."""
    found = [line.split() for line in lines if re.match(rf" *{slot} +\d", line)]
    return found[0] if found else []


async def is_as_before(terminal: Terminal, code: int) -> list[str]:
    """Wait for the end, and see that the terminal is as a shell wants it."""
    lines = await terminal.shows(f"it ended with {code}")
    assert await terminal.flag("alternate_on") == "0"
    assert await terminal.flag("cursor_flag") == "1"
    assert await terminal.flag("wrap_flag") == "1"
    assert not any("slot" in line for line in lines)
    await terminal.type("clear; stty -a")
    modes = " ".join(await terminal.shows("icanon"))
    for mode in ("icanon", "echo", "isig", "ixon"):
        assert mode in modes.split()
    return lines


# keys, without a terminal


@pytest.mark.parametrize("size", [1, 2, 100])
def test_keys(size: int) -> None:
    """Letters as they are, arrows and pages by name, all else left out; in whatever pieces they come."""
    typed = b"q+?\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[1;5C\x1b[15~r\xc3\xa4\x00\x1b[H\x1bOF\x1bq\x1b\x1b[A-"
    reader = KeyReader()
    keys: list[str] = []
    for start in range(0, len(typed), size):
        keys += reader.receive(typed[start : start + size])
    assert keys == ["q", "+", "?", "up", "down", "page up", "page down", "r", "home", "end", "q", "up", "-"]


def test_a_sequence_without_end() -> None:
    """What begins like a key and never ends doesn't keep the keys that follow."""
    reader = KeyReader()
    assert reader.receive(b"\x1b[" + b"1;" * 100) == [*"[", *("1;" * 100)]
    assert reader.receive(b"q") == ["q"]


# in a terminal


async def test_rows_and_a_kill(socket: Path) -> None:
    """A row for each worker, with the job it is on; one that is killed is seen, with its successor and its death."""
    async with served(release("one", name="mill"), socket) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.exec, Payload(b"sleep 1000"), label="a long \x1b[31m[red] nap"))
        await until(lambda: pool.statistics().busy == 1)
        async with top(socket, 200) as terminal:
            # A screen is looked at while it is drawn, from the top: so wait for what is drawn last.
            lines = await terminal.until(
                lambda lines: any(r"a long \x1b[31m[red] nap" in line for line in lines) and row(lines, 1)
            )
            assert lines[0].startswith("mill · 2 workers: 1 busy, 1 idle · pid ")
            assert "slot" in lines[4]
            (idle,) = (worker for worker in pool.workers if worker.status == "idle")
            for worker in pool.workers:
                assert row(lines, worker.slot)[1:3] == [str(worker.pid), worker.status]
            assert idle.pid is not None
            os.kill(idle.pid, signal.SIGKILL)
            # On a loaded machine the end of its relay can be all that is known of it in time.
            told = r" 1 +\w[\w ]* [\dms.]+ ago: (was killed by SIGKILL|closed its relay)"
            lines = await terminal.until(
                lambda lines: (
                    (new := row(lines, idle.slot))
                    and new[1] != str(idle.pid)
                    and new[2] == "idle"
                    and any(re.search(told, line) for line in lines if line.lstrip().startswith(f"{idle.slot} "))
                )
            )
            assert "exits: " in lines[2]
            assert lines[2] != "exits: none"
            await terminal.keys("q")
            await is_as_before(terminal, 0)
        nursery.cancel_scope.cancel()


async def test_keys_turn_the_pool(socket: Path) -> None:
    """One more by +, one fewer by -, never none; fresh ones by r; what was done is said."""
    async with served(memory_pool(), socket) as pool, top(socket) as terminal:
        await terminal.keys("+")
        await terminal.shows("resize to 3: done in ")
        assert pool.statistics().target == 3
        await terminal.until(lambda lines: row(lines, 2))
        await terminal.keys("-", "-")
        await terminal.until(lambda lines: not row(lines, 2) and not row(lines, 1))
        await until(lambda: pool.statistics().target == 1)
        await terminal.until(lambda lines: "1 worker: 1 idle" in lines[0])
        await terminal.keys("-")
        await terminal.shows("a pool has at least one worker")
        pid = pool.workers[0].pid
        await terminal.keys("r")
        await terminal.shows("reset: done in ")
        await terminal.until(lambda lines: (new := row(lines, 0)) and new[1] != str(pid))
        await terminal.shows(KEYS)  # the word about it goes
        await terminal.keys("?")
        await terminal.shows("replace every worker by a fresh one")
        await terminal.keys("?")
        await terminal.until(lambda lines: not any("replace every worker" in line for line in lines))
        await terminal.keys("q")
        await is_as_before(terminal, 0)


async def test_a_change_that_fails_is_told(socket: Path) -> None:
    """Where new workers don't come up, the pool's own words stand in the last line, and top goes on."""
    broken = False

    async def boot(slot: int) -> None:
        if broken:
            raise BadBoot()

    config = memory_pool(factory=MemoryFactory(answer, boot=boot))
    async with served(config, socket), top(socket) as terminal:
        broken = True
        await terminal.keys("r")
        await terminal.shows("reset: worker ")
        broken = False
        await terminal.keys("q")
        await is_as_before(terminal, 0)


async def test_narrow_and_wide(socket: Path) -> None:
    """The table follows the window: what has no room goes, and a line says what is not shown."""
    async with served(memory_pool(num_workers=12), socket), top(socket, 140, 30) as terminal:
        lines = await terminal.until(lambda lines: row(lines, 11))
        assert "last death" in lines[4]
        assert len(lines) == 30
        assert not any("not shown" in line for line in lines)
        await terminal.resize(60, 10)
        lines = await terminal.until(lambda lines: len(lines) == 10 and any("not shown: 8 workers" in x for x in lines))
        assert all(len(line) <= 60 for line in lines)
        assert "uptime, last death" in lines[8]
        assert "uptime" not in lines[3]
        assert [len(row(lines, slot)) > 0 for slot in range(5)] == [True, True, True, True, False]
        await terminal.keys("Down", "Down")
        lines = await terminal.shows("(2 above, 6 below)")
        assert not row(lines, 1)
        assert row(lines, 5)
        await terminal.keys("End")
        lines = await terminal.shows("8 workers above")
        assert row(lines, 11)
        await terminal.keys("PPage")
        await terminal.shows("(5 above, 3 below)")
        await terminal.resize(20, 4)
        await terminal.until(lambda lines: len(lines) == 4 and lines[-1].startswith("q quit"))
        await terminal.resize(150, 40)
        lines = await terminal.until(lambda lines: len(lines) == 40 and row(lines, 11) and row(lines, 0))
        assert "last death" in lines[4]
        await terminal.keys("q")
        await is_as_before(terminal, 0)


async def test_control_c(socket: Path) -> None:
    """Ctrl-C leaves as everywhere, and gives the terminal back."""
    async with served(memory_pool(), socket), top(socket) as terminal:
        await terminal.keys("C-c")
        # The shell was told by its child's end, and goes on with the line or not; so ask anew.
        await terminal.until(lambda lines: not any("slot" in line for line in lines))
        await terminal.type("echo it ended with $?")
        await is_as_before(terminal, 130)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal(socket: Path, number: signal.Signals) -> None:
    """Whoever ends it by a signal finds the terminal as it was."""
    async with served(memory_pool(), socket), top(socket) as terminal:
        os.kill(pid_of_top(socket), number)
        await is_as_before(terminal, 128 + number)


async def test_stopped_and_gone_on_with(socket: Path) -> None:
    """Ctrl-Z gives the terminal back until `fg`."""
    async with served(memory_pool(), socket), open_terminal(120, 24, {"PYTHONPATH": str(ROOT)}) as terminal:
        await terminal.type(f"{sys.executable} -m trio_workers top --socket {socket}")
        await terminal.shows(KEYS)
        await terminal.keys("C-z")
        await terminal.shows("Stopped")
        assert await terminal.flag("alternate_on") == "0"
        assert await terminal.flag("cursor_flag") == "1"
        await terminal.type("clear; stty -a")
        assert "icanon" in " ".join(await terminal.shows("icanon")).split()
        await terminal.type("fg; echo it ended with $?")
        await terminal.shows(KEYS)
        await terminal.keys("q")
        await is_as_before(terminal, 0)


async def test_the_pool_ends(socket: Path) -> None:
    """A pool that ends is no failure; it is said below what was there before."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(served(memory_pool(), socket))
        async with top(socket) as terminal:
            await stack.aclose()
            lines = await is_as_before(terminal, 0)
            assert any("the pool 'mill' has ended" in line for line in lines)


async def test_the_pools_process_is_killed(socket: Path) -> None:
    """Where nobody listens any more and the pool did not end by itself, that is a failure."""
    async with serving(socket) as server, top(socket) as terminal:
        server.kill()
        lines = await is_as_before(terminal, 1)
        assert f"the pool 'mill' was of process {server.pid}" in "".join(lines)


async def test_the_pools_process_is_stopped(socket: Path) -> None:
    """A pool that does not answer is said to be silent; when it goes on, so does top. The keys work meanwhile."""
    async with serving(socket) as server, top(socket) as terminal:
        server.send_signal(signal.SIGSTOP)
        await terminal.shows("the pool has not answered for ")
        await terminal.keys("?")
        await terminal.shows("close this help")
        await terminal.keys("?")
        server.send_signal(signal.SIGCONT)
        await terminal.shows(KEYS)
        server.send_signal(signal.SIGSTOP)
        await terminal.shows("the pool has not answered for ")
        await terminal.keys("q")
        await is_as_before(terminal, 0)
