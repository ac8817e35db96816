"""What the system holds for us: processes, descriptors, memory."""

import ctypes
import gc
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import attrs
import trio


@attrs.frozen
class Look:
    """What there is at one moment: children with what they are, descriptors with where they lead, tasks of trio."""

    children: dict[int, str]
    descriptors: dict[int, str]
    tasks: int


def look() -> Look:
    """Look at what there is."""
    gc.collect()
    return Look(_children(), _descriptors(), trio.lowlevel.current_statistics().tasks_living)


def what_is_left(before: Look, after: Look) -> list[str]:
    """Say what is there that was not."""
    left = [f"child {pid}: {what}" for pid, what in after.children.items() if pid not in before.children]
    if len(after.descriptors) != len(before.descriptors):
        new = {fd: to for fd, to in after.descriptors.items() if before.descriptors.get(fd) != to}
        left.append(f"{len(before.descriptors)} descriptors before, {len(after.descriptors)} after; new are {new}")
    if after.tasks != before.tasks:
        left.append(f"{before.tasks} tasks before, {after.tasks} after")
    return left


def kept_memory() -> int:
    """Return the resident bytes of this process that are in use.

    The C library keeps what was freed for the next large block. How much that is says nothing of us, so it is given
    back first, where the library can do that.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def processes_of(mark: str) -> dict[int, str]:
    """Find all processes, anywhere, that have this in their environment: workers, their children, and theirs."""
    found: dict[int, str] = {}
    for directory in _processes():
        # It may end while we look, or belong to somebody else.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark.encode() in (directory / "environ").read_bytes():
                found[int(directory.name)] = _argv(directory)
    return found


def kill(pids: dict[int, str]) -> None:
    """End what was left behind, so that it does not trouble what comes next."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes() -> list[Path]:
    return [directory for directory in Path("/proc").iterdir() if directory.name.isdecimal()]


def _argv(directory: Path) -> str:
    return (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _children() -> dict[int, str]:
    """Find our child processes, zombies included."""
    found: dict[int, str] = {}
    for directory in _processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            # "pid (name) state ppid ...", where the name may hold anything.
            state, parent = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                found[int(directory.name)] = f"{_argv(directory) or 'no name'} (state {state})"
    return found


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listed the directory
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found
