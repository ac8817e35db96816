"""What is Linux-only, each with its portable fallback. Nothing else in the package asks which system this is.

Five things of Linux make the difference. A *pidfd* is readable once the process has ended, needs no thread, and names
the process for good, where a pid may come to name another one. The *life line* lets the kernel kill a worker's process
group when the pool's process dies, however that happens. The *unread bytes* of a pipe prove, after a worker's death,
that a job never began. `SO_PEERCRED` and `/proc` say who is at the other end of a connection. And a *shared file* is
memory that two processes map, without a name that could be left behind.

Elsewhere a thread waits for each process, a worker learns of the pool's death by the end of its relay alone, nothing is
proved about unread bytes, a connection is believed for the pid it claims, and large buffers take the socket.

Call `_platform.HERE.<method>` at the time of the call: tests put `Portable()` there.
"""

import os

if not hasattr(os, "waitid"):
    raise ImportError(
        "trio_workers needs a Unix whose Python has os.waitid (on macOS: 3.13 or later); it does not run on Windows"
    )

import contextlib
import enum
import errno
import fcntl
import functools
import select
import signal
import socket
import stat
import struct
import sys
import termios
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Final, Literal

import trio

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

PIPE_SIZE: Final = 256 * 1024
"""What a relay's pipes are grown to. The whole megabyte that the kernel allows would be a little faster, but all pipes
of an unprivileged user may take 64 MiB together (`/proc/sys/fs/pipe-user-pages-soft`), and past that they can't grow
at all: with two pipes a worker this is enough for 128 workers, where a megabyte would do for 32."""

_SIGNAL_GROUP: Final = 4
"""PIDFD_SIGNAL_PROCESS_GROUP, since Linux 6.9; Python has no name for it."""

_NOT_EXECUTABLE: Final = 8
"""MFD_NOEXEC_SEAL, since Linux 6.3, which some systems insist on; Python has no name for it."""

_EXITING: Final = 0x4
"""PF_EXITING, of linux/sched.h: the first thread of the process has begun to exit."""

_GONE: Final = (FileNotFoundError, ProcessLookupError)
"""What `/proc` raises for a process that ended while we looked."""


class NotYet(enum.Enum):
    """The process has not ended."""

    NOT_YET = enum.auto()


NOT_YET: Final = NotYet.NOT_YET


class ExitWatch(ABC):
    """Watches one child process until its end, and takes its exit status when asked to.

    Make it right after the spawn, in the thread that spawned: until the status is taken, the kernel gives neither the
    pid nor the process group to anybody else.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._closed = False

    @abstractmethod
    async def wait(self) -> None:
        """Wait until the process has ended; its status is not taken. Any number of tasks may wait, and be cancelled."""

    def peek(self) -> int | Literal[NotYet.NOT_YET] | None:
        """Return the exit status without taking it, or `NOT_YET`, or None where somebody else took it."""
        return self._status(os.WNOWAIT)

    def reap(self) -> int | Literal[NotYet.NOT_YET] | None:
        """Take the exit status: minus the signal's number where a signal ended the process. Else as `peek`.

        `Popen.wait()` says 0 where somebody else took the status; we say None.
        """
        return self._status(0)

    def _status(self, options: int) -> int | Literal[NotYet.NOT_YET] | None:
        try:
            result = self._waitid(os.WEXITED | os.WNOHANG | options)
        except ChildProcessError:
            return None
        if result is None:
            return NOT_YET
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def _waitid(self, options: int) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self.pid, options)

    def kill_leader(self) -> None:
        """Kill the process itself. Harmless once it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill what is in the process's own group, also after its end. Harmless where that is nothing."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the process; afterwards only `close` may be called."""
        self._closed = True


class _PidfdWatch(ExitWatch):
    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._fd = os.pidfd_open(pid)
        self._taken = False
        self._others = trio.lowlevel.ParkingLot()

    async def wait(self) -> None:
        # trio lets one task wait for a descriptor. The others wait for that task to leave, for whatever reason, and
        # then look for themselves.
        while self._taken:
            await self._others.park()
        self._taken = True
        try:
            await trio.lowlevel.wait_readable(self._fd)
        finally:
            self._taken = False
            self._others.unpark_all()

    def _waitid(self, options: int) -> os.waitid_result | None:
        return os.waitid(os.P_PIDFD, self._fd, options)

    def kill_leader(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def kill_group(self) -> None:
        try:
            # Exact even where somebody else took the status and the number is free again.
            signal.pidfd_send_signal(self._fd, signal.SIGKILL, None, _SIGNAL_GROUP)
        except (ProcessLookupError, PermissionError):
            return
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            super().kill_group()  # before Linux 6.9

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        if self._taken:  # else we may be in the spawning thread, where trio can't be told
            trio.lowlevel.notify_closing(self._fd)
        os.close(self._fd)


class _ThreadWatch(ExitWatch):
    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._ended: trio.Event | None = None
        self._stolen = False

    async def wait(self) -> None:
        # One thread for all who wait, from trio's cache but without a token of any limiter: a limit would make
        # processes wait for each other's end. It ends with the process: a cancelled `wait` leaves it to the next.
        if self._ended is None:
            self._ended = trio.Event()
            token = trio.lowlevel.current_trio_token()
            deliver = functools.partial(self._deliver, token, self._ended)
            trio.lowlevel.start_thread_soon(self._wait_in_thread, deliver, f"end of process {self.pid}")
        await self._ended.wait()

    def _wait_in_thread(self) -> None:
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            self._stolen = True

    def _waitid(self, options: int) -> os.waitid_result | None:
        try:
            return super()._waitid(options)
        except ChildProcessError:
            self._stolen = True
            raise

    # Where somebody else took the status, the number is free, and may be somebody else's already.

    def kill_leader(self) -> None:
        if not self._stolen:
            super().kill_leader()

    def kill_group(self) -> None:
        if not self._stolen:
            super().kill_group()

    @staticmethod
    def _deliver(token: trio.lowlevel.TrioToken, ended: trio.Event, _: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)


class LifeLine:
    """A pipe whose read end a worker inherits and whose write end is ours alone. Nobody ever writes to it.

    A fork of the application holds a copy of the write end: the kernel then waits for the end of that one, too. Between
    the spawn and `arm` lies a part of a millisecond; if we are killed in it, this worker gets the end of file alone.
    """

    def __init__(self) -> None:
        read_fd, write_fd = os.pipe()
        try:
            # Above 2: in the worker stdin, stdout and stderr go there, over what a daemon without them may have put.
            self.worker_fd: int = fcntl.fcntl(read_fd, fcntl.F_DUPFD_CLOEXEC, 3)
        except BaseException:
            os.close(write_fd)
            raise
        finally:
            os.close(read_fd)
        self._write_fd = write_fd

    def arm(self, group: int) -> None:
        """Tie the process group to the pipe and close our copy of the worker's end: right after the spawn."""
        self._tie(group)
        self._close_worker_fd()

    def _tie(self, group: int) -> None:
        """Portable: the end of file is all that the worker gets."""

    def _close_worker_fd(self) -> None:
        if self.worker_fd >= 0:
            os.close(self.worker_fd)
            self.worker_fd = -1

    def close(self) -> None:
        """Close what is still open; a second call is harmless. On Linux this kills what is left of an armed group."""
        self._close_worker_fd()
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1


class _KernelLifeLine(LifeLine):
    def _tie(self, group: int) -> None:
        # When the last write end is closed, the kernel signals that the read end is readable: by SIGKILL, to the group.
        # It holds on to the group itself, not to its number, and to our right to signal it.
        fd = self.worker_fd
        fcntl.fcntl(fd, fcntl.F_SETOWN, -group)
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)


class Platform(ABC):
    """What differs between systems."""

    confirms_peers: bool
    """Whether the kernel says who is at the other end of a local connection."""
    longest_socket_path: int
    """Bytes of a Unix socket's path, without the final NUL."""

    @abstractmethod
    def watch_exit(self, pid: int) -> ExitWatch:
        """Watch a child: call this right after the spawn, in the thread that spawned. Raise `OSError` (EMFILE)."""

    @abstractmethod
    def life_line(self) -> LifeLine:
        """Open a life line. Raise `OSError` (EMFILE)."""

    @abstractmethod
    def unread_bytes(self, fd: int, kind: str = "") -> int | None:
        """Return more than 0 where something written to `fd` is still unread, else 0; None where nobody can know.

        For a pipe this is the number of bytes, also after the reader's death. For a Unix socket it is no number of
        bytes (the kernel counts buffers) and holds while some process has the other end open: when the last one
        closes it the kernel drops what was unread and says 0. Then reading our end to its end tells: ECONNRESET where
        something was unread, an end of file where nothing was.
        """

    @abstractmethod
    def has_packets(self) -> bool:
        """Whether there are sockets for packets, which keep their order and their bounds (SOCK_SEQPACKET)."""

    @abstractmethod
    def unread_packets(self, fd: int) -> bool:
        """Whether packets can be read from this socket."""

    @abstractmethod
    def grow_pipe(self, fd: int) -> None:
        """Grow a pipe to `PIPE_SIZE` where that can be had."""

    @abstractmethod
    def shared_file(self) -> int:
        """Open an empty file in memory that can't be made smaller, for an arena; return its descriptor, above 2.

        Raise `OSError` where that can't be had (ENOSYS, EMFILE).
        """

    @abstractmethod
    def bind_private(self, sock: socket.socket, path: str) -> None:
        """Bind a Unix socket to a path, for its owner alone (0600) before anybody can connect."""

    @abstractmethod
    def peer_pid(self, connection: trio.socket.SocketType) -> int | None:
        """Return the pid of the process that made this Unix connection, None where the kernel does not say."""

    @abstractmethod
    def peer_uid(self, connection: trio.socket.SocketType) -> int | None:
        """Return the user whose process made this Unix connection, None where the kernel does not say."""

    @abstractmethod
    def hung_up(self, fd: int) -> bool:
        """Whether the other end of a Unix connection is closed for good, whatever lies unread in ours.

        One that has closed its sending side alone still listens. False too where nobody can know.
        """

    @abstractmethod
    def tcp_peer_inode(self, ours: tuple[str, int], theirs: tuple[str, int]) -> int | None:
        """Return the inode of the socket at the other end of a TCP connection within this machine, or None."""

    @abstractmethod
    def has_socket(self, pid: int, inode: int) -> bool:
        """Whether a process has this socket open. False too where we may not look."""

    @abstractmethod
    def group_members(self, groups: Collection[int]) -> list[tuple[int, int]]:
        """Return the pid and the group of every process in these process groups, the leaders first."""

    @abstractmethod
    def is_exiting(self, pid: int) -> bool:
        """Return whether a child of ours, not yet reaped, is known to be on its way out."""

    @abstractmethod
    def check_memory(self) -> None:
        """Raise `RuntimeError` where the memory of a process can't be read."""

    @abstractmethod
    def resident_memory(self, pid: int) -> int | None:
        """Return how many bytes of memory a process has resident, None where it is gone or not ours to see."""

    @abstractmethod
    def cpu_time(self, pid: int) -> float | None:
        """Return how many seconds of processor time a process has had, None where nobody can say."""


class Portable(Platform):
    """Any Unix with `waitid`."""

    confirms_peers = False
    longest_socket_path = 103

    def watch_exit(self, pid: int) -> ExitWatch:
        """Watch by a thread of its own."""
        return _ThreadWatch(pid)

    def life_line(self) -> LifeLine:
        """Open a pipe, whose end of file is all that a worker gets."""
        return LifeLine()

    def unread_bytes(self, fd: int, kind: str = "") -> int | None:
        """Return None: nobody can know."""
        return None

    def has_packets(self) -> bool:
        """Return False."""
        return False

    def unread_packets(self, fd: int) -> bool:
        """Return False."""
        return False

    def grow_pipe(self, fd: int) -> None:
        """Leave it as it is."""

    def shared_file(self) -> int:
        """Raise ENOSYS."""
        raise OSError(errno.ENOSYS, "there are no files in memory on this system")

    def bind_private(self, sock: socket.socket, path: str) -> None:
        """Set the mode between bind and listen: until then a connection is refused."""
        sock.bind(path)
        os.chmod(path, 0o600)

    def peer_pid(self, connection: trio.socket.SocketType) -> int | None:
        """Return None: the kernel does not say."""
        return None

    def peer_uid(self, connection: trio.socket.SocketType) -> int | None:
        """Return None: the kernel does not say."""
        return None

    def hung_up(self, fd: int) -> bool:
        """Return False: the next bytes that are sent will tell."""
        return False

    def tcp_peer_inode(self, ours: tuple[str, int], theirs: tuple[str, int]) -> int | None:
        """Return None: the kernel does not say."""
        return None

    def has_socket(self, pid: int, inode: int) -> bool:
        """Return False: the kernel does not say."""
        return False

    def group_members(self, groups: Collection[int]) -> list[tuple[int, int]]:
        """Return the leaders, the only ones known."""
        return [(group, group) for group in groups]

    def is_exiting(self, pid: int) -> bool:
        """Nobody can say."""
        return False

    def check_memory(self) -> None:
        """See that psutil is there."""
        try:
            self.resident_memory(os.getpid())
        except ImportError:
            raise RuntimeError(
                "Limits.max_memory and Limits.hard_memory need psutil on this system: "
                "pip install 'trio_workers[memory]'"
            ) from None

    def resident_memory(self, pid: int) -> int | None:
        """Ask psutil."""
        import psutil

        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return None

    def cpu_time(self, pid: int) -> float | None:
        """Ask psutil, where it is there."""
        try:
            import psutil
        except ImportError:
            return None
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            return None
        return float(times.user + times.system)


class Linux(Platform):
    """Linux 5.4 or later, with `/proc`."""

    confirms_peers = True
    longest_socket_path = 107

    def watch_exit(self, pid: int) -> ExitWatch:
        """Watch by a pidfd."""
        return _PidfdWatch(pid)

    def life_line(self) -> LifeLine:
        """Open a pipe at whose end the kernel kills the group."""
        return _KernelLifeLine()

    def unread_bytes(self, fd: int, kind: str = "") -> int | None:
        """Ask FIONREAD for a pipe, TIOCOUTQ for a Unix socket; FIONREAD there would be about the other direction."""
        if kind == "unix":
            return _ask(fd, termios.TIOCOUTQ)
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            request = termios.FIONREAD
        elif stat.S_ISSOCK(mode) and _is_unix(fd):
            request = termios.TIOCOUTQ
        else:
            return None  # TCP: what was acknowledged is in the peer's kernel, which does not mean that it was read
        return _ask(fd, request)

    def has_packets(self) -> bool:
        """Return True."""
        return True

    def unread_packets(self, fd: int) -> bool:
        """Ask FIONREAD."""
        return _ask(fd, termios.FIONREAD) > 0

    def grow_pipe(self, fd: int) -> None:
        """Ask for it; where the user's limit is reached the pipe stays as it is."""
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def shared_file(self) -> int:
        """Open a memfd: it has no name, and goes with the last process that has it open or mapped."""
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "this Python was built for a C library without memfd_create")
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            fd = os.memfd_create("trio_workers", flags | _NOT_EXECUTABLE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.memfd_create("trio_workers", flags)
        try:
            # A worker that made the file smaller would kill us by SIGBUS, in the middle of a copy.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(fd)

    def bind_private(self, sock: socket.socket, path: str) -> None:
        """Set the mode of the socket itself, which `bind` gives to the file: it is born with it."""
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)

    def peer_pid(self, connection: trio.socket.SocketType) -> int | None:
        """Ask SO_PEERCRED; it says 0 for a process outside our pid namespace."""
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid or None

    def peer_uid(self, connection: trio.socket.SocketType) -> int | None:
        """Ask SO_PEERCRED; one that our user namespace does not know is the overflow uid, which is nobody's."""
        _, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(uid)

    def hung_up(self, fd: int) -> bool:
        """Ask poll for POLLHUP, which means both directions; a closed sending side alone is POLLRDHUP."""
        poll = select.poll()
        poll.register(fd, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def tcp_peer_inode(self, ours: tuple[str, int], theirs: tuple[str, int]) -> int | None:
        """Look for the other end's own line in `/proc/net/tcp` and `tcp6`."""
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            try:
                wanted = f" {_in_proc(family, *theirs)} {_in_proc(family, *ours)} ".encode()
                with open(f"/proc/net/{table}", "rb") as file:
                    content = file.read()
            except OSError:
                continue  # no IPv6 here, or no address of this family
            at = content.find(wanted)
            if at >= 0:
                # What follows: state, queues, timer, retransmits, uid, timeout, inode; 0 once it is closed.
                return int(content[at + len(wanted) : content.find(b"\n", at)].split()[6]) or None
        return None

    def has_socket(self, pid: int, inode: int) -> bool:
        """Look through `/proc/<pid>/fd`."""
        wanted = f"socket:[{inode}]"
        directory = f"/proc/{pid}/fd/"
        try:
            names = os.listdir(directory)
        except OSError:
            return False
        for name in names:
            with contextlib.suppress(OSError):
                if os.readlink(directory + name) == wanted:
                    return True
        return False

    def group_members(self, groups: Collection[int]) -> list[tuple[int, int]]:
        """Ask for the group of every process there is, which is one cheap system call each."""
        leaders = [(group, group) for group in groups]
        others: list[tuple[int, int]] = []
        for name in os.listdir("/proc"):
            if name.isdecimal():
                pid = int(name)
                with contextlib.suppress(*_GONE):
                    group = os.getpgid(pid)
                    if group in groups and pid != group:
                        others.append((pid, group))
        return leaders + others

    def is_exiting(self, pid: int) -> bool:
        """Look for PF_EXITING among the flags in `/proc/<pid>/stat`: see proc(5), field 9, and linux/sched.h."""
        try:
            return bool(int(_read_stat(pid)[6]) & _EXITING)
        except (OSError, IndexError):
            return False

    def check_memory(self) -> None:
        """See that `/proc` is there."""
        if self.resident_memory(os.getpid()) is None:
            raise RuntimeError("Limits.max_memory and Limits.hard_memory need /proc, which is not to be read here")

    def resident_memory(self, pid: int) -> int | None:
        """Read the second number of `/proc/<pid>/statm`, which is in pages: see proc(5)."""
        try:
            with open(f"/proc/{pid}/statm", "rb", buffering=0) as statm:
                return int(statm.read(256).split()[1]) * PAGE_SIZE
        except (OSError, IndexError):
            return None  # it has ended, or is about to

    def cpu_time(self, pid: int) -> float | None:
        """Read utime and stime of `/proc/<pid>/stat`, fields 14 and 15, in clock ticks: see proc(5)."""
        try:
            fields = _read_stat(pid)
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):
            return None


def _read_stat(pid: int) -> list[bytes]:
    """Read `/proc/<pid>/stat`, from the state (field 3) on: the name before it may hold spaces."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
        return stat.read(1024).rpartition(b")")[2].split()


def _ask(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), sys.byteorder)


def _is_unix(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family == socket.AF_UNIX


def _in_proc(family: int, host: str, port: int) -> str:
    """Write an address as `/proc/net/tcp` does: each four bytes as a number in this machine's byte order."""
    if family == socket.AF_INET6 and ":" not in host:
        host = f"::ffff:{host}"  # a socket of the IPv6 family that speaks IPv4
    packed = socket.inet_pton(family, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


HERE: Platform = Linux() if sys.platform == "linux" and hasattr(os, "pidfd_open") else Portable()
"""The system we are on."""
