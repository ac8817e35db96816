"""Where control sockets lie: one directory for each user, that nobody else can look into."""

import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from ._socket_file import Pulse, SocketFile, knock

LONGEST_NAME: Final = 40
"""Characters of a pool's name in the name of its socket. A socket's path has little room: 107 bytes on Linux."""

_PID: Final = re.compile(r"-(\d+)(?:\.\d+)?\.sock")


def find_sockets() -> list[Path]:
    """List the control sockets of this user's pools that somebody listens to, by path.

    Those in their usual places, `$XDG_RUNTIME_DIR/trio_workers` and `/tmp/trio_workers-<uid>`; one that was put
    elsewhere (`serve_control(pool, path=...)`) can't be found. A directory that others could write to is not looked at.
    """
    found: list[Path] = []
    for directory in _places():
        if _why_not_private(directory) is None:
            found += [path for path in _sockets_in(directory) if _may_live(path)]
    return found


def make_private_directory() -> Path:
    """Return the directory for sockets, made if it is missing. Raise OSError where it is not for us alone."""
    directory = _places()[0]
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if (why := _why_not_private(directory)) is not None:
        raise PermissionError(
            errno.EPERM, f"{why}; put that right, or give the control socket another place by path=", str(directory)
        )
    return directory


def name_for(pool: str, number: int) -> str:
    """Return the file name for the socket of a pool in this process, the first of that name or a further one."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", pool)[:LONGEST_NAME].lstrip(".-") or "pool"
    return f"{safe}-{os.getpid()}{'' if number == 1 else f'.{number}'}.sock"


def sweep(directory: Path) -> None:
    """Remove the sockets of pools that were killed. Their process is gone, and nobody listens: both are looked at."""
    for path in _sockets_in(directory):
        named = _PID.search(path.name)
        if named is None or _is_there(int(named[1])):
            continue
        with contextlib.suppress(OSError):
            file = SocketFile.at(str(path))
            if knock(str(path)) is Pulse.DEAD:
                file.remove()


def _places() -> list[Path]:
    """Return where sockets may lie, first where a new one is put.

    `XDG_RUNTIME_DIR` must be absolute and ours, says its specification; after `su` or `sudo` it may be another's.
    """
    uid = os.geteuid()
    places = [Path(f"/tmp/trio_workers-{uid}")]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        with contextlib.suppress(OSError):
            status = os.stat(runtime)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
                places.insert(0, Path(runtime, "trio_workers"))
    return places


def _why_not_private(directory: Path) -> str | None:
    try:
        status = os.lstat(directory)
    except FileNotFoundError:
        return "it is missing"
    if not stat.S_ISDIR(status.st_mode):
        return "it is no directory"  # a link to one neither
    if status.st_uid != os.geteuid():
        return f"it belongs to uid {status.st_uid}"
    if status.st_mode & 0o077:
        return f"its mode is {stat.S_IMODE(status.st_mode):04o} where it must be 0700"
    return None


def _sockets_in(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in directory.iterdir() if path.suffix == ".sock")
    return []


def _may_live(path: Path) -> bool:
    try:
        return knock(str(path)) is Pulse.LIVE
    except BlockingIOError:
        return True  # its backlog is full
    except OSError:
        return False


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
