"""Who is at the other end of a connection, by the kernel's word."""

# ruff: noqa: ASYNC220 - tests may block for a moment, and wait for states that no event tells

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trio_workers import _identity, _platform
from trio_workers._identity import Verdict, claimed_group, group_of, is_loopback
from trio_workers._platform import Linux, Portable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's word")

# Connects to a Unix socket (a path) or to a port, says its pid, and stays.
CLIENT = """
import os, socket, sys
if sys.argv[1].startswith("/"):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
else:
    sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(b"%d\\n" % os.getpid())
sock.recv(1)
"""
WRAPPED = 'trap "" HUP; "$@" & wait'


class Door:
    """A listener, and clients that connect to it one at a time."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        name = listener.getsockname()
        self.address: str = name if listener.family == socket.AF_UNIX else str(name[1])
        self.limiter = trio.CapacityLimiter(1)

    @asynccontextmanager
    async def client(self, *wrapper: str) -> AsyncIterator[tuple[trio.socket.SocketType, int, int]]:
        """Start a client in its own group; yield its connection, the group, and the pid that it says."""
        argv = [*wrapper, sys.executable, "-S", "-c", CLIENT, self.address]
        with subprocess.Popen(argv, process_group=0, stdin=subprocess.DEVNULL) as popen:
            try:
                with trio.socket.from_stdlib_socket(self.listener.accept()[0]) as connection:
                    said = b""
                    while not said.endswith(b"\n"):
                        said += await connection.recv(100)
                    yield connection, popen.pid, int(said)
            finally:
                os.killpg(popen.pid, signal.SIGKILL)

    async def ask(self, connection: trio.socket.SocketType, *groups: int) -> int | Verdict:
        return await group_of(connection, set(groups), limiter=self.limiter)


@pytest.fixture(params=["unix", "tcp"])
def door(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Door]:
    family = socket.AF_UNIX if request.param == "unix" else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(str(tmp_path / "door") if request.param == "unix" else ("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(30)
        yield Door(listener)


async def test_worker_is_known(door: Door) -> None:
    """The spawned process itself, found among those that are expected; anybody else is a stranger."""
    async with door.client() as (one, group_one, pid_one), door.client() as (two, group_two, _):
        assert group_one == pid_one
        assert await door.ask(one, group_one, group_two) == group_one
        assert await door.ask(two, group_one, group_two) == group_two
        assert await door.ask(one, group_two) is Verdict.STRANGER
        assert await door.ask(one) is Verdict.STRANGER


async def test_worker_behind_a_wrapper_is_known(door: Door) -> None:
    """What a shell started belongs to the shell's group."""
    async with door.client() as (_, other, __), door.client("sh", "-c", WRAPPED, "sh") as (connection, group, pid):
        assert pid != group
        assert await door.ask(connection, other, group) == group
        assert claimed_group(pid, {other, group}) == group
        assert claimed_group(pid, {other}) is None


async def test_worker_that_left_its_group_is_nobodys(door: Door) -> None:
    """The group is all that ties a process to the one we spawned."""
    async with door.client("sh", "-c", 'setsid "$@" & wait', "sh") as (connection, group, pid):
        try:
            assert await door.ask(connection, group) is Verdict.STRANGER
            assert claimed_group(pid, {group}) is None
        finally:
            os.kill(pid, signal.SIGKILL)


async def test_we_are_a_stranger_ourselves(door: Door) -> None:
    """A connection from this very process is no worker's."""
    async with door.client() as (_, group, __):
        with socket.socket(door.listener.family) as client:
            client.connect(door.listener.getsockname())
            with trio.socket.from_stdlib_socket(door.listener.accept()[0]) as connection:
                assert await door.ask(connection, group) is Verdict.STRANGER


async def test_connection_of_the_dead_is_a_strangers(door: Door) -> None:
    """Once its maker has ended nobody can be asked any more."""
    async with door.client() as (_, group, __):
        script = f"{sys.executable} -S -c '{CLIENT}' {door.address} & echo $!; wait"
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as wrapper:
            assert wrapper.stdout is not None
            pid = int(wrapper.stdout.readline())
            with trio.socket.from_stdlib_socket(door.listener.accept()[0]) as connection:
                os.kill(pid, signal.SIGKILL)
                wrapper.wait()
                try:
                    verdict = await door.ask(connection, group)
                except OSError:  # a TCP connection may be gone altogether
                    verdict = Verdict.STRANGER
                assert verdict is Verdict.STRANGER


async def test_fallback_does_not_know(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not say, that is what we say, and never a guess."""
    monkeypatch.setattr(_platform, "HERE", Portable())
    async with door.client() as (connection, group, _):
        assert await door.ask(connection, group) is Verdict.UNKNOWN


def test_peer_on_another_machine_is_a_stranger() -> None:
    """No socket of this machine is at the other end, so no worker of ours is (promise 10)."""
    groups = {os.getpid()}
    assert isinstance(_platform.HERE, Linux)
    assert _identity._tcp_group(("192.0.2.1", 80), ("192.0.2.7", 4711), groups) is Verdict.STRANGER
    assert _identity._tcp_group(("127.0.0.1", 1), ("127.0.0.1", 2), groups) is Verdict.STRANGER
    assert _identity._tcp_group(("::1", 1), ("::1", 2), groups) is Verdict.STRANGER


def test_claims() -> None:
    """Any number may be claimed; only a leader or a member of a group is believed, and the leader also as a zombie."""
    assert claimed_group(os.getpid(), {os.getpgid(0)}) == os.getpgid(0)
    assert claimed_group(os.getpid(), {1 << 22}) is None
    for absurd in (1 << 22, 1 << 31, 1 << 63, 1 << 70):
        assert claimed_group(absurd, {os.getpgid(0)}) is None
    with subprocess.Popen(["true"], process_group=0) as popen:
        os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        assert claimed_group(popen.pid, {popen.pid}) == popen.pid


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("fe80::1%lo", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    """Loopback is what only this machine reaches, in each of its spellings."""
    assert is_loopback(host) is loopback
