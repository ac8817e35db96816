"""What is Linux-only, and its fallbacks."""

# ruff: noqa: ASYNC222 - tests may block for a moment, and wait for states that no event tells

import contextlib
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from trio_workers import _platform
from trio_workers._platform import NOT_YET, PIPE_SIZE, ExitWatch, Linux, Platform, Portable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compares Linux with the fallback")

Start = Callable[..., ExitWatch]


@pytest.fixture(params=[Linux, Portable])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Platform:
    here: Platform = request.param()
    monkeypatch.setattr(_platform, "HERE", here)
    return here


@pytest.fixture
def start(platform: Platform) -> Iterator[Start]:
    """Start a shell script in its own process group and watch it."""
    running: list[int] = []

    def run(script: str, **options: object) -> ExitWatch:
        popen = subprocess.Popen(["sh", "-c", script], process_group=0, **options)  # type: ignore[call-overload]
        popen.returncode = 0  # its exit status is not for it to take
        running.append(popen.pid)
        return platform.watch_exit(popen.pid)

    yield run
    for pid in running:  # of a test that failed
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


async def gone(pidfd: int) -> None:
    """Wait until a process of a pidfd, which need not be our child, has ended."""
    await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -KILL $$", -signal.SIGKILL),
        ("kill -TERM $$", -signal.SIGTERM),
        ("ulimit -c 0; kill -SEGV $$", -signal.SIGSEGV),
    ],
)
async def test_exit_status_is_exact_and_taken_once(start: Start, script: str, status: int) -> None:
    """The status can be looked at as often as one likes, taken once, and is None after that."""
    watch = start(script)
    await watch.wait()
    await watch.wait()
    assert [watch.peek(), watch.peek(), watch.reap(), watch.peek(), watch.reap()] == [
        status,
        status,
        status,
        None,
        None,
    ]
    watch.close()
    watch.close()


async def test_not_yet(start: Start) -> None:
    """A process that runs has no status, and asking for it takes nothing."""
    watch = start("exec sleep 1000")
    assert watch.peek() is NOT_YET
    assert watch.reap() is NOT_YET
    watch.kill_leader()
    await watch.wait()
    watch.kill_leader()
    assert watch.reap() == -signal.SIGKILL
    watch.kill_leader()
    watch.close()


async def test_status_taken_by_somebody_else(start: Start) -> None:
    """A status that is gone is None, not 0."""
    watch = start("exit 5")
    assert os.waitpid(watch.pid, 0)[1] == 5 << 8
    await watch.wait()
    assert watch.peek() is None
    assert watch.reap() is None
    watch.close()


async def test_many_wait_and_some_are_cancelled(start: Start) -> None:
    """Any number of tasks may wait for one end; a cancelled one takes nothing from the others."""
    watch = start("exec sleep 1000")
    done: list[int] = []

    async def wait(number: int, scope: trio.CancelScope) -> None:
        with scope:
            await watch.wait()
            done.append(number)

    scopes = [trio.CancelScope() for _ in range(6)]
    async with trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(wait, number, scope)
        await trio.testing.wait_all_tasks_blocked()
        for number in (0, 3):
            scopes[number].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        watch.kill_leader()
    assert sorted(done) == [1, 2, 4, 5]
    assert watch.reap() == -signal.SIGKILL
    watch.close()


async def test_waiting_needs_no_token_of_the_default_limiter(start: Start) -> None:
    """An end is noticed however many threads of the application are busy."""
    limiter = trio.to_thread.current_default_thread_limiter()
    total = limiter.total_tokens
    borrowed = [object() for _ in range(int(total))]
    for borrower in borrowed:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        watch = start("exit 7")
        await watch.wait()
        assert watch.reap() == 7
        watch.close()
    finally:
        for borrower in borrowed:
            limiter.release_on_behalf_of(borrower)


@pytest.mark.parametrize("ended", [False, True])
async def test_group_dies_with_or_after_its_leader(start: Start, ended: bool) -> None:
    """What a worker started dies by the group, also where the worker itself has ended: its zombie pins the number."""
    read_fd, write_fd = os.pipe()
    watch = start("sleep 1000 & echo $!; " + ("exit 0" if ended else "wait"), stdout=write_fd)
    os.close(write_fd)
    child = os.pidfd_open(int(os.read(read_fd, 20)))
    os.close(read_fd)
    if ended:
        await watch.wait()
    watch.kill_group()
    await gone(child)
    await watch.wait()
    assert watch.reap() == (0 if ended else -signal.SIGKILL)
    watch.close()


@pytest.mark.parametrize("platform", [Linux], indirect=True)
async def test_group_dies_though_its_status_was_stolen(start: Start) -> None:
    """The pidfd names the group for good, even if the leader's number is nobody's any more."""
    read_fd, write_fd = os.pipe()
    watch = start("sleep 1000 & echo $!", stdout=write_fd)
    os.close(write_fd)
    child = int(os.read(read_fd, 20))
    child_fd = os.pidfd_open(child)
    os.close(read_fd)
    os.waitpid(watch.pid, 0)
    assert watch.peek() is None
    assert os.getpgid(child) == watch.pid
    watch.kill_group()
    await gone(child_fd)
    watch.kill_group()
    watch.close()


@pytest.mark.parametrize("platform", [Portable], indirect=True)
@pytest.mark.parametrize("learns", ["peek", "reap", "wait"])
async def test_nothing_is_signalled_once_the_status_was_stolen(
    start: Start, learns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pidfd a number that was freed may be somebody else's: it gets no signal."""
    watch = start("exit 3")
    os.waitpid(watch.pid, 0)
    if learns == "wait":
        await watch.wait()
    else:
        assert getattr(watch, learns)() is None
    signalled: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *arguments: signalled.append(arguments))
        patch.setattr(os, "killpg", lambda *arguments: signalled.append(arguments))
        watch.kill_leader()
        watch.kill_group()
    assert signalled == []
    watch.close()


@pytest.mark.parametrize("platform", [Linux], indirect=True)
async def test_group_is_killed_by_number_on_an_older_linux(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9 a pidfd can't signal a group, and says EINVAL."""
    watch = start("exec sleep 1000")
    monkeypatch.setattr(_platform, "_SIGNAL_GROUP", 1 << 30)
    watch.kill_group()
    await watch.wait()
    watch.kill_group()
    assert watch.reap() == -signal.SIGKILL
    watch.close()


def test_life_line_leaves_nothing(platform: Platform) -> None:
    """Armed or not, closed once or twice, every descriptor goes; the worker's is above stdin, stdout and stderr."""
    line = platform.life_line()
    assert line.worker_fd > 2
    assert not os.get_inheritable(line.worker_fd)
    line.close()
    line.close()
    assert line.worker_fd == -1


async def test_worker_sees_the_end_of_the_life_line(start: Start, platform: Platform) -> None:
    """At least the end of file is there for a worker that looks, and nothing before it."""
    line = platform.life_line()
    read_fd = os.dup(line.worker_fd)
    os.set_blocking(read_fd, False)
    watch = start("exec sleep 1000", pass_fds=(line.worker_fd,))
    line.arm(watch.pid)
    with pytest.raises(BlockingIOError):
        os.read(read_fd, 1)
    line.close()
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)
    watch.kill_leader()
    await watch.wait()
    assert watch.reap() == -signal.SIGKILL
    watch.close()


async def test_kernel_kills_the_group_when_the_life_line_ends(start: Start, platform: Platform) -> None:
    """On Linux closing the write end is SIGKILL for the whole group; the fallback kills nobody."""
    line = platform.life_line()
    read_fd, write_fd = os.pipe()
    watch = start("trap '' HUP INT TERM; sleep 1000 & echo $!; wait", stdout=write_fd, pass_fds=(line.worker_fd,))
    os.close(write_fd)
    child = os.pidfd_open(int(os.read(read_fd, 20)))
    os.close(read_fd)
    line.arm(watch.pid)
    assert watch.peek() is NOT_YET
    line.close()
    if isinstance(platform, Portable):
        assert watch.peek() is NOT_YET
        watch.kill_group()
    await watch.wait()
    await gone(child)
    assert watch.reap() == -signal.SIGKILL
    watch.close()


def test_unread_bytes_of_a_pipe() -> None:
    """They are counted, also after the reader is gone; the fallback can't know."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, bytes(100))
    assert Linux().unread_bytes(write_fd) == 100
    assert Portable().unread_bytes(write_fd) is None
    os.read(read_fd, 60)
    assert Linux().unread_bytes(write_fd) == 40
    os.close(read_fd)
    assert Linux().unread_bytes(write_fd) == 40
    os.close(write_fd)


@pytest.mark.parametrize("read", [0, 4, 10])
def test_unread_bytes_of_a_unix_socket(read: int) -> None:
    """While the other end is open more than 0 says that some are; afterwards ECONNRESET says it, behind the data."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ours.sendall(bytes(10))
            theirs.sendall(b"reply")
            assert theirs.recv(read) == bytes(read)
            unread = Linux().unread_bytes(ours.fileno())
            assert unread is not None
            assert (unread > 0) == (read < 10)
            assert Portable().unread_bytes(ours.fileno()) is None
        assert Linux().unread_bytes(ours.fileno()) == 0
        with pytest.raises(BrokenPipeError):
            ours.send(b"x")  # takes nothing of what the next read says
        assert ours.recv(100) == b"reply"
        if read < 10:
            with pytest.raises(ConnectionResetError):
                ours.recv(100)
        assert ours.recv(100) == b""


def test_nothing_is_known_of_tcp() -> None:
    """What the peer's kernel has acknowledged, the peer may not have read."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        assert Linux().unread_bytes(client.fileno()) is None


def test_pipes_are_grown(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a size of which many fit into a user's share; where that is used up, the pipe stays as it is."""
    read_fd, write_fd = os.pipe()
    before = fcntl.fcntl(write_fd, fcntl.F_GETPIPE_SZ)
    platform.grow_pipe(write_fd)
    after = fcntl.fcntl(read_fd, fcntl.F_GETPIPE_SZ)
    assert after == (PIPE_SIZE if isinstance(platform, Linux) else before)

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    platform.grow_pipe(write_fd)
    os.close(read_fd)
    os.close(write_fd)


def test_unix_socket_is_private(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask: on Linux from birth, elsewhere before anybody can connect."""
    path = str(tmp_path / "socket")
    if isinstance(platform, Linux):
        monkeypatch.delattr(os, "chmod")
    umask = os.umask(0)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            platform.bind_private(sock, path)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect(path)
    finally:
        os.umask(umask)


def test_peer_pid(platform: Platform) -> None:
    """The kernel says who made a Unix connection; the fallback does not."""
    ours, theirs = socket.socketpair()
    with theirs, trio.socket.from_stdlib_socket(ours) as connection:
        assert platform.peer_pid(connection) == (os.getpid() if isinstance(platform, Linux) else None)


@pytest.mark.parametrize(
    ("family", "listen", "connect"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET, "127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_tcp_peer(family: int, listen: str, connect: str) -> None:
    """The peer's socket is found by its addresses, in either family, and so is who has it open."""
    here = Linux()
    with socket.create_server((listen, 0), family=family) as server:
        port = server.getsockname()[1]
        with socket.socket(socket.AF_INET6 if ":" in connect else family) as client:
            client.connect((connect, port))
            with server.accept()[0] as accepted:
                ours, theirs = accepted.getsockname()[:2], accepted.getpeername()[:2]
                inode = here.tcp_peer_inode(ours, theirs)
                assert inode == os.fstat(client.fileno()).st_ino
                assert here.has_socket(os.getpid(), inode)
                assert not here.has_socket(os.getppid(), inode)
                assert not here.has_socket(2**22 + 1, inode)  # above any pid there can be
                assert here.tcp_peer_inode(ours, (theirs[0], 1)) is None
                assert Portable().tcp_peer_inode(ours, theirs) is None
                assert not Portable().has_socket(os.getpid(), inode)
                client.close()
                assert here.tcp_peer_inode(ours, theirs) is None  # nobody has it any more


async def test_exiting(start: Start, platform: Platform) -> None:
    """Whether a process is on its way out can be seen on Linux; elsewhere nobody says so."""
    watch = start("sleep 1000")
    assert not platform.is_exiting(watch.pid)
    watch.kill_group()
    await watch.wait()
    assert platform.is_exiting(watch.pid) is isinstance(platform, Linux)  # ended, and not yet reaped
    assert watch.reap() == -signal.SIGKILL
    watch.close()
    assert not platform.is_exiting(2**22 + 1)  # above any pid there can be


async def test_group_members(start: Start, platform: Platform) -> None:
    """The leader comes first, what it started behind it, on Linux."""
    read_fd, write_fd = os.pipe()
    watch = start("sleep 1000 & echo $!; wait", stdout=write_fd)
    os.close(write_fd)
    child = int(os.read(read_fd, 20))
    os.close(read_fd)
    members = platform.group_members({watch.pid})
    assert members[0] == (watch.pid, watch.pid)
    assert members[1:] == ([(child, watch.pid)] if isinstance(platform, Linux) else [])
    assert platform.group_members(set()) == []
    watch.kill_group()
    await watch.wait()
    assert watch.reap() == -signal.SIGKILL
    watch.close()


def test_other_systems_get_one_sentence() -> None:
    """Windows, and an old Python on macOS, get an ImportError that says what is needed."""
    code = "import os; del os.waitid; import trio_workers._platform"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(_platform.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: trio_workers needs a Unix")
    assert "Windows" in last
