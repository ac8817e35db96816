"""What holds for every test: it ends within its limit and leaves nothing behind."""

import compileall
import contextlib
import faulthandler
import functools
import gc
import inspect
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import settings

from tests.support import ROOT, under_ci

# Generous, for a loaded machine: this is not how fast a test is, but when it counts as hung.
DEFAULT_LIMIT: Final = 60.0
# An async test is cancelled first, so that it can say where it stood; only what ignores that is ended by force.
CANCEL_AFTER: Final = 5 / 6

# A slow machine is no bug. Each profile may be replaced by --hypothesis-profile.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, print_blob=True, max_examples=200)
settings.load_profile("ci" if under_ci() else "default")

stderr_key = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        compile_all()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background by a shell: what the tests say of Ctrl-C needs it to be heard.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # While a test runs its output is captured: the traceback of a hung one needs the real stderr.
    config.stash[stderr_key] = os.dup(2)


def compile_all() -> None:
    """Compile what workers import, also where PYTHONDONTWRITEBYTECODE is set: thousands of them are started."""
    for package in ("trio_workers", "tests"):
        compileall.compile_dir(ROOT / package, rx=re.compile(r"/test_\w+\.py$"), quiet=2)


def pytest_collection_finish() -> None:
    # A full collection of all that the tests' modules are takes half a second on a busy machine, in which a test with a
    # short deadline of the real clock would see it pass.
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    if (fd := config.stash.get(stderr_key, None)) is not None:
        del config.stash[stderr_key]
        os.close(fd)


def limit_of(item: pytest.Item) -> float | None:
    """Seconds this test may take: TRIO_WORKERS_TEST_LIMIT (0 is none), else its ``limit`` marker, else the default."""
    marker = item.get_closest_marker("limit")
    seconds = DEFAULT_LIMIT if marker is None else float(marker.args[0])
    if (override := os.environ.get("TRIO_WORKERS_TEST_LIMIT")) is not None:
        seconds = float(override)
    return seconds if seconds > 0 else None


def limited(test: Callable[..., Awaitable[None]], seconds: float) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        if isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock):
            # A virtual clock would jump straight to the deadline.
            await test(*args, **kwargs)
            return
        with trio.fail_after(seconds):
            await test(*args, **kwargs)

    run.limited = True  # type: ignore[attr-defined]
    return run


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    # Before pytest-trio makes a plain function of the test. Under hypothesis the limit holds for each example.
    seconds = limit_of(item)
    if seconds is not None and isinstance(item, pytest.Function):
        handle = getattr(item.obj, "hypothesis", None)
        test = item.obj if handle is None else handle.inner_test
        if inspect.iscoroutinefunction(test) and not hasattr(test, "limited"):
            wrapper = limited(test, seconds * CANCEL_AFTER)
            if handle is None:
                item.obj = wrapper
            else:
                handle.inner_test = wrapper
    return (yield)


@pytest.fixture(autouse=True)
def ends_in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the whole run, with the traceback of every thread, when a test hangs."""
    seconds = limit_of(request.node)
    if seconds is None or request.config.getoption("usepdb"):
        yield
        return
    # exit: what hangs here ignored its cancel, and nothing else can end a loop in C.
    faulthandler.dump_traceback_later(seconds, exit=True, file=request.config.stash[stderr_key])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def children() -> dict[int, str]:
    """Our child processes by pid, zombies included, each with what it is."""
    found: dict[int, str] = {}
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return found  # there are none, says the kernel: no need to look at every process of the machine
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        # It may end while we look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # "pid (name) state ppid ...", where the name may hold anything, parentheses and spaces too.
            stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            name, _, rest = stat.partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) == os.getpid():
                argv = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(directory.name)] = f"{argv or name} (state {state})"
    return found


def descriptors() -> dict[int, str]:
    """Our open file descriptors, each with what it leads to."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        # The one that listed the directory is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found


@pytest.fixture(autouse=True)
def nothing_left(ends_in_time: None) -> Iterator[None]:
    """Fail a test that leaves a child process, a zombie, or a file descriptor, and say which."""
    if sys.platform != "linux":
        yield
        return
    children_before, descriptors_before = children(), descriptors()
    yield
    if children() or len(descriptors()) != len(descriptors_before):
        gc.collect()  # what only waits for that is not left
    complaints: list[str] = []
    for pid, what in children().items():
        if pid not in children_before:
            complaints.append(f"child {pid} left: {what}")
            # It must not trouble the next tests as well.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    after = descriptors()
    if len(after) != len(descriptors_before):
        complaints.append(f"{len(descriptors_before)} file descriptors before, {len(after)} after")
        new = {fd: what for fd, what in after.items() if descriptors_before.get(fd) != what}
        gone = {fd: what for fd, what in descriptors_before.items() if after.get(fd) != what}
        complaints += [f"fd {fd} left: {what}" for fd, what in sorted(new.items())]
        complaints += [f"fd {fd} gone: {what}" for fd, what in sorted(gone.items())]
    if complaints:
        pytest.fail("not left as found:\n  " + "\n  ".join(complaints), pytrace=False)


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """A file in which jobs and workers note what they do."""
    return tmp_path / "note"


@pytest.fixture
def go(tmp_path: Path) -> Path:
    """A file that jobs wait for."""
    return tmp_path / "go"


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """A clock that goes as the real one does, and can be put forward."""
    return trio.testing.MockClock(rate=1.0)
