"""Unix sockets at a path: private from birth, in the place of a dead one only, removed by inode."""

import contextlib
import enum
import errno
import os
import socket
import stat

import attrs
import trio

from . import _platform


@attrs.frozen
class SocketFile:
    """The file of our Unix socket, known by its inode: another one at its path is not ours to remove."""

    path: str
    inode: tuple[int, int]

    @classmethod
    def at(cls, path: str) -> "SocketFile":
        """Look at what is there now, links not followed. Raise FileNotFoundError for nothing."""
        status = os.lstat(path)
        return cls(path, (status.st_dev, status.st_ino))

    def remove(self) -> None:
        """Remove it, if it is still this one that is there."""
        with contextlib.suppress(FileNotFoundError):
            if SocketFile.at(self.path) == self:
                os.unlink(self.path)


def why_too_long(path: str) -> str | None:
    """Say by how much a path is too long for a Unix socket, None where it is not."""
    size, longest = len(os.fsencode(path)), _platform.HERE.longest_socket_path
    return f"the path has {size} bytes, and a Unix socket's at most {longest}" if size > longest else None


def listen_at_path(path: str) -> tuple[trio.SocketListener, SocketFile]:
    """Listen. Raise FileExistsError where the path is taken by anything but a dead socket, or what the system says."""
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            _bind(sock, path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_dead(path)
            _bind(sock, path)
        file = SocketFile.at(path)
        undo.callback(file.remove)
        sock.listen(socket.SOMAXCONN)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        undo.pop_all()
        return listener, file


def _bind(sock: socket.socket, path: str) -> None:
    try:
        _platform.HERE.bind_private(sock, path)
    except OSError as error:
        # The system's own error does not name the path.
        raise OSError(error.errno, f"can't make the Unix socket ({os.strerror(error.errno or 0)})", path) from None


class Pulse(enum.Enum):
    """What a knock at a Unix socket tells."""

    LIVE = "somebody is listening on that socket"
    DEAD = "nobody listens to it any more"
    GONE = "there is nothing at that path"
    OTHER = "there is a file that is no socket"


def knock(path: str) -> Pulse:
    """See whether somebody listens there. Raise OSError where that can't be known: a full backlog, no permission."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return Pulse.OTHER
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        return Pulse.DEAD
    except FileNotFoundError:
        return Pulse.GONE
    return Pulse.LIVE


def _remove_dead(path: str) -> None:
    """Remove a socket that nobody listens to. Raise FileExistsError for anything else at that path."""
    try:
        file = SocketFile.at(path)
    except FileNotFoundError:
        return
    try:
        pulse = knock(path)
    except OSError as error:
        raise FileExistsError(errno.EEXIST, f"there is a socket that may be in use ({error})", path) from None
    if pulse is Pulse.DEAD:
        file.remove()
    elif pulse is not Pulse.GONE:
        raise FileExistsError(errno.EEXIST, pulse.value, path)
